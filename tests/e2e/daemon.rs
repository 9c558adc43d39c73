//! A daemon under test: its directories, its life, its command line.

use crate::nbd::Client;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a daemon may take to be ready, or to end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Where a daemon's things are. They stay when it ends.
pub struct Place {
    pub dir: tempfile::TempDir,
    /// On tmpfs, where there is one.
    pub runtime: tempfile::TempDir,
    pub pool: PathBuf,
    pub state: PathBuf,
    pub cache: &'static str,
    pub dirty: &'static str,
    pub age_seconds: u64,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bh-e2e-").tempdir().unwrap();
        let runtime = runtime_dir();
        let (pool, state) = (dir.path().join("pool"), dir.path().join("state"));
        Self { dir, runtime, pool, state, cache: "64M", dirty: "64M", age_seconds: 3600 }
    }

    /// An empty state directory on the same pool.
    pub fn other_node(&self) -> Self {
        let other = Self::new();
        Self { pool: self.pool.clone(), ..other }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("control.sock")
    }

    pub fn settings(&self) -> String {
        format!(
            "[pool]\ndir = {:?}\n[state]\ndir = {:?}\nruntime_dir = {:?}\n[nbd]\nlisten = [\"127.0.0.1:0\"]\n\
             socket = {:?}\n[http]\nlisten = \"127.0.0.1:0\"\nsocket = {:?}\n[cache]\nsize = \"{}\"\n\
             [commit]\ndirty_bytes = \"{}\"\nage_seconds = {}\n",
            self.pool,
            self.state,
            self.runtime.path(),
            self.path("nbd.sock"),
            self.socket(),
            self.cache,
            self.dirty,
            self.age_seconds,
        )
    }

    /// A daemon that may not come up.
    pub fn spawn(&self) -> Daemon<'_> {
        std::fs::write(self.path("blockhouse.toml"), self.settings()).unwrap();
        self.spawn_with(&[])
    }

    /// The same, with the settings that are there.
    pub fn spawn_with(&self, arguments: &[&str]) -> Daemon<'_> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockhouse"));
        command.arg("serve").arg("--config").arg(self.path("blockhouse.toml")).args(arguments);
        self.spawn_command(command.stdin(Stdio::null()).stdout(Stdio::null()))
    }

    /// A daemon that somebody else starts.
    pub fn spawn_command(&self, command: &mut Command) -> Daemon<'_> {
        let log = self.path("daemon.log");
        let stderr = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let log_from = stderr.metadata().unwrap().len();
        let child = command.env_remove("BLOCKHOUSE_SOCKET").stderr(stderr).spawn().unwrap();
        Daemon { place: self, child, log, log_from }
    }

    /// A daemon that is ready: everything that was attached is served again.
    pub fn start(&self) -> Daemon<'_> {
        let mut daemon = self.spawn();
        daemon.wait_ready();
        daemon
    }

    /// That a daemon does not come up: its exit code, and what it says.
    pub fn refused(&self) -> (i32, String) {
        self.spawn().refused()
    }
}

fn runtime_dir() -> tempfile::TempDir {
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("bh-e2e-");
        builder
    };
    builder().tempdir_in("/dev/shm").or_else(|_| builder().tempdir()).unwrap()
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: Vec<u8>,
    pub err: String,
}

impl Ran {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.text(), self.err);
        self.text()
    }

    /// That it was refused with this code, saying this.
    #[track_caller]
    pub fn refused(self, code: i32, says: &str) {
        assert_eq!(self.code, code, "{}{}", self.text(), self.err);
        assert!(self.err.contains(says), "not {says:?} but: {}", self.err);
        assert!(self.err.starts_with("error: "), "{}", self.err);
    }
}

/// A daemon; killed when dropped.
pub struct Daemon<'a> {
    pub place: &'a Place,
    child: Child,
    log: PathBuf,
    log_from: u64,
}

