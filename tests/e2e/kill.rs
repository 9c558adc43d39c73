//! `kill -9` at any moment: no acknowledged write is lost (P1), and snapshots are states that the disk passed through (P4).
//!
//! `BLOCKHOUSE_E2E_KILLS` and `BLOCKHOUSE_E2E_SECONDS` say how many times, and for how long at most.

use crate::daemon::{Daemon, Place};
use crate::nbd::{Client, FUA, Failure, TRIM, WRITE, WRITE_ZEROES};
use crate::tools::{MIB, hash, noise, text};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SECTOR: usize = 512;
const WRITERS: usize = 3;
/// Sectors that one writer writes to: parts of the volume that lie apart.
const SECTORS_EACH: usize = 12_000;
const VOLUME_BYTES: u64 = 256 * MIB;

pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// What one sector may hold: everything that was sent since the last look, oldest first, after what it held then.
struct Sector {
    sent: Vec<Sent>,
    /// Index of the latest that was acknowledged.
    acked: usize,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    /// 0 is zeros.
    value: u64,
    batch: u64,
}

impl Sector {
    fn of(value: u64) -> Self {
        Self { sent: vec![Sent { value, batch: 0 }], acked: 0 }
    }
}

/// How far a writer is. A batch is sent when all of the one before is acknowledged.
#[derive(Default)]
struct Progress {
    batch_sent: AtomicU64,
    batch_acked: AtomicU64,
    requests_acked: AtomicU64,
}

/// A snapshot, and what each writer had acknowledged before it was asked for, and sent when it was there.
struct Taken {
    name: String,
    bounds: Vec<(u64, u64)>,
}

/// A part of the volume with one writer.
struct Region {
    from_sector: u64,
    sectors: Vec<Sector>,
    next: u64,
    progress: Arc<Progress>,
}

impl Region {
    fn new(index: usize) -> Self {
        let apart = VOLUME_BYTES / u64::try_from(SECTOR * WRITERS).unwrap();
        Self {
            from_sector: u64::try_from(index).unwrap() * apart,
            sectors: (0..SECTORS_EACH).map(|_| Sector::of(0)).collect(),
            next: u64::try_from(index).unwrap() + 1,
            progress: Arc::default(),
        }
    }

    /// Sends batches of requests until the daemon is gone. Those of a batch touch different sectors.
    fn write(&mut self, daemon: &Daemon<'_>, random: &mut StdRng) {
        let Ok(mut client) = Client::connect(&daemon.place.path("nbd.sock"), "vm") else { return };
        while self.batch(&mut client, random).is_ok() {}
    }

    fn batch(&mut self, client: &mut Client, random: &mut StdRng) -> Result<(), Failure> {
        let batch = self.progress.batch_sent.fetch_add(1, Ordering::SeqCst) + 1;
        let mut sent = Vec::new();
        let mut result = Ok(());
        let mut at = random.random_range(0..SECTORS_EACH / 2);
        for _ in 0..random.random_range(1..12) {
            let count = if random.random_bool(0.1) {
                random.random_range(1..600)
            } else {
                random.random_range(1..20)
            };
            if at + count > SECTORS_EACH {
                break;
            }
            let (kind, flags) = match random.random_range(0..12) {
                0 => (TRIM, 0),
                1 => (WRITE_ZEROES, 0),
                2 => (WRITE, FUA),
                _ => (WRITE, 0),
            };
            let value = if kind == WRITE {
                self.next += u64::try_from(WRITERS).unwrap();
                self.next
            } else {
                0
            };
            for sector in &mut self.sectors[at..at + count] {
                sector.sent.push(Sent { value, batch });
            }
            let mut payload = Vec::new();
            if kind == WRITE {
                for index in at..at + count {
                    payload.extend(content(value, self.from_sector + u64::try_from(index).unwrap()));
                }
            }
            let byte = (self.from_sector + u64::try_from(at).unwrap()) * 512;
            match client.send(kind, flags, byte, count * SECTOR, &payload) {
                Ok(cookie) => sent.push((cookie, at, count)),
                Err(failure) => {
                    result = Err(failure);
                    break;
                }
            }
            at += count + random.random_range(0..300);
        }
        for _ in 0..sent.len() {
            let (cookie, code) = client.answer()?;
            assert_eq!(code, 0, "a write was refused");
            let &(_, at, count) = sent.iter().find(|(of, ..)| *of == cookie).unwrap();
            for sector in &mut self.sectors[at..at + count] {
                sector.acked = sector.sent.len() - 1;
            }
            self.progress.requests_acked.fetch_add(1, Ordering::Relaxed);
        }
        if result.is_ok() {
            self.progress.batch_acked.store(batch, Ordering::SeqCst);
        }
        result
    }

