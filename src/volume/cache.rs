//! The clean cache: blocks of the pool in slots of one local file, by the hash of their content.
//!
//! Owns: `cache/blocks` and `cache/index` of the state directory, which slot holds what, and that a slot which someone
//! has pinned is never refilled.
//! Does not own: the order of eviction ([`super::eviction`]), fetching, or single flight of fetches ([`super::load`]).
//!
//! Slots are written through the page cache, since [`DiskFile`] has no `O_DIRECT` yet, and count only once the kernel
//! has written them back without an error: a page whose write-back failed may be dropped, and the slot then reads as
//! what was there before. Pages that `sendfile` left in a socket would change with their slot: callers copy.
//!
//! After a restart a slot is only believed to hold what the index says, until it was read and hashed. The index is
//! hints, so nothing in it is synced; an entry is emptied before its slot is refilled only to save such reads.

mod files;

use super::eviction::{Fate, S3Fifo};
use super::ids::ContentHash;
use crate::block::Hold;
use crate::disk::{Disk, DiskFile};
use crate::geometry::{BLOCK_BYTES, BLOCK_LEN};
use crate::offload::Offload;
use bytes::Bytes;
use files::NO_HASH;
use futures::FutureExt;
use futures::future::Shared;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Inserts that hold a block in memory: 32 MiB. Beyond it a block is not kept.
const INSERTS_MAX: usize = 256;
/// Inserts that write at the same time.
const WRITES_MAX: usize = 32;
/// While the disk is full or nearly so, one insert in so many tries for new space.
const RETRY_EVERY: u64 = 64;
/// The disk is left alone while less than one part in so many is free.
const FREE_SHARE: u64 = 20;

/// Settings of the cache.
#[derive(Clone, Copy, Debug)]
pub struct CacheConfig {
    /// Largest size; less if the disk has not twice as much free. 0: no cache.
    pub bytes: u64,
}

/// What the cache holds and did, since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CacheStats {
    /// Slots in all.
    pub slots: u64,
    /// Slots that hold something, checked or believed.
    pub used: u64,
    /// [`CleanCache::get`] found it.
    pub hits: u64,
    /// [`CleanCache::get`] did not find it, or not checked.
    pub misses: u64,
    /// Slots that were found right after a restart.
    pub revived: u64,
    /// Slots given to other content.
    pub evictions: u64,
    /// Blocks not kept because too many were being written or all slots were pinned.
    pub skipped: u64,
    /// Reads and writes of the cache's files that failed, and slots that held something else than believed.
    pub failures: u64,
}

/// A node's clean cache. No call fails: what does not work is a miss.
pub struct CleanCache {
    disk: Arc<dyn Disk>,
    offload: Offload,
    blocks: Arc<dyn DiskFile>,
    index: Arc<dyn DiskFile>,
    /// How many hold each slot. Only counted up from zero under `state`, so a slot that is free there stays free.
    pins: Box<[AtomicU32]>,
    /// Slots whose pages a socket may hold: other content is put there only once the file has none of them.
    handed_out: Box<[AtomicBool]>,
    can_hand_out: bool,
    state: Mutex<State>,
    inserts: Arc<Semaphore>,
    writes: Semaphore,
    /// Taken for each look for write-back errors.
    check_turn: tokio::sync::Mutex<()>,
}

struct State {
    slots: Vec<Slot>,
    by_hash: HashMap<ContentHash, u32>,
    order: S3Fifo,
    /// Never filled, lowest first.
    free: VecDeque<u32>,
    /// Failed when they were filled, the longest ago first.
    failed: VecDeque<u32>,
    /// A socket held pages of them when they were to be filled.
    handed_out: VecDeque<u32>,
    /// Content that is being filled or checked: whoever else wants to waits for the sender to go.
    busy: HashMap<ContentHash, Shared<oneshot::Receiver<()>>>,
    /// The disk is full or nearly so: slots that were never filled are left alone.
    cautious: bool,
    /// The last insert failed, and not for want of space: good slots are not given up for more such attempts.
    failing: bool,
    healthy: bool,
    inserts_begun: u64,
    checks: Checks,
    stats: CacheStats,
}

