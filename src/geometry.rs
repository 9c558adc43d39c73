//! Sizes, positions and ranges on a volume, and all arithmetic that turns one into another.
//!
//! Owns: the block and sector sizes, the index types, rounding and splitting.
//! Does not own: where anything is stored.

use std::fmt;
use std::ops::Range;

/// The unit that is tracked as written.
pub const SECTOR_BYTES: u64 = 512;
/// The unit that is stored, hashed and compressed.
pub const BLOCK_BYTES: u64 = 128 * 1024;
/// [`BLOCK_BYTES`] as a buffer length.
pub const BLOCK_LEN: usize = 128 * 1024;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES / SECTOR_BYTES;
/// Sectors that one word of a sector map describes.
pub const SECTORS_PER_WORD: u64 = 32;
/// Words of a sector map that describe one block.
pub const WORDS_PER_BLOCK: u64 = SECTORS_PER_BLOCK / SECTORS_PER_WORD;
/// Largest volume: 64 TiB. Beyond it a create or resize is refused.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

const _: () = assert!(BLOCK_LEN as u64 == BLOCK_BYTES, "one block size, as a count and as a length");
const _: () =
    assert!(SECTORS_PER_BLOCK.is_multiple_of(SECTORS_PER_WORD), "a map word never spans two blocks");

/// Index of a block within a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// The block that holds byte `offset_bytes` of the volume.
    pub fn of(offset_bytes: u64) -> Self {
        Self(offset_bytes / BLOCK_BYTES)
    }

    /// First byte of the block.
    pub fn start_bytes(self) -> u64 {
        self.0 * BLOCK_BYTES
    }

    /// The bytes of the volume that the block covers.
    pub fn range(self) -> ByteRange {
        ByteRange::new(self.start_bytes(), BLOCK_BYTES)
    }
}

/// A stretch of bytes of a volume. `start + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// # Panics
    /// If `start + len` overflows: callers validate positions from outside with [`ByteRange::checked`].
    pub fn new(start: u64, len: u64) -> Self {
        assert!(start.checked_add(len).is_some(), "byte range overflows");
        Self { start, len }
    }

    /// The range, unless its end overflows.
    pub fn checked(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len).map(|_| Self { start, len })
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The bytes that both ranges have.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::new(start, end - start))
    }

    /// Whether start and length are multiples of `unit_bytes`.
    pub fn is_aligned(self, unit_bytes: u64) -> bool {
        self.start.is_multiple_of(unit_bytes) && self.len.is_multiple_of(unit_bytes)
    }

    /// The largest range of whole units inside this one; empty if there is none.
    pub fn shrink_to(self, unit_bytes: u64) -> Self {
        let start = self.start.div_ceil(unit_bytes) * unit_bytes;
        let end = self.end() / unit_bytes * unit_bytes;
        if start < end { Self::new(start, end - start) } else { Self::new(start.min(self.end()), 0) }
    }

    /// The smallest range of whole units around this one.
    pub fn grow_to(self, unit_bytes: u64) -> Self {
        let start = self.start / unit_bytes * unit_bytes;
        let end = self.end().div_ceil(unit_bytes) * unit_bytes;
        Self::new(start, end - start)
    }

    /// The range cut at block borders, in order.
    pub fn split_at_blocks(self) -> impl Iterator<Item = (BlockIndex, ByteRange)> {
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end() {
                return None;
            }
            let block = BlockIndex::of(at);
            let end = block.range().end().min(self.end());
            let piece = Self::new(at, end - at);
            at = end;
            Some((block, piece))
        })
    }

    /// Indexes of the blocks that the range touches.
    pub fn blocks(self) -> Range<u64> {
        if self.is_empty() {
            return self.start / BLOCK_BYTES..self.start / BLOCK_BYTES;
        }
        self.start / BLOCK_BYTES..self.end().div_ceil(BLOCK_BYTES)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len)
    }
}

/// Blocks needed for `size_bytes`, the last one perhaps not full.
pub fn block_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

/// A length that is known to fit in memory.
///
/// # Panics
/// On a 32-bit machine with a length beyond its address space.
pub fn len_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a buffer length fits the address space")
}

/// Whether a disk may be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// What a frontend tells its clients about a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size, a multiple of 512.
    pub size_bytes: u64,
    /// Smallest request that is served without a slow path: 512 or 4096.
    pub logical_block_bytes: u32,
    /// Preferred alignment.
    pub physical_block_bytes: u32,
    /// Whether writes are served.
    pub access: Access,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn splitting_covers_the_range_once_and_never_crosses_a_block(start in 0u64..1 << 40, len in 0u64..1 << 22) {
            let range = ByteRange::new(start, len);
            let mut at = start;
            for (block, piece) in range.split_at_blocks() {
                prop_assert_eq!(piece.start(), at);
                prop_assert!(!piece.is_empty());
                prop_assert_eq!(block.range().intersect(piece), Some(piece));
                at = piece.end();
            }
            prop_assert_eq!(at, range.end());
            prop_assert_eq!(range.blocks().count(), range.split_at_blocks().count());
        }

        #[test]
        fn shrink_is_inside_and_grow_is_around(start in 0u64..1 << 30, len in 0u64..1 << 20) {
            let range = ByteRange::new(start, len);
            let inner = range.shrink_to(SECTOR_BYTES);
            let outer = range.grow_to(SECTOR_BYTES);
            prop_assert!(outer.start() <= start && range.end() <= outer.end() && outer.is_aligned(SECTOR_BYTES));
            if !inner.is_empty() {
                prop_assert!(inner.is_aligned(SECTOR_BYTES) && inner.start() >= start && inner.end() <= range.end());
                prop_assert!(inner.start() - start < SECTOR_BYTES && range.end() - inner.end() < SECTOR_BYTES);
            }
        }
    }
}
