#!/usr/bin/python3
"""Runs one job as root in a small virtual machine, on one of two Debian kernels, and returns its exit code.

    vm.py --kernel new --program target/sim/blockhouse --disk state:2G:xfs -- tests/vm/jobs/nbd.sh unix 4

The job is a script or a program of this machine; its output is streamed here. The guest has busybox, what --program
names, and the kernel modules of block storage. Everything is fetched once (see tests/debian.py), nothing is installed
here, and no right is needed but that to run programs.

    --disk NAME:SIZE[:FS[:lossy]]   FS is ext4, xfs or raw; at /disk/NAME, or /dev/disk-NAME if raw. Lies in --state
                                    and stays there. `lossy` ones forget what was not flushed when the power is cut;
                                    on all others it survives, whatever the job did.
    --share NAME=DIR                a directory of this machine, at /share/NAME: a pool, or where results go
    --forward HERE:GUEST            a TCP port of the guest; this machine is 10.0.2.2 there, by name `host`
    --cut-when REGEX                cuts the power when a line of the output matches,
    --cut-within SECONDS            or at a moment of these after it, which --seed decides
    --module NAME                   ublk_drv, nbd, loop, …; what disks need comes by itself
    --udev                          udevd and the rules of the distribution; the job starts it (see jobs/lib.sh)

Exit codes: the job's; 124 out of time, 125 the guest died, 126 the guest cannot be had, 137 the power was cut.
"""
import argparse
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(1, str(HERE))

import debian
import kernels
from initramfs import Initramfs
from lossy_disk import LossyDisk

OUT_OF_TIME, GUEST_DIED, NOT_TO_BE_HAD, POWER_CUT = 124, 125, 126, 137
# An emulated kernel dies, or hangs, while it boots once in a while. What happens later is the job's.
BOOTS_MAX = 3
BOOT_SECONDS_MAX = 120
DID_NOT_BOOT = -1
# What jobs may name by --program.
GUEST_PACKAGES = ["busybox-static", "dash", "e2fsprogs", "xfsprogs", "nbd-client", "util-linux", "mount", "fio", "udev", "kmod", "diffutils"]
EMULATOR_PACKAGES = ["qemu-system-x86", "seabios", "virtiofsd"]
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-s", "size=4096"],
}


