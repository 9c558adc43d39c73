//! Maps: the root of a volume's content, and folding packs into the segment table.
//!
//! Owns: the map format, and what a fold does.
//! Does not own: loading what a fold needs, or publishing what it made; nothing here does I/O.
//!
//! A block is what the newest of the unfolded packs says that says anything; else what its segment says; else zero.
//!
//! ```text
//! the envelope of volume::format with, from byte 16 on
//!  16   8   size_bytes of the volume, a multiple of 512
//!  24   4   objects: count of the object table
//!  28   4   segments: count of the segment table
//!  32   4   packs: count of unfolded packs
//!  36   4   zero
//!  40  40 × objects   ids of segments objects, strictly ascending, each used by a segment
//!   ..  56 × segments  segments that are not all zero, by index strictly ascending:
//!            0  4   index
//!            4  4   index into the object table
//!            8  4   offset_bytes in that object
//!           12  4   stored_bytes of the encoded segment
//!           16  8   data_bytes: sum of the stored bytes of its blocks
//!           24  32  BLAKE3 hash of the encoded segment
//!   ..  96 × packs     packs not folded in yet, oldest first:
//!            0  40  id
//!           40  8   object_bytes
//!           48  4   footer_bytes
//!           52  4   block_count
//!           56  8   zero_blocks
//!           64  32  BLAKE3 hash of the footer
//!   ..  16   checksum
//! ```
//! The object table comes first because segments are checked against it; many segments share few objects.

use crate::geometry::{BlockIndex, SECTOR_BYTES, VOLUME_BYTES_MAX, block_count};
use crate::volume::format::{self, FormatError, Reader};
use crate::volume::ids::{ObjectHash, ObjectId};
use crate::volume::pack::{FOOTER_BYTES_MAX, Lookup, PackIndex, PackRef, count_u32};
use crate::volume::segment::{
    SEGMENT_BLOCKS, SEGMENT_BYTES_MAX, Segment, SegmentDraft, SegmentRef, segment_blocks, segment_of,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Largest map object that is written or believed.
pub const MAP_BYTES_MAX: u64 = 64 << 20;
/// Unfolded packs beyond which they are folded.
pub const UNFOLDED_PACKS_MAX: usize = 16;
/// Entries of unfolded packs beyond which they are folded.
pub const UNFOLDED_ENTRIES_MAX: usize = 131_072;
/// Unfolded packs that a map can hold; far more than folding leaves.
pub const MAP_PACKS_MAX: usize = 65_536;

const MAGIC: [u8; 8] = *b"BHmap\0\r\n";
const WHAT: &str = "map";
const HEADER_BYTES: usize = 40;
const SEGMENT_BYTES: usize = 56;
const PACK_BYTES: usize = 96;

const _: () = assert!(
    (VOLUME_BYTES_MAX / crate::geometry::BLOCK_BYTES / SEGMENT_BLOCKS)
        * (SEGMENT_BYTES as u64 + ObjectId::BYTES as u64)
        + MAP_PACKS_MAX as u64 * PACK_BYTES as u64
        + 1024
        <= MAP_BYTES_MAX,
    "every map that is written is also read"
);

/// Names a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapRef {
    pub id: ObjectId,
    pub object_bytes: u64,
    pub hash: ObjectHash,
}

/// Where every block of a volume lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Map {
    /// Size of the volume, a multiple of 512.
    pub size_bytes: u64,
    /// Segments that are not all zero.
    segments: BTreeMap<u32, SegmentRef>,
    /// Not folded in yet, oldest first.
    packs: Vec<PackRef>,
}

impl Map {
    /// The map of a volume of zeros.
    ///
    /// # Panics
    /// If no volume has that size.
    pub fn empty(size_bytes: u64) -> Self {
        assert!(size_is_sane(size_bytes), "a volume's size was validated");
        Self { size_bytes, segments: BTreeMap::new(), packs: Vec::new() }
    }

