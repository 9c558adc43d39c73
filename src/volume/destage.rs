//! Takes a volume's epochs to its pool: cut, pack, map, head. All changes of a volume's head take turns here.
//!
//! Owns: the destager, one task a volume, which alone holds the head; when a commit is due; cut, commit, resize,
//! snapshot, release.
//! Does not own: the formats, or what a client sees meanwhile.

use crate::clock::UnixMillis;
use crate::disk::DiskPath;
use crate::geometry::{BLOCK_LEN, BlockIndex, ByteRange, block_count, len_of};
use crate::mutant::{self, Mutant};
use crate::store::{ETag, Expect, Key};
use crate::volume::Volume;
use crate::volume::base::{BaseMap, load_block};
use crate::volume::engine::{Engine, EngineError, Stamps};
use crate::volume::epoch::{Epoch, EpochHeader};
use crate::volume::head::{Head, SmallObject, SnapshotObject, TermEnd, keys};
use crate::volume::ids::{ContentHash, Uid};
use crate::volume::layers::{Layers, Where, resolve};
use crate::volume::map::{Fold, Map, MapRef, should_fold};
use crate::volume::pack::{EncodedBlock, PackBuilder, PackIndex, PackRef, encode_block};
use crate::volume::pressure::Level;
use crate::volume::sector_map;
use crate::volume::segment::{SEGMENT_BLOCKS, segment_of};
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Blocks that one commit reads and compresses at once.
const BLOCKS_AT_ONCE: usize = 8;
/// Blocks that are hashed and compressed in one go on a thread.
const BLOCKS_A_BATCH: usize = 4;
/// A segments object is put when it is this large, and the next one begun.
const SEGMENTS_OBJECT_BYTES: usize = 32 << 20;

type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// What is asked of a destager.
pub enum Request {
    /// Commit what is acknowledged now.
    Commit { reply: Reply<UnixMillis> },
    /// Commit, and keep that state.
    Snapshot { description: Option<String>, reply: Reply<SnapshotObject> },
    /// Change the size; a smaller one cuts off what lies beyond.
    Resize { size_bytes: u64, reply: Reply<()> },
    /// Commit, and do something with the head while it cannot move.
    WithHead { work: HeadWork, reply: Reply<()> },
    /// Commit, and give the volume up.
    Release { reply: Reply<()> },
}

/// Something to be done while the head is held.
pub type HeadWork = Box<dyn FnOnce(Head) -> BoxFuture<'static, Result<(), EngineError>> + Send>;

/// How to ask a destager.
#[derive(Clone)]
pub struct DestagerHandle {
    requests: mpsc::Sender<Request>,
    abandon: CancellationToken,
    done: CancellationToken,
}

impl DestagerHandle {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// Those of the request; `Stopped` if the volume stopped or was given up meanwhile.
    ///
    /// # Cancellation
    /// The request is carried out all the same.
    pub async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        let gone = || EngineError::Stopped("the volume is no longer attached here".into());
        self.requests.send(request(reply)).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Ends the destager without committing: all that is local stays as it is, and is found again by the next attach.
    pub async fn abandon(&self) {
        self.abandon.cancel();
        self.done.cancelled().await;
    }
}

/// What the state directory knows of a volume's last commit: the base that any epoch left behind lies on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BaseRecord {
    pub name: String,
    pub uid: Uid,
    pub term: u64,
    /// Epochs up to this one are in `map`.
    pub epoch: u64,
    #[serde(default)]
    pub map: Option<MapRef>,
    pub size_bytes: u64,
}

impl BaseRecord {
    /// Where that of a term is kept: epochs of an older term that are orphans keep theirs.
    pub fn path(uid: &Uid, term: u64) -> DiskPath {
        DiskPath::state(format!("{}/base-{term:020}.json", EpochHeader::folder(uid)))
    }
}

/// The head of a volume that this node owns, and its state in the pool.
pub struct HeldHead {
    pub name: String,
    pub head: Head,
    pub etag: ETag,
}

