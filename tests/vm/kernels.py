"""The kernels that guests boot: Debian's cloud kernels, which carry ublk and nbd as modules.

Owns: which kernels, which of their modules a guest loads, and in what order.
Does not own: fetching packages (tests/debian.py) or booting (vm.py).
"""
import lzma
import pathlib
import re
import sys

import debian

# Suite, and the version that is known to work: once the mirror has dropped it, the newest of the suite takes its place.
KERNELS = {
    "new": ("trixie-backports", "linux-image-7.2.12+deb13-cloud-amd64"),
    "old": ("trixie", "linux-image-6.12.107+deb13-cloud-amd64"),
}
NEWEST = "linux-image-cloud-amd64"
# Every guest's; inserting one takes up to seconds under emulation, so others are named by --module. Without mq-deadline
# every queue's scheduler is "none", as if a udev rule had set it. What a module depends on comes by itself.
MODULES = ["virtio_blk", "virtio_net", "mq_deadline"]


def fetch(which):
    """The directory with the unpacked kernel."""
    suite, pinned = KERNELS[which]

    def unpack(directory):
        with debian.Suite(suite, directory) as packages:
            start = pinned if packages.knows(pinned) else NEWEST
            if start == NEWEST:
                print(f"{pinned} is gone from {suite}: taking the newest", file=sys.stderr)
            packages.download(kernel_packages(packages, start), directory)

    return debian.once(f"kernel-{which}", unpack)


def kernel_packages(packages, start):
    """What a kernel package is made of; initramfs generators and the like are left out."""
    wanted, found = [start], []
    while wanted:
        found.append(wanted.pop())
        depends = re.search(r"^Depends: (.*)", packages.call("apt-cache", "show", "--no-all-versions", found[-1]), re.M)
        for name in re.findall(r"linux-(?:image|binary|modules)-[\w.+-]+", depends.group(1) if depends else ""):
            if name not in found and name not in wanted:
                wanted.append(name)
    return found


class Kernel:
    def __init__(self, which):
        directory = fetch(which)
        images = [path for path in directory.rglob("vmlinuz*") if path.is_file()]
        if not images:
            raise SystemExit(f"no kernel in {directory}")
        self.image = images[0]
        self.module_files = {
            path.name.split(".ko")[0].replace("-", "_"): path
            for path in directory.rglob("*.ko*")
        }

    def modules(self, more):
        """Names and contents of modules in the order in which they can be inserted."""
        ordered = {}

        def add(name, needed):
            name = name.replace("-", "_")
            if name in ordered:
                return
            if name not in self.module_files:
                if needed:
                    raise SystemExit(f"this kernel has no module {name}")
                return  # built in
            content = read_module(self.module_files[name])
            for dependency in re.search(rb"\0depends=([^\0]*)", content).group(1).decode().split(","):
                if dependency:
                    add(dependency, True)
            ordered[name] = content

        for name in MODULES:
            add(name, False)
        for name in more:
            add(name, True)
        return ordered


def read_module(path):
    content = pathlib.Path(path).read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix == ".ko":
        return content
    raise SystemExit(f"{path}: compressed in a way that nobody here knows")
