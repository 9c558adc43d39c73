"""The guest's root file system: a cpio archive ("newc"), written anew for every run.

Owns: the archive, and which libraries a program needs. Programs come from an unpacked Debian suite or from this machine;
their libraries come from the suite where it has them, so that a guest is the same on every machine.
Does not own: what a guest is for.
"""
import os
import pathlib
import subprocess
import tempfile

ELF = b"\x7fELF"
# Debug sections of a program this large cost more time to load than a run takes.
STRIP_FROM_BYTES = 16 << 20


class Initramfs:
    def __init__(self, path, suite):
        self.out = open(path, "wb")
        self.suite = suite  # the directory with the suite's files
        self.names = set()
        self.loader = suite / "usr/lib64/ld-linux-x86-64.so.2"
        self.libraries = ":".join(str(suite / "usr/lib/x86_64-linux-gnu" / name) for name in ("", "systemd", "ceph"))
        for folder in ("bin", "sbin", "lib", "lib64"):
            self.file(f"usr/{folder}/.keep", b"")
            self.entry(folder, 0o120777, f"usr/{folder}".encode())

    def entry(self, name, mode, content=b""):
        """The first one of a name wins."""
        if name in self.names:
            return
        self.names.add(name)
        path = name.encode() + b"\0"
        numbers = (len(self.names), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        for part in (header, content):
            self.out.write(part + bytes(-len(part) % 4))

    def file(self, name, content, mode=0o644):
        name = name.lstrip("/")
        for folder in reversed(pathlib.PurePath(name).parents[:-1]):
            self.entry(str(folder), 0o040755)
        self.entry(name, 0o100000 | mode, content)

    def program(self, name, guest=None):
        """A path of this machine, or the name of a program of the suite. It goes to /usr/bin unless told otherwise,
        with the libraries that it needs."""
        if "/" in name:
            path = pathlib.Path(name)
            guest = guest or f"usr/bin/{path.name}"
        else:
            path = next((found for folder in ("usr/sbin", "usr/bin", "usr/lib/systemd")
                         if (found := self.suite / folder / name).exists()), None)
            if path is None:
                raise SystemExit(f"the guest's packages have no program {name}")
            guest = guest or str(path.relative_to(self.suite))
        content = path.read_bytes()
        if content.startswith(ELF):
            for library in self.needed(path):
                self.library(library)
            if len(content) > STRIP_FROM_BYTES:
                content = stripped(path)
        self.file(guest, content, path.stat().st_mode & 0o777 | 0o500)

    def needed(self, path):
        """The loader and the libraries; a static program has none, and says so by failing."""
        listing = subprocess.run([self.loader, "--library-path", self.libraries, "--list", path], capture_output=True, text=True)
        if listing.returncode != 0:
            return []
        found = (line.split(" => ")[-1].split(" (")[0].strip() for line in listing.stdout.splitlines())
        # The loader is named by the place that a program looks for it at: this machine's.
        return [self.loader, *(name for name in found if name.startswith("/") and "/ld-linux" not in name)]

    def library(self, path):
        path = pathlib.Path(os.path.normpath(path))
        guest = path.relative_to(self.suite if path.is_relative_to(self.suite) else "/")
        if guest.parts[0] == "lib":
            guest = pathlib.PurePath("usr", guest)
        self.file(str(guest), path.read_bytes(), 0o755)

    def tree(self, folder):
        """All files below a folder of the suite, at the same place."""
        for path in sorted((self.suite / folder).rglob("*")):
            if path.is_file():
                self.file(str(path.relative_to(self.suite)), path.read_bytes(), path.stat().st_mode & 0o777)

    def close(self):
        self.entry("TRAILER!!!", 0)
        self.out.close()


def stripped(path):
    with tempfile.NamedTemporaryFile() as out:
        subprocess.run(["strip", "--strip-debug", "-o", out.name, path], check=True)
        return pathlib.Path(out.name).read_bytes()