    /// Reads the map that `reference` names.
    ///
    /// # Errors
    /// `Hash` before anything else is looked at; then `Malformed`, `Unsupported`.
    pub fn decode(bytes: &[u8], reference: &MapRef) -> Result<Self, FormatError> {
        let object_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if object_bytes != reference.object_bytes || object_bytes > MAP_BYTES_MAX {
            return Err(FormatError::Malformed {
                what: WHAT,
                at_bytes: 0,
                reason: "too long, or not as named",
            });
        }
        let mut reader = format::open(WHAT, MAGIC, bytes, &reference.hash)?;
        let size_bytes = reader.u64()?;
        reader.check(size_is_sane(size_bytes), "impossible volume size")?;
        let object_count = reader.u32()?;
        let segment_count = reader.u32()?;
        let pack_count = reader.u32()?;
        reader.zeros(4)?;
        let objects = read_objects(&mut reader, object_count)?;
        let segments = read_segments(&mut reader, segment_count, &objects, size_bytes)?;
        let pack_len = reader.count(pack_count, PACK_BYTES)?;
        reader.check(pack_len <= MAP_PACKS_MAX, "too many packs")?;
        let mut packs = Vec::with_capacity(pack_len);
        for _ in 0..pack_len {
            packs.push(read_pack(&mut reader)?);
        }
        reader.finish()?;
        Ok(Self { size_bytes, segments, packs })
    }

    /// The encoded map, byte for byte the one that this was decoded from.
    pub fn encode(&self) -> Bytes {
        let objects: Vec<ObjectId> = self.segments_objects().into_iter().collect();
        let body_bytes = HEADER_BYTES
            + objects.len() * ObjectId::BYTES
            + self.segments.len() * SEGMENT_BYTES
            + self.packs.len() * PACK_BYTES;
        let mut out = format::begin(MAGIC, body_bytes);
        out.extend_from_slice(&self.size_bytes.to_le_bytes());
        out.extend_from_slice(&count_u32(objects.len()).to_le_bytes());
        out.extend_from_slice(&count_u32(self.segments.len()).to_le_bytes());
        out.extend_from_slice(&count_u32(self.packs.len()).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for id in &objects {
            out.extend_from_slice(&id.to_bytes());
        }
        for (index, segment) in &self.segments {
            let object = objects.binary_search(&segment.object).expect("collected from the same segments");
            out.extend_from_slice(&index.to_le_bytes());
            out.extend_from_slice(&count_u32(object).to_le_bytes());
            out.extend_from_slice(&segment.offset_bytes.to_le_bytes());
            out.extend_from_slice(&segment.stored_bytes.to_le_bytes());
            out.extend_from_slice(&segment.data_bytes.to_le_bytes());
            out.extend_from_slice(&segment.hash.0);
        }
        for pack in &self.packs {
            out.extend_from_slice(&pack.id.to_bytes());
            out.extend_from_slice(&pack.object_bytes.to_le_bytes());
            out.extend_from_slice(&pack.footer_bytes.to_le_bytes());
            out.extend_from_slice(&pack.block_count.to_le_bytes());
            out.extend_from_slice(&pack.zero_blocks.to_le_bytes());
            out.extend_from_slice(&pack.footer_hash.0);
        }
        format::seal(&mut out);
        Bytes::from(out)
    }

    /// The encoded map, and the reference to it under `id`.
    pub fn with_id(&self, id: ObjectId) -> (Bytes, MapRef) {
        let bytes = self.encode();
        let object_bytes = u64::try_from(bytes.len()).expect("limited by the format");
        let reference = MapRef { id, object_bytes, hash: ObjectHash::of(&bytes) };
        (bytes, reference)
    }

    /// The segment that describes `block`, unless all of it is zero.
    pub fn segment(&self, block: BlockIndex) -> Option<&SegmentRef> {
        self.segments.get(&segment_of(block))
    }

    /// Segments that are not all zero, ascending.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = (u32, &SegmentRef)> {
        self.segments.iter().map(|(index, segment)| (*index, segment))
    }

