//! Disks that fill up: writers are slowed, then refused, nothing is lost, and it goes on once there is space.

use crate::daemon::{Daemon, Place, wait_until};
use crate::nbd::{Client, ENOSPC};
use crate::tools::{Loop, MIB, noise, text};
use std::time::{Duration, Instant};

/// Writes 1 MiB after the other from `from` on, until it is refused: how many were acknowledged, and how long each took.
fn write_until_full(client: &mut Client, from: u64, most: u64) -> Vec<Duration> {
    let mut took = Vec::new();
    for number in from..from + most {
        let started = Instant::now();
        match client.write(number * MIB, &noise(number, MIB)) {
            Ok(()) => took.push(started.elapsed()),
            Err(failure) => {
                assert_eq!(failure.code(), Some(ENOSPC), "{failure:?}");
                println!(
                    "{} MiB acknowledged; first took {:?}, last {:?}; refused after {:?}",
                    took.len(),
                    took.first(),
                    took.last(),
                    started.elapsed()
                );
                return took;
            }
        }
    }
    panic!("{most} MiB went onto a disk that has not so much");
}

fn verify(daemon: &Daemon<'_>, count: u64) {
    let mut client = daemon.client("vm");
    for number in 0..count {
        assert!(
            client.read(number * MIB, 1 << 20).unwrap() == noise(number, MIB),
            "MiB {number} is not as written"
        );
    }
}

/// A write that was refused, again and again until there is space.
fn write_when_possible(daemon: &Daemon<'_>, number: u64) {
    let mut client = daemon.client("vm");
    wait_until("a write to be taken", || client.write(number * MIB, &noise(number, MIB)).is_ok());
}

fn count(took: &[Duration]) -> u64 {
    u64::try_from(took.len()).unwrap()
}

fn state_directory_full(kind: &str) {
    let Some(state_disk) = Loop::new(kind, 400 * MIB) else { return };
    let Some(pool_disk) = Loop::new("ext4", 1000 * MIB) else { return };
    let mut place = Place::new();
    place.state = state_disk.mount.join("state");
    place.pool = pool_disk.mount.join("pool");
    place.cache = "16M";
    place.dirty = "16M";
    let daemon = place.start();
    daemon.cli("volume create vm --size 2G").ok();
    daemon.attach("vm");

    // The pool takes nothing, so nothing leaves the disk.
    let frozen = pool_disk.freeze();
    let mut client = daemon.client("vm");
    let mut written = count(&write_until_full(&mut client, 0, 400));
    assert!(written > 50, "only {written} MiB fit");
    verify(&daemon, written);
    drop(frozen);
    write_when_possible(&daemon, written);
    written += 1;
    daemon.cli("volume wait-durable vm").ok();
    verify(&daemon, written);

    // Something else takes the space, and a daemon starts on the full disk.
    let filler = state_disk.fill(12 * MIB);
    written += count(&write_until_full(&mut daemon.client("vm"), written, 100));
    verify(&daemon, written);
    daemon.kill9();
    let daemon = place.start();
    verify(&daemon, written);
    std::fs::remove_file(filler).unwrap();
    write_when_possible(&daemon, written);
    written += 1;
    daemon.cli("volume wait-durable vm").ok();
    daemon.cli("volume detach vm").ok();
    daemon.stop();

    let other = place.other_node();
    let daemon = other.start();
    daemon.attach("vm");
    verify(&daemon, written);
    daemon.stop();
}

#[test]
fn a_full_state_directory_on_ext4_refuses_writes_loses_nothing_and_goes_on() {
    state_directory_full("ext4");
}

#[test]
fn l11_a_full_state_directory_on_xfs_refuses_writes_loses_nothing_and_goes_on() {
    state_directory_full("xfs");
}

#[test]
fn l11_on_a_full_disk_that_also_holds_the_pool_deleting_works() {
    let Some(disk) = Loop::new("ext4", 600 * MIB) else { return };
    let mut place = Place::new();
    place.state = disk.mount.join("state");
    place.pool = disk.mount.join("pool");
    place.cache = "16M";
    place.dirty = "16M";
    let image = place.path("image.raw");
    std::fs::write(&image, noise(1 << 40, 40 * MIB)).unwrap();
    let daemon = place.start();
    daemon.cli(&format!("image import image {}", text(&image))).ok();
    daemon.cli("volume create old --from image:image").ok();
    daemon.cli("volume create vm --size 2G").ok();
    daemon.attach("vm");
    let filler = disk.fill(300 * MIB);
    let mut written = count(&write_until_full(&mut daemon.client("vm"), 0, 600));
    disk.fill(0);
    assert!(disk.free_bytes() < MIB, "{} bytes are free", disk.free_bytes());
    verify(&daemon, written);
    let ran = daemon.cli(&format!("image import more {}", text(&image)));
    assert_eq!(ran.code, 5, "{}", ran.err);
    daemon.cli("image show more").refused(3, "more");

    daemon.cli("volume delete old --yes").ok();
    daemon.cli("image delete image --yes").ok();
    daemon.kill9();
    let daemon = place.start();
    verify(&daemon, written);
    daemon.cli("volume show old").refused(3, "old");
    std::fs::remove_file(filler).unwrap();
    write_when_possible(&daemon, written);
    written += 1;
    daemon.cli("volume wait-durable vm").ok();
    verify(&daemon, written);
    daemon.cli("volume undelete old").ok();
    daemon.stop();
}
