//! On the real disk: the files below are written, damaged and read as a daemon would.
#![expect(clippy::disallowed_methods, reason = "tests")]

use super::*;
use crate::disk::real::{RealDisk, RealDiskConfig};
use crate::disk::{DiskPath, Lock};
use futures::future::BoxFuture;
use proptest::prelude::*;
use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

fn disk(state: &Path) -> Arc<dyn Disk> {
    let runtime_dir = Some(state.to_owned());
    Arc::new(RealDisk::open(RealDiskConfig { state_dir: state.to_owned(), runtime_dir }).unwrap())
}

async fn open(state: &Path, slots: u64) -> Arc<CleanCache> {
    let config = CacheConfig { bytes: slots * BLOCK_BYTES };
    CleanCache::open(disk(state), Offload::Threads, config).await.unwrap()
}

fn block(number: u64) -> (ContentHash, Bytes) {
    let mut content = vec![0; BLOCK_LEN];
    for (at, part) in content.chunks_exact_mut(8).enumerate() {
        part.copy_from_slice(&(number << 32 | at as u64).to_le_bytes());
    }
    (ContentHash::of(&content), content.into())
}

async fn keep(cache: &Arc<CleanCache>, number: u64) -> Option<Pinned> {
    let (hash, content) = block(number);
    cache.insert(hash, content).await
}

async fn content_of(pinned: &Pinned) -> Bytes {
    pinned.file().read_at(pinned.offset_bytes(), BLOCK_LEN).await.unwrap()
}

fn is_thread_safe<T: Clone + Send + Sync + 'static>(_: &T) {}

#[tokio::test]
async fn a_block_is_found_once_it_was_kept_and_stored_once_however_many_bring_it() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 8).await;
    let (hash, content) = block(1);
    assert!(cache.get(&hash).is_none() && cache.revive(&hash).await.is_none());
    let all = futures::future::join_all((0..10).map(|_| cache.insert(hash, content.clone()))).await;
    let offsets: HashSet<_> = all.iter().map(|pinned| pinned.as_ref().unwrap().offset_bytes()).collect();
    assert_eq!(offsets.len(), 1);
    let pinned = cache.get(&hash).unwrap();
    is_thread_safe(&pinned);
    assert_eq!(content_of(&pinned).await, content);
    let stats = cache.stats();
    assert_eq!((stats.slots, stats.used, stats.hits, stats.misses, stats.failures), (8, 1, 1, 1, 0));
    assert!(cache.insert(hash, content.slice(1..)).await.is_none(), "not a whole block");
}

#[tokio::test]
async fn l12_a_pinned_slot_keeps_its_bytes_while_ten_times_the_capacity_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 16).await;
    let pinned = keep(&cache, 0).await.unwrap();
    let again = pinned.clone();
    drop(pinned);
    let numbers: Vec<u64> = (1..161).collect();
    for some in numbers.chunks(20) {
        futures::future::join_all(some.iter().map(|&number| keep(&cache, number))).await;
        assert_eq!(content_of(&again).await, block(0).1);
    }
    assert!(cache.stats().evictions >= 100, "{:?}", cache.stats());
    drop(again);
    for number in 200..400 {
        keep(&cache, number).await.unwrap();
    }
    assert!(cache.get(&block(0).0).is_none(), "unpinned, it goes in the end");
}

/// Hands the pages of a slot to a socket, as a frontend does: the end to read from, and how many bytes it took.
fn send(pinned: &Pinned) -> (std::os::unix::net::UnixStream, usize) {
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    let file = pinned.file();
    let mut offset_bytes = pinned.offset_bytes();
    let sent =
        rustix::fs::sendfile(&here, file.as_fd().unwrap(), Some(&mut offset_bytes), BLOCK_LEN).unwrap();
    assert!(sent >= 4096);
    (there, sent)
}

fn received((mut there, sent): (std::os::unix::net::UnixStream, usize)) -> Vec<u8> {
    let mut bytes = vec![0; sent];
    std::io::Read::read_exact(&mut there, &mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn l12_a_slot_whose_pages_a_socket_holds_is_not_refilled_before_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 4).await;
    let mut pins = Vec::new();
    for number in 0..4 {
        pins.push(keep(&cache, number).await.unwrap());
    }
    // Read one after the other, the kernel may keep neighbours together.
    for slot in 0..4 {
        cache.blocks.read_at(slot_offset_bytes(slot), BLOCK_LEN).await.unwrap();
    }
    let pinned = pins.swap_remove(2);
    drop(pins);
    if !pinned.hand_out() {
        println!("skipped: the file system of the temporary directory keeps no pages apart from its files");
        return;
    }
    let taken = send(&pinned);
    drop(pinned);
    for number in 10..200 {
        keep(&cache, number).await;
    }
    assert!(cache.get(&block(2).0).is_none(), "others took its place");
    assert!(cache.stats().used < 4, "but not its slot: {:?}", cache.stats());
    let sent = taken.1;
    assert_eq!(received(taken), block(2).1[..sent]);
    for number in 200..400 {
        keep(&cache, number).await;
    }
    assert_eq!(cache.stats().used, 4, "read, it is a slot like the others");

    // What the rule is there for: a plain write over the slot reaches who has not read yet.
    let pinned = keep(&cache, 500).await.unwrap();
    let taken = send(&pinned);
    cache.blocks.write_at(block(501).1, pinned.offset_bytes()).await.unwrap();
    let sent = taken.1;
    assert_eq!(received(taken), block(501).1[..sent], "the kernel copies: the test above shows nothing");
}

