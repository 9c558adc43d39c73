//! Packs: compressed blocks from anywhere in a volume, and the footer that indexes them.
//!
//! Owns: how a block is stored, the pack format and its index in memory.
//! Does not own: which blocks go into a pack, or when; nothing here does I/O.
//!
//! A pack is the stored blocks back to back, then the footer. The footer comes last because it is known last, and
//! is fetched alone. Zero blocks are only named, as runs. A pack may hold no data at all.
//!
//! ```text
//! footer: the envelope of volume::format with, from byte 16 on
//!  16   4   blocks: count of block entries
//!  20   4   runs: count of zero runs
//!  24   8   data_bytes: what lies before the footer
//!  32  40   id of this pack
//!  72  32 × blocks   block entries, block strictly ascending:
//!            0  4   block index within the volume
//!            4  16  hash: first 128 bits of BLAKE3 of the 128 KiB content
//!           20  12  place: offset_bytes u32 in the object; stored_bytes u24, encoding u8 (0 raw, 1 zstd);
//!                   pages u32: bit n = the n-th 4 KiB page is present, all ones today
//!   ..   8 × runs     zero runs, ascending, apart from each other and from all blocks:
//!            0  4   first block index
//!            4  4   count of blocks, not zero
//!   ..   4   footer_bytes, so that a footer can be found without a map
//!   ..   4   zero
//!   ..  16   checksum
//! ```

use crate::geometry::{BLOCK_BYTES, BLOCK_LEN, BlockIndex, VOLUME_BYTES_MAX};
use crate::volume::format::{self, FormatError, Reader};
use crate::volume::ids::{ContentHash, ObjectHash, ObjectId};
use bytes::Bytes;
use std::cell::RefCell;
use std::ops::Range;

/// Data of a pack that is worth sending.
pub const PACK_BYTES_TARGET: usize = 32 << 20;
/// Entries, zero runs included, after which a pack is sent whatever data it has.
pub const PACK_ENTRIES_TARGET: usize = 65_536;
/// Largest footer that is written or believed.
pub const FOOTER_BYTES_MAX: u32 = 16 << 20;
/// What [`StoredBlock::pages`] is when the whole block is there.
pub const ALL_PAGES: u32 = u32::MAX;

const MAGIC: [u8; 8] = *b"BHpack\r\n";
const WHAT: &str = "pack footer";
const HEADER_BYTES: usize = 72;
const TRAILER_BYTES: usize = 8 + format::CHECKSUM_BYTES;
const ENTRY_BYTES: usize = 32;
const RUN_BYTES: usize = 8;
/// Beyond it `push` is a programmer's error: the footer would be refused.
const PACK_ENTRIES_MAX: usize = 8 * PACK_ENTRIES_TARGET - 1024;

const _: () =
    assert!(VOLUME_BYTES_MAX / BLOCK_BYTES < u32::MAX as u64, "formats hold block indexes in 32 bits");
const _: () = assert!(
    PACK_ENTRIES_MAX * ENTRY_BYTES + HEADER_BYTES + TRAILER_BYTES <= FOOTER_BYTES_MAX as usize,
    "every footer that is written is also read"
);
const _: () = assert!(BLOCK_LEN / 4096 == 32, "the page mask has a bit for each page");
const _: () = assert!(BLOCK_LEN < 1 << 24, "stored_bytes has 24 bits");

/// How the bytes of a block are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// A block ready to be stored.
#[derive(Clone, Debug)]
pub struct EncodedBlock {
    pub hash: ContentHash,
    pub encoding: Encoding,
    pub bytes: Bytes,
}

/// Where in an object a block lies, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoredBlock {
    /// First byte in the object.
    pub offset: u32,
    pub stored_bytes: u32,
    pub encoding: Encoding,
    /// The 4 KiB pages of the block that are there: [`ALL_PAGES`].
    pub pages: u32,
    /// Of the uncompressed block.
    pub hash: ContentHash,
}

/// Where in the pool a block lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockLocation {
    pub pack: ObjectId,
    pub stored: StoredBlock,
}

