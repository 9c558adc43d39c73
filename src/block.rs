//! The seam between frontends and volumes.
//!
//! Owns: [`BlockHandler`], the plans and grants that cross it, the errors a client can see, and the copying
//! helpers for callers that have a buffer. A frontend may move bytes itself (zero copy) with what a plan names.
//! Does not own: protocols (frontends) or where bytes lie (volumes).

use crate::disk::DiskFile;
use crate::geometry::{ByteRange, Geometry, SECTOR_BYTES, len_of};
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use smallvec::SmallVec;
use std::any::Any;
use std::io;
use std::sync::Arc;
use tokio::sync::watch;

/// Why a request was not served, named by what the caller does about it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BlockError {
    /// The request is wrong: beyond the end, or nonsense. EINVAL.
    #[error("request is outside the disk or malformed")]
    Invalid,
    /// A write to something read-only. EPERM.
    #[error("the disk is read-only")]
    ReadOnly,
    /// No local space for this write; nothing already written is lost. ENOSPC.
    #[error("no space left on the node for new writes")]
    NoSpace,
    /// The pool did not answer in time; the same request later may succeed. EIO.
    #[error("the pool does not answer: {0}")]
    Unavailable(String),
    /// The volume stopped: a sync failed, its node lost it, or it was detached. EIO or ESHUTDOWN.
    #[error("the volume has stopped: {0}")]
    Stopped(String),
    /// Data failed its check or the disk failed. EIO.
    #[error("{0}")]
    Io(String),
}

impl BlockError {
    /// An I/O error of the local disk, as a client sees it.
    pub fn from_disk(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Io(format!("local disk: {error}")),
        }
    }
}

/// Keeps whatever a piece points into alive until it is dropped.
pub type Keep = Arc<dyn Hold>;

/// What stands behind a [`Keep`].
pub trait Hold: Send + Sync + 'static {
    /// Asks whether pages of the file may be handed to somebody who looks at them after this is gone, as a socket
    /// does. If so, the same pages are never filled with anything but this stretch of this disk.
    fn hand_out(&self) -> bool;
}

/// Where the bytes of one piece of a read are.
pub enum Source {
    /// In a local file, from `offset_bytes` on, for as long as `keep` lives.
    File { file: Arc<dyn DiskFile>, offset_bytes: u64, keep: Keep },
    /// Zeros.
    Zeros,
    /// Not on this node: [`BlockHandler::load`] brings it. `token` means something to that handler only.
    Missing { token: MissingToken },
}

/// What a handler needs to find a missing piece again.
pub type MissingToken = Arc<dyn Any + Send + Sync>;

/// One piece of a planned read.
pub struct Piece {
    /// The bytes of the volume that it covers.
    pub range: ByteRange,
    /// Where they are.
    pub source: Source,
}

/// The pieces of a read, in order, covering the whole range once.
pub type ReadPlan = SmallVec<[Piece; 2]>;

/// Permission to put the bytes of one write in place. The epoch that it holds is not cut away before it is
/// finished or dropped, so take it with the whole payload at hand and give it back at once.
pub trait WriteGrant: Send + 'static {
    /// Where the bytes go: the file and the offset of the first byte.
    fn target(&self) -> (Arc<dyn DiskFile>, u64);
    /// The bytes are in place: make them count. After this the write may be acknowledged.
    ///
    /// # Errors
    /// The volume stopped meanwhile: do not acknowledge.
    fn finish(self: Box<Self>) -> Result<(), BlockError>;
    /// The bytes did not get there, wholly or in part: they never count.
    fn abort(self: Box<Self>);
}

/// What a stretch of a disk is, for NBD block status and sparse copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentKind {
    /// Holds, or may hold, data.
    Data,
    /// Reads as zeros and takes no space.
    Hole,
}

/// A stretch of a disk that is all of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    pub range: ByteRange,
    pub kind: ExtentKind,
}

/// A past state of a disk, held to be compared with; means something to the handler that gave it only.
pub type PastState = Arc<dyn Any + Send + Sync>;

/// Whether a stretch of a disk is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeKind {
    /// It differs, or may differ.
    Changed,
    /// It is the same for certain.
    Unchanged,
}

/// A stretch of a disk compared with a past state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    pub range: ByteRange,
    pub kind: ChangeKind,
}

