//! Files and folders of a directory pool, below what is a key's own business.
//!
//! Owns: walking without following links, files that appear complete or not at all, what is known to be durable, and
//! what an error number means.
//! Does not own: the meaning of names (`dir.rs`) or of versions (`versions.rs`).

use crate::store::{Key, StoreError};
use parking_lot::Mutex;
use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};

/// Where files are written before they get their name. No key begins with a dot, so it is in no listing.
pub const TEMP_FOLDER: &str = ".tmp";
/// What a process left in [`TEMP_FOLDER`] is removed at this age.
const TEMP_AGE_SECONDS_MAX: i64 = 24 * 60 * 60;
/// Names remembered as durable. Beyond it all are forgotten, which costs a sync each.
const DURABLE_NAMES_MAX: usize = 65_536;

const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
const FOLDER_MODE: Mode = Mode::RWXU;
const OPEN_FOLDER: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
// A pipe must not block the open; what is no regular file is refused after it.
const OPEN_FILE: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);
const MAKE_FILE: OFlags =
    OFlags::WRONLY.union(OFlags::CREATE).union(OFlags::EXCL).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why a step stopped.
#[derive(Debug)]
pub enum Fault {
    Os(Errno),
    Invalid(String),
    Unavailable(String),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Os(errno)
    }
}

/// Whether a change may have been made when a fault came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    None,
    Perhaps,
}

impl Fault {
    /// What it means to whoever asked for the key.
    pub fn of(self, key: &Key, effect: Effect) -> StoreError {
        let key = key.clone();
        match (effect, self) {
            (Effect::Perhaps, Self::Os(errno)) => StoreError::Unclear { key, reason: errno.to_string() },
            (Effect::Perhaps, Self::Invalid(reason) | Self::Unavailable(reason)) => {
                StoreError::Unclear { key, reason }
            }
            (Effect::None, Self::Invalid(reason)) => StoreError::Invalid { key, reason },
            (Effect::None, Self::Unavailable(reason)) => StoreError::Unavailable { key, reason },
            (Effect::None, Self::Os(errno)) => match errno {
                Errno::NOSPC | Errno::DQUOT => StoreError::NoSpace(key),
                Errno::LOOP
                | Errno::NOTDIR
                | Errno::ISDIR
                | Errno::NAMETOOLONG
                | Errno::FBIG
                | Errno::NXIO => StoreError::Invalid { key, reason: errno.to_string() },
                _ => StoreError::Unavailable { key, reason: errno.to_string() },
            },
        }
    }
}

/// Whether a failed `link` certainly made no name.
pub fn link_is_undone(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOSPC
            | Errno::DQUOT
            | Errno::ACCESS
            | Errno::PERM
            | Errno::ROFS
            | Errno::MLINK
            | Errno::NOENT
            | Errno::NOTDIR
            | Errno::NAMETOOLONG
            | Errno::XDEV
    )
}

/// What a walk does about a folder that is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    Leave,
    Make,
}

/// The folders of an open pool, and what this process knows of them.
pub struct Files {
    pub root: OwnedFd,
    temp: OwnedFd,
    durable: Mutex<Durable>,
}

/// Tells the states of one key apart: a version's nonce, or a fixed object's inode and time.
pub type StateToken = [u8; 16];

#[derive(Default)]
struct Durable {
    /// Folders whose names survive power loss, with those above them.
    folders: HashSet<String>,
    /// Keys whose names do, as of this state of theirs.
    keys: HashMap<String, StateToken>,
}

/// A complete, synced file without a name of its own yet; goes when dropped.
pub struct Temp<'a> {
    files: &'a Files,
    name: String,
    file: OwnedFd,
}

