//! One epoch of a volume: its file on disk, its live map, its counts.
//!
//! An epoch file is a header page, the *flushed* map, and the volume's bytes by position: byte `X` of the volume is at
//! `data_start + X`. The *live* map is a file of the runtime directory with the same pages. Live says what happened and
//! survives `kill -9`; flushed says what is safely on disk and survives power loss.
//!
//! Header page of an epoch file, little-endian:
//!
//! | bytes | field | why here |
//! | --- | --- | --- |
//! | 0..8 | magic `BHEPOCH1` | refuse other files before anything else is believed |
//! | 8..12 | version, 1 | |
//! | 12..16 | features, 0; an unknown one is refused | |
//! | 16..32 | pool id | a state directory of another pool |
//! | 32..48 | volume uid | names are used again, uids never |
//! | 48..64 | file id | ties the live map to this file |
//! | 64..80 | incarnation that made it | |
//! | 80..88 | term | |
//! | 88..96 | number | |
//! | 96..104 | size of the volume in bytes | with it, the layout of all that follows |
//! | 104..112 | data start in bytes | checked against the layout |
//! | 4064..4096 | BLAKE3 of bytes 0..4064 | |
//!
//! Owns: both files of an epoch, the flush of one epoch, marks of running and failed syncs.
//! Does not own: which epochs make up a volume, or what becomes of them.

use crate::block::Hold;
use crate::disk::{Create, Disk, DiskFile, DiskPath, Lock, SharedMap};
use crate::geometry::{ByteRange, SECTOR_BYTES, VOLUME_BYTES_MAX, len_of};
use crate::mutant::{self, Mutant};
use crate::offload::Offload;
use crate::volume::ids::{FileId, Incarnation, PoolId, Uid};
use crate::volume::sector_map::{self, MAP_PAGE_BYTES, MapLayout, SectorMap};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

const MAGIC: &[u8; 8] = b"BHEPOCH1";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 4096;
const CHECKED_LEN: usize = HEADER_LEN - 32;

/// What an epoch file says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EpochHeader {
    pub pool: PoolId,
    pub uid: Uid,
    pub file_id: FileId,
    pub incarnation: Incarnation,
    pub term: u64,
    pub number: u64,
    pub size_bytes: u64,
}

/// Why an epoch file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// The local disk failed.
    #[error("{what}: {source}")]
    Disk { what: String, source: io::Error },
    /// It is not an epoch file that this version can read.
    #[error("epoch file {path}: {reason}")]
    Corrupt { path: String, reason: String },
}

impl EpochError {
    /// For `map_err` on a disk operation.
    pub fn disk(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Disk { what, source }
    }
}

impl EpochHeader {
    /// Its page.
    pub fn encode(&self) -> Bytes {
        let mut page = BytesMut::with_capacity(HEADER_LEN);
        page.extend_from_slice(MAGIC);
        page.extend_from_slice(&VERSION.to_le_bytes());
        page.extend_from_slice(&0u32.to_le_bytes());
        page.extend_from_slice(&self.pool.0);
        page.extend_from_slice(&self.uid.0);
        page.extend_from_slice(&self.file_id.0);
        page.extend_from_slice(&self.incarnation.0);
        for number in [self.term, self.number, self.size_bytes, self.layout().data_start_bytes()] {
            page.extend_from_slice(&number.to_le_bytes());
        }
        page.resize(CHECKED_LEN, 0);
        let hash = blake3::hash(&page);
        page.extend_from_slice(hash.as_bytes());
        page.freeze()
    }

