#!/bin/sh
# The kernel's NBD client on a volume: nbd.sh TRANSPORT CONNECTIONS. A file system lives on it through a disconnect and a
# kill of the daemon.
. /job/lib.sh
transport=$1 connections=$2
mount_point=/tmp/mount

clients() { # connections that the daemon serves
  case $transport in
    unix) grep -c ' 03 .*/run/blockhouse/nbd.sock' /proc/net/unix || true ;;
    tcp) grep -c '0100007F:2A39 0100007F:.... 01 ' /proc/net/tcp || true ;;
  esac
}

flushes() { metric volume_flush_operations_total disk; }

check_fs() {
  e2fsck -fn /dev/nbd0 >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "the file system is damaged"; }
}

step "daemon"
start_daemon /disk/state
cli volume create disk --size 1G
cli volume attach disk >/dev/null
nbd_connect disk nbd0 "$transport" "$connections"
step "connected: $(clients) connections"
equal "$(clients)" "$connections" "connections"

queue=/sys/block/nbd0/queue
equal "$(device_bytes nbd0)" 1073741824 "size"
equal "$(cat $queue/logical_block_size)" 4096 "logical block"
equal "$(cat $queue/write_cache)" "write back" "write cache"
equal "$(cat $queue/fua)" 1 "FUA"
equal "$(cat /sys/block/nbd0/ro)" 0 "read-only"
[ "$(cat $queue/discard_max_bytes)" -gt 0 ] || fail "no discard"
step "zeroes: $(cat $queue/write_zeroes_max_bytes), discard: $(cat $queue/discard_max_bytes), request: $(cat $queue/max_sectors_kb) KiB, scheduler: $(cat $queue/scheduler)"

mkfs.ext4 -q -E nodiscard,lazy_itable_init=0 /dev/nbd0
mkdir -p $mount_point
mount -t ext4 -o discard /dev/nbd0 $mount_point
step "mounted"
cp -r /usr /modules /init $mount_point/
(cd $mount_point && find . -type f | sort | xargs md5sum) >/tmp/sums
step "$(wc -l </tmp/sums) files, $(du -sm $mount_point | cut -f1) MiB"

# What a client syncs the daemon flushes.
before=$(flushes)
for number in 1 2 3 4 5; do
  dd if=/init of=$mount_point/synced-$number conv=fsync 2>/dev/null
done
[ "$(flushes)" -ge $((before + 5)) ] || fail "5 fsyncs made $(flushes) - $before flushes"
rm $mount_point/synced-*
sync
umount $mount_point
check_fs

# Discards: of free space, and of a part of the device, which reads as zeros then.
before=$(metric volume_zero_operations_total disk)
mount -t ext4 /dev/nbd0 $mount_point
fstrim -v $mount_point
[ "$(metric volume_zero_operations_total disk)" -gt "$before" ] || fail "fstrim discarded nothing"
(cd $mount_point && md5sum -c /tmp/sums >/dev/null) || fail "files changed by fstrim"
umount $mount_point
check_fs
step "trimmed"

nbd_disconnect nbd0
equal "$(clients)" 0 "connections after the disconnect"
nbd_connect disk nbd0 "$transport" "$connections"
check_fs

# The daemon dies with all that is not in the pool, and comes back.
kill_daemon
nbd_disconnect nbd0
start_daemon /disk/state
nbd_connect disk nbd0 "$transport" "$connections"
check_fs
mount -t ext4 /dev/nbd0 $mount_point
(cd $mount_point && md5sum -c /tmp/sums >/dev/null) || fail "files changed by a restart of the daemon"
umount $mount_point
step "the daemon was killed and came back"

# The same disk with direct I/O and several jobs at once, each block verified.
fio --name=verify --filename=/dev/nbd0 --direct=1 --ioengine=psync --rw=randwrite --bsrange=4k-256k --size=16m \
  --numjobs=2 --offset_increment=256m --verify=crc32c --verify_fatal=1 --verify_state_save=0 --fsync=32 \
  --group_reporting --minimal >/tmp/fio || { cat /tmp/fio; fail "fio"; }
blkdiscard -f /dev/nbd0
cmp -n 16777216 /dev/nbd0 /dev/zero || fail "a discarded device is not zero"
equal "$(metric volume_errors_total disk)" 0 "errors that clients got"
nbd_disconnect nbd0
step "peak memory of the daemon: $(daemon_peak_kib) KiB"
stop_daemon
step "done"
