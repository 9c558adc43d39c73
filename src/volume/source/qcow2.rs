//! qcow2 images.
//!
//! Owns: which of them are read, and that all they refer to is there. The `imago` crate reads a table or cluster
//! beyond the end of the file as zeros, which would import a truncated image as a disk with holes; and it allocates
//! tables of the size that the header says. So all tables are looked at here first.
//! Does not own: how clusters are read.

use super::{Emitter, Event, Halt, PIECE_LEN_MAX, SourceError, SourceLimits};
use crate::geometry::SECTOR_BYTES;
use bytes::Bytes;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Largest L1 table, as QEMU's.
const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table, as QEMU's.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// A cluster that reads as zeros though it may have an offset.
const READS_AS_ZERO: u64 = 1;

/// Reads the image in `file`, which is in `dir`.
pub(super) async fn decode(
    file: File,
    dir: &Path,
    limits: SourceLimits,
    emitter: &mut Emitter,
) -> Result<(), Halt> {
    let spool_failed = |source| SourceError::Spool { dir: dir.to_owned(), source };
    let layout = Layout::read(&file, limits, &spool_failed)?;
    layout.check_tables(&file, &spool_failed)?;
    let storage = imago::file::File::try_from(file).map_err(spool_failed)?;
    let opened = Qcow2::<imago::file::File>::builder(storage).open(DenyImplicitOpenGate::default()).await;
    let image = FormatAccess::new(opened.map_err(|error| malformed(0, &error.to_string()))?);
    let size_bytes = image.size();
    if size_bytes != layout.size_bytes {
        return Err(malformed(24, "its size is not clear").into());
    }
    let padded_bytes = size_bytes.next_multiple_of(SECTOR_BYTES);
    emitter.send(Event::Opened { size_bytes: Some(padded_bytes) }).await?;
    let mut at = 0;
    while at < size_bytes {
        let guest = |error: io::Error| malformed_at_guest(at, &error);
        let (mapping, len) = image.get_mapping(at, size_bytes - at).await.map_err(guest)?;
        if len == 0 {
            return Err(malformed(0, "a part of the disk is not mapped").into());
        }
        if matches!(mapping, Mapping::Zero { .. }) {
            emitter.push_zeros(len).await?;
            at += len;
            continue;
        }
        // Up to the next such border, whatever the clusters in between are: one read, one piece.
        let border = (at + 1).next_multiple_of(u64::try_from(PIECE_LEN_MAX).unwrap_or(u64::MAX));
        let end = border.min(size_bytes);
        let mut bytes = vec![0; crate::geometry::len_of(end - at)];
        image.read(bytes.as_mut_slice(), at).await.map_err(guest)?;
        emitter.push(Bytes::from(bytes)).await?;
        at = end;
    }
    if padded_bytes > size_bytes {
        emitter.push_zeros(padded_bytes - size_bytes).await?;
    }
    emitter.flush_zeros().await
}

fn malformed(at_bytes: u64, reason: &str) -> SourceError {
    SourceError::Malformed { what: "qcow2 image", at_bytes, reason: reason.to_owned() }
}

fn malformed_at_guest(at_bytes: u64, error: &io::Error) -> SourceError {
    SourceError::Malformed { what: "disk in the qcow2 image", at_bytes, reason: error.to_string() }
}

/// What the header says, checked.
#[derive(Debug)]
struct Layout {
    file_bytes: u64,
    size_bytes: u64,
    cluster_bits: u32,
    l1_offset: u64,
    l1_entries: u64,
}

