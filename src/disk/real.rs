//! The files of the real machine.
//!
//! Owns: locks, `NOWAIT` and blocking I/O, mapped files, and the only `unsafe` of the
//! local path. Blocking calls run on the runtime's threads for blocking work, but for [`RealDisk::open`].
//! Does not own: what the files mean, where the directories are (`places`), or that only one daemon uses a state directory.
#![expect(
    clippy::disallowed_methods,
    reason = "this room may block: its calls run on threads for blocking work"
)]

mod places;

use super::{Create, Disk, DiskFile, DiskPath, Lock, MAP_PAGE_WORDS, Place, SharedMap};
use bytes::Bytes;
use futures::future::BoxFuture;
use memmap2::{Advice, MmapOptions, MmapRaw};
use parking_lot::Mutex;
use places::{
    choose_runtime_dir, make_dirs, read_boot_id, remove_old_fallbacks, replace_file, sync_directory,
};
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::process::Resource;
use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read as _};
use std::num::NonZero;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

/// Bytes in a page of a [`SharedMap`].
const MAP_PAGE_BYTES: u64 = 8 * MAP_PAGE_WORDS as u64;
/// A dying holder's writes get this long; then the error names the file.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(60);
/// A wait of this length is worth a line in the log.
const LOCK_WAIT_LOGGED: Duration = Duration::from_secs(1);
/// After so many refusals in a row a file system is taken for one that never writes without waiting.
const REFUSALS_MAX: u32 = 16;
/// It is then asked again once in so many calls.
const REFUSED_ASK_EVERY: u32 = 1024;
/// Names of files on their way to [`Disk::write_small`]'s rename; never listed.
const TEMPORARY_PREFIX: &str = ".tmp-";
/// `statfs(2)` of a file system that is memory only.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
/// The kernel keeps at most so many neighbouring bytes as one.
const FOLIO_BYTES_MAX: u64 = 2 << 20;
/// `cachestat(2)`, the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;
/// Where a node's local files are.
#[derive(Clone, Debug)]
pub struct RealDiskConfig {
    /// Survives power loss. Made if it is not there.
    pub state_dir: PathBuf,
    /// Should be on tmpfs; a directory of this state directory's own is made in it. `None`: a fitting place is found.
    pub runtime_dir: Option<PathBuf>,
}

/// The real machine's disk.
pub struct RealDisk {
    shared: Arc<Shared>,
}

struct Shared {
    state_dir: PathBuf,
    runtime_dir: PathBuf,
    runtime_is_tmpfs: bool,
    boot_id: [u8; 16],
    /// Makes the names of temporary files of two processes differ.
    random: u64,
    temporary_count: AtomicU64,
    /// Directories whose names are known to be durable.
    durable_dirs: Mutex<HashSet<PathBuf>>,
}

impl RealDisk {
    /// Finds the directories, makes them where they are missing, and removes what earlier boots left of live maps.
    /// Blocks: for the start of the daemon.
    ///
    /// # Errors
    /// A directory cannot be made or is not this user's.
    pub fn open(config: RealDiskConfig) -> io::Result<Self> {
        make_dirs(&config.state_dir)?;
        let state_dir = fs::canonicalize(&config.state_dir).map_err(at("resolve", &config.state_dir))?;
        let boot_id = read_boot_id()?;
        remove_old_fallbacks(&state_dir, boot_id);
        let (runtime_dir, runtime_is_tmpfs) = choose_runtime_dir(&state_dir, config.runtime_dir, boot_id)?;
        if !runtime_is_tmpfs {
            log::warn!(
                "no tmpfs for live maps: they are kept in {}, and writes may wait for its disk",
                runtime_dir.display()
            );
        }
        let shared = Shared {
            state_dir,
            runtime_dir,
            runtime_is_tmpfs,
            boot_id,
            random: rand::random(),
            temporary_count: AtomicU64::new(0),
            durable_dirs: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Whether live maps are in memory, so that touching one never waits for a disk.
    pub fn runtime_is_tmpfs(&self) -> bool {
        self.shared.runtime_is_tmpfs
    }

    /// Runs `work` where it may block. It goes on when the future is dropped after its first poll.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> io::Result<T> + Send + 'static,
    ) -> BoxFuture<'static, io::Result<T>> {
        let shared = self.shared.clone();
        blocking(move || work(&shared))
    }
}

