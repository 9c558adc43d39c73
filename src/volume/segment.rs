//! Segments: where each of 8192 consecutive blocks lies.
//!
//! Owns: the segment format and its form in memory.
//! Does not own: which segments a volume has ([`super::map`]).
//!
//! Several encoded segments back to back are a segments object; it has no structure of its own, each segment in it
//! is named by position, length and hash. A block that a segment does not list is zero.
//!
//! ```text
//! the envelope of volume::format with, from byte 16 on
//!  16   4   index of this segment within the volume
//!  20   4   packs: count of the pack table
//!  24   4   entries: count of blocks, at least one
//!  28   4   zero
//!  32  44 × packs    pack table, by id strictly ascending, each used by an entry:
//!            0  40  id
//!           40  4   data_bytes: what lies before the footer of that pack
//!   ..  32 × entries  blocks, strictly ascending:
//!            0  2   block index within the segment
//!            2  2   index into the pack table
//!            4  28  hash and place, as in a pack's footer
//!   ..  16   checksum
//! ```
//! The pack table comes before the entries because they are checked against it; it holds `data_bytes` so that how
//! much of a pack is still used can be told without fetching its footer.

use crate::geometry::{BlockIndex, SECTOR_BYTES, VOLUME_BYTES_MAX};
use crate::volume::format::{self, FormatError};
use crate::volume::ids::{ObjectHash, ObjectId};
use crate::volume::pack::{BlockLocation, Lookup, StoredBlock, count_u32, read_stored, write_stored};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Blocks that a segment describes: 1 GiB.
pub const SEGMENT_BLOCKS: u64 = 8192;
/// Largest encoded segment that is written or believed.
pub const SEGMENT_BYTES_MAX: u32 = 2 << 20;

const MAGIC: [u8; 8] = *b"BHsegm\r\n";
const WHAT: &str = "segment";
const HEADER_BYTES: usize = 32;
const PACK_BYTES: usize = 44;
const ENTRY_BYTES: usize = 32;

const _: () = assert!(
    HEADER_BYTES + 8192 * (PACK_BYTES + ENTRY_BYTES) + format::CHECKSUM_BYTES <= SEGMENT_BYTES_MAX as usize,
    "every segment that is written is also read"
);
const _: () = assert!(SEGMENT_BLOCKS <= 1 << 16, "a block index within a segment has 16 bits");
const _: () = assert!(VOLUME_BYTES_MAX.is_multiple_of(SECTOR_BYTES), "the largest volume is a size");

/// Names an encoded segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentRef {
    /// The segments object that it lies in.
    pub object: ObjectId,
    pub offset_bytes: u32,
    /// Length of the encoded segment.
    pub stored_bytes: u32,
    /// Sum of the stored bytes of the blocks that it lists.
    pub data_bytes: u64,
    pub hash: ObjectHash,
}

/// Index of the segment that describes a block.
pub fn segment_of(block: BlockIndex) -> u32 {
    u32::try_from(block.0 / SEGMENT_BLOCKS).unwrap_or(u32::MAX)
}

/// Blocks that a segment describes.
pub fn segment_blocks(segment: u32) -> Range<u64> {
    let start = u64::from(segment) * SEGMENT_BLOCKS;
    start..start + SEGMENT_BLOCKS
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PackEntry {
    id: ObjectId,
    data_bytes: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    block_within: u16,
    pack: u16,
    stored: StoredBlock,
}

/// A segment, in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    index: u32,
    packs: Vec<PackEntry>,
    entries: Vec<Entry>,
}

/// How much of a pack a segment uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackUse {
    pub pack: ObjectId,
    /// What lies before the footer of the pack.
    pub data_bytes: u64,
    /// Blocks of the pack that the segment names, and their stored bytes.
    pub live_blocks: u64,
    pub live_bytes: u64,
}