#[tokio::test]
async fn with_all_slots_pinned_nothing_more_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 4).await;
    let pins = futures::future::join_all((0..4).map(|number| keep(&cache, number))).await;
    assert!(keep(&cache, 9).await.is_none());
    assert_eq!((cache.stats().skipped, cache.stats().evictions), (1, 0));
    drop(pins);
    assert!(keep(&cache, 9).await.is_some());
}

#[tokio::test]
async fn l13_after_a_restart_a_slot_counts_only_once_it_was_hashed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 8).await;
    for number in 0..4 {
        keep(&cache, number).await.unwrap();
    }
    let spoiled = cache.get(&block(1).0).unwrap().offset_bytes();
    cache.blocks.write_at(Bytes::from_static(b"x"), spoiled + 5000).await.unwrap();
    drop(cache);
    let cache = open(dir.path(), 8).await;
    for number in [0, 2, 3] {
        let (hash, content) = block(number);
        assert!(cache.get(&hash).is_none());
        let ((first, bytes), second) = {
            let (first, second) = futures::join!(cache.revive(&hash), cache.revive(&hash));
            (first.unwrap(), second.unwrap())
        };
        assert_eq!((&bytes, &second.1), (&content, &content));
        assert_eq!(content_of(&first).await, content);
        assert_eq!(cache.get(&hash).unwrap().offset_bytes(), first.offset_bytes());
    }
    let (hash, content) = block(1);
    assert!(cache.revive(&hash).await.is_none() && cache.get(&hash).is_none());
    assert_eq!((cache.stats().revived, cache.stats().used, cache.stats().failures), (3, 3, 1));
    assert_eq!(content_of(&cache.insert(hash, content.clone()).await.unwrap()).await, content);
}

#[tokio::test]
async fn a_slot_that_is_only_believed_may_be_filled_again_instead_of_read() {
    let dir = tempfile::tempdir().unwrap();
    drop(keep(&open(dir.path(), 4).await, 1).await);
    let cache = open(dir.path(), 4).await;
    let (hash, content) = block(1);
    let (kept, revived) = futures::join!(cache.insert(hash, content.clone()), cache.revive(&hash));
    assert_eq!(content_of(&kept.unwrap()).await, content);
    assert_eq!(revived.unwrap().1, content);
    assert_eq!(cache.stats().used, 1);
}

#[tokio::test]
async fn a_discarded_slot_is_not_found_and_is_filled_again_when_unpinned() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1).await;
    let pinned = keep(&cache, 1).await.unwrap();
    pinned.clone().discard();
    assert!(cache.get(&block(1).0).is_none());
    assert!(keep(&cache, 2).await.is_none(), "someone still reads it");
    drop(pinned);
    assert!(keep(&cache, 2).await.is_some());
}

#[tokio::test]
async fn who_stops_waiting_for_an_insert_leaves_no_slot_behind() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 4).await;
    for number in 0..20 {
        let mut insert = Box::pin(keep(&cache, number));
        // Pending, or refused because all slots are being filled.
        assert!(!matches!(futures::poll!(insert.as_mut()), std::task::Poll::Ready(Some(_))));
    }
    // All inserts are over once all permits are back.
    let all = u32::try_from(INSERTS_MAX).unwrap();
    drop(cache.inserts.acquire_many(all).await.unwrap());
    for number in 100..108 {
        assert_eq!(content_of(&keep(&cache, number).await.unwrap()).await, block(number).1);
    }
    assert!(cache.state.lock().busy.is_empty());
    assert_eq!(cache.stats().used, 4);
}

#[tokio::test]
async fn more_inserts_than_fit_in_memory_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 4).await;
    let all = cache.inserts.clone().acquire_many_owned(u32::try_from(INSERTS_MAX).unwrap()).await.unwrap();
    assert!(keep(&cache, 1).await.is_none());
    drop(all);
    assert!(keep(&cache, 1).await.is_some());
}

