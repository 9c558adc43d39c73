//! The state of a volume that is in the pool: one map, and what is known of it in memory.
//!
//! Owns: looking a block up (newest unfolded pack first, then the segment), and bringing one here, checked.
//! Does not own: epochs above it, or which map is the volume's.

use crate::geometry::{BLOCK_LEN, BlockIndex};
use crate::store::GetRange;
use crate::volume::engine::{Engine, EngineError};
use crate::volume::head::keys;
use crate::volume::map::{Map, MapRef, lookup_unfolded};
use crate::volume::pack::{BlockLocation, Lookup, PackIndex, decode_block};
use crate::volume::segment::{SegmentRef, segment_blocks, segment_of};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::sync::Arc;

/// A map and the footers of its unfolded packs.
pub struct BaseMap {
    /// Absent: all zero, and nothing in the pool.
    pub reference: Option<MapRef>,
    pub map: Arc<Map>,
    /// Of each unfolded pack, oldest first.
    pub unfolded: Vec<Arc<PackIndex>>,
}

/// Where a block is, as far as memory tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// All zero.
    Zero,
    /// In the pool.
    At(BlockLocation),
    /// This segment has to be read first.
    InSegment(SegmentRef),
}

impl BaseMap {
    /// All zero.
    pub fn empty(size_bytes: u64) -> Arc<Self> {
        Arc::new(Self { reference: None, map: Arc::new(Map::empty(size_bytes)), unfolded: Vec::new() })
    }

    /// Reads the map, and the footers that it names.
    ///
    /// # Errors
    /// As [`Engine::load_map`].
    pub async fn open(
        engine: &Engine,
        reference: Option<MapRef>,
        size_bytes: u64,
    ) -> Result<Arc<Self>, EngineError> {
        let Some(reference) = reference else { return Ok(Self::empty(size_bytes)) };
        let map = engine.load_map(&reference).await?;
        let mut unfolded = Vec::with_capacity(map.packs().len());
        for pack in map.packs() {
            unfolded.push(engine.load_pack_index(pack).await?);
        }
        Ok(Arc::new(Self { reference: Some(reference), map, unfolded }))
    }

    /// Looks a block up without waiting.
    pub fn find(&self, engine: &Engine, block: BlockIndex) -> Found {
        match lookup_unfolded(&self.unfolded, block) {
            Lookup::Zero => Found::Zero,
            Lookup::At(location) => Found::At(location),
            Lookup::Absent => match self.map.segment(block) {
                None => Found::Zero,
                Some(reference) => match engine.cached_segment(reference) {
                    None => Found::InSegment(*reference),
                    Some(segment) => match segment.lookup(block) {
                        Lookup::At(location) => Found::At(location),
                        Lookup::Zero | Lookup::Absent => Found::Zero,
                    },
                },
            },
        }
    }

    /// Whether `blocks` are zero for certain, without reading anything.
    pub fn is_zero(&self, blocks: std::ops::Range<u64>) -> bool {
        if blocks.is_empty() {
            return true;
        }
        let mut segments = segment_of(BlockIndex(blocks.start))..=segment_of(BlockIndex(blocks.end - 1));
        !segments.any(|index| self.map.segment(BlockIndex(segment_blocks(index).start)).is_some())
            && self.unfolded.iter().all(|index| index.entries_in(blocks.clone()).next().is_none())
    }

    /// Looks a block up, reading its segment if need be. `None`: all zero.
    ///
    /// # Errors
    /// As [`Engine::load_segment`].
    pub async fn locate(
        &self,
        engine: &Engine,
        block: BlockIndex,
    ) -> Result<Option<BlockLocation>, EngineError> {
        match self.find(engine, block) {
            Found::Zero => Ok(None),
            Found::At(location) => Ok(Some(location)),
            Found::InSegment(reference) => {
                match engine.load_segment(segment_of(block), &reference).await?.lookup(block) {
                    Lookup::At(location) => Ok(Some(location)),
                    Lookup::Zero | Lookup::Absent => Ok(None),
                }
            }
        }
    }

    /// The content of a block, from the cache or the pool, checked against the hash that the map has. `None`: zeros.
    ///
    /// # Errors
    /// `Unavailable`, `Corrupt`.
    pub async fn load(&self, engine: &Arc<Engine>, block: BlockIndex) -> Result<Option<Bytes>, EngineError> {
        let Some(location) = self.locate(engine, block).await? else { return Ok(None) };
        load_block(engine, location).await.map(Some)
    }
}

/// The content of a block that lies at `location`: one fetch, however many ask.
///
/// # Errors
/// `Unavailable`, `Corrupt`.
pub async fn load_block(engine: &Arc<Engine>, location: BlockLocation) -> Result<Bytes, EngineError> {
    let hash = location.stored.hash;
    if let Some(pinned) = engine.cache.get(&hash) {
        match pinned.file().read_at(pinned.offset_bytes(), BLOCK_LEN).await {
            Ok(block) => return Ok(block),
            Err(_) => pinned.discard(),
        }
    }
    let (fetching, keeping) = (engine.clone(), engine.cache.clone());
    let fetch = move || -> BoxFuture<'static, _> { Box::pin(fetch_block(fetching, location)) };
    // The reader does not wait for the cache, and until the cache has the block nobody fetches it again.
    let keep = move |block| -> BoxFuture<'static, ()> {
        Box::pin(async move { drop(keeping.insert(hash, block).await) })
    };
    engine.flights.join_and_keep(hash, fetch, keep).await
}

async fn fetch_block(engine: Arc<Engine>, location: BlockLocation) -> Result<Bytes, EngineError> {
    let hash = location.stored.hash;
    if let Some((_, block)) = engine.cache.revive(&hash).await {
        return Ok(block);
    }
    let permit = engine.fetches.acquire().await;
    let key = keys::pack(&location.pack);
    let range = GetRange::Span {
        start: u64::from(location.stored.offset),
        len: u64::from(location.stored.stored_bytes),
    };
    let bytes = engine.fetch(&key, range).await?;
    let block = engine
        .offload
        .run(move || decode_block(&bytes, &location.stored))
        .await
        .map_err(|error| EngineError::Corrupt(format!("{key}: {error}")))?;
    drop(permit);
    Ok(block)
}
