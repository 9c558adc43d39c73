//! A pool in a plain directory, also one that several machines share.
//!
//! Owns: the layout, the order of writing, linking and syncing, and which thread waits for the disk.
//! Does not own: how processes agree on a swap ([`protocol`]), or what the bytes mean.
//!
//! ```text
//! key                what it is                      where it lies
//! packs/<id>         fixed: a file                   packs/<id>
//! snapshots/<u>/<n>  fixed: a file                   snapshots/<u>/<n>
//! volumes/vm-7       swapped: a folder of versions   volumes/vm-7~/00000000000000000041, …42
//! —                  files without a name yet        .tmp/<random>
//! —                  space for deletes on a full disk   .reserve
//! ```
//! No key holds `~` or a segment that begins with a dot, so no key's place is another's, or anything but a key's.
//! A name ending in `~` is only ever a folder of versions, one without it a fixed object or the folder of longer keys.
//!
//! Nothing is locked and no object is ever replaced by a rename: a lock may lock nothing on a shared file system, or be
//! held by a machine that sleeps; and a name that is replaced can be missed by a listing. A file is written and synced in
//! `.tmp`, then linked to its name, then the folder is synced. Folders stay, also when nothing is left in them.

mod files;
mod listing;
#[cfg(test)]
mod model;
mod protocol;
mod reserve;
mod versions;

use super::{ETag, Expect, GetRange, Key, Object, ObjectStore, Page, StoreError};
use crate::offload::Offload;
use async_trait::async_trait;
use bytes::Bytes;
use files::{Effect, Fault, Files, Missing};
use listing::Listing;
use protocol::Outcome;
use reserve::Reserve;
use rustix::fd::AsFd;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::Semaphore;
use versions::{Change, SWAPPED_BYTES_MAX, Versions, Want, split};

/// What opening does about a directory that is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IfMissing {
    /// Makes it; the directory above must be there.
    Create,
    /// Answers an error.
    Fail,
}

/// How a directory pool is opened.
#[derive(Clone, Debug)]
pub struct DirConfig {
    pub if_missing: IfMissing,
    /// Operations under way at once, each on a thread; more wait for their turn.
    pub operations_max: usize,
    /// Space set aside for swaps and deletes on a full disk.
    pub reserve_bytes: u64,
    /// Top folders whose fixed objects may use it too: what has to be written before something can be deleted.
    pub reserve_folders: Vec<String>,
}

impl Default for DirConfig {
    fn default() -> Self {
        Self {
            if_missing: IfMissing::Fail,
            operations_max: 64,
            reserve_bytes: 4 << 20,
            reserve_folders: vec!["trash".into()],
        }
    }
}

/// An [`ObjectStore`] in a directory.
#[derive(Clone)]
pub struct DirStore {
    shared: Arc<Shared>,
    operations: Arc<Semaphore>,
}

struct Shared {
    files: Files,
    reserve: Reserve,
    reserve_folders: Vec<String>,
}

impl DirStore {
    /// Opens a pool's directory, tries whether the file system can hold one, and removes what processes that died left
    /// in `.tmp` over a day ago.
    ///
    /// # Errors
    /// Those of the file system, and `InvalidData` if it does not keep what the pool rests on.
    pub async fn open(root: PathBuf, config: DirConfig) -> io::Result<Self> {
        let operations = Arc::new(Semaphore::new(config.operations_max.max(1)));
        let shared = Offload::Threads.run(move || Shared::open(&root, &config)).await;
        Ok(Self { shared: Arc::new(shared.map_err(io_error)?), operations })
    }

    /// Runs an operation as one piece on a thread of its own: once begun, it goes on whether or not anybody waits.
    async fn run<T: Send + 'static>(&self, operation: impl FnOnce(&Shared) -> T + Send + 'static) -> T {
        let turn = Arc::clone(&self.operations).acquire_owned().await.expect("the semaphore is never closed");
        let shared = Arc::clone(&self.shared);
        Offload::Threads
            .run(move || {
                let _turn = turn;
                operation(&shared)
            })
            .await
    }
}