    /// Packs not folded in yet, oldest first.
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// Adds a pack that is newer than all others.
    ///
    /// # Panics
    /// If [`MAP_PACKS_MAX`] are there already: they should have been folded long before.
    pub fn push_pack(&mut self, pack: PackRef) {
        assert!(self.packs.len() < MAP_PACKS_MAX, "packs are folded");
        self.packs.push(pack);
    }

    /// The segments objects that it names.
    pub fn segments_objects(&self) -> BTreeSet<ObjectId> {
        self.segments.values().map(|segment| segment.object).collect()
    }

    /// Bytes in the pool that its blocks take, not counting that unfolded packs may hide older blocks.
    pub fn data_bytes(&self) -> u64 {
        let folded = self.segments.values().map(|segment| segment.data_bytes);
        folded.chain(self.packs.iter().map(PackRef::data_bytes)).fold(0, u64::saturating_add)
    }

    /// The map of a volume of another size. What a smaller size cuts off must read as zeros by now: where a segment
    /// or an unfolded pack is cut, its entries beyond the end stay until the next fold.
    ///
    /// # Panics
    /// If no volume has that size.
    pub fn truncated(&self, size_bytes: u64) -> Self {
        assert!(size_is_sane(size_bytes), "a volume's size was validated");
        let mut segments = self.segments.clone();
        segments.split_off(&segment_count(size_bytes));
        Self { size_bytes, segments, packs: self.packs.clone() }
    }
}

/// What the newest of `indexes` (oldest first) says about a block.
pub fn lookup_unfolded(indexes: &[Arc<PackIndex>], block: BlockIndex) -> Lookup {
    let answers = indexes.iter().rev().map(|index| index.lookup(block));
    answers.into_iter().find(|answer| *answer != Lookup::Absent).unwrap_or(Lookup::Absent)
}

/// Whether the unfolded packs are so many that lookups and memory suffer.
pub fn should_fold(map: &Map, indexes: &[Arc<PackIndex>]) -> bool {
    let entries: usize = indexes.iter().map(|index| index.entry_count()).sum();
    map.packs.len() > UNFOLDED_PACKS_MAX || entries > UNFOLDED_ENTRIES_MAX
}

/// The old segments that a fold has to know: those that change and are not wholly overwritten by zeros.
pub fn segments_needed(map: &Map, indexes: &[Arc<PackIndex>]) -> Vec<u32> {
    Fold::new(map, indexes).needed().collect()
}

/// Folds all packs of `map` into its segment table. `indexes` are those of its packs, oldest first; `old` has at
/// least [`segments_needed`]. Returns the bytes of the segments object `new_object`, which are empty if no segment
/// that changed has any data left, and the map to publish once that object stands. `None`: there is nothing to fold.
///
/// # Panics
/// As [`Fold::new`] and [`Fold::apply`]; and beyond 4 GiB of changed segments, for which there is [`Fold`].
pub fn fold(
    map: &Map,
    indexes: &[Arc<PackIndex>],
    old: &HashMap<u32, Segment>,
    new_object: ObjectId,
) -> Option<(Bytes, Map)> {
    if map.packs.is_empty() {
        return None;
    }
    let mut fold = Fold::new(map, indexes);
    while let Some(step) = fold.next_step() {
        fold.apply(old.get(&step.segment));
    }
    let bytes = fold.take_object(new_object).unwrap_or_default();
    Some((bytes, fold.finish()))
}

/// A fold that takes one segment at a time, so that neither the old segments nor the new objects need to be in
/// memory together.
#[derive(Debug)]
pub struct Fold {
    map: Map,
    indexes: Vec<Arc<PackIndex>>,
    /// Changed segments that are yet to be done, ascending, and whether the old one matters.
    steps: BTreeMap<u32, bool>,
    object: Vec<u8>,
    /// Segments in `object`, without its id yet.
    in_object: Vec<(u32, SegmentRef)>,
}

