//! Counts what clients do with a volume.
//!
//! Owns: the counters, and the handler that counts.
//! Does not own: how they are shown. Nothing here takes a lock or waits.

use crate::block::{BlockError, BlockHandler, Change, Extent, MissingToken, PastState, ReadPlan, WriteGrant};
use crate::disk::DiskFile;
use crate::geometry::{ByteRange, Geometry};
use crate::node::service::VolumeMetrics;
use bytes::Bytes;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Upper bounds of the latency histograms, in microseconds.
const LATENCY_US_BOUNDS: [u64; 14] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000, 10_000_000];

/// Counts of latencies; the last is of all beyond the bounds.
#[derive(Default)]
struct Histogram([AtomicU64; LATENCY_US_BOUNDS.len() + 1]);

impl Histogram {
    fn note(&self, since: Instant) {
        let us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        let bucket = LATENCY_US_BOUNDS.partition_point(|&bound| bound < us);
        self.0[bucket].fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> Vec<u64> {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

/// Errors of a volume are logged at most this often.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// What clients did.
pub struct Meter {
    /// For the log.
    volume: String,
    began: Instant,
    /// When the next error is logged, counted from `began`.
    log_next_ms: AtomicU64,
    read_ops: AtomicU64,
    read_bytes: AtomicU64,
    write_ops: AtomicU64,
    write_bytes: AtomicU64,
    zero_ops: AtomicU64,
    flush_ops: AtomicU64,
    errors: AtomicU64,
    /// Only of reads that had to ask the pool: others are moved by the frontend.
    read_latency: Histogram,
    write_latency: Histogram,
    flush_latency: Histogram,
}

impl Meter {
    /// Nothing was done yet.
    pub fn new(volume: &str) -> Self {
        Self {
            volume: volume.to_owned(),
            began: Instant::now(),
            log_next_ms: AtomicU64::new(0),
            read_ops: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            write_ops: AtomicU64::new(0),
            write_bytes: AtomicU64::new(0),
            zero_ops: AtomicU64::new(0),
            flush_ops: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            read_latency: Histogram::default(),
            write_latency: Histogram::default(),
            flush_latency: Histogram::default(),
        }
    }

    /// Puts the counts into `metrics`.
    pub fn fill(&self, metrics: &mut VolumeMetrics) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        metrics.read_ops = load(&self.read_ops);
        metrics.read_bytes = load(&self.read_bytes);
        metrics.write_ops = load(&self.write_ops);
        metrics.write_bytes = load(&self.write_bytes);
        metrics.zero_ops = load(&self.zero_ops);
        metrics.flush_ops = load(&self.flush_ops);
        metrics.errors = load(&self.errors);
        metrics.latency_us_bounds = LATENCY_US_BOUNDS.to_vec();
        metrics.read_latency = self.read_latency.counts();
        metrics.write_latency = self.write_latency.counts();
        metrics.flush_latency = self.flush_latency.counts();
    }

    fn count<T>(&self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        if let Err(error) = &result {
            self.errors.fetch_add(1, Ordering::Relaxed);
            self.log(error);
        }
        result
    }

    /// What the client is only told a number for. What it did wrong itself, and what the volume's stop said, is no news.
    fn log(&self, error: &BlockError) {
        if matches!(error, BlockError::Invalid | BlockError::ReadOnly | BlockError::Stopped(_)) {
            return;
        }
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now = ms(self.began.elapsed());
        let next = self.log_next_ms.load(Ordering::Relaxed);
        if now < next {
            return;
        }
        let following = now.saturating_add(ms(LOG_EVERY));
        let swap = self.log_next_ms.compare_exchange(next, following, Ordering::Relaxed, Ordering::Relaxed);
        // Whoever swapped it logs for all who failed at the same time.
        if swap.is_ok() {
            log::error!(volume = self.volume.as_str(); "a client got an error: {error}");
        }
    }
}

/// A handler whose use is counted.
pub struct Metered<H> {
    pub inner: H,
    pub meter: Arc<Meter>,
}

struct MeteredGrant {
    inner: Box<dyn WriteGrant>,
    meter: Arc<Meter>,
    started: Instant,
}

impl WriteGrant for MeteredGrant {
    fn target(&self) -> (Arc<dyn DiskFile>, u64) {
        self.inner.target()
    }

    fn finish(self: Box<Self>) -> Result<(), BlockError> {
        let result = self.inner.finish();
        self.meter.write_latency.note(self.started);
        self.meter.count(result)
    }

    fn abort(self: Box<Self>) {
        self.meter.errors.fetch_add(1, Ordering::Relaxed);
        self.inner.abort();
    }
}

impl<H: BlockHandler> BlockHandler for Metered<H> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn plan_read(&self, range: ByteRange) -> Result<ReadPlan, BlockError> {
        self.meter.read_ops.fetch_add(1, Ordering::Relaxed);
        self.meter.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
        self.meter.count(self.inner.plan_read(range))
    }

    fn load<'a>(
        &'a self,
        range: ByteRange,
        token: &'a MissingToken,
    ) -> BoxFuture<'a, Result<Bytes, BlockError>> {
        Box::pin(async move {
            let started = Instant::now();
            let result = self.inner.load(range, token).await;
            self.meter.read_latency.note(started);
            self.meter.count(result)
        })
    }

    fn begin_write(&self, range: ByteRange) -> Result<Option<Box<dyn WriteGrant>>, BlockError> {
        let started = Instant::now();
        let Some(inner) = self.meter.count(self.inner.begin_write(range))? else { return Ok(None) };
        self.meter.write_ops.fetch_add(1, Ordering::Relaxed);
        self.meter.write_bytes.fetch_add(range.len(), Ordering::Relaxed);
        Ok(Some(Box::new(MeteredGrant { inner, meter: self.meter.clone(), started })))
    }

    fn writable(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async move { self.meter.count(self.inner.writable().await) })
    }

    fn small_write_turn(&self) -> &tokio::sync::Mutex<()> {
        self.inner.small_write_turn()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async move {
            let started = Instant::now();
            let result = self.inner.flush().await;
            self.meter.flush_ops.fetch_add(1, Ordering::Relaxed);
            self.meter.flush_latency.note(started);
            self.meter.count(result)
        })
    }

    fn zero(&self, range: ByteRange) -> BoxFuture<'_, Result<(), BlockError>> {
        Box::pin(async move {
            self.meter.zero_ops.fetch_add(1, Ordering::Relaxed);
            let result = self.inner.zero(range).await;
            self.meter.count(result)
        })
    }

    fn extents(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, BlockError>> {
        self.inner.extents(range, extents_max)
    }

    fn past_states(&self, max: usize) -> BoxFuture<'_, Result<Vec<String>, BlockError>> {
        self.inner.past_states(max)
    }

    fn past_state<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<PastState>, BlockError>> {
        self.inner.past_state(name)
    }

    fn changes_since<'a>(
        &'a self,
        past: &'a PastState,
        range: ByteRange,
        changes_max: usize,
    ) -> BoxFuture<'a, Result<Vec<Change>, BlockError>> {
        self.inner.changes_since(past, range, changes_max)
    }

    fn size_changes(&self) -> watch::Receiver<u64> {
        self.inner.size_changes()
    }
}
