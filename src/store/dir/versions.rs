//! A swapped key on a file system: carries out the steps of `protocol.rs` in its folder of versions.
//!
//! Owns: the version file and what its bytes are.
//! Does not own: any decision (`protocol.rs`).
//!
//! ```text
//! version 0: an empty file. Any other:
//!  0  8   "bhswap01"
//!  8  16  nonce, random
//! 24  16  nonce of the version below that it was made from; zeros for version 0
//! 40  …   content; none means deleted
//! ```
//! The nonces come first, at fixed places, so that a look at the version below reads 40 bytes of it. There is no
//! checksum: the `ETag` is number and hash of all bytes, and what the content must be is known to whoever wrote it.

use super::files::{
    Effect, Fault, Files, Missing, Temp, best_effort, for_each_name, link_is_undone, modified_unix_ms,
    open_file, open_folder, read_at, size_of,
};
use super::protocol::{Attempt, Folder, Highest, LinkAnswer, Nonce, Version};
use crate::store::{ETag, Expect, Key};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::AtFlags;
use rustix::io::Errno;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Largest content of a swapped object; a larger one is refused, read or written.
pub const SWAPPED_BYTES_MAX: u64 = 64 << 20;
/// Ends the name of a folder of versions. No key holds it.
pub const FOLDER_SUFFIX: char = '~';

const MAGIC: &[u8; 8] = b"bhswap01";
const HEADER_BYTES: u64 = 40;
const HEADER_LEN: usize = 40;
/// Attempts until a folder that changes all the time, or has lost a version, is given up.
const ATTEMPTS_MAX: u32 = 1000;
/// Attempts without a pause.
const ATTEMPTS_AT_ONCE: u32 = 64;
/// Versions removed by one tidying; what is beyond is left to the next.
const TIDIED_MAX: usize = 1024;

/// How much of the current version is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// Whether it is there, its size and time.
    Stat,
    /// The content, unless it is larger.
    Content { max_bytes: u64 },
}

/// What was opened.
pub struct Current {
    pub version: Version,
    /// The whole file, if its content was wanted.
    file_bytes: Vec<u8>,
    pub content_bytes: u64,
    pub modified_unix_ms: u64,
}

impl Current {
    /// Whether it says that the object is deleted.
    pub fn is_deleted(&self) -> bool {
        self.content_bytes == 0
    }

    /// The content, taken out.
    pub fn into_content(self) -> bytes::Bytes {
        let file = bytes::Bytes::from(self.file_bytes);
        if file.len() <= HEADER_LEN { bytes::Bytes::new() } else { file.slice(HEADER_LEN..) }
    }

    pub fn etag(&self) -> ETag {
        etag_of(self.version.number, &[&self.file_bytes])
    }
}

/// A swap that this process makes.
pub struct Change<'a> {
    pub expect: Expect,
    pub content: &'a [u8],
}

/// One process's view of one key.
pub struct Versions<'a> {
    files: &'a Files,
    key: &'a Key,
    want: Want,
    change: Option<Change<'a>>,
    parent: Option<OwnedFd>,
    folder: Option<OwnedFd>,
    current: Option<Current>,
    linked: Option<(Temp<'a>, Nonce, ETag)>,
    /// Whether the change may have been made by now.
    pub effect: Effect,
    /// The highest number of the last listing, and in how many it was.
    seen: (Highest, u32),
}

impl<'a> Versions<'a> {
    pub fn to_read(files: &'a Files, key: &'a Key, want: Want) -> Self {
        Self {
            files,
            key,
            want,
            change: None,
            parent: None,
            folder: None,
            current: None,
            linked: None,
            effect: Effect::None,
            seen: (Highest::Nothing, 0),
        }
    }

    /// A view of a folder that was opened already.
    pub fn in_folder(files: &'a Files, key: &'a Key, want: Want, parent: OwnedFd, folder: OwnedFd) -> Self {
        Self { parent: Some(parent), folder: Some(folder), ..Self::to_read(files, key, want) }
    }

    pub fn to_change(files: &'a Files, key: &'a Key, change: Change<'a>) -> Self {
        let want = Want::Content { max_bytes: SWAPPED_BYTES_MAX };
        Self { change: Some(change), ..Self::to_read(files, key, want) }
    }

