//! What the engine costs, in absolute figures, beside a peer in the same run where there is one.
//!
//! `cargo bench --bench engine` prints one table; `-- --quick` takes a third of the time. Figures are of this machine's
//! disk: the state directory and the pool are temporary directories.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark")]
#![expect(dead_code, reason = "the rig is shared with the tests")]

#[path = "../tests/engine/disk.rs"]
mod disk;
#[path = "../tests/engine/rig.rs"]
mod rig;
#[path = "../tests/engine/store.rs"]
mod store;

use blockhouse::block::{BlockHandler, Durability, write_at};
use blockhouse::clock::UnixMillis;
use blockhouse::geometry::BLOCK_BYTES;
use blockhouse::volume::VolumeHandler;
use blockhouse::volume::attach::attach;
use blockhouse::volume::catalog::{self, Base, Made, NewVolume};
use blockhouse::volume::destage::Request;
use blockhouse::volume::engine::Engine;
use blockhouse::volume::head::{SmallObject, SnapshotObject, keys};
use bytes::Bytes;
use rig::{GIB, KIB, Life, MIB, Node, TIB, image, noise, runtime};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

fn row(what: &str, figure: &str, beside: &str) {
    println!("| {what} | {figure} | {beside} |");
}

fn micros(time: Duration) -> String {
    match time.as_secs_f64() * 1e6 {
        micros if micros < 10_000.0 => format!("{micros:.1} µs"),
        micros => format!("{:.1} ms", micros / 1e3),
    }
}

/// Median and 99th percentile.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    format!("{} (p99 {})", micros(times[times.len() / 2]), micros(times[times.len() * 99 / 100]))
}

/// CPU time of this process.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// A volume as an operator makes it.
async fn create(engine: &Engine, name: &str, size_bytes: Option<u64>, base: Option<&Base>) {
    let new = NewVolume { name: name.into(), size_bytes, description: None };
    let from = base.map(|base| base.from.as_str());
    assert!(new.find(engine, from).await.unwrap().is_none());
    assert!(matches!(catalog::create(engine, &new, base).await.unwrap(), Made::Now(_)));
}

/// A fork of the snapshot of a volume, by the steps of the daemon: is the name free, what is the snapshot, the head.
async fn fork(engine: &Engine, source: &str, name: &str) {
    let base = catalog::snapshot_base(engine, source, 1).await.unwrap();
    create(engine, name, None, Some(&base)).await;
}

/// What the disk takes for one durable name: write, sync, link, sync the folder.
fn durable_name(dir: &Path, number: u64) {
    let temporary = dir.join(format!("t{number}"));
    let mut file = std::fs::File::create_new(&temporary).unwrap();
    file.write_all(&[b'x'; 700]).unwrap();
    file.sync_all().unwrap();
    std::fs::hard_link(&temporary, dir.join(format!("n{number}"))).unwrap();
    std::fs::remove_file(&temporary).unwrap();
    std::fs::File::open(dir).unwrap().sync_all().unwrap();
}

async fn forks(quick: bool) {
    let (mut node, _pool) = Node::on_directory().await;
    let engine = node.engine().await;
    let mut sources = Vec::new();
    for (label, size_bytes) in [("1 GiB", GIB), ("1 TiB", TIB), ("60 TiB", 60 * TIB)] {
        // Made without attaching it: no local file system may hold a sparse file of 60 TiB.
        let source = format!("source-{}", size_bytes / GIB);
        let map = Some(image(&engine, size_bytes).await);
        node.create(&source, size_bytes, map).await;
        let uid = node.head(&source).await.0.uid;
        let snapshot = SnapshotObject {
            uid,
            volume: source.clone(),
            number: 1,
            nonce: engine.nonce(),
            map,
            size_bytes,
            description: None,
            created: UnixMillis(0),
        };
        engine.put_immutable(&keys::snapshot(&uid, 1), snapshot.encode()).await.unwrap();
        sources.push((label, size_bytes, source, Vec::new(), Vec::new()));
    }
    let dir = tempfile::tempdir().unwrap();
    let (count, mut floor) = (if quick { 50 } else { 200 }, Vec::new());
    let puts = node.store.puts_and_swaps();
    // In turn, so that what else the disk does meets all of them.
    for number in 0..count {
        for (_, size_bytes, source, times, _) in &mut sources {
            let started = Instant::now();
            fork(&engine, source, &format!("f{number}-{}", *size_bytes / GIB)).await;
            times.push(started.elapsed());
        }
        let started = Instant::now();
        durable_name(dir.path(), number);
        floor.push(started.elapsed());
    }
    let puts = (node.store.puts_and_swaps() - puts) / count / 3;
    for number in 0..count / 5 {
        for (_, size_bytes, source, _, times) in sources.iter_mut().filter(|source| source.1 <= TIB) {
            let name = format!("a{number}-{}", *size_bytes / GIB);
            let started = Instant::now();
            fork(&engine, source, &name).await;
            let attached = attach(&engine, &name).await.unwrap();
            let handler = VolumeHandler(attached.volume.clone());
            let mut out = bytes::BytesMut::new();
            let first = blockhouse::geometry::ByteRange::new(0, 4096);
            blockhouse::block::read_at(&handler, first, &mut out).await.unwrap();
            times.push(started.elapsed());
            attached.destager.ask(|reply| Request::Release { reply }).await.unwrap();
        }
    }
    let floor = format!("one durable name on this disk: {}", spread(floor));
    for (label, _, _, times, attaches) in sources {
        row(
            &format!("fork of a snapshot of {label}"),
            &spread(times),
            &format!("{puts} PUT; goal 5 ms; {floor}"),
        );
        if !attaches.is_empty() {
            row(&format!("fork, attach, first read, {label}"), &spread(attaches), "goal 20 ms");
        }
    }
}