    /// From its page.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(page: &[u8]) -> Result<Self, String> {
        if page.len() != HEADER_LEN || &page[..8] != MAGIC {
            return Err("not an epoch file".into());
        }
        if blake3::hash(&page[..CHECKED_LEN]).as_bytes() != &page[CHECKED_LEN..] {
            return Err("its header fails its checksum".into());
        }
        let id = |at: usize| {
            let mut id = [0; 16];
            id.copy_from_slice(&page[at..at + 16]);
            id
        };
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&page[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if page[8..12] != VERSION.to_le_bytes() || page[12..16] != [0; 4] {
            return Err("made by a newer version of Blockhouse".into());
        }
        let header = Self {
            pool: PoolId(id(16)),
            uid: Uid(id(32)),
            file_id: FileId(id(48)),
            incarnation: Incarnation(id(64)),
            term: number(80),
            number: number(88),
            size_bytes: number(96),
        };
        if header.size_bytes > VOLUME_BYTES_MAX || !header.size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(format!("a volume cannot have {} bytes", header.size_bytes));
        }
        if number(104) != header.layout().data_start_bytes() {
            return Err("its data does not start where its size says".into());
        }
        Ok(header)
    }

    /// The layout that its size gives.
    pub fn layout(&self) -> MapLayout {
        MapLayout::of(self.size_bytes)
    }

    /// Where its file is.
    pub fn path(&self) -> DiskPath {
        DiskPath::state(format!("{}/{}", Self::folder(&self.uid), self.file_name()))
    }

    /// Folder of a volume's epoch files.
    pub fn folder(uid: &Uid) -> String {
        format!("volumes/{uid}")
    }

    fn file_name(&self) -> String {
        format!("epoch-{:020}-{:020}", self.term, self.number)
    }

    /// Where its live map is. The file id is in the name: a number that is used again has another file.
    pub fn live_path(&self) -> DiskPath {
        DiskPath::runtime(format!("live/{}-{}", self.uid, self.file_id))
    }
}

/// Words of a live map's header page.
mod live {
    pub const MAGIC: usize = 0;
    pub const BOOT: usize = 1;
    pub const FILE: usize = 3;
    pub const INODE: usize = 5;
    pub const PAGES: usize = 6;
    pub const COMPLETE: usize = 7;
    pub const MARKS: usize = 8;
    pub const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"BHLIVE01");
    pub const COMPLETE_VALUE: u64 = u64::from_le_bytes(*b"COMPLETE");
    /// A sync failed.
    pub const FAILED: u64 = 1;
    /// A sync is running.
    pub const RUNNING: u64 = 2;
}

/// An epoch that is open on this node.
pub struct Epoch {
    header: EpochHeader,
    layout: MapLayout,
    data_start: u64,
    file: Option<Arc<dyn DiskFile>>,
    live: Option<Arc<dyn SharedMap>>,
    map: SectorMap,
    offload: Offload,
    /// Writers inside: see [`sector_map::enter`].
    pub writers: AtomicU64,
    /// Writes whose bits are set.
    written: AtomicU64,
    /// How many of them are known to be on disk.
    synced: AtomicU64,
    /// Bytes written or zeroed, overwrites counted again.
    dirty_bytes: AtomicU64,
    first_dirty: OnceLock<tokio::time::Instant>,
    /// Held by whoever asks the file for errors: an error is told once, and whoever is told must have noted it before
    /// the next one asks.
    error_turn: tokio::sync::Mutex<()>,
    /// Hash of each map page as it is in the flushed map, of those that this process wrote.
    flushed_pages: Mutex<BTreeMap<usize, [u8; 32]>>,
}

/// What a sync of an epoch came to.
#[derive(Debug)]
pub enum FlushError {
    /// A sync failed: final.
    Failed(io::Error),
    /// No space for the flushed map, or the like: nothing is lost, the next flush may succeed.
    Again(io::Error),
}

impl Epoch {
    /// Makes a new epoch, durably: file, header, directory entry, and an empty live map.
    ///
    /// # Errors
    /// `Disk`.
    pub async fn create(
        disk: &Arc<dyn Disk>,
        offload: Offload,
        header: EpochHeader,
    ) -> Result<Arc<Self>, EpochError> {
        let path = header.path();
        let what = || format!("make epoch file {}", path.path);
        let layout = header.layout();
        let len = layout.data_start_bytes() + header.size_bytes;
        let file = disk.create(path.clone(), len, Lock::Exclusive).await.map_err(EpochError::disk(what()))?;
        file.write_at(header.encode(), 0).await.map_err(EpochError::disk(what()))?;
        file.sync_data().await.map_err(EpochError::disk(what()))?;
        disk.sync_dir(path.parent()).await.map_err(EpochError::disk(what()))?;
        let map = disk
            .map(header.live_path(), layout.words(), Create::New)
            .await
            .map_err(EpochError::disk("make a live map"))?;
        map.allocate(0).map_err(EpochError::disk("make a live map"))?;
        init_live(map.as_ref(), disk.as_ref(), &header, file.inode());
        map.words()[live::COMPLETE].store(live::COMPLETE_VALUE, Ordering::SeqCst);
        Ok(Arc::new(Self::over(header, layout, file, map, &[], offload)))
    }