/// Raises the limit of open files to what the machine allows, and returns it.
///
/// # Errors
/// The kernel refuses.
pub fn raise_file_limit() -> io::Result<Option<u64>> {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        rustix::process::setrlimit(Resource::Nofile, limit)?;
    }
    Ok(limit.current)
}

fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> BoxFuture<'static, io::Result<T>> {
    Box::pin(async move {
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(io::Error::other("the daemon is stopping")),
            },
        }
    })
}

/// Names the attempt and the file in an error, which keeps its kind.
fn at<'a>(attempt: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> io::Error + 'a {
    move |error| io::Error::new(error.kind(), format!("{attempt} {}: {error}", path.display()))
}

/// Reading and writing, for this user only. The standard library sets `O_CLOEXEC`.
fn open_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

impl Shared {
    fn root(&self, place: Place) -> &Path {
        match place {
            Place::State => &self.state_dir,
            Place::Runtime => &self.runtime_dir,
        }
    }

    /// Where a path is, for names that stay below the directory. The empty path is the directory itself.
    fn resolve(&self, path: &DiskPath) -> io::Result<PathBuf> {
        let root = self.root(path.place);
        if path.path.is_empty() {
            return Ok(root.to_owned());
        }
        let is_name = |segment: &str| !matches!(segment, "" | "." | "..") && !segment.contains('\0');
        let plain = Path::new(&path.path).components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || !path.path.split('/').all(is_name) {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("{:?} is no path of a file", path.path),
            ));
        }
        Ok(root.join(&path.path))
    }

    /// As [`Shared::resolve`], for something in the directory.
    fn resolve_entry(&self, path: &DiskPath) -> io::Result<PathBuf> {
        if path.path.is_empty() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the path of a file is empty"));
        }
        self.resolve(path)
    }

    /// Makes the directory that `path` is in, and its name durable even if someone else just made it.
    fn make_parents(&self, path: &DiskPath) -> io::Result<()> {
        let parent = path.parent();
        if parent.path.is_empty() || self.durable_dirs.lock().contains(&self.resolve(&parent)?) {
            return Ok(());
        }
        self.make_parents(&parent)?;
        let (dir, above) = (self.resolve(&parent)?, self.resolve(&parent.parent())?);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(at("make directory", &dir)(error));
            }
            _ => sync_directory(&above)?,
        }
        self.durable_dirs.lock().insert(dir);
        Ok(())
    }

    /// Runs `make`, which makes something in the directory of `path`, with that directory there.
    fn with_parents<T>(&self, path: &DiskPath, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        self.make_parents(path)?;
        match make() {
            // Somebody removed a directory that we made before.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.durable_dirs.lock().clear();
                self.make_parents(path)?;
                make()
            }
            result => result,
        }
    }

    /// A new file of `len_bytes`; none if anything fails.
    fn create_file(&self, path: &DiskPath, len_bytes: u64, lock: Lock) -> io::Result<File> {
        let full = self.resolve_entry(path)?;
        let file = self
            .with_parents(path, || open_options().create_new(true).open(&full))
            .map_err(at("create", &full))?;
        match file.set_len(len_bytes).map_err(at("size", &full)).and_then(|()| take(&file, &full, lock)) {
            Ok(()) => Ok(file),
            Err(error) => {
                // The first error is the one to tell.
                drop(fs::remove_file(&full));
                Err(error)
            }
        }
    }

    fn open_file(&self, path: &DiskPath, lock: Lock) -> io::Result<File> {
        let full = self.resolve_entry(path)?;
        let file = open_options().open(&full).map_err(at("open", &full))?;
        take(&file, &full, lock)?;
        // Its last holder may have removed it while we waited.
        if lock == Lock::Exclusive && file.metadata()?.nlink() == 0 {
            return Err(at("lock", &full)(io::Error::from(ErrorKind::NotFound)));
        }
        Ok(file)
    }
}

fn take(file: &File, path: &Path, lock: Lock) -> io::Result<()> {
    match lock {
        Lock::None => Ok(()),
        Lock::Exclusive => lock_exclusive(file, path, LOCK_WAIT_MAX),
    }
}

