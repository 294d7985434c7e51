#!/bin/bash
# The matrix of gup_test of the kernel's run_vmtests.sh, as one test with a
# case for each combination.
#
#   gup-matrix.sh KINDS [OPTION]...     KINDS: of "-t -T -H", as one word
set -u
kinds=$1
shift
n=0 failed=0
for kind in $kinds; do
    for call in -u -U -a -b -L; do
        for write in -w -W; do
            for pages in 1 512 123; do
                n=$((n + 1))
                words=("$kind" "$call" "$write" -n "$pages" "$@")
                if output=$(gup_test "${words[@]}" 2>&1); then
                    echo "ok $n gup_test ${words[*]}"
                else
                    echo "not ok $n gup_test ${words[*]}: $output"
                    failed=1
                fi
            done
        done
    done
done
exit $failed
