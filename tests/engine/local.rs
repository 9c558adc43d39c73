//! Cases of the local data path, each driven to where it breaks by the real engine on the real disk.
//!
//! "Power loss" here is the loss of all live maps, with every byte of the epoch files still there: the worst that can
//! happen to a rule about what is believed. Bytes that power loss takes away are the simulation's.

use crate::rig::{GIB, KIB, MIB, Node, fill, noise, runtime};
use blockhouse::block::{self, BlockError, BlockHandler, Source};
use blockhouse::disk::real::{RealDisk, RealDiskConfig};
use blockhouse::geometry::{BLOCK_BYTES, ByteRange};
use blockhouse::offload::Offload;
use blockhouse::store::Expect;
use blockhouse::volume::cache::{CacheConfig, CleanCache};
use blockhouse::volume::engine::EngineError;
use blockhouse::volume::head::{SmallObject, keys};
use blockhouse::volume::pressure::Level;
use futures::FutureExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const SIZE: u64 = 64 * MIB;
/// A stretch that is neither whole blocks nor whole words.
const PART: (u64, u64) = (3 * BLOCK_BYTES + 512, 20 * KIB);

async fn volume() -> Node {
    let node = Node::new().await;
    node.create("v", SIZE, None).await;
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l1_a_flushed_discard_stays_whatever_the_file_holds() {
    for (at, len) in [PART, (0, 2 * BLOCK_BYTES)] {
        for in_the_pool in [false, true] {
            let mut node = volume().await;
            let life = node.life("v").await;
            life.write(at, fill(1, len)).await;
            if in_the_pool {
                life.commit().await;
            }
            life.flush().await;
            life.zero(at, len).await;
            life.flush().await;
            life.write(at, fill(2, len)).await;
            life.kill().await;
            node.lose_live_maps();
            let life = node.life("v").await;
            assert!(life.holds(at, len, 0).await, "neither the old content nor what has no flushed bit");
            life.commit().await;
            assert!(life.holds(at, len, 0).await);
            life.kill().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l2_what_a_failed_write_left_in_the_file_is_never_believed() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, 64 * KIB)).await;
    life.commit().await;
    node.taps.torn_writes.store(true, Ordering::SeqCst);
    let torn = life.try_write(4 * KIB, fill(2, 8 * KIB)).await;
    assert!(matches!(torn, Err(BlockError::Io(_))), "{torn:?}");
    node.taps.torn_writes.store(false, Ordering::SeqCst);
    // Its neighbours in the same word are written and flushed.
    life.write(3 * KIB, fill(3, KIB)).await;
    life.write(12 * KIB, fill(3, KIB)).await;
    life.flush().await;
    assert!(life.holds(4 * KIB, 8 * KIB, 1).await);
    life.kill().await;
    node.lose_live_maps();
    let life = node.life("v").await;
    assert!(life.holds(4 * KIB, 8 * KIB, 1).await && life.holds(12 * KIB, KIB, 3).await);
    life.commit().await;
    assert!(life.holds(4 * KIB, 8 * KIB, 1).await && life.holds(3 * KIB, KIB, 3).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l4_a_failed_sync_is_final_across_a_restart_and_nothing_is_committed() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    node.taps.failing_syncs.store(1, Ordering::SeqCst);
    assert!(matches!(life.handler.flush().await, Err(BlockError::Stopped(_))));
    assert!(matches!(life.handler.flush().await, Err(BlockError::Stopped(_))), "the next sync would succeed");
    assert!(matches!(life.try_write(0, fill(2, 512)).await, Err(BlockError::Stopped(_))));
    assert!(matches!(life.try_commit().await, Err(EngineError::Stopped(_))));
    let files = node.epoch_files();
    life.kill().await;
    let again = node.try_life("v").await.err();
    assert!(matches!(again, Some(EngineError::Stopped(_))), "{again:?}");
    assert!(node.head("v").await.0.map.is_none(), "nothing of it reached the pool");
    assert!(files.iter().all(|file| node.epoch_files().contains(file)), "its data is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l5_a_flush_never_joins_one_that_runs() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.ready().await;
    life.write(0, fill(1, 4 * KIB)).await;
    let begun = *node.taps.begun_syncs.borrow();
    node.taps.held_syncs.send_replace(true);
    let handler = life.handler.clone();
    let first = tokio::spawn(async move { handler.flush().await });
    node.taps.await_syncs(begun + 1).await;
    // Acknowledged while the first flush is past its look at the map.
    life.write(MIB, fill(2, 4 * KIB)).await;
    let mut second = Box::pin(life.handler.flush());
    assert!(second.as_mut().now_or_never().is_none());
    node.taps.held_syncs.send_replace(false);
    first.await.unwrap().unwrap();
    second.await.unwrap();
    life.kill().await;
    node.lose_live_maps();
    let life = node.life("v").await;
    assert!(life.holds(0, 4 * KIB, 1).await && life.holds(MIB, 4 * KIB, 2).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l7_no_reader_ever_sees_an_older_state_across_swaps_of_the_layers() {
    let mut node = volume().await;
    let life = Arc::new(node.life("v").await);
    let writer = {
        let life = life.clone();
        tokio::spawn(async move {
            for number in 1..=60u8 {
                life.write(PART.0, fill(number, PART.1)).await;
                life.commit().await;
            }
        })
    };
    let mut last = 0;
    while last < 60 {
        let found = life.read(PART.0, 512).await;
        assert!(found[0] >= last, "{} after {last}", found[0]);
        assert!(found.iter().all(|&byte| byte == found[0]));
        last = found[0];
    }
    writer.await.unwrap();
    Arc::into_inner(life).unwrap().kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l7_a_planned_read_outlives_the_commit_that_removes_its_epoch() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, 8 * KIB)).await;
    let plan = life.handler.plan_read(ByteRange::new(0, 8 * KIB)).unwrap();
    life.commit().await;
    life.write(0, fill(2, 8 * KIB)).await;
    life.commit().await;
    assert_eq!(plan.len(), 1);
    let Source::File { file, offset_bytes, keep, .. } = &plan[0].source else { panic!("it is in an epoch") };
    assert_eq!(file.read_at(*offset_bytes, 8192).await.unwrap(), fill(1, 8 * KIB));
    let _ = keep;
    drop(plan);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l8_discards_and_writes_across_cuts_are_never_lost() {
    let mut node = volume().await;
    let life = Arc::new(node.life("v").await);
    let commits = {
        let life = life.clone();
        tokio::spawn(async move {
            for _ in 0..40 {
                life.commit().await;
            }
        })
    };
    let mut round = 0;
    while !commits.is_finished() || round < 50 {
        let at = round % 64 * MIB;
        life.write(at, fill(5, 2 * BLOCK_BYTES)).await;
        life.zero(at, BLOCK_BYTES).await;
        life.zero(at + BLOCK_BYTES + KIB, KIB).await;
        assert!(life.holds(at, BLOCK_BYTES, 0).await && life.holds(at + BLOCK_BYTES, KIB, 5).await);
        assert!(life.holds(at + BLOCK_BYTES + KIB, KIB, 0).await);
        round += 1;
    }
    commits.await.unwrap();
    life.commit().await;
    Arc::into_inner(life).unwrap().kill().await;
    let life = node.life("v").await;
    for at in (0..round.min(64)).map(|round| round * MIB) {
        assert!(life.holds(at, BLOCK_BYTES, 0).await && life.holds(at + BLOCK_BYTES + KIB, KIB, 0).await);
        assert!(life.holds(at + BLOCK_BYTES, KIB, 5).await);
    }
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l8_only_a_write_with_its_payload_at_hand_holds_an_epoch() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(MIB, fill(1, 512)).await;
    // A small write that waits for its turn has not entered; neither has a plan of a read.
    let turn = life.handler.small_write_turn().lock().await;
    let mut small = Box::pin(block::write_at(
        &*life.handler,
        MIB + 100,
        fill(2, 10),
        blockhouse::block::Durability::Acknowledged,
    ));
    assert!(small.as_mut().now_or_never().is_none());
    tokio::time::timeout(Duration::from_secs(20), life.commit()).await.expect("nothing holds the cut");
    drop(turn);
    small.await.unwrap();
    // One that has entered holds it, and lets go when it is dropped unfinished.
    let grant = life.handler.begin_write(ByteRange::new(0, 512)).unwrap().unwrap();
    let mut commit = Box::pin(life.commit());
    assert!(commit.as_mut().now_or_never().is_none());
    drop(grant);
    tokio::time::timeout(Duration::from_secs(20), commit).await.expect("whoever left last wakes the cut");
    assert!(life.holds(0, 512, 0).await && life.holds(MIB + 100, 10, 2).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l11_the_file_of_the_next_cut_is_there_before_the_disk_is_full() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.ready().await;
    life.write(0, fill(1, MIB)).await;
    node.taps.full_creates.store(true, Ordering::SeqCst);
    tokio::time::timeout(Duration::from_secs(20), life.commit()).await.expect("a full disk still commits");
    assert!(life.holds(0, MIB, 1).await);
    node.taps.full_creates.store(false, Ordering::SeqCst);
    life.write(0, fill(2, MIB)).await;
    life.commit().await;
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l11_a_full_runtime_directory_is_an_error_for_one_write_and_no_more() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, 4 * KIB)).await;
    node.taps.full_maps.store(true, Ordering::SeqCst);
    assert_eq!(life.try_write(32 * MIB, fill(1, 4 * KIB)).await, Err(BlockError::NoSpace));
    // Where the map has its page already, writing goes on.
    life.write(4 * KIB, fill(2, 4 * KIB)).await;
    node.taps.full_maps.store(false, Ordering::SeqCst);
    life.write(32 * MIB, fill(3, 4 * KIB)).await;
    life.flush().await;
    life.commit().await;
    assert!(life.holds(4 * KIB, 4 * KIB, 2).await && life.holds(32 * MIB, 4 * KIB, 3).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l16_shrink_then_grow_shows_zeros() {
    for committed in [false, true] {
        let mut node = volume().await;
        let life = node.life("v").await;
        life.write(0, fill(1, SIZE)).await;
        if committed {
            life.commit().await;
        }
        let small = 5 * MIB + 3 * 512;
        life.resize(small).await;
        assert_eq!(life.handler.geometry().size_bytes, small);
        assert_eq!(life.try_write(small, fill(2, 512)).await, Err(BlockError::Invalid));
        assert_eq!(life.try_write(small - 512, fill(2, KIB)).await, Err(BlockError::Invalid));
        life.resize(SIZE).await;
        assert!(life.holds(0, small, 1).await);
        assert!(life.holds(small, SIZE - small, 0).await, "old bytes come back");
        life.write(SIZE - 512, fill(3, 512)).await;
        life.kill().await;
        let life = node.life("v").await;
        assert!(life.holds(small, SIZE - small - 512, 0).await && life.holds(SIZE - 512, 512, 3).await);
        life.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l27_a_write_into_the_tail_during_a_shrink_is_refused_or_gone() {
    let mut node = volume().await;
    let life = Arc::new(node.life("v").await);
    for _ in 0..8 {
        let writer = {
            let life = life.clone();
            tokio::spawn(async move { while life.try_write(SIZE - MIB, fill(9, 4 * KIB)).await.is_ok() {} })
        };
        life.resize(SIZE / 2).await;
        writer.await.unwrap();
        life.resize(SIZE).await;
        assert!(life.holds(SIZE - MIB, MIB, 0).await, "a write landed behind the zeroing");
        // The file that was made ready between the two has the right size.
        life.write(SIZE - 512, fill(1, 512)).await;
        life.commit().await;
        life.write(SIZE - 512, fill(2, 512)).await;
        life.commit().await;
        assert!(life.holds(SIZE - 512, 512, 2).await);
    }
    Arc::into_inner(life).unwrap().kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l18_nothing_acknowledged_is_lost_over_a_stop_with_the_runtime_directory_kept() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(PART.0, noise(1, PART.1)).await;
    life.flush().await;
    life.write(MIB, noise(2, 40 * KIB)).await;
    life.zero(MIB + 8 * KIB, 8 * KIB).await;
    life.kill().await;
    node.taps.writes.lock().clear();
    node.store.stop();
    let attaching = tokio::time::timeout(Duration::from_millis(50), node.try_life("v")).await;
    assert!(attaching.is_err(), "it waits for the pool");
    node.store.resume();
    let life = node.life("v").await;
    assert_eq!(life.read(PART.0, PART.1).await, noise(1, PART.1));
    assert_eq!(life.read(MIB, 8 * KIB).await, noise(2, 40 * KIB)[..8192]);
    assert!(life.holds(MIB + 8 * KIB, 8 * KIB, 0).await);
    assert!(
        node.taps.writes.lock().iter().all(|&at| at == 0),
        "no sync was running: nothing is written again"
    );
    life.kill().await;
}

/// Commits are stuck on their way to the pool, so that what was active is frozen.
async fn freeze(node: &Node, life: &crate::rig::Life) -> tokio::task::JoinHandle<()> {
    node.store.stop();
    let destager = life.attached.destager.clone();
    let commit = tokio::spawn(async move {
        let asked = destager.ask(|reply| blockhouse::volume::destage::Request::Commit { reply });
        // It ends with the life.
        drop(asked.await);
    });
    node.store.await_caller().await;
    commit
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l20_a_discard_of_what_only_a_frozen_epoch_has_is_recorded() {
    for (at, len) in [PART, (BLOCK_BYTES, 2 * BLOCK_BYTES)] {
        let mut node = volume().await;
        let life = node.life("v").await;
        life.write(at, fill(1, len)).await;
        life.flush().await;
        let commit = freeze(&node, &life).await;
        assert!(life.holds(at, len, 1).await);
        life.zero(at, len).await;
        assert!(life.holds(at, len, 0).await);
        life.flush().await;
        life.kill().await;
        commit.await.unwrap();
        node.lose_live_maps();
        node.store.resume();
        let life = node.life("v").await;
        assert!(life.holds(at, len, 0).await, "the frozen epoch's data is back");
        life.commit().await;
        assert!(life.holds(at, len, 0).await);
        life.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l20_a_discard_of_what_a_frozen_epoch_says_is_zero_is_recorded() {
    let (at, len) = (BLOCK_BYTES, BLOCK_BYTES);
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(at, fill(1, len)).await;
    life.commit().await;
    // The zero is in the live map and was never flushed when its epoch is frozen; then the disk refuses the flush of it.
    life.zero(at, len).await;
    let commit = freeze(&node, &life).await;
    life.zero(at, len).await;
    life.flush().await;
    life.kill().await;
    commit.await.unwrap();
    node.lose_live_maps();
    node.store.resume();
    let life = node.life("v").await;
    assert!(life.holds(at, len, 0).await, "the base is back");
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l23_a_write_back_error_that_no_flush_saw_stops_the_commit() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    let swaps = node.store.swaps.load(Ordering::SeqCst);
    node.taps.failing_checks.store(1, Ordering::SeqCst);
    assert!(matches!(life.try_commit().await, Err(EngineError::Stopped(_))));
    assert_eq!(node.store.swaps.load(Ordering::SeqCst), swaps, "the head stays");
    assert!(matches!(life.try_read(0, 512).await, Err(BlockError::Stopped(_))));
    life.kill().await;
    assert!(
        matches!(node.try_life("v").await.err(), Some(EngineError::Stopped(_))),
        "not even after a restart"
    );
    assert!(!node.epoch_files().is_empty());
}

#[test]
fn l24_a_sync_that_a_kill_cut_short_makes_recovery_write_all_live_sectors_again() {
    let mut node = runtime().block_on(volume());
    let first = runtime();
    first.block_on(async {
        let life = node.life("v").await;
        life.ready().await;
        life.write(MIB, noise(1, 12 * KIB)).await;
        let begun = *node.taps.begun_syncs.borrow();
        node.taps.held_syncs.send_replace(true);
        let handler = life.handler.clone();
        tokio::spawn(async move { handler.flush().await });
        node.taps.await_syncs(begun + 1).await;
        std::mem::forget(life.attached.destager.clone());
    });
    first.shutdown_timeout(Duration::from_secs(10));
    node.taps.held_syncs.send_replace(false);
    node.taps.writes.lock().clear();
    runtime().block_on(async {
        let life = node.life("v").await;
        assert!(node.taps.writes.lock().iter().any(|&at| at > MIB), "nothing was written again");
        assert_eq!(life.read(MIB, 12 * KIB).await, noise(1, 12 * KIB));
        life.flush().await;
        life.kill().await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l28_recovery_owns_the_head_before_it_deletes_and_no_late_swap_lands() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    life.commit().await;
    life.write(0, fill(2, MIB)).await;
    let (old, old_tag) = node.head("v").await;
    life.kill().await;
    node.taps.removed.lock().clear();

    let (taps, seen) = (node.taps.clone(), Arc::new(parking_lot::Mutex::new(None)));
    let noted = seen.clone();
    node.store.before_next_swap(Box::new(move |_| {
        Box::pin(async move { *noted.lock() = Some(taps.removed.lock().clone()) })
    }));
    let life = node.life("v").await;
    let before = seen.lock().take().expect("attaching swaps the head");
    assert!(
        before.iter().all(|path| !path.contains("epoch-")),
        "deleted before it owned the head: {before:?}"
    );
    let mut late = old.clone();
    late.nonce.0[0] ^= 1;
    let landed = node.store.inner.swap(&keys::volume("v"), Expect::State(old_tag), late.encode()).await;
    assert!(landed.is_err(), "the swap of the process before landed");
    assert!(node.head("v").await.0.floor > old.floor, "and its object ids are never used again");
    assert!(life.holds(0, MIB, 2).await);
    life.kill().await;
}

/// Words of a live map's header: what ties it to its file.
const LIVE_HEADER: [(&str, u64); 5] =
    [("magic", 0), ("boot", 8), ("file id", 24), ("inode", 40), ("complete (L22)", 56)];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l29_l22_a_live_map_of_another_file_boot_or_inode_or_half_of_one_is_not_believed() {
    for (what, offset) in
        LIVE_HEADER.into_iter().map(Some).chain([None]).map(|case| case.unwrap_or(("", 4000)))
    {
        let mut node = volume().await;
        let life = node.life("v").await;
        life.write(0, fill(1, 4 * KIB)).await;
        life.flush().await;
        life.write(8 * KIB, fill(2, 4 * KIB)).await;
        life.kill().await;
        for path in node.live_maps().iter().filter(|path| !path.ends_with("runtime-id")) {
            let map = std::fs::File::options().read(true).write(true).open(path).unwrap();
            let mut word = [0; 8];
            map.read_exact_at(&mut word, offset).unwrap();
            word[3] ^= 0x40;
            map.write_all_at(&word, offset).unwrap();
        }
        let life = node.life("v").await;
        assert!(life.holds(0, 4 * KIB, 1).await, "what was flushed is there");
        let believed = life.holds(8 * KIB, 4 * KIB, 2).await;
        assert_eq!(believed, what.is_empty(), "believed with another {what}");
        assert!(believed || life.holds(8 * KIB, 4 * KIB, 0).await);
        life.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l15_l21_all_that_recovery_finds_goes_into_one_commit() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    let commit = freeze(&node, &life).await;
    life.write(MIB, fill(2, MIB)).await;
    life.flush().await;
    life.kill().await;
    commit.await.unwrap();
    node.store.resume();
    let swaps = node.store.swaps.load(Ordering::SeqCst);
    let life = node.life("v").await;
    life.commit().await;
    assert_eq!(node.store.swaps.load(Ordering::SeqCst) - swaps, 2, "one to own the head, one commit of both");
    assert!(life.holds(0, MIB, 1).await && life.holds(MIB, MIB, 2).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l11_space_that_comes_back_when_a_removed_file_is_closed_at_last_lets_writers_go_on() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    node.taps.full_space.store(true, Ordering::SeqCst);
    let mut level = life.engine.pressure.changes();
    life.engine.pressure.look().await;
    level.wait_for(|level| *level == Level::Full).await.unwrap();
    let waiting = life.try_write(0, fill(2, MIB));
    let looks = *node.taps.looks.borrow();
    let freeing = async {
        // The little that is dirty is committed, since writers wait for it; when the write came and when the file was
        // removed, space is looked at. The file system takes its time to free the file, and tells nobody when it has.
        let mut seen = node.taps.looks.subscribe();
        seen.wait_for(|now| *now >= looks + 2).await.unwrap();
        assert_eq!(life.attached.volume.counters().commits.load(Ordering::SeqCst), 1);
        node.taps.full_space.store(false, Ordering::SeqCst);
    };
    let both = tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(waiting, freeing).0 });
    assert_eq!(both.await.expect("nobody looks whether there is space by now"), Ok(()));
    life.kill().await;
}

/// A file system of few megabytes, gone when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let args = ["-t", "tmpfs", "-o", &size, "blockhouse-test"];
        let mounted = std::process::Command::new("mount").args(args).arg(dir.path()).output();
        mounted.is_ok_and(|done| done.status.success()).then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "the small disk stays mounted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l11_a_disk_that_runs_full_is_emptied_by_commits_while_writes_wait() {
    let Some(small) = SmallDisk::mount(96 * MIB) else {
        println!("skipped: no right to mount a small file system");
        return;
    };
    let mut node = volume().await;
    node.create("w", GIB, None).await;
    node.config.reserve_bytes = 12 * MIB;
    let config = RealDiskConfig { state_dir: small.0.path().to_owned(), runtime_dir: None };
    let disk = Arc::new(RealDisk::open(config).unwrap());
    let cache = CleanCache::open(disk.clone(), Offload::Threads, CacheConfig { bytes: 0 }).await.unwrap();
    let engine = node.engine_on(disk, cache);
    let attached = blockhouse::volume::attach::attach(&engine, "w").await.unwrap();
    let handler = blockhouse::volume::VolumeHandler(attached.volume.clone());
    // Commits cannot free anything, until writers wait; then they can.
    node.store.stop();
    let (store, mut level) = (node.store.clone(), engine.pressure.changes());
    let resumed = tokio::spawn(async move {
        level.wait_for(|level| *level == Level::Full).await.unwrap();
        store.resume();
    });
    let mut slowest = Duration::ZERO;
    for step in 0..384 {
        let data = noise(step, 512 * KIB);
        let started = std::time::Instant::now();
        let done = block::write_at(&handler, step * 512 * KIB, data, block::Durability::Acknowledged).await;
        done.unwrap_or_else(|error| panic!("write {step}: {error}"));
        slowest = slowest.max(started.elapsed());
    }
    println!("192 MiB through a disk of 96: the slowest write took {slowest:?}");
    resumed.await.unwrap();
    assert!(slowest < Duration::from_secs(5), "it waited for space that was there");
    attached.destager.ask(|reply| blockhouse::volume::destage::Request::Commit { reply }).await.unwrap();
    for step in [0, 177, 383] {
        let mut out = bytes::BytesMut::new();
        block::read_at(&handler, ByteRange::new(step * 512 * KIB, 512 * KIB), &mut out).await.unwrap();
        assert_eq!(out, noise(step, 512 * KIB));
    }
    attached.destager.abandon().await;
}
