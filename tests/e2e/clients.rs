//! What many NBD clients cost: idle ones next to nothing, busy ones no more than a bound.

use crate::daemon::Place;
use crate::nbd::{READ, WRITE};
use std::sync::atomic::{AtomicBool, Ordering};

const IDLE: usize = 900;
/// Of the daemon and of the kernel, which here keeps both ends of each socket.
const IDLE_BYTES_MAX: u64 = 16 * 1024;
const BUSY: usize = 64;
const REQUESTS: usize = 64;
/// Requests of all clients at once would be 4 GiB. `node_bytes_max` is 256 MiB; the rest is for buffers of 128 KiB a
/// client and for the daemon itself.
const BUSY_BYTES_MAX: u64 = 360 << 20;
const MIB: usize = 1 << 20;

/// Kernel memory that cannot be taken back, of the whole machine.
fn kernel_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("SUnreclaim:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn an_idle_client_costs_at_most_16_kib_with_both_ends_in_the_kernel() {
    let place = Place::new();
    let daemon = place.start();
    daemon.cli("volume create disk --size 1G").ok();
    daemon.attach("disk");
    // What the first clients bring about is not theirs.
    for _ in 0..20 {
        daemon.client("disk").write(0, &[1; 4096]).unwrap();
    }
    // The kernel's figure is that of the machine: others may take memory meanwhile, so the best of some tries counts.
    let mut best = u64::MAX;
    for _ in 0..5 {
        let (rss, kernel) = (daemon.rss_bytes(), kernel_bytes());
        let clients: Vec<_> = (0..IDLE)
            .map(|_| {
                let mut client = daemon.client("disk");
                // One that has done something, and is idle again.
                assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
                client
            })
            .collect();
        let each = |before: u64, after: u64| after.saturating_sub(before) / IDLE as u64;
        let (user, kernel) = (each(rss, daemon.rss_bytes()), each(kernel, kernel_bytes()));
        println!("an idle client: {user} bytes of the daemon, {kernel} of the kernel");
        best = best.min(user + kernel);
        drop(clients);
        if best <= IDLE_BYTES_MAX {
            return;
        }
    }
    panic!("an idle client costs {best} bytes");
}

#[test]
fn many_busy_clients_stay_below_a_bound_of_memory() {
    let place = Place::new();
    let daemon = place.start();
    daemon.cli("volume create disk --size 1G").ok();
    daemon.attach("disk");
    for at in 0..64 {
        daemon.client("disk").write(at << 20, &vec![7; MIB]).unwrap();
    }
    let is_over = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !is_over.load(Ordering::Relaxed) {
                most = most.max(daemon.rss_bytes());
                std::thread::yield_now();
            }
            most
        });
        let clients: Vec<_> = (0..BUSY)
            .map(|number| {
                let mut client = daemon.client("disk");
                scope.spawn(move || {
                    let at = |request: usize| ((number + request) % 64 * MIB) as u64;
                    if number % 2 == 0 {
                        // All at once; the replies are taken only then.
                        for request in 0..REQUESTS {
                            client.send(READ, 0, at(request), MIB, &[]).unwrap();
                        }
                        for _ in 0..REQUESTS {
                            assert_eq!(client.read_answer(MIB).unwrap(), vec![7; MIB]);
                        }
                    } else {
                        for request in 0..REQUESTS {
                            client.send(WRITE, 0, at(request), MIB, &vec![7; MIB]).unwrap();
                        }
                        for _ in 0..REQUESTS {
                            assert_eq!(client.answer().unwrap().1, 0);
                        }
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    });
    println!("{BUSY} busy clients: {} MiB of the daemon at most", most >> 20);
    assert!(most <= BUSY_BYTES_MAX, "{most} bytes");
}