impl Files {
    /// Takes the pool's root; makes what it needs in there, and tries what everything rests on.
    pub fn open(root: OwnedFd) -> Result<Self, Fault> {
        match rustix::fs::mkdirat(&root, TEMP_FOLDER, FOLDER_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let temp = rustix::fs::openat(&root, TEMP_FOLDER, OPEN_FOLDER, Mode::empty())?;
        let files = Self { root, temp, durable: Mutex::default() };
        files.probe()?;
        Ok(files)
    }

    /// `link` must refuse a name that is taken: some file systems have no links, and one that replaced silently would
    /// lose every race.
    fn probe(&self) -> Result<(), Fault> {
        let (one, other) = (self.write_temp(&[b"1"])?, self.write_temp(&[b"2"])?);
        let name = format!("{}.probe", one.name);
        let linked = one.link(self.temp.as_fd(), &name);
        let again = other.link(self.temp.as_fd(), &name);
        let kept = one.is_at(self.temp.as_fd(), &name);
        let removed = rustix::fs::unlinkat(&self.temp, &name, AtFlags::empty());
        linked?;
        removed?;
        if again == Err(Errno::EXIST) && kept? {
            self.remove_leftovers(rustix::fs::fstat(&one.file)?.st_mtime);
            return Ok(());
        }
        Err(Fault::Invalid("the file system lets link() replace a name that is taken".into()))
    }

    /// Best effort, by the file system's own clock.
    fn remove_leftovers(&self, now_seconds: i64) {
        let Ok(names) = names_in(self.temp.as_fd()) else { return };
        for (name, _) in names {
            let Ok(stat) = rustix::fs::statat(&self.temp, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if now_seconds.saturating_sub(stat.st_mtime) <= TEMP_AGE_SECONDS_MAX {
                continue;
            }
            if is(&stat, FileType::Directory) {
                self.remove_temp_folder(&name);
            } else {
                best_effort(rustix::fs::unlinkat(&self.temp, &name, AtFlags::empty()));
            }
        }
    }

    fn remove_temp_folder(&self, name: &str) {
        if let Ok(folder) = rustix::fs::openat(&self.temp, name, OPEN_FOLDER, Mode::empty()) {
            for (inner, _) in names_in(folder.as_fd()).unwrap_or_default() {
                best_effort(rustix::fs::unlinkat(&folder, &inner, AtFlags::empty()));
            }
        }
        best_effort(rustix::fs::unlinkat(&self.temp, name, AtFlags::REMOVEDIR));
    }

    /// Opens the folder of these segments below the root; `None` if it is missing and to be left so. A folder made,
    /// and one that somebody else made and may not have synced, is durable before anything is put into it.
    pub fn folder(&self, segments: &[&str], missing: Missing) -> Result<Option<OwnedFd>, Fault> {
        let mut at = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?;
        for depth in 0..segments.len() {
            let name = segments[depth];
            let next = match open_folder(at.as_fd(), name)? {
                Some(next) => next,
                None if missing == Missing::Leave => return Ok(None),
                None => {
                    match rustix::fs::mkdirat(&at, name, FOLDER_MODE) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                    rustix::fs::openat(&at, name, OPEN_FOLDER, Mode::empty())?
                }
            };
            if missing == Missing::Make {
                self.sync_folder_name(at.as_fd(), &segments[..=depth].join("/"))?;
            }
            at = next;
        }
        Ok(Some(at))
    }

    /// Makes the folder's own name in `parent` durable, unless that is known.
    pub fn sync_folder_name(&self, parent: BorrowedFd<'_>, path: &str) -> Result<(), Fault> {
        if self.durable.lock().folders.contains(path) {
            return Ok(());
        }
        rustix::fs::fsync(parent)?;
        let mut durable = self.durable.lock();
        if durable.folders.len() >= DURABLE_NAMES_MAX {
            durable.folders.clear();
        }
        durable.folders.insert(path.to_owned());
        Ok(())
    }

    /// Syncs the folder that holds the key's name, unless the name, as of this state, is known to be durable.
    pub fn sync_key(&self, folder: BorrowedFd<'_>, key: &Key, state: StateToken) -> Result<(), Fault> {
        if self.durable.lock().keys.get(key.as_str()) == Some(&state) {
            return Ok(());
        }
        rustix::fs::fsync(folder)?;
        let mut durable = self.durable.lock();
        if durable.keys.len() >= DURABLE_NAMES_MAX {
            durable.keys.clear();
        }
        durable.keys.insert(key.as_str().to_owned(), state);
        Ok(())
    }

    /// Writes and syncs a file of these parts.
    pub fn write_temp(&self, parts: &[&[u8]]) -> Result<Temp<'_>, Fault> {
        let name = self.fresh_name();
        let file = rustix::fs::openat(&self.temp, &name, MAKE_FILE, FILE_MODE)?;
        let temp = Temp { files: self, name, file };
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                match rustix::io::write(&temp.file, rest) {
                    Ok(0) => return Err(Fault::Os(Errno::IO)),
                    Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        rustix::fs::fsync(&temp.file)?;
        Ok(temp)
    }

    /// Moves a folder that holds one empty file into place; one that is there already stays.
    pub fn move_folder_into(&self, parent: BorrowedFd<'_>, name: &str, inner: &str) -> Result<(), Fault> {
        let temp_name = self.fresh_name();
        rustix::fs::mkdirat(&self.temp, &temp_name, FOLDER_MODE)?;
        let moved = self.fill_and_move(&temp_name, parent, name, inner);
        if moved.is_err() {
            self.remove_temp_folder(&temp_name);
        }
        match moved {
            Ok(()) => Ok(()),
            // Whatever the reason, also a repeated request whose first answer was lost: a folder is there.
            Err(_) if open_folder(parent, name)?.is_some() => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn fill_and_move(
        &self,
        temp_name: &str,
        parent: BorrowedFd<'_>,
        name: &str,
        inner: &str,
    ) -> Result<(), Errno> {
        let folder = rustix::fs::openat(&self.temp, temp_name, OPEN_FOLDER, Mode::empty())?;
        drop(rustix::fs::openat(&folder, inner, MAKE_FILE, FILE_MODE)?);
        match rustix::fs::renameat_with(&self.temp, temp_name, parent, name, RenameFlags::NOREPLACE) {
            // Not every file system knows the flag. A folder with something in it is never replaced by a plain rename.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                rustix::fs::renameat(&self.temp, temp_name, parent, name)
            }
            moved => moved,
        }
    }

    fn fresh_name(&self) -> String {
        format!("{:032x}", rand::random::<u128>())
    }
}

impl Temp<'_> {
    /// Gives the file a name, unless that is taken.
    pub fn link(&self, folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
        rustix::fs::linkat(&self.files.temp, &self.name, folder, name, AtFlags::empty())
    }

    /// Whether the name is this very file's.
    pub fn is_at(&self, folder: BorrowedFd<'_>, name: &str) -> Result<bool, Fault> {
        let mine = rustix::fs::fstat(&self.file)?;
        // Opened, not only looked up: over a network a name may be answered from a cache.
        match rustix::fs::openat(folder, name, OPEN_FILE, Mode::empty()) {
            Ok(there) => {
                let there = rustix::fs::fstat(&there)?;
                Ok((there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino))
            }
            Err(Errno::NOENT | Errno::STALE | Errno::LOOP | Errno::NXIO) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        best_effort(rustix::fs::unlinkat(&self.files.temp, &self.name, AtFlags::empty()));
    }
}

/// For tidying whose failure leaves only what a later one removes.
pub fn best_effort(done: Result<(), Errno>) {
    if let Err(errno) = done {
        log::debug!("left something behind in the pool: {errno}");
    }
}

/// Opens a folder of a folder, never through a symbolic link.
pub fn open_folder(parent: BorrowedFd<'_>, name: &str) -> Result<Option<OwnedFd>, Fault> {
    match rustix::fs::openat(parent, name, OPEN_FOLDER, Mode::empty()) {
        Ok(folder) => Ok(Some(folder)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::NOTDIR | Errno::LOOP) => {
            // An object has the name: then there are no keys below it.
            match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if is(&stat, FileType::RegularFile) => Ok(None),
                _ => Err(Fault::Invalid(format!("{name} is not a folder"))),
            }
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Opens a regular file; `None` if the name is free.
pub fn open_file(folder: BorrowedFd<'_>, name: &str) -> Result<Option<(OwnedFd, Stat)>, Fault> {
    let file = match rustix::fs::openat(folder, name, OPEN_FILE, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NXIO) => {
            return Err(Fault::Invalid(format!("{name} is not a regular file")));
        }
        Err(errno) => return Err(errno.into()),
    };
    let stat = rustix::fs::fstat(&file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some((file, stat))),
        // The folder of longer keys: no object has this name.
        FileType::Directory => Ok(None),
        _ => Err(Fault::Invalid(format!("{name} is not a regular file"))),
    }
}

/// Reads exactly these bytes. The caller has checked that the file has them.
pub fn read_at(file: &OwnedFd, start: u64, len: u64) -> Result<Vec<u8>, Fault> {
    let too_large = || Fault::Invalid(format!("{len} bytes are more than fit in memory"));
    let len_wanted = usize::try_from(len).map_err(|_| too_large())?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len_wanted).map_err(|_| too_large())?;
    while bytes.len() < len_wanted {
        // No overflow: both are within a file.
        let at = start.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        match rustix::io::pread(file, spare_capacity(&mut bytes), at) {
            Ok(0) => return Err(Fault::Invalid("the file became shorter while it was read".into())),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    bytes.truncate(len_wanted);
    Ok(bytes)
}

/// Size of a file.
pub fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// When a file was last written, by the clock of whoever stores it.
pub fn modified_unix_ms(stat: &Stat) -> u64 {
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    seconds.saturating_mul(1000).saturating_add(stat.st_mtime_nsec / 1_000_000)
}

/// What tells a fixed object from another that once had its name.
pub fn token_of(stat: &Stat) -> StateToken {
    let mut token = [0; 16];
    token[..8].copy_from_slice(&stat.st_ino.to_le_bytes());
    let time_ns = stat.st_mtime.wrapping_mul(1_000_000_000).to_le_bytes();
    let nsec = stat.st_mtime_nsec.to_le_bytes();
    for (at, byte) in token[8..].iter_mut().enumerate() {
        *byte = time_ns.get(at).unwrap_or(&0) ^ nsec.get(at).unwrap_or(&0);
    }
    token
}

/// Whether it is of that type.
pub fn is(stat: &Stat, file_type: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == file_type
}

/// All names of a folder that are text, with the type where the file system tells.
pub fn names_in(folder: BorrowedFd<'_>) -> Result<Vec<(String, FileType)>, Errno> {
    let mut names = Vec::new();
    for_each_name(folder, |name, file_type| names.push((name.to_owned(), file_type)))?;
    Ok(names)
}

/// Calls for each name of a folder that is text, in one listing that begins now.
pub fn for_each_name(folder: BorrowedFd<'_>, mut seen: impl FnMut(&str, FileType)) -> Result<(), Errno> {
    // Opened anew, for a position of its own.
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        if let Ok(name) = entry.file_name().to_str()
            && name != "."
            && name != ".."
        {
            seen(name, entry.file_type());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a network file system answers that repeated the request after its first answer was lost.
    #[test]
    fn g27_a_taken_name_is_known_to_be_ones_own() {
        let above = tempfile::tempdir().unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let files = Files::open(rustix::fs::open(above.path(), flags, Mode::empty()).unwrap()).unwrap();
        let (mine, other) = (files.write_temp(&[b"same"]).unwrap(), files.write_temp(&[b"same"]).unwrap());
        mine.link(files.root.as_fd(), "name").unwrap();
        assert_eq!(mine.link(files.root.as_fd(), "name"), Err(Errno::EXIST));
        assert!(mine.is_at(files.root.as_fd(), "name").unwrap());
        assert!(!other.is_at(files.root.as_fd(), "name").unwrap(), "the same bytes are not the same file");
        assert!(!mine.is_at(files.root.as_fd(), "gone").unwrap());
    }

    #[test]
    fn an_error_says_whether_the_change_may_have_been_made() {
        let key = Key::new("packs/a").unwrap();
        let of = |errno, effect| Fault::Os(errno).of(&key, effect);
        for errno in [Errno::NOSPC, Errno::DQUOT] {
            assert!(matches!(of(errno, Effect::None), StoreError::NoSpace(_)));
            assert!(matches!(of(errno, Effect::Perhaps), StoreError::Unclear { .. }));
        }
        for errno in [Errno::IO, Errno::STALE, Errno::TIMEDOUT, Errno::MFILE, Errno::ROFS] {
            assert!(matches!(of(errno, Effect::None), StoreError::Unavailable { .. }));
            assert!(matches!(of(errno, Effect::Perhaps), StoreError::Unclear { .. }));
        }
        assert!(
            !link_is_undone(Errno::IO) && !link_is_undone(Errno::STALE) && !link_is_undone(Errno::TIMEDOUT)
        );
    }
}
