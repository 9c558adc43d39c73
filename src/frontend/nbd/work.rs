//! One request against the disk.
//!
//! Owns: turning a checked request into calls of the handler, and refusing answers of a handler that would break
//! the stream (too short, out of order).
//! Does not own: memory bounds or replies (the transmission).

use super::budget::PIECE_BYTES_MAX;
use super::reply::Part;
use crate::block::{BlockError, BlockHandler, Durability, Piece, Source, zero_at};
use crate::geometry::{ByteRange, len_of};
use bytes::{Bytes, BytesMut};
use futures::stream::{self, StreamExt, TryStreamExt};
use std::io;

/// Missing pieces of one read that are fetched at a time.
const LOADS_MAX: usize = 16;

/// The bytes of `range`, in order, covering it once.
pub async fn read(handler: &dyn BlockHandler, range: ByteRange) -> Result<Vec<Part>, BlockError> {
    let plan = handler.plan_read(range)?;
    let mut at_bytes = range.start();
    for piece in &plan {
        if piece.range.start() != at_bytes {
            return Err(mismatch());
        }
        at_bytes = piece.range.end();
    }
    if at_bytes != range.end() {
        return Err(mismatch());
    }
    stream::iter(plan.into_iter().map(|piece| fetch(handler, piece))).buffered(LOADS_MAX).try_collect().await
}

async fn fetch(handler: &dyn BlockHandler, piece: Piece) -> Result<Part, BlockError> {
    let data = match piece.source {
        Source::Zeros => return Ok(Part::Zeros { len_bytes: piece.range.len() }),
        Source::Missing { token } => handler.load(piece.range, &token).await?,
        Source::File { file, offset_bytes, keep } => {
            let mut data = BytesMut::zeroed(len_of(piece.range.len()));
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