/// Counts that say which writes a look for write-back errors covered.
#[derive(Clone, Copy, Default)]
struct Checks {
    /// Blocks written.
    written: u64,
    /// Of those, how many the last good look covered.
    good: u64,
    /// Looks that found an error.
    failed: u64,
}

#[derive(Clone, Copy)]
struct Slot {
    hash: ContentHash,
    held: Held,
    /// The index may have an entry for it.
    indexed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Nothing,
    /// The index said so before a restart.
    Believed,
    Checked,
}

const EMPTY: Slot = Slot { hash: NO_HASH, held: Held::Nothing, indexed: false };

/// A slot with checked content, which stays there until the last clone is dropped.
pub struct Pinned {
    cache: Arc<CleanCache>,
    slot: u32,
}

impl Pinned {
    /// The file that it is in. A read error is to be taken as a miss: see [`Pinned::discard`].
    pub fn file(&self) -> Arc<dyn DiskFile> {
        self.cache.blocks.clone()
    }

    /// Where in the file its first byte is.
    pub fn offset_bytes(&self) -> u64 {
        slot_offset_bytes(self.slot)
    }

    /// Reading it failed: nobody finds it from now on.
    pub fn discard(self) {
        let mut state = self.cache.state.lock();
        state.empty(self.slot);
        state.note_failure("read", &io::Error::other("reading a slot failed"));
    }
}

impl Hold for Pinned {
    fn hand_out(&self) -> bool {
        if self.cache.can_hand_out {
            self.cache.handed_out[self.slot as usize].store(true, Ordering::Relaxed);
        }
        self.cache.can_hand_out
    }
}

impl Clone for Pinned {
    fn clone(&self) -> Self {
        self.cache.pins[self.slot as usize].fetch_add(1, Ordering::Relaxed);
        Self { cache: self.cache.clone(), slot: self.slot }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Release: all reads of the slot are before its refill.
        self.cache.pins[self.slot as usize].fetch_sub(1, Ordering::Release);
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({})", self.slot)
    }
}

fn slot_offset_bytes(slot: u32) -> u64 {
    u64::from(slot) * BLOCK_BYTES
}

fn fingerprint(hash: &ContentHash) -> u64 {
    let mut half = [0; 8];
    half.copy_from_slice(&hash.0[..8]);
    u64::from_le_bytes(half)
}

impl CleanCache {
    /// Opens the cache's files, or makes them. What they hold from before is believed until it is checked.
    ///
    /// # Errors
    /// The files cannot be opened or made. `TimedOut`: another process, perhaps dying, uses them.
    pub async fn open(disk: Arc<dyn Disk>, offload: Offload, config: CacheConfig) -> io::Result<Arc<Self>> {
        let opened = files::open(&*disk, config).await?;
        let slots = u32::try_from(opened.entries.len()).map_err(io::Error::other)?;
        // What an earlier process handed out, a client may not have read yet.
        let handed_out = opened.entries.iter().map(|_| AtomicBool::new(opened.were_there)).collect();
        // A page that the kernel keeps together with a neighbour's is not forgotten by itself.
        opened.blocks.expect_random_reads();
        let can_hand_out = opened.blocks.forgets();
        let mut state = State {
            slots: vec![EMPTY; slots as usize],
            by_hash: HashMap::new(),
            order: S3Fifo::new(slots),
            free: VecDeque::new(),
            failed: VecDeque::new(),
            handed_out: VecDeque::new(),
            busy: HashMap::new(),
            cautious: false,
            failing: false,
            healthy: true,
            inserts_begun: 0,
            checks: Checks::default(),
            stats: CacheStats { slots: slots.into(), ..CacheStats::default() },
        };
        for (slot, hash) in (0..slots).zip(opened.entries) {
            if hash == NO_HASH {
                state.free.push_back(slot);
                continue;
            }
            state.slots[slot as usize] = Slot { hash, held: Held::Nothing, indexed: true };
            if state.by_hash.contains_key(&hash) {
                state.free.push_back(slot);
            } else {
                state.fill(slot, hash, Held::Believed);
            }
        }
        log::info!("clean cache of {slots} slots, {} believed to hold blocks", state.by_hash.len());
        Ok(Arc::new(Self {
            disk,
            offload,
            blocks: opened.blocks,
            index: opened.index,
            pins: (0..slots).map(|_| AtomicU32::new(0)).collect(),
            handed_out,
            can_hand_out,
            state: Mutex::new(state),
            inserts: Arc::new(Semaphore::new(INSERTS_MAX)),
            writes: Semaphore::new(WRITES_MAX),
            check_turn: tokio::sync::Mutex::new(()),
        }))
    }

