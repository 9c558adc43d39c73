//! A node to measure: the real engine and disk in directories of its own, over any pool, with taps on both.
//!
//! Owns: how an engine is put together and torn down like a killed process, and how a machine's memory is read.
//! Does not own: what is asserted.

use crate::disk::{TapDisk, Taps};
use crate::store::TapStore;
use blockhouse::block::{self, BlockError, BlockHandler, Durability};
use blockhouse::clock::{Clock, UnixMillis};
use blockhouse::disk::Disk;
use blockhouse::disk::real::{RealDisk, RealDiskConfig, raise_file_limit};
use blockhouse::geometry::{BLOCK_BYTES, BlockIndex, ByteRange, len_of};
use blockhouse::offload::Offload;
use blockhouse::store::dir::{DirConfig, DirStore, IfMissing};
use blockhouse::store::memory::MemoryStore;
use blockhouse::store::{ETag, Expect, GetRange, ObjectStore};
use blockhouse::volume::VolumeHandler;
use blockhouse::volume::attach::{Attached, attach};
use blockhouse::volume::base::BaseMap;
use blockhouse::volume::cache::{CacheConfig, CleanCache};
use blockhouse::volume::destage::{MapDraft, Request};
use blockhouse::volume::engine::{Engine, EngineConfig, EngineError, Identity, Parts, Stamps};
use blockhouse::volume::head::{Head, SmallObject, keys};
use blockhouse::volume::ids::{ContentHash, Incarnation, NodeId, Nonce, PoolId, Uid};
use blockhouse::volume::map::MapRef;
use blockhouse::volume::pack::{PackBuilder, encode_block};
use blockhouse::volume::segment::SEGMENT_BLOCKS;
use bytes::{Bytes, BytesMut};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;
pub const POOL: PoolId = PoolId([1; 16]);

/// Whoever measures memory has the process to itself.
static TURN: RwLock<()> = RwLock::const_new(());

