//! What all volumes of a node share: its identity, disk, store, caches, limits.
//!
//! Owns: [`Engine`], reads of pool objects with their checks and retries, ids, the node's limits.
//! Does not own: any volume.

use crate::clock::Clock;
use crate::disk::Disk;
use crate::offload::Offload;
use crate::store::{ETag, Expect, GetRange, Key, ObjectStore, StoreError};
use crate::volume::cache::CleanCache;
use crate::volume::head::{SMALL_OBJECT_BYTES_MAX, SmallObject, keys};
use crate::volume::ids::{
    ContentHash, FileId, Incarnation, NodeId, Nonce, ObjectHash, ObjectId, PoolId, Uid,
};
use crate::volume::load::{Flights, Lost};
use crate::volume::map::{Map, MapRef};
use crate::volume::pack::{PackIndex, PackRef};
use crate::volume::pressure::Pressure;
use crate::volume::segment::{Segment, SegmentRef};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Limits and habits of a node.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// A volume is committed when it has this many bytes that are not in the pool.
    pub commit_dirty_bytes: u64,
    /// A volume is committed when its oldest such byte is this old.
    pub commit_age: Duration,
    /// How long a client's read waits for the pool before it gets an error.
    pub pool_wait: Duration,
    /// Packs that are made or uploaded at once on the node: each takes some 36 MiB.
    pub packs_at_once: usize,
    /// Blocks that are fetched at once on the node: each takes some 256 KiB.
    pub fetches_at_once: usize,
    /// Memory for maps, segments and pack footers.
    pub metadata_bytes: usize,
    /// zstd level of packs.
    pub zstd_level: i32,
    /// Memory for the live maps of all epochs; beyond it writers wait.
    pub live_map_bytes: u64,
    /// Below this much free space in the state directory writes are refused.
    pub reserve_bytes: u64,
}

/// An operation that waits this long between two tries says so in the log.
const TOLD_PAUSE: Duration = Duration::from_secs(1);

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            commit_dirty_bytes: 256 << 20,
            commit_age: Duration::from_secs(10),
            pool_wait: Duration::from_secs(60),
            packs_at_once: 2,
            fetches_at_once: 32,
            metadata_bytes: 64 << 20,
            zstd_level: 1,
            live_map_bytes: 1 << 30,
            reserve_bytes: 64 << 20,
        }
    }
}

/// Why something in the engine did not work, by what the caller does about it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The pool does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// An object of the pool is not what its reference says, or cannot be read by this version.
    #[error("{0}")]
    Corrupt(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It is there already, has an owner, or was changed by someone else meanwhile.
    #[error("{0}")]
    Conflict(String),
    /// It is not known whether it was done.
    #[error("{0}")]
    Unclear(String),
    /// The local disk failed or is full.
    #[error("{0}")]
    Disk(String),
    /// No space.
    #[error("{0}")]
    NoSpace(String),
    /// The volume stopped.
    #[error("{0}")]
    Stopped(String),
    /// An image from outside cannot be read.
    #[error("{0}")]
    Source(String),
}

impl From<Lost> for EngineError {
    fn from(lost: Lost) -> Self {
        Self::Unavailable(format!("a fetch ended early: {lost}"))
    }
}

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::NotFound(_) => Self::NotFound(text),
            StoreError::Conflict(_) => Self::Conflict(text),
            StoreError::Unclear { .. } => Self::Unclear(text),
            StoreError::Unavailable { .. } => Self::Unavailable(text),
            StoreError::NoSpace(_) => Self::NoSpace(text),
            StoreError::Invalid { .. } => Self::Corrupt(text),
        }
    }
}

/// Who this node is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub pool: PoolId,
    pub node: NodeId,
    /// This run of the daemon.
    pub incarnation: Incarnation,
    /// Every incarnation that this state directory ever had, this one included.
    pub ours: Vec<Incarnation>,
}

/// A decoded metadata object.
#[derive(Clone)]
enum Meta {
    Map(Arc<Map>),
    Pack(Arc<PackIndex>),
    Segment(Arc<Segment>),
}