/// A disk, as frontends see one. Ranges were checked against the size by the frontend's edge
/// ([`crate::frontend`]); a handler checks again, since the size can shrink in between.
pub trait BlockHandler: Send + Sync + 'static {
    /// Size, block sizes, access.
    fn geometry(&self) -> Geometry;

    /// Where the bytes of `range` are right now. Never blocks and never waits.
    ///
    /// # Errors
    /// `Invalid` beyond the end, `Stopped`.
    fn plan_read(&self, range: ByteRange) -> Result<ReadPlan, BlockError>;

    /// Fetches what a plan called missing; the answer covers exactly that piece's range. Bounded in memory and
    /// done once however many ask.
    ///
    /// # Errors
    /// `Unavailable`, `Io`.
    ///
    /// # Cancellation
    /// Safe; a fetch that others wait for goes on.
    fn load<'a>(
        &'a self,
        range: ByteRange,
        token: &'a MissingToken,
    ) -> BoxFuture<'a, Result<Bytes, BlockError>>;

    /// A grant for a write of whole sectors. Never blocks. `Ok(None)`: writers are being slowed down, await
    /// [`BlockHandler::writable`] and ask again.
    ///
    /// # Errors
    /// `Invalid`, `ReadOnly`, `NoSpace`, `Stopped`.
    fn begin_write(&self, range: ByteRange) -> Result<Option<Box<dyn WriteGrant>>, BlockError>;

    /// Resolves when a write that was told to wait should be tried again.
    fn writable(&self) -> BoxFuture<'_, Result<(), BlockError>>;

    /// Serialises writes of less than a sector, which read first. Held around the read and the write.
    fn small_write_turn(&self) -> &tokio::sync::Mutex<()>;

    /// Everything acknowledged before the call is on stable storage when it resolves.
    ///
    /// # Errors
    /// `Stopped`: a sync failed, and what was not yet flushed may be lost at a power loss.
    ///
    /// # Cancellation
    /// Safe; the flush goes on.
    fn flush(&self) -> BoxFuture<'_, Result<(), BlockError>>;

    /// Makes whole sectors read as zeros and gives their space back with the next commit. Serves both discard and
    /// write zeroes, of a whole disk too, without waiting for the pool.
    ///
    /// # Errors
    /// As [`BlockHandler::begin_write`].
    fn zero(&self, range: ByteRange) -> BoxFuture<'_, Result<(), BlockError>>;

    /// Data and holes of `range`, in order, covering it once; at most `extents_max` of them, so perhaps only its
    /// beginning. A hole is certain, data is a guess.
    ///
    /// # Errors
    /// `Invalid`, `Unavailable`.
    fn extents(&self, range: ByteRange, extents_max: usize)
    -> BoxFuture<'_, Result<Vec<Extent>, BlockError>>;

    /// Names of past states that [`BlockHandler::changes_since`] knows: the newest `max`, oldest first.
    ///
    /// # Errors
    /// `Unavailable`.
    fn past_states(&self, max: usize) -> BoxFuture<'_, Result<Vec<String>, BlockError>> {
        let _ = max;
        Box::pin(async { Ok(Vec::new()) })
    }

    /// The past state of that name, if there is one. Names are accepted that [`BlockHandler::past_states`] does not list.
    ///
    /// # Errors
    /// `Unavailable`, `Io`.
    fn past_state<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<PastState>, BlockError>> {
        let _ = name;
        Box::pin(async { Ok(None) })
    }

    /// What of `range` differs between `past` and now, in order, covering it once; at most `changes_max` stretches, so
    /// perhaps only its beginning. What was written before the call and is called unchanged would be missing in a
    /// backup: whoever cannot tell says that everything changed.
    ///
    /// # Errors
    /// `Invalid`, `Unavailable`.
    fn changes_since<'a>(
        &'a self,
        past: &'a PastState,
        range: ByteRange,
        changes_max: usize,
    ) -> BoxFuture<'a, Result<Vec<Change>, BlockError>> {
        let _ = (past, changes_max);
        Box::pin(async move { Ok(vec![Change { range, kind: ChangeKind::Changed }]) })
    }

    /// The size, and each change of it.
    fn size_changes(&self) -> watch::Receiver<u64>;
}

/// Whether a write may be acknowledged from the page cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// It survives a crash of the daemon; a later flush makes it survive power loss.
    Acknowledged,
    /// It survives power loss when the call returns (FUA).
    Flushed,
}