    /// A checked slot with that content, pinned. Never waits.
    pub fn get(self: &Arc<Self>, hash: &ContentHash) -> Option<Pinned> {
        let mut state = self.state.lock();
        let found = self.pin_checked(&mut state, hash);
        if found.is_some() {
            state.stats.hits += 1;
        } else {
            state.stats.misses += 1;
        }
        found
    }

    /// The content, if a slot is believed to hold it and does: for what [`CleanCache::get`] did not find.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn revive(self: &Arc<Self>, hash: &ContentHash) -> Option<(Pinned, Bytes)> {
        let (pinned, turn) = loop {
            let other = {
                let mut state = self.state.lock();
                if let Some(pinned) = self.pin_checked(&mut state, hash) {
                    break (pinned, None);
                }
                match state.busy.get(hash) {
                    Some(other) => other.clone(),
                    None => {
                        let slot = *state.by_hash.get(hash)?;
                        break (self.pin(slot), Some(Turn::take(self, &mut state, *hash)));
                    }
                }
            };
            // Ends when the other's turn is dropped; how, does not matter.
            let _over = other.await.is_err();
        };
        let read = self.blocks.read_at(pinned.offset_bytes(), BLOCK_LEN).await;
        let expected = *hash;
        let checked = match read {
            Ok(data) => self
                .offload
                .run(move || (ContentHash::of(&data) == expected).then_some(data))
                .await
                .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "a slot holds something else")),
            Err(error) => Err(error),
        };
        let mut state = self.state.lock();
        let result = match checked {
            Ok(data) => {
                if turn.is_some() {
                    state.slots[pinned.slot as usize].held = Held::Checked;
                    state.stats.revived += 1;
                }
                Some((pinned, data))
            }
            Err(error) => {
                state.empty(pinned.slot);
                // After a power loss the index runs ahead of the slots.
                match error.kind() {
                    ErrorKind::InvalidData | ErrorKind::UnexpectedEof => state.stats.failures += 1,
                    _ => state.note_failure("read", &error),
                }
                None
            }
        };
        drop(state);
        drop(turn);
        result
    }

    /// Keeps a block, whose hash the caller has just checked: `None` if that does not work, or not now.
    ///
    /// # Cancellation
    /// Safe; a write that has begun goes on.
    pub async fn insert(self: &Arc<Self>, hash: ContentHash, block: Bytes) -> Option<Pinned> {
        if block.len() != BLOCK_LEN {
            return None;
        }
        let Ok(permit) = self.inserts.clone().try_acquire_owned() else {
            self.state.lock().stats.skipped += 1;
            return None;
        };
        let fill = loop {
            let other = {
                let mut state = self.state.lock();
                if let Some(pinned) = self.pin_checked(&mut state, &hash) {
                    return Some(pinned);
                }
                match state.busy.get(&hash) {
                    Some(other) => other.clone(),
                    None => break self.begin_fill(&mut state, hash, permit)?,
                }
            };
            // Ends when the other's turn is dropped; how, does not matter.
            let _over = other.await.is_err();
        };
        // On a task of its own: the slot is this write's until it is over, whoever still waits for it.
        tokio::spawn(fill.run(block)).await.ok().flatten()
    }

    /// What it holds and did.
    pub fn stats(&self) -> CacheStats {
        let state = self.state.lock();
        CacheStats { used: state.by_hash.len() as u64, ..state.stats }
    }

    fn pin(self: &Arc<Self>, slot: u32) -> Pinned {
        self.pins[slot as usize].fetch_add(1, Ordering::Relaxed);
        Pinned { cache: self.clone(), slot }
    }

    fn pin_checked(self: &Arc<Self>, state: &mut State, hash: &ContentHash) -> Option<Pinned> {
        let slot = *state.by_hash.get(hash)?;
        if state.slots[slot as usize].held != Held::Checked {
            return None;
        }
        state.order.touch(slot);
        Some(self.pin(slot))
    }

    /// A slot for content that nobody else is filling.
    fn begin_fill(
        self: &Arc<Self>,
        state: &mut State,
        hash: ContentHash,
        permit: OwnedSemaphorePermit,
    ) -> Option<Fill> {
        // What is only believed is written again rather than read: its place in the order is as good as any.
        let believed = state.by_hash.get(&hash).copied();
        if let Some(slot) = believed {
            state.empty(slot);
        }
        let Some(slot) = state.take_slot(&self.pins) else {
            state.stats.skipped += 1;
            return None;
        };
        let pinned = self.pin(slot);
        let turn = Turn::take(self, state, hash);
        Some(Fill { pinned: Some(pinned), hash, writing: false, _turn: turn, _permit: permit })
    }

    /// Waits until what has been written is written back, and says whether that went well. One look covers all that
    /// was written before it began.
    async fn check_written(&self, failed_before: u64) -> io::Result<()> {
        let mine = {
            let mut state = self.state.lock();
            state.checks.written += 1;
            state.checks.written
        };
        let _turn = self.check_turn.lock().await;
        let checks = self.state.lock().checks;
        // An error is told once and names no slot: it is that of every write that was under way.
        let failed = || io::Error::other("write-back failed");
        if checks.failed != failed_before {
            return Err(failed());
        }
        if checks.good >= mine {
            return Ok(());
        }
        let result = self.blocks.check_write_back().await;
        let mut state = self.state.lock();
        match result {
            Ok(()) => state.checks.good = checks.written,
            Err(_) => state.checks.failed += 1,
        }
        result
    }

    /// Whether the pages of a slot that nobody has pinned are nobody's: a socket holds those that it was handed until
    /// its client has read them, and sees what is written there.
    async fn is_taken_back(&self, slot: u32) -> bool {
        let handed_out = &self.handed_out[slot as usize];
        if !self.can_hand_out || !handed_out.load(Ordering::Relaxed) {
            return true;
        }
        let is_gone = self.blocks.forget(slot_offset_bytes(slot), BLOCK_BYTES).await.unwrap_or(false);
        if is_gone {
            handed_out.store(false, Ordering::Relaxed);
        }
        is_gone
    }

    /// Whether the disk has room for more than it already gave.
    async fn has_space(&self) -> bool {
        self.disk.space().await.is_ok_and(|(free, all)| free >= all / FREE_SHARE)
    }

    async fn write_entry(&self, slot: u32, hash: ContentHash) -> io::Result<()> {
        let offset_bytes = files::entry_offset_bytes(slot);
        match self.index.try_write_at(&hash.0, offset_bytes) {
            Ok(written) if written == hash.0.len() => Ok(()),
            _ => self.index.write_at(Bytes::copy_from_slice(&hash.0), offset_bytes).await,
        }
    }
}