/// What all volumes of a node share.
pub struct Engine {
    pub disk: Arc<dyn Disk>,
    pub store: Arc<dyn ObjectStore>,
    pub offload: Offload,
    pub clock: Clock,
    pub identity: Identity,
    pub config: EngineConfig,
    pub cache: Arc<CleanCache>,
    pub pressure: Arc<Pressure>,
    /// Bounds the packs in memory.
    pub packs: Semaphore,
    /// Bounds the blocks being fetched.
    pub fetches: Semaphore,
    /// Blocks being fetched.
    pub flights: Flights<ContentHash, Bytes, EngineError>,
    metadata: foyer_memory::Cache<ObjectHash, Meta>,
    entropy: Mutex<StdRng>,
}

/// What an [`Engine`] is made of.
pub struct Parts {
    pub disk: Arc<dyn Disk>,
    pub store: Arc<dyn ObjectStore>,
    pub offload: Offload,
    pub clock: Clock,
    pub identity: Identity,
    pub config: EngineConfig,
    pub cache: Arc<CleanCache>,
    /// Seed of all ids. From the operating system in a daemon.
    pub seed: [u8; 32],
}

impl Engine {
    /// An engine, with no volumes.
    pub fn new(parts: Parts) -> Arc<Self> {
        let pressure = Pressure::new(parts.disk.clone(), &parts.config);
        let weigh = |_: &ObjectHash, meta: &Meta| match meta {
            Meta::Map(map) => 256 + map.segments().len() * 96 + map.packs().len() * 128,
            Meta::Pack(index) => 256 + index.heap_bytes(),
            Meta::Segment(segment) => 256 + segment.heap_bytes(),
        };
        Arc::new(Self {
            disk: parts.disk,
            store: parts.store,
            offload: parts.offload,
            clock: parts.clock,
            identity: parts.identity,
            cache: parts.cache,
            pressure,
            packs: Semaphore::new(parts.config.packs_at_once),
            fetches: Semaphore::new(parts.config.fetches_at_once),
            flights: Flights::default(),
            metadata: foyer_memory::CacheBuilder::new(parts.config.metadata_bytes)
                .with_shards(1)
                .with_weighter(weigh)
                .build(),
            entropy: Mutex::new(StdRng::from_seed(parts.seed)),
            config: parts.config,
        })
    }

    /// A random 64-bit number.
    pub fn random(&self) -> u64 {
        self.entropy.lock().random()
    }

    fn random_id(&self) -> [u8; 16] {
        self.entropy.lock().random()
    }

    /// A nonce for a write of a swapped object.
    pub fn nonce(&self) -> Nonce {
        Nonce(self.random_id())
    }

    /// Identity of a new volume or image.
    pub fn new_uid(&self) -> Uid {
        Uid(self.random_id())
    }

    /// Identity of a new epoch file.
    pub fn new_file_id(&self) -> FileId {
        FileId(self.random_id())
    }

    /// Runs `attempt` until it is answered, or `Conflict`, or `patience` is over; none: as long as it takes.
    ///
    /// # Errors
    /// The last error of `attempt`.
    ///
    /// # Cancellation
    /// As `attempt`.
    pub async fn patiently<T, F>(
        &self,
        patience: Option<Duration>,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let end = patience.map(|patience| self.clock.now() + patience);
        let mut pause = Duration::from_millis(20);
        let mut is_told = false;
        loop {
            let error = match attempt().await {
                Ok(value) => {
                    if is_told {
                        log::info!("the pool took what it had refused before");
                    }
                    return Ok(value);
                }
                Err(error) => error,
            };
            let again = matches!(
                error,
                StoreError::Unavailable { .. } | StoreError::Unclear { .. } | StoreError::NoSpace(_)
            );
            if !again || end.is_some_and(|end| self.clock.now() + pause >= end) {
                return Err(error);
            }
            // Not at once: a short trouble is no news. Once, however long it goes on.
            if !is_told && pause >= TOLD_PAUSE {
                is_told = true;
                log::warn!("the pool refuses or does not answer, trying again: {error}");
            }
            tokio::time::sleep(pause).await;
            // Half of each pause is chance, so that clients that failed together do not come back together.
            let half = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            pause = (pause + Duration::from_millis(self.random() % (half + 1))).min(Duration::from_secs(5));
        }
    }

