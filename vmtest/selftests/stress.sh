#!/bin/bash
# Runs stress-ng's stressors inside the VM, one by one.
#
#   stress.sh PLAN SECONDS SYSCTL=VALUE...
#
# PLAN: lines of stress.txt; SECONDS: for each; SYSCTL=VALUE: what vm.SYSCTL is
# to be from boot to the end. Prints a line for each as the guest's tests do.
set -u
plan=$1 seconds=$2
shift 2
here=$(cd -- "$(dirname -- "$0")" && pwd)
. "$here/common.sh"

command -v stress-ng >/dev/null || die "no stress-ng"
expect "$@"
swap_space
echo 64 >/proc/sys/vm/nr_hugepages
ext4 || die "no ext4" # for files that are mapped and synced
chmod 1777 /run/ext4 /dev/shm
cd /run/ext4 || die "no directory"

# How often the stressors did what they do; 0 when one of them never did.
operations() {
    awk '$1 == "bogo-ops:" { n++; sum += $2; none += $2 == 0 } END { print n && !none ? sum : 0 }' "$1"
}

count=0 failed=0
while IFS=$'\t' read -r name _ links forks special options; do
    echo "stress: begin $name" >/dev/kmsg
    as=() also=0
    case $special in
        nobody) as=(setpriv --reuid=65534 --regid=65534 --clear-groups) ;;
        [0-9]*) also=$special ;;
    esac
    shared; before_ptshare=$ptshare before_odf=$odf
    # One operation of some takes longer than that on a busy machine; tmpfs' takes minutes with the kernel's checkers.
    for time in "$seconds" $((seconds * 6)) $((seconds * 40)); do
        # shellcheck disable=SC2086
        output=$(timeout -k 5 $((time * 2 + 90)) "${as[@]}" \
            stress-ng --verify --timeout "${time}s" --oomable --temp-path /run/ext4 \
            --metrics --yaml /run/ext4/metrics $options </dev/null 2>&1)
        status=$?
        operations=$(operations /run/ext4/metrics)
        [ $status = 0 ] && [ "$operations" = 0 ] || break
    done
    shared; ptshare=$((ptshare - before_ptshare)) odf=$((odf - before_odf))
    why=
    if [ $status = 124 ] || [ $status = 137 ]; then
        why="timed out"
    elif [ $status != 0 ] && [ $status != "$also" ]; then
        why="exit status $status"
    elif [ "$operations" = 0 ]; then
        why="nothing done"
    elif [ $ptshare -lt "$links" ] || [ $odf -lt "$forks" ]; then
        why="only $ptshare links, $odf tables forked"
    fi
    if [ -z "$why" ]; then
        echo "ok $name ($operations operations, $ptshare links, $odf tables forked)"
    else
        echo "FAIL $name: $why: $(grep -v metric <<<"$output" | tail -n 4 | tr '\n' '|')"
        failed=1
    fi
    count=$((count + 1))
    rm -rf /run/ext4/* /dev/shm/* /tmp/*
done <<<"$plan"
expect "$@"
echo "end $count"
exit $failed