/// Waits for the lock: a killed process holds it until its last write is through.
fn lock_exclusive(file: &File, path: &Path, wait_max: Duration) -> io::Result<()> {
    let (mut waited, mut pause, mut logged) = (Duration::ZERO, Duration::from_millis(1), false);
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if logged => {
                log::info!("locked {} after {} s", path.display(), waited.as_secs());
                return Ok(());
            }
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) if waited >= wait_max => {
                let text =
                    format!("lock {}: another process holds it for {} s", path.display(), waited.as_secs());
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(at("lock", path)(error.into())),
        }
        if waited >= LOCK_WAIT_LOGGED && !logged {
            log::warn!("waiting for another process to let go of {}", path.display());
            logged = true;
        }
        std::thread::sleep(pause);
        waited += pause;
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

impl Disk for RealDisk {
    fn create(
        &self,
        path: DiskPath,
        len_bytes: u64,
        lock: Lock,
    ) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>> {
        self.run(move |disk| RealFile::share(disk.create_file(&path, len_bytes, lock)?))
    }

    fn open(&self, path: DiskPath, lock: Lock) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>> {
        self.run(move |disk| RealFile::share(disk.open_file(&path, lock)?))
    }

    fn stat(&self, path: DiskPath) -> BoxFuture<'static, io::Result<(u64, u64)>> {
        self.run(move |disk| {
            let full = disk.resolve_entry(&path)?;
            let found = fs::metadata(&full).map_err(at("look at", &full))?;
            Ok((found.len(), found.ino()))
        })
    }

    fn read_small(&self, path: DiskPath, max_bytes: u64) -> BoxFuture<'static, io::Result<Bytes>> {
        self.run(move |disk| {
            let full = disk.resolve_entry(&path)?;
            let mut data = Vec::new();
            File::open(&full)
                .and_then(|file| file.take(max_bytes.saturating_add(1)).read_to_end(&mut data))
                .map_err(at("read", &full))?;
            if data.len() as u64 > max_bytes {
                let text = format!("{} is larger than {max_bytes} bytes", full.display());
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
            Ok(data.into())
        })
    }

    fn write_small(&self, path: DiskPath, data: Bytes) -> BoxFuture<'static, io::Result<()>> {
        self.run(move |disk| {
            let full = disk.resolve_entry(&path)?;
            let count = disk.temporary_count.fetch_add(1, Ordering::Relaxed);
            let temporary = full.with_file_name(format!("{TEMPORARY_PREFIX}{:016x}-{count}", disk.random));
            disk.with_parents(&path, || replace_file(&full, &temporary, &data))
        })
    }

    fn rename(&self, from: DiskPath, to: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.run(move |disk| {
            if from.parent() != to.parent() {
                return Err(io::Error::new(ErrorKind::InvalidInput, "a rename stays within one directory"));
            }
            let full = disk.resolve_entry(&from)?;
            fs::rename(&full, disk.resolve_entry(&to)?).map_err(at("rename", &full))
        })
    }

    fn remove(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.run(move |disk| {
            let full = disk.resolve_entry(&path)?;
            fs::remove_file(&full).or_else(gone_is_fine).map_err(at("remove", &full))
        })
    }

    fn remove_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.run(move |disk| {
            let full = disk.resolve_entry(&path)?;
            disk.durable_dirs.lock().remove(&full);
            // What a killed process was about to rename is in nobody's list, so nobody else removes it.
            for name in names_in(&full)?.iter().filter(|name| name.starts_with(TEMPORARY_PREFIX)) {
                fs::remove_file(full.join(name)).or_else(gone_is_fine).map_err(at("remove", &full))?;
            }
            fs::remove_dir(&full).or_else(gone_is_fine).map_err(at("remove", &full))
        })
    }

    fn list(&self, path: DiskPath) -> BoxFuture<'static, io::Result<Vec<String>>> {
        self.run(move |disk| {
            let mut names = names_in(&disk.resolve(&path)?)?;
            names.retain(|name| !name.starts_with(TEMPORARY_PREFIX));
            names.sort_unstable();
            Ok(names)
        })
    }

    fn sync_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        self.run(move |disk| sync_directory(&disk.resolve(&path)?))
    }

    fn map(
        &self,
        path: DiskPath,
        words: usize,
        create: Create,
    ) -> BoxFuture<'static, io::Result<Arc<dyn SharedMap>>> {
        self.run(move |disk| {
            let full = disk.resolve_entry(&path)?;
            let len_bytes = (words as u64)
                .checked_mul(8)
                .filter(|&bytes| bytes > 0 && i64::try_from(bytes).is_ok())
                .ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "no file has that many words"))?;
            let file = match create {
                Create::New => disk.create_file(&path, len_bytes, Lock::None)?,
                Create::Existing => disk.open_file(&path, Lock::None)?,
            };
            let found = file.metadata().map_err(at("look at", &full))?.len();
            if found != len_bytes {
                let text = format!("{} has {found} bytes instead of {len_bytes}", full.display());
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
            let map = RealMap::new(file, words).map_err(at("map", &full))?;
            Ok(Arc::new(map) as Arc<dyn SharedMap>)
        })
    }

    fn space(&self) -> BoxFuture<'static, io::Result<(u64, u64)>> {
        self.run(|disk| {
            let found = rustix::fs::statvfs(&disk.state_dir)?;
            let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
            Ok((bytes(found.f_bavail), bytes(found.f_blocks)))
        })
    }

    fn boot_id(&self) -> [u8; 16] {
        self.shared.boot_id
    }
}

