//! Cases of the pool: objects that are not what they should be, heads that others change, answers that get lost.

use crate::rig::{GIB, KIB, Life, MIB, Node, fill, noise};
use blockhouse::block::BlockError;
use blockhouse::geometry::BLOCK_BYTES;
use blockhouse::store::{Expect, Key};
use blockhouse::volume::destage::Request;
use blockhouse::volume::engine::EngineError;
use blockhouse::volume::head::{Owner, SmallObject, TermEnd, keys};
use blockhouse::volume::ids::{Incarnation, NodeId, Nonce};
use blockhouse::volume::map::{MapRef, UNFOLDED_PACKS_MAX};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const SIZE: u64 = 64 * MIB;

async fn volume() -> Node {
    let mut node = Node::new().await;
    node.cache_bytes = 0;
    node.create("v", SIZE, None).await;
    node
}

/// Two commits of the same shape, and the maps that they made.
async fn two_states(life: &Life, node: &Node) -> [MapRef; 2] {
    let mut maps = Vec::new();
    for seed in [1, 2] {
        life.write(0, noise(seed, BLOCK_BYTES)).await;
        life.commit().await;
        maps.push(node.head("v").await.0.map.unwrap());
    }
    [maps[0], maps[1]]
}

async fn packs(life: &Life, map: &MapRef) -> Vec<Key> {
    let map = life.engine.load_map(map).await.unwrap();
    map.packs().iter().map(|pack| keys::pack(&pack.id)).collect()
}

