//! A disk in memory that answers a frontend in all the ways a volume does: from a file, as zeros, or missing and to
//! be loaded; inline or later.

pub mod served;

use blockhouse::block::{
    BlockError, BlockHandler, Extent, ExtentKind, Hold, MissingToken, Piece, ReadPlan, Source, WriteGrant,
};
use blockhouse::disk::DiskFile;
use blockhouse::geometry::{Access, BLOCK_BYTES, ByteRange, Geometry, SECTOR_BYTES, len_of};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, OwnedRwLockWriteGuard, RwLock, watch};

#[derive(Clone, Copy, PartialEq)]
enum Sector {
    Zero,
    Local,
    Missing,
}

struct State {
    bytes: Vec<u8>,
    sectors: Vec<Sector>,
    fail_reads_from: u64,
}

/// The bytes, as a file whose calls never wait on every other sector position.
struct Memory {
    state: Mutex<State>,
    bytes_read: AtomicU64,
}

pub struct TestDisk {
    memory: Arc<Memory>,
    access: Access,
    turn: tokio::sync::Mutex<()>,
    flushes: Arc<RwLock<()>>,
    flush_begun: Notify,
    loads: Arc<RwLock<()>>,
    load_begun: Notify,
    size: watch::Sender<u64>,
    grants: AtomicU64,
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copy(&self, offset_bytes: u64, out: &mut [u8]) {
        let start = len_of(offset_bytes);
        out.copy_from_slice(&self.state().bytes[start..start + out.len()]);
        self.bytes_read.fetch_add(out.len() as u64, Ordering::SeqCst);
    }
}

/// So that both the inline and the waiting way are taken.
fn waits(offset_bytes: u64) -> bool {
    (offset_bytes / 4096) % 3 == 2
}

/// What keeps a piece of memory alive: nothing has to.
struct Nothing;

impl Hold for Nothing {
    fn hand_out(&self) -> bool {
        false
    }
}

struct MemoryFile(Arc<Memory>);

impl DiskFile for MemoryFile {
    fn try_read_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        if waits(offset_bytes) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = buf.len().min(100_000);
        self.0.copy(offset_bytes, &mut buf[..len]);
        Ok(len)
    }

    fn try_write_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<usize> {
        if waits(offset_bytes) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let start = len_of(offset_bytes);
        self.0.state().bytes[start..start + buf.len()].copy_from_slice(buf);
        Ok(buf.len())
    }

    fn write_here(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.try_write_at(buf, offset_bytes).map(drop)
    }

    fn read_at(&self, offset_bytes: u64, len: usize) -> BoxFuture<'static, io::Result<Bytes>> {
        let memory = self.0.clone();
        async move {
            tokio::task::yield_now().await;
            let mut bytes = vec![0; len];
            memory.copy(offset_bytes, &mut bytes);
            Ok(bytes.into())
        }
        .boxed()
    }

    fn write_at(&self, data: Bytes, offset_bytes: u64) -> BoxFuture<'static, io::Result<()>> {
        let memory = self.0.clone();
        async move {
            tokio::task::yield_now().await;
            let start = len_of(offset_bytes);
            memory.state().bytes[start..start + data.len()].copy_from_slice(&data);
            Ok(())
        }
        .boxed()
    }

    fn sync_data(&self) -> BoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed()
    }

    fn check_write_back(&self) -> BoxFuture<'static, io::Result<()>> {
        async { Ok(()) }.boxed()
    }

    fn data_stretches(&self, _: u64, _: usize) -> BoxFuture<'static, io::Result<Vec<(u64, u64)>>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn inode(&self) -> u64 {
        1
    }

    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

struct Grant {
    memory: Arc<Memory>,
    range: ByteRange,
}

impl WriteGrant for Grant {
    fn target(&self) -> (Arc<dyn DiskFile>, u64) {
        (Arc::new(MemoryFile(self.memory.clone())), self.range.start())
    }

    fn finish(self: Box<Self>) -> Result<(), BlockError> {
        self.memory.state().mark(self.range, Sector::Local);
        Ok(())
    }

    fn abort(self: Box<Self>) {}
}

impl State {
    fn mark(&mut self, range: ByteRange, sector: Sector) {
        let sectors = len_of(range.start() / SECTOR_BYTES)..len_of(range.end() / SECTOR_BYTES);
        self.sectors[sectors].fill(sector);
    }

    /// Stretches of one kind, cut at blocks where they are missing.
    fn stretches(&self, range: ByteRange) -> Vec<(ByteRange, Sector)> {
        let mut found: Vec<(ByteRange, Sector)> = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            let end = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(range.end());
            let kind = self.sectors[len_of(at / SECTOR_BYTES)];
            match found.last_mut() {
                Some((last, last_kind))
                    if *last_kind == kind && (kind != Sector::Missing || !at.is_multiple_of(BLOCK_BYTES)) =>
                {
                    *last = ByteRange::new(last.start(), end - last.start());
                }
                _ => found.push((ByteRange::new(at, end - at), kind)),
            }
            at = end;
        }
        found
    }
}

