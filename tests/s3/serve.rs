//! A daemon whose pool is in a bucket.
//!
//! Owns: from an image to a second node, a pool that is away, and what a person is told.
//! Does not own: what a daemon does with any pool (`tests/e2e`).

use crate::bucket;
use crate::daemon::{Daemon, Place};
use crate::proxy::Proxy;
use blockhouse::store::s3::S3Config;
use rand::{RngCore, SeedableRng};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A daemon on a bucket, ready.
fn start<'a>(place: &'a Place, url: &str, endpoint: &str) -> Daemon<'a> {
    std::fs::write(place.path("blockhouse.toml"), place.settings()).unwrap();
    let mut daemon = place.spawn_with(&["--pool", url, "--endpoint", endpoint]);
    daemon.wait_ready();
    daemon
}

fn url(config: &S3Config) -> String {
    config.address.to_string()
}

#[test]
fn a_volume_lives_in_a_bucket_and_a_node_with_nothing_finds_it_there() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let url = url(&runtime.block_on(bucket::config()));
    let place = Place::new();
    let raw = place.path("root.raw");
    let mut content = noise(1, 40 * MIB);
    std::fs::write(&raw, &content).unwrap();

    let daemon = start(&place, &url, &bucket::endpoint());
    daemon.cli(&format!("image import debian {}", raw.display())).ok();
    daemon.cli("volume create vm-7 --from image:debian").ok();
    daemon.attach("vm-7");
    let mut client = daemon.client("vm-7");
    let patch = noise(2, 3 * MIB);
    client.write(5 * 4096, &patch).unwrap();
    client.flush().unwrap();
    content[5 * 4096..][..patch.len()].copy_from_slice(&patch);
    assert_eq!(client.read(0, 8 * MIB).unwrap(), &content[..8 * MIB]);
    daemon.cli("snapshot create vm-7").ok();
    let told = daemon.cli("doctor").ok();
    assert!(told.contains("bucket: it keeps conditions"), "{told}");
    // Written and never committed: it survives here.
    client.write(20 * 1_048_576, &patch).unwrap();
    daemon.kill9();
    let daemon = start(&place, &url, &bucket::endpoint());
    let mut client = daemon.client("vm-7");
    assert_eq!(client.read(20 * 1_048_576, patch.len()).unwrap(), patch);
    content[20 * MIB..][..patch.len()].copy_from_slice(&patch);
    daemon.cli("volume detach vm-7").ok();
    daemon.stop();

    let elsewhere = Place::new();
    let daemon = start(&elsewhere, &url, &bucket::endpoint());
    let listed = daemon.cli("volume list").ok();
    assert!(listed.contains("vm-7") && listed.contains("image:debian"), "{listed}");
    assert!(daemon.cli("image list").ok().contains("debian"));
    daemon.attach("vm-7");
    let mut client = daemon.client("vm-7");
    for (number, part) in content.chunks(4 * MIB).enumerate() {
        let at = u64::try_from(number * 4 * MIB).unwrap();
        assert!(client.read(at, part.len()).unwrap() == part, "at {at}");
    }
    daemon.stop();
}

#[test]
fn p10_reads_wait_for_a_bucket_that_is_away_and_writes_go_on() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (config, proxy) =
        runtime.block_on(async { (bucket::config().await, Proxy::start(&bucket::endpoint(), 1).await) });
    let place = Place::new();
    let raw = place.path("root.raw");
    let content = noise(3, 16 * MIB);
    std::fs::write(&raw, &content).unwrap();
    let daemon = start(&place, &url(&config), &proxy.url);
    daemon.cli(&format!("image import debian {}", raw.display())).ok();
    daemon.stop();
    // With an empty cache.
    let place = Place::new();
    let daemon = start(&place, &url(&config), &proxy.url);
    daemon.cli("volume create vm-7 --from image:debian").ok();
    daemon.attach("vm-7");
    let (mut reader, mut writer) = (daemon.client("vm-7"), daemon.client("vm-7"));
    assert!(reader.read(0, 4096).unwrap() == content[..4096]);

    proxy.set_away(true);
    let away = Instant::now();
    let reading = std::thread::spawn(move || (reader.read(8 * 1_048_576, MIB), away.elapsed()));
    while away.elapsed() < Duration::from_secs(4) {
        let began = Instant::now();
        writer.write(0, &[7; 4096]).unwrap();
        writer.flush().unwrap();
        assert!(began.elapsed() < Duration::from_secs(2), "a write waits for the pool");
    }
    assert!(!reading.is_finished(), "the read waits");
    proxy.set_away(false);
    let (read, waited) = reading.join().unwrap();
    assert!(read.unwrap() == content[8 * MIB..][..MIB]);
    assert!(waited >= Duration::from_secs(4), "{waited:?}");
    daemon.stop();
}

#[test]
fn a_daemon_without_its_bucket_says_why_it_does_not_start() {
    let place = Place::new();
    std::fs::write(place.path("blockhouse.toml"), place.settings()).unwrap();
    let endpoint = bucket::endpoint();
    for (arguments, says) in [
        (&["--pool", "s3://no-such-bucket/p", "--endpoint", &endpoint][..], "NoSuchBucket"),
        (&["--pool", "s3://pools/p", "--endpoint", "http://127.0.0.1:1"], "refused"),
        (&["--pool", "s3://pools/p", "--endpoint", "127.0.0.1"], "no server"),
        (&["--pool", "s3://pools//p"], "prefix"),
        (&["--pool", "s3://pools/p", "--endpoint", &endpoint, "--ca-file", "/nowhere.pem"], "/nowhere.pem"),
        (&["--endpoint", "https://127.0.0.1"], "url"),
    ] {
        let (code, said) = place.spawn_with(arguments).refused();
        assert!(code != 0 && said.contains(says), "{arguments:?}: {said}");
    }
}