    /// That `bytes`, of the whole region, hold what was acknowledged or something later; it is then what counts.
    fn check(&mut self, bytes: &[u8], what: &str) {
        for (index, sector) in self.sectors.iter_mut().enumerate() {
            let number = self.from_sector + u64::try_from(index).unwrap();
            let value = value_of(&bytes[index * SECTOR..][..SECTOR], number, what);
            let later = &sector.sent[sector.acked..];
            assert!(
                later.iter().any(|sent| sent.value == value),
                "{what}: sector {number} holds write {value}, acknowledged was {:?} of {:?}",
                sector.sent[sector.acked],
                &sector.sent[sector.sent.len().saturating_sub(8)..]
            );
            *sector = Sector::of(value);
        }
        self.progress.batch_sent.store(0, Ordering::SeqCst);
        self.progress.batch_acked.store(0, Ordering::SeqCst);
    }

    /// That `bytes` are a state that this part passed through between the bounds: all batches before one, and nothing
    /// after that one.
    fn check_past(&self, bytes: &[u8], (acked, sent): (u64, u64), what: &str) {
        let values: Vec<u64> = (0..SECTORS_EACH)
            .map(|index| {
                let number = self.from_sector + u64::try_from(index).unwrap();
                value_of(&bytes[index * SECTOR..][..SECTOR], number, what)
            })
            .collect();
        let fits = |last: u64, sector: &Sector, value: u64| {
            let before = sector.sent.iter().rev().find(|sent| sent.batch < last);
            let within = sector.sent.iter().find(|entry| entry.batch == last && last <= sent);
            before.into_iter().chain(within).any(|sent| sent.value == value)
        };
        let is_state = (acked + 1..=sent + 1)
            .any(|last| self.sectors.iter().zip(&values).all(|(sector, value)| fits(last, sector, *value)));
        assert!(is_state, "{what}: no moment between batches {acked} and {sent} fits");
    }
}

fn content(value: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if value > 0 {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            let mixed = if index % 2 == 0 { value } else { value.rotate_left(17) ^ sector };
            word.copy_from_slice(&mixed.to_le_bytes());
        }
    }
    bytes
}

fn value_of(bytes: &[u8], sector: u64, what: &str) -> u64 {
    let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == content(value, sector), "{what}: sector {sector} is torn or of another place");
    value
}

fn verify(daemon: &Daemon<'_>, name: &str, regions: &mut [Region], what: &str) {
    let mut client = daemon.client(name);
    for region in regions {
        let mut bytes = Vec::new();
        let mut left = SECTORS_EACH * SECTOR;
        while left > 0 {
            let step = left.min(1 << 20);
            let at = region.from_sector * 512 + u64::try_from(bytes.len()).unwrap();
            bytes.extend(client.read(at, step).unwrap());
            left -= step;
        }
        region.check(&bytes, what);
    }
}

/// What an operator does meanwhile. Each may be killed in the middle; what it answers then does not matter.
fn operate(
    daemon: &Daemon<'_>,
    random: &mut StdRng,
    round: u64,
    over: &AtomicBool,
    writers: &[Arc<Progress>],
) -> Vec<Taken> {
    let mut snapshots = Vec::new();
    let image = text(&daemon.place.path("noise.raw")).to_owned();
    while !over.load(Ordering::Relaxed) {
        let number = random.random_range(0..1_000_000u32);
        let line = match random.random_range(0..7) {
            0 => "snapshot create vm --json".to_owned(),
            1 => format!("image import image-{round}-{number} {image}"),
            2 => "volume wait-durable vm".to_owned(),
            3 => "volume attach other".to_owned(),
            4 => "volume detach other".to_owned(),
            5 => format!("volume create fork-{round}-{number} --from volume:vm"),
            _ => format!("volume create empty-{round}-{number} --size 10M"),
        };
        let words: Vec<&str> = line.split(' ').collect();
        let acked: Vec<u64> =
            writers.iter().map(|writer| writer.batch_acked.load(Ordering::SeqCst)).collect();
        let output = daemon.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
        let code = output.status.code().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        match code {
            0 if line.starts_with("snapshot") => {
                let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                let sent = writers.iter().map(|writer| writer.batch_sent.load(Ordering::SeqCst));
                let name = answer["name"].as_str().unwrap().to_owned();
                snapshots.push(Taken { name, bounds: acked.into_iter().zip(sent).collect() });
            }
            // Done; not attached; the daemon was killed before, or meanwhile.
            0 | 4 | 6 | 7 => {}
            _ => panic!("{line}: {code}: {err}"),
        }
    }
    snapshots
}

/// That a snapshot of this round is there, and a state that the disk passed through.
fn verify_snapshot(daemon: &Daemon<'_>, snapshot: &Taken, regions: &[Region], what: &str) {
    let out = daemon.place.path("snapshot.raw");
    daemon.cli(&format!("image export {} {} --force", snapshot.name, text(&out))).ok();
    let file = std::fs::File::open(&out).unwrap();
    for (region, bounds) in regions.iter().zip(&snapshot.bounds) {
        let mut bytes = vec![0; SECTORS_EACH * SECTOR];
        file.read_exact_at(&mut bytes, region.from_sector * 512).unwrap();
        region.check_past(&bytes, *bounds, &format!("{what}, snapshot {}", snapshot.name));
    }
}