impl Segment {
    /// Reads segment `index`, which `reference` names.
    ///
    /// # Errors
    /// `Hash` before anything else is looked at; then `Malformed`, `Unsupported`.
    pub fn decode(bytes: &[u8], index: u32, reference: &SegmentRef) -> Result<Self, FormatError> {
        let mut reader = format::open(WHAT, MAGIC, bytes, &reference.hash)?;
        let good = u32::try_from(bytes.len()) == Ok(reference.stored_bytes)
            && reference.stored_bytes <= SEGMENT_BYTES_MAX
            && reader.u32()? == index;
        reader.check(good, "not the segment that the reference says")?;
        let pack_count = reader.u32()?;
        let entry_count = reader.u32()?;
        reader.zeros(4)?;
        let good = entry_count > 0 && u64::from(entry_count) <= SEGMENT_BLOCKS && pack_count <= entry_count;
        reader.check(good, "impossible counts")?;
        let pack_len = reader.count(pack_count, PACK_BYTES)?;
        let mut packs: Vec<PackEntry> = Vec::with_capacity(pack_len);
        for _ in 0..pack_len {
            let pack = PackEntry { id: reader.object_id()?, data_bytes: reader.u32()? };
            reader.check(packs.last().is_none_or(|last| last.id < pack.id), "packs are not ascending")?;
            packs.push(pack);
        }
        let entry_len = reader.count(entry_count, ENTRY_BYTES)?;
        let mut entries = Vec::with_capacity(entry_len);
        let mut used = vec![false; pack_len];
        let mut next = 0;
        let mut data_bytes = 0;
        for _ in 0..entry_len {
            let block_within = reader.u16()?;
            let pack = reader.u16()?;
            let ascending = u64::from(block_within) >= next && u64::from(block_within) < SEGMENT_BLOCKS;
            reader.check(ascending, "blocks are not ascending or beyond the segment")?;
            next = u64::from(block_within) + 1;
            let Some(entry) = packs.get(usize::from(pack)) else {
                return Err(reader.malformed("names a pack that is not in its table"));
            };
            used[usize::from(pack)] = true;
            let stored = read_stored(&mut reader, u64::from(entry.data_bytes))?;
            data_bytes += u64::from(stored.stored_bytes);
            entries.push(Entry { block_within, pack, stored });
        }
        reader.check(used.iter().all(|used| *used), "a pack in its table is not used")?;
        reader.check(data_bytes == reference.data_bytes, "not as much data as the reference says")?;
        reader.finish()?;
        Ok(Self { index, packs, entries })
    }

    /// The encoded segment, byte for byte the one that this was decoded from.
    pub fn encode(&self) -> Vec<u8> {
        let body_bytes = HEADER_BYTES + self.packs.len() * PACK_BYTES + self.entries.len() * ENTRY_BYTES;
        let mut out = format::begin(MAGIC, body_bytes);
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&count_u32(self.packs.len()).to_le_bytes());
        out.extend_from_slice(&count_u32(self.entries.len()).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for pack in &self.packs {
            out.extend_from_slice(&pack.id.to_bytes());
            out.extend_from_slice(&pack.data_bytes.to_le_bytes());
        }
        for entry in &self.entries {
            out.extend_from_slice(&entry.block_within.to_le_bytes());
            out.extend_from_slice(&entry.pack.to_le_bytes());
            write_stored(&mut out, &entry.stored);
        }
        format::seal(&mut out);
        out
    }

    /// Index within the volume.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Where a block of this segment lies; never `Absent`.
    pub fn lookup(&self, block: BlockIndex) -> Lookup {
        debug_assert_eq!(segment_of(block), self.index, "the caller asks the right segment");
        let within = block.0 % SEGMENT_BLOCKS;
        match self.entries.binary_search_by_key(&within, |entry| u64::from(entry.block_within)) {
            Ok(at) => Lookup::At(self.location(&self.entries[at])),
            Err(_) => Lookup::Zero,
        }
    }