    /// Opens the epoch file at `path`, locked, and its live map: the one that is there if it belongs to this very file
    /// and boot and is complete, else one made from the flushed map.
    ///
    /// # Errors
    /// `Disk`, `Corrupt`.
    pub async fn open(
        disk: &Arc<dyn Disk>,
        offload: Offload,
        path: &DiskPath,
    ) -> Result<Arc<Self>, EpochError> {
        let file = disk
            .open(path.clone(), Lock::Exclusive)
            .await
            .map_err(EpochError::disk(format!("open epoch file {}", path.path)))?;
        let corrupt = |reason: String| EpochError::Corrupt { path: path.path.clone(), reason };
        let page = file.read_at(0, HEADER_LEN).await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => corrupt("shorter than its header".into()),
            _ => EpochError::Disk { what: format!("read epoch file {}", path.path), source: error },
        })?;
        let header = EpochHeader::decode(&page).map_err(corrupt)?;
        if header.path() != *path {
            return Err(corrupt(format!("its header says it is {}", header.path().path)));
        }
        let layout = header.layout();
        let (len, _) = disk.stat(path.clone()).await.map_err(EpochError::disk("stat an epoch file"))?;
        if len != layout.data_start_bytes() + header.size_bytes {
            return Err(corrupt(format!("it has {len} bytes, which is not what its header says")));
        }
        let map = match Self::believable(disk, &header, layout, file.inode()).await? {
            Some(map) => map,
            None => Self::rebuild(disk, &header, layout, &file).await?,
        };
        let looking = map.clone();
        let allocated = offload
            .run(move || looking.allocated_pages())
            .await
            .map_err(EpochError::disk("read a live map"))?;
        let epoch = Self::over(header, layout, file, map, &allocated, offload);
        if !epoch.map.is_empty() {
            // After a restart all that is known is that it happened: nothing of it counts as synced.
            if !mutant::on(Mutant::CleanAfterRestart) {
                epoch.written.store(1, Ordering::SeqCst);
            }
            epoch.note_dirty(epoch.map.written_ranges().iter().map(|range| range.len()).sum::<u64>().max(1));
        }
        if epoch.marks() & live::RUNNING != 0 {
            epoch.write_again().await.map_err(EpochError::disk("write an epoch's sectors once more"))?;
        }
        Ok(Arc::new(epoch))
    }

    fn over(
        header: EpochHeader,
        layout: MapLayout,
        file: Arc<dyn DiskFile>,
        live: Arc<dyn SharedMap>,
        allocated: &[usize],
        offload: Offload,
    ) -> Self {
        Self {
            data_start: layout.data_start_bytes(),
            header,
            layout,
            file: Some(file),
            map: SectorMap::new(live.clone(), layout, allocated),
            live: Some(live),
            offload,
            writers: AtomicU64::new(0),
            written: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            dirty_bytes: AtomicU64::new(0),
            first_dirty: OnceLock::new(),
            error_turn: tokio::sync::Mutex::new(()),
            flushed_pages: Mutex::new(BTreeMap::new()),
        }
    }

    async fn believable(
        disk: &Arc<dyn Disk>,
        header: &EpochHeader,
        layout: MapLayout,
        inode: u64,
    ) -> Result<Option<Arc<dyn SharedMap>>, EpochError> {
        let map = match disk.map(header.live_path(), layout.words(), Create::Existing).await {
            Ok(map) => map,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
                return Ok(None);
            }
            Err(error) => return Err(EpochError::Disk { what: "map a live map".into(), source: error }),
        };
        // Page 0 first: in a live map whose making was cut short it may not be there at all.
        let allocated = map.allocated_pages().map_err(EpochError::disk("read a live map"))?;
        if !allocated.contains(&0) {
            return Ok(None);
        }
        let word = |at: usize| map.words()[at].load(Ordering::SeqCst);
        let (boot, file) = (halves(&disk.boot_id()), halves(&header.file_id.0));
        let ours = word(live::MAGIC) == live::MAGIC_VALUE
            && [word(live::BOOT), word(live::BOOT + 1)] == boot
            && [word(live::FILE), word(live::FILE + 1)] == file
            && word(live::INODE) == inode
            && word(live::PAGES) == layout.pages() as u64
            && word(live::COMPLETE) == live::COMPLETE_VALUE;
        Ok(ours.then_some(map))
    }

    /// A live map that says what the flushed one says. Made under another name, so that half of one is never believed.
    async fn rebuild(
        disk: &Arc<dyn Disk>,
        header: &EpochHeader,
        layout: MapLayout,
        file: &Arc<dyn DiskFile>,
    ) -> Result<Arc<dyn SharedMap>, EpochError> {
        let path = header.live_path();
        let mut making = path.clone();
        making.path.push_str(".new");
        if mutant::on(Mutant::HalfLiveMap) {
            making = path.clone();
            disk.remove(path.clone()).await.map_err(EpochError::disk("remove a live map"))?;
        }
        disk.remove(making.clone()).await.map_err(EpochError::disk("remove half a live map"))?;
        let map = disk
            .map(making.clone(), layout.words(), Create::New)
            .await
            .map_err(EpochError::disk("make a live map"))?;
        map.allocate(0).map_err(EpochError::disk("make a live map"))?;
        init_live(map.as_ref(), disk.as_ref(), header, file.inode());
        if mutant::on(Mutant::HalfLiveMap) {
            map.words()[live::COMPLETE].store(live::COMPLETE_VALUE, Ordering::SeqCst);
        }
        let map_end = layout.pages() as u64 * MAP_PAGE_BYTES;
        let mut from = MAP_PAGE_BYTES;
        loop {
            let stretches =
                file.data_stretches(from, 1024).await.map_err(EpochError::disk("read a flushed map"))?;
            let done = stretches.len() < 1024 || stretches.iter().any(|&(_, end)| end >= map_end);
            for (start, end) in stretches {
                from = from.max(end);
                let first = start.max(MAP_PAGE_BYTES) / MAP_PAGE_BYTES;
                let last = end.min(map_end).div_ceil(MAP_PAGE_BYTES);
                for page in first..last {
                    let bytes = file
                        .read_at(page * MAP_PAGE_BYTES, len_of(MAP_PAGE_BYTES))
                        .await
                        .map_err(EpochError::disk("read a flushed map"))?;
                    copy_in(map.as_ref(), len_of(page), &bytes)
                        .map_err(EpochError::disk("make a live map"))?;
                }
            }
            if done {
                break;
            }
        }
        map.words()[live::COMPLETE].store(live::COMPLETE_VALUE, Ordering::SeqCst);
        if making != path {
            disk.rename(making, path).await.map_err(EpochError::disk("put a live map in place"))?;
        }
        Ok(map)
    }

    /// What its file says of itself.
    pub fn header(&self) -> &EpochHeader {
        &self.header
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.header.number
    }

    /// Its sector map.
    pub fn map(&self) -> &SectorMap {
        &self.map
    }

    /// Its file.
    ///
    /// # Panics
    /// Never: the file is there until the last reference is dropped.
    pub fn file(&self) -> &Arc<dyn DiskFile> {
        self.file.as_ref().expect("an epoch has its file until it is dropped")
    }

    /// Where byte `offset_bytes` of the volume is in its file.
    pub fn position(&self, offset_bytes: u64) -> u64 {
        self.data_start + offset_bytes
    }

    /// Bytes written or zeroed since it began, overwrites counted again.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes.load(Ordering::Relaxed)
    }

    /// When it was first written to.
    pub fn first_dirty(&self) -> Option<tokio::time::Instant> {
        self.first_dirty.get().copied()
    }

    /// Whether anything was ever written to it. Counted before the writer leaves.
    pub fn has_records(&self) -> bool {
        self.written.load(Ordering::SeqCst) != 0
    }

    /// Counts a write whose bits are set and whose page is marked: from here on a flush owes it.
    pub fn count_write(&self, bytes: u64) -> FirstWrite {
        self.written.fetch_add(1, Ordering::SeqCst);
        self.note_dirty(bytes)
    }

    fn note_dirty(&self, bytes: u64) -> FirstWrite {
        self.dirty_bytes.fetch_add(bytes, Ordering::Relaxed);
        if self.first_dirty.get().is_none() && self.first_dirty.set(tokio::time::Instant::now()).is_ok() {
            FirstWrite::Yes
        } else {
            FirstWrite::No
        }
    }

    fn marks(&self) -> u64 {
        self.live.as_ref().map_or(0, |map| map.words()[live::MARKS].load(Ordering::SeqCst))
    }

    fn mark(&self, change: impl Fn(u64) -> u64) {
        if let Some(map) = &self.live {
            let word = &map.words()[live::MARKS];
            word.store(change(word.load(Ordering::SeqCst)), Ordering::SeqCst);
        }
    }

    /// Whether a sync of it ever failed, in this process or one before it.
    pub fn has_failed(&self) -> bool {
        self.marks() & live::FAILED != 0
    }

    /// Notes for good that its file cannot be believed.
    pub fn mark_failed(&self) {
        self.mark(|marks| marks | live::FAILED);
    }

    /// Writes all live sectors once more: a sync was running when the process before was killed, its error may have been
    /// told to nobody, and the next sync would not repeat it.
    async fn write_again(&self) -> io::Result<()> {
        for range in self.map.written_ranges() {
            let mut at = range.start();
            while at < range.end() {
                let len = (range.end() - at).min(1 << 20);
                let bytes = self.file().read_at(self.position(at), len_of(len)).await?;
                self.file().write_at(bytes, self.position(at)).await?;
                at += len;
            }
        }
        self.mark(|marks| marks & !live::RUNNING);
        Ok(())
    }

    /// Whether everything read from its file so far was what was written to it. A failure is noted for good.
    ///
    /// # Errors
    /// The write-back error that turned up, now or before.
    pub async fn check_write_back(&self) -> io::Result<()> {
        let _turn = self.error_turn.lock().await;
        let result = self.file().check_write_back().await;
        if result.is_err() {
            self.mark_failed();
        }
        if self.has_failed() {
            return result.and(Err(io::Error::other("a sync of it failed before")));
        }
        result
    }

    async fn sync(&self) -> Result<(), FlushError> {
        self.mark(|marks| marks | live::RUNNING);
        match self.file().sync_data().await {
            Ok(()) => {
                self.mark(|marks| marks & !live::RUNNING);
                Ok(())
            }
            Err(error) => {
                if mutant::on(Mutant::RetrySync) {
                    self.mark(|marks| marks & !live::RUNNING);
                    return Err(FlushError::Again(error));
                }
                self.mark_failed();
                Err(FlushError::Failed(error))
            }
        }
    }

    /// Makes all that was counted before the call durable. Only one at a time.
    ///
    /// # Errors
    /// See [`FlushError`].
    pub async fn flush(&self) -> Result<(), FlushError> {
        let _turn = self.error_turn.lock().await;
        // Whoever waited for a sync that failed must not sync again: the next one would succeed.
        if self.has_failed() {
            return Err(FlushError::Failed(io::Error::other("a sync of it failed before")));
        }
        let written = self.written.load(Ordering::SeqCst);
        if written == self.synced.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut copies = Vec::new();
        if !mutant::on(Mutant::CopyAfterSync) {
            copies = self.map.take_changed_pages();
        }
        let pages: Vec<usize> = copies.iter().map(|(page, _)| *page).collect();
        let result = self.sync().await;
        if mutant::on(Mutant::CopyAfterSync) {
            copies = self.map.take_changed_pages();
        }
        let result = match result {
            Ok(()) => self.write_flushed(copies).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => self.synced.store(written, Ordering::SeqCst),
            Err(_) => self.map.mark_changed_again(pages),
        }
        result
    }

    async fn write_flushed(&self, copies: Vec<(usize, Vec<u64>)>) -> Result<(), FlushError> {
        let mut hashes = Vec::new();
        let mut runs: Vec<(usize, BytesMut)> = Vec::new();
        for (page, words) in copies {
            let mut bytes = BytesMut::with_capacity(HEADER_LEN);
            words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
            let hash = *blake3::hash(&bytes).as_bytes();
            // Sectors written over and over mark their page each time, and change nothing in it.
            if self.flushed_pages.lock().get(&page) == Some(&hash) {
                continue;
            }
            hashes.push((page, hash));
            match runs.last_mut() {
                Some((first, run)) if *first + run.len() / HEADER_LEN == page && run.len() < 1 << 20 => {
                    run.extend_from_slice(&bytes);
                }
                _ => runs.push((page, bytes)),
            }
        }
        if runs.is_empty() {
            return Ok(());
        }
        for (page, run) in runs {
            self.file()
                .write_at(run.freeze(), page as u64 * MAP_PAGE_BYTES)
                .await
                .map_err(FlushError::Again)?;
        }
        self.sync().await?;
        self.flushed_pages.lock().extend(hashes);
        Ok(())
    }

    /// Reads bytes of the volume from its file, whatever its map says.
    ///
    /// # Errors
    /// Of the local disk.
    pub async fn read(&self, range: ByteRange) -> io::Result<Bytes> {
        self.file().read_at(self.position(range.start()), len_of(range.len())).await
    }

    /// Removes its files. Readers that still hold it go on.
    ///
    /// # Errors
    /// Of the local disk.
    pub async fn unlink(&self, disk: &Arc<dyn Disk>) -> io::Result<()> {
        // The file before its live map: a file without one is read by its flushed map, which says less.
        disk.remove(self.header.path()).await?;
        disk.remove(self.header.live_path()).await
    }

    /// Its layout.
    pub fn layout(&self) -> MapLayout {
        self.layout
    }

    /// Whether nobody writes to it any more. Only means something once it is frozen.
    pub fn is_drained(&self) -> bool {
        sector_map::is_drained(&self.writers)
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        // The last close of a large unlinked file takes as long as its unlink: not on this thread, which may serve.
        let parts = (self.file.take(), self.live.take());
        if self.offload == Offload::Threads
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(parts));
        }
    }
}