/// What one layer of a volume's map says about a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// Nothing: ask the layer below.
    Absent,
    /// It is all zeros.
    Zero,
    At(BlockLocation),
}

/// Names a pack, with the hash of its footer: the footer holds the hashes of the blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackRef {
    pub id: ObjectId,
    pub object_bytes: u64,
    pub footer_bytes: u32,
    pub footer_hash: ObjectHash,
    /// Blocks with data.
    pub block_count: u32,
    /// Blocks that are said to be zero.
    pub zero_blocks: u64,
}

impl PackRef {
    /// Bytes before the footer.
    pub fn data_bytes(&self) -> u64 {
        self.object_bytes.saturating_sub(u64::from(self.footer_bytes))
    }
}

/// Encodes a block, compressed if that makes it smaller.
///
/// # Panics
/// If `content` is not exactly one block.
pub fn encode_block(content: &[u8], hash: ContentHash, level: i32) -> EncodedBlock {
    thread_local! {
        static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    }
    assert_eq!(content.len(), BLOCK_LEN, "a block has exactly one size");
    let compressed = COMPRESSOR.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(of_level, _)| *of_level != level) {
            *slot = zstd::bulk::Compressor::new(level).ok().map(|compressor| (level, compressor));
        }
        let (_, compressor) = slot.as_mut()?;
        // One byte less than the block: what does not shrink does not fit.
        let mut out = vec![0; BLOCK_LEN - 1];
        let len = compressor.compress_to_buffer(content, out.as_mut_slice()).ok()?;
        Some(Bytes::copy_from_slice(&out[..len]))
    });
    match compressed {
        Some(bytes) => EncodedBlock { hash, encoding: Encoding::Zstd, bytes },
        None => EncodedBlock { hash, encoding: Encoding::Raw, bytes: Bytes::copy_from_slice(content) },
    }
}

