//! The engine: volumes on epochs, a clean cache and a pool. Knows no frontend.
//!
//! Owns: [`Volume`], the read, write and flush paths, and that a volume stops when it must.
//! Does not own: making its data durable in the pool ([`destage`]), finding it again ([`attach`]), names ([`catalog`]).

pub mod attach;
pub mod base;
pub mod cache;
pub mod catalog;
pub mod changes;
pub mod destage;
pub mod engine;
pub mod epoch;
mod eviction;
pub mod flush;
pub mod format;
pub mod head;
pub mod ids;
pub mod image;
pub mod layers;
pub mod load;
pub mod map;
pub mod pack;
pub mod pressure;
pub mod read_only;
pub mod sector_map;
pub mod segment;
pub mod source;

use crate::block::{
    BlockError, BlockHandler, Change, Extent, ExtentKind, MissingToken, PastState, Piece, ReadPlan, Source,
    WriteGrant,
};
use crate::disk::DiskFile;
use crate::geometry::{Access, BLOCK_LEN, BlockIndex, ByteRange, Geometry, SECTOR_BYTES, len_of};
use crate::mutant::{self, Mutant};
use crate::volume::base::{BaseMap, Found, load_block};
use crate::volume::engine::{Engine, EngineError};
use crate::volume::epoch::{Epoch, FirstWrite};
use crate::volume::ids::Uid;
use crate::volume::layers::{Layers, Where};
use crate::volume::pressure::Level;
use crate::volume::sector_map::Touch;
use crate::volume::segment::SEGMENT_BLOCKS;
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt, TryStreamExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// How long a write waits for space before it is refused.
const FULL_WAIT: Duration = Duration::from_secs(20);
/// How often free space is looked at while a write waits for it.
const FULL_LOOK: Duration = Duration::from_millis(250);
/// How long each write waits while writers are slowed down.
const SLOW_WAIT: Duration = Duration::from_millis(5);
/// A zeroing of more than this is done off the caller's thread.
const ZERO_INLINE_BYTES: u64 = 64 << 30;
/// Blocks that one load fetches at once.
const LOAD_AT_ONCE: usize = 8;
/// Bytes that are looked at for extents without letting others run: every sector may be one of its own.
const EXTENTS_STRETCH_BYTES: u64 = 64 << 20;
/// Bytes that are looked at together as long as no epoch says anything of them.
const EXTENTS_EMPTY_BYTES: u64 = 1 << 30;
/// Bytes that one call looks at for extents.
const EXTENTS_BYTES_MAX: u64 = 64 << 30;

impl From<EngineError> for BlockError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Unavailable(text) | EngineError::Unclear(text) => Self::Unavailable(text),
            EngineError::NoSpace(_) => Self::NoSpace,
            EngineError::Stopped(text) => Self::Stopped(text),
            EngineError::Corrupt(text)
            | EngineError::NotFound(text)
            | EngineError::Conflict(text)
            | EngineError::Source(text)
            | EngineError::Disk(text) => Self::Io(text),
        }
    }
}

/// What frontends and the destager of one attached volume share.
pub struct Volume {
    engine: Arc<Engine>,
    uid: Uid,
    layers: ArcSwap<Layers>,
    /// Number of the active epoch: what a writer looks at a second time.
    active: AtomicU64,
    /// What clients see; lowered before a shrink begins, raised after a grow is done.
    size_bytes: AtomicU64,
    size_changes: watch::Sender<u64>,
    stopped: AtomicBool,
    refusing: AtomicBool,
    stop_reason: OnceLock<String>,
    stops: watch::Sender<bool>,
    /// The last writer has left a frozen epoch.
    drained: Notify,
    /// Something for the destager to look at.
    dirtied: Notify,
    small_writes: tokio::sync::Mutex<()>,
    flushes: flush::FlushQueue,
    /// Writes that may pass although writers are slowed down.
    slow_passes: AtomicU64,
    counters: Counters,
}

