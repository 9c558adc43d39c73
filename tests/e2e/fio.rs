//! `kill -9` under fio's own verification: what it saw acknowledged is there afterwards (P1).
//!
//! fio saves which of its writes are done and then runs its trigger, which kills the daemon under its requests and those
//! of another writer. fio itself cannot end then: its NBD engine asks the dead connection for ever. The next daemon is
//! read by an fio that makes the same writes up once more, and checks those that were done.

use crate::daemon::{Daemon, Place, wait_until};
use crate::kill::setting;
use crate::tools::{MIB, have, noise};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What fio writes to; beyond it is the other writer's.
const FIO_BYTES: u64 = 192 * MIB;

/// One life of fio: what it writes is decided by the seed.
struct Writes {
    dir: PathBuf,
    seed: u64,
}

impl Writes {
    fn new(place: &Place, number: u64, seed: u64) -> Self {
        let dir = place.path(&format!("fio-{number}"));
        std::fs::create_dir(&dir).unwrap();
        Self { dir, seed }
    }

    /// Small requests, and some that are cut by the borders of blocks.
    fn command(&self, uri: &str, options: &[&str]) -> Command {
        let mut command = Command::new("fio");
        // Threads, so that killing it leaves nothing.
        command.args(["--thread", "--ioengine=nbd", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1"]);
        command.args(["--output-format=json", "--output=out.json"]).args(options);
        command.arg(format!("--uri={uri}")).arg(format!("--randseed={}", self.seed));
        command.args(["--name=small", "--bs=4k", "--iodepth=16", "--offset=0", "--size=64m"]);
        command.args(["--name=odd", "--bs=36k", "--iodepth=8", "--offset=64m", "--size=128m"]);
        let errors = File::create(self.dir.join("errors")).unwrap();
        command.current_dir(&self.dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        command
    }

    /// Writes until its trigger is pulled, which runs a command when what is done is saved.
    fn start(&self, uri: &str, then: &str) -> Child {
        let trigger = format!("--trigger={then}");
        let options = ["--do_verify=0", "--verify_state_save=1", "--trigger-file=pulled", &trigger];
        self.command(uri, &options).spawn().unwrap()
    }

    fn pull(&self) {
        File::create(self.dir.join("pulled")).unwrap();
    }

    /// Checks what was done: how many writes, or what fio said.
    fn verify(&self, uri: &str) -> Result<u64, String> {
        let options = ["--verify_only=1", "--verify_state_load=1"];
        let mut child = self.command(uri, &options).spawn().unwrap();
        let mut status = None;
        wait_until("fio to verify", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        let said = std::fs::read_to_string(self.dir.join("errors")).unwrap();
        let out = std::fs::read_to_string(self.dir.join("out.json")).unwrap_or_default();
        if !status.unwrap().success() {
            return Err(format!("seed {}: {}{said}", self.seed, status.unwrap()));
        }
        let out: serde_json::Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
        let jobs = out["jobs"].as_array().unwrap();
        Ok(jobs.iter().map(|job| job["read"]["total_ios"].as_u64().unwrap()).sum())
    }
}

/// Keeps the daemon busy until it is gone.
fn disturb(daemon: &Daemon<'_>, random: &mut StdRng) {
    let Ok(mut client) = crate::nbd::Client::connect(&daemon.place.path("nbd.sock"), "vm") else { return };
    let payload = noise(random.random(), MIB / 4);
    loop {
        let at = FIO_BYTES + random.random_range(0..60) * MIB + random.random_range(0..1024) * 512;
        let length = random.random_range(1..512) * 512;
        let done = match random.random_range(0..20) {
            0 => client.flush(),
            _ => client.write(at, &payload[..length]),
        };
        if done.is_err() {
            return;
        }
    }
}

fn place() -> Place {
    let mut place = Place::new();
    // Commits all the time.
    place.dirty = "8M";
    place.age_seconds = 1;
    place
}

#[test]
fn no_write_that_fio_saw_acknowledged_is_lost_by_kill_9() {
    if !have("fio") {
        return;
    }
    let kills = setting("BLOCKHOUSE_E2E_KILLS", 5);
    let time = Duration::from_secs(setting("BLOCKHOUSE_E2E_SECONDS", 120));
    let seed = setting("BLOCKHOUSE_E2E_SEED", rand::random::<u32>().into());
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let place = place();
    let mut daemon = place.start();
    daemon.cli("volume create vm --size 256M").ok();
    let mut uri = daemon.attach("vm").unix;
    let started = Instant::now();
    let (mut round, mut under_load, mut verified) = (0, 0, 0);
    // How long fio needs to begin depends on the machine: until it was hit while it wrote.
    let mut life_ms_max = 700;
    while (round < kills || verified == 0 || under_load == 0) && started.elapsed() < time {
        let writes = Writes::new(&place, round, random.random::<u32>().into());
        let mut disturbance = StdRng::from_rng(&mut random);
        let life = Duration::from_millis(random.random_range(1..life_ms_max));
        let pid = daemon.pid();
        let mut killed = false;
        std::thread::scope(|scope| {
            let disturber = scope.spawn(|| disturb(&daemon, &mut disturbance));
            let mut fio = writes.start(&uri, &format!("kill -9 {pid}"));
            // The moment of the kill is the test's only input; nothing is waited for.
            std::thread::sleep(life);
            writes.pull();
            wait_until("the kill", || {
                killed = has_died(pid);
                killed || fio.try_wait().unwrap().is_some()
            });
            // All was written before the trigger was seen; or the trigger is on its way.
            if !killed {
                let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            }
            disturber.join().unwrap();
            fio.kill().unwrap();
            fio.wait().unwrap();
        });
        daemon.kill9();
        round += 1;
        under_load += u64::from(killed);
        daemon = place.start();
        uri = daemon.attach("vm").unix;
        let found = writes.verify(&uri).unwrap();
        if found == 0 {
            life_ms_max = (life_ms_max * 2).min(10_000);
        }
        verified += found;
        std::fs::remove_dir_all(&writes.dir).unwrap();
    }
    println!(
        "{round} kills in {:?}, {under_load} of them by fio, {verified} acknowledged writes verified",
        started.elapsed()
    );
    assert!(verified > 0 && under_load > 0);
    daemon.stop();
}

/// Whether a process has ended, though nobody has asked for its exit code yet.
fn has_died(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

/// Offset of the block of fio's that it wrote first.
fn first_written(daemon: &Daemon<'_>) -> u64 {
    let mut client = daemon.client("vm");
    let mut first = Vec::new();
    for at in (0..64 * MIB).step_by(1 << 20) {
        let bytes = client.read(at, 1 << 20).unwrap();
        for (block, header) in (0..).zip(bytes.chunks_exact(4096)) {
            // Magic, and at 34 how many were written before it.
            if header[..2] == 0xacca_u16.to_le_bytes() {
                let number = u16::from_le_bytes([header[34], header[35]]);
                first.push((number, at + block * 4096));
            }
        }
    }
    first.into_iter().min().expect("fio wrote something").1
}

/// That the test above can fail.
#[test]
fn fio_finds_one_damaged_block_among_those_that_were_acknowledged() {
    if !have("fio") {
        return;
    }
    let place = place();
    let daemon = place.start();
    daemon.cli("volume create vm --size 256M").ok();
    let uri = daemon.attach("vm").unix;
    let writes = Writes::new(&place, 0, 7);
    let mut fio = writes.start(&uri, "true");
    wait_until("fio to write", || daemon.client("vm").read(0, 1 << 20).unwrap().iter().any(|byte| *byte > 0));
    writes.pull();
    wait_until("fio to end", || fio.try_wait().unwrap().is_some());
    assert!(writes.verify(&uri).unwrap() > 0);

    let at = first_written(&daemon);
    let mut client = daemon.client("vm");
    let mut block = client.read(at, 4096).unwrap();
    block[4000] ^= 1;
    client.write(at, &block).unwrap();
    let said = writes.verify(&uri).unwrap_err();
    assert!(said.contains("verify"), "{said}");

    // A write that is not there at all.
    block.fill(0);
    client.write(at, &block).unwrap();
    writes.verify(&uri).unwrap_err();
    block = noise(1, 4096);
    client.write(at, &block).unwrap();
    writes.verify(&uri).unwrap_err();
    drop(client);
    daemon.stop();
}