/// What [`Fold::apply`] wants next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FoldStep {
    pub segment: u32,
    /// The old segment to load and hand over.
    pub old: Option<SegmentRef>,
}

impl Fold {
    /// # Panics
    /// If `indexes` are not those of the packs of `map`, in their order.
    pub fn new(map: &Map, indexes: &[Arc<PackIndex>]) -> Self {
        let named = map.packs.iter().map(|pack| pack.id);
        assert!(named.eq(indexes.iter().map(|index| index.id())), "every pack's index, oldest first");
        let segment_limit = segment_count(map.size_bytes);
        let mut steps = BTreeMap::new();
        for index in indexes {
            for (block, _) in index.entries() {
                steps.entry(segment_of(block)).or_insert(true);
            }
            for run in index.zero_runs() {
                for segment in segment_of(run.start)..segment_of(BlockIndex(run.end.0 - 1)).saturating_add(1)
                {
                    let own = segment_blocks(segment);
                    let end = own.end.min(block_count(map.size_bytes));
                    let covered = run.start.0 <= own.start && end <= run.end.0;
                    let matters = steps.entry(segment).or_insert(true);
                    *matters &= !covered;
                }
            }
        }
        steps.split_off(&segment_limit);
        // A segment of zeros that only gets more zeros stays one.
        steps.retain(|segment, _| {
            map.segments.contains_key(segment) || indexes.iter().any(|index| has_data(index, *segment))
        });
        let map = Map { packs: Vec::new(), ..map.clone() };
        Self { map, indexes: indexes.to_vec(), steps, object: Vec::new(), in_object: Vec::new() }
    }

    /// The old segments that are needed, of those yet to be done.
    pub fn needed(&self) -> impl Iterator<Item = u32> {
        let there = |(segment, matters): (&u32, &bool)| {
            (*matters && self.map.segments.contains_key(segment)).then_some(*segment)
        };
        self.steps.iter().filter_map(there)
    }

    /// The segment to be done next; `None` if all are.
    pub fn next_step(&self) -> Option<FoldStep> {
        let (segment, matters) = self.steps.first_key_value()?;
        let old = if *matters { self.map.segments.get(segment).copied() } else { None };
        Some(FoldStep { segment: *segment, old })
    }

    /// Does the segment of [`Self::next_step`].
    ///
    /// # Panics
    /// If the old segment is needed and not given, or is another one: what it lists would be lost.
    pub fn apply(&mut self, old: Option<&Segment>) {
        let Some(FoldStep { segment, old: needed }) = self.next_step() else { return };
        let mut draft = match (needed, old) {
            (None, _) => SegmentDraft::empty(segment),
            (Some(_), Some(old)) => {
                assert_eq!(old.index(), segment, "the old segment is the one asked for");
                SegmentDraft::of(old)
            }
            (Some(_), None) => panic!("the old segment {segment} is given"),
        };
        let own = segment_blocks(segment);
        for index in &self.indexes {
            for run in index.zero_runs_in(own.clone()) {
                draft.clear(run);
            }
            for (block, location) in index.entries_in(own.clone()) {
                draft.set(block, location, index.data_bytes());
            }
        }
        draft.clear(block_count(self.map.size_bytes)..own.end.max(block_count(self.map.size_bytes)));
        self.steps.remove(&segment);
        self.map.segments.remove(&segment);
        if let Some(new) = draft.finish() {
            let encoded = new.encode();
            let reference = SegmentRef {
                object: ObjectId::from_bytes(&[0; ObjectId::BYTES]),
                offset_bytes: u32::try_from(self.object.len()).expect("objects are taken before 4 GiB"),
                stored_bytes: count_u32(encoded.len()),
                data_bytes: new.data_bytes(),
                hash: ObjectHash::of(&encoded),
            };
            self.object.extend_from_slice(&encoded);
            self.in_object.push((segment, reference));
        }
    }

    /// Bytes of the segments object so far: take it when it is large.
    pub fn object_bytes(&self) -> usize {
        self.object.len()
    }

