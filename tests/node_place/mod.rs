//! Nodes in a temporary directory, for tests of whole nodes.
//!
//! Owns: directories, starting and killing nodes, reading and writing as a client does, a store that fails.
//! Does not own: what is tested.

use async_trait::async_trait;
use blockhouse::block::{BlockHandler, Durability, read_at, write_at};
use blockhouse::frontend::nbd::OpenExport;
use blockhouse::geometry::{ByteRange, len_of};
use blockhouse::node::service::{CreateVolume, ForkSource, ImageSource, Service, ServiceError};
use blockhouse::node::{Node, NodeConfig};
use blockhouse::store::{ETag, Expect, GetRange, Key, Object, ObjectStore, Page, StoreError};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub const MIB: u64 = 1 << 20;

/// A pool and state directories, gone with the test.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn config(&self, state: &str) -> NodeConfig {
        self.config_on("pool", state)
    }

    pub fn config_on(&self, pool: &str, state: &str) -> NodeConfig {
        let mut config = NodeConfig::new(self.0.path().join(pool), self.0.path().join(state));
        config.runtime_dir = Some(self.0.path().join(format!("{state}-run")));
        config.cache_bytes = 8 * MIB;
        config.engine.commit_age = Duration::from_secs(3600);
        config.engine.pool_wait = Duration::from_millis(300);
        config.engine.reserve_bytes = MIB;
        config
    }

    pub async fn start(&self, state: &str) -> Arc<Node> {
        let node = Node::start(self.config(state)).await.expect("the node starts");
        node.recovered().await;
        node
    }
}

/// Ends a node without committing anything.
pub async fn kill(node: Arc<Node>) {
    node.shutdown(Duration::ZERO).await;
}

pub async fn stop(node: Arc<Node>) {
    node.shutdown(Duration::from_secs(20)).await;
}

pub async fn open(node: &Node, name: &str) -> OpenExport {
    node.exports().open(name).await.expect("the disk is served")
}

pub async fn write(node: &Node, name: &str, offset_bytes: u64, fill: u8, len: usize) {
    let export = open(node, name).await;
    let data = Bytes::from(vec![fill; len]);
    write_at(&*export.handler, offset_bytes, data, Durability::Acknowledged)
        .await
        .expect("the write is taken");
}

pub async fn read(handler: &dyn BlockHandler, offset_bytes: u64, len: u64) -> Bytes {
    let mut out = BytesMut::with_capacity(len_of(len));
    read_at(handler, ByteRange::new(offset_bytes, len), &mut out).await.expect("the read is served");
    out.freeze()
}

/// Whether all of that stretch has this value.
pub async fn holds(node: &Node, name: &str, offset_bytes: u64, fill: u8, len: u64) -> bool {
    let export = open(node, name).await;
    read(&*export.handler, offset_bytes, len).await.iter().all(|&byte| byte == fill)
}

pub fn empty(size_bytes: u64) -> CreateVolume {
    CreateVolume { size_bytes: Some(size_bytes), ..CreateVolume::default() }
}

pub fn fork(source: &str) -> CreateVolume {
    let from: ForkSource = source.parse().expect("a source");
    CreateVolume { from: Some(from), ..CreateVolume::default() }
}

pub async fn create_attached(node: &Node, name: &str, request: CreateVolume) {
    node.create_volume(name, request).await.expect("the volume is made");
    node.attach(name).await.expect("the volume is attached");
}

pub async fn import(node: &Node, name: &str, content: Vec<u8>) -> Result<(), ServiceError> {
    let total_bytes = Some(content.len() as u64);
    let parts: Vec<_> = content.chunks(100_000).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
    let bytes = futures::stream::iter(parts).boxed();
    node.import_image(name, ImageSource::Stream { bytes, total_bytes }, None).await.map(drop)
}

/// When a call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Nothing was done.
    Before,
    /// It was done, and the answer is lost.
    After,
}

/// A store whose calls fail from one on, until it is told to work again.
pub struct Failing<S> {
    inner: S,
    calls: AtomicU64,
    fails_from: AtomicU64,
    fails_until: AtomicU64,
    after: std::sync::atomic::AtomicBool,
}

impl<S: ObjectStore> Failing<S> {
    pub fn new(inner: S) -> Arc<Self> {
        Arc::new(Self {
            inner,
            calls: AtomicU64::new(0),
            fails_from: AtomicU64::new(u64::MAX),
            fails_until: AtomicU64::new(u64::MAX),
            after: false.into(),
        })
    }

    /// The call `nth` from now and all that follow fail; with `After` that one is done all the same.
    pub fn fail(&self, nth: u64, failure: Failure) {
        self.calls.store(0, Ordering::SeqCst);
        self.after.store(failure == Failure::After, Ordering::SeqCst);
        self.fails_from.store(nth, Ordering::SeqCst);
    }

    /// Only that one call fails.
    pub fn fail_once(&self, nth: u64, failure: Failure) {
        self.fails_until.store(nth + 1, Ordering::SeqCst);
        self.fail(nth, failure);
    }

    /// Works again; how many calls there were.
    pub fn heal(&self) -> u64 {
        self.fails_from.store(u64::MAX, Ordering::SeqCst);
        self.fails_until.store(u64::MAX, Ordering::SeqCst);
        self.calls.load(Ordering::SeqCst)
    }

    async fn call<T>(
        &self,
        key: &Key,
        changes: bool,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let from = self.fails_from.load(Ordering::SeqCst);
        if call < from || call >= self.fails_until.load(Ordering::SeqCst) {
            return work.await;
        }
        let reason = "made to fail".to_owned();
        if call == from && changes && self.after.load(Ordering::SeqCst) {
            work.await?;
            return Err(StoreError::Unclear { key: key.clone(), reason });
        }
        Err(StoreError::Unavailable { key: key.clone(), reason })
    }
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for Failing<S> {
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        self.call(key, false, self.inner.get(key, range)).await
    }

    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError> {
        self.call(key, true, self.inner.put_new(key, bytes)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.call(key, true, self.inner.delete(key)).await
    }

    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError> {
        self.call(key, true, self.inner.swap(key, expect, bytes)).await
    }

    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError> {
        self.call(key, true, self.inner.swap_delete(key, expect)).await
    }

    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError> {
        let key = Key::new(folder).expect("a folder is a key");
        self.call(&key, false, self.inner.list(folder, after, max)).await
    }
}
