//! Local files under epochs and cache. A simulation puts its own disk here.
//!
//! Owns: the [`Disk`] and [`DiskFile`] traits, and (in [`real`]) the files of the real machine, with the only
//! `unsafe` of the local path: the mapping of live sector maps.
//! Does not own: what the files mean.

pub mod real;

use bytes::Bytes;
use futures::future::BoxFuture;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// An open file. Positions are bytes from its start.
///
/// The `try_` calls never wait: what would wait fails with `WouldBlock`, and a short count means the rest would.
/// The others run on a thread that may block, go on when their future is dropped, and are ordered after nothing.
pub trait DiskFile: Send + Sync + 'static {
    /// Reads into `buf` if no disk has to be waited for.
    fn try_read_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<usize>;
    /// Writes `buf` if no disk has to be waited for.
    fn try_write_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<usize>;
    /// Exactly `len` bytes; `UnexpectedEof` beyond the end.
    fn read_at(&self, offset_bytes: u64, len: usize) -> BoxFuture<'static, io::Result<Bytes>>;
    /// Writes all of `data`.
    fn write_at(&self, data: Bytes, offset_bytes: u64) -> BoxFuture<'static, io::Result<()>>;
    /// `fdatasync`. After one failure nothing is to be believed of the file's unsynced bytes.
    fn sync_data(&self) -> BoxFuture<'static, io::Result<()>>;
    /// Waits for write-back under way and reports an error that it met, without asking for durability.
    fn check_write_back(&self) -> BoxFuture<'static, io::Result<()>>;
    /// Whether [`DiskFile::forget`] can ever succeed: not where memory is all that the file has.
    fn forgets(&self) -> bool {
        false
    }
    /// Lets the kernel drop a stretch from memory, but for pages that somebody else holds, a socket perhaps. `true`:
    /// it has none of them any more, so that whoever holds some no longer sees what becomes of the file.
    fn forget(&self, _offset_bytes: u64, _len_bytes: u64) -> BoxFuture<'static, io::Result<bool>> {
        Box::pin(async { Ok(false) })
    }
    /// Says that neighbours will not be read next.
    fn expect_random_reads(&self) {}
    /// Allocated stretches of the file from `from_bytes` on, as far as the file system tells: at most `max`.
    /// No witness of what was written, only a superset of what may be other than zero.
    fn data_stretches(&self, from_bytes: u64, max: usize) -> BoxFuture<'static, io::Result<Vec<(u64, u64)>>>;
    /// Its inode number.
    fn inode(&self) -> u64;
    /// The descriptor, for frontends that hand it to the kernel. `None` in a simulation.
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;
    /// Whether the kernel has that stretch in memory, so that sending it from the file waits for no disk. `false`
    /// where that cannot be told.
    fn is_resident(&self, _offset_bytes: u64, _len_bytes: u64) -> bool {
        false
    }
    /// Writes all of `buf` on this thread, which may have to wait for the disk: only from threads that may.
    /// `WouldBlock` where only [`DiskFile::write_at`] is at hand.
    fn write_here(&self, _buf: &[u8], _offset_bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// A file mapped as 64-bit words, shared with whoever maps it next after a crash of this process.
pub trait SharedMap: Send + Sync + 'static {
    /// The words. Reading one whose page was never allocated may allocate it: look only where `allocate` was called
    /// or [`SharedMap::allocated_pages`] says so.
    fn words(&self) -> &[AtomicU64];
    /// Allocates a page of 512 words, so that touching it cannot fail. Does not wait for a disk on tmpfs.
    ///
    /// # Errors
    /// `StorageFull`.
    fn allocate(&self, page: usize) -> io::Result<()>;
    /// Indexes of the pages that may hold something other than zeros, found without allocating any.
    fn allocated_pages(&self) -> io::Result<Vec<usize>>;
}

/// Words in a page of a [`SharedMap`].
pub const MAP_PAGE_WORDS: usize = 512;

/// Which of the node's two directories a path is in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Place {
    /// Survives power loss.
    State,
    /// Survives `kill -9`, not a reboot: tmpfs where there is one.
    Runtime,
}

/// A path below one of the node's directories: `/`-separated, no `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct DiskPath {
    pub place: Place,
    pub path: String,
}

impl DiskPath {
    /// A path in the state directory.
    pub fn state(path: impl Into<String>) -> Self {
        Self { place: Place::State, path: path.into() }
    }

    /// A path in the runtime directory.
    pub fn runtime(path: impl Into<String>) -> Self {
        Self { place: Place::Runtime, path: path.into() }
    }

    /// The directory that it is in.
    pub fn parent(&self) -> Self {
        let path = self.path.rsplit_once('/').map_or("", |(parent, _)| parent);
        Self { place: self.place, path: path.to_owned() }
    }
}

/// Whether a file that is opened must be the only holder of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lock {
    /// Not locked.
    None,
    /// Exclusively locked on this very description, waiting until a dying holder's writes are done.
    Exclusive,
}

/// The node's local directories. No call blocks the caller's thread. A directory is made when something is made in it.
pub trait Disk: Send + Sync + 'static {
    /// Makes a file of `len_bytes` (a hole), which must not exist.
    fn create(
        &self,
        path: DiskPath,
        len_bytes: u64,
        lock: Lock,
    ) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>>;
    /// Opens a file for reading and writing.
    fn open(&self, path: DiskPath, lock: Lock) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>>;
    /// Its length and inode.
    fn stat(&self, path: DiskPath) -> BoxFuture<'static, io::Result<(u64, u64)>>;
    /// A whole small file.
    fn read_small(&self, path: DiskPath, max_bytes: u64) -> BoxFuture<'static, io::Result<Bytes>>;
    /// Replaces a small file as a whole, durably: after a crash it is the old one or the new one.
    fn write_small(&self, path: DiskPath, data: Bytes) -> BoxFuture<'static, io::Result<()>>;
    /// Renames within one directory, replacing what is there.
    fn rename(&self, from: DiskPath, to: DiskPath) -> BoxFuture<'static, io::Result<()>>;
    /// Removes a file; one that is gone is fine.
    fn remove(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>>;
    /// Removes an empty directory; one that is gone is fine.
    fn remove_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>>;
    /// Names in a directory, sorted; empty if there is none.
    fn list(&self, path: DiskPath) -> BoxFuture<'static, io::Result<Vec<String>>>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>>;
    /// Maps a file of `words` words, which is made (all zero) if `create`.
    fn map(
        &self,
        path: DiskPath,
        words: usize,
        create: Create,
    ) -> BoxFuture<'static, io::Result<Arc<dyn SharedMap>>>;
    /// Bytes free for new data in the state directory, and in all.
    fn space(&self) -> BoxFuture<'static, io::Result<(u64, u64)>>;
    /// Changes with each boot of the machine.
    fn boot_id(&self) -> [u8; 16];
}

/// What to do about a file that is to be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Create {
    /// It must not exist.
    New,
    /// It must exist, with that many words.
    Existing,
}
