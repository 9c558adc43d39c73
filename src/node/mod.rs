//! Builds, drains and stops everything on this host.
//!
//! Owns: [`Node`]: its start, its end, and what its parts share. [`operations`] is what can be asked of it.
//! Does not own: the engine ([`crate::volume`]), protocols ([`crate::frontend`]), or who may ask ([`crate::control`]).

pub mod answers;
pub mod attachments;
pub mod doctor;
pub mod exports;
pub mod identity;
pub mod imports;
pub mod meter;
pub mod operations;
pub mod service;

use crate::clock::{Clock, UnixMillis};
use crate::disk::Disk;
use crate::disk::real::{RealDisk, RealDiskConfig, raise_file_limit};
use crate::frontend::nbd::tls::TlsDemand;
use crate::frontend::nbd::{self, Server};
use crate::offload::Offload;
use crate::store::dir::{DirConfig, DirStore, IfMissing};
use crate::store::s3::{S3Config, S3OpenError, S3Store};
use crate::store::{GetRange, ObjectStore};
use crate::volume::cache::{CacheConfig, CleanCache};
use crate::volume::catalog::open_pool;
use crate::volume::destage::Request;
use crate::volume::engine::{Engine, EngineConfig, EngineError, Parts};
use crate::volume::head::{PoolObject, SMALL_OBJECT_BYTES_MAX, SmallObject, keys};
use crate::volume::ids::PoolId;
use anyhow::{Context as _, anyhow, bail};
use attachments::Table;
use exports::{NodeExports, Readers};
use identity::{NodeFile, StateLock};
use imports::Jobs;
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Where a node's parts are, and its limits.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    pub pool_dir: PathBuf,
    /// The pool, instead of the directory.
    pub s3: Option<S3Config>,
    pub state_dir: PathBuf,
    /// On tmpfs; none: a fitting place is found.
    pub runtime_dir: Option<PathBuf>,
    pub nbd: nbd::Config,
    /// Size of the clean cache.
    pub cache_bytes: u64,
    pub engine: EngineConfig,
    /// How long an operation may take before its asker is told that it goes on.
    pub operation_time: Duration,
}

impl NodeConfig {
    /// A node with these directories, that listens nowhere.
    pub fn new(pool_dir: impl Into<PathBuf>, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            pool_dir: pool_dir.into(),
            s3: None,
            state_dir: state_dir.into(),
            runtime_dir: None,
            nbd: nbd::Config::default(),
            cache_bytes: 1 << 30,
            engine: EngineConfig::default(),
            operation_time: Duration::from_secs(60),
        }
    }

    /// The pool, for people.
    pub fn pool_place(&self) -> String {
        match &self.s3 {
            Some(s3) => s3.address.to_string(),
            None => self.pool_dir.display().to_string(),
        }
    }
}

/// What is known of the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Pool {
    /// It has not answered since the start.
    Unseen,
    /// It is the right one.
    Good,
    /// It is another one, or unreadable.
    Wrong(String),
}

/// What the parts of a node share.
pub struct Core {
    config: NodeConfig,
    engine: Arc<Engine>,
    /// The store, if it is one that has more to tell than answers.
    s3: Option<S3Store>,
    table: Table,
    jobs: Jobs,
    readers: Readers,
    pool: watch::Sender<Pool>,
    started: UnixMillis,
    runtime_is_tmpfs: bool,
    /// URIs of exports, up to their names.
    addresses: std::sync::OnceLock<Vec<Address>>,
    stopping: CancellationToken,
}

/// Where clients connect.
#[derive(Clone, Debug)]
enum Address {
    Tcp(String),
    /// Where nobody is served without TLS.
    Tls(String),
    Unix(PathBuf),
}

impl Address {
    fn uri(&self, export: &str) -> String {
        match self {
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
            Self::Tls(address) => format!("nbds://{address}/{export}"),
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
        }
    }
}

/// A daemon's node.
pub struct Node {
    core: Arc<Core>,
    server: Mutex<Option<Server>>,
    lock: Mutex<Option<StateLock>>,
}

impl Node {
    /// Starts a node on the pool that `config` names. Volumes that were attached before are recovered in the background.
    ///
    /// # Errors
    /// Whatever keeps it from serving: a state directory that is in use or of another pool, an unreadable pool, a bucket
    /// that keeps no condition, an address that is taken.
    pub async fn start(config: NodeConfig) -> anyhow::Result<Arc<Self>> {
        let (pool_dir, s3) = (config.pool_dir.clone(), config.s3.clone());
        Self::start_on(config, |known| async move {
            match s3 {
                Some(s3) => {
                    let store = open_s3(&s3, known).await?;
                    Ok((Arc::new(store.clone()) as Arc<dyn ObjectStore>, Some(store)))
                }
                None => Ok((open_dir(pool_dir, known).await?, None)),
            }
        })
        .await
    }