#[async_trait]
impl ObjectStore for DirStore {
    /// Durable is what it read of a swapped object, and of a fixed one that was read whole. Parts of fixed objects are
    /// read without: whatever names them was made after them.
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        let key = key.clone();
        self.run(move |shared| shared.get(&key, range)).await
    }

    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError> {
        let key = key.clone();
        self.run(move |shared| shared.put_new(&key, &bytes)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let key = key.clone();
        self.run(move |shared| shared.reserve.run(shared.files.root.as_fd(), || shared.delete(&key))).await
    }

    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError> {
        let key = key.clone();
        if bytes.is_empty() {
            return Err(StoreError::Invalid { key, reason: "a swapped object is not empty".into() });
        }
        self.run(move |shared| shared.swap(&key, &expect, &bytes)).await
    }

    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError> {
        let key = key.clone();
        self.run(move |shared| shared.swap(&key, &Expect::State(expect), &[]).map(drop)).await
    }

    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError> {
        let Some(folder) = Key::new(folder) else {
            let reason = "not a folder's name".into();
            return Err(StoreError::Invalid { key: Key(folder.chars().take(64).collect()), reason });
        };
        let after = after.cloned();
        self.run(move |shared| Listing::page(&shared.files, &folder, after.as_ref().map(Key::as_str), max))
            .await
    }
}