fn gone_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Names in a directory, which may be missing. What is not UTF-8 is not ours.
fn names_in(path: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at("list", path)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(at("list", path))?.file_name().into_string().ok());
    }
    Ok(names)
}

// ---- files

/// An open file of the real machine.
pub struct RealFile {
    inner: Arc<OpenFile>,
    inode: u64,
}

struct OpenFile {
    /// `None` only while it is being dropped.
    file: Option<File>,
    /// The file system knows no `NOWAIT` reads.
    never_reads: AtomicBool,
    /// The file system knows no `NOWAIT` writes.
    never_writes: AtomicBool,
    write_refusals: Refusals,
}

/// Whether a file system writes without waiting at all. Only saves calls: being wrong is harmless.
#[derive(Default)]
struct Refusals {
    in_a_row: AtomicU32,
}

impl Refusals {
    fn is_worth_asking(&self) -> bool {
        if self.in_a_row.load(Ordering::Relaxed) < REFUSALS_MAX {
            return true;
        }
        let calls = self.in_a_row.fetch_add(1, Ordering::Relaxed).saturating_sub(REFUSALS_MAX);
        if calls < REFUSED_ASK_EVERY {
            return false;
        }
        self.in_a_row.store(REFUSALS_MAX, Ordering::Relaxed);
        true
    }

    fn note_success(&self) {
        if self.in_a_row.load(Ordering::Relaxed) != 0 {
            self.in_a_row.store(0, Ordering::Relaxed);
        }
    }

    fn note_refusal(&self) {
        if self.in_a_row.load(Ordering::Relaxed) < REFUSALS_MAX {
            self.in_a_row.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl OpenFile {
    fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| io::Error::other("the file is closed"))
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // The last close of a large unlinked file takes as long as freeing its blocks: never on a thread that serves.
        if let Some(file) = self.file.take()
            && let Some(reaper) = reaper()
        {
            // A reaper that is gone gives the file back in the error, which closes it here.
            drop(reaper.send(file));
        }
    }
}

/// Where files go to be closed. `None` if there is no thread to be had: they are closed on the spot.
fn reaper() -> Option<&'static mpsc::Sender<File>> {
    static REAPER: OnceLock<Option<mpsc::Sender<File>>> = OnceLock::new();
    REAPER
        .get_or_init(|| {
            let (sender, files) = mpsc::channel::<File>();
            let thread = std::thread::Builder::new().name("reaper".into());
            thread.spawn(move || files.into_iter().for_each(drop)).ok().map(|_| sender)
        })
        .as_ref()
}

impl RealFile {
    fn share(file: File) -> io::Result<Arc<dyn DiskFile>> {
        let inode = file.metadata()?.ino();
        let inner = OpenFile {
            file: Some(file),
            never_reads: AtomicBool::new(false),
            never_writes: AtomicBool::new(false),
            write_refusals: Refusals::default(),
        };
        Ok(Arc::new(Self { inner: Arc::new(inner), inode }))
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> BoxFuture<'static, io::Result<T>> {
        let inner = self.inner.clone();
        blocking(move || work(inner.file()?))
    }
}

