//! The servers that are compared: ours with its volumes, other people's with a file, and one that answers from memory.

use crate::client::{Address, Connection, Replies};
use crate::daemon::{Daemon, Place};
use anyhow::{Context as _, Result, ensure};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// How long a server may take to answer.
const START_TIME: Duration = Duration::from_secs(10);

/// Bytes that do not compress and are of their place.
pub fn content(at: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).expect("of this machine")];
    let mut from = blake3::Hasher::new().update(b"content").finalize_xof();
    from.set_position(at);
    from.fill(&mut bytes);
    bytes
}

/// A process that ends when this is dropped.
pub struct Process {
    pid: rustix::process::Pid,
    /// Not there for one that went into the background by itself.
    child: Option<Child>,
}

impl Process {
    fn of(child: Child) -> Self {
        Self { pid: rustix::process::Pid::from_child(&child), child: Some(child) }
    }

    fn is_there(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => rustix::process::test_kill_process(self.pid).is_ok(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.is_there() {
            return;
        }
        // By TERM first: one that has children ends them too.
        rustix::process::kill_process(self.pid, rustix::process::Signal::TERM).ok();
        let end = Instant::now() + Duration::from_secs(2);
        while self.is_there() {
            if Instant::now() > end {
                rustix::process::kill_process(self.pid, rustix::process::Signal::KILL).ok();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// One server as the table names it.
pub struct Server {
    pub name: String,
    pub who: Who,
    pub address: Address,
    pub export: String,
    pid: u32,
    /// Empty for ours, which serves more than one row of the table.
    _process: Option<Process>,
}

/// What a server counts as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    Ours,
    Peer,
    /// Answers from memory.
    Ceiling,
}

impl Server {
    pub fn uri(&self) -> String {
        match &self.address {
            Address::Unix(path) => format!("nbd+unix:///{}?socket={}", self.export, path.display()),
            Address::Tcp(port) => format!("nbd://127.0.0.1:{port}/{}", self.export),
        }
    }

    /// CPU time of the process and of those that it started.
    pub fn cpu(&self) -> Duration {
        tree_cpu(self.pid)
    }

    /// That what is read is what was written.
    pub fn check(&self, size_bytes: u64) -> Result<()> {
        let mut connection = Connection::new(&self.address, &self.export, Replies::Structured)?;
        ensure!(connection.size_bytes == size_bytes, "its size is {}", connection.size_bytes);
        if self.who == Who::Ceiling {
            return Ok(());
        }
        for index in 0..64 {
            let at = index * (size_bytes / 64);
            ensure!(connection.read(at, 4096)? == content(at, 4096), "wrong content at {at}");
        }
        Ok(())
    }
}

fn tree_cpu(pid: u32) -> Duration {
    let mut ticks = 0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    if let Some((_, fields)) = stat.rsplit_once(')') {
        // utime, stime, and those of children that were waited for.
        let times = fields.split_whitespace().skip(11).take(4);
        ticks += times.filter_map(|field| field.parse::<u64>().ok()).sum::<u64>();
    }
    let own = Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second());
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>());
    own + children.map(tree_cpu).sum::<Duration>()
}

/// What our volumes went through before they are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum State {
    /// Written, nothing of it committed.
    Active,
    /// Written and committed; all of it lies in the clean cache.
    Cache,
    /// Its commit has begun and cannot end, for the pool takes nothing.
    Frozen,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Cache => "cache",
            Self::Frozen => "frozen",
        }
    }
}

/// Our daemon, with a volume in each state.
pub struct Ours<'a> {
    pub daemon: Daemon<'a>,
    tcp_port: u16,
    states: Vec<State>,
    size_bytes: u64,
}

impl<'a> Ours<'a> {
    /// Where a daemon with so much to serve may work: nothing is committed by itself.
    pub fn place(size_bytes: u64) -> Place {
        let mut place = Place::new();
        place.cache = format!("{}M", size_bytes * 2 / MIB + 64).leak();
        place.dirty = "1T";
        place.age_seconds = 1_000_000;
        place
    }