fn names(error: &impl ToString, key: &Key) -> bool {
    error.to_string().contains(key.as_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g15_an_older_block_under_the_right_key_is_an_error_that_names_it() {
    let mut node = volume().await;
    let life = node.life("v").await;
    let maps = two_states(&life, &node).await;
    let packs = packs(&life, &maps[1]).await;
    node.store.mix_up(packs[1].clone(), packs[0].clone());
    let Err(error) = life.try_read(0, 4 * KIB).await else { panic!("wrong bytes were served") };
    assert!(matches!(error, BlockError::Io(_)) && names(&error, &packs[1]), "{error}");
    // It is not remembered: with the right object back the read works.
    node.store.tidy_up();
    assert_eq!(life.read(0, BLOCK_BYTES).await, noise(2, BLOCK_BYTES));
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g15_an_older_footer_or_map_under_the_right_key_is_an_error_that_names_it() {
    let mut node = volume().await;
    let life = node.life("v").await;
    let maps = two_states(&life, &node).await;
    let packs = packs(&life, &maps[1]).await;
    life.kill().await;
    for (key, other) in
        [(packs[1].clone(), packs[0].clone()), (keys::map(&maps[1].id), keys::map(&maps[0].id))]
    {
        node.store.mix_up(key.clone(), other);
        let Err(error) = node.try_life("v").await else { panic!("attached to another state") };
        assert!(matches!(error, EngineError::Corrupt(_)) && names(&error, &key), "{error}");
        node.store.tidy_up();
    }
    let life = node.life("v").await;
    assert_eq!(life.read(0, BLOCK_BYTES).await, noise(2, BLOCK_BYTES));
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g15_an_older_segment_under_the_right_key_is_an_error_that_names_it() {
    let mut node = volume().await;
    let life = node.life("v").await;
    let mut objects = Vec::new();
    let mut seed = 0;
    while objects.len() < 2 {
        for _ in 0..=UNFOLDED_PACKS_MAX {
            seed += 1;
            life.write(0, noise(seed, BLOCK_BYTES)).await;
            life.commit().await;
        }
        let map = life.engine.load_map(&node.head("v").await.0.map.unwrap()).await.unwrap();
        objects.extend(map.segments_objects());
        objects.dedup();
    }
    life.kill().await;
    let (old, new) = (keys::segments(&objects[0]), keys::segments(&objects[1]));
    node.store.mix_up(new.clone(), old);
    let life = node.life("v").await;
    let Err(error) = life.try_read(0, 4 * KIB).await else { panic!("wrong bytes were served") };
    assert!(matches!(error, BlockError::Io(_)) && names(&error, &new), "{error}");
    node.store.tidy_up();
    assert_eq!(life.read(0, BLOCK_BYTES).await, noise(seed, BLOCK_BYTES));
    life.kill().await;
}

/// Another node takes the volume.
async fn take(node: &Node, by: u8) {
    node.change_head("v", |head| {
        let owner = Owner { node: NodeId([by; 16]), incarnation: Incarnation([by; 16]) };
        head.begin_term(Some(owner), TermEnd::Taken);
    })
    .await;
}

/// It gives the volume back.
async fn give_back(node: &Node) {
    node.change_head("v", |head| {
        head.owner = None;
        head.end_term(TermEnd::Released);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g1_what_a_displaced_node_had_not_committed_is_kept_and_never_mixed_in() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    life.commit().await;
    life.write(0, fill(2, MIB)).await;
    life.write(2 * MIB, fill(2, MIB)).await;
    life.flush().await;
    let (_, own_tag) = node.head("v").await;
    take(&node, 9).await;

    // The displaced node hears of it at its next commit, and stops.
    let error = life.try_commit().await.unwrap_err();
    assert!(matches!(error, EngineError::Conflict(_)), "{error}");
    assert!(matches!(life.try_write(0, fill(3, 512)).await, Err(BlockError::Stopped(_))));
    assert!(matches!(life.try_read(0, 512).await, Err(BlockError::Stopped(_))));
    let (head, tag) = node.head("v").await;
    assert!(head.owner.as_ref().is_some_and(|owner| owner.node == NodeId([9; 16])) && tag != own_tag);
    life.kill().await;
    assert!(matches!(node.try_life("v").await.err(), Some(EngineError::Conflict(_))));
    let kept = node.epoch_files();
    assert!(!kept.is_empty());

    // The other node has it, writes, and gives it back.
    give_back(&node).await;
    let mut other = node.other(7);
    let life = other.life("v").await;
    assert!(life.holds(0, MIB, 1).await && life.holds(2 * MIB, MIB, 0).await);
    life.write(4 * MIB, fill(4, MIB)).await;
    life.release().await;

    let life = node.life("v").await;
    assert_eq!(life.attached.orphans, 1, "one epoch with records of the term before");
    assert!(
        life.holds(0, MIB, 1).await && life.holds(2 * MIB, MIB, 0).await && life.holds(4 * MIB, MIB, 4).await
    );
    life.write(0, fill(5, MIB)).await;
    life.commit().await;
    assert!(kept.iter().any(|file| node.epoch_files().contains(file)), "its data is still there");
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g26_epochs_written_on_a_map_that_was_rolled_back_are_not_replayed() {
    let mut node = volume().await;
    let life = node.life("v").await;
    let maps = two_states(&life, &node).await;
    life.write(BLOCK_BYTES, fill(9, 4 * KIB)).await;
    life.flush().await;
    life.kill().await;
    let owner = node.head("v").await.0.owner;
    node.change_head("v", |head| {
        head.begin_term(owner, TermEnd::RolledBack);
        head.map = Some(maps[0]);
    })
    .await;
    let life = node.life("v").await;
    assert_eq!(life.attached.orphans, 1);
    assert_eq!(life.read(0, BLOCK_BYTES).await, noise(1, BLOCK_BYTES));
    assert!(life.holds(BLOCK_BYTES, 4 * KIB, 0).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_a_volume_that_a_node_has_cannot_be_attached_by_another() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    let mut other = node.other(7);
    let error = other.try_life("v").await.err();
    assert!(matches!(error, Some(EngineError::Conflict(_))), "{error:?}");
    // One more with the same identity and another state directory (G16).
    let mut clone = node.other(2);
    clone.incarnations = vec![Incarnation([200; 16])];
    assert!(matches!(clone.try_life("v").await.err(), Some(EngineError::Conflict(_))));
    life.commit().await;
    life.release().await;
    let life = other.life("v").await;
    assert!(life.holds(0, MIB, 1).await);
    life.release().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g5_a_head_that_moved_under_a_running_commit_is_not_swapped() {
    let mut node = volume().await;
    let life = node.life("v").await;
    let maps = two_states(&life, &node).await;
    life.write(0, noise(3, BLOCK_BYTES)).await;
    let older = maps[0];
    node.store.before_next_swap(Box::new(move |pool| {
        Box::pin(async move {
            let range = blockhouse::store::GetRange::Whole { max_bytes: MIB };
            let object = pool.get(&keys::volume("v"), range).await.unwrap();
            let mut head = blockhouse::volume::head::Head::decode(&object.bytes).unwrap();
            head.nonce = Nonce([8; 16]);
            head.map = Some(older);
            pool.swap(&keys::volume("v"), Expect::State(object.etag), head.encode()).await.unwrap();
        })
    }));
    assert!(matches!(life.try_commit().await, Err(EngineError::Conflict(_))));
    let (head, _) = node.head("v").await;
    assert_eq!((head.map, head.nonce), (Some(older), Nonce([8; 16])), "the other's state stands");
    assert!(life.attached.volume.stop_reason().is_some());
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g9_a_lost_answer_to_ones_own_swap_neither_loses_nor_fences() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    node.store.lose_answers(2);
    life.commit().await;
    life.write(0, fill(2, MIB)).await;
    life.commit().await;
    assert!(life.attached.volume.stop_reason().is_none());
    life.kill().await;
    node.store.lose_answers(1);
    let life = node.life("v").await;
    assert!(life.holds(0, MIB, 2).await);
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g10_a_block_that_became_zero_is_zero_in_the_map() {
    for written in [false, true] {
        let mut node = volume().await;
        let life = node.life("v").await;
        life.write(0, fill(1, 4 * BLOCK_BYTES)).await;
        life.commit().await;
        if written {
            life.write(BLOCK_BYTES, fill(0, BLOCK_BYTES)).await;
        } else {
            life.zero(BLOCK_BYTES, BLOCK_BYTES).await;
        }
        // The other half of a block that was half zero already.
        life.zero(2 * BLOCK_BYTES, BLOCK_BYTES / 2).await;
        life.commit().await;
        life.zero(2 * BLOCK_BYTES + BLOCK_BYTES / 2, BLOCK_BYTES / 2).await;
        life.release().await;
        let life = node.life("v").await;
        assert!(life.holds(0, BLOCK_BYTES, 1).await && life.holds(3 * BLOCK_BYTES, BLOCK_BYTES, 1).await);
        assert!(life.holds(BLOCK_BYTES, 2 * BLOCK_BYTES, 0).await, "the old data is back");
        life.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g12_a_snapshot_has_what_was_acknowledged_before_it_and_its_head_stands_first() {
    let mut node = volume().await;
    let life = node.life("v").await;
    life.write(0, fill(1, MIB)).await;
    let order = Arc::new(parking_lot::Mutex::new(None));
    let (noted, uid) = (order.clone(), node.head("v").await.0.uid);
    node.store.before_next_swap(Box::new(move |pool| {
        Box::pin(async move { *noted.lock() = Some(pool.list(&format!("snapshots/{uid}"), None, 9).await) })
    }));
    let ask = |reply| Request::Snapshot { description: None, reply };
    let snapshot = life.attached.destager.ask(ask).await.unwrap();
    let before = order.lock().take().unwrap().unwrap();
    assert!(before.objects.is_empty(), "the object stood before the head");
    let (head, _) = node.head("v").await;
    assert_eq!((head.map, head.next_snapshot), (snapshot.map, snapshot.number + 1));
    life.write(0, fill(2, MIB)).await;
    life.commit().await;
    // A volume over the snapshot has the state of that moment.
    node.create("fork", snapshot.size_bytes, snapshot.map).await;
    let mut other = node.other(7);
    let fork = other.life("fork").await;
    assert!(fork.holds(0, MIB, 1).await && life.holds(0, MIB, 2).await);
    let ask = |reply| Request::Snapshot { description: None, reply };
    assert_eq!(life.attached.destager.ask(ask).await.unwrap().number, snapshot.number + 1);
    fork.kill().await;
    life.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g2_the_floor_never_passes_what_the_owner_may_still_publish() {
    let mut node = Node::new().await;
    node.create("v", GIB, None).await;
    let life = node.life("v").await;
    assert!(node.head("v").await.0.owner.is_some(), "a head stands before the first upload");
    for round in 0..3 {
        let floor = node.head("v").await.0.floor;
        let term = node.head("v").await.0.term;
        life.write(round * MIB, noise(round, MIB)).await;
        let puts = node.store.puts.load(Ordering::SeqCst);
        life.commit().await;
        assert!(node.store.puts.load(Ordering::SeqCst) > puts);
        let map = life.engine.load_map(&node.head("v").await.0.map.unwrap()).await.unwrap();
        let newest = map.packs().last().unwrap().id;
        assert!(newest.term == term && newest.sequence >= floor, "made at or above the floor of that time");
        assert!(node.head("v").await.0.floor > newest.sequence);
    }
    let floor = node.head("v").await.0.floor;
    life.kill().await;
    let life = node.life("v").await;
    assert!(node.head("v").await.0.floor > floor, "beyond all that the killed process used");
    life.kill().await;
}