#[tokio::test]
async fn another_size_or_a_damaged_header_starts_empty() {
    let dir = tempfile::tempdir().unwrap();
    let (hash, _) = block(1);
    drop(keep(&open(dir.path(), 8).await, 1).await.unwrap());
    assert!(open(dir.path(), 8).await.revive(&hash).await.is_some());
    assert!(open(dir.path(), 16).await.revive(&hash).await.is_none());
    drop(keep(&open(dir.path(), 16).await, 1).await.unwrap());
    let index = disk(dir.path()).open(DiskPath::state("cache/index"), Lock::None).await.unwrap();
    index.write_at(Bytes::from_static(&[2]), 8).await.unwrap();
    let cache = open(dir.path(), 16).await;
    assert!(cache.revive(&hash).await.is_none());
    assert!(keep(&cache, 1).await.is_some());
    let none = open(&dir.path().join("other"), 0).await;
    assert!(keep(&none, 1).await.is_none() && none.get(&hash).is_none());
}

/// A small disk, unmounted at the end. `None` where it cannot be had.
struct Mount(tempfile::TempDir);

impl Mount {
    fn of_bytes(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(dir))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(self.0.path()).status().unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_is_only_misses_and_what_is_kept_can_still_be_replaced() {
    let Some(mount) = Mount::of_bytes(32 * BLOCK_BYTES) else {
        eprintln!("skipped: mounting needs root");
        return;
    };
    let dir = mount.0.path();
    let cache = open(dir, 1000).await;
    assert!((8..=16).contains(&cache.stats().slots), "half of what is free: {:?}", cache.stats());
    for number in 0..4 {
        keep(&cache, number).await.unwrap();
    }
    let rest = disk(dir).create(DiskPath::state("rest"), 0, Lock::None).await.unwrap();
    let mut at = 0;
    while rest.write_at(Bytes::from(vec![1; 4096]), at).await.is_ok() {
        at += 4096;
    }
    let mut kept = 0;
    for number in 100..200 {
        if let Some(pinned) = keep(&cache, number).await {
            assert_eq!(content_of(&pinned).await, block(number).1);
            kept += 1;
        }
    }
    assert!(kept > 80, "{kept}");
    let stats = cache.stats();
    assert!(stats.failures > 0 && stats.failures < 20, "{stats:?}");
    disk(dir).remove(DiskPath::state("rest")).await.unwrap();
    drop(rest);
    // The space is there once the last close is through, on a thread of its own.
    let grows = async {
        let mut number = 200;
        while cache.stats().used < cache.stats().slots {
            keep(&cache, number).await;
            number += 1;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), grows).await.expect("it grows again with the space");
}

/// The real file, but for errors of write-back, which no file system gives on request.
struct BadDisk {
    file: Arc<dyn DiskFile>,
    is_bad: Arc<AtomicBool>,
}

impl DiskFile for BadDisk {
    fn try_read_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        self.file.try_read_at(buf, offset_bytes)
    }
    fn try_write_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<usize> {
        self.file.try_write_at(buf, offset_bytes)
    }
    fn read_at(&self, offset_bytes: u64, len: usize) -> BoxFuture<'static, io::Result<Bytes>> {
        self.file.read_at(offset_bytes, len)
    }
    fn write_at(&self, data: Bytes, offset_bytes: u64) -> BoxFuture<'static, io::Result<()>> {
        self.file.write_at(data, offset_bytes)
    }
    fn sync_data(&self) -> BoxFuture<'static, io::Result<()>> {
        self.file.sync_data()
    }
    fn check_write_back(&self) -> BoxFuture<'static, io::Result<()>> {
        let (checked, is_bad) = (self.file.check_write_back(), self.is_bad.clone());
        Box::pin(async move {
            checked.await?;
            // Told once, to whoever asks first.
            if is_bad.swap(false, Ordering::Relaxed) { Err(io::Error::other("bad disk")) } else { Ok(()) }
        })
    }
    fn data_stretches(&self, from_bytes: u64, max: usize) -> BoxFuture<'static, io::Result<Vec<(u64, u64)>>> {
        self.file.data_stretches(from_bytes, max)
    }
    fn inode(&self) -> u64 {
        self.file.inode()
    }
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.file.as_fd()
    }
}

