//! Listing a directory pool in the order of its keys.
//!
//! Owns: which names of a folder are objects, and pages.
//! Does not own: what a folder of versions says (`versions.rs`).
//!
//! A page holds no more than some thousand names for each level of folders, however many there are; the price is that
//! each page reads the folder again. A name that stays is in each of these readings, and neither the name of a fixed
//! object nor the folder of a swapped one ever goes and comes back: nothing that is there all the time is missed.

use super::files::{
    Effect, Fault, Files, Missing, for_each_name, is, modified_unix_ms, open_folder, size_of,
};
use super::protocol::{Folder, find};
use super::versions::{FOLDER_SUFFIX, Versions, Want};
use crate::store::{Key, Listed, Page, StoreError};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;
use std::collections::BinaryHeap;

/// Most objects in a page, whatever was asked for.
pub const PAGE_OBJECTS_MAX: usize = 10_000;
/// Fewest names kept of one reading of a folder: many may turn out to be deleted.
const BATCH_NAMES_MIN: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Swapped,
    Fixed,
    Folder,
}

/// A name of a folder. `order` is the name as it stands in the keys: a folder's ends in `/`, for `a-b` comes before
/// `a/b`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    order: String,
    kind: Kind,
}

pub struct Listing<'a> {
    files: &'a Files,
    after: Option<&'a str>,
    /// Objects wanted, and one to know whether there are more.
    limit: usize,
    found: Vec<Listed>,
}

impl<'a> Listing<'a> {
    /// A page of what lies in the folder.
    pub fn page(
        files: &'a Files,
        folder: &Key,
        after: Option<&'a str>,
        max: usize,
    ) -> Result<Page, StoreError> {
        let max = max.min(PAGE_OBJECTS_MAX);
        let mut listing = Self { files, after, limit: max + 1, found: Vec::new() };
        let segments: Vec<&str> = folder.as_str().split('/').collect();
        let opened =
            files.folder(&segments, Missing::Leave).map_err(|fault| fault.of(folder, Effect::None))?;
        if let Some(opened) = opened {
            listing.walk(opened.as_fd(), &format!("{folder}/"), folder)?;
        }
        let more = listing.found.len() > max;
        listing.found.truncate(max);
        Ok(Page { objects: listing.found, more })
    }

    fn walk(&mut self, folder: BorrowedFd<'_>, prefix: &str, whole: &Key) -> Result<(), StoreError> {
        let failed = |fault: Fault| fault.of(whole, Effect::None);
        let mut done_to: Option<String> = None;
        loop {
            let (entries, more) =
                self.batch(folder, prefix, done_to.as_deref()).map_err(|errno| failed(errno.into()))?;
            done_to = entries.last().map(|entry| entry.order.clone());
            for entry in entries {
                if self.found.len() >= self.limit {
                    return Ok(());
                }
                let path = format!("{prefix}{}", entry.order);
                match entry.kind {
                    Kind::Folder => {
                        let name = entry.order.trim_end_matches('/');
                        if let Some(inner) = open_folder(folder, name).map_err(failed)? {
                            self.walk(inner.as_fd(), &path, whole)?;
                        }
                    }
                    kind @ (Kind::Swapped | Kind::Fixed) => {
                        let Some(key) = Key::new(path) else { continue };
                        if self.found.last().is_some_and(|last| last.key == key) {
                            continue;
                        }
                        let listed = match kind {
                            Kind::Swapped => self.swapped(folder, &entry.order, &key),
                            Kind::Fixed | Kind::Folder => fixed(folder, &entry.order, &key),
                        };
                        self.found.extend(listed.map_err(|fault| fault.of(&key, Effect::None))?);
                    }
                }
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// The first names in the order of keys that are still to be looked at, and whether there are others.
    fn batch(
        &self,
        folder: BorrowedFd<'_>,
        prefix: &str,
        done_to: Option<&str>,
    ) -> Result<(Vec<Entry>, bool), Errno> {
        let names_max = self.limit.max(BATCH_NAMES_MIN);
        let mut first = BinaryHeap::new();
        let mut more = false;
        for_each_name(folder, |name, file_type| {
            let file_type = match file_type {
                FileType::Unknown => rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
                known => known,
            };
            let Some(entry) = entry_of(name, file_type) else { return };
            if done_to.is_some_and(|done| entry.order.as_str() <= done) || self.is_before(prefix, &entry) {
                return;
            }
            first.push(entry);
            if first.len() > names_max {
                first.pop();
                more = true;
            }
        })?;
        Ok((first.into_sorted_vec(), more))
    }

    /// Whether nothing of this entry comes after the key that the page begins after.
    fn is_before(&self, prefix: &str, entry: &Entry) -> bool {
        let Some(after) = self.after else { return false };
        let Some(rest) = after.strip_prefix(prefix) else { return after > prefix };
        match entry.kind {
            Kind::Folder => entry.order.as_str() <= rest && !rest.starts_with(&entry.order),
            Kind::Swapped | Kind::Fixed => entry.order.as_str() <= rest,
        }
    }

    fn swapped(&self, parent: BorrowedFd<'_>, name: &str, key: &Key) -> Result<Option<Listed>, Fault> {
        let Some(folder) = open_folder(parent, &super::versions::folder_name(name))? else { return Ok(None) };
        let parent = rustix::io::fcntl_dupfd_cloexec(parent, 0)?;
        let mut versions = Versions::in_folder(self.files, key, Want::Stat, parent, folder);
        let found = match versions.until_done(find) {
            // Whoever reads it is told what is wrong. Left out, it would pass for deleted.
            Err(Fault::Invalid(_)) => {
                return Ok(Some(Listed { key: key.clone(), object_bytes: 0, modified_unix_ms: 0 }));
            }
            found => found?,
        };
        if found.is_none() {
            return Ok(None);
        }
        if versions.is_deleted() {
            // Somebody may act on what is not in the listing.
            versions.sync()?;
        }
        Ok(versions.into_current().filter(|current| !current.is_deleted()).map(|current| Listed {
            key: key.clone(),
            object_bytes: current.content_bytes,
            modified_unix_ms: current.modified_unix_ms,
        }))
    }
}

fn fixed(folder: BorrowedFd<'_>, name: &str, key: &Key) -> Result<Option<Listed>, Fault> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if is(&stat, FileType::RegularFile) => Ok(Some(Listed {
            key: key.clone(),
            object_bytes: size_of(&stat),
            modified_unix_ms: modified_unix_ms(&stat),
        })),
        Ok(_) | Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn entry_of(name: &str, file_type: FileType) -> Option<Entry> {
    let (segment, kind) = match (file_type, name.strip_suffix(FOLDER_SUFFIX)) {
        (FileType::Directory, Some(segment)) => (segment, Kind::Swapped),
        (FileType::Directory, None) => (name, Kind::Folder),
        (FileType::RegularFile, _) => (name, Kind::Fixed),
        _ => return None,
    };
    Key::new(segment)?;
    let order = if kind == Kind::Folder { format!("{segment}/") } else { segment.to_owned() };
    Some(Entry { order, kind })
}