    /// Makes attempts until one is done.
    #[expect(clippy::disallowed_methods, reason = "on a thread for blocking work, between attempts")]
    pub fn until_done<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<Attempt<T>, Fault>,
    ) -> Result<T, Fault> {
        for count in 0..ATTEMPTS_MAX {
            if let Attempt::Done(done) = attempt(self)? {
                return Ok(done);
            }
            if count >= ATTEMPTS_AT_ONCE {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if self.seen.1 >= ATTEMPTS_MAX / 2 {
            return Err(Fault::Invalid(format!("version missing: {:?} stands alone", self.seen.0)));
        }
        Err(Fault::Unavailable("it changes faster than it can be read".into()))
    }

    /// Whether the version that was read says that the object is deleted.
    pub fn is_deleted(&self) -> bool {
        self.current.as_ref().is_some_and(Current::is_deleted)
    }

    /// The version that was read.
    pub fn into_current(self) -> Option<Current> {
        self.current
    }

    /// Name of the state that was linked.
    pub fn linked_etag(&self) -> Option<ETag> {
        self.linked.as_ref().map(|(_, _, etag)| etag.clone())
    }

    fn folder(&self) -> Result<&OwnedFd, Fault> {
        self.folder.as_ref().ok_or_else(|| Fault::Unavailable("the folder of versions is gone".into()))
    }

    fn read_file(&self, number: u64, want: Want) -> Result<Option<Current>, Fault> {
        let Some((file, stat)) = open_version(self.folder()?, number)? else { return Ok(None) };
        let modified_unix_ms = modified_unix_ms(&stat);
        if number == 0 {
            let version = Version { number, nonce: Nonce::VERSION_ZERO, below: Nonce::VERSION_ZERO };
            let file_bytes = Vec::new();
            return Ok(Some(Current { version, file_bytes, content_bytes: 0, modified_unix_ms }));
        }
        let file_size = size_of(&stat);
        let Some(content_bytes) = file_size.checked_sub(HEADER_BYTES) else {
            return Err(Fault::Invalid(format!("version {number} has only {file_size} bytes")));
        };
        let len = match want {
            Want::Stat => HEADER_BYTES,
            Want::Content { max_bytes } if content_bytes > max_bytes => {
                return Err(Fault::Invalid(format!("{content_bytes} bytes, more than {max_bytes}")));
            }
            Want::Content { .. } => file_size,
        };
        let file_bytes = match read_at(&file, 0, len) {
            Err(Fault::Os(Errno::STALE)) => return Ok(None),
            read => read?,
        };
        let (nonce, below) = parse_header(&file_bytes)
            .ok_or_else(|| Fault::Invalid(format!("version {number} does not begin like one")))?;
        let version = Version { number, nonce, below };
        Ok(Some(Current { version, file_bytes, content_bytes, modified_unix_ms }))
    }
}

impl Folder for Versions<'_> {
    type Stop = Fault;

    fn highest(&mut self) -> Result<Highest, Fault> {
        if self.folder.is_none() {
            let (segments, name) = split(self.key);
            let missing = if self.change.is_some() { Missing::Make } else { Missing::Leave };
            if self.parent.is_none() {
                self.parent = self.files.folder(&segments, missing)?;
            }
            let Some(parent) = &self.parent else { return Ok(Highest::NoFolder) };
            self.folder = open_folder(parent.as_fd(), &folder_name(name))?;
        }
        let Some(folder) = &self.folder else { return Ok(Highest::NoFolder) };
        let mut highest = None;
        for_each_name(folder.as_fd(), |name, _| highest = highest.max(parse_number(name)))?;
        let found = highest.map_or(Highest::Nothing, Highest::Number);
        self.seen = if self.seen.0 == found { (found, self.seen.1 + 1) } else { (found, 1) };
        Ok(found)
    }

    fn open(&mut self, number: u64) -> Result<Option<Version>, Fault> {
        self.current = self.read_file(number, self.want)?;
        Ok(self.current.as_ref().map(|current| current.version))
    }

    fn nonce_of(&mut self, number: u64) -> Result<Option<Nonce>, Fault> {
        Ok(self.read_file(number, Want::Stat)?.map(|current| current.version.nonce))
    }

    fn is_expected(&mut self, found: Option<&Version>) -> bool {
        let current = self.current.as_ref().filter(|current| found.is_some() && !current.is_deleted());
        match (self.change.as_ref().map(|change| &change.expect), current) {
            (Some(Expect::Absent), None) => true,
            (Some(Expect::State(etag)), Some(current)) => current.etag() == *etag,
            (Some(Expect::Absent), Some(_)) | (Some(Expect::State(_)), None) | (None, _) => false,
        }
    }

    fn create(&mut self) -> Result<(), Fault> {
        let (_, name) = split(self.key);
        let Some(parent) = &self.parent else {
            return Err(Fault::Unavailable("the folder above is gone".into()));
        };
        self.files.move_folder_into(parent.as_fd(), &folder_name(name), &version_name(0))
    }

    fn link(&mut self, number: u64, below: Nonce) -> Result<LinkAnswer, Fault> {
        let content = self.change.as_ref().map_or(&[][..], |change| change.content);
        let nonce = Nonce(rand::random());
        let header = header_of(nonce, below);
        let temp = self.files.write_temp(&[&header, content])?;
        let linked = temp.link(self.folder()?.as_fd(), &version_name(number));
        self.linked = Some((temp, nonce, etag_of(number, &[&header, content])));
        match linked {
            Ok(()) => {
                self.effect = Effect::Perhaps;
                Ok(LinkAnswer::Linked)
            }
            Err(Errno::EXIST) => {
                self.effect = Effect::Perhaps;
                Ok(LinkAnswer::Exists)
            }
            Err(errno) => {
                self.effect = if link_is_undone(errno) { Effect::None } else { Effect::Perhaps };
                Err(errno.into())
            }
        }
    }

    fn is_mine(&mut self, number: u64) -> Result<bool, Fault> {
        let folder = self.folder()?.as_fd();
        self.linked.as_ref().map_or(Ok(false), |(temp, ..)| temp.is_at(folder, &version_name(number)))
    }

    fn sync(&mut self) -> Result<(), Fault> {
        let read = self.current.as_ref().map(|current| current.version.nonce);
        let nonce = self.linked.as_ref().map(|(_, nonce, _)| *nonce).or(read);
        self.files.sync_key(self.folder()?.as_fd(), self.key, nonce.unwrap_or(Nonce::VERSION_ZERO).0)?;
        let (segments, name) = split(self.key);
        if let Some(parent) = &self.parent {
            // A writer that died may have left any of the names above unsynced.
            self.files.folder(&segments, Missing::Make)?;
            let path =
                segments.iter().copied().chain([folder_name(name).as_str()]).collect::<Vec<_>>().join("/");
            self.files.sync_folder_name(parent.as_fd(), &path)?;
        }
        Ok(())
    }

    fn numbers_up_to(&mut self, last: u64) -> Result<Vec<u64>, Fault> {
        let mut lowest = BinaryHeap::new();
        for_each_name(self.folder()?.as_fd(), |name, _| {
            if let Some(number) = parse_number(name).filter(|number| *number <= last) {
                lowest.push(number);
                if lowest.len() > TIDIED_MAX {
                    lowest.pop();
                }
            }
        })?;
        Ok(lowest.into_vec())
    }

    fn unlink(&mut self, number: u64) -> Result<(), Fault> {
        match rustix::fs::unlinkat(self.folder()?, version_name(number), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Folders above a key's last segment, and that segment.
pub fn split(key: &Key) -> (Vec<&str>, &str) {
    let mut segments: Vec<&str> = key.as_str().split('/').collect();
    let name = segments.pop().unwrap_or_default();
    (segments, name)
}

/// Name of a swapped key's folder.
pub fn folder_name(name: &str) -> String {
    format!("{name}{FOLDER_SUFFIX}")
}

fn open_version(folder: &OwnedFd, number: u64) -> Result<Option<(OwnedFd, rustix::fs::Stat)>, Fault> {
    match open_file(folder.as_fd(), &version_name(number)) {
        Err(Fault::Os(Errno::STALE)) => Ok(None),
        opened => opened,
    }
}

fn version_name(number: u64) -> String {
    format!("{number:020}")
}

fn parse_number(name: &str) -> Option<u64> {
    (name.len() == 20 && name.bytes().all(|b| b.is_ascii_digit())).then(|| name.parse().ok())?
}

fn header_of(nonce: Nonce, below: Nonce) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(MAGIC);
    header[8..24].copy_from_slice(&nonce.0);
    header[24..].copy_from_slice(&below.0);
    header
}

fn parse_header(bytes: &[u8]) -> Option<(Nonce, Nonce)> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (nonce, rest) = rest.split_first_chunk::<16>()?;
    let (below, _) = rest.split_first_chunk::<16>()?;
    Some((Nonce(*nonce), Nonce(*below)))
}

fn etag_of(number: u64, parts: &[&[u8]]) -> ETag {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    ETag(format!("{number}-{}", hasher.finalize().to_hex()))
}

/// Removes old versions; what is left behind goes with the next swap.
pub fn tidy(versions: &mut Versions<'_>, won: u64) {
    if let Err(Fault::Os(errno)) = super::protocol::tidy(versions, won) {
        best_effort(Err(errno));
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{Outcome, find, swap};
    use super::*;

    #[test]
    fn a_version_begins_with_these_bytes() {
        let header = header_of(Nonce([0xab; 16]), Nonce([1; 16]));
        assert_eq!(&header[..8], b"bhswap01");
        assert_eq!((&header[8..24], &header[24..]), (&[0xab; 16][..], &[1; 16][..]));
        assert_eq!(parse_header(&header), Some((Nonce([0xab; 16]), Nonce([1; 16]))));
        assert_eq!(parse_header(&header[..39]), None);
    }

    /// A network that repeats `link` after a lost answer: the second one is refused for the first.
    /// And a listing that is long ago when it is used.
    struct Shared<'a> {
        inner: Versions<'a>,
        listed: Option<u64>,
    }

    impl Folder for Shared<'_> {
        type Stop = Fault;

        fn highest(&mut self) -> Result<Highest, Fault> {
            self.listed.take().map_or_else(|| self.inner.highest(), |number| Ok(Highest::Number(number)))
        }
        fn open(&mut self, number: u64) -> Result<Option<Version>, Fault> {
            self.inner.open(number)
        }
        fn nonce_of(&mut self, number: u64) -> Result<Option<Nonce>, Fault> {
            self.inner.nonce_of(number)
        }
        fn is_expected(&mut self, found: Option<&Version>) -> bool {
            self.inner.is_expected(found)
        }
        fn create(&mut self) -> Result<(), Fault> {
            self.inner.create()?;
            self.inner.create()
        }
        fn link(&mut self, number: u64, below: Nonce) -> Result<LinkAnswer, Fault> {
            assert_eq!(self.inner.link(number, below)?, LinkAnswer::Linked);
            Ok(LinkAnswer::Exists)
        }
        fn is_mine(&mut self, number: u64) -> Result<bool, Fault> {
            self.inner.is_mine(number)
        }
        fn sync(&mut self) -> Result<(), Fault> {
            self.inner.sync()
        }
        fn numbers_up_to(&mut self, last: u64) -> Result<Vec<u64>, Fault> {
            self.inner.numbers_up_to(last)
        }
        fn unlink(&mut self, number: u64) -> Result<(), Fault> {
            self.inner.unlink(number)
        }
    }

    fn files_in(above: &tempfile::TempDir) -> Files {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        Files::open(rustix::fs::open(above.path(), flags, rustix::fs::Mode::empty()).unwrap()).unwrap()
    }

    /// Swaps until there is this version, each refused for its own link.
    fn swapped_to(files: &Files, key: &Key, last: u64, mut after_each: impl FnMut(u64)) {
        let mut expect = Expect::Absent;
        for number in 1..=last {
            let change = Change { expect, content: b"x" };
            let mut folder = Shared { inner: Versions::to_change(files, key, change), listed: None };
            let won = loop {
                if let Attempt::Done(outcome) = swap(&mut folder).unwrap() {
                    break outcome;
                }
            };
            assert_eq!(won, Outcome::Won(number));
            after_each(number);
            tidy(&mut folder.inner, number);
            expect = Expect::State(folder.inner.linked_etag().unwrap());
        }
    }

    #[test]
    fn g27_a_swap_refused_for_its_own_link_has_won() {
        let above = tempfile::tempdir().unwrap();
        swapped_to(&files_in(&above), &Key::new("volumes/vm-7").unwrap(), 4, |_| {});
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "tests")]
    fn g27_a_late_version_on_a_late_version_is_not_read_by_who_listed_long_ago() {
        let above = tempfile::tempdir().unwrap();
        let (files, key) = (files_in(&above), Key::new("volumes/vm-7").unwrap());
        let folder = above.path().join("volumes/vm-7~");
        let mut late = Vec::new();
        swapped_to(&files, &key, 8, |number| {
            if number == 2 || number == 3 {
                let mut bytes = std::fs::read(folder.join(version_name(number))).unwrap();
                bytes[8..24].fill(0xee);
                late.push((number, bytes));
            }
        });
        for (number, bytes) in late {
            std::fs::write(folder.join(version_name(number)), bytes).unwrap();
        }
        let inner = Versions::to_read(&files, &key, Want::Stat);
        let mut reader = Shared { inner, listed: None };
        assert!(matches!(find(&mut reader).unwrap(), Attempt::Done(Some(found)) if found.number == 8));
        reader.listed = Some(3);
        assert_eq!(find(&mut reader).unwrap(), Attempt::Again);
        assert!(matches!(find(&mut reader).unwrap(), Attempt::Done(Some(found)) if found.number == 8));
    }

    #[test]
    fn g19_only_twenty_digits_are_a_version() {
        assert_eq!(parse_number(&version_name(7)), Some(7));
        assert_eq!(parse_number(&version_name(u64::MAX)), Some(u64::MAX));
        for junk in
            ["", "7", "+0000000000000000007", "0000000000000000007 ", "99999999999999999999", "..", "0x"]
        {
            assert_eq!(parse_number(junk), None, "{junk}");
        }
    }
}
