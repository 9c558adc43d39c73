//! A daemon that nobody asks anything uses no CPU (P8).

use crate::daemon::Place;
use std::time::{Duration, Instant};

const VOLUMES: u64 = 40;
/// How long nobody asks anything. A clock, not an event: what is shown is that nothing happens meanwhile.
const QUIET: Duration = Duration::from_secs(5);
/// Nanoseconds on a CPU, of all threads: a poll every 10 ms by one volume would take more.
const CPU_NS_MAX: u64 = 20_000_000;

/// Nanoseconds that all threads of a process were on a CPU.
fn on_cpu_ns(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|stat| stat.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()))
        .sum()
}

#[test]
fn an_idle_daemon_with_attached_volumes_uses_no_cpu() {
    let place = Place::new();
    let daemon = place.start();
    for number in 0..VOLUMES {
        daemon.cli(&format!("volume create idle-{number} --size 10G")).ok();
        daemon.attach(&format!("idle-{number}"));
    }
    // The making of standby files, and of whatever else an attach leaves behind, ends by itself: the first quiet stretch
    // is the one that counts, and one has to come soon.
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let before = on_cpu_ns(daemon.pid());
        std::thread::sleep(QUIET);
        let used = on_cpu_ns(daemon.pid()) - before;
        if used <= CPU_NS_MAX {
            println!("{VOLUMES} idle volumes used {} µs of CPU in {QUIET:?}", used / 1000);
            return;
        }
        assert!(Instant::now() < give_up, "still {used} ns of CPU in {QUIET:?}");
    }
}