/// Whether a write was the first to its epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FirstWrite {
    Yes,
    No,
}

fn init_live(map: &dyn SharedMap, disk: &dyn Disk, header: &EpochHeader, inode: u64) {
    let store = |at: usize, value: u64| map.words()[at].store(value, Ordering::SeqCst);
    let (boot, file) = (halves(&disk.boot_id()), halves(&header.file_id.0));
    store(live::BOOT, boot[0]);
    store(live::BOOT + 1, boot[1]);
    store(live::FILE, file[0]);
    store(live::FILE + 1, file[1]);
    store(live::INODE, inode);
    store(live::PAGES, header.layout().pages() as u64);
    store(live::MAGIC, live::MAGIC_VALUE);
}

fn copy_in(map: &dyn SharedMap, page: usize, bytes: &[u8]) -> io::Result<()> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    map.allocate(page)?;
    for (at, word) in bytes.chunks_exact(8).enumerate() {
        let mut le = [0; 8];
        le.copy_from_slice(word);
        map.words()[page * crate::disk::MAP_PAGE_WORDS + at].store(u64::from_le_bytes(le), Ordering::SeqCst);
    }
    Ok(())
}

fn halves(id: &[u8; 16]) -> [u64; 2] {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&id[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    [word(0), word(8)]
}

impl Hold for Epoch {
    /// A position of an epoch's file is one of the volume, for as long as the file has pages.
    fn hand_out(&self) -> bool {
        true
    }
}
