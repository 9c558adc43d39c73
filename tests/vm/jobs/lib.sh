# What jobs have in common; to be read with `.`: a daemon in the guest, waiting for events, and saying what failed.
# shellcheck shell=sh
set -eu

fail() {
  echo "FAILED: $*"
  [ -f /tmp/daemon.log ] && tail -n 30 /tmp/daemon.log
  exit 1
}

step() { echo "[$(cut -d' ' -f1 /proc/uptime)] $*"; }

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  end=$(($(cut -d. -f1 /proc/uptime) + $1))
  what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ] || fail "waited too long for $what"
    sleep 0.05
  done
}

equal() { [ "$1" = "$2" ] || fail "$3: $1 instead of $2"; }

socket=/run/blockhouse/control.sock
cli() { blockhouse --socket "$socket" "$@"; }

# start_daemon STATE [POOL]: its state and, unless told otherwise, its pool are below STATE.
start_daemon() {
  mkdir -p /run/blockhouse "$1"
  cat >/tmp/blockhouse.toml <<END
[pool]
dir = "${2:-$1/pool}"
[state]
dir = "$1/state"
runtime_dir = "/run/blockhouse/live"
[nbd]
listen = ["127.0.0.1:10809"]
socket = "/run/blockhouse/nbd.sock"
[http]
listen = "127.0.0.1:8420"
socket = "$socket"
[cache]
size = "16M"
[commit]
dirty_bytes = "${DIRTY:-256M}"
age_seconds = ${AGE:-3600}
END
  blockhouse serve --config /tmp/blockhouse.toml >>/tmp/daemon.log 2>&1 &
  daemon=$!
  wait_for 120 "the daemon" wget -q -O /dev/null http://127.0.0.1:8420/readyz
}

stop_daemon() {
  kill "$daemon"
  wait "$daemon" || fail "the daemon ended with $?"
}

kill_daemon() {
  kill -9 "$daemon"
  wait "$daemon" || true
}

# metric NAME VOLUME
metric() {
  wget -q -O - http://127.0.0.1:8420/metrics | sed -n "s/^blockhouse_$1{volume=\"$2\"} //p"
}

# Peak resident memory of the daemon in KiB.
daemon_peak_kib() { sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$daemon/status"; }

# A device is connected when the kernel knows its server's process or its size.
nbd_connected() { [ "$(cat "/sys/block/$1/size")" != 0 ]; }
nbd_gone() { [ ! -e "/sys/block/$1/pid" ]; }

# nbd_connect VOLUME DEVICE TRANSPORT CONNECTIONS
nbd_connect() {
  case $3 in
    unix) nbd-client -N "$1" -u /run/blockhouse/nbd.sock "/dev/$2" -C "$4" -b 4096 ;;
    tcp) nbd-client -N "$1" 127.0.0.1 10809 "/dev/$2" -C "$4" -b 4096 ;;
  esac || fail "nbd-client cannot connect $1"
  wait_for 30 "/dev/$2" nbd_connected "$2"
}

nbd_disconnect() {
  nbd-client -d "/dev/$1" || fail "nbd-client cannot disconnect $1"
  wait_for 30 "/dev/$1 to be gone" nbd_gone "$1"
}

# Programs of util-linux and e2fsprogs, where busybox has its own.
device_bytes() { blockdev --getsize64 "/dev/$1"; }

# For guests with --udev. Rules of the job go to /etc/udev/rules.d before.
start_udev() {
  mkdir -p /etc/udev/rules.d /run/udev
  /usr/lib/systemd/systemd-udevd --daemon
  udevadm trigger --action=add
  udevadm settle --timeout=60
}