/// The content of a block: exactly [`BLOCK_LEN`] bytes with the hash of `location`.
///
/// # Errors
/// `Hash` if the bytes are not that block; `Malformed` and `Unsupported` if they cannot be one.
pub fn decode_block(stored: &[u8], location: &StoredBlock) -> Result<Bytes, FormatError> {
    thread_local! {
        static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    let malformed = |reason| FormatError::Malformed { what: "block", at_bytes: 0, reason };
    if location.pages != ALL_PAGES {
        return Err(FormatError::Unsupported { what: "block", reason: "a block with pages left out" });
    }
    if u32::try_from(stored.len()) != Ok(location.stored_bytes) {
        return Err(malformed("not as long as its entry says"));
    }
    let content = match location.encoding {
        Encoding::Raw => Bytes::copy_from_slice(stored),
        Encoding::Zstd => DECOMPRESSOR.with_borrow_mut(|slot| {
            let decompressor = match slot {
                Some(decompressor) => decompressor,
                None => slot.insert(
                    zstd::bulk::Decompressor::new().map_err(|_| malformed("no memory to decompress"))?,
                ),
            };
            // The frame is decoded into this buffer and nowhere else, whatever sizes it declares.
            let mut content = vec![0; BLOCK_LEN];
            let len = decompressor
                .decompress_to_buffer(stored, content.as_mut_slice())
                .map_err(|_| malformed("does not decompress to one block"))?;
            content.truncate(len);
            Ok(Bytes::from(content))
        })?,
    };
    if content.len() != BLOCK_LEN {
        return Err(malformed("does not decompress to one block"));
    }
    if ContentHash::of(&content) != location.hash {
        return Err(FormatError::Hash { what: "block" });
    }
    Ok(content)
}

/// Collects blocks into a pack.
#[derive(Debug)]
pub struct PackBuilder {
    id: ObjectId,
    data: Vec<u8>,
    blocks: Vec<(u32, StoredBlock)>,
    runs: Vec<Range<u32>>,
}

impl PackBuilder {
    pub fn new(id: ObjectId) -> Self {
        Self { id, data: Vec::new(), blocks: Vec::new(), runs: Vec::new() }
    }

    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Adds a block with data. Blocks may come in any order, each once.
    ///
    /// # Panics
    /// If the block is beyond the largest volume, larger than a block, or far too many were added ([`Self::is_full`]).
    pub fn push(&mut self, block: BlockIndex, encoded: EncodedBlock) {
        assert!(self.entry_count() < PACK_ENTRIES_MAX, "a full pack is sent");
        let stored_bytes =
            u32::try_from(encoded.bytes.len()).expect("a stored block is no larger than a block");
        assert!(place_is_sane(encoded.encoding, stored_bytes), "a stored block is no larger than a block");
        let offset = u32::try_from(self.data.len()).expect("a full pack is sent");
        self.data.extend_from_slice(&encoded.bytes);
        let stored = StoredBlock {
            offset,
            stored_bytes,
            encoding: encoded.encoding,
            pages: ALL_PAGES,
            hash: encoded.hash,
        };
        self.blocks.push((checked_blocks(block, 1).start, stored));
    }

    /// Says that `count` blocks from `start` are zero. Runs may come in any order and touch each other.
    ///
    /// # Panics
    /// As [`Self::push`].
    pub fn push_zero_run(&mut self, start: BlockIndex, count: u64) {
        if count == 0 {
            return;
        }
        let run = checked_blocks(start, count);
        match self.runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => {
                assert!(self.entry_count() < PACK_ENTRIES_MAX, "a full pack is sent");
                self.runs.push(run);
            }
        }
    }

    /// Bytes of data so far.
    pub fn stored_bytes(&self) -> usize {
        self.data.len()
    }

    /// Blocks and zero runs so far.
    pub fn entry_count(&self) -> usize {
        self.blocks.len() + self.runs.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.entry_count() == 0
    }

    /// Whether it is time to send it.
    pub fn is_full(&self) -> bool {
        self.data.len() >= PACK_BYTES_TARGET || self.entry_count() >= PACK_ENTRIES_TARGET
    }

    /// The object, the reference to it, and its index.
    ///
    /// # Panics
    /// If a block was added twice: which of the two contents counts would be chance.
    pub fn finish(mut self) -> (Bytes, PackRef, PackIndex) {
        self.blocks.sort_unstable_by_key(|(block, _)| *block);
        self.runs.sort_unstable_by_key(|run| run.start);
        self.runs.dedup_by(|next, last| {
            let touch = last.end == next.start;
            if touch {
                last.end = next.end;
            }
            touch
        });
        assert!(self.blocks.is_sorted_by(|(a, _), (b, _)| a < b), "a block is in a pack once");
        assert!(self.runs.is_sorted_by(|a, b| a.end < b.start), "a zero block is in a pack once");
        assert!(!blocks_meet_runs(&self.blocks, &self.runs), "a block has data or is zero");
        self.blocks.shrink_to_fit();
        self.runs.shrink_to_fit();
        let index = PackIndex {
            id: self.id,
            data_bytes: u64::try_from(self.data.len()).expect("a length fits 64 bits"),
            blocks: self.blocks,
            runs: self.runs,
        };
        let footer = index.encode();
        let reference = index.reference(&footer);
        let mut object = self.data;
        object.extend_from_slice(&footer);
        (Bytes::from(object), reference, index)
    }
}

/// The footer of a pack, in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackIndex {
    id: ObjectId,
    data_bytes: u64,
    /// Strictly ascending.
    blocks: Vec<(u32, StoredBlock)>,
    /// Ascending, not touching each other, apart from `blocks`.
    runs: Vec<Range<u32>>,
}