/// Runs a `NOWAIT` call, again when a signal interrupts it. Every refusal is `WouldBlock`, the next ones without a call
/// once the file system said that it knows no such thing.
fn without_waiting(
    never: &AtomicBool,
    mut call: impl FnMut() -> rustix::io::Result<usize>,
) -> io::Result<usize> {
    if never.load(Ordering::Relaxed) {
        return Err(ErrorKind::WouldBlock.into());
    }
    loop {
        match call() {
            Ok(count) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(ErrorKind::WouldBlock.into()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                never.store(true, Ordering::Relaxed);
                return Err(ErrorKind::WouldBlock.into());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

impl DiskFile for RealFile {
    fn try_read_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        let file = self.inner.file()?;
        without_waiting(&self.inner.never_reads, || {
            rustix::io::preadv2(file, &mut [IoSliceMut::new(buf)], offset_bytes, ReadWriteFlags::NOWAIT)
        })
    }

    fn try_write_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<usize> {
        let file = self.inner.file()?;
        let refusals = &self.inner.write_refusals;
        if !refusals.is_worth_asking() {
            return Err(ErrorKind::WouldBlock.into());
        }
        let result = without_waiting(&self.inner.never_writes, || {
            rustix::io::pwritev2(file, &[IoSlice::new(buf)], offset_bytes, ReadWriteFlags::NOWAIT)
        });
        match result {
            Ok(count) => {
                refusals.note_success();
                Ok(count)
            }
            // Where the disk seems full, only a write that may wait for space being freed can say so.
            Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                Err(ErrorKind::WouldBlock.into())
            }
            Err(error) => {
                if error.kind() == ErrorKind::WouldBlock {
                    refusals.note_refusal();
                }
                Err(error)
            }
        }
    }

    fn read_at(&self, offset_bytes: u64, len: usize) -> BoxFuture<'static, io::Result<Bytes>> {
        self.run(move |file| {
            let mut data = vec![0; len];
            file.read_exact_at(&mut data, offset_bytes)?;
            Ok(data.into())
        })
    }

    fn write_at(&self, data: Bytes, offset_bytes: u64) -> BoxFuture<'static, io::Result<()>> {
        self.run(move |file| file.write_all_at(&data, offset_bytes))
    }

    fn sync_data(&self) -> BoxFuture<'static, io::Result<()>> {
        // Not `File::sync_data`, which would try again when interrupted: one failure is final.
        self.run(|file| Ok(rustix::fs::fdatasync(file)?))
    }

    fn check_write_back(&self) -> BoxFuture<'static, io::Result<()>> {
        self.run(|file| {
            let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
                | libc::SYNC_FILE_RANGE_WRITE
                | libc::SYNC_FILE_RANGE_WAIT_AFTER;
            // SAFETY: takes no pointer, and the descriptor is open for as long as `file` is borrowed. A length of 0
            // means up to the end.
            let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        })
    }

    fn forgets(&self) -> bool {
        self.inner.file().is_ok_and(|file| {
            let is_memory = rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type == TMPFS_MAGIC);
            !is_memory && resident_pages(file, 0, 1).is_some()
        })
    }

    fn forget(&self, offset_bytes: u64, len_bytes: u64) -> BoxFuture<'static, io::Result<bool>> {
        self.run(move |file| {
            let is_gone = || resident_pages(file, offset_bytes, len_bytes) == Some(0);
            let drop_pages = |start: u64, len: u64| {
                rustix::fs::fadvise(file, start, NonZero::new(len), rustix::fs::Advice::DontNeed)
            };
            drop_pages(offset_bytes, len_bytes)?;
            if !is_gone() {
                // The kernel may keep neighbours together with it, and drops only what it is told as a whole.
                let start = offset_bytes / FOLIO_BYTES_MAX * FOLIO_BYTES_MAX;
                let end = (offset_bytes + len_bytes).next_multiple_of(FOLIO_BYTES_MAX);
                drop_pages(start, end - start)?;
            }
            Ok(is_gone())
        })
    }

    fn expect_random_reads(&self) {
        // Only a hint: without it nothing breaks.
        if let Ok(file) = self.inner.file() {
            drop(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random).map_err(io::Error::from));
        }
    }

    fn data_stretches(&self, from_bytes: u64, max: usize) -> BoxFuture<'static, io::Result<Vec<(u64, u64)>>> {
        self.run(move |file| data_stretches(file, from_bytes, max))
    }

    fn inode(&self) -> u64 {
        self.inode
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.file.as_ref().map(|file| file.as_fd())
    }

    fn is_resident(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        self.inner.file().is_ok_and(|file| is_resident(file, offset_bytes, len_bytes))
    }

    fn write_here(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.inner.file()?.write_all_at(buf, offset_bytes)
    }
}