impl Shared {
    fn open(root: &PathBuf, config: &DirConfig) -> Result<Self, Fault> {
        if config.if_missing == IfMissing::Create {
            match rustix::fs::mkdir(root, Mode::RWXU) {
                Ok(()) => {
                    let above = root.parent().filter(|above| !above.as_os_str().is_empty());
                    let above = above.unwrap_or(std::path::Path::new("."));
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    rustix::fs::fsync(rustix::fs::open(above, flags, Mode::empty())?)?;
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let files = Files::open(rustix::fs::open(root, flags, Mode::empty())?)?;
        let reserve = Reserve::open(files.root.as_fd(), config.reserve_bytes);
        Ok(Self { files, reserve, reserve_folders: config.reserve_folders.clone() })
    }

    fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        let max_bytes = match range {
            GetRange::Whole { max_bytes } => max_bytes,
            GetRange::Span { .. } | GetRange::Suffix { .. } => SWAPPED_BYTES_MAX,
        };
        let mut versions = Versions::to_read(&self.files, key, Want::Content { max_bytes });
        let found = versions.until_done(protocol::read).map_err(|fault| fault.of(key, Effect::None))?;
        if found.is_none() {
            return self
                .get_fixed(key, range)
                .map_err(|fault| fault.of(key, Effect::None))?
                .ok_or_else(|| StoreError::NotFound(key.clone()));
        }
        let Some(current) = versions.into_current().filter(|current| !current.is_deleted()) else {
            return Err(StoreError::NotFound(key.clone()));
        };
        let (object_bytes, etag) = (current.content_bytes, current.etag());
        let (start, len) = place(range, object_bytes).map_err(|fault| fault.of(key, Effect::None))?;
        let (start, len) = (crate::geometry::len_of(start), crate::geometry::len_of(len));
        Ok(Object { bytes: current.into_content().slice(start..start + len), object_bytes, etag })
    }

    fn get_fixed(&self, key: &Key, range: GetRange) -> Result<Option<Object>, Fault> {
        let (segments, name) = split(key);
        let Some(folder) = self.files.folder(&segments, Missing::Leave)? else { return Ok(None) };
        let Some((file, stat)) = files::open_file(folder.as_fd(), name)? else { return Ok(None) };
        let object_bytes = files::size_of(&stat);
        let (start, len) = place(range, object_bytes)?;
        let bytes = Bytes::from(files::read_at(&file, start, len)?);
        if matches!(range, GetRange::Whole { .. }) {
            // Also the folders above, which whoever made them may not have lived to sync.
            self.files.folder(&segments, Missing::Make)?;
            self.files.sync_key(folder.as_fd(), key, files::token_of(&stat))?;
        }
        let etag =
            ETag(format!("{:x}-{:x}-{:x}-{object_bytes:x}", stat.st_ino, stat.st_mtime, stat.st_mtime_nsec));
        Ok(Some(Object { bytes, object_bytes, etag }))
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<(), StoreError> {
        let (segments, _) = split(key);
        if segments.first().is_some_and(|top| self.reserve_folders.iter().any(|folder| folder == top)) {
            return self.reserve.run(self.files.root.as_fd(), || self.put_fixed(key, bytes));
        }
        let _gate = self.reserve.stay_out();
        self.put_fixed(key, bytes)
    }

    fn put_fixed(&self, key: &Key, bytes: &[u8]) -> Result<(), StoreError> {
        let nothing_done = |fault: Fault| fault.of(key, Effect::None);
        let perhaps_done = |fault: Fault| fault.of(key, Effect::Perhaps);
        let (segments, name) = split(key);
        let folder = self.files.folder(&segments, Missing::Make).map_err(nothing_done)?;
        let Some(folder) = folder else {
            return Err(nothing_done(Fault::Unavailable("the folder is gone".into())));
        };
        let temp = self.files.write_temp(&[bytes]).map_err(nothing_done)?;
        match temp.link(folder.as_fd(), name) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                if !temp.is_at(folder.as_fd(), name).map_err(perhaps_done)? {
                    // The caller may act on there being one, and whoever made it may not have lived to sync it.
                    rustix::fs::fsync(&folder).map_err(|errno| nothing_done(errno.into()))?;
                    return Err(StoreError::Conflict(key.clone()));
                }
            }
            Err(errno) if files::link_is_undone(errno) => return Err(nothing_done(errno.into())),
            Err(errno) => return Err(perhaps_done(errno.into())),
        }
        rustix::fs::fsync(&folder).map_err(|errno| perhaps_done(errno.into()))
    }

    fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let (segments, name) = split(key);
        let failed = |fault: Fault| fault.of(key, Effect::None);
        let Some(folder) = self.files.folder(&segments, Missing::Leave).map_err(failed)? else {
            return Ok(());
        };
        match rustix::fs::unlinkat(&folder, name, AtFlags::empty()) {
            // A folder of longer keys may have the name; then no object has.
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        rustix::fs::fsync(&folder).map_err(|errno| Fault::Os(errno).of(key, Effect::Perhaps))
    }

    /// Swaps in new content; none: deletes.
    fn swap(&self, key: &Key, expect: &Expect, content: &[u8]) -> Result<ETag, StoreError> {
        if u64::try_from(content.len()).is_ok_and(|len| len > SWAPPED_BYTES_MAX) {
            let reason = format!("{} bytes, more than {SWAPPED_BYTES_MAX}", content.len());
            return Err(StoreError::Invalid { key: key.clone(), reason });
        }
        self.reserve.run(self.files.root.as_fd(), || {
            let change = Change { expect: expect.clone(), content };
            let mut versions = Versions::to_change(&self.files, key, change);
            let outcome = versions.until_done(protocol::swap);
            match outcome.map_err(|fault| fault.of(key, versions.effect))? {
                Outcome::Conflict => Err(StoreError::Conflict(key.clone())),
                Outcome::Unclear => {
                    let reason = "others went on meanwhile, perhaps from it".into();
                    Err(StoreError::Unclear { key: key.clone(), reason })
                }
                Outcome::Won(number) => {
                    versions::tidy(&mut versions, number);
                    versions.linked_etag().ok_or_else(|| {
                        Fault::Unavailable("nothing was linked".into()).of(key, Effect::Perhaps)
                    })
                }
            }
        })
    }
}

/// Start and length of the range in an object of that size.
fn place(range: GetRange, object_bytes: u64) -> Result<(u64, u64), Fault> {
    match range {
        GetRange::Whole { max_bytes } if object_bytes > max_bytes => {
            Err(Fault::Invalid(format!("{object_bytes} bytes, more than {max_bytes}")))
        }
        GetRange::Whole { .. } => Ok((0, object_bytes)),
        GetRange::Span { start, len } => match start.checked_add(len) {
            Some(end) if end <= object_bytes => Ok((start, len)),
            _ => Err(Fault::Invalid(format!("{object_bytes} bytes, too few for {len} from {start}"))),
        },
        GetRange::Suffix { len } => {
            let len = len.min(object_bytes);
            Ok((object_bytes - len, len))
        }
    }
}

fn io_error(fault: Fault) -> io::Error {
    match fault {
        Fault::Os(errno) => errno.into(),
        Fault::Invalid(reason) => io::Error::new(io::ErrorKind::InvalidData, reason),
        Fault::Unavailable(reason) => io::Error::other(reason),
    }
}
