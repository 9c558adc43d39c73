//! What things cost: requests to the pool, time, memory.
//!
//! Memory is measured of the whole process: these tests run with no other beside them.

use crate::rig::{GIB, KIB, Life, MIB, Node, TIB, anonymous_bytes, fill, image, noise, runtime};
use blockhouse::block::{BlockHandler, ExtentKind};
use blockhouse::geometry::{BLOCK_BYTES, ByteRange};
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Prints a figure beside the bound that it is held to.
fn state(what: &str, figures: &str) {
    println!("{what}: {figures}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scattered_writes_over_a_tebibyte_cost_six_puts_at_most() {
    let (mut node, _pool) = Node::on_directory().await;
    node.create("v", TIB, None).await;
    let life = node.life("v").await;
    let mut random = StdRng::seed_from_u64(1);
    let places: Vec<u64> = (0..10_000).map(|_| random.random_range(0..TIB / (4 * KIB)) * 4 * KIB).collect();
    for (number, &place) in (0u64..).zip(&places) {
        life.write(place, noise(number, 4 * KIB)).await;
    }
    let (before, started) = (node.store.puts_and_swaps(), Instant::now());
    life.commit().await;
    let puts = node.store.puts_and_swaps() - before;
    let bytes = node.store.put_bytes.load(Ordering::SeqCst);
    state(
        "commit of 10,000 scattered writes",
        &format!("{puts} puts, {bytes} bytes, {:?}", started.elapsed()),
    );
    assert!(puts <= 6, "{puts} puts");

    // The same content once more: hashed, found to be what it was, and not sent.
    for (number, &place) in (0u64..).zip(&places) {
        life.write(place, noise(number, 4 * KIB)).await;
    }
    let before = node.store.puts.load(Ordering::SeqCst);
    life.commit().await;
    assert_eq!(node.store.puts.load(Ordering::SeqCst) - before, 0, "unchanged content is no pack and no map");
    for number in [0, 5_000, 9_999] {
        let place = places[usize::try_from(number).unwrap()];
        let found = life.read(place, 4 * KIB).await;
        assert!((0..10_000).any(|other| noise(other, 4 * KIB) == found), "write {number} is there");
    }
    life.release().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_readers_of_the_same_cold_blocks_fetch_no_more_than_one() {
    const READERS: u64 = 64;
    const BLOCKS: u64 = 128;
    let mut node = Node::alone().await;
    node.create("v", GIB, None).await;
    let life = node.life("v").await;
    life.write(0, noise(1, BLOCKS * BLOCK_BYTES)).await;
    life.commit().await;
    life.kill().await;
    node.cache_bytes = 64 * MIB;
    let life = node.life("v").await;
    let before = node.store.gets.load(Ordering::SeqCst);
    // Each begins elsewhere, so that some come while a block is fetched, some while it is kept, some after.
    let readers = (0..READERS).map(|reader| {
        let life = &life;
        async move {
            for step in 0..BLOCKS {
                let block = (reader * 3 + step) % BLOCKS;
                assert_eq!(life.read(block * BLOCK_BYTES, 4 * KIB).await.len(), 4096);
            }
        }
    });
    futures::future::join_all(readers).await;
    let gets = node.store.gets.load(Ordering::SeqCst) - before;
    state("64 readers of 128 cold blocks", &format!("{gets} gets"));
    assert!(gets * 100 <= BLOCKS * 105, "{gets} gets");
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_into_a_block_that_only_the_pool_has_asks_it_nothing() {
    let mut node = Node::alone().await;
    node.create("v", GIB, None).await;
    let life = node.life("v").await;
    life.write(0, fill(7, MIB)).await;
    life.commit().await;
    life.kill().await;

    node.store.slow(Duration::from_millis(500));
    node.cache_bytes = 0;
    let life = node.life("v").await;
    let gets = node.store.gets.load(Ordering::SeqCst);
    for (at, len) in [(512, 512), (BLOCK_BYTES + 4 * KIB, 4 * KIB), (2 * BLOCK_BYTES - 512, KIB)] {
        let started = Instant::now();
        life.write(at, fill(9, len)).await;
        state("write over a cold block", &format!("{:?}", started.elapsed()));
        assert!(started.elapsed() < Duration::from_millis(250), "it waited for the pool");
    }
    assert_eq!(node.store.gets.load(Ordering::SeqCst), gets, "nothing was read");
    // Less than a sector has to know the rest of it.
    life.write(3 * BLOCK_BYTES + 7, fill(9, 10)).await;
    assert!(node.store.gets.load(Ordering::SeqCst) > gets);
    assert!(life.holds(0, 512, 7).await && life.holds(512, 512, 9).await && life.holds(KIB, 512, 7).await);
    let part = life.read(3 * BLOCK_BYTES, 512).await;
    assert!(part[..7] == [7; 7] && part[7..17] == [9; 10] && part[17..] == [7; 495]);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l26_reading_and_discarding_a_large_empty_volume_touches_no_map() {
    let mut node = Node::alone().await;
    node.create("v", 4 * TIB, None).await;
    let life = node.life("v").await;
    life.ready().await;
    let before = node.live_map_bytes();
    for step in 0..64 {
        assert!(life.holds(step * 60 * GIB, MIB, 0).await);
    }
    assert_eq!(node.live_map_bytes(), before, "reading allocates no page of a live map");
    let extents = life.handler.extents(ByteRange::new(0, 64 * GIB), 16).await.unwrap();
    assert!(extents.iter().all(|extent| extent.kind == ExtentKind::Hole));
    assert_eq!(node.live_map_bytes(), before, "asking for extents allocates no page of a live map");

    let (memory, started) = (anonymous_bytes(), Instant::now());
    life.zero(0, 4 * TIB).await;
    let grown = anonymous_bytes().saturating_sub(memory);
    state("discard of 4 TiB, empty", &format!("{:?}, {grown} bytes more", started.elapsed()));
    assert!(started.elapsed() < Duration::from_secs(1));
    assert!(grown < 8 * MIB, "{grown} bytes more");
    assert_eq!(node.live_map_bytes(), before, "what is zero already needs no record");
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discarding_a_whole_image_of_a_tebibyte_is_small() {
    let mut node = Node::alone().await;
    let engine = node.engine().await;
    let map = image(&engine, TIB).await;
    drop(engine);
    node.create("v", TIB, Some(map)).await;
    let life = node.life("v").await;
    life.ready().await;
    assert!(
        life.holds(TIB - MIB, MIB - BLOCK_BYTES, 0).await
            && life.holds(TIB - BLOCK_BYTES, BLOCK_BYTES, 3).await
    );
    let before = (node.live_map_bytes(), anonymous_bytes());
    let started = Instant::now();
    life.zero(0, TIB).await;
    let (took, map_bytes) = (started.elapsed(), node.live_map_bytes() - before.0);
    let grown = anonymous_bytes().saturating_sub(before.1);
    state("discard of an image of 1 TiB", &format!("{took:?}, map {map_bytes} bytes, {grown} bytes more"));
    // One bit a block: 1 MiB of map for 8 million blocks.
    assert!(map_bytes <= MIB + 64 * KIB, "{map_bytes} bytes of map");
    assert!(grown < 16 * MIB && took < Duration::from_secs(1));
    assert!(life.holds(TIB - BLOCK_BYTES, BLOCK_BYTES, 0).await && life.holds(0, BLOCK_BYTES, 0).await);

    let (started, memory, puts) = (Instant::now(), anonymous_bytes(), node.store.puts_and_swaps());
    life.commit().await;
    let grown = anonymous_bytes().saturating_sub(memory);
    let puts = node.store.puts_and_swaps() - puts;
    state("its commit", &format!("{:?}, {puts} puts, {grown} bytes more", started.elapsed()));
    assert!(puts <= 6 && grown < 64 * MIB && started.elapsed() < Duration::from_secs(10));
    assert!(life.holds(0, BLOCK_BYTES, 0).await);
    life.kill().await;
}

/// Writes the data of a sparse file to a volume, and flushes.
async fn replay(life: &Life, file: &std::fs::File) -> u64 {
    let (mut at, mut bytes) = (0, 0);
    while let Ok(start) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        at = start;
        while at < end {
            let len = (end - at).min(MIB);
            let mut data = vec![0; usize::try_from(len).unwrap()];
            file.read_exact_at(&mut data, at).unwrap();
            life.write(at, Bytes::from(data)).await;
            (at, bytes) = (at + len, bytes + len);
        }
    }
    life.flush().await;
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_made_on_four_tebibytes_is_a_few_puts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ext4");
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    if file.set_len(4 * TIB).is_err() {
        println!("skipped: this file system holds no file of 4 TiB");
        return;
    }
    let command = tokio::process::Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&path).status();
    match command.await {
        Ok(status) => assert!(status.success()),
        Err(error) => {
            println!("skipped: no mke2fs here: {error}");
            return;
        }
    }
    let (mut node, _pool) = Node::on_directory().await;
    node.create("v", 4 * TIB, None).await;
    let life = node.life("v").await;
    life.zero(0, 4 * TIB).await;
    let (memory, started) = (anonymous_bytes(), Instant::now());
    let bytes = replay(&life, &file).await;
    let (wrote, puts) = (started.elapsed(), node.store.puts_and_swaps());
    life.commit().await;
    let took = started.elapsed() - wrote;
    let grown = anonymous_bytes().saturating_sub(memory);
    let puts = node.store.puts_and_swaps() - puts;
    state(
        "mkfs of 4 TiB",
        &format!("{bytes} bytes in {wrote:?}, commit {took:?}, {puts} puts, {grown} bytes more"),
    );
    // The journal, which is zeros, is most of what is written, and none of what is sent.
    assert!(puts <= 6 && grown < 256 * MIB, "{puts} puts, {grown} bytes");
    life.release().await;

    // Another node finds the file system.
    let mut other = node.other(5);
    let life = other.life("v").await;
    assert_eq!(life.read(KIB + 56, 2).await[..], [0x53, 0xef], "the magic of ext4");
    life.kill().await;
}

#[test]
fn p10_a_pool_that_is_away_stops_neither_writes_nor_flushes_nor_cached_reads() {
    let runtime = runtime();
    runtime.block_on(async {
        let mut node = Node::alone().await;
        node.config.commit_dirty_bytes = 8 * MIB;
        node.create("v", GIB, None).await;
        let life = node.life("v").await;
        life.write(0, noise(1, BLOCK_BYTES)).await;
        life.commit().await;
        life.kill().await;
        let life = node.life("v").await;
        assert_eq!(life.read(0, BLOCK_BYTES).await, noise(1, BLOCK_BYTES));

        node.store.stop();
        let memory = anonymous_bytes();
        let mut slowest = Duration::ZERO;
        for step in 0..128 {
            let started = Instant::now();
            life.write((1 + step % 100) * MIB, noise(step, MIB)).await;
            slowest = slowest.max(started.elapsed());
            if step % 16 == 15 {
                life.flush().await;
                assert_eq!(life.read(0, BLOCK_BYTES).await, noise(1, BLOCK_BYTES), "from the cache");
            }
        }
        node.store.await_caller().await;
        let grown = anonymous_bytes().saturating_sub(memory);
        state("128 MiB written with the pool away", &format!("slowest MiB {slowest:?}, {grown} bytes more"));
        // A pack being made, and the blocks on their way into it.
        assert!(grown < 112 * MIB, "{grown} bytes more");

        node.store.resume();
        life.commit().await;
        life.kill().await;
        let life = node.life("v").await;
        assert_eq!(life.attached.volume.dirty().0, 0, "all is in the pool");
        for step in 28..128 {
            assert_eq!(life.read((1 + step % 100) * MIB, MIB).await, noise(step, MIB));
        }
        life.kill().await;
    });
}
