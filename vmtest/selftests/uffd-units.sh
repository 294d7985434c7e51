#!/bin/bash
# uffd-unit-tests, each of its tests in a process of its own: one that fails
# ends the process, and those behind it would not be run.
#
#   uffd-units.sh [PART]     only the tests whose names have this part
set -u
part=${1-}
ran=''
n=0
for test in $(uffd-unit-tests -l); do
    case $test in *"$part"*) ;; *) continue ;; esac
    # Its filter takes a part of the name, and a test that one more specific
    # began with has been run with that.
    for earlier in $ran; do
        case $test in *"$earlier"*) continue 2 ;; esac
    done
    ran="$ran $test"
    n=$((n + 1))
    # On stock, too, this one ends at times with UFFDIO_COPY's ENOENT: its
    # child has moved the mapping before the page comes.
    tries=1
    [ "$test" != events ] || tries=3
    tries $tries fixed uffd-unit-tests -f "$test"
    status=$?
    case $status in
        0) echo "ok $n exit status of $test" ;;
        4) echo "ok $n # SKIP exit status of $test" ;;
        *) echo "not ok $n exit status of $test: $status" ;;
    esac
done
# What failed is in the lines; nothing at all is a failure of its own.
[ $n -gt 0 ]
