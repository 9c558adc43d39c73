//! How short the node's local space is, and what that means for writers.
//!
//! Owns: the levels, and when free space is looked at again (after so many bytes written, never by a timer of its own).
//! Does not own: commits, which free space: volumes begin one when the level rises.

use crate::disk::Disk;
use crate::volume::engine::EngineConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::watch;

/// What writers are in for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Space is plenty.
    Fine,
    /// Volumes commit what they have, to free it.
    Commit,
    /// Each write waits for a moment, too.
    Slow,
    /// Writes that need space are refused, unless a commit frees some in time.
    Full,
}

/// Free space is looked at again after this many bytes written.
const LOOK_EVERY_BYTES: u64 = 4 << 20;

/// The node's local space.
pub struct Pressure {
    disk: Arc<dyn Disk>,
    reserve_bytes: u64,
    live_map_pages_max: u64,
    written_since_look: AtomicU64,
    looking: AtomicBool,
    live_map_pages: AtomicU64,
    level: watch::Sender<Level>,
}

impl Pressure {
    /// Space is taken to be plenty until it is first looked at.
    pub fn new(disk: Arc<dyn Disk>, config: &EngineConfig) -> Arc<Self> {
        Arc::new(Self {
            disk,
            reserve_bytes: config.reserve_bytes,
            live_map_pages_max: config.live_map_bytes / crate::volume::sector_map::MAP_PAGE_BYTES,
            written_since_look: AtomicU64::new(LOOK_EVERY_BYTES),
            looking: AtomicBool::new(false),
            live_map_pages: AtomicU64::new(0),
            level: watch::Sender::new(Level::Fine),
        })
    }

    /// The level now.
    pub fn level(&self) -> Level {
        *self.level.borrow()
    }

    /// The level, and each change of it.
    pub fn changes(&self) -> watch::Receiver<Level> {
        self.level.subscribe()
    }

    /// Counts bytes about to be written, and has free space looked at now and then.
    pub fn note_write(self: &Arc<Self>, bytes: u64) {
        if self.written_since_look.fetch_add(bytes, Ordering::Relaxed) + bytes >= LOOK_EVERY_BYTES {
            self.look_soon();
        }
    }

    /// Counts pages of live maps that were allocated, or given back.
    pub fn note_map_pages(self: &Arc<Self>, more: u64, fewer: u64) {
        let counted = |pages: u64| Some(pages.saturating_add(more).saturating_sub(fewer));
        let before = self
            .live_map_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted)
            .unwrap_or_default();
        if fewer > 0 || before.saturating_add(more) > self.live_map_pages_max / 2 {
            self.look_soon();
        }
    }

    /// Looks at free space on a task of its own; one look at a time.
    pub fn look_soon(self: &Arc<Self>) {
        if self.looking.swap(true, Ordering::AcqRel) {
            return;
        }
        self.written_since_look.store(0, Ordering::Relaxed);
        let this = self.clone();
        tokio::spawn(async move {
            this.look().await;
            this.looking.store(false, Ordering::Release);
        });
    }

    /// Looks at free space now.
    pub async fn look(&self) {
        let by_disk = match self.disk.space().await {
            Ok((free_bytes, _)) => disk_level(free_bytes, self.reserve_bytes),
            Err(error) => {
                log::warn!("cannot tell how much space is free in the state directory: {error}");
                Level::Fine
            }
        };
        let by_maps = map_level(self.live_map_pages.load(Ordering::Relaxed), self.live_map_pages_max);
        let level = by_disk.max(by_maps);
        self.level.send_if_modified(|old| {
            let changed = *old != level;
            if changed && level.max(*old) >= Level::Slow {
                log::warn!("local space: {old:?} -> {level:?}");
            }
            *old = level;
            changed
        });
    }
}

fn disk_level(free_bytes: u64, reserve_bytes: u64) -> Level {
    match free_bytes {
        free if free < reserve_bytes => Level::Full,
        free if free < reserve_bytes.saturating_mul(2) => Level::Slow,
        free if free < reserve_bytes.saturating_mul(4) => Level::Commit,
        _ => Level::Fine,
    }
}

fn map_level(pages: u64, pages_max: u64) -> Level {
    match pages {
        pages if pages >= pages_max => Level::Full,
        pages if pages * 4 >= pages_max * 3 => Level::Slow,
        pages if pages * 2 >= pages_max => Level::Commit,
        _ => Level::Fine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_space_first_commits_then_slows_then_refuses() {
        let levels = [1000, 399, 199, 99].map(|free| disk_level(free, 100));
        assert_eq!(levels, [Level::Fine, Level::Commit, Level::Slow, Level::Full]);
        let levels = [49, 50, 75, 100].map(|pages| map_level(pages, 100));
        assert_eq!(levels, [Level::Fine, Level::Commit, Level::Slow, Level::Full]);
    }
}