    pub fn start(place: &'a Place, states: &[State], size_bytes: u64) -> Result<Self> {
        let daemon = place.start();
        let mut tcp_port = 0;
        for state in states {
            let name = state.name();
            daemon.cli(&format!("volume create {name} --size {size_bytes}")).ok();
            let uris = daemon.attach(name);
            let port = uris.tcp.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next());
            tcp_port = port.context("no port in the URI")?.parse()?;
        }
        let ours = Self { daemon, tcp_port, states: states.to_vec(), size_bytes };
        for state in states {
            ours.prepare(*state).with_context(|| format!("volume {}", state.name()))?;
        }
        Ok(ours)
    }

    fn connect(&self, state: State) -> Result<Connection> {
        let address = Address::Unix(self.daemon.place.path("nbd.sock"));
        Connection::new(&address, state.name(), Replies::Simple)
    }

    fn prepare(&self, state: State) -> Result<()> {
        let mut connection = self.connect(state)?;
        for at in (0..self.size_bytes).step_by(1 << 20) {
            crate::go_on()?;
            connection.write(at, &content(at, MIB))?;
        }
        connection.flush()?;
        match state {
            State::Active => {}
            State::Cache => {
                self.daemon.cli(&format!("volume wait-durable {}", state.name())).ok();
            }
            State::Frozen => {
                // Nothing can be put there: the commit is tried again and again.
                std::fs::write(self.daemon.place.pool.join("packs"), "")?;
                let ran = self.daemon.cli(&format!("volume wait-durable {}", state.name()));
                ensure!(ran.code != 0, "it was committed");
            }
        }
        // Everything is read, twice: what the first time brings into the cache is settled at the second.
        for _ in 0..2 {
            for at in (0..self.size_bytes).step_by(1 << 20) {
                let wrong = || format!("wrong content at {at}");
                ensure!(connection.read(at, 1 << 20)? == content(at, MIB), wrong());
            }
        }
        Ok(())
    }

    /// Commits the volume that stands for what is committed: each write to it is the first of its place again.
    pub fn commit(&self) {
        if self.states.contains(&State::Cache) {
            self.daemon.cli(&format!("volume wait-durable {}", State::Cache.name())).ok();
        }
    }

    /// As rows of the table.
    pub fn servers(&self, tcp: bool) -> Vec<Server> {
        let address = match tcp {
            true => Address::Tcp(self.tcp_port),
            false => Address::Unix(self.daemon.place.path("nbd.sock")),
        };
        let server = |state: &State| Server {
            name: format!("blockhouse, {}", state.name()),
            who: Who::Ours,
            address: address.clone(),
            export: state.name().to_owned(),
            pid: self.daemon.pid(),
            _process: None,
        };
        self.states.iter().map(server).collect()
    }
}

/// Other people's servers.
pub const PEERS: [&str; 3] = ["qemu-nbd", "nbdkit", "nbd-server"];

/// The file that they serve.
pub fn write_file(path: &Path, size_bytes: u64) -> Result<()> {
    let file = File::create_new(path)?;
    for at in (0..size_bytes).step_by(1 << 20) {
        file.write_all_at(&content(at, MIB), at)?;
    }
    Ok(file.sync_all()?)
}