impl TestDisk {
    pub fn new(size_bytes: u64, access: Access) -> Self {
        let state = State {
            bytes: vec![0; len_of(size_bytes)],
            sectors: vec![Sector::Zero; len_of(size_bytes / SECTOR_BYTES)],
            fail_reads_from: u64::MAX,
        };
        Self {
            memory: Arc::new(Memory { state: Mutex::new(state), bytes_read: AtomicU64::new(0) }),
            access,
            turn: tokio::sync::Mutex::new(()),
            flushes: Arc::new(RwLock::new(())),
            flush_begun: Notify::new(),
            loads: Arc::new(RwLock::new(())),
            load_begun: Notify::new(),
            size: watch::Sender::new(size_bytes),
            grants: AtomicU64::new(0),
        }
    }

    /// What was written has to be loaded from now on.
    pub fn forget_local(&self) {
        for sector in &mut self.memory.state().sectors {
            if *sector == Sector::Local {
                *sector = Sector::Missing;
            }
        }
    }

    pub fn clear(&self) {
        let mut state = self.memory.state();
        state.bytes.fill(0);
        state.sectors.fill(Sector::Zero);
    }

    pub fn fill(&self, byte: u8) {
        let mut state = self.memory.state();
        state.bytes.fill(byte);
        state.sectors.fill(Sector::Missing);
    }

    /// Plans of reads that touch this or more fail.
    pub fn fail_reads_from(&self, offset_bytes: u64) {
        self.memory.state().fail_reads_from = offset_bytes;
    }

    /// Flushes wait until the answer is dropped.
    pub fn hold_flushes(&self) -> OwnedRwLockWriteGuard<()> {
        self.flushes.clone().try_write_owned().expect("nobody flushes yet")
    }

    pub async fn flush_begun(&self) {
        self.flush_begun.notified().await;
    }

    /// Loads wait until the answer is dropped.
    pub fn hold_loads(&self) -> OwnedRwLockWriteGuard<()> {
        self.loads.clone().try_write_owned().expect("nobody loads yet")
    }

    pub async fn load_begun(&self) {
        self.load_begun.notified().await;
    }

    /// Shows only the first `size_bytes` from now on.
    pub fn show(&self, size_bytes: u64) {
        self.size.send_replace(size_bytes);
    }

    /// Writes that have begun.
    pub fn grants(&self) -> u64 {
        self.grants.load(Ordering::SeqCst)
    }

    pub fn bytes_read(&self) -> u64 {
        self.memory.bytes_read.load(Ordering::SeqCst)
    }

    pub async fn bytes(&self, offset_bytes: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.copy(offset_bytes, &mut bytes);
        bytes
    }

    fn inside(&self, range: ByteRange) -> Result<(), BlockError> {
        if range.end() <= *self.size.borrow() { Ok(()) } else { Err(BlockError::Invalid) }
    }
}

impl BlockHandler for TestDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: *self.size.borrow(),
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: self.access,
        }
    }

    fn plan_read(&self, range: ByteRange) -> Result<ReadPlan, BlockError> {
        self.inside(range)?;
        let state = self.memory.state();
        if range.end() > state.fail_reads_from {
            return Err(BlockError::Io("as the test wants".into()));
        }
        let piece = |(range, kind): (ByteRange, Sector)| {
            let source = match kind {
                Sector::Zero => Source::Zeros,
                Sector::Missing => Source::Missing { token: Arc::new(()) },
                Sector::Local => Source::File {
                    file: Arc::new(MemoryFile(self.memory.clone())),
                    offset_bytes: range.start(),
                    keep: Arc::new(Nothing),
                },
            };
            Piece { range, source }
        };
        Ok(state.stretches(range).into_iter().map(piece).collect())
    }

    fn load<'a>(&'a self, range: ByteRange, _: &'a MissingToken) -> BoxFuture<'a, Result<Bytes, BlockError>> {
        async move {
            self.load_begun.notify_one();
            drop(self.loads.read().await);
            tokio::task::yield_now().await;
            let mut bytes = vec![0; len_of(range.len())];
            self.memory.copy(range.start(), &mut bytes);
            Ok(bytes.into())
        }
        .boxed()
    }

    fn begin_write(&self, range: ByteRange) -> Result<Option<Box<dyn WriteGrant>>, BlockError> {
        self.inside(range)?;
        assert!(range.is_aligned(SECTOR_BYTES) && self.access == Access::ReadWrite);
        self.grants.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Box::new(Grant { memory: self.memory.clone(), range })))
    }

    fn writable(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        async { Ok(()) }.boxed()
    }

    fn small_write_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.turn
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        async {
            self.flush_begun.notify_one();
            drop(self.flushes.read().await);
            Ok(())
        }
        .boxed()
    }

    fn zero(&self, range: ByteRange) -> BoxFuture<'_, Result<(), BlockError>> {
        async move {
            self.inside(range)?;
            assert!(range.is_aligned(SECTOR_BYTES) && self.access == Access::ReadWrite);
            let mut state = self.memory.state();
            state.bytes[len_of(range.start())..len_of(range.end())].fill(0);
            state.mark(range, Sector::Zero);
            Ok(())
        }
        .boxed()
    }

    fn extents(
        &self,
        range: ByteRange,
        extents_max: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, BlockError>> {
        async move {
            self.inside(range)?;
            let kind = |kind| if kind == Sector::Zero { ExtentKind::Hole } else { ExtentKind::Data };
            let stretches = self.memory.state().stretches(range);
            Ok(stretches
                .into_iter()
                .map(|(range, sector)| Extent { range, kind: kind(sector) })
                .take(extents_max)
                .collect())
        }
        .boxed()
    }

    fn size_changes(&self) -> watch::Receiver<u64> {
        self.size.subscribe()
    }
}