/// What a node holds while it is there.
enum Turn {
    Shared(#[expect(dead_code, reason = "held")] RwLockReadGuard<'static, ()>),
    Alone(#[expect(dead_code, reason = "held")] RwLockWriteGuard<'static, ()>),
    /// Another node of the same test holds it.
    Other,
}

/// A node: its directories, its pool, and every incarnation that it had.
pub struct Node {
    #[expect(dead_code, reason = "held")]
    turn: Turn,
    state: TempDir,
    runtime: TempDir,
    pub taps: Arc<Taps>,
    pub store: Arc<TapStore>,
    pub id: NodeId,
    pub incarnations: Vec<Incarnation>,
    pub config: EngineConfig,
    pub cache_bytes: u64,
}

/// One volume in use, and the engine under it.
pub struct Life {
    pub engine: Arc<Engine>,
    pub attached: Attached,
    pub handler: Arc<VolumeHandler>,
}

impl Node {
    fn over(store: Arc<TapStore>, id: u8, turn: Turn) -> Self {
        raise_file_limit().expect("the limit of open files");
        let shared_memory = std::path::Path::new("/dev/shm");
        let runtime =
            if shared_memory.is_dir() { tempfile::tempdir_in(shared_memory) } else { tempfile::tempdir() };
        Self {
            turn,
            state: tempfile::tempdir().expect("a directory"),
            runtime: runtime.expect("a directory"),
            taps: Taps::new(),
            store,
            id: NodeId([id; 16]),
            incarnations: Vec::new(),
            config: EngineConfig {
                // Nothing is committed but when a test says so.
                commit_dirty_bytes: 1 << 60,
                commit_age: Duration::from_secs(100_000),
                pool_wait: Duration::from_secs(5),
                ..EngineConfig::default()
            },
            cache_bytes: 16 * MIB,
        }
    }

    /// Over a pool in memory.
    pub async fn new() -> Self {
        let store = TapStore::over(Arc::new(MemoryStore::new(Clock::System)));
        Self::over(store, 2, Turn::Shared(TURN.read().await))
    }

    /// Over a pool in memory, with no other node in the process: to measure.
    pub async fn alone() -> Self {
        let store = TapStore::over(Arc::new(MemoryStore::new(Clock::System)));
        Self::over(store, 2, Turn::Alone(TURN.write().await))
    }

    /// As [`Node::alone`], over a pool in a directory, which goes with the returned guard.
    pub async fn on_directory() -> (Self, TempDir) {
        let turn = Turn::Alone(TURN.write().await);
        let pool = tempfile::tempdir().expect("a directory");
        let config = DirConfig { if_missing: IfMissing::Create, ..DirConfig::default() };
        let store = DirStore::open(pool.path().join("pool"), config).await.expect("a pool");
        (Self::over(TapStore::over(Arc::new(store)), 2, turn), pool)
    }

    /// Another state directory with this one's pool.
    pub fn other(&self, id: u8) -> Self {
        Self::over(self.store.clone(), id, Turn::Other)
    }

    /// A new run of the daemon.
    pub async fn engine(&mut self) -> Arc<Engine> {
        let config = RealDiskConfig {
            state_dir: self.state.path().to_owned(),
            runtime_dir: Some(self.runtime.path().to_owned()),
        };
        let disk = Arc::new(TapDisk {
            inner: Arc::new(RealDisk::open(config).expect("a disk")),
            taps: self.taps.clone(),
        });
        let cache = CacheConfig { bytes: self.cache_bytes };
        let cache = CleanCache::open(disk.clone(), Offload::Threads, cache).await.expect("a cache");
        self.engine_on(disk, cache)
    }

    /// A new run of the daemon, on that disk.
    pub fn engine_on(&mut self, disk: Arc<dyn Disk>, cache: Arc<CleanCache>) -> Arc<Engine> {
        let next = u8::try_from(self.incarnations.len() + 1).expect("few runs");
        self.incarnations.push(Incarnation([self.id.0[0] ^ next << 3; 16]));
        Engine::new(Parts {
            cache,
            disk,
            store: self.store.clone(),
            offload: Offload::Threads,
            clock: Clock::System,
            identity: Identity {
                pool: POOL,
                node: self.id,
                incarnation: *self.incarnations.last().expect("pushed above"),
                ours: self.incarnations.clone(),
            },
            config: self.config.clone(),
            seed: rand::random(),
        })
    }

    /// A new run of the daemon that attaches one volume.
    pub async fn life(&mut self, name: &str) -> Life {
        self.try_life(name).await.unwrap_or_else(|error| panic!("failed to attach {name}: {error}"))
    }

    pub async fn try_life(&mut self, name: &str) -> Result<Life, EngineError> {
        let engine = self.engine().await;
        let attached = attach(&engine, name).await?;
        let handler = Arc::new(VolumeHandler(attached.volume.clone()));
        Ok(Life { engine, attached, handler })
    }

    /// Puts the head of a new volume.
    pub async fn create(&self, name: &str, size_bytes: u64, map: Option<MapRef>) {
        let head = new_head(size_bytes, map);
        let made = self.store.swap(&keys::volume(name), Expect::Absent, head.encode()).await;
        made.expect("the name is free");
    }

    /// The head as it is in the pool.
    pub async fn head(&self, name: &str) -> (Head, ETag) {
        let range = GetRange::Whole { max_bytes: 1 << 20 };
        let object = self.store.inner.get(&keys::volume(name), range).await.expect("a head");
        (Head::decode(&object.bytes).expect("a good head"), object.etag)
    }

    /// Changes the head behind everybody's back.
    pub async fn change_head(&self, name: &str, change: impl FnOnce(&mut Head)) {
        let (mut head, etag) = self.head(name).await;
        change(&mut head);
        head.nonce = Nonce(rand::random());
        let swapped = self.store.inner.swap(&keys::volume(name), Expect::State(etag), head.encode()).await;
        swapped.expect("nobody else changes it now");
    }

    /// Power loss, as far as the maps go: the runtime directory is gone. What the epoch files hold is all there, so
    /// what is not believed without a flushed bit is put to the test.
    pub fn lose_live_maps(&self) {
        for path in self.live_maps() {
            std::fs::remove_file(path).expect("a live map goes");
        }
    }

    pub fn live_maps(&self) -> Vec<PathBuf> {
        files_below(self.runtime.path())
    }

    /// Memory that all live maps take.
    pub fn live_map_bytes(&self) -> u64 {
        self.live_maps().iter().map(|path| blocks_of(path)).sum()
    }

    /// Epoch files of all volumes.
    pub fn epoch_files(&self) -> Vec<PathBuf> {
        let mut files = files_below(&self.state.path().join("volumes"));
        files.retain(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"epoch-"))
        });
        files
    }
}

fn files_below(dir: &std::path::Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(&entry.path())),
            _ => files.push(entry.path()),
        }
    }
    files.sort();
    files
}

