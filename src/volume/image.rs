//! Images: a disk read from outside becomes an object that volumes are forked from, and is read out again.
//!
//! Owns: cutting a source into blocks and packs, the order placeholder, uploads, image; reading a disk as one stream.
//! Does not own: the formats of sources ([`crate::volume::source`]), or how an import is watched (the node).

use crate::block::read_at;
use crate::geometry::{
    BLOCK_BYTES, BLOCK_LEN, BlockIndex, ByteRange, SECTOR_BYTES, VOLUME_BYTES_MAX, len_of,
};
use crate::store::{ETag, Expect};
use crate::volume::base::BaseMap;
use crate::volume::catalog::{delete_settled, read_image};
use crate::volume::destage::{MapDraft, Packed, put_pack};
use crate::volume::engine::{Engine, EngineError, Stamps};
use crate::volume::head::{ImageObject, Owner, SmallObject, check_name, check_size, keys};
use crate::volume::ids::ContentHash;
use crate::volume::map::{MAP_BYTES_MAX, MapRef};
use crate::volume::pack::{EncodedBlock, PackBuilder, encode_block};
use crate::volume::read_only::ReadOnlyDisk;
use crate::volume::source::{Piece, RawSource, SourceError};
use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks that one import hashes and compresses at once.
const BLOCKS_AT_ONCE: usize = 8;
/// What an export reads at a time.
const EXPORT_STEP_BYTES: u64 = 1 << 20;
/// Steps that an export is ahead of its reader.
const EXPORT_AHEAD: usize = 4;