/// What a swap of the head is to change besides the map.
#[derive(Default)]
struct Change {
    size_bytes: Option<u64>,
    take_snapshot_number: bool,
    release: bool,
}

/// The task that holds a volume's head.
pub struct Destager {
    engine: Arc<Engine>,
    volume: Arc<Volume>,
    key: Key,
    held: HeldHead,
    standby: Option<Arc<Epoch>>,
    stamps: Stamps,
    next_number: u64,
}

/// What packing frozen epochs came to.
#[derive(Default)]
pub(super) struct Packed {
    pub(super) packs: Vec<(PackRef, Arc<PackIndex>)>,
    pub(super) bytes: u64,
    /// How long the pool may refuse a pack until that is an error; none: as long as it takes.
    pub(super) patience: Option<Duration>,
    /// Only filled by [`Mutant::HeadBeforePack`].
    pub(super) held_back: Vec<(Key, Bytes)>,
}

/// One block of a commit.
enum Block {
    Unchanged,
    Zero(BlockIndex),
    Data(BlockIndex, EncodedBlock),
}

impl Destager {
    /// Starts the destager of a volume whose head is held. Frozen epochs that recovery found are committed at once.
    pub fn start(
        engine: Arc<Engine>,
        volume: Arc<Volume>,
        held: HeldHead,
        next_number: u64,
    ) -> DestagerHandle {
        let (requests, receiver) = mpsc::channel(64);
        let handle =
            DestagerHandle { requests, abandon: CancellationToken::new(), done: CancellationToken::new() };
        let stamps = Stamps::new(held.head.uid, held.head.term, held.head.floor);
        let key = keys::volume(&held.name);
        let destager = Self { engine, volume, key, held, standby: None, stamps, next_number };
        let (abandon, done) = (handle.abandon.clone(), handle.done.clone().drop_guard());
        tokio::spawn(async move {
            let volume = destager.volume.clone();
            // Dropping the work at any await is as good as a crash there, which recovery is made for.
            if abandon.run_until_cancelled(destager.run(receiver)).await.is_none() {
                volume.end("given up by this node; its local data is kept");
            }
            drop(done);
        });
        handle
    }

    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut levels = self.engine.pressure.changes();
        let mut released = false;
        while !released {
            if self.volume.stop_reason().is_some() {
                // Nothing is committed of a volume that stopped; whoever asks is told.
                let Some(request) = requests.recv().await else { return };
                self.refuse(request);
                continue;
            }
            if self.standby.is_none() {
                self.make_standby().await;
            }
            let layers = self.volume.layers.load_full();
            let threshold = match *levels.borrow_and_update() {
                Level::Fine => self.engine.config.commit_dirty_bytes,
                Level::Commit => self.engine.config.commit_dirty_bytes / 16,
                // Writers wait for space: many volumes with a little each fill a disk too.
                Level::Slow | Level::Full => 1,
            };
            let due_at = layers.active.first_dirty().map(|first| first + self.engine.config.commit_age);
            let due = !layers.frozen.is_empty()
                || layers.active.dirty_bytes() >= threshold.max(1)
                || due_at.is_some_and(|at| at <= self.engine.clock.now());
            drop(layers);
            if due {
                if let Err(error) = self.commit(Change::default()).await {
                    self.failed("commit", &error).await;
                }
                continue;
            }
            let timer = async {
                match due_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                request = requests.recv() => match request {
                    Some(request) => released = self.serve(request).await,
                    None => return,
                },
                () = self.volume.dirtied.notified() => {}
                () = timer => {}
                changed = levels.changed() => if changed.is_err() { return },
            }
        }
    }

    fn refuse(&self, request: Request) {
        let error = || {
            let reason = self.volume.stop_reason().unwrap_or("stopped");
            EngineError::Stopped(format!("volume {} has stopped: {reason}", self.held.name))
        };
        // An asker that has gone away needs no answer.
        let _gone = match request {
            Request::Commit { reply } => reply.send(Err(error())).is_err(),
            Request::Snapshot { reply, .. } => reply.send(Err(error())).is_err(),
            Request::Resize { reply, .. } | Request::WithHead { reply, .. } | Request::Release { reply } => {
                reply.send(Err(error())).is_err()
            }
        };
    }

    /// Carries a request out; `true` if the volume is given up.
    async fn serve(&mut self, request: Request) -> bool {
        let (_gone, released) = match request {
            Request::Commit { reply } => {
                let result = self.commit(Change::default()).await;
                let at = self.held.head.last_commit.unwrap_or(self.held.head.created);
                (reply.send(result.map(|()| at)).is_err(), false)
            }
            Request::Snapshot { description, reply } => {
                (reply.send(self.snapshot(description).await).is_err(), false)
            }
            Request::Resize { size_bytes, reply } => {
                (reply.send(self.resize(size_bytes).await).is_err(), false)
            }
            Request::WithHead { work, reply } => {
                let result = match self.commit(Change::default()).await {
                    Ok(()) => work(self.held.head.clone()).await,
                    Err(error) => Err(error),
                };
                (reply.send(result).is_err(), false)
            }
            Request::Release { reply } => {
                let result = self.release().await;
                let released = result.is_ok();
                (reply.send(result).is_err(), released)
            }
        };
        released
    }

    /// A commit that failed is tried again after a while, unless the volume stopped.
    async fn failed(&self, what: &str, error: &EngineError) {
        log::warn!(volume = self.held.name.as_str(); "{what} failed: {error}");
        if self.volume.stop_reason().is_none() {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }

    async fn snapshot(&mut self, description: Option<String>) -> Result<SnapshotObject, EngineError> {
        let number = self.held.head.next_snapshot;
        // The number is taken in the swap of the head, and the head does not move again before the object stands.
        self.commit(Change { take_snapshot_number: true, ..Change::default() }).await?;
        let snapshot = self.snapshot_object(number, description);
        self.engine.put_immutable(&keys::snapshot(&snapshot.uid, number), snapshot.encode()).await?;
        Ok(snapshot)
    }

    fn snapshot_object(&self, number: u64, description: Option<String>) -> SnapshotObject {
        SnapshotObject {
            uid: self.held.head.uid,
            volume: self.held.name.clone(),
            number,
            nonce: self.engine.nonce(),
            map: self.held.head.map,
            size_bytes: self.held.head.size_bytes,
            description,
            created: self.engine.clock.wall(),
        }
    }

    async fn release(&mut self) -> Result<(), EngineError> {
        self.volume.refuse_io(true);
        if let Err(error) = self.commit(Change { release: true, ..Change::default() }).await {
            self.volume.refuse_io(false);
            return Err(error);
        }
        self.volume.end("detached");
        let layers = self.volume.layers.load_full();
        for epoch in layers.frozen.iter().chain([&layers.active]).chain(&self.standby) {
            self.unlink(epoch).await;
        }
        let record = BaseRecord::path(&self.held.head.uid, self.held.head.term);
        let gone = self.engine.disk.remove(record.clone()).await;
        if let Err(error) = match gone {
            Ok(()) => self.engine.disk.remove_dir(record.parent()).await,
            Err(error) => Err(error),
        } {
            log::debug!("the folder of {} stays: {error}", self.held.name);
        }
        Ok(())
    }

    async fn resize(&mut self, size_bytes: u64) -> Result<(), EngineError> {
        let old_bytes = self.held.head.size_bytes;
        if size_bytes > old_bytes {
            self.commit(Change { size_bytes: Some(size_bytes), ..Change::default() }).await?;
            // Shown only when the active file is of that size.
            self.cut().await?;
            self.volume.show_size(size_bytes);
        } else if size_bytes < old_bytes {
            // Refused first, then everybody is out of the old epoch, then what lies beyond is zeroed: so no write can
            // land behind the zeroing and be back after the next grow.
            self.volume.show_size(size_bytes);
            self.cut().await?;
            let active = self.volume.layers.load().active.clone();
            let tail = ByteRange::new(size_bytes, old_bytes - size_bytes);
            self.volume
                .zero_in(&active, tail)
                .map_err(|error| EngineError::NoSpace(format!("cannot shrink: {error}")))?;
            self.commit(Change { size_bytes: Some(size_bytes), ..Change::default() }).await?;
        }
        Ok(())
    }

    /// Makes the file of the next cut. A failure is tried again before the next cut.
    async fn make_standby(&mut self) {
        let header = EpochHeader {
            pool: self.engine.identity.pool,
            uid: self.held.head.uid,
            file_id: self.engine.new_file_id(),
            incarnation: self.engine.identity.incarnation,
            term: self.held.head.term,
            number: self.next_number,
            size_bytes: self.held.head.size_bytes,
        };
        // The number is spent even if making the file fails half way.
        self.next_number += 1;
        match Epoch::create(&self.engine.disk, self.engine.offload, header).await {
            Ok(epoch) => self.standby = Some(epoch),
            Err(error) => {
                log::warn!(volume = self.held.name.as_str(); "no file for the next epoch: {error}");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }

    /// Freezes the active epoch and waits until nobody writes to it any more.
    async fn cut(&mut self) -> Result<(), EngineError> {
        let size_bytes = self.held.head.size_bytes;
        if let Some(other) = self.standby.take_if(|epoch| epoch.header().size_bytes != size_bytes) {
            self.unlink(&other).await;
        }
        while self.standby.is_none() {
            self.make_standby().await;
            self.check_running()?;
        }
        let Some(next) = self.standby.take() else { return Ok(()) };
        let layers = self.volume.layers.load_full();
        let frozen = layers.active.clone();
        let mut all = layers.frozen.clone();
        all.push(frozen.clone());
        let number = next.number();
        self.volume.layers.store(Arc::new(Layers { active: next, frozen: all, base: layers.base.clone() }));
        sector_map::freeze(&self.volume.active, number);
        while !frozen.is_drained() {
            self.volume.drained.notified().await;
            self.check_running()?;
        }
        Ok(())
    }

    fn check_running(&self) -> Result<(), EngineError> {
        match self.volume.stop_reason() {
            Some(reason) => Err(EngineError::Stopped(reason.to_owned())),
            None => Ok(()),
        }
    }

    /// Takes everything acknowledged before the call to the pool, and makes `change` in the same swap of the head.
    async fn commit(&mut self, change: Change) -> Result<(), EngineError> {
        if self.volume.layers.load().active.has_records() {
            self.cut().await?;
        }
        let layers = self.volume.layers.load_full();
        let mut group: Vec<Arc<Epoch>> = layers.frozen.clone();
        if mutant::on(Mutant::CommittedOneByOne) {
            group.truncate(1);
        }
        let unchanged = change.size_bytes.is_none() && !change.take_snapshot_number && !change.release;
        if group.is_empty() && unchanged {
            return Ok(());
        }
        let started = self.engine.clock.now();
        let packed = pack(&self.engine, &mut self.stamps, &layers.base, &group).await?;
        // Between the last read of an epoch and the head: an error of the write-back may have turned what was read
        // into something that nobody wrote.
        self.check_write_back(&group).await?;
        let base = self.publish_map(&layers.base, &packed, change.size_bytes).await?;
        if mutant::on(Mutant::RemovedTooEarly) {
            for epoch in &group {
                let _gone = epoch.unlink(&self.engine.disk).await.is_ok();
            }
        }
        if mutant::on(Mutant::SnapshotBeforeHead) && change.take_snapshot_number {
            let mut early = self.snapshot_object(self.held.head.next_snapshot, None);
            early.map = base.reference;
            self.engine.put_immutable(&keys::snapshot(&early.uid, early.number), early.encode()).await?;
        }
        let now = self.engine.clock.wall();
        let mut head = self.held.head.clone();
        head.nonce = self.engine.nonce();
        head.map = base.reference;
        head.floor = self.stamps.next();
        head.size_bytes = change.size_bytes.unwrap_or(head.size_bytes);
        head.next_snapshot += u64::from(change.take_snapshot_number);
        if let Some(last) = group.last() {
            head.record_commit(last.number(), self.engine.identity.incarnation, now);
        }
        if change.release {
            head.owner = None;
            head.end_term(TermEnd::Released);
        }
        self.swap_head(head).await?;
        for (key, bytes) in packed.held_back {
            self.engine.put_immutable(&key, bytes).await?;
        }
        let layers = self.volume.layers.load_full();
        let frozen = layers
            .frozen
            .iter()
            .filter(|epoch| !group.iter().any(|done| Arc::ptr_eq(done, epoch)))
            .cloned()
            .collect();
        self.volume.layers.store(Arc::new(Layers { active: layers.active.clone(), frozen, base }));
        drop(layers);
        self.volume.counters.commits.fetch_add(1, Ordering::Relaxed);
        self.volume.counters.committed_bytes.fetch_add(packed.bytes, Ordering::Relaxed);
        self.volume.counters.last_commit_unix_ms.store(now.0, Ordering::Relaxed);
        log::debug!(
            volume = self.held.name.as_str(), packs = packed.packs.len(), bytes = packed.bytes,
            ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            "committed"
        );
        self.write_base_record().await;
        for epoch in &group {
            self.unlink(epoch).await;
        }
        Ok(())
    }

    async fn swap_head(&mut self, head: Head) -> Result<(), EngineError> {
        let bytes = head.encode();
        let mut expect = Expect::State(self.held.etag.clone());
        loop {
            match self.engine.swap_settled(&self.key, expect, bytes.clone(), None).await {
                Ok(etag) => {
                    self.held.head = head;
                    self.held.etag = etag;
                    return Ok(());
                }
                Err(EngineError::Conflict(_)) if mutant::on(Mutant::RefreshedETag) => {
                    let (_, etag) = self.engine.read_small::<Head>(&self.key).await?;
                    expect = Expect::State(etag);
                }
                Err(EngineError::Conflict(_)) => {
                    // Nobody but the owner changes a head: it has another owner by now, or was deleted.
                    let reason =
                        "another node has taken it over, or it was deleted; what was not committed is kept";
                    self.volume.stop(reason);
                    return Err(EngineError::Conflict(format!("volume {}: {reason}", self.held.name)));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn check_write_back(&self, group: &[Arc<Epoch>]) -> Result<(), EngineError> {
        for epoch in group {
            if !mutant::on(Mutant::NoWriteBackCheck)
                && let Err(error) = epoch.check_write_back().await
            {
                self.volume.stop(format!("writing its local data to the disk failed: {error}"));
            }
        }
        self.check_running()
    }

    async fn unlink(&self, epoch: &Arc<Epoch>) {
        if let Err(error) = epoch.unlink(&self.engine.disk).await {
            // It is found, and found committed, by the next attach.
            log::warn!("cannot remove {}: {error}", epoch.header().path().path);
        }
        self.engine.pressure.note_map_pages(0, epoch.map().touched_pages());
    }

    async fn write_base_record(&self) {
        let record = BaseRecord {
            name: self.held.name.clone(),
            uid: self.held.head.uid,
            term: self.held.head.term,
            epoch: self.held.head.last_epoch(),
            map: self.held.head.map,
            size_bytes: self.held.head.size_bytes,
        };
        write_base_record(&self.engine, &record).await;
    }

    /// Puts the map that has the packs too, folded if the packs are many. The base itself if nothing changed.
    async fn publish_map(
        &mut self,
        base: &Arc<BaseMap>,
        packed: &Packed,
        size_bytes: Option<u64>,
    ) -> Result<Arc<BaseMap>, EngineError> {
        let size_bytes = size_bytes.unwrap_or(self.held.head.size_bytes);
        if packed.packs.is_empty() && (size_bytes == base.map.size_bytes || base.reference.is_none()) {
            return Ok(base.clone());
        }
        let mut draft = MapDraft::new(base, size_bytes);
        for pack in &packed.packs {
            draft.push(&self.engine, &mut self.stamps, pack.clone()).await?;
        }
        draft.publish(&self.engine, &mut self.stamps, size_bytes).await
    }
}

/// Packs what `group` changes about `base`, and puts the packs.
///
/// # Errors
/// `Unavailable`, `Corrupt`, `Disk`: some packs may have been put.
pub(super) async fn pack(
    engine: &Arc<Engine>,
    stamps: &mut Stamps,
    base: &Arc<BaseMap>,
    group: &[Arc<Epoch>],
) -> Result<Packed, EngineError> {
    let mut packed = Packed::default();
    let (blocks, runs) = recorded(group);
    if blocks.is_empty() && runs.is_empty() {
        return Ok(packed);
    }
    let permit = engine.packs.acquire().await;
    let newest_first: Vec<Arc<Epoch>> = group.iter().rev().cloned().collect();
    let size_bytes = group.iter().map(|epoch| epoch.header().size_bytes).max().unwrap_or(0);
    let batches: Vec<Vec<u64>> = blocks.chunks(BLOCKS_A_BATCH).map(<[u64]>::to_vec).collect();
    let mut builder = PackBuilder::new(stamps.take(engine));
    if !mutant::on(Mutant::ZeroNotRecorded) {
        for run in runs.into_iter().flat_map(|run| split_at_segments(&run).collect::<Vec<_>>()) {
            if !base.is_zero(run.clone()) {
                builder.push_zero_run(BlockIndex(run.start), run.end - run.start);
                put_if_full(engine, stamps, &mut builder, &mut packed).await?;
            }
        }
    }
    let newest_first = &newest_first;
    let mut encoded = stream::iter(batches)
        .map(|batch| encode_batch(engine, base, newest_first, batch, size_bytes))
        .buffered(BLOCKS_AT_ONCE / BLOCKS_A_BATCH);
    while let Some(batch) = encoded.try_next().await? {
        for block in batch {
            match block {
                Block::Unchanged => {}
                Block::Zero(_) if mutant::on(Mutant::ZeroNotRecorded) => {}
                Block::Zero(block) => builder.push_zero_run(block, 1),
                Block::Data(block, encoded) => builder.push(block, encoded),
            }
            put_if_full(engine, stamps, &mut builder, &mut packed).await?;
        }
    }
    if !builder.is_empty() {
        put_pack(engine, builder, &mut packed).await?;
    }
    drop(permit);
    Ok(packed)
}

pub(super) async fn put_if_full(
    engine: &Engine,
    stamps: &mut Stamps,
    builder: &mut PackBuilder,
    packed: &mut Packed,
) -> Result<(), EngineError> {
    if !builder.is_full() {
        return Ok(());
    }
    let next = PackBuilder::new(stamps.take(engine));
    put_pack(engine, std::mem::replace(builder, next), packed).await
}

pub(super) async fn put_pack(
    engine: &Engine,
    builder: PackBuilder,
    packed: &mut Packed,
) -> Result<(), EngineError> {
    let (bytes, reference, index) = engine.offload.run(move || builder.finish()).await;
    let index = Arc::new(index);
    let key = keys::pack(&reference.id);
    packed.bytes += bytes.len() as u64;
    if mutant::on(Mutant::HeadBeforePack) {
        packed.held_back.push((key, bytes));
    } else {
        engine.put_immutable_within(packed.patience, &key, bytes).await?;
    }
    engine.remember_pack(&reference, index.clone());
    packed.packs.push((reference, index));
    Ok(())
}

/// Writes the record of a volume's base. Without it only orphans are harder to place, so a failure is a warning.
pub async fn write_base_record(engine: &Engine, record: &BaseRecord) {
    let bytes = serde_json::to_vec_pretty(record).expect("plain data serialises");
    if let Err(error) =
        engine.disk.write_small(BaseRecord::path(&record.uid, record.term), Bytes::from(bytes)).await
    {
        log::warn!("cannot note the last commit of {} in the state directory: {error}", record.name);
    }
}

/// A map being made of an older one and newer packs.
pub struct MapDraft {
    map: Map,
    unfolded: Vec<Arc<PackIndex>>,
    patience: Option<Duration>,
}

impl MapDraft {
    /// Begins with `base`, for a volume of at least `size_bytes`.
    pub fn new(base: &BaseMap, size_bytes: u64) -> Self {
        let map = base.map.truncated(size_bytes.max(base.map.size_bytes));
        Self { map, unfolded: base.unfolded.clone(), patience: None }
    }

    /// The pool may refuse an object for so long until that is an error; otherwise as long as it takes.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Puts a pack on top, and folds if the packs became many.
    ///
    /// # Errors
    /// `Unavailable`, `Corrupt` if an old segment cannot be read.
    pub async fn push(
        &mut self,
        engine: &Arc<Engine>,
        stamps: &mut Stamps,
        (reference, index): (PackRef, Arc<PackIndex>),
    ) -> Result<(), EngineError> {
        self.map.push_pack(reference);
        self.unfolded.push(index);
        if should_fold(&self.map, &self.unfolded) {
            self.map = fold(engine, stamps, &self.map, &self.unfolded, self.patience).await?;
            self.unfolded.clear();
        }
        Ok(())
    }

    /// Puts the map, with that size.
    ///
    /// # Errors
    /// Of a store that refuses it for good.
    pub async fn publish(
        self,
        engine: &Arc<Engine>,
        stamps: &mut Stamps,
        size_bytes: u64,
    ) -> Result<Arc<BaseMap>, EngineError> {
        let map = self.map.truncated(size_bytes);
        let (bytes, reference) = map.with_id(stamps.take(engine));
        engine.put_immutable_within(self.patience, &keys::map(&reference.id), bytes).await?;
        let map = Arc::new(map);
        engine.remember_map(&reference, map.clone());
        Ok(Arc::new(BaseMap { reference: Some(reference), map, unfolded: self.unfolded }))
    }
}

async fn fold(
    engine: &Arc<Engine>,
    stamps: &mut Stamps,
    map: &Map,
    unfolded: &[Arc<PackIndex>],
    patience: Option<Duration>,
) -> Result<Map, EngineError> {
    let mut fold = Fold::new(map, unfolded);
    loop {
        let step = fold.next_step();
        if step.is_none() || fold.object_bytes() >= SEGMENTS_OBJECT_BYTES {
            let id = stamps.take(engine);
            if let Some(bytes) = fold.take_object(id) {
                engine.put_immutable_within(patience, &keys::segments(&id), bytes).await?;
            }
        }
        let Some(step) = step else { return Ok(fold.finish()) };
        let old = match step.old {
            Some(reference) => Some(engine.load_segment(step.segment, &reference).await?),
            None => None,
        };
        fold.apply(old.as_deref());
    }
}

/// Blocks with a record of some of their sectors, ascending; and runs of blocks that are zero as a whole, ascending,
/// without the blocks of the first kind.
fn recorded(group: &[Arc<Epoch>]) -> (Vec<u64>, Vec<Range<u64>>) {
    let (mut blocks, mut runs) = (Vec::new(), Vec::new());
    for epoch in group {
        let (own_blocks, own_runs) = epoch.map().recorded_blocks();
        blocks.extend(own_blocks);
        runs.extend(own_runs);
    }
    blocks.sort_unstable();
    blocks.dedup();
    let limit = block_count(group.iter().map(|epoch| epoch.header().size_bytes).max().unwrap_or(0));
    (blocks.clone(), without(&merge(runs, limit), &blocks))
}

/// Sorted, joined where they touch, and cut off at `limit`.
fn merge(mut runs: Vec<Range<u64>>, limit: u64) -> Vec<Range<u64>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for run in runs {
        let run = run.start..run.end.min(limit);
        if run.is_empty() {
            continue;
        }
        match merged.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    merged
}

/// `runs` without the blocks of `blocks`; both ascending.
fn without(runs: &[Range<u64>], blocks: &[u64]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    for run in runs {
        let mut start = run.start;
        let first = blocks.partition_point(|&block| block < run.start);
        for &block in blocks[first..].iter().take_while(|&&block| block < run.end) {
            if start < block {
                left.push(start..block);
            }
            start = block + 1;
        }
        if start < run.end {
            left.push(start..run.end);
        }
    }
    left
}

fn split_at_segments(run: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut at, end) = (run.start, run.end);
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let border = (u64::from(segment_of(BlockIndex(at))) + 1) * SEGMENT_BLOCKS;
            let piece = at..border.min(end);
            at = piece.end;
            piece
        })
    })
}

/// Reads, compares and compresses some blocks.
async fn encode_batch(
    engine: &Arc<Engine>,
    base: &Arc<BaseMap>,
    newest_first: &[Arc<Epoch>],
    blocks: Vec<u64>,
    size_bytes: u64,
) -> Result<Vec<Block>, EngineError> {
    let mut contents = Vec::with_capacity(blocks.len());
    for block in blocks.into_iter().map(BlockIndex) {
        let old = base.locate(engine, block).await?;
        let content = block_content(engine, base, newest_first, block, size_bytes).await?;
        contents.push((block, old.map(|location| location.stored.hash), content));
    }
    let level = engine.config.zstd_level;
    Ok(engine.offload.run(move || contents.into_iter().map(|input| encode(input, level)).collect()).await)
}

fn encode((block, old, content): (BlockIndex, Option<ContentHash>, Bytes), level: i32) -> Block {
    let zero = content.iter().all(|&byte| byte == 0);
    match old {
        None if zero => Block::Unchanged,
        Some(_) if zero => Block::Zero(block),
        _ => {
            let hash = ContentHash::of(&content);
            if old == Some(hash) {
                Block::Unchanged
            } else {
                Block::Data(block, encode_block(&content, hash, level))
            }
        }
    }
}

/// A block as `newest_first` over `base` have it; what lies beyond the volume's end is zero.
async fn block_content(
    engine: &Arc<Engine>,
    base: &Arc<BaseMap>,
    newest_first: &[Arc<Epoch>],
    block: BlockIndex,
    size_bytes: u64,
) -> Result<Bytes, EngineError> {
    let start = block.start_bytes();
    let range = ByteRange::new(start, crate::geometry::BLOCK_BYTES.min(size_bytes.saturating_sub(start)));
    let epochs: Vec<&Arc<Epoch>> = newest_first.iter().collect();
    let mut pieces = Vec::new();
    resolve(&epochs, range, |piece, place| {
        pieces.push(match place {
            Where::Epoch(epoch) => (piece, Some(epoch.clone()), false),
            Where::Zero => (piece, None, false),
            Where::Below => (piece, None, true),
        });
    });
    let mut content = BytesMut::zeroed(BLOCK_LEN);
    let mut below = None;
    for (piece, epoch, from_below) in pieces {
        let from = len_of(piece.start() - start);
        let target = &mut content[from..from + len_of(piece.len())];
        if let Some(epoch) = epoch {
            let bytes = epoch
                .read(piece)
                .await
                .map_err(|error| EngineError::Disk(format!("read an epoch file: {error}")))?;
            target.copy_from_slice(&bytes);
        } else if from_below {
            if below.is_none() {
                below = Some(match base.locate(engine, block).await? {
                    Some(location) => Some(load_block(engine, location).await?),
                    None => None,
                });
            }
            if let Some(Some(old)) = &below {
                target.copy_from_slice(&old[from..from + len_of(piece.len())]);
            }
        }
    }
    Ok(content.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn zero_runs_never_cover_a_block_that_is_packed_by_itself(
            runs in proptest::collection::vec((0u64..200, 0u64..40), 0..8),
            blocks in proptest::collection::btree_set(0u64..240, 0..30),
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(start, len)| start..start + len).collect();
            let blocks: Vec<u64> = blocks.into_iter().collect();
            let left = without(&merge(runs.clone(), 150), &blocks);
            for block in 0..260 {
                let expected = block < 150 && runs.iter().any(|run| run.contains(&block)) && !blocks.contains(&block);
                prop_assert_eq!(left.iter().filter(|run| run.contains(&block)).count(), usize::from(expected));
            }
        }
    }
}
