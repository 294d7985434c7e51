# What the scripts here have in common.

die() { echo "${0##*/}: $*" >&2; exit 125; }

# expect SYSCTL=VALUE...: the kernel was booted so, and nothing has changed it.
expect() {
    local pair
    for pair; do
        [ "$(<"/proc/sys/vm/${pair%=*}")" = "${pair#*=}" ] || die "vm.$pair is not so"
    done
}

# Sets $ptshare and $odf: how often, since boot, an entry was pointed at a
# file's shared table and a fork left a table in common. All of the file is read
# first: read goes back to the end of each line, and that is somewhere else when
# a number before it has grown by a digit.
shared() {
    local name value
    ptshare=0 odf=0
    while read -r name value; do
        case $name in
            ptshare_link) ptshare=$value ;;
            odf_table_shared) odf=$value ;;
        esac
    done <<<"$(</proc/vmstat)"
}

swap_space() {
    echo 512M >/sys/block/zram0/disksize && mkswap -q /dev/zram0 && swapon /dev/zram0 || die "no swap"
}

# A filesystem that is not in memory, at /run/ext4.
ext4() {
    mountpoint -q /run/ext4 && return
    local device
    # Not mount's own -o loop, which keeps the device open for writing: that
    # is refused here (BLK_DEV_WRITE_MOUNTED).
    truncate -s 320M /run/ext4.img && mkfs.ext4 -q -F /run/ext4.img &&
        device=$(losetup --find --show /run/ext4.img) &&
        mkdir -p /run/ext4 && mount -t ext4 "$device" /run/ext4
}

# tries N COMMAND...: up to N times, until it succeeds, and says so each time.
# For what fails now and then on stock, too, and for a known reason only.
tries() {
    local left=$1 output status
    shift
    while :; do
        output=$("$@" 2>&1)
        status=$?
        left=$((left - 1))
        [ $status != 0 ] && [ $left -gt 0 ] || break
        echo "@@ again $*"
        sed 's/^/# /' <<<"$output"
    done
    printf '%s\n' "$output"
    return $status
}

# fixed COMMAND...: without random addresses. The tests of userfaultfd and those
# of huge pages want to map something at 1 GiB, where now and then the heap is:
# they are no position independent programs, and the heap begins somewhere in
# the first GiB behind them.
fixed() { setarch -R "$@"; }