/// How far an import is.
#[derive(Default, Debug)]
pub struct Progress {
    /// Bytes of the disk that were read.
    pub done_bytes: AtomicU64,
    /// Bytes put into the pool.
    pub stored_bytes: AtomicU64,
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct NewImage {
    pub name: String,
    /// Where it comes from, for people.
    pub source: String,
    pub description: Option<String>,
}

/// The name of an image, held for an import by an object of its own.
pub struct Reserved {
    object: ImageObject,
    etag: ETag,
    name: String,
}

impl From<SourceError> for EngineError {
    fn from(error: SourceError) -> Self {
        let text = error.to_string();
        match error {
            SourceError::NoSpace { .. } => Self::NoSpace(text),
            SourceError::Spool { .. } => Self::Disk(text),
            SourceError::Read { .. }
            | SourceError::Truncated { .. }
            | SourceError::Malformed { .. }
            | SourceError::Unsupported(_)
            | SourceError::TooLarge { .. } => Self::Source(text),
        }
    }
}

/// Takes the name, before anything is read or uploaded: what is uploaded under this object's uid is never swept.
///
/// # Errors
/// `Conflict` if there is such an image, or someone imports it; `Unavailable`, `Unclear`.
pub async fn reserve(engine: &Engine, new: &NewImage) -> Result<Reserved, EngineError> {
    check_name(&new.name).map_err(EngineError::Conflict)?;
    let owner = Owner { node: engine.identity.node, incarnation: engine.identity.incarnation };
    let object = ImageObject {
        uid: engine.new_uid(),
        nonce: engine.nonce(),
        term: 0,
        floor: 0,
        map: None,
        size_bytes: SECTOR_BYTES,
        stored_bytes: 0,
        source: new.source.clone(),
        description: new.description.clone(),
        importing: Some(owner),
        created: engine.clock.wall(),
    };
    let expect = match read_image(engine, &new.name).await {
        Err(EngineError::NotFound(_)) => Expect::Absent,
        Ok((old, etag)) => match &old.importing {
            None => return Err(EngineError::Conflict(format!("image {} exists already", new.name))),
            // Left by a killed process of this node.
            Some(owner)
                if owner.incarnation != engine.identity.incarnation
                    && engine.identity.ours.contains(&owner.incarnation) =>
            {
                Expect::State(etag)
            }
            Some(_) => return Err(being_imported(&new.name)),
        },
        Err(error) => return Err(error),
    };
    let patience = Some(engine.config.pool_wait);
    match engine.swap_settled(&keys::image(&new.name), expect, object.encode(), patience).await {
        Ok(etag) => Ok(Reserved { object, etag, name: new.name.clone() }),
        Err(EngineError::Conflict(_)) => Err(being_imported(&new.name)),
        Err(error) => Err(error),
    }
}

fn being_imported(name: &str) -> EngineError {
    EngineError::Conflict(format!("image {name} is being imported"))
}

/// Gives the name back.
pub async fn release(engine: &Engine, reserved: &Reserved) {
    let key = keys::image(&reserved.name);
    if let Err(error) = delete_settled(engine, &key, reserved.etag.clone(), &reserved.object.uid).await {
        log::warn!("the name of image {}, whose import failed, stays taken: {error}", reserved.name);
    }
}

/// Reads all of `source` into the pool and makes the image. A failure gives the name back.
///
/// # Errors
/// `Source`: the source is at fault; `Unavailable`, `Conflict` if the name was taken away meanwhile, `Unclear`.
pub async fn import(
    engine: &Arc<Engine>,
    reserved: Reserved,
    source: RawSource,
    progress: &Progress,
) -> Result<ImageObject, EngineError> {
    let outcome = run(engine, &reserved, source, progress).await;
    match &outcome {
        Ok(_) | Err(EngineError::Unclear(_) | EngineError::Conflict(_)) => {}
        Err(_) => release(engine, &reserved).await,
    }
    outcome
}

async fn run(
    engine: &Arc<Engine>,
    reserved: &Reserved,
    source: RawSource,
    progress: &Progress,
) -> Result<ImageObject, EngineError> {
    let mut stamps = Stamps::new(reserved.object.uid, reserved.object.term, reserved.object.floor);
    let (map, size_bytes, stored_bytes) = upload(engine, &mut stamps, source, progress).await?;
    let mut image = reserved.object.clone();
    image.nonce = engine.nonce();
    image.map = map;
    image.size_bytes = size_bytes;
    image.stored_bytes = stored_bytes;
    image.importing = None;
    let patience = Some(engine.config.pool_wait);
    let expect = Expect::State(reserved.etag.clone());
    engine.swap_settled(&keys::image(&reserved.name), expect, image.encode(), patience).await?;
    Ok(image)
}

async fn upload(
    engine: &Arc<Engine>,
    stamps: &mut Stamps,
    source: RawSource,
    progress: &Progress,
) -> Result<(Option<MapRef>, u64, u64), EngineError> {
    // The size of a compressed source is known at its end only.
    let declared = source.size_bytes;
    let bound = VOLUME_BYTES_MAX;
    let mut draft = MapDraft::new(&BaseMap::empty(bound), bound).patience(engine.config.pool_wait);
    let cutter = Cutter::new(source);
    let end_bytes = cutter.position_bytes.clone();
    let level = engine.config.zstd_level;
    let offload = engine.offload;
    let mut encoded =
        stream::try_unfold(cutter, |mut cutter| async move {
            Ok::<_, EngineError>(cutter.next().await?.map(|block| (block, cutter)))
        })
        .map_ok(move |(block, content)| async move {
            Ok(offload.run(move || (block, encode(&content, level))).await)
        })
        .try_buffered(BLOCKS_AT_ONCE)
        .boxed();
    let mut builder = PackBuilder::new(stamps.take(engine));
    let mut stored_bytes = 0;
    while let Some((block, content)) = encoded.try_next().await? {
        progress.done_bytes.store(block.start_bytes() + BLOCK_BYTES, Ordering::Relaxed);
        if let Some(content) = content {
            builder.push(block, content);
        }
        if builder.is_full() {
            let next = PackBuilder::new(stamps.take(engine));
            let full = std::mem::replace(&mut builder, next);
            stored_bytes += put(engine, stamps, &mut draft, full).await?;
            progress.stored_bytes.store(stored_bytes, Ordering::Relaxed);
        }
    }
    drop(encoded);
    if !builder.is_empty() {
        stored_bytes += put(engine, stamps, &mut draft, builder).await?;
    }
    let read_bytes = end_bytes.load(Ordering::Relaxed);
    let size_bytes = read_bytes.div_ceil(SECTOR_BYTES) * SECTOR_BYTES;
    check_size(size_bytes).map_err(EngineError::Source)?;
    if declared.is_some_and(|declared| declared != size_bytes) {
        return Err(EngineError::Source(format!("the image has {size_bytes} bytes, not as many as it said")));
    }
    progress.done_bytes.store(read_bytes, Ordering::Relaxed);
    if stored_bytes == 0 {
        return Ok((None, size_bytes, 0));
    }
    let base = draft.publish(engine, stamps, size_bytes).await?;
    stored_bytes += base.reference.map_or(0, |map| map.object_bytes.min(MAP_BYTES_MAX));
    progress.stored_bytes.store(stored_bytes, Ordering::Relaxed);
    Ok((base.reference, size_bytes, stored_bytes))
}

/// Puts a pack. What one import waits with does not count against packs of commits, what it uploads does.
async fn put(
    engine: &Arc<Engine>,
    stamps: &mut Stamps,
    draft: &mut MapDraft,
    builder: PackBuilder,
) -> Result<u64, EngineError> {
    let _permit = engine.packs.acquire().await;
    // Whoever imports can do it again: it must not keep what a commit waits for.
    let mut packed = Packed { patience: Some(engine.config.pool_wait), ..Packed::default() };
    put_pack(engine, builder, &mut packed).await?;
    for pack in packed.packs {
        draft.push(engine, stamps, pack).await?;
    }
    Ok(packed.bytes)
}

/// A block, encoded; `None` if it is all zeros.
fn encode(content: &[u8], level: i32) -> Option<EncodedBlock> {
    if content.iter().all(|&byte| byte == 0) {
        return None;
    }
    Some(encode_block(content, ContentHash::of(content), level))
}

/// Cuts a source into whole blocks, leaving out those without any data.
struct Cutter {
    source: RawSource,
    /// Data that is not cut yet, and where it begins.
    waiting: Option<(u64, Bytes)>,
    /// The block being filled.
    open: Option<(BlockIndex, BytesMut)>,
    /// Where the next piece has to begin; at the end, the size.
    position_bytes: Arc<AtomicU64>,
}

impl Cutter {
    fn new(source: RawSource) -> Self {
        Self { source, waiting: None, open: None, position_bytes: Arc::default() }
    }