class Packages:
    """Programs of an unpacked suite that run here, with their own loader and libraries."""

    def __init__(self, name, packages):
        def unpack(directory):
            with debian.Suite("trixie", directory) as suite:
                suite.unpack(packages, directory)

        self.directory = debian.once(name, unpack)

    def command(self, program):
        return [str(self.directory / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path",
                str(self.directory / "usr/lib/x86_64-linux-gnu"), str(self.directory / "usr" / program)]


class Disk:
    def __init__(self, text, state, tools):
        self.name, size, *kind = text.split(":")
        self.fs = kind[0] if kind else "raw"
        self.lossy = kind[1:] == ["lossy"]
        self.path = state / f"{self.name}.disk"
        self.server = None
        if not self.path.exists():
            new = self.path.with_suffix(".new")
            subprocess.run(["truncate", "-s", size, new], check=True)
            if self.fs != "raw":
                program, *arguments = MKFS[self.fs]
                subprocess.run([*tools.command(f"sbin/{program}"), *arguments, new], check=True, stdout=subprocess.DEVNULL)
            new.rename(self.path)

    def attach(self, run, seed):
        """The emulator's arguments. A lossy disk is served from here."""
        file = str(self.path)
        if self.lossy:
            address = run / f"{self.name}.sock"
            self.server = LossyDisk(self.path, address, seed)
            file = f"nbd+unix:///?socket={address}"
        return ["-drive", f"if=none,id={self.name},format=raw,cache=writeback,discard=unmap,file={file}", "-device",
                f"virtio-blk-pci,drive={self.name},serial={self.name},logical_block_size=4096,physical_block_size=4096"]


class Share:
    """A directory of this machine in the guest."""

    def __init__(self, text, run, emulator):
        self.name, directory = text.split("=", 1)
        self.address = run / f"{self.name}.share"
        self.process = subprocess.Popen(
            [*emulator.command("libexec/virtiofsd"), "--socket-path", self.address, "--shared-dir", directory,
             "--sandbox", "none", "--log-level", "error"], stdin=subprocess.DEVNULL)

    def wait(self):
        while not self.address.exists():
            if self.process.poll() is not None:
                raise SystemExit(f"virtiofsd ended with {self.process.returncode}")
            time.sleep(0.01)

    def attach(self):
        return ["-chardev", f"socket,id={self.name},path={self.address}", "-device",
                f"vhost-user-fs-pci,chardev={self.name},tag={self.name}"]


class Guest:
    """One life of the guest, from power on to power off."""

    def __init__(self, options, run):
        self.options, self.run = options, run
        self.ended_by = None  # why it was ended from outside
        self.emulator = Packages("emulator", EMULATOR_PACKAGES)
        self.tools = Packages("guest", GUEST_PACKAGES)
        self.kernel = kernels.Kernel(options.kernel)
        self.disks = [Disk(text, options.state, self.tools) for text in options.disk]

    def write_initramfs(self, path):
        image = Initramfs(path, self.tools.directory)
        image.file("init", (HERE / "init.sh").read_bytes(), 0o755)
        image.file("disks", "".join(f"{disk.name} {disk.fs}\n" for disk in self.disks).encode())
        image.file("shares", "".join(f"{share.split('=')[0]}\n" for share in self.options.share).encode())
        image.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        image.file("etc/group", b"root:x:0:\n")
        image.file("etc/hosts", b"127.0.0.1 localhost\n10.0.2.2 host\n")
        image.program("busybox")
        # The shell of busybox takes its own programs before those that were brought along.
        image.program("dash", "usr/bin/sh")
        modules = [*self.options.module, *{disk.fs for disk in self.disks if disk.fs == "xfs"}]
        for number, (name, content) in enumerate(self.kernel.modules(modules).items()):
            image.file(f"modules/{number:02}-{name}.ko", content)
        for text in self.options.program:
            host, _, guest = text.partition("=")
            image.program(host, guest)
        if self.options.udev:
            for program in ("udevadm", "systemd-udevd", "kmod"):
                image.program(program)
            for folder in ("usr/lib/udev/rules.d",):
                image.tree(folder)
        job, *arguments = self.options.job
        image.program(str(pathlib.Path(job).resolve()), "job/main")
        for path in (HERE / "jobs").glob("lib*.sh"):
            image.file(f"job/{path.name}", path.read_bytes())
        image.file("job/arguments", " ".join(map(shlex.quote, arguments)).encode())
        image.close()

    def command(self, initramfs, shares):
        options, data = self.options, self.emulator.directory / "usr/share"
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}"
                           for here, there in (text.split(":") for text in options.forward))
        command = [
            *self.emulator.command("bin/qemu-system-x86_64"), "-L", str(data / "qemu"), "-L", str(data / "seabios"),
            # That emulated processor gets cmpxchg16b wrong now and then.
            "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", str(options.cpus),
            "-m", str(options.memory), "-object", f"memory-backend-memfd,id=memory,size={options.memory}M,share=on",
            "-numa", "node,memdev=memory", "-nodefaults", "-display", "none", "-no-reboot",
            "-kernel", str(self.kernel.image), "-initrd", str(initramfs),
            "-append", f"console=ttyS0 panic=-1 mitigations=off quiet {options.append}",
            "-serial", f"file:{self.run}/console",
            "-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-serial-pci", "-chardev", "file,id=output,path=/dev/stdout",
            "-chardev", f"file,id=status,path={self.run}/status",
        ]
        for port in ("output", "status"):
            command += ["-device", f"virtserialport,chardev={port},name={port}"]
        for disk in self.disks:
            command += disk.attach(self.run, options.seed)
        for share in shares:
            command += share.attach()
        return command

    def live(self):
        initramfs = self.run / "initramfs"
        self.write_initramfs(initramfs)
        shares = [Share(text, self.run, self.emulator) for text in self.options.share]
        try:
            for share in shares:
                share.wait()
            with subprocess.Popen(self.command(initramfs, shares), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as emulator:
                timers = [threading.Timer(self.options.timeout, self.end, [emulator, OUT_OF_TIME]),
                          threading.Timer(BOOT_SECONDS_MAX, self.end_unless_booted, [emulator])]
                for timer in timers:
                    timer.start()
                try:
                    self.watch(emulator)
                finally:
                    for timer in timers:
                        timer.cancel()
                    emulator.kill()
        finally:
            for share in shares:
                share.process.kill()
                share.process.wait()
        for disk in self.disks:
            if disk.server:
                print(f"disk {disk.name}: {disk.server.power_off(cut=self.ended_by is not None)}", flush=True)

    def watch(self, emulator):
        for line in emulator.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            if self.options.cut_when and re.search(self.options.cut_when.encode(), line):
                delay = random.Random(self.options.seed).uniform(0, self.options.cut_within)
                timer = threading.Timer(delay, self.end, [emulator, POWER_CUT])
                timer.daemon = True
                timer.start()

    def end_unless_booted(self, emulator):
        if not self.read("status"):
            self.end(emulator, DID_NOT_BOOT)

    def end(self, emulator, why):
        self.ended_by = self.ended_by or why
        emulator.send_signal(signal.SIGKILL)

    def read(self, name):
        path = self.run / name
        return path.read_text(errors="replace") if path.exists() else ""


def run(options):
    options.state.mkdir(parents=True, exist_ok=True)
    for _ in range(BOOTS_MAX):
        with tempfile.TemporaryDirectory(prefix="bh-vm-") as directory:
            guest = Guest(options, pathlib.Path(directory))
            guest.live()
            console, status = guest.read("console"), guest.read("status").split()
        if options.console:
            options.console.write_text(console)
        if guest.ended_by == OUT_OF_TIME:
            print(f"out of time after {options.timeout} s; the console ends with:\n{console[-3000:]}")
        if guest.ended_by == DID_NOT_BOOT:
            print(f"the guest hung in its boot, booting again; its console ends with:\n{console[-2000:]}", flush=True)
            continue
        if guest.ended_by:
            return guest.ended_by
        if len(status) == 2:
            return int(status[1])
        print(f"the guest died; its console ends with:\n{console[-4000:]}", flush=True)
        if status:
            break
        print("it had not begun its job: booting again", flush=True)
    return GUEST_DIED


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=kernels.KERNELS, default="new")
    parser.add_argument("--program", action="append", default=[], metavar="PROGRAM[=GUEST]")
    parser.add_argument("--module", action="append", default=[])
    parser.add_argument("--disk", action="append", default=[], metavar="NAME:SIZE[:FS[:lossy]]")
    parser.add_argument("--share", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--forward", action="append", default=[], metavar="HERE:GUEST")
    parser.add_argument("--udev", action="store_true")
    parser.add_argument("--state", type=pathlib.Path, default=None, help="where disks are, by default for this run only")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    parser.add_argument("--append", default="", help="for the kernel's command line")
    parser.add_argument("--console", type=pathlib.Path, help="where to keep what the kernel said")
    parser.add_argument("--timeout", type=float, default=300, help="seconds")
    parser.add_argument("--cut-when", metavar="REGEX")
    parser.add_argument("--cut-within", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=None, help="what a power cut takes")
    parser.add_argument("--fetch", action="store_true", help="only fetch what a run needs")
    parser.add_argument("job", nargs="*")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(1 << 32)
    try:
        Packages("emulator", EMULATOR_PACKAGES), Packages("guest", GUEST_PACKAGES), kernels.Kernel(options.kernel)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"the guest's parts cannot be fetched: {error}")
        return NOT_TO_BE_HAD
    if options.fetch:
        return 0
    if not options.job:
        parser.error("no job")
    started = time.monotonic()
    print(f"{options.kernel} kernel, seed {options.seed}: {' '.join(options.job)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bh-vm-state-") as directory:
        options.state = options.state or pathlib.Path(directory)
        code = run(options)
    print(f"exit code {code} after {time.monotonic() - started:.1f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
