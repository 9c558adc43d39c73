//! The real disk, with taps on the epoch files: calls that fail, wait, or do half of their work.

use blockhouse::disk::{Create, Disk, DiskFile, DiskPath, Lock, SharedMap};
use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use tokio::sync::watch;

/// What is to go wrong with epoch files, and what was done to them.
pub struct Taps {
    /// Syncs that fail, from now on.
    pub failing_syncs: AtomicU32,
    /// Write-back checks that fail.
    pub failing_checks: AtomicU32,
    /// Creates that find the disk full.
    pub full_creates: AtomicBool,
    /// Map pages cannot be allocated.
    pub full_maps: AtomicBool,
    /// The state directory says that it is full.
    pub full_space: AtomicBool,
    /// Looks at free space, so far.
    pub looks: watch::Sender<u64>,
    /// Writes put half of their bytes in place and fail.
    pub torn_writes: AtomicBool,
    pub syncs: AtomicU64,
    /// Offsets of writes to epoch files.
    pub writes: Mutex<Vec<u64>>,
    /// Syncs wait while this holds.
    pub held_syncs: watch::Sender<bool>,
    /// Syncs that have begun.
    pub begun_syncs: watch::Sender<u64>,
    /// Files removed, in order.
    pub removed: Mutex<Vec<String>>,
}

impl Taps {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            failing_syncs: AtomicU32::new(0),
            failing_checks: AtomicU32::new(0),
            full_creates: AtomicBool::new(false),
            full_maps: AtomicBool::new(false),
            full_space: AtomicBool::new(false),
            looks: watch::Sender::new(0),
            torn_writes: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            writes: Mutex::default(),
            held_syncs: watch::Sender::new(false),
            begun_syncs: watch::Sender::new(0),
            removed: Mutex::default(),
        })
    }

    /// Waits until `count` syncs have begun.
    pub async fn await_syncs(&self, count: u64) {
        let mut begun = self.begun_syncs.subscribe();
        begun.wait_for(|begun| *begun >= count).await.expect("the sender is here");
    }
}

fn take(count: &AtomicU32) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn broken() -> io::Error {
    io::Error::other("the disk is broken (tapped)")
}

/// A disk with taps.
pub struct TapDisk {
    pub inner: Arc<dyn Disk>,
    pub taps: Arc<Taps>,
}

impl TapDisk {
    fn is_epoch(path: &DiskPath) -> bool {
        path.path.starts_with("volumes/")
    }

    fn wrap(&self, path: &DiskPath, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        if Self::is_epoch(path) { Arc::new(TapFile { inner: file, taps: self.taps.clone() }) } else { file }
    }
}

impl Disk for TapDisk {
    fn create(
        &self,
        path: DiskPath,
        len_bytes: u64,
        lock: Lock,
    ) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>> {
        if Self::is_epoch(&path) && self.taps.full_creates.load(Ordering::SeqCst) {
            return Box::pin(async { Err(io::ErrorKind::StorageFull.into()) });
        }
        let this = Self { inner: self.inner.clone(), taps: self.taps.clone() };
        let making = self.inner.create(path.clone(), len_bytes, lock);
        Box::pin(async move { Ok(this.wrap(&path, making.await?)) })
    }

    fn open(&self, path: DiskPath, lock: Lock) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>> {
        let this = Self { inner: self.inner.clone(), taps: self.taps.clone() };
        let opening = self.inner.open(path.clone(), lock);
        Box::pin(async move { Ok(this.wrap(&path, opening.await?)) })
    }