impl PackIndex {
    /// Reads a footer that `reference` names.
    ///
    /// # Errors
    /// `Hash` before anything else is looked at; then `Malformed`, `Unsupported`.
    pub fn decode(footer: &[u8], reference: &PackRef) -> Result<Self, FormatError> {
        let mut reader = format::open(WHAT, MAGIC, footer, &reference.footer_hash)?;
        let good = u32::try_from(footer.len()) == Ok(reference.footer_bytes)
            && reference.footer_bytes <= FOOTER_BYTES_MAX;
        reader.check(good, "not as long as the reference says")?;
        let block_count = reader.u32()?;
        let run_count = reader.u32()?;
        let data_bytes = reader.u64()?;
        let good = data_bytes.checked_add(u64::from(reference.footer_bytes)) == Some(reference.object_bytes)
            && reader.object_id()? == reference.id
            && block_count == reference.block_count;
        reader.check(good, "not the pack that the reference says")?;
        let block_len = reader.count(block_count, ENTRY_BYTES)?;
        let mut blocks = Vec::with_capacity(block_len);
        let mut next = 0;
        for _ in 0..block_len {
            let block = reader.u32()?;
            reader.check(
                block >= next && block < block_limit(),
                "blocks are not ascending or beyond the limit",
            )?;
            next = block + 1;
            blocks.push((block, read_stored(&mut reader, data_bytes)?));
        }
        let run_len = reader.count(run_count, RUN_BYTES)?;
        let mut runs: Vec<Range<u32>> = Vec::with_capacity(run_len);
        let mut zero_blocks = 0;
        for _ in 0..run_len {
            let start = reader.u32()?;
            let end = start.checked_add(reader.u32()?).filter(|end| *end > start && *end <= block_limit());
            let apart = runs.last().is_none_or(|last| last.end < start);
            let Some(end) = end.filter(|_| apart) else { return Err(reader.malformed("bad zero run")) };
            zero_blocks += u64::from(end - start);
            runs.push(start..end);
        }
        reader.check(!blocks_meet_runs(&blocks, &runs), "a block is zero and is not")?;
        reader
            .check(zero_blocks == reference.zero_blocks, "not as many zero blocks as the reference says")?;
        let footer_bytes = reader.u32()?;
        reader.check(footer_bytes == reference.footer_bytes, "not as long as it says")?;
        reader.zeros(4)?;
        reader.finish()?;
        Ok(Self { id: reference.id, data_bytes, blocks, runs })
    }

    /// The footer, byte for byte the one that this was decoded from.
    pub fn encode(&self) -> Vec<u8> {
        let body_bytes =
            HEADER_BYTES + self.blocks.len() * ENTRY_BYTES + self.runs.len() * RUN_BYTES + TRAILER_BYTES;
        let mut out = format::begin(MAGIC, body_bytes);
        out.extend_from_slice(&count_u32(self.blocks.len()).to_le_bytes());
        out.extend_from_slice(&count_u32(self.runs.len()).to_le_bytes());
        out.extend_from_slice(&self.data_bytes.to_le_bytes());
        out.extend_from_slice(&self.id.to_bytes());
        for (block, stored) in &self.blocks {
            out.extend_from_slice(&block.to_le_bytes());
            write_stored(&mut out, stored);
        }
        for run in &self.runs {
            out.extend_from_slice(&run.start.to_le_bytes());
            out.extend_from_slice(&(run.end - run.start).to_le_bytes());
        }
        out.extend_from_slice(&count_u32(body_bytes).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        format::seal(&mut out);
        out
    }

    fn reference(&self, footer: &[u8]) -> PackRef {
        let footer_bytes = count_u32(footer.len());
        PackRef {
            id: self.id,
            object_bytes: self.data_bytes + u64::from(footer_bytes),
            footer_bytes,
            footer_hash: ObjectHash::of(footer),
            block_count: count_u32(self.blocks.len()),
            zero_blocks: self.runs.iter().map(|run| u64::from(run.end - run.start)).sum(),
        }
    }

    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Bytes before the footer.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// What the pack says about a block.
    pub fn lookup(&self, block: BlockIndex) -> Lookup {
        let Ok(block) = u32::try_from(block.0) else { return Lookup::Absent };
        if let Ok(at) = self.blocks.binary_search_by_key(&block, |(block, _)| *block) {
            return Lookup::At(BlockLocation { pack: self.id, stored: self.blocks[at].1 });
        }
        let at = self.runs.partition_point(|run| run.end <= block);
        if self.runs.get(at).is_some_and(|run| run.contains(&block)) { Lookup::Zero } else { Lookup::Absent }
    }

    /// Blocks with data, ascending.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (BlockIndex, StoredBlock)> {
        self.blocks.iter().map(|(block, stored)| (BlockIndex(u64::from(*block)), *stored))
    }

