//! One request against the disk.
//!
//! Owns: turning a checked request into calls of the handler, and refusing answers of a handler that would break
//! the stream (too short, out of order).
//! Does not own: memory bounds or replies (the transmission).

use super::budget::PIECE_BYTES_MAX;
use super::crew::Crew;
use super::reply::{FileSpan, Part};
use crate::block::{BlockError, BlockHandler, Durability, Piece, ReadPlan, Source, zero_at};
use crate::geometry::{ByteRange, SECTOR_BYTES, len_of};
use bytes::{Bytes, BytesMut};
use futures::stream::{self, StreamExt, TryStreamExt};
use std::io;

/// Missing pieces of one read that are fetched at a time.
const LOADS_MAX: usize = 16;
/// A stretch of a file from this length on is sent from it: below, a copy costs less than a call of its own.
const FILE_PART_BYTES_MIN: u64 = 64 * 1024;

/// Whether a reply may hold stretches of files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileParts {
    Taken,
    Copied,
}

/// What `handler` plans for `range`, if that covers it once, in order.
pub fn plan(handler: &dyn BlockHandler, range: ByteRange) -> Result<ReadPlan, BlockError> {
    let plan = handler.plan_read(range)?;
    let mut at_bytes = range.start();
    for piece in &plan {
        if piece.range.start() != at_bytes {
            return Err(mismatch());
        }
        at_bytes = piece.range.end();
    }
    if at_bytes == range.end() { Ok(plan) } else { Err(mismatch()) }
}

/// Whether a plan finds nothing but zeros.
pub fn is_zeros(plan: &ReadPlan) -> bool {
    plan.iter().all(|piece| matches!(piece.source, Source::Zeros))
}

/// Puts what was planned into `out`, which is zero, if no disk has to be waited for. Else `out` is anything.
pub fn fill(plan: &ReadPlan, mut out: &mut [u8]) -> bool {
    for piece in plan {
        let (this, rest) = out.split_at_mut(len_of(piece.range.len()));
        match &piece.source {
            Source::Zeros => {}
            Source::File { file, offset_bytes, .. } => match file.try_read_at(this, *offset_bytes) {
                Ok(got) if got == this.len() => {}
                Ok(_) | Err(_) => return false,
            },
            Source::Missing { .. } => return false,
        }
        out = rest;
    }
    true
}

/// The bytes of a plan, in order.
pub async fn read(
    handler: &dyn BlockHandler,
    plan: ReadPlan,
    files: FileParts,
) -> Result<Vec<Part>, BlockError> {
    stream::iter(plan.into_iter().map(|piece| fetch(handler, piece, files)))
        .buffered(LOADS_MAX)
        .try_collect()
        .await
}

async fn fetch(handler: &dyn BlockHandler, piece: Piece, files: FileParts) -> Result<Part, BlockError> {
    let data = match piece.source {
        Source::Zeros => return Ok(Part::Zeros { len_bytes: piece.range.len() }),
        Source::Missing { token } => handler.load(piece.range, &token).await?,
        Source::File { file, offset_bytes, keep } => {
            let len_bytes = piece.range.len();
            let is_handed_out = files == FileParts::Taken
                && len_bytes >= FILE_PART_BYTES_MIN
                && file.as_fd().is_some()
                && file.is_resident(offset_bytes, len_bytes)
                && keep.hand_out();
            if is_handed_out {
                return Ok(Part::File(FileSpan { file, offset_bytes, len_bytes, keep }));
            }
            let mut data = BytesMut::zeroed(len_of(len_bytes));
            let got = match file.try_read_at(&mut data, offset_bytes) {
                Ok(got) => got.min(data.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(BlockError::from_disk(&error)),
            };
            if got < data.len() {
                let rest = file
                    .read_at(offset_bytes + got as u64, data.len() - got)
                    .await
                    .map_err(|error| BlockError::from_disk(&error))?;
                if rest.len() != data.len() - got {
                    return Err(mismatch());
                }
                data[got..].copy_from_slice(&rest);
            }
            drop(keep);
            data.freeze()
        }
    };
    if data.len() as u64 == piece.range.len() { Ok(Part::Data(data)) } else { Err(mismatch()) }
}

/// Writes `data` on this thread, if there is leave to wait for the disk and nothing else to wait for.
pub fn write_now(
    handler: &dyn BlockHandler,
    offset_bytes: u64,
    data: &[u8],
    waits: Option<&Crew>,
) -> Option<Result<(), BlockError>> {
    let range = ByteRange::checked(offset_bytes, data.len() as u64)?;
    if range.is_empty() || !range.is_aligned(SECTOR_BYTES) {
        return None;
    }
    waits?.wait(|| {
        let grant = match handler.begin_write(range) {
            Ok(grant) => grant?,
            Err(error) => return Some(Err(error)),
        };
        let (file, offset_bytes) = grant.target();
        match file.write_here(data, offset_bytes) {
            Ok(()) => Some(grant.finish()),
            // Nothing was written: the same again the other way.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                grant.abort();
                Some(Err(BlockError::from_disk(&error)))
            }
        }
    })?
}

/// Makes whole sectors read as zeros.
pub async fn trim(
    handler: &dyn BlockHandler,
    range: ByteRange,
    durability: Durability,
) -> Result<(), BlockError> {
    if !range.is_empty() {
        handler.zero(range).await?;
    }
    match durability {
        Durability::Acknowledged => Ok(()),
        Durability::Flushed => handler.flush().await,
    }
}

/// Zeroes `range`, of any alignment.
pub async fn write_zeroes(
    handler: &dyn BlockHandler,
    range: ByteRange,
    durability: Durability,
) -> Result<(), BlockError> {
    if range.is_empty() {
        trim(handler, range, durability).await
    } else {
        zero_at(handler, range, durability).await
    }
}

/// Fetches what is missing of `range`, a piece at a time.
pub async fn cache(handler: &dyn BlockHandler, range: ByteRange) -> Result<(), BlockError> {
    let mut at_bytes = range.start();
    while at_bytes < range.end() {
        let window = ByteRange::new(at_bytes, (range.end() - at_bytes).min(PIECE_BYTES_MAX as u64));
        let plan = handler.plan_read(window)?;
        stream::iter(plan.into_iter().map(|piece| async move {
            match piece.source {
                Source::Missing { token } => handler.load(piece.range, &token).await.map(drop::<Bytes>),
                Source::File { .. } | Source::Zeros => Ok(()),
            }
        }))
        .buffer_unordered(LOADS_MAX)
        .try_collect::<()>()
        .await?;
        at_bytes = window.end();
        // What is here already is looked at without waiting.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// An answer of a handler that would break the stream.
pub fn mismatch() -> BlockError {
    BlockError::Io("the disk answered with another range than was asked for".into())
}
