//! Speaks block protocols; knows no volume.
//!
//! Owns: the check of every request from outside against the disk's size, access and block size, once for all
//! frontends.
//! Does not own: what a protocol answers to a refused request (each frontend), or the check a handler makes again
//! because the size may change in between ([`crate::block::BlockHandler`]).

pub mod nbd;

use crate::block::BlockError;
use crate::geometry::{Access, ByteRange, Geometry};

/// Whether a request changes the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Reads, block status, cache hints.
    Read,
    /// Writes, zeroes, discards.
    Write,
}

/// The range of a request of any alignment, checked against the disk. An empty one within the disk passes.
///
/// # Errors
/// `ReadOnly` for a write to a read-only disk, wherever it points; `Invalid` beyond the end.
pub fn check(
    start_bytes: u64,
    len_bytes: u64,
    geometry: &Geometry,
    operation: Operation,
) -> Result<ByteRange, BlockError> {
    if operation == Operation::Write && geometry.access == Access::ReadOnly {
        return Err(BlockError::ReadOnly);
    }
    ByteRange::checked(start_bytes, len_bytes)
        .filter(|range| range.end() <= geometry.size_bytes)
        .ok_or(BlockError::Invalid)
}

/// As [`check`], for protocols whose clients promise whole logical blocks.
///
/// # Errors
/// As [`check`], and `Invalid` for parts of blocks.
pub fn check_aligned(
    start_bytes: u64,
    len_bytes: u64,
    geometry: &Geometry,
    operation: Operation,
) -> Result<ByteRange, BlockError> {
    let range = check(start_bytes, len_bytes, geometry, operation)?;
    if range.is_aligned(u64::from(geometry.logical_block_bytes)) {
        Ok(range)
    } else {
        Err(BlockError::Invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(access: Access) -> Geometry {
        Geometry { size_bytes: 10_240, logical_block_bytes: 512, physical_block_bytes: 4096, access }
    }

    #[test]
    fn the_last_byte_is_inside_and_the_next_is_not() {
        let disk = disk(Access::ReadWrite);
        for operation in [Operation::Read, Operation::Write] {
            assert_eq!(check(10_239, 1, &disk, operation), Ok(ByteRange::new(10_239, 1)));
            assert_eq!(check(10_240, 0, &disk, operation), Ok(ByteRange::new(10_240, 0)));
            assert_eq!(check(0, 10_240, &disk, operation), Ok(ByteRange::new(0, 10_240)));
            assert_eq!(check(10_240, 1, &disk, operation), Err(BlockError::Invalid));
            assert_eq!(check(10_239, 2, &disk, operation), Err(BlockError::Invalid));
            assert_eq!(check(10_241, 0, &disk, operation), Err(BlockError::Invalid));
            assert_eq!(check(u64::MAX, 1, &disk, operation), Err(BlockError::Invalid));
            assert_eq!(check(u64::MAX, u64::MAX, &disk, operation), Err(BlockError::Invalid));
        }
    }

    #[test]
    fn a_read_only_disk_refuses_writes_and_serves_reads() {
        let disk = disk(Access::ReadOnly);
        assert_eq!(check(0, 512, &disk, Operation::Read), Ok(ByteRange::new(0, 512)));
        assert_eq!(check(0, 512, &disk, Operation::Write), Err(BlockError::ReadOnly));
        assert_eq!(check(u64::MAX, 512, &disk, Operation::Write), Err(BlockError::ReadOnly));
    }

    #[test]
    fn parts_of_blocks_pass_only_where_they_are_allowed() {
        let disk = disk(Access::ReadWrite);
        assert!(check(1, 3, &disk, Operation::Write).is_ok());
        assert_eq!(check_aligned(1, 511, &disk, Operation::Write), Err(BlockError::Invalid));
        assert_eq!(check_aligned(0, 511, &disk, Operation::Read), Err(BlockError::Invalid));
        assert!(check_aligned(512, 1024, &disk, Operation::Read).is_ok());
    }
}
