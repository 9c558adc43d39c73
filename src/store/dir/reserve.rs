//! Space set aside in a directory pool, so that on a full disk what frees space can still be done.
//!
//! Owns: the reserve file, when it is given up and when it is made again.
//! Does not own: which operations may use it (`dir.rs`).

use super::files::best_effort;
use crate::store::StoreError;
use parking_lot::{RwLock, RwLockReadGuard};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

/// No key begins with a dot.
const RESERVE_FILE: &str = ".reserve";

pub struct Reserve {
    bytes: u64,
    is_missing: AtomicBool,
    /// Held shared by what must not eat what was just given up.
    gate: RwLock<()>,
}

impl Reserve {
    pub fn open(root: BorrowedFd<'_>, bytes: u64) -> Self {
        let reserve = Self { bytes, is_missing: AtomicBool::new(true), gate: RwLock::new(()) };
        reserve.make_if_room(root);
        reserve
    }

    /// Keeps the holder's writes out of the space that a swap on a full disk was given.
    pub fn stay_out(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read()
    }

    /// Runs the operation, a second time without the reserve if there was no space.
    pub fn run<T>(
        &self,
        root: BorrowedFd<'_>,
        mut operation: impl FnMut() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut result = operation();
        if matches!(result, Err(StoreError::NoSpace(_))) {
            let _alone = self.gate.write();
            self.is_missing.store(true, Ordering::Relaxed);
            best_effort(rustix::fs::unlinkat(root, RESERVE_FILE, AtFlags::empty()));
            // Some file systems give freed blocks out again only once that they are free is on disk.
            best_effort(rustix::fs::fsync(root));
            result = operation();
        }
        if result.is_ok() && self.is_missing.load(Ordering::Relaxed) {
            self.make_if_room(root);
        }
        result
    }

    fn make_if_room(&self, root: BorrowedFd<'_>) {
        // Twice the room, or the reserve would be what fills the disk.
        let has_room = rustix::fs::fstatvfs(root)
            .is_ok_and(|free| free.f_bavail.saturating_mul(free.f_frsize) / 2 >= self.bytes);
        if self.bytes == 0 || self.is_there(root) || (has_room && self.make(root).is_ok()) {
            self.is_missing.store(false, Ordering::Relaxed);
        }
    }

    fn is_there(&self, root: BorrowedFd<'_>) -> bool {
        rustix::fs::statat(root, RESERVE_FILE, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(|size| size >= self.bytes))
    }

    fn make(&self, root: BorrowedFd<'_>) -> Result<(), Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(root, RESERVE_FILE, flags, Mode::RUSR | Mode::WUSR)?;
        let made = rustix::fs::fallocate(file.as_fd(), FallocateFlags::empty(), 0, self.bytes);
        if made.is_err() {
            best_effort(rustix::fs::unlinkat(root, RESERVE_FILE, AtFlags::empty()));
        }
        made
    }
}