    /// Blocks with data, ascending.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (BlockIndex, BlockLocation)> {
        let start = segment_blocks(self.index).start;
        self.entries
            .iter()
            .map(move |entry| (BlockIndex(start + u64::from(entry.block_within)), self.location(entry)))
    }

    /// The packs that it names, by id, and how much of each it uses.
    pub fn packs(&self) -> Vec<PackUse> {
        let unused = |pack: &PackEntry| PackUse {
            pack: pack.id,
            data_bytes: u64::from(pack.data_bytes),
            live_blocks: 0,
            live_bytes: 0,
        };
        let mut uses: Vec<PackUse> = self.packs.iter().map(unused).collect();
        for entry in &self.entries {
            let pack_use = &mut uses[usize::from(entry.pack)];
            pack_use.live_blocks += 1;
            pack_use.live_bytes += u64::from(entry.stored.stored_bytes);
        }
        uses
    }

    /// Sum of the stored bytes of its blocks.
    pub fn data_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.stored.stored_bytes)).sum()
    }

    /// Memory that it holds.
    pub fn heap_bytes(&self) -> usize {
        self.packs.capacity() * size_of::<PackEntry>() + self.entries.capacity() * size_of::<Entry>()
    }

    fn location(&self, entry: &Entry) -> BlockLocation {
        BlockLocation { pack: self.packs[usize::from(entry.pack)].id, stored: entry.stored }
    }
}

/// A segment being changed.
#[derive(Clone, Debug)]
pub(super) struct SegmentDraft {
    index: u32,
    blocks: BTreeMap<u16, (PackEntry, StoredBlock)>,
}

impl SegmentDraft {
    /// A segment of zeros.
    pub fn empty(index: u32) -> Self {
        Self { index, blocks: BTreeMap::new() }
    }

    /// What `segment` says.
    pub fn of(segment: &Segment) -> Self {
        let block =
            |entry: &Entry| (entry.block_within, (segment.packs[usize::from(entry.pack)], entry.stored));
        Self { index: segment.index, blocks: segment.entries.iter().map(block).collect() }
    }

    /// Sets a block of this segment; `pack_data_bytes` is what lies before the footer of its pack.
    pub fn set(&mut self, block: BlockIndex, location: BlockLocation, pack_data_bytes: u64) {
        let data_bytes = u32::try_from(pack_data_bytes).expect("offsets within a pack have 32 bits");
        self.blocks.insert(within(block), (PackEntry { id: location.pack, data_bytes }, location.stored));
    }

    /// Makes blocks zero; those of other segments do not matter.
    pub fn clear(&mut self, blocks: Range<u64>) {
        let own = segment_blocks(self.index);
        let start = blocks.start.max(own.start);
        let end = blocks.end.min(own.end);
        if start < end {
            let first = within(BlockIndex(start));
            let last = within(BlockIndex(end - 1));
            let cleared: Vec<u16> = self.blocks.range(first..=last).map(|(block, _)| *block).collect();
            for block in cleared {
                self.blocks.remove(&block);
            }
        }
    }

    /// The segment, unless all of it is zero.
    pub fn finish(self) -> Option<Segment> {
        if self.blocks.is_empty() {
            return None;
        }
        let table: BTreeMap<ObjectId, u32> =
            self.blocks.values().map(|(pack, _)| (pack.id, pack.data_bytes)).collect();
        let packs: Vec<PackEntry> =
            table.into_iter().map(|(id, data_bytes)| PackEntry { id, data_bytes }).collect();
        let number = |id: ObjectId| {
            let at = packs.binary_search_by_key(&id, |pack| pack.id).expect("collected from the same blocks");
            u16::try_from(at).expect("no more packs than blocks")
        };
        let entry = |(block_within, (pack, stored)): (u16, (PackEntry, StoredBlock))| Entry {
            block_within,
            pack: number(pack.id),
            stored,
        };
        let entries = self.blocks.into_iter().map(entry).collect();
        Some(Segment { index: self.index, packs, entries })
    }
}

fn within(block: BlockIndex) -> u16 {
    u16::try_from(block.0 % SEGMENT_BLOCKS).expect("asserted above")
}

/// The ids of all packs that `segments` name.
pub fn packs_named<'a>(segments: impl Iterator<Item = &'a Segment>) -> BTreeSet<ObjectId> {
    segments.flat_map(|segment| segment.packs.iter().map(|pack| pack.id)).collect()
}