impl Layout {
    fn read(
        file: &File,
        limits: SourceLimits,
        spool_failed: &impl Fn(io::Error) -> SourceError,
    ) -> Result<Self, SourceError> {
        let file_bytes = file.metadata().map_err(spool_failed)?.len();
        // Shorter headers, of version 2, are followed by what is no feature bit.
        let mut header = [0; 104];
        let truncated = || SourceError::Truncated { what: "qcow2 image", at_bytes: file_bytes };
        if file_bytes < 104 {
            return Err(truncated());
        }
        file.read_exact_at(&mut header, 0).map_err(spool_failed)?;
        let u32_at =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));

        let version = u32_at(4);
        let unsupported = |reason: &str| Err(SourceError::Unsupported(format!("the qcow2 image {reason}")));
        if version != 2 && version != 3 {
            return unsupported(&format!("has version {version}: convert it with qemu-img convert -O qcow2"));
        }
        if u64_at(8) != 0 {
            return unsupported("has a backing file: flatten it with qemu-img convert -O qcow2");
        }
        if u32_at(32) != 0 {
            return unsupported("is encrypted: decrypt it with qemu-img convert -O qcow2");
        }
        let features = if version == 3 { u64_at(72) } else { 0 };
        let known = [
            "was not closed properly: repair it with qemu-img check -r all",
            "is marked as corrupt: repair it with qemu-img check -r all",
            "has its data in another file: convert it with qemu-img convert -O qcow2",
            "is compressed with zstd inside: convert it with qemu-img convert -O qcow2",
            "has extended L2 entries: convert it with qemu-img convert -O qcow2",
        ];
        for (bit, reason) in known.iter().enumerate() {
            if features >> bit & 1 == 1 {
                return unsupported(reason);
            }
        }
        if features != 0 {
            return unsupported("has features that are not known: convert it with qemu-img convert -O qcow2");
        }

        let cluster_bits = u32_at(20);
        let size_bytes = u64_at(24);
        if !(9..=21).contains(&cluster_bits) {
            return Err(malformed(20, "impossible cluster size"));
        }
        if size_bytes > limits.raw_bytes_max {
            return Err(SourceError::TooLarge {
                what: "disk in the qcow2 image",
                limit_bytes: limits.raw_bytes_max,
            });
        }
        if size_bytes == 0 {
            return Err(malformed(24, "the disk has no size"));
        }
        let l1_bytes = u64::from(u32_at(36)) * 8;
        // Each L1 entry stands for a table of one cluster with entries of 8 bytes.
        let l1_entries = size_bytes.div_ceil(1 << (2 * cluster_bits - 3));
        if l1_entries * 8 > l1_bytes || l1_bytes > L1_BYTES_MAX {
            return Err(malformed(36, "impossible size of the L1 table"));
        }
        let refcount_bytes = u64::from(u32_at(56)) << cluster_bits;
        if refcount_bytes > REFCOUNT_TABLE_BYTES_MAX {
            return Err(malformed(56, "impossible size of the refcount table"));
        }
        let l1_offset = u64_at(40);
        for (offset, len) in [(l1_offset, l1_bytes), (u64_at(48), refcount_bytes)] {
            if offset.checked_add(len).is_none_or(|end| end > file_bytes) {
                return Err(truncated());
            }
        }
        Ok(Self { file_bytes, size_bytes, cluster_bits, l1_offset, l1_entries })
    }

    /// That every table and cluster in use lies in the file.
    fn check_tables(
        &self,
        file: &File,
        spool_failed: &impl Fn(io::Error) -> SourceError,
    ) -> Result<(), SourceError> {
        let cluster_bytes = 1u64 << self.cluster_bits;
        let truncated = || SourceError::Truncated { what: "qcow2 image", at_bytes: self.file_bytes };
        let mut l1 = vec![0; crate::geometry::len_of(self.l1_entries * 8)];
        file.read_exact_at(&mut l1, self.l1_offset).map_err(spool_failed)?;
        let mut l2 = vec![0; crate::geometry::len_of(cluster_bytes)];
        let mut seen = HashSet::new();
        for (l1_index, l1_entry) in (0u64..).zip(words(&l1)) {
            let l2_offset = l1_entry & OFFSET_MASK;
            if l2_offset == 0 {
                continue;
            }
            let at_bytes = self.l1_offset + l1_index * 8;
            if !l2_offset.is_multiple_of(cluster_bytes) {
                return Err(malformed(at_bytes, "an L2 table lies between clusters"));
            }
            // Also keeps the work below in proportion to the file.
            if !seen.insert(l2_offset) {
                return Err(malformed(at_bytes, "an L2 table is used twice"));
            }
            if l2_offset + cluster_bytes > self.file_bytes {
                return Err(truncated());
            }
            file.read_exact_at(&mut l2, l2_offset).map_err(spool_failed)?;
            for entry in words(&l2) {
                if self.entry_end(entry) > self.file_bytes {
                    return Err(truncated());
                }
            }
        }
        Ok(())
    }

    /// Where in the file the cluster of an L2 entry surely does not end before.
    fn entry_end(&self, entry: u64) -> u64 {
        let offset = entry & OFFSET_MASK;
        if entry & COMPRESSED != 0 {
            // The last of its sectors may be cut where the file ends.
            let offset_bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << offset_bits) - 1);
            let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
            return if more_sectors == 0 {
                offset + 1
            } else {
                (offset / SECTOR_BYTES + more_sectors) * SECTOR_BYTES + 1
            };
        }
        if offset == 0 || entry & READS_AS_ZERO != 0 { 0 } else { offset + (1 << self.cluster_bits) }
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|chunk| chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)))
}