/// What a volume did since it was attached.
#[derive(Default)]
pub struct Counters {
    pub commits: AtomicU64,
    pub committed_bytes: AtomicU64,
    pub cold_loads: AtomicU64,
    /// Wall clock of the last commit, in milliseconds since 1970; 0: none known.
    pub last_commit_unix_ms: AtomicU64,
}

impl Volume {
    fn new(engine: Arc<Engine>, uid: Uid, layers: Layers, size_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            engine,
            uid,
            active: AtomicU64::new(layers.active.number()),
            layers: ArcSwap::from_pointee(layers),
            size_bytes: AtomicU64::new(size_bytes),
            size_changes: watch::Sender::new(size_bytes),
            stopped: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            stop_reason: OnceLock::new(),
            stops: watch::Sender::new(false),
            drained: Notify::new(),
            dirtied: Notify::new(),
            small_writes: tokio::sync::Mutex::new(()),
            flushes: flush::FlushQueue::default(),
            slow_passes: AtomicU64::new(0),
            counters: Counters::default(),
        })
    }

    /// Identity of the volume.
    pub fn uid(&self) -> Uid {
        self.uid
    }

    /// The term that it is attached in.
    pub fn term(&self) -> u64 {
        self.layers.load().active.header().term
    }

    /// What it did.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Bytes that are not in the pool, overwrites counted again, and since when.
    pub fn dirty(&self) -> (u64, Option<tokio::time::Instant>) {
        let layers = self.layers.load();
        let bytes = layers.epochs().map(|epoch| epoch.dirty_bytes()).sum();
        let oldest = layers.epochs().filter_map(|epoch| epoch.first_dirty()).min();
        (bytes, oldest)
    }

    /// Stops the volume for good: its data is kept, nothing more is acknowledged or committed.
    pub fn stop(&self, reason: impl Into<String>) {
        self.stop_logged(reason.into(), log::Level::Error);
    }

    /// As [`Volume::stop`], for a volume that was asked to.
    fn end(&self, reason: impl Into<String>) {
        self.stop_logged(reason.into(), log::Level::Info);
    }

    fn stop_logged(&self, reason: String, level: log::Level) {
        if self.stop_reason.set(reason.clone()).is_ok() {
            log::log!(level, volume = self.uid.to_string().as_str(); "volume stops: {reason}");
            self.stopped.store(true, Ordering::SeqCst);
            self.stops.send_replace(true);
            self.dirtied.notify_one();
            self.drained.notify_one();
        }
    }

    /// Why it stopped, if it has.
    pub fn stop_reason(&self) -> Option<&str> {
        self.stop_reason.get().map(String::as_str)
    }

    /// Turns true when the volume stops.
    pub fn stops(&self) -> watch::Receiver<bool> {
        self.stops.subscribe()
    }

    fn check_running(&self) -> Result<(), BlockError> {
        if self.stopped.load(Ordering::SeqCst) {
            return Err(BlockError::Stopped(self.stop_reason().unwrap_or("stopped").to_owned()));
        }
        if self.refusing.load(Ordering::SeqCst) {
            return Err(BlockError::Stopped("it is being detached".into()));
        }
        Ok(())
    }

    fn check_readable(&self, range: ByteRange) -> Result<(), BlockError> {
        self.check_running()?;
        if range.end() <= self.size() { Ok(()) } else { Err(BlockError::Invalid) }
    }

    /// Refuses, or takes again, all I/O of clients, while the volume is given up.
    fn refuse_io(&self, refuse: bool) {
        self.refusing.store(refuse, Ordering::SeqCst);
    }

    /// Shows clients another size.
    fn show_size(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, Ordering::SeqCst);
        self.size_changes.send_replace(size_bytes);
    }

    fn size(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    /// Enters the active epoch. Whoever entered leaves soon, waiting for nothing but the local disk.
    fn enter(&self) -> Arc<Epoch> {
        loop {
            let epoch = self.layers.load().active.clone();
            if sector_map::enter(&self.active, epoch.number(), &epoch.writers) {
                return epoch;
            }
            self.leave(&epoch);
            // The number follows the layers at once.
            std::hint::spin_loop();
        }
    }

    fn leave(&self, epoch: &Epoch) {
        if sector_map::leave(&self.active, epoch.number(), &epoch.writers) {
            self.drained.notify_one();
        }
    }

    /// Enters for a change of `range`, whole sectors, if the volume takes it.
    fn enter_for(&self, range: ByteRange) -> Result<Arc<Epoch>, BlockError> {
        if !range.is_aligned(SECTOR_BYTES) {
            return Err(BlockError::Invalid);
        }
        let epoch = self.enter();
        // Looked at after entering: a shrink lowers the size and then waits until everybody is out.
        let result = self.check_running().and_then(|()| {
            if range.end() <= self.size().min(epoch.header().size_bytes) {
                Ok(())
            } else {
                Err(BlockError::Invalid)
            }
        });
        match result {
            Ok(()) => Ok(epoch),
            Err(error) => {
                self.leave(&epoch);
                Err(error)
            }
        }
    }

    fn allocate(&self, epoch: &Epoch, range: ByteRange, what: Touch) -> Result<(), BlockError> {
        let before = epoch.map().touched_pages();
        let result = epoch.map().allocate(range, what).map_err(|error| BlockError::from_disk(&error));
        let more = epoch.map().touched_pages().saturating_sub(before);
        if more > 0 {
            self.engine.pressure.note_map_pages(more, 0);
        }
        result
    }

    /// Counts a change whose record is made, and tells the destager what it has to know.
    fn count(&self, epoch: &Epoch, bytes: u64) {
        let first = epoch.count_write(bytes);
        let due = self.engine.config.commit_dirty_bytes;
        let dirty = epoch.dirty_bytes();
        if first == FirstWrite::Yes || (dirty >= due && dirty - bytes.min(dirty) < due) {
            self.dirtied.notify_one();
        }
    }

    fn zero_now(&self, range: ByteRange) -> Result<(), BlockError> {
        let epoch = self.enter_for(range)?;
        let result = self.zero_in(&epoch, range);
        self.leave(&epoch);
        result?;
        self.check_running()
    }

    fn zero_in(&self, epoch: &Epoch, range: ByteRange) -> Result<(), BlockError> {
        // Taken after entering: what is frozen later than this was active, and is this very epoch.
        let layers = self.layers.load();
        let mut recorded = 0;
        let whole = range.shrink_to(crate::geometry::BLOCK_BYTES);
        let edges = if whole.is_empty() {
            [Some(range), None]
        } else {
            [
                Some(ByteRange::new(range.start(), whole.start() - range.start())),
                Some(ByteRange::new(whole.end(), range.end() - whole.end())),
            ]
        };
        for (_, piece) in edges.into_iter().flatten().flat_map(ByteRange::split_at_blocks) {
            if self.needs_record(&layers, piece) {
                self.allocate(epoch, piece, Touch::Words)?;
                epoch.map().mark_zeroed(piece);
                recorded += piece.len();
            }
        }
        let mut start = whole.blocks().start;
        while start < whole.blocks().end {
            let end = ((start / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS).min(whole.blocks().end);
            let first = BlockIndex(start).start_bytes();
            let piece = ByteRange::new(first, BlockIndex(end).start_bytes() - first);
            if self.needs_record(&layers, piece) {
                self.allocate(epoch, piece, Touch::BlockBits)?;
                epoch.map().mark_blocks_zeroed(start..end);
                recorded += piece.len();
            }
            start = end;
        }
        if recorded > 0 {
            // What a zero costs until it is committed is its record, not its length.
            self.count(epoch, recorded.min(SECTOR_BYTES));
        }
        Ok(())
    }

    /// Whether a zero has to be recorded: only what no epoch has any record of, and the base knows as zero, has not. A
    /// zero in an epoch is a record: it may not be on disk yet.
    fn needs_record(&self, layers: &Layers, range: ByteRange) -> bool {
        if mutant::on(Mutant::DiscardSkipsFrozen) {
            return layers.active.map().has_record(range) || !layers.base.is_zero(range.blocks());
        }
        layers.epochs().any(|epoch| epoch.map().has_record(range)) || !layers.base.is_zero(range.blocks())
    }

    fn plan_below(&self, base: &Arc<BaseMap>, range: ByteRange, plan: &mut ReadPlan) {
        for (block, piece) in range.split_at_blocks() {
            let source = match base.find(&self.engine, block) {
                Found::Zero => Source::Zeros,
                Found::At(location) => cached_or_missing(&self.engine, base, &location.stored.hash, piece),
                Found::InSegment(_) => missing(base),
            };
            push_piece(plan, piece, source);
        }
    }
}

/// The token of pieces that only the pool has.
struct MissingIn(Arc<BaseMap>);

fn missing(base: &Arc<BaseMap>) -> Source {
    Source::Missing { token: Arc::new(MissingIn(base.clone())) }
}

fn cached_or_missing(
    engine: &Engine,
    base: &Arc<BaseMap>,
    hash: &ids::ContentHash,
    piece: ByteRange,
) -> Source {
    match engine.cache.get(hash) {
        None => missing(base),
        Some(pinned) => Source::File {
            file: pinned.file(),
            offset_bytes: pinned.offset_bytes() + piece.start() % crate::geometry::BLOCK_BYTES,
            keep: Arc::new(pinned),
        },
    }
}

/// Adds a piece, as a part of the one before where that says the same.
fn push_piece(plan: &mut ReadPlan, range: ByteRange, source: Source) {
    if let Some(last) = plan.last_mut()
        && last.range.end() == range.start()
        && matches!(
            (&last.source, &source),
            (Source::Zeros, Source::Zeros) | (Source::Missing { .. }, Source::Missing { .. })
        )
    {
        last.range = ByteRange::new(last.range.start(), last.range.len() + range.len());
        return;
    }
    plan.push(Piece { range, source });
}

/// Brings the blocks of `range` from the pool.
async fn load_range(
    engine: &Arc<Engine>,
    range: ByteRange,
    token: &MissingToken,
) -> Result<Bytes, EngineError> {
    let Some(MissingIn(base)) = token.downcast_ref::<MissingIn>() else {
        return Err(EngineError::Corrupt("a read was planned by another volume".into()));
    };
    let pieces: Vec<_> = range.split_at_blocks().collect();
    let mut loads = stream::iter(pieces)
        .map(|(block, piece)| async move {
            let content = match base.locate(engine, block).await? {
                None => None,
                Some(location) => Some(load_block(engine, location).await?),
            };
            let from = len_of(piece.start() - block.start_bytes());
            Ok::<_, EngineError>((piece, content.map(|bytes| bytes.slice(from..from + len_of(piece.len())))))
        })
        .buffered(LOAD_AT_ONCE);
    let mut whole = BytesMut::new();
    while let Some((piece, content)) = loads.try_next().await? {
        match content {
            // The common case, one block, without a copy.
            Some(bytes) if piece == range => return Ok(bytes),
            Some(bytes) => whole.extend_from_slice(&bytes),
            None => whole.resize(whole.len() + len_of(piece.len()), 0),
        }
    }
    Ok(whole.freeze())
}

/// Data and holes by what the epochs say; none where they say nothing.
fn recorded_extents(layers: &Layers, stretch: ByteRange) -> Vec<(ByteRange, Option<ExtentKind>)> {
    let mut kinds = Vec::new();
    layers.resolve(stretch.grow_to(SECTOR_BYTES), |piece, place| {
        let Some(piece) = piece.intersect(stretch) else { return };
        let kind = match place {
            Where::Epoch(_) => Some(ExtentKind::Data),
            Where::Zero => Some(ExtentKind::Hole),
            Where::Below => None,
        };
        kinds.push((piece, kind));
    });
    kinds
}

/// Data and holes below all epochs.
async fn base_extents(
    engine: &Arc<Engine>,
    base: &Arc<BaseMap>,
    range: ByteRange,
    extents: &mut Vec<Extent>,
) -> Result<(), EngineError> {
    let mut at = range.start();
    while at < range.end() {
        let block = BlockIndex::of(at);
        let segment_end = BlockIndex((block.0 / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS).start_bytes();
        let stretch = ByteRange::new(at, segment_end.min(range.end()) - at);
        if base.is_zero(stretch.blocks()) {
            push_extent(extents, stretch, ExtentKind::Hole);
        } else {
            for (block, piece) in stretch.split_at_blocks() {
                let kind = match base.locate(engine, block).await? {
                    None => ExtentKind::Hole,
                    Some(_) => ExtentKind::Data,
                };
                push_extent(extents, piece, kind);
            }
        }
        at = stretch.end();
    }
    Ok(())
}

fn push_extent(extents: &mut Vec<Extent>, range: ByteRange, kind: ExtentKind) {
    match extents.last_mut() {
        Some(last) if last.kind == kind && last.range.end() == range.start() => {
            last.range = ByteRange::new(last.range.start(), last.range.len() + range.len());
        }
        _ => extents.push(Extent { range, kind }),
    }
}

/// A write that has entered its epoch.
struct Grant {
    volume: Arc<Volume>,
    epoch: Arc<Epoch>,
    range: ByteRange,
    inside: bool,
}

impl Grant {
    fn exit(&mut self) {
        if std::mem::take(&mut self.inside) {
            self.volume.leave(&self.epoch);
        }
    }
}

impl WriteGrant for Grant {
    fn target(&self) -> (Arc<dyn DiskFile>, u64) {
        (self.epoch.file().clone(), self.epoch.position(self.range.start()))
    }

    fn finish(mut self: Box<Self>) -> Result<(), BlockError> {
        // Data before its bit: a crash between them may lose the write, never invent one.
        self.epoch.map().mark_written(self.range);
        self.volume.count(&self.epoch, self.range.len());
        self.exit();
        self.volume.check_running()
    }

    fn abort(mut self: Box<Self>) {
        self.exit();
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.exit();
    }
}

/// A [`Volume`] as a [`BlockHandler`].
pub struct VolumeHandler(pub Arc<Volume>);

impl BlockHandler for VolumeHandler {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.0.size(),
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadWrite,
        }
    }

    fn plan_read(&self, range: ByteRange) -> Result<ReadPlan, BlockError> {
        let volume = &self.0;
        volume.check_readable(range)?;
        let layers = volume.layers.load();
        let mut plan = ReadPlan::new();
        layers.resolve(range.grow_to(SECTOR_BYTES), |stretch, place| {
            let Some(stretch) = stretch.intersect(range) else { return };
            match place {
                Where::Zero => push_piece(&mut plan, stretch, Source::Zeros),
                Where::Below => volume.plan_below(&layers.base, stretch, &mut plan),
                Where::Epoch(epoch) => {
                    let source = Source::File {
                        file: epoch.file().clone(),
                        offset_bytes: epoch.position(stretch.start()),
                        keep: epoch.clone(),
                    };
                    plan.push(Piece { range: stretch, source });
                }
            }
        });
        Ok(plan)
    }

    fn load<'a>(
        &'a self,
        range: ByteRange,
        token: &'a MissingToken,
    ) -> BoxFuture<'a, Result<Bytes, BlockError>> {
        Box::pin(async move {
            self.0.counters.cold_loads.fetch_add(1, Ordering::Relaxed);
            Ok(load_range(&self.0.engine, range, token).await?)
        })
    }

    fn begin_write(&self, range: ByteRange) -> Result<Option<Box<dyn WriteGrant>>, BlockError> {
        let volume = &self.0;
        match volume.engine.pressure.level() {
            Level::Fine | Level::Commit => {}
            Level::Slow | Level::Full => {
                volume.check_running()?;
                let pass = volume
                    .slow_passes
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |passes| passes.checked_sub(1));
                if pass.is_err() {
                    return Ok(None);
                }
            }
        }
        let epoch = volume.enter_for(range)?;
        let grant = Box::new(Grant { volume: volume.clone(), epoch, range, inside: true });
        volume.allocate(&grant.epoch, range, Touch::Words)?;
        volume.engine.pressure.note_write(range.len());
        if mutant::on(Mutant::BitBeforeData) {
            grant.epoch.map().mark_written(range);
        }
        Ok(Some(grant))
    }

    fn writable(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async move {
            let volume = &self.0;
            let mut level = volume.engine.pressure.changes();
            if *level.borrow_and_update() == Level::Full {
                volume.dirtied.notify_one();
                let better = async {
                    loop {
                        // The space of a removed file comes back when its last close is through, which nobody tells.
                        volume.engine.pressure.look_soon();
                        let better = level.wait_for(|level| *level < Level::Full);
                        if tokio::time::timeout(FULL_LOOK, better).await.is_ok() {
                            return;
                        }
                    }
                };
                if tokio::time::timeout(FULL_WAIT, better).await.is_err() {
                    return Err(BlockError::NoSpace);
                }
            }
            if volume.engine.pressure.level() == Level::Slow {
                tokio::time::sleep(SLOW_WAIT).await;
                volume.slow_passes.fetch_add(1, Ordering::Relaxed);
            }
            volume.check_running()
        })
    }

    fn small_write_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.0.small_writes
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(flush::flush(&self.0))
    }

    fn zero(&self, range: ByteRange) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async move {
            if range.len() <= ZERO_INLINE_BYTES {
                return self.0.zero_now(range);
            }
            let volume = self.0.clone();
            self.0.engine.offload.run(move || volume.zero_now(range)).await
        })
    }

    fn extents(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, BlockError>> {
        Box::pin(async move {
            let volume = &self.0;
            volume.check_readable(range)?;
            let layers = volume.layers.load_full();
            let mut extents = Vec::new();
            let end = range.end().min(range.start().saturating_add(EXTENTS_BYTES_MAX));
            let mut at = range.start();
            while at < end && extents.len() <= extents_max {
                let is_recorded = |stretch| layers.epochs().any(|epoch| epoch.map().has_record(stretch));
                let whole = ByteRange::new(at, (end - at).min(EXTENTS_EMPTY_BYTES));
                let part = ByteRange::new(at, whole.len().min(EXTENTS_STRETCH_BYTES));
                let (stretch, kinds) = match [whole, part].into_iter().find(|stretch| !is_recorded(*stretch))
                {
                    Some(stretch) => (stretch, vec![(stretch, None)]),
                    None => (part, recorded_extents(&layers, part)),
                };
                for (piece, kind) in kinds {
                    match kind {
                        Some(kind) => push_extent(&mut extents, piece, kind),
                        None => base_extents(&volume.engine, &layers.base, piece, &mut extents).await?,
                    }
                }
                at = stretch.end();
                if at < end {
                    tokio::task::yield_now().await;
                }
            }
            extents.truncate(extents_max);
            Ok(extents)
        })
    }

    fn past_states(&self, max: usize) -> BoxFuture<'_, Result<Vec<String>, BlockError>> {
        Box::pin(async move { Ok(changes::names(&self.0.engine, &self.0.uid, max).await?) })
    }

    fn past_state<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<PastState>, BlockError>> {
        Box::pin(async move { Ok(changes::find(&self.0.engine, &self.0.uid, name).await?) })
    }

    fn changes_since<'a>(
        &'a self,
        past: &'a PastState,
        range: ByteRange,
        changes_max: usize,
    ) -> BoxFuture<'a, Result<Vec<Change>, BlockError>> {
        Box::pin(async move {
            let volume = &self.0;
            volume.check_readable(range)?;
            let layers = volume.layers.load_full();
            let now = changes::Now::Layers(&layers);
            changes::changes(&volume.engine, &volume.uid, now, past, range, changes_max).await
        })
    }

    fn size_changes(&self) -> watch::Receiver<u64> {
        self.0.size_changes.subscribe()
    }
}

const _: () = assert!(BLOCK_LEN.is_multiple_of(4096), "slots of the cache stay page-aligned");
