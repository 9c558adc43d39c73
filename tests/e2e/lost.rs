//! A pool that does not answer for a while, under full load (P10).

use crate::daemon::{Place, wait_until};
use crate::tools::{Loop, MIB, noise};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Anonymous memory of the daemon. Two packs being made, their blocks, caches of metadata, and requests of clients.
const MEMORY_BYTES_MAX: u64 = 400 * MIB;
const AWAY: Duration = Duration::from_secs(6);
/// What a write or a cached read may take on a busy machine; the pool is away for much longer.
const STALL_MAX: Duration = Duration::from_secs(3);
const REGION_MIB: u64 = 48;

#[test]
fn while_the_pool_is_away_writes_and_cached_reads_go_on_in_bounded_memory() {
    let Some(pool_disk) = Loop::new("ext4", 3000 * MIB) else { return };
    let mut place = Place::new();
    place.pool = pool_disk.mount.join("pool");
    place.cache = "128M";
    place.dirty = "16M";
    place.age_seconds = 1;
    let daemon = place.start();
    for name in ["vm", "cached"] {
        daemon.cli(&format!("volume create {name} --size 512M")).ok();
        daemon.attach(name);
    }
    for number in 0..16 {
        daemon.client("cached").write(number * MIB, &noise(number, MIB)).unwrap();
    }
    daemon.cli("volume detach cached").ok();
    daemon.attach("cached");
    let mut cached = daemon.client("cached");
    for number in 0..16 {
        assert_eq!(cached.read(number * MIB, 1 << 20).unwrap(), noise(number, MIB));
    }

    let over = AtomicBool::new(false);
    let written: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
    let slowest_us = AtomicU64::new(0);
    let note = |started: Instant| {
        slowest_us.fetch_max(u64::try_from(started.elapsed().as_micros()).unwrap(), Ordering::Relaxed);
    };
    let mut memory_bytes = 0;
    std::thread::scope(|scope| {
        for (writer, written) in written.iter().enumerate() {
            let (daemon, over, note) = (&daemon, &over, &note);
            scope.spawn(move || {
                let mut client = daemon.client("vm");
                let mut round = 0;
                while !over.load(Ordering::Relaxed) {
                    let at = (u64::try_from(writer).unwrap() * REGION_MIB + round % REGION_MIB) * MIB;
                    let started = Instant::now();
                    client.write(at, &noise(round, MIB)).unwrap();
                    note(started);
                    if round % 16 == 0 {
                        client.flush().unwrap();
                    }
                    round += 1;
                    written.store(round, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for number in 0..16 {
                    let started = Instant::now();
                    let bytes = cached.read(number * MIB, 1 << 20).unwrap();
                    note(started);
                    assert!(bytes == noise(number, MIB));
                }
            }
        });
        wait_until("the load to run", || written.iter().all(|count| count.load(Ordering::Relaxed) > 20));
        let before: u64 = written.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        let frozen = pool_disk.freeze();
        slowest_us.store(0, Ordering::Relaxed);
        let began = Instant::now();
        while began.elapsed() < AWAY {
            memory_bytes = memory_bytes.max(daemon.rss_bytes());
            std::thread::sleep(Duration::from_millis(50));
        }
        let after: u64 = written.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        let slowest = Duration::from_micros(slowest_us.load(Ordering::Relaxed));
        drop(frozen);
        over.store(true, Ordering::Relaxed);
        println!(
            "{} MiB written while the pool was away; slowest request {slowest:?}; {} MiB of memory",
            after - before,
            memory_bytes / MIB
        );
        assert!(after - before > 20, "writes stood still");
        assert!(slowest < STALL_MAX, "a request took {slowest:?}");
    });
    assert!(memory_bytes < MEMORY_BYTES_MAX, "{} MiB", memory_bytes / MIB);

    // It is back: all of it gets there.
    daemon.cli("volume wait-durable vm").ok();
    daemon.cli("volume detach vm").ok();
    daemon.stop();
    let other = place.other_node();
    let daemon = other.start();
    daemon.attach("vm");
    let mut client = daemon.client("vm");
    for (writer, written) in written.iter().enumerate() {
        let rounds = written.load(Ordering::Relaxed);
        for round in rounds.saturating_sub(REGION_MIB)..rounds {
            let at = (u64::try_from(writer).unwrap() * REGION_MIB + round % REGION_MIB) * MIB;
            assert!(client.read(at, 1 << 20).unwrap() == noise(round, MIB), "MiB {at} of round {round}");
        }
    }
    daemon.stop();
}