impl Daemon<'_> {
    pub fn wait_ready(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            if http_get(&self.place.socket(), "/readyz").is_some_and(|(status, _)| status == 200) {
                return;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon ended with {status}: {}", self.log());
            }
            assert!(Instant::now() < end, "not ready in {PATIENCE:?}: {}", self.log());
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// What this daemon logged.
    pub fn log(&self) -> String {
        use std::io::{Seek as _, SeekFrom};
        let mut file = File::open(&self.log).unwrap();
        file.seek(SeekFrom::Start(self.log_from)).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the log says something.
    #[track_caller]
    pub fn wait_log(&self, says: &str) {
        wait_until(&format!("the log to say {says:?}"), || self.log().contains(says));
    }

    /// Its exit code, once it has ended by itself.
    pub fn has_ended(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap().map(|status| status.code().unwrap_or(-1))
    }

    fn wait_end(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "does not end in {PATIENCE:?}: {}", self.log());
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Its exit code, and what it says.
    pub fn refused(mut self) -> (i32, String) {
        let status = self.wait_end();
        let code = status.code().unwrap_or_else(|| panic!("ended by {status}: {}", self.log()));
        assert_ne!(code, 0, "{}", self.log());
        (code, self.log())
    }

    /// Ends it as a power switch would end a process.
    pub fn kill9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end, and says what it logged.
    pub fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.wait_end();
        assert!(status.success(), "ended with {status}: {}", self.log());
        self.log()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory.
    pub fn rss_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockhouse"));
        command.arg("--socket").arg(self.place.socket()).args(arguments).stdin(Stdio::null());
        command
    }

    /// The command line, with these words.
    pub fn words(&self, arguments: &[&str]) -> Ran {
        let output = self.command(arguments).output().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The command line, with the words of a line.
    pub fn cli(&self, line: &str) -> Ran {
        self.words(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// A command whose standard input is a file.
    pub fn with_input(&self, line: &str, input: &Path) -> Ran {
        let mut command = self.command(&line.split_whitespace().collect::<Vec<_>>());
        let output = command.stdin(File::open(input).unwrap()).output().unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub fn json(&self, line: &str) -> serde_json::Value {
        serde_json::from_str(&self.cli(&format!("{line} --json")).ok()).unwrap()
    }

    /// Attaches a volume: its URIs over TCP and over the Unix socket.
    #[track_caller]
    pub fn attach(&self, name: &str) -> Uris {
        let attachment = self.json(&format!("volume attach {name}"));
        let uris: Vec<&str> =
            attachment["uris"].as_array().unwrap().iter().map(|uri| uri.as_str().unwrap()).collect();
        let find = |starts: &[&str]| {
            let found = uris.iter().find(|uri| starts.iter().any(|start| uri.starts_with(start)));
            (*found.unwrap_or_else(|| panic!("none of {starts:?} in {uris:?}"))).to_owned()
        };
        Uris { tcp: find(&["nbd://", "nbds://"]), unix: find(&["nbd+unix://"]) }
    }

    pub fn client(&self, name: &str) -> Client {
        Client::connect(&self.place.path("nbd.sock"), name).unwrap()
    }

    /// Hash of an image or snapshot as it is exported.
    #[track_caller]
    pub fn export_hash(&self, name: &str) -> blake3::Hash {
        let mut command = self.command(&["image", "export", name, "-"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(child.stdout.take().unwrap()).unwrap();
        assert!(child.wait().unwrap().success(), "export of {name} failed");
        hasher.finalize()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.char_indices().rev().nth(8000).map_or(0, |(at, _)| at);
            eprintln!("--- the daemon's log ends with:\n{}", &log[from..]);
        }
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub struct Uris {
    pub tcp: String,
    pub unix: String,
}

/// Status and body of a GET over a Unix socket; `None` where nobody answers.
pub fn http_get(socket: &Path, path: &str) -> Option<(u16, String)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.split_once("\r\n\r\n")?.1.to_owned()))
}

/// Waits for an event that can only be seen by looking.
#[track_caller]
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(POLL_INTERVAL);
    }
}