    /// Starts a node on the store that `open` gives, which is told whether there has to be a pool already.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_with<F>(config: NodeConfig, open: impl FnOnce(bool) -> F) -> anyhow::Result<Arc<Self>>
    where
        F: Future<Output = anyhow::Result<Arc<dyn ObjectStore>>>,
    {
        Self::start_on(config, |known| async move { Ok((open(known).await?, None)) }).await
    }

    async fn start_on<F>(config: NodeConfig, open: impl FnOnce(bool) -> F) -> anyhow::Result<Arc<Self>>
    where
        F: Future<Output = anyhow::Result<(Arc<dyn ObjectStore>, Option<S3Store>)>>,
    {
        if let Err(error) = raise_file_limit() {
            log::warn!("failed to raise the limit of open files: {error}");
        }
        let (state_dir, runtime_dir) = (config.state_dir.clone(), config.runtime_dir.clone());
        let (lock, disk) = Offload::Threads
            .run(move || {
                let lock = StateLock::take(&state_dir)?;
                let disk = RealDisk::open(RealDiskConfig { state_dir, runtime_dir })
                    .context("failed to open the state directory")?;
                anyhow::Ok((lock, disk))
            })
            .await?;
        let runtime_is_tmpfs = disk.runtime_is_tmpfs();
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let clock = Clock::System;
        let file = NodeFile::read(&*disk).await?;
        let (store, s3) = open(file.is_some()).await?;
        let (file, pool) = identify(file, &*store, &clock).await?;
        let identity = file.begin(&*disk).await?;
        let cache =
            CleanCache::open(disk.clone(), Offload::Threads, CacheConfig { bytes: config.cache_bytes })
                .await
                .context("failed to open the clean cache")?;
        let table = Table::read(&*disk).await?;
        let engine = Engine::new(Parts {
            disk,
            store,
            offload: Offload::Threads,
            clock: clock.clone(),
            identity,
            config: config.engine.clone(),
            cache,
            seed: rand::random(),
        });
        engine.pressure.look().await;
        let core = Arc::new(Core {
            config,
            engine,
            s3,
            table,
            jobs: Jobs::default(),
            readers: Readers::default(),
            pool: watch::Sender::new(pool),
            started: clock.wall(),
            runtime_is_tmpfs,
            addresses: std::sync::OnceLock::new(),
            stopping: CancellationToken::new(),
        });
        let exports = Arc::new(NodeExports(core.clone()));
        let server = Server::start(core.config.nbd.clone(), exports, core.stopping.clone())
            .await
            .context("failed to start the NBD server")?;
        let tls = core.config.nbd.tls.as_ref().is_some_and(|tls| tls.demand == TlsDemand::Required);
        let tcp = server.tcp_addresses().iter().map(|address| {
            let address = reachable(*address);
            if tls { Address::Tls(address) } else { Address::Tcp(address) }
        });
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let unix = server.unix_paths().iter().map(|path| Address::Unix(absolute(path)));
        // Set once, here.
        drop(core.addresses.set(tcp.chain(unix).collect()));
        tokio::spawn(core.clone().begin());
        Ok(Arc::new(Self { core, server: Mutex::new(Some(server)), lock: Mutex::new(Some(lock)) }))
    }

    /// Stops serving, commits what it can until `patience` is over, gives nothing up, and releases the state directory.
    pub async fn shutdown(&self, patience: Duration) {
        let end = Instant::now() + patience;
        self.core.stopping.cancel();
        let server = self.server.lock().take();
        if let Some(server) = server {
            server.drain(patience / 2).await;
        }
        let running = self.core.table.running();
        let commits = running.iter().map(|(name, running)| async move {
            if running.volume.stop_reason().is_some() {
                return;
            }
            let commit = running.destager.ask(|reply| Request::Commit { reply });
            match tokio::time::timeout_at(end, commit).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => log::warn!(volume = name.as_str(); "not all of it is in the pool: {error}"),
                Err(_) => log::warn!(
                    volume = name.as_str();
                    "not all of it is in the pool, which is too slow: the rest is kept here"
                ),
            }
        });
        futures::future::join_all(commits).await;
        // What is local stays as it is, and the volumes stay this node's.
        futures::future::join_all(running.iter().map(|(_, running)| running.destager.abandon())).await;
        drop(self.lock.lock().take());
    }

    /// Resolves when every volume that was attached before is served again, or has definitely failed.
    pub async fn recovered(&self) {
        self.core.table.settled().await;
    }

    /// The disks of this node, as a frontend sees them.
    pub fn exports(&self) -> Arc<dyn nbd::Exports> {
        Arc::new(NodeExports(self.core.clone()))
    }
}

