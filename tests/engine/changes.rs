//! What differs from a snapshot: a backup that copies only that is the disk, byte for byte.
//!
//! Owns: the comparison with a plain model, over everything that moves data between layers.
//! Does not own: how clients ask.

use crate::rig::{Life, MIB, Node, fill, runtime};
use blockhouse::block::{BlockHandler, Change, ChangeKind, PastState};
use blockhouse::geometry::{BLOCK_BYTES, ByteRange, SECTOR_BYTES, len_of};
use blockhouse::volume::base::BaseMap;
use blockhouse::volume::catalog::past::read_snapshot;
use blockhouse::volume::destage::Request;
use blockhouse::volume::read_only::ReadOnlyDisk;
use blockhouse::volume::segment::SEGMENT_BLOCKS;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const SEGMENT_BYTES: u64 = SEGMENT_BLOCKS * BLOCK_BYTES;
const SIZE: u64 = 2 * SEGMENT_BYTES + 3 * BLOCK_BYTES + 4 * SECTOR_BYTES;
/// Parts of the disk that are written: around its ends and the borders of segments.
const WINDOWS: [ByteRangeParts; 3] = [
    (0, 6 * BLOCK_BYTES),
    (SEGMENT_BYTES - 3 * BLOCK_BYTES, 6 * BLOCK_BYTES),
    (2 * SEGMENT_BYTES, 3 * BLOCK_BYTES + 2048),
];

type ByteRangeParts = (u64, u64);

/// What each sector that is not zero is full of.
type Model = BTreeMap<u64, u8>;

#[derive(Clone, Debug)]
enum Op {
    Write {
        at: u64,
        sectors: u64,
        byte: u8,
    },
    /// The same again: a write that changes nothing.
    Rewrite {
        at: u64,
    },
    Zero {
        at: u64,
        sectors: u64,
    },
    Commit,
    /// Enough commits to fold.
    Commits,
    Snapshot,
    Restart,
    Resize {
        sectors_less: u64,
    },
}

fn place() -> impl Strategy<Value = u64> {
    (0usize..3, 0u64..6 * 256).prop_map(|(window, sector)| {
        let (start, len) = WINDOWS[window];
        start / SECTOR_BYTES + sector % (len / SECTOR_BYTES)
    })
}

fn op() -> impl Strategy<Value = Op> {
    let sectors = prop_oneof![3 => 1u64..20, 2 => 200u64..600];
    let zeros = prop_oneof![3 => 1u64..20, 2 => 200u64..600, 1 => Just(u64::MAX)];
    prop_oneof![
        6 => (place(), sectors, 1u8..4).prop_map(|(at, sectors, byte)| Op::Write { at, sectors, byte }),
        1 => place().prop_map(|at| Op::Rewrite { at }),
        3 => (place(), zeros).prop_map(|(at, sectors)| Op::Zero { at, sectors }),
        3 => Just(Op::Commit),
        1 => Just(Op::Commits),
        2 => Just(Op::Snapshot),
        1 => Just(Op::Restart),
        1 => (1u64..2000).prop_map(|sectors_less| Op::Resize { sectors_less }),
    ]
}

struct World {
    node: Node,
    life: Life,
    model: Model,
    size_bytes: u64,
    snapshots: Vec<(u64, Model, u64)>,
}

impl World {
    async fn new() -> Self {
        let mut node = Node::new().await;
        node.create("v", SIZE, None).await;
        let life = node.life("v").await;
        Self { node, life, model: Model::new(), size_bytes: SIZE, snapshots: Vec::new() }
    }