    /// Runs of zero blocks, ascending and apart from each other.
    pub fn zero_runs(&self) -> impl ExactSizeIterator<Item = Range<BlockIndex>> {
        self.runs.iter().map(|run| BlockIndex(u64::from(run.start))..BlockIndex(u64::from(run.end)))
    }

    /// Blocks with data among `blocks`, ascending.
    pub fn entries_in(&self, blocks: Range<u64>) -> impl Iterator<Item = (BlockIndex, BlockLocation)> {
        let from = self.blocks.partition_point(|(block, _)| u64::from(*block) < blocks.start);
        let own = self.blocks[from..].iter().take_while(move |(block, _)| u64::from(*block) < blocks.end);
        own.map(|(block, stored)| {
            (BlockIndex(u64::from(*block)), BlockLocation { pack: self.id, stored: *stored })
        })
    }

    /// Zero runs that have one of `blocks`, as a whole.
    pub fn zero_runs_in(&self, blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let from = self.runs.partition_point(|run| u64::from(run.end) <= blocks.start);
        let own = self.runs[from..].iter().take_while(move |run| u64::from(run.start) < blocks.end);
        own.map(|run| u64::from(run.start)..u64::from(run.end))
    }

    /// Entries, zero runs included.
    pub fn entry_count(&self) -> usize {
        self.blocks.len() + self.runs.len()
    }

    /// First block that it says anything about.
    pub fn first_block(&self) -> Option<BlockIndex> {
        let data = self.blocks.first().map(|(block, _)| *block);
        let zero = self.runs.first().map(|run| run.start);
        data.into_iter().chain(zero).min().map(|block| BlockIndex(u64::from(block)))
    }

    /// Last block that it says anything about.
    pub fn last_block(&self) -> Option<BlockIndex> {
        let data = self.blocks.last().map(|(block, _)| *block);
        let zero = self.runs.last().map(|run| run.end - 1);
        data.into_iter().chain(zero).max().map(|block| BlockIndex(u64::from(block)))
    }

    /// Whether it says anything about one of `blocks`.
    pub fn overlaps(&self, blocks: Range<u64>) -> bool {
        if blocks.is_empty() {
            return false;
        }
        let data = self.blocks.partition_point(|(block, _)| u64::from(*block) < blocks.start);
        let zero = self.runs.partition_point(|run| u64::from(run.end) <= blocks.start);
        self.blocks.get(data).is_some_and(|(block, _)| u64::from(*block) < blocks.end)
            || self.runs.get(zero).is_some_and(|run| u64::from(run.start) < blocks.end)
    }

    /// Memory that it holds.
    pub fn heap_bytes(&self) -> usize {
        self.blocks.capacity() * size_of::<(u32, StoredBlock)>()
            + self.runs.capacity() * size_of::<Range<u32>>()
    }
}

/// Appends the 28 bytes of hash and place.
pub(super) fn write_stored(out: &mut Vec<u8>, stored: &StoredBlock) {
    let encoding: u32 = match stored.encoding {
        Encoding::Raw => 0,
        Encoding::Zstd => 1,
    };
    out.extend_from_slice(&stored.hash.0);
    out.extend_from_slice(&stored.offset.to_le_bytes());
    out.extend_from_slice(&(stored.stored_bytes | encoding << 24).to_le_bytes());
    out.extend_from_slice(&stored.pages.to_le_bytes());
}

