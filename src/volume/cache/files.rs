//! The files of the clean cache.
//!
//! Owns: their names, sizes and format, and what is read of them after a restart.
//! Does not own: what becomes of it.
//!
//! `cache/blocks`: slots of 128 KiB. `cache/index`, little-endian:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `BHCACHE` and a zero |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | number of slots |
//! | 16 | 16 | first half of the BLAKE3 hash of bytes 0 to 15 |
//! | 32 + 16 n | 16 | hash of what slot n may hold; zeros, or the end of the file: nothing |
//!
//! The header comes first and never changes while the file lives, so that an entry is one small write. No write needs an
//! order: all of it is hints.

use super::CacheConfig;
use crate::disk::{Disk, DiskFile, DiskPath, Lock};
use crate::geometry::{BLOCK_BYTES, len_of};
use crate::volume::ids::ContentHash;
use bytes::Bytes;
use std::io::{self, ErrorKind};
use std::sync::Arc;

const BLOCKS: &str = "cache/blocks";
const INDEX: &str = "cache/index";
const MAGIC: &[u8; 8] = b"BHCACHE\0";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 32;
const HEADER_LEN: usize = 32;
const ENTRY_BYTES: u64 = 16;
/// Bytes of the index read at a time.
const INDEX_READ_BYTES: u64 = 1 << 20;
/// The entry of a slot that holds nothing.
pub(super) const NO_HASH: ContentHash = ContentHash([0; 16]);

/// Where the index has the entry of a slot.
pub(super) fn entry_offset_bytes(slot: u32) -> u64 {
    HEADER_BYTES + u64::from(slot) * ENTRY_BYTES
}

/// The cache's files, and what each slot is believed to hold.
pub(super) struct Opened {
    pub blocks: Arc<dyn DiskFile>,
    pub index: Arc<dyn DiskFile>,
    pub entries: Vec<ContentHash>,
    /// There were files before.
    pub were_there: bool,
}

/// Opens the files if they fit the settings and the disk, or else makes new ones.
pub(super) async fn open(disk: &dyn Disk, config: CacheConfig) -> io::Result<Opened> {
    let (blocks_path, index_path) = (DiskPath::state(BLOCKS), DiskPath::state(INDEX));
    // A killed process's writes hold this lock until they have landed: none comes over a slot that was refilled.
    let mut blocks = match disk.open(blocks_path.clone(), Lock::Exclusive).await {
        Ok(file) => Some(file),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let used_bytes = match &blocks {
        Some(file) => allocated_bytes(&**file).await,
        None => 0,
    };
    let old = match (&blocks, disk.open(index_path.clone(), Lock::None).await) {
        (Some(_), Ok(index)) => read_header(&*index).await.map(|slots| (index, slots)),
        _ => None,
    };
    let (free_bytes, _) = disk.space().await?;
    let slots =
        slots_for(config, free_bytes.saturating_add(used_bytes), old.as_ref().map(|(_, slots)| *slots));
    if u64::from(slots) < config.bytes / BLOCK_BYTES {
        log::warn!(
            "the clean cache gets {} of the {} bytes that it may have: the disk has {free_bytes} free",
            u64::from(slots) * BLOCK_BYTES,
            config.bytes
        );
    }
    let mut entries = vec![NO_HASH; slots as usize];
    if let (Some(blocks), Some((index, old_slots))) = (&blocks, old)
        && old_slots == slots
    {
        // What a killed process left on its way to the disk gets there now, or is not believed.
        if let Err(error) = blocks.check_write_back().await {
            log::warn!("the clean cache starts empty: {error}");
        } else {
            read_entries(&*index, &mut entries).await;
        }
        return Ok(Opened { blocks: blocks.clone(), index, entries, were_there: true });
    }
    // Another size: files cannot shrink, and what a cache held is not worth more code.
    disk.remove(index_path.clone()).await?;
    if blocks.take().is_some() {
        disk.remove(blocks_path.clone()).await?;
    }
    let blocks = disk.create(blocks_path, u64::from(slots) * BLOCK_BYTES, Lock::Exclusive).await?;
    let index = disk.create(index_path, HEADER_BYTES + u64::from(slots) * ENTRY_BYTES, Lock::None).await?;
    index.write_at(Bytes::copy_from_slice(&header(slots)), 0).await?;
    Ok(Opened { blocks, index, entries, were_there: false })
}

/// Slots of a cache that may have half of `available_bytes`. Where the disk sets the limit and not the settings, as many
/// as before if that is not far off: a restart does not lose the cache over a few bytes.
fn slots_for(config: CacheConfig, available_bytes: u64, old_slots: Option<u32>) -> u32 {
    let configured = config.bytes / BLOCK_BYTES;
    let wanted = configured.min(available_bytes / 2 / BLOCK_BYTES);
    let may_stay = |old: &u64| {
        *old <= configured && *old <= available_bytes / 4 * 3 / BLOCK_BYTES && *old >= wanted / 4 * 3
    };
    let slots = match old_slots.map(u64::from).filter(may_stay) {
        Some(old) if wanted < configured => old,
        _ => wanted,
    };
    u32::try_from(slots).unwrap_or(u32::MAX)
}

async fn allocated_bytes(file: &dyn DiskFile) -> u64 {
    const STRETCHES_MAX: usize = 1 << 16;
    let stretches = file.data_stretches(0, STRETCHES_MAX).await.unwrap_or_default();
    stretches.iter().map(|(start, end)| end.saturating_sub(*start)).sum()
}

fn header(slots: u32) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&slots.to_le_bytes());
    let check = ContentHash::of(&header[..16]);
    header[16..].copy_from_slice(&check.0);
    header
}

/// The number of slots that an index is for. `None` if it is none of this version.
async fn read_header(index: &dyn DiskFile) -> Option<u32> {
    let found = index.read_at(0, HEADER_LEN).await.ok()?;
    let slots = u32::from_le_bytes(found.get(12..16)?.try_into().ok()?);
    (found[..] == header(slots)).then_some(slots)
}

/// Reads what is there; what cannot be read is nothing.
async fn read_entries(index: &dyn DiskFile, entries: &mut [ContentHash]) {
    let mut offset_bytes = HEADER_BYTES;
    for part in entries.chunks_mut(len_of(INDEX_READ_BYTES / ENTRY_BYTES)) {
        let len_bytes = part.len() as u64 * ENTRY_BYTES;
        if let Ok(found) = index.read_at(offset_bytes, len_of(len_bytes)).await {
            for (entry, bytes) in part.iter_mut().zip(found.chunks_exact(len_of(ENTRY_BYTES))) {
                entry.0.copy_from_slice(bytes);
            }
        }
        offset_bytes += len_bytes;
    }
}