/// The only one that fills or checks some content, until dropped.
struct Turn {
    cache: Arc<CleanCache>,
    hash: ContentHash,
    _ends: oneshot::Sender<()>,
}

impl Turn {
    fn take(cache: &Arc<CleanCache>, state: &mut State, hash: ContentHash) -> Self {
        let (ends, others) = oneshot::channel();
        state.busy.insert(hash, others.shared());
        Self { cache: cache.clone(), hash, _ends: ends }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.cache.state.lock().busy.remove(&self.hash);
    }
}

/// A slot on its way to holding a block. Dropped before it does, it gives the slot back.
struct Fill {
    /// Taken when it is handed out.
    pinned: Option<Pinned>,
    hash: ContentHash,
    /// A write may be under way, and lands whatever becomes of this.
    writing: bool,
    // Dropped after the slot was given back: the next one finds it free.
    _turn: Turn,
    _permit: OwnedSemaphorePermit,
}

impl Fill {
    async fn run(mut self, block: Bytes) -> Option<Pinned> {
        let pinned = self.pinned.clone()?;
        let cache = pinned.cache.clone();
        let slot = pinned.slot;
        let (is_indexed, look_for_space, failed_before) = {
            let state = cache.state.lock();
            let look = state.inserts_begun % RETRY_EVERY == 1;
            (state.slots[slot as usize].indexed, look, state.checks.failed)
        };
        if look_for_space {
            let has_space = cache.has_space().await;
            let mut state = cache.state.lock();
            state.cautious |= !has_space;
        }
        if !cache.is_taken_back(slot).await {
            let mut state = cache.state.lock();
            state.stats.skipped += 1;
            state.handed_out.push_back(slot);
            drop(state);
            self.pinned = None;
            return None;
        }
        let written = {
            let Ok(_write) = cache.writes.acquire().await else { return None };
            // Only a hint: a slot that holds something else is found out.
            let emptied = if is_indexed { cache.write_entry(slot, NO_HASH).await } else { Ok(()) };
            self.writing = true;
            let written = cache.blocks.write_at(block, pinned.offset_bytes()).await;
            self.writing = false;
            match written {
                Ok(()) => cache.check_written(failed_before).await.and(emptied),
                Err(error) => Err(error),
            }
        };
        {
            let mut state = cache.state.lock();
            if let Err(error) = written {
                let is_full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
                state.cautious |= is_full;
                state.failing = is_indexed || !is_full;
                state.note_failure("write", &error);
                return None;
            }
            state.failing = false;
            state.note_success();
            state.fill(slot, self.hash, Held::Checked);
            state.slots[slot as usize].indexed = true;
        }
        self.pinned = None;
        if let Err(error) = cache.write_entry(slot, self.hash).await {
            cache.state.lock().note_failure("write", &error);
        }
        Some(pinned)
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        if let Some(pinned) = self.pinned.take() {
            if self.writing {
                // Pinned for ever: nobody knows when that write ends.
                std::mem::forget(pinned);
            } else {
                pinned.cache.state.lock().failed.push_back(pinned.slot);
            }
        }
    }
}

