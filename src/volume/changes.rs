//! What differs between a disk and a snapshot of its volume.
//!
//! Owns: comparing maps, and the rule that "unchanged" is said only where it is certain: of sectors that no epoch has a
//! record of, in blocks whose content has the same hash in both maps. Everything else is called changed.
//! Does not own: names of snapshots outside this volume, or the protocol that asks.

use crate::block::{BlockError, Change, ChangeKind, PastState};
use crate::geometry::{BLOCK_BYTES, BlockIndex, ByteRange, SECTOR_BYTES};
use crate::volume::base::BaseMap;
use crate::volume::catalog::past;
use crate::volume::engine::{Engine, EngineError};
use crate::volume::ids::{ContentHash, Uid};
use crate::volume::layers::{Layers, Where};
use crate::volume::map::lookup_unfolded;
use crate::volume::pack::Lookup;
use crate::volume::segment::{SEGMENT_BLOCKS, Segment, segment_of};
use std::ops::Range;
use std::sync::Arc;

/// Bytes that one call looks at.
const LOOK_BYTES_MAX: u64 = 64 << 30;
/// What is compared without letting others run. Every sector of it may be a stretch of its own.
const STRETCH_BYTES: u64 = 64 << 20;

const _: () = assert!((SEGMENT_BLOCKS * BLOCK_BYTES).is_multiple_of(STRETCH_BYTES), "it lies in one segment");

/// A snapshot that changes are asked against.
struct Snapshot {
    uid: Uid,
    size_bytes: u64,
    base: Arc<BaseMap>,
}

/// The newest `max` snapshots of a volume, as clients name them, oldest first.
///
/// # Errors
/// `Unavailable`.
pub async fn names(engine: &Engine, uid: &Uid, max: usize) -> Result<Vec<String>, EngineError> {
    let mut numbers = past::snapshot_numbers(engine, uid).await?;
    numbers.sort_unstable();
    Ok(numbers[numbers.len().saturating_sub(max)..].iter().map(u64::to_string).collect())
}