    async fn run(mut self, op: Op) -> Self {
        let end = self.size_bytes / SECTOR_BYTES;
        match op {
            Op::Write { at, sectors, byte } => {
                let to = (at + sectors).min(end);
                if at < to {
                    self.life.write(at * SECTOR_BYTES, fill(byte, (to - at) * SECTOR_BYTES)).await;
                    self.model.extend((at..to).map(|sector| (sector, byte)));
                }
            }
            Op::Rewrite { at } => {
                if at < end {
                    let byte = self.model.get(&at).copied().unwrap_or(0);
                    self.life.write(at * SECTOR_BYTES, fill(byte, SECTOR_BYTES)).await;
                }
            }
            Op::Zero { at, sectors } => {
                let to = at.saturating_add(sectors).min(end);
                if at < to {
                    self.life.zero(at * SECTOR_BYTES, (to - at) * SECTOR_BYTES).await;
                    self.model.retain(|sector, _| *sector < at || *sector >= to);
                }
            }
            Op::Commit => self.life.commit().await,
            Op::Commits => {
                for round in 0..18u8 {
                    self.life.write(4096, fill(100 + round, 512)).await;
                    self.model.insert(8, 100 + round);
                    self.life.commit().await;
                }
            }
            Op::Snapshot => {
                let taken =
                    self.life.attached.destager.ask(|reply| Request::Snapshot { description: None, reply });
                let number = taken.await.expect("a snapshot is taken").number;
                self.snapshots.push((number, self.model.clone(), self.size_bytes));
            }
            Op::Restart => {
                self.life.kill().await;
                self.life = self.node.life("v").await;
            }
            Op::Resize { sectors_less } => {
                self.size_bytes = SIZE - sectors_less * SECTOR_BYTES;
                self.life.resize(self.size_bytes).await;
                self.model.retain(|sector, _| *sector < self.size_bytes / SECTOR_BYTES);
            }
        }
        self
    }

    async fn check(&self, changes_max: usize) {
        for (start, len) in WINDOWS.into_iter().filter(|(start, _)| *start < self.size_bytes) {
            let end = (start + len).min(self.size_bytes);
            let found = self.life.read(start, end - start).await;
            for (sector, bytes) in (start / SECTOR_BYTES..).zip(found.chunks(len_of(SECTOR_BYTES))) {
                let byte = self.model.get(&sector).copied().unwrap_or(0);
                assert!(bytes.iter().all(|&found| found == byte), "sector {sector}");
            }
        }
        for (number, past, past_bytes) in &self.snapshots {
            let state = self.past(*number).await;
            let live = &*self.life.handler;
            backs_up(live, &state, (past, *past_bytes), (&self.model, self.size_bytes), changes_max).await;
            for (other, now, now_bytes) in &self.snapshots {
                let disk = self.disk(*other).await;
                backs_up(&disk, &state, (past, *past_bytes), (now, *now_bytes), changes_max).await;
            }
        }
    }

    async fn past(&self, number: u64) -> PastState {
        let found = self.life.handler.past_state(&format!("v@{number}")).await.expect("the pool answers");
        found.expect("it was taken")
    }

    async fn disk(&self, number: u64) -> ReadOnlyDisk {
        let (engine, uid) = (&self.life.engine, self.life.attached.volume.uid());
        let snapshot = read_snapshot(engine, "v", &uid, number).await.expect("it was taken");
        let base = BaseMap::open(engine, snapshot.map, snapshot.size_bytes).await.expect("a map");
        ReadOnlyDisk::new(engine.clone(), base, snapshot.size_bytes).of_volume(uid)
    }
}

/// All changes of a disk, asked for until its end.
async fn changes(disk: &dyn BlockHandler, past: &PastState, size: u64, max: usize) -> Vec<Change> {
    let mut all: Vec<Change> = Vec::new();
    let mut at = 0;
    while at < size {
        let found = disk.changes_since(past, ByteRange::new(at, size - at), max).await.expect("it knows");
        assert!(!found.is_empty() && found.len() <= max);
        for change in found {
            assert_eq!(change.range.start(), at);
            at = change.range.end();
            all.push(change);
        }
    }
    all
}