/// Whether all pages of a stretch are in the page cache.
fn is_resident(file: &File, offset_bytes: u64, len_bytes: u64) -> bool {
    let page_bytes = rustix::param::page_size() as u64;
    let pages = (offset_bytes + len_bytes).div_ceil(page_bytes) - offset_bytes / page_bytes;
    resident_pages(file, offset_bytes, len_bytes).is_some_and(|resident| resident >= pages)
}

/// How many pages of a stretch are in the page cache, by `cachestat(2)`. `None` on kernels before 6.5.
fn resident_pages(file: &File, offset_bytes: u64, len_bytes: u64) -> Option<u64> {
    #[repr(C)]
    struct Stretch {
        offset_bytes: u64,
        len_bytes: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        dirty: u64,
        write_back: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let stretch = Stretch { offset_bytes, len_bytes };
    let mut counts = Counts::default();
    // SAFETY: both structures are laid out as the kernel's and live until the call returns; the descriptor is open for
    // as long as `file` is borrowed.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const stretch, &raw mut counts, 0_u32) };
    (result == 0).then_some(counts.cached)
}

/// Start and end of each allocated stretch.
fn data_stretches(file: &File, from_bytes: u64, max: usize) -> io::Result<Vec<(u64, u64)>> {
    let (mut stretches, mut from) = (Vec::new(), from_bytes);
    while stretches.len() < max {
        let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that does not know: all may be data.
            Err(Errno::INVAL) => {
                let end = file.metadata()?.len();
                if from < end {
                    stretches.push((from, end));
                }
                break;
            }
            Err(error) => return Err(error.into()),
        };
        from = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            // Truncated in between.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        stretches.push((start, from));
    }
    Ok(stretches)
}

// ---- maps

/// A mapped file of the real machine.
pub struct RealMap {
    map: MmapRaw,
    words: usize,
    file: File,
}

impl RealMap {
    /// Maps a file of exactly `words` words.
    fn new(file: File, words: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(words * 8).map_raw(&file)?;
        // No page is brought in but the one that is touched. Only a hint: without it nothing breaks.
        drop(map.advise(Advice::Random));
        Ok(Self { map, words, file })
    }
}

impl SharedMap for RealMap {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, readable and writable, `words * 8` bytes long, and lives as long as
        // `self`, which never remaps it. Every bit pattern is an `AtomicU64`, and nobody accesses the memory but
        // through atomics: no other reference into it is ever made, and the file is in a directory of this user's
        // alone, where no file of a map is written or truncated.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU64>(), self.words) }
    }

    fn allocate(&self, page: usize) -> io::Result<()> {
        if page >= self.words.div_ceil(MAP_PAGE_WORDS) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the map has no such page"));
        }
        let start = page as u64 * MAP_PAGE_BYTES;
        let len = MAP_PAGE_BYTES.min(self.words as u64 * 8 - start);
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), start, len) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn allocated_pages(&self) -> io::Result<Vec<usize>> {
        let mut pages: Vec<usize> = Vec::new();
        for (start, end) in data_stretches(&self.file, 0, usize::MAX)? {
            let first = (start / MAP_PAGE_BYTES).max(pages.last().map_or(0, |&page| page as u64 + 1));
            for page in first..end.div_ceil(MAP_PAGE_BYTES) {
                pages.push(usize::try_from(page).map_err(io::Error::other)?);
            }
        }
        Ok(pages)
    }
}

#[cfg(test)]
mod tests;
