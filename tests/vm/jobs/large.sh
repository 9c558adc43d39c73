#!/bin/sh
# A volume of 4 TiB through the kernel's NBD client: mkfs.ext4 with its discard, and blkdiscard of it all. Says how long
# each took and how much memory the daemon used: large.sh PEAK_MIB_MAX
. /job/lib.sh
peak_mib_max=$1
now() { cut -d' ' -f1 /proc/uptime; }
took() { # FROM
  echo "$1 $(now)" | awk '{ printf "%.1f s", $2 - $1 }'
}

start_daemon /disk/state
cli volume create disk --size 4T
cli volume attach disk >/dev/null
idle=$(daemon_peak_kib)
nbd_connect disk nbd0 unix 2
equal "$(device_bytes nbd0)" 4398046511104 "size"

from=$(now)
mkfs.ext4 -q -E lazy_itable_init=1,lazy_journal_init=1 /dev/nbd0
sync
step "mkfs.ext4 of 4 TiB: $(took "$from"), peak memory of the daemon $(($(daemon_peak_kib) / 1024)) MiB (idle $((idle / 1024)) MiB)"
mkdir -p /tmp/mount
mount -t ext4 /dev/nbd0 /tmp/mount
cp /init /tmp/mount/init
umount /tmp/mount
e2fsck -n /dev/nbd0 >/tmp/fsck 2>&1 || { tail -n 5 /tmp/fsck; fail "the file system is damaged"; }
step "mounted, written, unmounted"

from=$(now)
blkdiscard -f /dev/nbd0
step "blkdiscard of 4 TiB: $(took "$from"), peak memory of the daemon $(($(daemon_peak_kib) / 1024)) MiB"
cmp -n 1048576 /dev/nbd0 /dev/zero || fail "a discarded device is not zero"
[ "$(($(daemon_peak_kib) / 1024))" -le "$peak_mib_max" ] || fail "the daemon used more than $peak_mib_max MiB"
equal "$(metric volume_errors_total disk)" 0 "errors that clients got"
nbd_disconnect nbd0
from=$(now)
stop_daemon
step "the daemon stopped in $(took "$from")"