async fn write(life: &Life, at: u64, data: &Bytes) {
    write_at(&*life.handler, at, data.clone(), Durability::Acknowledged).await.unwrap();
}

/// One kind of operation, for the table and for counting its system calls.
async fn operate(life: &Life, what: &str, count: u64) -> Vec<Duration> {
    let data = noise(1, 4 * KIB);
    let mut times = Vec::new();
    for number in 0..count {
        let at = number * 7919 % 16_000 * 4 * KIB;
        match what {
            "flush after an overwrite" => write(life, 0, &data).await,
            "flush after a first write" => write(life, GIB + number * 7919 % 60_000 * 64 * KIB, &data).await,
            _ => {}
        }
        let started = Instant::now();
        match what {
            "write of 4 KiB, overwriting" => write(life, at % MIB, &data).await,
            "write of 4 KiB, first" => write(life, 2 * GIB + number * 4 * KIB, &data).await,
            "read of 4 KiB" => drop(life.read(at, 4 * KIB).await),
            _ => life.handler.flush().await.unwrap(),
        }
        times.push(started.elapsed());
    }
    times
}

const OPERATIONS: [(&str, u64); 5] = [
    ("write of 4 KiB, overwriting", 20_000),
    ("write of 4 KiB, first", 20_000),
    ("flush after an overwrite", 300),
    ("flush after a first write", 300),
    ("read of 4 KiB", 20_000),
];

async fn prepared() -> (Node, tempfile::TempDir, Life) {
    let (mut node, pool) = Node::on_directory().await;
    node.cache_bytes = 256 * MIB;
    create(&*node.engine().await, "v", Some(8 * GIB), None).await;
    let life = node.life("v").await;
    for at in (0..64).map(|at| at * MIB) {
        write(&life, at, &noise(at, MIB)).await;
    }
    (node, pool, life)
}

/// System calls of one operation: of a child under strace, twice, with different counts.
fn system_calls(what: &str) -> Option<f64> {
    let total = |count: u64| {
        let log = tempfile::NamedTempFile::new().ok()?;
        let mut command = Command::new("strace");
        command.args(["-c", "-f", "-o"]).arg(log.path()).arg(std::env::current_exe().ok()?);
        let done = command.args(["--child", what, &count.to_string()]).output().ok()?;
        let table = std::fs::read_to_string(log.path()).ok()?;
        let line = table.lines().rev().find(|line| line.trim_end().ends_with(" total"))?;
        let calls: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        done.status.success().then(|| calls.get(3).copied()).flatten()
    };
    let (few, many) = (total(100)?, total(1_100)?);
    Some((many - few) / 1_000.0)
}

async fn operations(quick: bool) {
    let (mut node, _pool, life) = prepared().await;
    for (what, count) in OPERATIONS {
        let times = operate(&life, what, if quick { count / 4 } else { count }).await;
        let calls = if quick { None } else { system_calls(what) };
        let calls = calls.map_or(String::new(), |calls| format!("{calls:.1} system calls"));
        let layer = if what.starts_with("read") { ", from the active epoch" } else { "" };
        row(&format!("{what}{layer}"), &spread(times), &calls);
    }
    node.store.stop();
    let destager = life.attached.destager.clone();
    let commit = tokio::spawn(async move { destager.ask(|reply| Request::Commit { reply }).await });
    node.store.await_caller().await;
    row("read of 4 KiB, from a frozen epoch", &spread(operate(&life, "read of 4 KiB", 5_000).await), "");
    node.store.resume();
    commit.await.unwrap().unwrap();
    life.kill().await;
    let life = node.life("v").await;
    let mut times = Vec::new();
    for block in 0..500 {
        let started = Instant::now();
        drop(life.read(block * BLOCK_BYTES, 4 * KIB).await);
        times.push(started.elapsed());
    }
    row("read of 4 KiB, cold, from the directory pool", &spread(times), "fetches 128 KiB");
    // The cache is filled beside the reads.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let times = operate(&life, "read of 4 KiB", 5_000).await;
    row("read of 4 KiB, from the clean cache", &spread(times), "");
    life.kill().await;
}