impl State {
    /// Takes a slot that holds nothing and nobody looks at.
    fn take_slot(&mut self, pins: &[AtomicU32]) -> Option<u32> {
        self.inserts_begun += 1;
        let retry = self.inserts_begun.is_multiple_of(RETRY_EVERY);
        if retry && let Some(slot) = self.handed_out.pop_front() {
            return Some(slot);
        }
        if self.cautious && retry {
            self.cautious = false;
            if let Some(slot) = self.failed.pop_front() {
                return Some(slot);
            }
        }
        if !self.cautious
            && let Some(slot) = self.free.pop_front()
        {
            return Some(slot);
        }
        if self.failing
            && let Some(slot) = self.failed.pop_front()
        {
            return Some(slot);
        }
        let slots = &self.slots;
        let evicted = self.order.evict(|slot| {
            let found = &slots[slot as usize];
            // Acquire: pairs with the drop of the last pin.
            match found.held {
                _ if pins[slot as usize].load(Ordering::Acquire) != 0 => Fate::Held,
                Held::Nothing => Fate::Empty,
                Held::Believed | Held::Checked => Fate::Full(fingerprint(&found.hash)),
            }
        });
        let Some(slot) = evicted else {
            let rest = [&mut self.failed, &mut self.free, &mut self.handed_out];
            return rest.into_iter().find_map(VecDeque::pop_front);
        };
        if self.slots[slot as usize].held != Held::Nothing {
            self.stats.evictions += 1;
            self.empty(slot);
        }
        Some(slot)
    }

    /// The slot holds that content from now on.
    fn fill(&mut self, slot: u32, hash: ContentHash, held: Held) {
        let found = &mut self.slots[slot as usize];
        (found.hash, found.held) = (hash, held);
        self.by_hash.insert(hash, slot);
        match held {
            Held::Believed => self.order.push_proven(slot),
            Held::Checked | Held::Nothing => self.order.push(slot, fingerprint(&hash)),
        }
    }

    /// Nobody finds the slot from now on. It stays in the order, as one to refill.
    fn empty(&mut self, slot: u32) {
        let found = &mut self.slots[slot as usize];
        found.held = Held::Nothing;
        if self.by_hash.get(&found.hash) == Some(&slot) {
            self.by_hash.remove(&found.hash);
        }
    }

    fn note_failure(&mut self, attempt: &str, error: &io::Error) {
        self.stats.failures += 1;
        if std::mem::replace(&mut self.healthy, false) {
            log::warn!("failed to {attempt} the clean cache, blocks come from the pool: {error}");
        }
    }

    fn note_success(&mut self) {
        if !std::mem::replace(&mut self.healthy, true) {
            log::info!("the clean cache works again");
        }
    }
}

#[cfg(test)]
mod tests;
