//! Other people's programs, files to feed them with, and disks to fill up.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const MIB: u64 = 1 << 20;

/// Whether a program is there. In CI it has to be.
pub fn have(program: &str) -> bool {
    let path = format!("/usr/bin:/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let found = path.split(':').any(|dir| Path::new(dir).join(program).is_file());
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Says that something is not tested. In CI that is a failure.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "cannot be tested in CI: {why}");
    eprintln!("skipped: {why}");
}

/// Runs a program: what it printed. With `/usr/sbin` in the path: file system tools lie there.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let (success, text) = try_run(program, arguments);
    assert!(success, "{program} {arguments:?} failed: {text}");
    text
}

#[track_caller]
pub fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let path = format!("/usr/bin:/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("failed to run {program}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Runs a program with its output in a file.
#[track_caller]
pub fn run_into(program: &str, arguments: &[&str], to: &Path) {
    let file = File::create(to).unwrap();
    let status = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(file).status().unwrap();
    assert!(status.success(), "{program} {arguments:?} failed");
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn hash(path: &Path) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).unwrap()).unwrap();
    hasher.finalize()
}

/// Overwrites a part of a file.
pub fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length_bytes).unwrap()];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A tree of real files, at least so many and so large in all.
pub fn tree(to: &Path, files_min: usize, bytes_min: u64) -> (usize, u64) {
    std::fs::create_dir_all(to).unwrap();
    let (mut files, mut bytes) = (0, 0);
    let mut folders: Vec<PathBuf> = vec!["/usr/share".into(), "/usr/include".into()];
    while let Some(folder) = folders.pop() {
        if files >= files_min && bytes >= bytes_min {
            break;
        }
        let mut inside: Vec<_> = std::fs::read_dir(&folder).into_iter().flatten().flatten().collect();
        inside.sort_by_key(std::fs::DirEntry::path);
        for entry in inside {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                folders.push(entry.path());
            } else if meta.is_file() && meta.len() < 8 * MIB && bytes < bytes_min.max(1) * 3 / 2 {
                let target = to.join(entry.path().strip_prefix("/usr").unwrap());
                std::fs::create_dir_all(target.parent().unwrap()).unwrap();
                if std::fs::copy(entry.path(), target).is_ok() {
                    files += 1;
                    bytes += meta.len();
                }
            }
        }
    }
    // A small host: the rest is made up.
    while files < files_min || bytes < bytes_min {
        let seed = u64::try_from(files).unwrap();
        let content = noise(seed, 1000 + seed * 7919 % 200_000);
        bytes += u64::try_from(content.len()).unwrap();
        std::fs::write(to.join(format!("made-up-{files}")), content).unwrap();
        files += 1;
    }
    (files, bytes)
}

/// A file system of its own in a file, for one that can be filled up or frozen.
pub struct Loop {
    pub mount: PathBuf,
    _dir: tempfile::TempDir,
}

impl Loop {
    /// `None` where this host or user cannot mount.
    pub fn new(kind: &str, size_bytes: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("only root can mount a file system in a file");
            return None;
        }
        if !["losetup", &format!("mkfs.{kind}"), "mount", "umount", "fsfreeze"].into_iter().all(have) {
            return None;
        }
        let dir = tempfile::Builder::new().prefix("bh-e2e-loop-").tempdir().unwrap();
        let (file, mount) = (dir.path().join("disk"), dir.path().join("mount"));
        File::create(&file).unwrap().set_len(size_bytes).unwrap();
        std::fs::create_dir(&mount).unwrap();
        run(&format!("mkfs.{kind}"), &["-q", text(&file)]);
        let (mounted, why) = try_run("mount", &["-o", "loop", text(&file), text(&mount)]);
        if !mounted {
            skip(&format!("cannot mount a loop device: {why}"));
            return None;
        }
        Some(Self { mount, _dir: dir })
    }

    /// Until the guard is dropped whoever writes to it waits, and cannot even be killed: drop it before a daemon.
    pub fn freeze(&self) -> Frozen {
        run("fsfreeze", &["-f", text(&self.mount)]);
        Frozen(self.mount.clone())
    }

    pub fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.mount).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// A file that leaves only so much.
    pub fn fill(&self, leave_bytes: u64) -> PathBuf {
        let path = self.mount.join("filler");
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        let chunk = vec![7; 1 << 16];
        while self.free_bytes() > leave_bytes && file.write_all(&chunk).is_ok() {}
        file.sync_all().ok();
        path
    }
}

/// A file system that takes no writes.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        try_run("fsfreeze", &["-u", text(&self.0)]);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A daemon that was killed may hold it for a moment.
        for _ in 0..100 {
            if try_run("umount", &[text(&self.mount)]).0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        try_run("umount", &["-l", text(&self.mount)]);
    }
}

/// Serves one file over HTTP for as long as it lives; its URL.
pub fn http_server(file: &Path) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let file = file.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let mut got = 0;
            while !request[..got].windows(4).any(|end| end == b"\r\n\r\n") {
                match stream.read(&mut request[got..]) {
                    Ok(more) if more > 0 => got += more,
                    _ => return,
                }
            }
            let length = std::fs::metadata(&file).unwrap().len();
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").ok();
            // A reader that has seen enough goes away.
            std::io::copy(&mut File::open(&file).unwrap(), &mut stream).ok();
        }
    });
    format!("http://{address}/disk?secret=1")
}