/// Half of each block does not compress, a quarter is text of few words, a quarter is zeros.
fn content(seed: u64) -> Bytes {
    let mut data = Vec::with_capacity(1 << 20);
    while data.len() < 1 << 20 {
        data.extend_from_slice(&noise(seed ^ data.len() as u64, 64 * KIB));
        let line = format!("line {} of a log that repeats itself, seed {seed}\n", data.len());
        data.extend(line.bytes().cycle().take(32 << 10));
        data.extend(std::iter::repeat_n(0, 32 << 10));
    }
    data.into()
}

async fn commits(quick: bool) {
    let mib = if quick { 128 } else { 512 };
    let (mut node, _pool) = Node::on_directory().await;
    create(&*node.engine().await, "v", Some(8 * GIB), None).await;
    let life = node.life("v").await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("content");
    let mut all = Vec::new();
    for at in 0..mib {
        let data = content(at);
        write(&life, at * MIB, &data).await;
        all.extend_from_slice(&data);
    }
    life.flush().await;
    std::fs::write(&path, &all).unwrap();
    drop(all);
    let (started, used) = (Instant::now(), cpu());
    life.commit().await;
    let (took, used) = (started.elapsed().as_secs_f64(), (cpu() - used).as_secs_f64());
    let size = mib as f64 * 1.048_576;
    let zstd = |path: &Path| {
        let started = Instant::now();
        let done = Command::new("zstd").args(["-1", "-T1", "-q", "-f", "-o", "/dev/null"]).arg(path).status();
        done.is_ok_and(|status| status.success()).then(|| started.elapsed().as_secs_f64())
    };
    let peer = zstd(&path).map_or(String::new(), |took| format!("zstd -1: {:.0} MB/s", size / took));
    row(
        "commit: read, hash, compress, put",
        &format!("{:.0} MB/s a core, {:.0} MB/s", size / used, size / took),
        &peer,
    );
    life.kill().await;
}

async fn idle(quick: bool) {
    let (mut node, _pool) = Node::on_directory().await;
    node.cache_bytes = 0;
    let engine = node.engine().await;
    let before = resident_bytes();
    let started = Instant::now();
    let mut attached = Vec::new();
    for number in 0..1_000 {
        let name = format!("v{number}");
        create(&engine, &name, Some(10 * GIB), None).await;
        attached.push(attach(&engine, &name).await.unwrap());
    }
    let attaching = started.elapsed();
    // Each has made the file of its next cut.
    for one in &attached {
        one.destager.ask(|reply| Request::Commit { reply }).await.unwrap();
    }
    let seconds = if quick { 20 } else { 60 };
    let used = cpu();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let used = (cpu() - used).as_secs_f64();
    let resident = resident_bytes();
    row(
        &format!("1,000 idle volumes for {seconds} s"),
        &format!("{used:.2} s CPU, {} MiB resident ({} MiB before)", resident / MIB, before / MIB),
        &format!("goal 0.1 s in 60, 256 MiB; creating and attaching took {} each", micros(attaching / 1_000)),
    );
    for one in attached {
        one.destager.abandon().await;
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--child") {
        let (what, count) = (arguments[at + 1].clone(), arguments[at + 2].parse().unwrap());
        runtime().block_on(async {
            let (_node, _pool, life) = prepared().await;
            drop(operate(&life, &what, count).await);
            life.kill().await;
        });
        return;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let only = |part: &str| {
        !arguments.iter().any(|a| a.starts_with("--only=")) || arguments.contains(&format!("--only={part}"))
    };
    println!("| what | median | beside |\n| --- | --- | --- |");
    let runtime = runtime();
    if only("idle") {
        runtime.block_on(idle(quick));
    }
    if only("fork") {
        runtime.block_on(forks(quick));
    }
    if only("operations") {
        runtime.block_on(operations(quick));
    }
    if only("commit") {
        runtime.block_on(commits(quick));
    }
}