/// Takes hash and place of a block in an object with `data_bytes` of data.
pub(super) fn read_stored(reader: &mut Reader<'_>, data_bytes: u64) -> Result<StoredBlock, FormatError> {
    let hash = ContentHash(reader.array()?);
    let offset = reader.u32()?;
    let word = reader.u32()?;
    let pages = reader.u32()?;
    let encoding = match word >> 24 {
        0 => Encoding::Raw,
        1 => Encoding::Zstd,
        _ => return Err(FormatError::Unsupported { what: "block entry", reason: "an encoding" }),
    };
    if pages != ALL_PAGES {
        return Err(FormatError::Unsupported { what: "block entry", reason: "a block with pages left out" });
    }
    let stored_bytes = word & 0x00ff_ffff;
    reader.check(place_is_sane(encoding, stored_bytes), "a stored block has an impossible length")?;
    let inside = u64::from(offset) + u64::from(stored_bytes) <= data_bytes;
    reader.check(inside, "a stored block lies outside its pack")?;
    Ok(StoredBlock { offset, stored_bytes, encoding, pages, hash })
}

/// One more than the largest block index of any volume.
pub(super) fn block_limit() -> u32 {
    u32::try_from(VOLUME_BYTES_MAX / BLOCK_BYTES).expect("asserted above")
}

/// A length that the format's limits keep far below 32 bits.
pub(super) fn count_u32(len: usize) -> u32 {
    u32::try_from(len).expect("limited by the format")
}

fn place_is_sane(encoding: Encoding, stored_bytes: u32) -> bool {
    match encoding {
        Encoding::Raw => u64::from(stored_bytes) == BLOCK_BYTES,
        Encoding::Zstd => stored_bytes > 0 && u64::from(stored_bytes) < BLOCK_BYTES,
    }
}

fn checked_blocks(start: BlockIndex, count: u64) -> Range<u32> {
    let end = start.0.checked_add(count).and_then(|end| u32::try_from(end).ok());
    let end = end.filter(|end| *end <= block_limit()).expect("blocks lie in a volume");
    u32::try_from(start.0).expect("no larger than the end")..end
}