async fn open_dir(pool_dir: PathBuf, known: bool) -> anyhow::Result<Arc<dyn ObjectStore>> {
    // A known pool whose directory is empty is most likely not mounted: no second one is made in its place.
    let if_missing = if known { IfMissing::Fail } else { IfMissing::Create };
    let store = DirStore::open(pool_dir.clone(), DirConfig { if_missing, ..DirConfig::default() })
        .await
        .with_context(|| format!("failed to open the pool in {}", pool_dir.display()))?;
    Ok(Arc::new(store))
}

async fn open_s3(config: &S3Config, known: bool) -> anyhow::Result<S3Store> {
    let store = S3Store::new(config).await?;
    match store.prove().await {
        Ok(()) => Ok(store),
        // What is acknowledged here is served without the pool; it is proven before anything is changed there.
        Err(S3OpenError::Unavailable(reason)) if known => {
            log::warn!("{} is not proven yet: {reason}", config.address);
            Ok(store)
        }
        Err(error) => Err(error).with_context(|| format!("failed to open the pool in {}", config.address)),
    }
}

/// An address that a client can use: one that stands for all of the host's is replaced by the host's name.
fn reachable(address: std::net::SocketAddr) -> String {
    if !address.ip().is_unspecified() {
        return address.to_string();
    }
    let uname = rustix::system::uname();
    format!("{}:{}", uname.nodename().to_string_lossy(), address.port())
}

/// Finds out which pool this is, and whether it is this state directory's.
async fn identify(
    file: Option<NodeFile>,
    store: &dyn ObjectStore,
    clock: &Clock,
) -> anyhow::Result<(NodeFile, Pool)> {
    let Some(file) = file else {
        let pool = open_pool(store, clock, PoolId(rand::random())).await.map_err(|error| anyhow!(error))?;
        return Ok((NodeFile::new(pool.id), Pool::Good));
    };
    match read_pool(store).await {
        Ok(pool) => {
            file.check_pool(pool.id)?;
            Ok((file, Pool::Good))
        }
        Err(EngineError::Unavailable(reason)) => {
            log::warn!("the pool does not answer, so volumes are served once it does: {reason}");
            Ok((file, Pool::Unseen))
        }
        Err(EngineError::NotFound(_)) => {
            bail!("pool {}, which the state directory belongs to, is not there: is it mounted?", file.pool())
        }
        Err(error) => Err(anyhow!(error)),
    }
}

async fn read_pool(store: &dyn ObjectStore) -> Result<PoolObject, EngineError> {
    let range = GetRange::Whole { max_bytes: SMALL_OBJECT_BYTES_MAX };
    let object = store.get(&keys::pool(), range).await?;
    PoolObject::decode(&object.bytes).map_err(|reason| {
        EngineError::Corrupt(format!("this is no pool that this version can use: {reason}"))
    })
}

impl Core {
    /// Waits for the pool if it was away, then recovers.
    async fn begin(self: Arc<Self>) {
        let stopping = self.stopping.clone();
        let check = async {
            let mut pause = Duration::from_millis(500);
            while *self.pool.borrow() != Pool::Good {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(15));
                match read_pool(&*self.engine.store).await {
                    Ok(pool) if pool.id == self.engine.identity.pool => {
                        log::info!("the pool answers");
                        self.pool.send_replace(Pool::Good);
                    }
                    Ok(pool) => {
                        let own = self.engine.identity.pool;
                        let reason = format!(
                            "this is pool {}, and the state directory belongs to pool {own}",
                            pool.id
                        );
                        log::error!("{reason}");
                        self.pool.send_replace(Pool::Wrong(reason));
                    }
                    Err(EngineError::Unavailable(_)) => {}
                    Err(error) => {
                        self.pool.send_replace(Pool::Wrong(error.to_string()));
                    }
                }
            }
        };
        if stopping.run_until_cancelled(check).await.is_some() {
            self.recover_all().await;
        }
    }
}
