#!/bin/busybox sh
# The guest's first process: mounts what it was given, runs the job, tells its exit code, and turns the power off.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir -p /dev/pts /dev/shm /proc /sys /tmp /run /root /disk /share /var/tmp
/bin/busybox --install -s /usr/bin 2>/dev/null
export PATH=/usr/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/mounts /etc/mtab
ulimit -n 65536

for module in /modules/*.ko; do
  insmod "$module" || echo "cannot insert $module"
done

port() {
  for found in /sys/class/virtio-ports/*; do
    [ "$(cat "$found/name")" = "$1" ] && echo "/dev/${found##*/}"
  done
}
output=$(port output) status=$(port status)

ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2

give_up() {
  echo started >"$status"
  echo "$1" >"$output"
  poweroff -f
}
for block in /sys/block/vd*; do
  [ -e "$block/serial" ] || continue
  name=$(cat "$block/serial") device=/dev/${block##*/}
  fs=$(sed -n "s/^$name //p" /disks)
  ln -s "$device" "/dev/disk-$name"
  [ "$fs" = raw ] && continue
  mkdir -p "/disk/$name"
  busybox mount -t "$fs" "$device" "/disk/$name" || give_up "cannot mount the disk $name as $fs"
done
while read -r name; do
  mkdir -p "/share/$name"
  busybox mount -t virtiofs "$name" "/share/$name" || give_up "cannot mount the share $name"
done </shares

cd /root || give_up "no /root"
echo started >"$status"
eval "set -- $(cat /job/arguments)"
/job/main "$@" </dev/null >"$output" 2>&1
code=$?
sync
umount -a 2>/dev/null
echo "$code" >"$status"
poweroff -f