    /// Reads a small object and its state.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`, `Corrupt`.
    pub async fn read_small<T: SmallObject>(&self, key: &Key) -> Result<(T, ETag), EngineError> {
        let range = GetRange::Whole { max_bytes: SMALL_OBJECT_BYTES_MAX };
        let object = self.patiently(Some(self.config.pool_wait), || self.store.get(key, range)).await?;
        let value = T::decode(&object.bytes)
            .map_err(|reason| EngineError::Corrupt(format!("{key} in the pool is damaged: {reason}")))?;
        Ok((value, object.etag))
    }

    /// Puts an immutable object whose id nobody else can have, as long as it takes: one that is there is ours.
    ///
    /// # Errors
    /// `Invalid`, of a store that refuses it for good.
    pub async fn put_immutable(&self, key: &Key, bytes: Bytes) -> Result<(), EngineError> {
        self.put_immutable_within(None, key, bytes).await
    }

    /// The same, for whoever can give up: until `patience` is over.
    ///
    /// # Errors
    /// `Invalid`; and `NoSpace`, `Unavailable`, `Unclear` when `patience` is over.
    pub async fn put_immutable_within(
        &self,
        patience: Option<Duration>,
        key: &Key,
        bytes: Bytes,
    ) -> Result<(), EngineError> {
        match self.patiently(patience, || self.store.put_new(key, bytes.clone())).await {
            Ok(()) | Err(StoreError::Conflict(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Swaps an object and settles the outcome: an answer that was lost is asked for by the same swap again, so that at
    /// the end it was made, or never will be. The bytes must hold a fresh nonce.
    ///
    /// # Errors
    /// `Conflict`: someone else changed it. `Unclear` when `patience` is over.
    pub async fn swap_settled(
        &self,
        key: &Key,
        expect: Expect,
        bytes: Bytes,
        patience: Option<Duration>,
    ) -> Result<ETag, EngineError> {
        let unclear = AtomicBool::new(false);
        let answer = self
            .patiently(patience, || async {
                let answer = self.store.swap(key, expect.clone(), bytes.clone()).await;
                if matches!(answer, Err(StoreError::Unclear { .. })) {
                    unclear.store(true, Ordering::Relaxed);
                }
                answer
            })
            .await;
        let unsettled = unclear.load(Ordering::Relaxed);
        match answer {
            Ok(etag) => Ok(etag),
            Err(StoreError::Conflict(_)) if unsettled => {
                // Ours may be the one that is there: an earlier try without an answer.
                let range = GetRange::Whole { max_bytes: SMALL_OBJECT_BYTES_MAX };
                match self.patiently(patience, || self.store.get(key, range)).await {
                    Ok(object) if object.bytes == bytes => Ok(object.etag),
                    Ok(_) | Err(StoreError::NotFound(_)) => {
                        Err(EngineError::Conflict(format!("{key} was changed by someone else")))
                    }
                    Err(error) => Err(EngineError::Unclear(format!(
                        "it is not known whether {key} was changed: {error}"
                    ))),
                }
            }
            Err(error) if unsettled => {
                Err(EngineError::Unclear(format!("it is not known whether {key} was changed: {error}")))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The map that `reference` names.
    ///
    /// # Errors
    /// `Unavailable`, `Corrupt`, `NotFound`.
    pub async fn load_map(&self, reference: &MapRef) -> Result<Arc<Map>, EngineError> {
        if let Some(Meta::Map(map)) = self.metadata.get(&reference.hash).map(|entry| entry.value().clone()) {
            return Ok(map);
        }
        let key = keys::map(&reference.id);
        let bytes = self.fetch(&key, GetRange::Whole { max_bytes: reference.object_bytes }).await?;
        let named = *reference;
        let map = self
            .offload
            .run(move || Map::decode(&bytes, &named))
            .await
            .map_err(|error| EngineError::Corrupt(format!("{key}: {error}")))?;
        let map = Arc::new(map);
        self.metadata.insert(reference.hash, Meta::Map(map.clone()));
        Ok(map)
    }

    /// The footer of the pack that `reference` names.
    ///
    /// # Errors
    /// As [`Engine::load_map`].
    pub async fn load_pack_index(&self, reference: &PackRef) -> Result<Arc<PackIndex>, EngineError> {
        if let Some(Meta::Pack(index)) =
            self.metadata.get(&reference.footer_hash).map(|entry| entry.value().clone())
        {
            return Ok(index);
        }
        let key = keys::pack(&reference.id);
        let range = GetRange::Span { start: reference.data_bytes(), len: u64::from(reference.footer_bytes) };
        let bytes = self.fetch(&key, range).await?;
        let named = *reference;
        let index = self
            .offload
            .run(move || PackIndex::decode(&bytes, &named))
            .await
            .map_err(|error| EngineError::Corrupt(format!("{key}: {error}")))?;
        let index = Arc::new(index);
        self.metadata.insert(reference.footer_hash, Meta::Pack(index.clone()));
        Ok(index)
    }

    /// Segment `index`, if it is in memory.
    pub fn cached_segment(&self, reference: &SegmentRef) -> Option<Arc<Segment>> {
        match self.metadata.get(&reference.hash)?.value() {
            Meta::Segment(segment) => Some(segment.clone()),
            Meta::Map(_) | Meta::Pack(_) => None,
        }
    }

    /// Segment `index`, which `reference` names.
    ///
    /// # Errors
    /// As [`Engine::load_map`].
    pub async fn load_segment(
        &self,
        index: u32,
        reference: &SegmentRef,
    ) -> Result<Arc<Segment>, EngineError> {
        if let Some(segment) = self.cached_segment(reference) {
            return Ok(segment);
        }
        let key = keys::segments(&reference.object);
        let range = GetRange::Span {
            start: u64::from(reference.offset_bytes),
            len: u64::from(reference.stored_bytes),
        };
        let bytes = self.fetch(&key, range).await?;
        let named = *reference;
        let segment = self
            .offload
            .run(move || Segment::decode(&bytes, index, &named))
            .await
            .map_err(|error| EngineError::Corrupt(format!("{key}: {error}")))?;
        let segment = Arc::new(segment);
        self.metadata.insert(reference.hash, Meta::Segment(segment.clone()));
        Ok(segment)
    }

    /// Remembers metadata that this node has just made.
    pub fn remember_map(&self, reference: &MapRef, map: Arc<Map>) {
        self.metadata.insert(reference.hash, Meta::Map(map));
    }

    /// Remembers a footer that this node has just made.
    pub fn remember_pack(&self, reference: &PackRef, index: Arc<PackIndex>) {
        self.metadata.insert(reference.footer_hash, Meta::Pack(index));
    }

    /// Bytes of an object, waiting for the pool as long as a client's read does.
    ///
    /// # Errors
    /// `Unavailable`, `Corrupt` if the object is not there, or shorter than it has to be.
    pub async fn fetch(&self, key: &Key, range: GetRange) -> Result<Bytes, EngineError> {
        match self.patiently(Some(self.config.pool_wait), || self.store.get(key, range)).await {
            Ok(object) => Ok(object.bytes),
            Err(StoreError::NotFound(key)) => {
                Err(EngineError::Corrupt(format!("{key} is missing in the pool, though something names it")))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Makes the ids of one volume's objects in one term: stamps that count up.
#[derive(Debug)]
pub struct Stamps {
    uid: Uid,
    term: u64,
    next: u64,
}

impl Stamps {
    /// Stamps from `next` on.
    pub fn new(uid: Uid, term: u64, next: u64) -> Self {
        Self { uid, term, next }
    }

    /// The next id.
    pub fn take(&mut self, engine: &Engine) -> ObjectId {
        let sequence = self.next;
        self.next += 1;
        ObjectId { uid: self.uid, term: self.term, sequence, random: engine.random() }
    }

    /// Sequence of the next id.
    pub fn next(&self) -> u64 {
        self.next
    }
}
