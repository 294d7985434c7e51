#!/bin/bash
# Runs the kernel's mm selftests inside the VM, one by one.
#
#   run.sh PROGRAMS PLAN [SYSCTL=VALUE]
#
# PROGRAMS: directory of the built selftests; PLAN: a line for each that is to
# be run: name, seconds at most, command; SYSCTL=VALUE: what vm.SYSCTL is to be
# from boot to the end.
#
# stdout is for a program: what each test prints, between
#   @@ begin NAME
#   @@ end NAME STATUS SECONDS ptshare=LINKS odf=FORKS
# with the number of tables shared meanwhile, by links and by forks, and
#   @@ again ...
# where a part of it is tried again.
set -u
programs=$1 plan=$2
shift 2
here=$(cd -- "$(dirname -- "$0")" && pwd)
. "$here/common.sh"

# The programs and their scratch files in the guest's own memory, wherever the
# machine keeps the cache.
mkdir -p /run/selftests || die "no /run"
cp "$programs"/* "$here"/{gup-matrix,uffd-units}.sh /run/selftests/ || die "no programs in $programs"
mountpoint -q /tmp || mount -t tmpfs -o mode=1777 tmpfs /tmp || die "no /tmp"
cd /run/selftests || die "no directory"
export PATH=/run/selftests:$PATH
export -f ext4 fixed tries

expect "$@"
swap_space
# khugepaged comes every ten seconds, and what a test has just split it makes huge again before the
# test looks: split_huge_page_test fails so on stock. Its own test lets it come as it needs.
echo 86400000 >/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs || die "no khugepaged"

# What a test may change, or leave changed when it is killed.
knobs=(
    /proc/sys/vm/{nr_hugepages,nr_overcommit_hugepages,overcommit_memory,compact_unevictable_allowed,enable_soft_offline}
    /proc/sys/kernel/{shmmax,shmall}
    /sys/kernel/mm/transparent_hugepage/{enabled,defrag,shmem_enabled,use_zero_page}
    /sys/kernel/mm/transparent_hugepage/hugepages-*/{enabled,shmem_enabled}
    /sys/kernel/mm/transparent_hugepage/khugepaged/{defrag,alloc_sleep_millisecs,scan_sleep_millisecs,pages_to_scan}
    /sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_{none,swap,shared}
    /sys/kernel/mm/ksm/{run,pages_to_scan,sleep_millisecs,use_zero_pages,max_page_sharing,merge_across_nodes}
)
# Sets $text. No process is started: there are many of these, and emulation is slow.
value() {
    text=
    read -r text 2>/dev/null <"$1"
    # Of a choice, the one in brackets.
    [[ $text =~ \[([^]]*)\] ]] && text=${BASH_REMATCH[1]}
}
declare -A initial
for knob in "${knobs[@]}"; do
    if [ -w "$knob" ]; then
        value "$knob"
        initial[$knob]=$text
    fi
done
restore() {
    local knob text
    value /sys/kernel/mm/ksm/run
    # Merged pages are taken apart before merging stops.
    [ "$text" = "${initial[/sys/kernel/mm/ksm/run]}" ] || echo 2 >/sys/kernel/mm/ksm/run
    for knob in "${!initial[@]}"; do
        value "$knob"
        [ "$text" = "${initial[$knob]}" ] || echo "${initial[$knob]}" >"$knob"
    done
}

while IFS=$'\t' read -r name seconds command; do
    echo "@@ begin $name"
    echo "selftests: begin $name" >/dev/kmsg
    shared; before_ptshare=$ptshare before_odf=$odf
    start=$EPOCHREALTIME
    timeout -k 5 "$seconds" bash -c "$command" </dev/null 2>&1
    status=$?
    elapsed=$(((${EPOCHREALTIME/./} - ${start/./}) / 100000))
    shared
    printf '\n@@ end %s %d %d.%d ptshare=%d odf=%d\n' "$name" "$status" \
        $((elapsed / 10)) $((elapsed % 10)) $((ptshare - before_ptshare)) $((odf - before_odf))
    restore
done <<<"$plan"
expect "$@"