/// A peer, if it is installed.
pub fn peer(name: &str, file: &Path, dir: &Path, tcp: bool) -> Result<Option<Server>> {
    let path = format!("{}:/usr/bin:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let Some(program) = path.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
    else {
        return Ok(None);
    };
    let net = if tcp { "tcp" } else { "unix" };
    let socket = dir.join(format!("{name}-{net}.sock"));
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let address = if tcp { Address::Tcp(port) } else { Address::Unix(socket.clone()) };
    let mut command = Command::new(program);
    let mut export = "";
    let pid_file = dir.join(format!("{name}-{net}.pid"));
    match name {
        "qemu-nbd" => {
            command.args("-f raw -t -e 64 --cache=writeback --aio=io_uring".split(' '));
            match tcp {
                true => command.args(["-b", "127.0.0.1", "-p", &port.to_string()]),
                false => command.arg("-k").arg(&socket),
            };
            command.arg(file);
        }
        "nbdkit" => {
            command.arg("-f");
            match tcp {
                true => command.args(["-i", "127.0.0.1", "-p", &port.to_string()]),
                false => command.arg("-U").arg(&socket),
            };
            command.arg("file").arg(file);
        }
        _ => {
            export = "file";
            let unix = if tcp { String::new() } else { format!("unixsock = {}\n", socket.display()) };
            let settings = dir.join(format!("nbd-server-{net}.conf"));
            let text = format!(
                "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n{unix}\
                 [file]\nexportname = {}\nflush = true\nfua = true\ntrim = true\n",
                file.display()
            );
            std::fs::write(&settings, text)?;
            command.arg("-C").arg(settings).arg("-p").arg(&pid_file);
        }
    }
    let log = File::create(dir.join(format!("{name}-{net}.log")))?;
    let mut child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
    let process = if name == "nbd-server" {
        child.wait()?;
        let pid = background_pid(&pid_file).context("nbd-server did not go into the background")?;
        Process { pid, child: None }
    } else {
        Process::of(child)
    };
    let server = Server {
        name: name.to_owned(),
        who: Who::Peer,
        address,
        export: export.to_owned(),
        pid: u32::try_from(process.pid.as_raw_nonzero().get())?,
        _process: Some(process),
    };
    wait(&server).with_context(|| {
        let mut said = String::new();
        let log = File::open(dir.join(format!("{name}-{net}.log")));
        log.and_then(|mut log| log.read_to_string(&mut said)).ok();
        format!("{name} over {net}: {said}")
    })?;
    Ok(Some(server))
}

fn background_pid(pid_file: &Path) -> Option<rustix::process::Pid> {
    let end = Instant::now() + START_TIME;
    loop {
        let text = std::fs::read_to_string(pid_file).unwrap_or_default();
        match text.trim().parse() {
            Ok(pid) => return rustix::process::Pid::from_raw(pid),
            Err(_) if Instant::now() > end => return None,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn wait(server: &Server) -> Result<()> {
    let end = Instant::now() + START_TIME;
    loop {
        match Connection::new(&server.address, &server.export, Replies::Structured) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The server that answers from memory, in a process of its own.
pub fn ceiling(dir: &Path, size_bytes: u64, tcp: bool) -> Result<Server> {
    let socket = dir.join("memory.sock");
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--memory-server").arg(size_bytes.to_string());
    if !tcp {
        command.arg(&socket);
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    let address = match tcp {
        true => Address::Tcp(line.trim().parse()?),
        false => Address::Unix(socket),
    };
    Ok(Server {
        name: "from memory".to_owned(),
        who: Who::Ceiling,
        address,
        export: String::new(),
        pid: child.id(),
        _process: Some(Process::of(child)),
    })
}

/// Reads what files hold, so that it lies in the page cache: some hosts take idle pages away.
pub fn warm(folders: &[PathBuf]) -> Result<()> {
    let mut buffer = vec![0; 4 << 20];
    for folder in folders {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                warm(&[entry.path()])?;
            } else if meta.is_file() && meta.len() > MIB {
                let file = File::open(entry.path())?;
                let mut at = 0;
                // Holes cost nothing where they are skipped.
                while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
                    let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data))?;
                    at = data;
                    while at < hole {
                        let want = usize::try_from((hole - at).min(4 << 20))?;
                        let count = file.read_at(&mut buffer[..want], at)?;
                        if count == 0 {
                            return Ok(());
                        }
                        at += count as u64;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Says where a server listens.
pub fn announce(port: u16) -> Result<()> {
    println!("{port}");
    Ok(std::io::stdout().flush()?)
}
