//! The golden files: objects as version 1 of their formats writes them, and what is in them.
//!
//! The reference to the map holds its hash, and the map those of the others, as in a pool.

use blockhouse::geometry::{BLOCK_BYTES, BLOCK_LEN, BlockIndex};
use blockhouse::volume::ids::{ContentHash, ObjectId};
use blockhouse::volume::map::{Map, MapRef, fold};
use blockhouse::volume::pack::{
    Encoding, Lookup, PackBuilder, PackIndex, PackRef, decode_block, encode_block,
};
use blockhouse::volume::segment::{SEGMENT_BLOCKS, Segment, SegmentRef};
use std::collections::HashMap;
use std::sync::Arc;

pub const MAP_REF: &str = include_str!("../golden/map-ref-v1.json");
pub const MAP: &[u8] = include_bytes!("../golden/map-v1.bin");
pub const SEGMENTS: &[u8] = include_bytes!("../golden/segments-v1.bin");
pub const FOLDED_PACK: &[u8] = include_bytes!("../golden/pack-folded-v1.bin");
pub const PACK: &[u8] = include_bytes!("../golden/pack-v1.bin");

const SIZE_BYTES: u64 = 3 * SEGMENT_BLOCKS * BLOCK_BYTES + 4096;

pub fn map() -> (Map, MapRef) {
    let reference: MapRef = serde_json::from_str(MAP_REF).unwrap();
    (Map::decode(MAP, &reference).unwrap(), reference)
}

/// The segments of the map, as they are encoded.
pub fn segments() -> Vec<(u32, SegmentRef, Vec<u8>)> {
    let (map, _) = map();
    let slice = |(index, reference): (u32, &SegmentRef)| {
        let start = usize::try_from(reference.offset_bytes).unwrap();
        let end = start + usize::try_from(reference.stored_bytes).unwrap();
        (index, *reference, SEGMENTS[start..end].to_vec())
    };
    map.segments().map(slice).collect()
}

pub fn footer() -> (PackRef, Vec<u8>) {
    let reference = map().0.packs()[0];
    (reference, PACK[usize::try_from(reference.data_bytes()).unwrap()..].to_vec())
}

/// Compressible, and different for each stamp.
fn text(stamp: u8) -> Vec<u8> {
    (0..BLOCK_LEN).map(|at| stamp.wrapping_mul(31) ^ u8::try_from(at / 1024).unwrap()).collect()
}

/// Not compressible.
fn noise() -> Vec<u8> {
    let mut out = vec![0; BLOCK_LEN];
    blake3::Hasher::new().finalize_xof().fill(&mut out);
    out
}

fn content(block: u64) -> Option<Vec<u8>> {
    match block {
        1 => Some(text(1)),
        // Written anew after the fold.
        2 => Some(text(9)),
        SEGMENT_BLOCKS => Some(noise()),
        // Discarded after the fold.
        3 => None,
        block if block == 3 * SEGMENT_BLOCKS => Some(text(4)),
        _ => None,
    }
}

fn id(sequence: u64) -> ObjectId {
    ObjectId { sequence, ..ObjectId::from_bytes(&std::array::from_fn(|at| u8::try_from(at).unwrap())) }
}

/// The bytes of a block in its pack.
fn stored(object: &[u8], offset: u32, len: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap();
    &object[start..start + usize::try_from(len).unwrap()]
}

#[test]
fn version_1_of_every_object_is_read() {
    let (map, map_ref) = map();
    assert_eq!(map.size_bytes, SIZE_BYTES);
    assert_eq!(map.encode(), MAP);
    assert_eq!(serde_json::to_string(&map_ref).unwrap(), MAP_REF.trim());
    let (pack_ref, footer) = footer();
    let index = PackIndex::decode(&footer, &pack_ref).unwrap();
    assert_eq!(index.encode(), footer);
    let segments: HashMap<u32, Segment> = segments()
        .into_iter()
        .map(|(at, reference, bytes)| {
            let segment = Segment::decode(&bytes, at, &reference).unwrap();
            assert_eq!(segment.encode(), bytes);
            (at, segment)
        })
        .collect();
    assert_eq!(segments.len(), 3);
    let mut encodings = Vec::new();
    for block in (0..16).chain([SEGMENT_BLOCKS, SEGMENT_BLOCKS + 1, 2 * SEGMENT_BLOCKS, 3 * SEGMENT_BLOCKS]) {
        let segment = segments.get(&u32::try_from(block / SEGMENT_BLOCKS).unwrap());
        let found = match index.lookup(BlockIndex(block)) {
            Lookup::Absent => segment.map_or(Lookup::Zero, |segment| segment.lookup(BlockIndex(block))),
            found => found,
        };
        let found = match found {
            Lookup::At(location) => {
                let object = if location.pack == pack_ref.id { PACK } else { FOLDED_PACK };
                let place = location.stored;
                encodings.push(place.encoding);
                let bytes = stored(object, place.offset, place.stored_bytes);
                Some(decode_block(bytes, &place).unwrap().to_vec())
            }
            Lookup::Zero | Lookup::Absent => None,
        };
        assert!(found == content(block), "block {block}");
    }
    assert!(encodings.contains(&Encoding::Raw) && encodings.contains(&Encoding::Zstd));
}

/// Writes the files of the version that the code writes now: run once for each new version, under new names.
#[test]
#[ignore = "makes the golden files anew"]
fn write_golden_files() {
    let mut pack = PackBuilder::new(id(1));
    for (block, content) in
        [(3 * SEGMENT_BLOCKS, text(4)), (1, text(1)), (2, text(2)), (3, text(3)), (SEGMENT_BLOCKS, noise())]
    {
        pack.push(BlockIndex(block), encode_block(&content, ContentHash::of(&content), 3));
    }
    let (folded_pack, reference, index) = pack.finish();
    let mut map = Map::empty(SIZE_BYTES);
    map.push_pack(reference);
    let (segments, mut map) = fold(&map, &[Arc::new(index)], &HashMap::new(), id(2)).unwrap();
    let mut pack = PackBuilder::new(id(3));
    pack.push(BlockIndex(2), encode_block(&text(9), ContentHash::of(&text(9)), 3));
    pack.push_zero_run(BlockIndex(3), 5);
    pack.push_zero_run(BlockIndex(100), SEGMENT_BLOCKS - 100);
    let (pack, reference, _) = pack.finish();
    map.push_pack(reference);
    let (map, reference) = map.with_id(id(4));
    let json = serde_json::to_string(&reference).unwrap() + "\n";
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    for (name, bytes) in [
        ("map-ref-v1.json", json.as_bytes()),
        ("map-v1.bin", &map),
        ("segments-v1.bin", &segments),
        ("pack-folded-v1.bin", &folded_pack),
        ("pack-v1.bin", &pack),
    ] {
        std::fs::write(format!("{dir}/{name}"), bytes).unwrap();
    }
}
