//! A state in the pool served as it is: images and snapshots.
//!
//! Owns: reads of a map that never changes.
//! Does not own: keeping that map from a sweep.

use crate::block::{
    BlockError, BlockHandler, Change, ChangeKind, Extent, MissingToken, PastState, ReadPlan, WriteGrant,
};
use crate::geometry::{Access, ByteRange, Geometry};
use crate::volume::base::{BaseMap, Found};
use crate::volume::changes;
use crate::volume::engine::Engine;
use crate::volume::ids::Uid;
use crate::volume::{base_extents, cached_or_missing, load_range, missing, push_piece};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::watch;

/// An image or snapshot as a disk.
pub struct ReadOnlyDisk {
    engine: Arc<Engine>,
    base: Arc<BaseMap>,
    /// Whose snapshot it is.
    volume: Option<Uid>,
    size_bytes: u64,
    size_changes: watch::Sender<u64>,
    small_writes: tokio::sync::Mutex<()>,
}

impl ReadOnlyDisk {
    /// A disk of `size_bytes` over `base`.
    pub fn new(engine: Arc<Engine>, base: Arc<BaseMap>, size_bytes: u64) -> Self {
        Self {
            engine,
            base,
            volume: None,
            size_bytes,
            size_changes: watch::Sender::new(size_bytes),
            small_writes: tokio::sync::Mutex::new(()),
        }
    }

    /// As a state of that volume, which can be compared with others of its states.
    pub fn of_volume(self, uid: Uid) -> Self {
        Self { volume: Some(uid), ..self }
    }

    fn check(&self, range: ByteRange) -> Result<(), BlockError> {
        if range.end() <= self.size_bytes { Ok(()) } else { Err(BlockError::Invalid) }
    }
}

impl BlockHandler for ReadOnlyDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadOnly,
        }
    }

    fn plan_read(&self, range: ByteRange) -> Result<ReadPlan, BlockError> {
        self.check(range)?;
        let mut plan = ReadPlan::new();
        for (block, piece) in range.split_at_blocks() {
            let source = match self.base.find(&self.engine, block) {
                Found::Zero => crate::block::Source::Zeros,
                Found::At(location) => {
                    cached_or_missing(&self.engine, &self.base, &location.stored.hash, piece)
                }
                Found::InSegment(_) => missing(&self.base),
            };
            push_piece(&mut plan, piece, source);
        }
        Ok(plan)
    }

    fn load<'a>(
        &'a self,
        range: ByteRange,
        token: &'a MissingToken,
    ) -> BoxFuture<'a, Result<Bytes, BlockError>> {
        Box::pin(async move { Ok(load_range(&self.engine, range, token).await?) })
    }

    fn begin_write(&self, _range: ByteRange) -> Result<Option<Box<dyn WriteGrant>>, BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn writable(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async { Err(BlockError::ReadOnly) })
    }

    fn small_write_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.small_writes
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async { Ok(()) })
    }

    fn zero(&self, _range: ByteRange) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async { Err(BlockError::ReadOnly) })
    }

    fn extents(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, BlockError>> {
        Box::pin(async move {
            self.check(range)?;
            let mut extents = Vec::new();
            base_extents(&self.engine, &self.base, range, &mut extents).await?;
            extents.truncate(extents_max);
            Ok(extents)
        })
    }

    fn past_states(&self, max: usize) -> BoxFuture<'_, Result<Vec<String>, BlockError>> {
        Box::pin(async move {
            let Some(uid) = &self.volume else { return Ok(Vec::new()) };
            Ok(changes::names(&self.engine, uid, max).await?)
        })
    }

    fn past_state<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<PastState>, BlockError>> {
        Box::pin(async move {
            let Some(uid) = &self.volume else { return Ok(None) };
            Ok(changes::find(&self.engine, uid, name).await?)
        })
    }

    fn changes_since<'a>(
        &'a self,
        past: &'a PastState,
        range: ByteRange,
        changes_max: usize,
    ) -> BoxFuture<'a, Result<Vec<Change>, BlockError>> {
        Box::pin(async move {
            self.check(range)?;
            let Some(uid) = &self.volume else {
                return Ok(vec![Change { range, kind: ChangeKind::Changed }]);
            };
            changes::changes(&self.engine, uid, changes::Now::Map(&self.base), past, range, changes_max).await
        })
    }

    fn size_changes(&self) -> watch::Receiver<u64> {
        self.size_changes.subscribe()
    }
}