    fn stat(&self, path: DiskPath) -> BoxFuture<'static, io::Result<(u64, u64)>> {
        self.inner.stat(path)
    }

    fn read_small(&self, path: DiskPath, max_bytes: u64) -> BoxFuture<'static, io::Result<Bytes>> {
        self.inner.read_small(path, max_bytes)
    }

    fn write_small(&self, path: DiskPath, data: Bytes) -> BoxFuture<'static, io::Result<()>> {
        self.inner.write_small(path, data)
    }

    fn rename(&self, from: DiskPath, to: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.inner.rename(from, to)
    }

    fn remove(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.taps.removed.lock().push(path.path.clone());
        self.inner.remove(path)
    }

    fn remove_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.inner.remove_dir(path)
    }

    fn list(&self, path: DiskPath) -> BoxFuture<'static, io::Result<Vec<String>>> {
        self.inner.list(path)
    }

    fn sync_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.inner.sync_dir(path)
    }

    fn map(
        &self,
        path: DiskPath,
        words: usize,
        create: Create,
    ) -> BoxFuture<'static, io::Result<Arc<dyn SharedMap>>> {
        let (mapping, taps) = (self.inner.map(path, words, create), self.taps.clone());
        Box::pin(async move {
            let map: Arc<dyn SharedMap> = Arc::new(TapMap { inner: mapping.await?, taps });
            Ok(map)
        })
    }

    fn space(&self) -> BoxFuture<'static, io::Result<(u64, u64)>> {
        let (asking, taps) = (self.inner.space(), self.taps.clone());
        Box::pin(async move {
            let full = taps.full_space.load(Ordering::SeqCst);
            let (free, all) = asking.await?;
            taps.looks.send_modify(|looks| *looks += 1);
            Ok((if full { 0 } else { free }, all))
        })
    }

    fn boot_id(&self) -> [u8; 16] {
        self.inner.boot_id()
    }
}

struct TapFile {
    inner: Arc<dyn DiskFile>,
    taps: Arc<Taps>,
}

impl DiskFile for TapFile {
    fn try_read_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        self.inner.try_read_at(buf, offset_bytes)
    }

    fn try_write_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<usize> {
        if self.taps.torn_writes.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.taps.writes.lock().push(offset_bytes);
        self.inner.try_write_at(buf, offset_bytes)
    }

    fn read_at(&self, offset_bytes: u64, len: usize) -> BoxFuture<'static, io::Result<Bytes>> {
        self.inner.read_at(offset_bytes, len)
    }

    fn write_at(&self, data: Bytes, offset_bytes: u64) -> BoxFuture<'static, io::Result<()>> {
        self.taps.writes.lock().push(offset_bytes);
        if self.taps.torn_writes.load(Ordering::SeqCst) {
            let half = self.inner.write_at(data.slice(..data.len() / 2), offset_bytes);
            return Box::pin(async {
                half.await?;
                Err(broken())
            });
        }
        self.inner.write_at(data, offset_bytes)
    }

    fn sync_data(&self) -> BoxFuture<'static, io::Result<()>> {
        self.taps.syncs.fetch_add(1, Ordering::SeqCst);
        self.taps.begun_syncs.send_modify(|count| *count += 1);
        if take(&self.taps.failing_syncs) {
            return Box::pin(async { Err(broken()) });
        }
        let (mut held, syncing) = (self.taps.held_syncs.subscribe(), self.inner.sync_data());
        Box::pin(async move {
            held.wait_for(|held| !held).await.map_err(io::Error::other)?;
            syncing.await
        })
    }

    fn check_write_back(&self) -> BoxFuture<'static, io::Result<()>> {
        if take(&self.taps.failing_checks) {
            return Box::pin(async { Err(broken()) });
        }
        self.inner.check_write_back()
    }

    fn data_stretches(&self, from_bytes: u64, max: usize) -> BoxFuture<'static, io::Result<Vec<(u64, u64)>>> {
        self.inner.data_stretches(from_bytes, max)
    }

    fn inode(&self) -> u64 {
        self.inner.inode()
    }

    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.inner.as_fd()
    }
}

struct TapMap {
    inner: Arc<dyn SharedMap>,
    taps: Arc<Taps>,
}

impl SharedMap for TapMap {
    fn words(&self) -> &[AtomicU64] {
        self.inner.words()
    }

    fn allocate(&self, page: usize) -> io::Result<()> {
        if self.taps.full_maps.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.allocate(page)
    }

    fn allocated_pages(&self) -> io::Result<Vec<usize>> {
        self.inner.allocated_pages()
    }
}