/// Appends the bytes of `range` to `out`.
///
/// # Errors
/// As [`BlockHandler::plan_read`] and [`BlockHandler::load`]; `out` then holds a part.
///
/// # Cancellation
/// Safe.
pub async fn read_at(
    handler: &dyn BlockHandler,
    range: ByteRange,
    out: &mut BytesMut,
) -> Result<(), BlockError> {
    let plan = handler.plan_read(range)?;
    for piece in plan {
        let len = len_of(piece.range.len());
        match piece.source {
            Source::Zeros => out.resize(out.len() + len, 0),
            Source::Missing { token } => out.extend_from_slice(&handler.load(piece.range, &token).await?),
            Source::File { file, offset_bytes, keep } => {
                let start = out.len();
                out.resize(start + len, 0);
                let got = match file.try_read_at(&mut out[start..], offset_bytes) {
                    Ok(got) => got,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(error) => return Err(BlockError::from_disk(&error)),
                };
                if got < len {
                    let rest = file
                        .read_at(offset_bytes + got as u64, len - got)
                        .await
                        .map_err(|error| BlockError::from_disk(&error))?;
                    out[start + got..].copy_from_slice(&rest);
                }
                drop(keep);
            }
        }
    }
    Ok(())
}

/// Writes `data` at `offset_bytes`, of any alignment.
///
/// # Errors
/// As [`BlockHandler::begin_write`]; the range then holds old bytes, new bytes, or some of each.
///
/// # Cancellation
/// A write that has begun goes on.
pub async fn write_at(
    handler: &dyn BlockHandler,
    offset_bytes: u64,
    data: Bytes,
    durability: Durability,
) -> Result<(), BlockError> {
    let range = ByteRange::checked(offset_bytes, data.len() as u64).ok_or(BlockError::Invalid)?;
    if range.is_aligned(SECTOR_BYTES) {
        write_sectors(handler, range, data).await?;
    } else {
        write_part_sectors(handler, range, data).await?;
    }
    match durability {
        Durability::Acknowledged => Ok(()),
        Durability::Flushed => handler.flush().await,
    }
}

async fn write_part_sectors(
    handler: &dyn BlockHandler,
    range: ByteRange,
    data: Bytes,
) -> Result<(), BlockError> {
    let _turn = handler.small_write_turn().lock().await;
    let outer = range.grow_to(SECTOR_BYTES);
    let head = ByteRange::new(outer.start(), range.start() - outer.start());
    let tail = ByteRange::new(range.end(), outer.end() - range.end());
    let mut whole = BytesMut::with_capacity(len_of(outer.len()));
    if !head.is_empty() {
        read_at(handler, head, &mut whole).await?;
    }
    whole.extend_from_slice(&data);
    if !tail.is_empty() {
        read_at(handler, tail, &mut whole).await?;
    }
    write_sectors(handler, outer, whole.freeze()).await
}

/// Zeroes `range`, of any alignment.
///
/// # Errors
/// As [`BlockHandler::zero`].
pub async fn zero_at(
    handler: &dyn BlockHandler,
    range: ByteRange,
    durability: Durability,
) -> Result<(), BlockError> {
    let inner = range.shrink_to(SECTOR_BYTES);
    if inner.is_empty() {
        if !range.is_empty() {
            let zeros = Bytes::from(vec![0; len_of(range.len())]);
            write_part_sectors(handler, range, zeros).await?;
        }
    } else {
        handler.zero(inner).await?;
        let edges = [
            ByteRange::new(range.start(), inner.start() - range.start()),
            ByteRange::new(inner.end(), range.end() - inner.end()),
        ];
        for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
            write_part_sectors(handler, edge, Bytes::from(vec![0; len_of(edge.len())])).await?;
        }
    }
    match durability {
        Durability::Acknowledged => Ok(()),
        Durability::Flushed => handler.flush().await,
    }
}

async fn write_sectors(handler: &dyn BlockHandler, range: ByteRange, data: Bytes) -> Result<(), BlockError> {
    let grant = loop {
        match handler.begin_write(range)? {
            Some(grant) => break grant,
            None => handler.writable().await?,
        }
    };
    let (file, offset_bytes) = grant.target();
    match file.try_write_at(&data, offset_bytes) {
        Ok(written) if written == data.len() => return grant.finish(),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => {
            grant.abort();
            return Err(BlockError::from_disk(&error));
        }
    }
    // On a task of its own: a client that goes away must not end the grant while a thread still writes its bytes.
    let task = tokio::spawn(async move {
        match file.write_at(data, offset_bytes).await {
            Ok(()) => grant.finish(),
            Err(error) => {
                grant.abort();
                Err(BlockError::from_disk(&error))
            }
        }
    });
    match task.await {
        Ok(result) => result,
        Err(_) => Err(BlockError::Stopped("the daemon is stopping".into())),
    }
}