#[tokio::test]
async fn an_error_of_write_back_fails_every_insert_that_it_may_be_about_and_nothing_older() {
    let dir = tempfile::tempdir().unwrap();
    let mut cache = open(dir.path(), 64).await;
    keep(&cache, 0).await.unwrap();
    let is_bad = Arc::new(AtomicBool::new(false));
    let inner = Arc::get_mut(&mut cache).unwrap();
    inner.blocks = Arc::new(BadDisk { file: inner.blocks.clone(), is_bad: is_bad.clone() });
    let turn = cache.check_turn.lock().await;
    let inserts = (1..20).map(|number| {
        let cache = cache.clone();
        tokio::spawn(async move { keep(&cache, number).await })
    });
    let inserts: Vec<_> = inserts.collect();
    // All are written, none is looked after.
    while cache.state.lock().checks.written < 20 {
        tokio::task::yield_now().await;
    }
    assert!((1..20).all(|number| cache.get(&block(number).0).is_none()), "not before the look");
    is_bad.store(true, Ordering::Relaxed);
    drop(turn);
    for insert in inserts {
        assert!(insert.await.unwrap().is_none());
    }
    assert!((1..20).all(|number| cache.get(&block(number).0).is_none()));
    assert_eq!(content_of(&cache.get(&block(0).0).unwrap()).await, block(0).1);
    assert!(keep(&cache, 1).await.is_some());
    assert_eq!((cache.stats().failures, cache.stats().used), (19, 2));
}

#[derive(Clone, Debug)]
enum Step {
    Keep(u64),
    Get(u64),
    Revive(u64),
    Pin(u64),
    Unpin(usize),
    Discard(u64),
    Restart,
    /// Writes a byte somewhere into the blocks or the index, and restarts.
    Damage {
        index: bool,
        at: prop::sample::Index,
        value: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let number = 0u64..24;
    prop_oneof![
        12 => number.clone().prop_map(Step::Keep),
        8 => number.clone().prop_map(Step::Get),
        8 => number.clone().prop_map(Step::Revive),
        3 => number.clone().prop_map(Step::Pin),
        2 => (0usize..8).prop_map(Step::Unpin),
        1 => number.prop_map(Step::Discard),
        1 => Just(Step::Restart),
        2 => (any::<bool>(), any::<prop::sample::Index>(), any::<u8>())
            .prop_map(|(index, at, value)| Step::Damage { index, at, value }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn l13_no_slot_ever_serves_other_content(steps in proptest::collection::vec(step(), 1..80)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(run(steps));
    }
}

async fn run(steps: Vec<Step>) {
    const SLOTS: u64 = 6;
    let dir = tempfile::tempdir().unwrap();
    let mut cache = open(dir.path(), SLOTS).await;
    let mut pins: Vec<(u64, Pinned)> = Vec::new();
    // What was kept in this run of the cache, so what a hit may be.
    let mut kept = HashSet::new();
    for step in steps {
        match step {
            Step::Keep(number) => match keep(&cache, number).await {
                Some(pinned) => {
                    assert_eq!(content_of(&pinned).await, block(number).1);
                    kept.insert(number);
                    assert!(cache.get(&block(number).0).is_some());
                }
                None => assert_eq!(pins.iter().map(|(_, pin)| pin.slot).collect::<HashSet<_>>().len(), 6),
            },
            Step::Get(number) => {
                if let Some(pinned) = cache.get(&block(number).0) {
                    assert!(kept.contains(&number));
                    assert_eq!(content_of(&pinned).await, block(number).1);
                }
            }
            Step::Revive(number) => {
                if let Some((pinned, content)) = cache.revive(&block(number).0).await {
                    assert_eq!(content, block(number).1);
                    assert_eq!(content_of(&pinned).await, content);
                    kept.insert(number);
                }
            }
            Step::Pin(number) => pins.extend(cache.get(&block(number).0).map(|pinned| (number, pinned))),
            Step::Unpin(at) if at < pins.len() => drop(pins.swap_remove(at)),
            Step::Unpin(_) => {}
            Step::Discard(number) => {
                if let Some(pinned) = cache.get(&block(number).0) {
                    pinned.discard();
                    assert!(cache.get(&block(number).0).is_none());
                }
            }
            Step::Restart | Step::Damage { .. } => {
                pins.clear();
                kept.clear();
                if let Step::Damage { index, at, value } = step {
                    let (file, len) = if index {
                        (&cache.index, 32 + 16 * SLOTS)
                    } else {
                        (&cache.blocks, SLOTS * BLOCK_BYTES)
                    };
                    let at = at.index(usize::try_from(len).unwrap()) as u64;
                    file.write_at(Bytes::copy_from_slice(&[value]), at).await.unwrap();
                }
                drop(cache);
                cache = open(dir.path(), SLOTS).await;
            }
        }
        for (number, pinned) in &pins {
            assert_eq!(content_of(pinned).await, block(*number).1);
        }
        let state = cache.state.lock();
        assert!(state.busy.is_empty());
        assert!(state.by_hash.iter().all(|(hash, slot)| state.slots[*slot as usize].hash == *hash));
    }
}