/// P9: a killed import is in nobody's way.
fn retry_imports(daemon: &Daemon<'_>) {
    let image = daemon.place.path("noise.raw");
    let images = daemon.json("image list");
    let half_done: Vec<&str> = images
        .as_array()
        .unwrap()
        .iter()
        .filter(|image| image["state"] != "ready")
        .map(|image| image["name"].as_str().unwrap())
        .collect();
    println!("{} imports were killed", half_done.len());
    for (number, name) in half_done.iter().take(4).enumerate() {
        if number % 2 == 0 {
            daemon.cli(&format!("image import {name} {}", text(&image))).ok();
            assert_eq!(daemon.export_hash(name), hash(&image));
        } else {
            daemon.cli(&format!("image delete {name} --yes")).ok();
        }
    }
}

#[test]
fn no_acknowledged_write_is_lost_by_kill_9() {
    let kills = setting("BLOCKHOUSE_E2E_KILLS", 200);
    let time = Duration::from_secs(setting("BLOCKHOUSE_E2E_SECONDS", 240));
    let seed = setting("BLOCKHOUSE_E2E_SEED", rand::random());
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut place = Place::new();
    // Commits all the time.
    place.dirty = "2M";
    place.age_seconds = 1;
    std::fs::write(place.path("noise.raw"), noise(seed, 2 * MIB)).unwrap();
    let daemon = place.start();
    daemon.cli("volume create vm --size 256M").ok();
    daemon.cli("volume create other --size 64M").ok();
    daemon.attach("vm");
    let mut regions: Vec<Region> = (0..WRITERS).map(Region::new).collect();
    let started = Instant::now();
    let writers: Vec<Arc<Progress>> = regions.iter().map(|region| region.progress.clone()).collect();
    let acked = || writers.iter().map(|writer| writer.requests_acked.load(Ordering::Relaxed)).sum::<u64>();
    let (mut snapshots, mut snapshots_checked) = (Vec::<Taken>::new(), 0);
    let mut recoveries = Vec::new();
    let mut next = Some(daemon);
    let mut round = 0;
    while round < kills && started.elapsed() < time {
        round += 1;
        let daemon = match next.take() {
            Some(daemon) => daemon,
            None => {
                // Sometimes the recovery is killed, too.
                while random.random_bool(0.15) {
                    let starting = place.spawn();
                    std::thread::sleep(Duration::from_millis(random.random_range(0..150)));
                    starting.kill9();
                    round += 1;
                }
                let begun = Instant::now();
                let daemon = place.start();
                recoveries.push(begun.elapsed());
                let what = format!("seed {seed}, kill {round}");
                if let Some(snapshot) = snapshots.last()
                    && random.random_bool(0.3)
                {
                    verify_snapshot(&daemon, snapshot, &regions, &what);
                    snapshots_checked += 1;
                }
                verify(&daemon, "vm", &mut regions, &what);
                daemon
            }
        };
        let over = AtomicBool::new(false);
        let life = Duration::from_millis(random.random_range(1..900));
        let mut seeds: Vec<StdRng> = (0..=WRITERS).map(|_| StdRng::from_rng(&mut random)).collect();
        let mut operator = seeds.pop().unwrap();
        snapshots = std::thread::scope(|scope| {
            for (region, random) in regions.iter_mut().zip(&mut seeds) {
                let daemon = &daemon;
                scope.spawn(move || region.write(daemon, random));
            }
            let operator = scope.spawn(|| operate(&daemon, &mut operator, round, &over, &writers));
            // The moment of the kill is the test's only input; nothing is waited for.
            std::thread::sleep(life);
            let pid = rustix::process::Pid::from_raw(i32::try_from(daemon.pid()).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            over.store(true, Ordering::Relaxed);
            operator.join().unwrap()
        });
        daemon.kill9();
    }
    recoveries.sort();
    println!(
        "{round} kills in {:?}, {} requests acknowledged, {snapshots_checked} snapshots checked; restarts took {:?} (median), {:?} (longest)",
        started.elapsed(),
        acked(),
        recoveries.get(recoveries.len() / 2),
        recoveries.last(),
    );
    assert!(acked() > 0);

    let daemon = place.start();
    verify(&daemon, "vm", &mut regions, "at the end");
    let orphans = daemon.json("volume orphans");
    assert_eq!(orphans.as_array().unwrap().len(), 0, "{orphans}");
    retry_imports(&daemon);
    daemon.cli("volume detach vm").ok();
    daemon.stop();

    let other = place.other_node();
    let daemon = other.start();
    daemon.attach("vm");
    verify(&daemon, "vm", &mut regions, "on another node");
    daemon.stop();
}