/// Whether a block has data and is in a zero run; both sorted.
fn blocks_meet_runs(blocks: &[(u32, StoredBlock)], runs: &[Range<u32>]) -> bool {
    let mut blocks = blocks.iter().map(|(block, _)| *block).peekable();
    runs.iter().any(|run| {
        while blocks.next_if(|block| *block < run.start).is_some() {}
        blocks.peek().is_some_and(|block| *block < run.end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(sequence: u64) -> ObjectId {
        ObjectId { sequence, ..ObjectId::from_bytes(&[7; 40]) }
    }

    fn text_block(seed: u8) -> Vec<u8> {
        (0..BLOCK_LEN).map(|at| seed ^ u8::try_from(at / 512 % 251).unwrap()).collect()
    }

    fn noise_block() -> Vec<u8> {
        let mut out = vec![0; BLOCK_LEN];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    fn location(encoded: &EncodedBlock) -> StoredBlock {
        StoredBlock {
            offset: 0,
            stored_bytes: u32::try_from(encoded.bytes.len()).unwrap(),
            encoding: encoded.encoding,
            pages: ALL_PAGES,
            hash: encoded.hash,
        }
    }

    fn small_pack() -> (Bytes, PackRef, PackIndex) {
        let mut builder = PackBuilder::new(id(1));
        for block in [900_000, 3, 70] {
            let content = text_block(u8::try_from(block % 251).unwrap());
            builder.push(BlockIndex(block), encode_block(&content, ContentHash::of(&content), 3));
        }
        builder.push_zero_run(BlockIndex(71), 1000);
        builder.push_zero_run(BlockIndex(10), 5);
        builder.push_zero_run(BlockIndex(15), 5);
        builder.finish()
    }

    fn footer(object: &Bytes, reference: &PackRef) -> Bytes {
        object.slice(usize::try_from(reference.data_bytes()).unwrap()..)
    }

    #[test]
    fn a_block_comes_back_whether_it_shrinks_or_not() {
        for (content, encoding) in [
            (text_block(1), Encoding::Zstd),
            (noise_block(), Encoding::Raw),
            (vec![0; BLOCK_LEN], Encoding::Zstd),
        ] {
            for level in [1, 3, 3, 9] {
                let encoded = encode_block(&content, ContentHash::of(&content), level);
                assert_eq!(encoded.encoding, encoding);
                assert!(encoded.bytes.len() <= BLOCK_LEN);
                assert_eq!(decode_block(&encoded.bytes, &location(&encoded)).unwrap(), content);
            }
        }
    }

    #[test]
    fn g15_another_block_is_not_believed_though_well_formed() {
        let (one, other) = (text_block(1), text_block(2));
        let named = encode_block(&one, ContentHash::of(&one), 3);
        let found = encode_block(&other, ContentHash::of(&other), 3);
        let place = StoredBlock { hash: named.hash, ..location(&found) };
        assert_eq!(decode_block(&found.bytes, &place), Err(FormatError::Hash { what: "block" }));
    }

    #[test]
    fn g19_a_frame_that_yields_another_size_than_a_block_is_refused() {
        for size in [0, 1, BLOCK_LEN - 1, BLOCK_LEN + 1, 64 << 20] {
            let content = vec![5; size];
            let bomb = zstd::bulk::compress(&content, 3).unwrap();
            assert!(bomb.len() < 1 << 16);
            let encoded = EncodedBlock {
                hash: ContentHash::of(&content),
                encoding: Encoding::Zstd,
                bytes: bomb.into(),
            };
            let refused = decode_block(&encoded.bytes, &location(&encoded));
            assert!(matches!(refused, Err(FormatError::Malformed { .. })), "{size}: {refused:?}");
            // The same without the size declared in the frame.
            let bomb = zstd::stream::encode_all(content.as_slice(), 3).unwrap();
            let encoded = EncodedBlock { bytes: bomb.into(), ..encoded };
            assert!(decode_block(&encoded.bytes, &location(&encoded)).is_err());
        }
    }

    #[test]
    fn blocks_with_pages_left_out_are_named_as_unsupported() {
        let content = text_block(1);
        let encoded = encode_block(&content, ContentHash::of(&content), 3);
        let place = StoredBlock { pages: 1, ..location(&encoded) };
        assert!(matches!(decode_block(&encoded.bytes, &place), Err(FormatError::Unsupported { .. })));
    }

    #[test]
    fn every_block_of_a_pack_is_found_and_decodes() {
        let (object, reference, built) = small_pack();
        let index = PackIndex::decode(&footer(&object, &reference), &reference).unwrap();
        assert_eq!(index, built);
        assert_eq!(index.encode(), footer(&object, &reference));
        assert_eq!((reference.block_count, reference.zero_blocks), (3, 1010));
        assert_eq!(index.entries().map(|(block, _)| block.0).collect::<Vec<_>>(), [3, 70, 900_000]);
        for (block, stored) in index.entries() {
            let start = usize::try_from(stored.offset).unwrap();
            let bytes = &object[start..start + usize::try_from(stored.stored_bytes).unwrap()];
            assert_eq!(
                decode_block(bytes, &stored).unwrap(),
                text_block(u8::try_from(block.0 % 251).unwrap())
            );
        }
        assert_eq!(
            index.zero_runs().map(|run| (run.start.0, run.end.0)).collect::<Vec<_>>(),
            [(10, 20), (71, 1071)]
        );
        assert_eq!(
            (index.first_block(), index.last_block()),
            (Some(BlockIndex(3)), Some(BlockIndex(900_000)))
        );
        assert_eq!(index.lookup(BlockIndex(1071)), Lookup::Absent);
        assert!(
            index.overlaps(0..4)
                && !index.overlaps(4..10)
                && index.overlaps(4..11)
                && !index.overlaps(20..70)
        );
    }

    #[test]
    fn a_pack_may_hold_nothing_but_zero_runs() {
        let mut builder = PackBuilder::new(id(1));
        builder.push_zero_run(BlockIndex(0), VOLUME_BYTES_MAX / BLOCK_BYTES);
        let (object, reference, _) = builder.finish();
        assert_eq!(reference.data_bytes(), 0);
        let index = PackIndex::decode(&object, &reference).unwrap();
        assert_eq!(index.lookup(BlockIndex(12345)), Lookup::Zero);
        assert_eq!(index.lookup(BlockIndex(u64::MAX)), Lookup::Absent);
    }

    #[test]
    #[should_panic(expected = "once")]
    fn adding_a_block_twice_is_a_programmers_error() {
        let content = text_block(1);
        let encoded = encode_block(&content, ContentHash::of(&content), 3);
        let mut builder = PackBuilder::new(id(1));
        builder.push(BlockIndex(1), encoded.clone());
        builder.push(BlockIndex(1), encoded);
        builder.finish();
    }

    #[test]
    #[should_panic(expected = "or is zero")]
    fn adding_a_block_with_data_and_as_zero_is_a_programmers_error() {
        let content = text_block(1);
        let mut builder = PackBuilder::new(id(1));
        builder.push_zero_run(BlockIndex(0), 10);
        builder.push(BlockIndex(9), encode_block(&content, ContentHash::of(&content), 3));
        builder.finish();
    }

    #[test]
    fn every_truncation_and_every_changed_byte_of_a_footer_is_refused() {
        let (object, reference, _) = small_pack();
        let good = footer(&object, &reference);
        for len in 0..good.len() {
            assert!(PackIndex::decode(&good[..len], &reference).is_err());
            // Also if the reference fits what is there: a footer protects itself.
            let footer_bytes = u32::try_from(len).unwrap();
            let fits = PackRef {
                footer_bytes,
                object_bytes: reference.data_bytes() + u64::from(footer_bytes),
                footer_hash: ObjectHash::of(&good[..len]),
                ..reference
            };
            assert!(PackIndex::decode(&good[..len], &fits).is_err());
        }
        for at in 0..good.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bad = good.to_vec();
                bad[at] ^= flip;
                assert!(matches!(PackIndex::decode(&bad, &reference), Err(FormatError::Hash { .. })));
                let fits = PackRef { footer_hash: ObjectHash::of(&bad), ..reference };
                assert!(PackIndex::decode(&bad, &fits).is_err(), "byte {at} changed");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn lookup_in_a_pack_equals_a_plain_map(blocks in proptest::collection::btree_map(0u64..300, any::<bool>(), 0..100), seed: u64) {
            let mut builder = PackBuilder::new(id(seed));
            let mut order: Vec<_> = blocks.iter().collect();
            order.sort_by_key(|(block, _)| blake3::hash(&(**block ^ seed).to_le_bytes()).as_bytes()[0]);
            for (block, zero) in order {
                if *zero {
                    builder.push_zero_run(BlockIndex(*block), 1);
                } else {
                    let bytes = Bytes::copy_from_slice(&block.to_le_bytes());
                    builder.push(BlockIndex(*block), EncodedBlock { hash: ContentHash::of(&bytes), encoding: Encoding::Zstd, bytes });
                }
            }
            let (object, reference, built) = builder.finish();
            let index = PackIndex::decode(&footer(&object, &reference), &reference).unwrap();
            prop_assert_eq!(&index, &built);
            for block in 0..301u64 {
                match (index.lookup(BlockIndex(block)), blocks.get(&block)) {
                    (Lookup::Absent, None) | (Lookup::Zero, Some(true)) => {}
                    (Lookup::At(location), Some(false)) => {
                        let start = usize::try_from(location.stored.offset).unwrap();
                        prop_assert_eq!(&object[start..start + 8], &block.to_le_bytes());
                        prop_assert_eq!(location.pack, id(seed));
                    }
                    (found, expected) => prop_assert!(false, "block {}: {:?}, not {:?}", block, found, expected),
                }
                prop_assert_eq!(index.overlaps(block..block + 7), blocks.range(block..block + 7).next().is_some());
            }
        }
    }
}