fn blocks_of(path: &std::path::Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.blocks() * 512)
}

/// The head of a volume that was never attached.
pub fn new_head(size_bytes: u64, map: Option<MapRef>) -> Head {
    Head {
        uid: Uid(rand::random()),
        nonce: Nonce(rand::random()),
        term: 0,
        floor: 0,
        map,
        size_bytes,
        owner: None,
        from: None,
        description: None,
        next_snapshot: 1,
        history: vec![],
        created: UnixMillis(0),
        last_commit: None,
    }
}

impl Life {
    pub async fn try_write(&self, at: u64, data: impl Into<Bytes>) -> Result<(), BlockError> {
        block::write_at(&*self.handler, at, data.into(), Durability::Acknowledged).await
    }

    pub async fn write(&self, at: u64, data: impl Into<Bytes>) {
        self.try_write(at, data).await.expect("a write is taken");
    }

    pub async fn try_read(&self, at: u64, len: u64) -> Result<BytesMut, BlockError> {
        let mut out = BytesMut::with_capacity(len_of(len));
        block::read_at(&*self.handler, ByteRange::new(at, len), &mut out).await?;
        Ok(out)
    }

    pub async fn read(&self, at: u64, len: u64) -> BytesMut {
        self.try_read(at, len).await.expect("a read is served")
    }

    /// Whether all of a stretch reads as that byte.
    pub async fn holds(&self, at: u64, len: u64, byte: u8) -> bool {
        self.read(at, len).await.iter().all(|&found| found == byte)
    }

    pub async fn zero(&self, at: u64, len: u64) {
        self.handler.zero(ByteRange::new(at, len)).await.expect("a discard is taken");
    }

    pub async fn flush(&self) {
        self.handler.flush().await.expect("a flush works");
    }

    pub async fn try_commit(&self) -> Result<(), EngineError> {
        self.attached.destager.ask(|reply| Request::Commit { reply }).await.map(drop)
    }

    pub async fn commit(&self) {
        self.try_commit().await.expect("a commit works");
    }

    /// Waits until the file of the next cut is made. Nothing may be dirty.
    pub async fn ready(&self) {
        self.commit().await;
    }

    pub async fn resize(&self, size_bytes: u64) {
        let asked = self.attached.destager.ask(|reply| Request::Resize { size_bytes, reply }).await;
        asked.expect("a resize works");
    }

    pub async fn release(self) {
        self.attached.destager.ask(|reply| Request::Release { reply }).await.expect("a release works");
    }

    /// Ends as a killed process does: nothing is committed.
    pub async fn kill(self) {
        self.attached.destager.abandon().await;
    }
}

/// A runtime of its own, so that dropping it ends all its tasks where they are, as a kill does.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Memory of this process that is not backed by files or shared, in bytes.
pub fn anonymous_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = text.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

/// Content that does not compress and differs with `seed`.
pub fn noise(seed: u64, len: u64) -> Bytes {
    let mut out = vec![0; len_of(len)];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut out);
    out.into()
}

/// `len` times that byte.
pub fn fill(byte: u8, len: u64) -> Bytes {
    vec![byte; len_of(len)].into()
}

/// A map of a volume of which no stretch that the table lists is zero, made without writing all of it.
pub async fn image(engine: &Arc<Engine>, size_bytes: u64) -> MapRef {
    let mut stamps = Stamps::new(Uid(rand::random()), 1, 0);
    let content = fill(3, BLOCK_BYTES);
    let encoded = encode_block(&content, ContentHash::of(&content), 1);
    let mut builder = PackBuilder::new(stamps.take(engine));
    for block in (0..size_bytes / BLOCK_BYTES).step_by(len_of(SEGMENT_BLOCKS)) {
        builder.push(BlockIndex(block), encoded.clone());
        builder.push(BlockIndex(block + SEGMENT_BLOCKS - 1), encoded.clone());
    }
    let (bytes, reference, index) = builder.finish();
    engine.put_immutable(&keys::pack(&reference.id), bytes).await.expect("it is put");
    let mut draft = MapDraft::new(&BaseMap::empty(size_bytes), size_bytes);
    draft.push(engine, &mut stamps, (reference, Arc::new(index))).await.expect("it is put");
    draft.publish(engine, &mut stamps, size_bytes).await.expect("it is put").reference.expect("it has blocks")
}
