#!/usr/bin/python3
"""Packages of any Debian suite, unpacked beside the system: newer clients, other kernels, sources.

Owns: finding the mirror that this machine's apt uses, a private apt for another suite, and the cache of what came.
Does not own: what is done with it. The package state of this machine is neither read nor changed.

    debian.py unpack SUITE NAME PACKAGE...    the packages and all they depend on; prints the directory
    debian.py source SUITE NAME PACKAGE       the upstream source of one package; prints the directory

NAME is what the result is called in the cache, where it stays until it is deleted. The cache is `downloads` below
cargo's target directory, or what BLOCKHOUSE_TEST_CACHE says.
"""
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

TOP = pathlib.Path(__file__).resolve().parent.parent


def cache():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", TOP / "target"))
    return pathlib.Path(os.environ.get("BLOCKHOUSE_TEST_CACHE", target / "downloads")).absolute()


def once(name, make):
    """The directory `name` of the cache, made by `make(directory)` unless an earlier run did. Safe to call at once."""
    directory = cache() / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(cache() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = cache() / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            print(f"fetching {name} into {directory}", file=sys.stderr)
            make(unfinished)
            unfinished.rename(directory)
    return directory


class Suite:
    """apt on lists of its own. Use it in a `with`: what it needed while it worked is removed then."""

    def __init__(self, suite, directory):
        self.directory = directory.absolute() / ".apt"
        for name in ("lists/partial", "cache/archives/partial", "parts", "source"):
            (self.directory / name).mkdir(parents=True)
        (self.directory / "status").touch()
        sites = subprocess.check_output(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"],
            text=True).split()
        if not sites:
            sys.exit("this machine's apt knows no Debian mirror")
        lines = (f"{kind} {sites[0]} {suite} main\n" for kind in ("deb", "deb-src"))
        (self.directory / "sources.list").write_text("".join(lines))
        settings = {"State": ".", "State::lists": "lists", "State::status": "status", "Cache": "cache",
                    "Etc::sourcelist": "sources.list", "Etc::sourceparts": "parts"}
        (self.directory / "apt.conf").write_text(
            "".join(f'Dir::{key} "{self.directory / value}";\n' for key, value in settings.items())
            + 'APT::Sandbox::User "root";\nAcquire::Languages "none";\nAcquire::Retries "3";\n')
        self.call("apt-get", "-qq", "update")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.directory)

    def call(self, *command, **options):
        environment = {**os.environ, "APT_CONFIG": str(self.directory / "apt.conf"), "LC_ALL": "C"}
        options = {"cwd": self.directory / "source", "text": True, "env": environment, **options}
        return subprocess.check_output(command, **options)

    def knows(self, package):
        return package in self.call("apt-cache", "pkgnames", package).split()

    def unpack(self, packages, into, options=()):
        """These packages and, unless `options` say otherwise, all they depend on. No script of theirs runs."""
        self.call("apt-get", "-qq", "install", "--download-only", "--no-install-recommends", *options, *packages)
        for archive in sorted((self.directory / "cache/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", archive, into], check=True)
            archive.unlink()

    def download(self, packages, into):
        """These packages alone."""
        self.call("apt-get", "-qq", "download", *packages)
        for archive in sorted((self.directory / "source").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", archive, into], check=True)
            archive.unlink()

    def source(self, package, into):
        """The upstream source of a package, without the distribution's changes."""
        self.call("apt-get", "-qq", "source", "--download-only", package)
        archive = next((self.directory / "source").glob("*.orig.tar.*[!c]"))
        subprocess.run(["tar", "-xf", archive, "-C", into, "--strip-components=1"], check=True)


def main():
    kind, suite, name, *packages = sys.argv[1:]

    def make(directory):
        with Suite(suite, directory) as packages_of:
            if kind == "unpack":
                packages_of.unpack(packages, directory)
            elif kind == "source":
                packages_of.source(packages[0], directory)
            else:
                sys.exit(__doc__)

    print(once(name, make))


if __name__ == "__main__":
    main()