/// Copies what changed over the past state; then it is the state of now.
async fn backs_up(
    disk: &dyn BlockHandler,
    state: &PastState,
    (past, past_bytes): (&Model, u64),
    (now, now_bytes): (&Model, u64),
    changes_max: usize,
) {
    let mut backup = past.clone();
    // A target that shrinks is cut, one that grows may hold anything where it grew.
    backup.retain(|sector, _| *sector < now_bytes / SECTOR_BYTES);
    for sector in past_bytes / SECTOR_BYTES..(now_bytes / SECTOR_BYTES).min(past_bytes / SECTOR_BYTES + 64) {
        backup.insert(sector, 0xee);
    }
    for change in changes(disk, state, now_bytes, changes_max).await {
        if change.kind == ChangeKind::Changed {
            let sectors = change.range.start() / SECTOR_BYTES..change.range.end() / SECTOR_BYTES;
            backup.retain(|sector, _| !sectors.contains(sector));
            backup.extend(now.range(sectors).map(|(sector, byte)| (*sector, *byte)));
        }
    }
    assert_eq!(&backup, now);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_backup_of_what_changed_is_the_disk(
        ops in proptest::collection::vec(op(), 4..30),
        changes_max in prop_oneof![Just(4096usize), 1usize..4],
    ) {
        runtime().block_on(async {
            let mut world = World::new().await;
            for op in ops {
                world = world.run(op).await;
            }
            world.check(changes_max).await;
            world.life.kill().await;
        });
    }
}

fn changed(changes: &[Change]) -> Vec<(u64, u64)> {
    let changed = changes.iter().filter(|change| change.kind == ChangeKind::Changed);
    changed.map(|change| (change.range.start(), change.range.len())).collect()
}

#[tokio::test]
async fn little_is_called_changed_where_little_changed() {
    let mut world = World::new().await;
    for op in [
        Op::Write { at: 0, sectors: 1000, byte: 1 },
        Op::Write { at: SEGMENT_BYTES / SECTOR_BYTES, sectors: 10, byte: 2 },
        Op::Commits,
        Op::Snapshot,
    ] {
        world = world.run(op).await;
    }
    let past = world.past(1).await;
    let found =
        async |world: &World| changed(&changes(&*world.life.handler, &past, world.size_bytes, 4096).await);
    assert_eq!(found(&world).await, []);
    world = world.run(Op::Write { at: 700, sectors: 1, byte: 9 }).await;
    assert_eq!(found(&world).await, [(700 * 512, 512)]);
    world = world.run(Op::Commit).await;
    assert_eq!(found(&world).await, [(2 * BLOCK_BYTES, BLOCK_BYTES)]);
    // What was folded meanwhile and has the same content is the same.
    world = world.run(Op::Write { at: 700, sectors: 1, byte: 1 }).await;
    world = world.run(Op::Commits).await;
    assert_eq!(found(&world).await, []);
    world.life.kill().await;
}

#[tokio::test]
async fn states_of_other_disks_and_names_of_none_are_not_believed() {
    let mut world = World::new().await;
    world = world.run(Op::Write { at: 0, sectors: 1, byte: 1 }).await;
    world = world.run(Op::Snapshot).await;
    let handler = world.life.handler.clone();
    assert_eq!(handler.past_states(10).await.unwrap(), ["1"]);
    assert_eq!(handler.past_states(0).await.unwrap(), [""; 0]);
    for name in ["2", "01", "+1", "", "@", "w@1", "v@01", "1@1", "-1", "99999999999999999999"] {
        assert!(handler.past_state(name).await.unwrap().is_none(), "{name}");
    }
    for name in ["1", "v@1"] {
        assert!(handler.past_state(name).await.unwrap().is_some(), "{name}");
    }
    let strange: PastState = Arc::new(7u8);
    let all = ByteRange::new(512, MIB);
    let found = handler.changes_since(&strange, all, 9).await.unwrap();
    assert_eq!(found, [Change { range: all, kind: ChangeKind::Changed }]);
    world.life.kill().await;
}