    /// The segments done since the last one was taken, as the object `id`; `None` if there are none.
    pub fn take_object(&mut self, id: ObjectId) -> Option<Bytes> {
        if self.in_object.is_empty() {
            return None;
        }
        let named =
            self.in_object.drain(..).map(|(index, segment)| (index, SegmentRef { object: id, ..segment }));
        self.map.segments.extend(named);
        Some(Bytes::from(std::mem::take(&mut self.object)))
    }

    /// The folded map.
    ///
    /// # Panics
    /// If segments are not done yet, or their object was not taken.
    pub fn finish(self) -> Map {
        assert!(self.steps.is_empty() && self.in_object.is_empty(), "every segment lies in an object");
        self.map
    }
}

fn has_data(index: &PackIndex, segment: u32) -> bool {
    index.entries_in(segment_blocks(segment)).next().is_some()
}

/// One more than the index of the last segment of a volume.
fn segment_count(size_bytes: u64) -> u32 {
    let count = block_count(size_bytes).div_ceil(SEGMENT_BLOCKS);
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn size_is_sane(size_bytes: u64) -> bool {
    size_bytes <= VOLUME_BYTES_MAX && size_bytes.is_multiple_of(SECTOR_BYTES)
}

fn read_objects(reader: &mut Reader<'_>, count: u32) -> Result<Vec<ObjectId>, FormatError> {
    let len = reader.count(count, ObjectId::BYTES)?;
    let mut objects: Vec<ObjectId> = Vec::with_capacity(len);
    for _ in 0..len {
        let id = reader.object_id()?;
        reader.check(objects.last().is_none_or(|last| *last < id), "objects are not ascending")?;
        objects.push(id);
    }
    Ok(objects)
}

fn read_segments(
    reader: &mut Reader<'_>,
    count: u32,
    objects: &[ObjectId],
    size_bytes: u64,
) -> Result<BTreeMap<u32, SegmentRef>, FormatError> {
    let len = reader.count(count, SEGMENT_BYTES)?;
    let mut segments = BTreeMap::new();
    let mut used = vec![false; objects.len()];
    let mut next = 0;
    for _ in 0..len {
        let index = reader.u32()?;
        reader.check(
            index >= next && index < segment_count(size_bytes),
            "segments are not ascending or beyond the end",
        )?;
        next = index + 1;
        let object = usize::try_from(reader.u32()?).ok().filter(|at| *at < objects.len());
        let Some(object) = object else { return Err(reader.malformed("names an object not in its table")) };
        used[object] = true;
        let segment = SegmentRef {
            object: objects[object],
            offset_bytes: reader.u32()?,
            stored_bytes: reader.u32()?,
            data_bytes: reader.u64()?,
            hash: ObjectHash(reader.array()?),
        };
        let good = segment.stored_bytes <= SEGMENT_BYTES_MAX
            && segment.offset_bytes.checked_add(segment.stored_bytes).is_some()
            && segment.data_bytes <= SEGMENT_BLOCKS * crate::geometry::BLOCK_BYTES;
        reader.check(good, "a segment has an impossible place or size")?;
        segments.insert(index, segment);
    }
    reader.check(used.iter().all(|used| *used), "an object in its table is not used")?;
    Ok(segments)
}

fn read_pack(reader: &mut Reader<'_>) -> Result<PackRef, FormatError> {
    let pack = PackRef {
        id: reader.object_id()?,
        object_bytes: reader.u64()?,
        footer_bytes: reader.u32()?,
        block_count: reader.u32()?,
        zero_blocks: reader.u64()?,
        footer_hash: ObjectHash(reader.array()?),
    };
    let good = pack.footer_bytes <= FOOTER_BYTES_MAX
        && pack.object_bytes >= u64::from(pack.footer_bytes)
        && pack.data_bytes() <= u64::from(u32::MAX);
    reader.check(good, "a pack has an impossible size")?;
    Ok(pack)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::BLOCK_BYTES;
    use crate::volume::ids::ContentHash;
    use crate::volume::pack::{BlockLocation, EncodedBlock, Encoding, PackBuilder};
    use proptest::prelude::*;

    const VOLUME_BLOCKS: u64 = 3 * SEGMENT_BLOCKS - 100;

    fn id(sequence: u64) -> ObjectId {
        ObjectId { sequence, ..ObjectId::from_bytes(&[7; 40]) }
    }

    fn fake_block(stamp: u64) -> EncodedBlock {
        let bytes = Bytes::copy_from_slice(&stamp.to_le_bytes());
        EncodedBlock { hash: ContentHash::of(&bytes), encoding: Encoding::Zstd, bytes }
    }

    /// A volume as its owner sees it, beside a plain model.
    struct World {
        map: Map,
        indexes: Vec<Arc<PackIndex>>,
        objects: HashMap<ObjectId, Bytes>,
        model: BTreeMap<u64, ContentHash>,
        sequence: u64,
    }

    impl World {
        fn new() -> Self {
            Self {
                map: Map::empty(VOLUME_BLOCKS * BLOCK_BYTES),
                indexes: Vec::new(),
                objects: HashMap::new(),
                model: BTreeMap::new(),
                sequence: 0,
            }
        }

        fn next(&mut self) -> u64 {
            self.sequence += 1;
            self.sequence
        }

        fn blocks(&self) -> u64 {
            block_count(self.map.size_bytes)
        }

        fn commit(&mut self, zeros: &[(u64, u64)], data: &[u64]) {
            let mut builder = PackBuilder::new(id(self.next()));
            let data: BTreeSet<u64> = data.iter().copied().filter(|block| *block < self.blocks()).collect();
            let zero: BTreeSet<u64> =
                zeros.iter().flat_map(|(start, len)| *start..(start + len).min(self.blocks())).collect();
            for block in zero.difference(&data) {
                builder.push_zero_run(BlockIndex(*block), 1);
                self.model.remove(block);
            }
            for block in &data {
                let encoded = fake_block(self.next());
                self.model.insert(*block, encoded.hash);
                builder.push(BlockIndex(*block), encoded);
            }
            let (object, reference, _) = builder.finish();
            let footer = &object[usize::try_from(reference.data_bytes()).unwrap()..];
            self.indexes.push(Arc::new(PackIndex::decode(footer, &reference).unwrap()));
            self.map.push_pack(reference);
        }

        fn load(&self, segment: u32) -> Segment {
            let reference = self.map.segments[&segment];
            let start = usize::try_from(reference.offset_bytes).unwrap();
            let end = start + usize::try_from(reference.stored_bytes).unwrap();
            Segment::decode(&self.objects[&reference.object][start..end], segment, &reference).unwrap()
        }

        fn fold(&mut self) {
            let needed = segments_needed(&self.map, &self.indexes);
            let old = needed.into_iter().map(|segment| (segment, self.load(segment))).collect();
            let object = id(self.next());
            if let Some((bytes, map)) = fold(&self.map, &self.indexes, &old, object) {
                self.objects.insert(object, bytes);
                self.map = map;
                self.indexes.clear();
            }
        }

        /// Folds with one object for each segment.
        fn fold_in_steps(&mut self) {
            let mut fold = Fold::new(&self.map, &self.indexes);
            while let Some(step) = fold.next_step() {
                let old = step.old.map(|_| self.load(step.segment));
                fold.apply(old.as_ref());
                self.sequence += 1;
                if let Some(bytes) = fold.take_object(id(self.sequence)) {
                    self.objects.insert(id(self.sequence), bytes);
                }
            }
            self.map = fold.finish();
            self.indexes.clear();
        }

        fn resize(&mut self, blocks: u64) {
            if blocks < self.blocks() {
                self.commit(&[(blocks, self.blocks() - blocks)], &[]);
            }
            self.map = self.map.truncated(blocks * BLOCK_BYTES);
        }

        fn reload(&mut self) {
            let (bytes, reference) = self.map.with_id(id(9999));
            let text = serde_json::to_string(&reference).unwrap();
            assert_eq!(serde_json::from_str::<MapRef>(&text).unwrap(), reference);
            let map = Map::decode(&bytes, &reference).unwrap();
            assert_eq!(map, self.map);
            assert_eq!(map.encode(), bytes);
            self.map = map;
        }

        fn lookup(&self, block: u64) -> Option<BlockLocation> {
            let found = match lookup_unfolded(&self.indexes, BlockIndex(block)) {
                Lookup::Absent => match self.map.segment(BlockIndex(block)) {
                    Some(_) => self.load(segment_of(BlockIndex(block))).lookup(BlockIndex(block)),
                    None => Lookup::Zero,
                },
                found => found,
            };
            match found {
                Lookup::At(location) => Some(location),
                Lookup::Zero => None,
                Lookup::Absent => panic!("a segment always answers"),
            }
        }

        fn check(&self) {
            let mut interesting: BTreeSet<u64> = self.model.keys().copied().collect();
            for around in (0..4).map(|n| n * SEGMENT_BLOCKS).chain([self.blocks()]) {
                interesting.extend(around.saturating_sub(12)..around + 12);
            }
            for block in interesting.into_iter().filter(|block| *block < self.blocks()) {
                let found = self.lookup(block).map(|location| location.stored.hash);
                assert_eq!(found, self.model.get(&block).copied(), "block {block}");
            }
            let folded: u64 = self.map.segments().map(|(segment, _)| self.load(segment).data_bytes()).sum();
            let unfolded: u64 = self.map.packs().iter().map(PackRef::data_bytes).sum();
            assert_eq!(self.map.data_bytes(), folded + unfolded);
            if self.map.packs().is_empty() {
                let segments: BTreeSet<u32> =
                    self.model.keys().map(|block| segment_of(BlockIndex(*block))).collect();
                assert!(self.map.segments().map(|(index, _)| index).eq(segments), "no segment is all zero");
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Commit { zeros: Vec<(u64, u64)>, data: Vec<u64> },
        Fold,
        FoldInSteps,
        Reload,
        Resize(u64),
    }

    fn block() -> impl Strategy<Value = u64> {
        (0u64..4, 0u64..20).prop_map(|(segment, near)| (segment * SEGMENT_BLOCKS + near).saturating_sub(10))
    }

    fn op() -> impl Strategy<Value = Op> {
        let len = prop_oneof![5 => 1u64..12, 2 => 1u64..3 * SEGMENT_BLOCKS, 1 => Just(3 * SEGMENT_BLOCKS)];
        let zeros = proptest::collection::vec((block(), len), 0..3);
        prop_oneof![
            5 => (zeros, proptest::collection::vec(block(), 0..12)).prop_map(|(zeros, data)| Op::Commit { zeros, data }),
            2 => Just(Op::Fold),
            1 => Just(Op::FoldInSteps),
            1 => Just(Op::Reload),
            1 => (1u64..=VOLUME_BLOCKS).prop_map(Op::Resize),
            1 => block().prop_map(|block| Op::Resize(block.clamp(1, VOLUME_BLOCKS))),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn g10_maps_say_what_a_plain_model_says(ops in proptest::collection::vec(op(), 1..12)) {
            let mut world = World::new();
            for op in ops {
                match op {
                    Op::Commit { zeros, data } => world.commit(&zeros, &data),
                    Op::Fold => world.fold(),
                    Op::FoldInSteps => world.fold_in_steps(),
                    Op::Reload => world.reload(),
                    Op::Resize(blocks) => world.resize(blocks),
                }
                world.check();
            }
        }
    }

    fn folded_world() -> World {
        let mut world = World::new();
        world.commit(&[], &[1, 2, 3, SEGMENT_BLOCKS, SEGMENT_BLOCKS + 5]);
        world.commit(&[(2, 1)], &[3, 2 * SEGMENT_BLOCKS]);
        world.fold();
        world.commit(&[(4, 8)], &[1]);
        world
    }

    #[test]
    fn g10_a_discarded_block_stays_zero_across_folds() {
        let mut world = folded_world();
        world.commit(&[(0, SEGMENT_BLOCKS)], &[]);
        assert!(segments_needed(&world.map, &world.indexes).is_empty(), "all of it is overwritten by zeros");
        world.fold();
        world.check();
        assert!(world.map.segment(BlockIndex(1)).is_none());
    }

    #[test]
    fn a_segment_of_zeros_that_gets_more_zeros_costs_nothing() {
        let mut world = World::new();
        world.commit(&[(5, 3 * SEGMENT_BLOCKS)], &[]);
        assert!(Fold::new(&world.map, &world.indexes).next_step().is_none());
        world.fold();
        assert_eq!(world.map, World::new().map);
    }

    #[test]
    fn nothing_is_folded_where_there_is_nothing_to_fold() {
        let world = World::new();
        assert_eq!(fold(&world.map, &[], &HashMap::new(), id(1)), None);
    }

    #[test]
    #[should_panic(expected = "is given")]
    fn a_fold_without_a_segment_that_it_needs_is_a_programmers_error() {
        let world = folded_world();
        fold(&world.map, &world.indexes, &HashMap::new(), id(77));
    }

    #[test]
    fn many_packs_or_many_entries_ask_for_a_fold() {
        let mut world = World::new();
        for block in 0..17 {
            assert!(!should_fold(&world.map, &world.indexes));
            world.commit(&[], &[block]);
        }
        assert!(should_fold(&world.map, &world.indexes));
        world.fold();
        assert!(!should_fold(&world.map, &world.indexes));
    }

    #[test]
    fn a_segment_says_how_much_it_uses_of_each_pack() {
        let world = folded_world();
        let uses = world.load(0).packs();
        assert_eq!(
            uses.iter().map(|pack| (pack.live_blocks, pack.live_bytes)).collect::<Vec<_>>(),
            [(1, 8), (1, 8)]
        );
        assert_eq!(uses.iter().map(|pack| pack.data_bytes).collect::<Vec<_>>(), [40, 16]);
    }

    fn refuses_all_changes(good: &[u8], is_refused: impl Fn(&[u8]) -> bool) {
        for len in 0..good.len() {
            assert!(is_refused(&good[..len]));
        }
        for at in 0..good.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bad = good.to_vec();
                bad[at] ^= flip;
                assert!(is_refused(&bad), "byte {at} changed");
            }
        }
    }

    #[test]
    fn every_truncation_and_every_changed_byte_of_a_map_or_segment_is_refused() {
        let world = folded_world();
        let (map, map_ref) = world.map.with_id(id(1));
        let segment_ref = world.map.segments[&1];
        let start = usize::try_from(segment_ref.offset_bytes).unwrap();
        let end = start + usize::try_from(segment_ref.stored_bytes).unwrap();
        let segment = world.objects[&segment_ref.object].slice(start..end);

        refuses_all_changes(&map, |bytes| {
            let object_bytes = u64::try_from(bytes.len()).unwrap();
            let fits = MapRef { object_bytes, hash: ObjectHash::of(bytes), ..map_ref };
            Map::decode(bytes, &map_ref).is_err() && Map::decode(bytes, &fits).is_err()
        });
        refuses_all_changes(&segment, |bytes| {
            let stored_bytes = u32::try_from(bytes.len()).unwrap();
            let fits = SegmentRef { stored_bytes, hash: ObjectHash::of(bytes), ..segment_ref };
            Segment::decode(bytes, 1, &segment_ref).is_err() && Segment::decode(bytes, 1, &fits).is_err()
        });
        assert!(
            Segment::decode(&segment, 0, &segment_ref).is_err(),
            "another segment than the one asked for"
        );
    }
}