/// The snapshot that a client calls `name`: its number, or the volume's name when it was taken, `@` and the number.
/// `None`: there is none.
///
/// # Errors
/// `Unavailable`, `Corrupt`.
pub async fn find(engine: &Engine, uid: &Uid, name: &str) -> Result<Option<PastState>, EngineError> {
    let (volume, digits) = match name.rsplit_once('@') {
        Some((volume, digits)) => (Some(volume), digits),
        None => (None, name),
    };
    // One name for each number: no sign, no zeros in front.
    let Some(number) = digits.parse::<u64>().ok().filter(|number| number.to_string() == digits) else {
        return Ok(None);
    };
    let snapshot = match past::read_snapshot(engine, "", uid, number).await {
        Ok(snapshot) => snapshot,
        Err(EngineError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    if volume.is_some_and(|volume| volume != snapshot.volume) {
        return Ok(None);
    }
    let base = BaseMap::open(engine, snapshot.map, snapshot.size_bytes).await?;
    Ok(Some(Arc::new(Snapshot { uid: *uid, size_bytes: snapshot.size_bytes, base })))
}

/// What of `range` differs between `now`, a state of the volume `uid`, and `past`. Perhaps only of its beginning.
///
/// # Errors
/// `Unavailable`, `Corrupt`: the map of now cannot be read.
pub async fn changes(
    engine: &Engine,
    uid: &Uid,
    now: Now<'_>,
    past: &PastState,
    range: ByteRange,
    changes_max: usize,
) -> Result<Vec<Change>, BlockError> {
    let mut changes = Vec::new();
    let Some(past) = past.downcast_ref::<Snapshot>().filter(|past| past.uid == *uid) else {
        push(&mut changes, range, ChangeKind::Changed);
        return Ok(changes);
    };
    let end = range.end().min(range.start().saturating_add(LOOK_BYTES_MAX));
    let mut at = range.start();
    while at < end && changes.len() <= changes_max {
        let stretch_end = (at / STRETCH_BYTES + 1) * STRETCH_BYTES;
        let stretch = ByteRange::new(at, stretch_end.min(end) - at);
        let mut pieces = Vec::new();
        match now {
            Now::Layers(layers) => layers.resolve(stretch.grow_to(SECTOR_BYTES), |piece, place| {
                let Some(piece) = piece.intersect(stretch) else { return };
                match place {
                    Where::Epoch(_) | Where::Zero => pieces.push((piece, Some(ChangeKind::Changed))),
                    Where::Below => pieces.push((piece, None)),
                }
            }),
            Now::Map(_) => pieces.push((stretch, None)),
        }
        for (piece, kind) in pieces {
            match kind {
                Some(kind) => push(&mut changes, piece, kind),
                None => compare(engine, now.base(), past, piece, &mut changes).await?,
            }
        }
        at = stretch.end();
        if at < end {
            tokio::task::yield_now().await;
        }
    }
    changes.truncate(changes_max);
    Ok(changes)
}

/// The state that is compared with the past.
#[derive(Clone, Copy)]
pub enum Now<'a> {
    /// Of a volume in use: what epochs have a record of counts as changed.
    Layers(&'a Layers),
    /// Of a snapshot.
    Map(&'a BaseMap),
}

impl<'a> Now<'a> {
    fn base(self) -> &'a BaseMap {
        match self {
            Self::Layers(layers) => &layers.base,
            Self::Map(base) => base,
        }
    }
}

/// Compares a stretch within one segment.
async fn compare(
    engine: &Engine,
    now: &BaseMap,
    past: &Snapshot,
    stretch: ByteRange,
    changes: &mut Vec<Change>,
) -> Result<(), EngineError> {
    // Beyond the end of the past there is nothing to be equal to, not even zeros.
    let known_end = past.size_bytes.clamp(stretch.start(), stretch.end());
    let known = ByteRange::new(stretch.start(), known_end - stretch.start());
    let beyond = ByteRange::new(known_end, stretch.end() - known_end);
    if !known.is_empty() {
        if surely_equal(now, &past.base, known.blocks()) {
            push(changes, known, ChangeKind::Unchanged);
        } else {
            compare_blocks(engine, now, past, known, changes).await?;
        }
    }
    if !beyond.is_empty() {
        push(changes, beyond, ChangeKind::Changed);
    }
    Ok(())
}

/// Whether the maps themselves say the same of blocks of one segment: the same bytes of the same segments object, under
/// the same packs.
fn surely_equal(now: &BaseMap, past: &BaseMap, blocks: Range<u64>) -> bool {
    let first = BlockIndex(blocks.start);
    if now.map.segment(first) != past.map.segment(first) {
        return false;
    }
    let same = now.map.packs().iter().zip(past.map.packs()).take_while(|(now, past)| now == past).count();
    let untouched =
        |base: &BaseMap| base.unfolded[same..].iter().all(|index| !index.overlaps(blocks.clone()));
    untouched(now) && untouched(past)
}

async fn compare_blocks(
    engine: &Engine,
    now: &BaseMap,
    past: &Snapshot,
    stretch: ByteRange,
    changes: &mut Vec<Change>,
) -> Result<(), EngineError> {
    let first = BlockIndex(stretch.blocks().start);
    let now = View::open(engine, now, first).await?;
    let past = match View::open(engine, &past.base, first).await {
        Ok(past) => past,
        // A snapshot may be deleted while it is compared with.
        Err(EngineError::NotFound(_) | EngineError::Corrupt(_)) => {
            push(changes, stretch, ChangeKind::Changed);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    for (block, piece) in stretch.split_at_blocks() {
        let kind = if now.content(block) == past.content(block) {
            ChangeKind::Unchanged
        } else {
            ChangeKind::Changed
        };
        push(changes, piece, kind);
    }
    Ok(())
}

/// One segment of a map, with the packs above it.
struct View<'a> {
    base: &'a BaseMap,
    segment: Option<Arc<Segment>>,
}

impl<'a> View<'a> {
    async fn open(engine: &Engine, base: &'a BaseMap, block: BlockIndex) -> Result<Self, EngineError> {
        let segment = match base.map.segment(block) {
            None => None,
            Some(reference) => Some(engine.load_segment(segment_of(block), reference).await?),
        };
        Ok(Self { base, segment })
    }

    /// Hash of a block's content; `None`: all zero.
    fn content(&self, block: BlockIndex) -> Option<ContentHash> {
        let found = match lookup_unfolded(&self.base.unfolded, block) {
            Lookup::Absent => self.segment.as_ref().map_or(Lookup::Zero, |segment| segment.lookup(block)),
            found => found,
        };
        match found {
            Lookup::At(location) => Some(location.stored.hash),
            Lookup::Zero | Lookup::Absent => None,
        }
    }
}

fn push(changes: &mut Vec<Change>, range: ByteRange, kind: ChangeKind) {
    match changes.last_mut() {
        Some(last) if last.kind == kind && last.range.end() == range.start() => {
            last.range = ByteRange::new(last.range.start(), last.range.len() + range.len());
        }
        _ => changes.push(Change { range, kind }),
    }
}