    /// The next block with data, of full length.
    async fn next(&mut self) -> Result<Option<(BlockIndex, Bytes)>, EngineError> {
        loop {
            if let Some((at, bytes)) = self.waiting.take() {
                if let Some(done) = self.fill(at, bytes) {
                    return Ok(Some(done));
                }
                continue;
            }
            let position = self.position_bytes.load(Ordering::Relaxed);
            let (range, bytes) = match self.source.next().await? {
                None => return Ok(self.open.take().map(|(block, content)| (block, content.freeze()))),
                Some(Piece::Zeros(range)) => (range, None),
                Some(Piece::Data(at, bytes)) => {
                    (ByteRange::checked(at, bytes.len() as u64).ok_or_else(out_of_order)?, Some(bytes))
                }
            };
            if range.start() < position {
                return Err(out_of_order());
            }
            self.position_bytes.store(range.end(), Ordering::Relaxed);
            self.waiting = bytes.filter(|bytes| !bytes.is_empty()).map(|bytes| (range.start(), bytes));
        }
    }

    /// Puts data into the open block; the block that is done by this, if one is.
    fn fill(&mut self, at: u64, mut bytes: Bytes) -> Option<(BlockIndex, Bytes)> {
        let block = BlockIndex::of(at);
        let from = len_of(at - block.start_bytes());
        if let Some((open, _)) = &self.open
            && *open != block
        {
            self.waiting = Some((at, bytes));
            return self.open.take().map(|(block, content)| (block, content.freeze()));
        }
        if from == 0 && bytes.len() >= BLOCK_LEN && self.open.is_none() {
            let content = bytes.split_to(BLOCK_LEN);
            self.waiting = (!bytes.is_empty()).then(|| (at + BLOCK_BYTES, bytes));
            return Some((block, content));
        }
        let part = bytes.split_to(bytes.len().min(BLOCK_LEN - from));
        let (_, content) = self.open.get_or_insert_with(|| (block, BytesMut::zeroed(BLOCK_LEN)));
        content[from..from + part.len()].copy_from_slice(&part);
        self.waiting = (!bytes.is_empty()).then(|| (at + part.len() as u64, bytes));
        None
    }
}

fn out_of_order() -> EngineError {
    EngineError::Source("the image has its parts out of order".into())
}

/// All bytes of a state in the pool, in order.
///
/// # Errors
/// As [`BaseMap::open`]; later ones come in the stream.
pub async fn export(
    engine: &Arc<Engine>,
    map: Option<MapRef>,
    size_bytes: u64,
) -> Result<BoxStream<'static, io::Result<Bytes>>, EngineError> {
    let base = BaseMap::open(engine, map, size_bytes).await?;
    let disk = Arc::new(ReadOnlyDisk::new(engine.clone(), base, size_bytes));
    let steps = (0..size_bytes.div_ceil(EXPORT_STEP_BYTES)).map(move |step| {
        let disk = disk.clone();
        async move {
            let start = step * EXPORT_STEP_BYTES;
            let range = ByteRange::new(start, EXPORT_STEP_BYTES.min(size_bytes - start));
            let mut out = BytesMut::with_capacity(len_of(range.len()));
            read_at(&*disk, range, &mut out).await.map_err(|error| {
                // The reader of a stream only sees it end.
                log::error!("an export broke off: {error}");
                io::Error::other(error)
            })?;
            Ok(out.freeze())
        }
    });
    Ok(stream::iter(steps).buffered(EXPORT_AHEAD).boxed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::source::{SourceLimits, open_source};
    use proptest::prelude::*;

    async fn cut(content: Vec<u8>, part_len: usize) -> (Vec<(u64, Bytes)>, u64) {
        let total_bytes = Some(content.len() as u64);
        let parts: Vec<_> = content.chunks(part_len).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        let bytes = stream::iter(parts).boxed();
        let source =
            open_source(bytes, total_bytes, std::env::temp_dir(), SourceLimits::default()).await.unwrap();
        let mut cutter = Cutter::new(source);
        let mut blocks = Vec::new();
        while let Some((block, content)) = cutter.next().await.unwrap() {
            blocks.push((block.0, content));
        }
        (blocks, cutter.position_bytes.load(Ordering::Relaxed))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn blocks_hold_what_the_source_has_each_once_and_in_order(
            runs in proptest::collection::vec((any::<u8>(), 1usize..300_000), 1..6),
            part_len in 1_000usize..400_000,
        ) {
            let content: Vec<u8> = runs.iter().flat_map(|&(fill, len)| vec![fill / 2 * (fill % 2); len]).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (blocks, end) = runtime.block_on(cut(content.clone(), part_len));
            prop_assert!(blocks.is_sorted_by(|a, b| a.0 < b.0));
            prop_assert_eq!(end.div_ceil(512), content.len().div_ceil(512) as u64);
            let mut rebuilt = vec![0; content.len().div_ceil(BLOCK_LEN) * BLOCK_LEN];
            for (block, bytes) in blocks {
                prop_assert_eq!(bytes.len(), BLOCK_LEN);
                let at = usize::try_from(block).unwrap() * BLOCK_LEN;
                rebuilt[at..at + BLOCK_LEN].copy_from_slice(&bytes);
            }
            rebuilt.truncate(content.len());
            prop_assert!(rebuilt == content);
        }
    }
}
