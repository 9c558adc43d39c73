#!/bin/sh
# Power loss. A file system on a volume whose state lies on a disk that forgets:
#   power.sh write fsync|none   writes files, with an fsync each or none, until the power is cut, and says when each is done
#   power.sh check COUNT        after the cut: says how many of the first COUNT files are there, and whole
. /job/lib.sh
mount_point=/tmp/mount
mkdir -p $mount_point

content() { # NUMBER: the same for the same number, 4 to 68 KiB
  seed=$(printf 'file %s' "$1" | md5sum | cut -c1-32)
  size=$((4096 + $1 * 7919 % 65536))
  yes "$seed" | head -c $size
}

case $1 in
  write)
    # What nobody syncs goes to the disk soon nevertheless, so that it is the disk that forgets it, half of it.
    echo 10 >/proc/sys/vm/dirty_writeback_centisecs
    echo 20 >/proc/sys/vm/dirty_expire_centisecs
    start_daemon /disk/state
    cli volume create disk --size 256M
    cli volume attach disk >/dev/null
    nbd_connect disk nbd0 unix 2
    mkfs.ext4 -q -E lazy_itable_init=0 /dev/nbd0
    mount -t ext4 /dev/nbd0 $mount_point
    sync
    # Beside it, what nobody syncs: it may be lost, and it must not harm what was.
    (while :; do dd if=/dev/urandom of=$mount_point/noise bs=64k count=64 2>/dev/null; done) &
    number=0
    while :; do
      number=$((number + 1))
      content $number >/tmp/content
      dd if=/tmp/content of=$mount_point/file-$number bs=4k conv="$([ "$2" = fsync ] && echo fsync || echo notrunc)" 2>/dev/null
      echo "done $number"
    done
    ;;
  check)
    start_daemon /disk/state
    grep -E 'attached again|recover' /tmp/daemon.log || true
    nbd_connect disk nbd0 unix 2
    mount -t ext4 /dev/nbd0 $mount_point # replays its journal
    there=0
    number=0
    while [ $number -lt "$2" ]; do
      number=$((number + 1))
      content $number >/tmp/content
      if cmp -s /tmp/content $mount_point/file-$number; then there=$((there + 1)); else echo "file-$number is not what was written"; fi
    done
    umount $mount_point
    e2fsck -fn /dev/nbd0 >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "the file system is damaged"; }
    # And it goes on from there.
    mount -t ext4 /dev/nbd0 $mount_point
    dd if=/init of=$mount_point/after conv=fsync 2>/dev/null
    umount $mount_point
    nbd_disconnect nbd0
    stop_daemon
    echo "there: $there"
    ;;
esac
