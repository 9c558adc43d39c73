#!/bin/sh
# That a disk forgets what was not flushed, without anything of ours between: pages of A written and flushed, then pages of B
# written past the page cache and not flushed. forgets.sh write | count
. /job/lib.sh
pages=512
fill() { # LETTER FLAGS
  tr '\0' "$1" </dev/zero | dd of=/dev/disk-raw bs=4096 count=$pages iflag=fullblock oflag=direct conv="$2" 2>/dev/null
}
case $1 in
  write)
    fill A fsync
    fill B notrunc
    echo "written"
    sleep 60
    ;;
  count)
    for letter in A B; do
      echo "$letter: $(dd if=/dev/disk-raw bs=4096 count=$pages 2>/dev/null | tr -cd $letter | wc -c | awk '{ print $1 / 4096 }')"
    done
    ;;
esac
