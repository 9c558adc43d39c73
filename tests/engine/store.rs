//! A pool that can be slow, stopped, wrong, or lose an answer, and that counts.

use async_trait::async_trait;
use blockhouse::store::{ETag, Expect, GetRange, Key, Object, ObjectStore, Page, StoreError};
use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// Something to be done just before a swap reaches the pool.
pub type Before = Box<dyn FnOnce(Arc<dyn ObjectStore>) -> BoxFuture<'static, ()> + Send>;

/// A pool with taps.
pub struct TapStore {
    pub inner: Arc<dyn ObjectStore>,
    pub gets: AtomicU64,
    pub puts: AtomicU64,
    pub put_bytes: AtomicU64,
    pub swaps: AtomicU64,
    /// Calls that wait because the pool is stopped.
    pub waiting: watch::Sender<u32>,
    delay: Mutex<Duration>,
    stopped: watch::Sender<bool>,
    /// Keys that answer with another key's bytes.
    mixed_up: Mutex<HashMap<Key, Key>>,
    lost_answers: AtomicU32,
    before_swap: Mutex<Option<Before>>,
}

impl TapStore {
    pub fn over(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            gets: AtomicU64::new(0),
            puts: AtomicU64::new(0),
            put_bytes: AtomicU64::new(0),
            swaps: AtomicU64::new(0),
            waiting: watch::Sender::new(0),
            delay: Mutex::new(Duration::ZERO),
            stopped: watch::Sender::new(false),
            mixed_up: Mutex::default(),
            lost_answers: AtomicU32::new(0),
            before_swap: Mutex::new(None),
        })
    }

    /// Each call takes this long from now on.
    pub fn slow(&self, delay: Duration) {
        *self.delay.lock() = delay;
    }

    /// No call is answered until [`TapStore::resume`].
    pub fn stop(&self) {
        self.stopped.send_replace(true);
    }

    pub fn resume(&self) {
        self.stopped.send_replace(false);
    }

    /// Waits until a call waits for the pool.
    pub async fn await_caller(&self) {
        let mut waiting = self.waiting.subscribe();
        waiting.wait_for(|count| *count > 0).await.expect("the sender is here");
    }

    /// From now on `key` has the bytes of `other`.
    pub fn mix_up(&self, key: Key, other: Key) {
        self.mixed_up.lock().insert(key, other);
    }

    pub fn tidy_up(&self) {
        self.mixed_up.lock().clear();
    }

    /// So many swaps are made, and their answers lost.
    pub fn lose_answers(&self, count: u32) {
        self.lost_answers.store(count, Ordering::SeqCst);
    }

    pub fn before_next_swap(&self, before: Before) {
        *self.before_swap.lock() = Some(before);
    }

    /// Requests that change something, so far.
    pub fn puts_and_swaps(&self) -> u64 {
        self.puts.load(Ordering::SeqCst) + self.swaps.load(Ordering::SeqCst)
    }

    async fn pause(&self) {
        let delay = *self.delay.lock();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let mut stopped = self.stopped.subscribe();
        if *stopped.borrow() {
            self.waiting.send_modify(|count| *count += 1);
            stopped.wait_for(|stopped| !stopped).await.expect("the sender is here");
            self.waiting.send_modify(|count| *count -= 1);
        }
    }
}

#[async_trait]
impl ObjectStore for TapStore {
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        self.pause().await;
        let from = self.mixed_up.lock().get(key).cloned();
        self.inner.get(from.as_ref().unwrap_or(key), range).await
    }

    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError> {
        self.puts.fetch_add(1, Ordering::SeqCst);
        self.put_bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        self.pause().await;
        self.inner.put_new(key, bytes).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.pause().await;
        self.inner.delete(key).await
    }

    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError> {
        self.swaps.fetch_add(1, Ordering::SeqCst);
        self.pause().await;
        let before = self.before_swap.lock().take();
        if let Some(before) = before {
            before(self.inner.clone()).await;
        }
        let answer = self.inner.swap(key, expect, bytes).await;
        let lost =
            self.lost_answers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match lost {
            Ok(_) => Err(StoreError::Unclear { key: key.clone(), reason: "the answer is lost".into() }),
            Err(_) => answer,
        }
    }

    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError> {
        self.pause().await;
        self.inner.swap_delete(key, expect).await
    }

    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError> {
        self.pause().await;
        self.inner.list(folder, after, max).await
    }
}
