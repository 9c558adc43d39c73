//! The decoders.

use crate::{Target, golden};
use blockhouse::clock::UnixMillis;
use blockhouse::geometry::BLOCK_LEN;
use blockhouse::volume::epoch::EpochHeader;
use blockhouse::volume::head::{CommitRecord, Head, Owner, SmallObject, TermEnd, TermRecord, fate};
use blockhouse::volume::ids::{
    ContentHash, FileId, Incarnation, NodeId, Nonce, ObjectHash, ObjectId, PoolId, Uid,
};
use blockhouse::volume::map::{Map, MapRef};
use blockhouse::volume::pack::{
    ALL_PAGES, Encoding, PackIndex, PackRef, StoredBlock, decode_block, encode_block,
};
use blockhouse::volume::segment::{Segment, SegmentRef};
use blockhouse::volume::source::{SourceLimits, open_source};
use bytes::Bytes;
use futures::StreamExt;
use std::io::Read;

const CHECKSUM_BYTES: usize = 16;

pub fn all() -> Vec<Target> {
    vec![
        Target {
            name: "pack footer",
            seeds: vec![golden::footer().1],
            heap_bytes_max: |len| 4 * len + 4096,
            fix: |input| {
                let footer_bytes = u32::try_from(input.len()).unwrap();
                if let Some(at) = input.len().checked_sub(CHECKSUM_BYTES + 8) {
                    input[at..at + 4].copy_from_slice(&footer_bytes.to_le_bytes());
                }
                seal(input);
            },
            decode: pack_footer,
        },
        Target {
            name: "segment",
            seeds: golden::segments().into_iter().map(|(_, _, bytes)| bytes).collect(),
            heap_bytes_max: |len| 4 * len + 4096,
            fix: |input| seal(input),
            decode: segment,
        },
        Target {
            name: "map",
            seeds: vec![golden::MAP.to_vec()],
            heap_bytes_max: |len| 8 * len + 4096,
            fix: |input| seal(input),
            decode: map,
        },
        Target {
            name: "map reference",
            seeds: vec![golden::MAP_REF.as_bytes().to_vec()],
            heap_bytes_max: |len| 4 * len + 4096,
            fix: |_| (),
            decode: map_reference,
        },
        Target {
            name: "block",
            seeds: blocks(),
            heap_bytes_max: |_| 4 * BLOCK_LEN,
            fix: |_| (),
            decode: block,
        },
        Target {
            name: "head",
            seeds: heads(),
            // What serde buffers while it looks at a field, several times over.
            heap_bytes_max: |len| 16 * len + 65536,
            fix: |_| (),
            decode: head,
        },
        Target {
            name: "epoch header",
            seeds: vec![epoch_header_seed().encode().to_vec()],
            heap_bytes_max: |len| 4 * len + 8192,
            fix: |input| {
                if let Some((checked, hash)) = input.split_at_mut_checked(4096 - 32)
                    && hash.len() == 32
                {
                    hash.copy_from_slice(blake3::hash(checked).as_bytes());
                }
            },
            decode: epoch_header,
        },
        Target {
            name: "qcow2",
            seeds: vec![
                include_bytes!("../golden/disk.qcow2").to_vec(),
                include_bytes!("../golden/disk-compressed.qcow2").to_vec(),
            ],
            // It is decoded on another thread; what it may allocate follows from the header's checks.
            heap_bytes_max: |len| 4 * len + (8 << 20),
            fix: |_| (),
            decode: qcow2,
        },
    ]
}

fn seal(input: &mut [u8]) {
    if let Some(end) = input.len().checked_sub(CHECKSUM_BYTES) {
        let sum = ObjectHash::of(&input[..end]);
        input[end..].copy_from_slice(&sum.0[..CHECKSUM_BYTES]);
    }
}

/// A number in an input that may end before it.
fn u32_at(input: &[u8], at: usize) -> u32 {
    let bytes = at.checked_add(4).and_then(|end| input.get(at..end)).unwrap_or(&[0; 4]);
    u32::from_le_bytes(bytes.try_into().unwrap())
}

fn len_at(input: &[u8], at: usize) -> usize {
    usize::try_from(u32_at(input, at)).unwrap()
}

fn pack_footer(input: &[u8]) -> bool {
    let blocks = len_at(input, 16);
    let runs = len_at(input, 20).min(input.len());
    let data_bytes = u64::from(u32_at(input, 24)) | u64::from(u32_at(input, 28)) << 32;
    let footer_bytes = u32::try_from(input.len()).unwrap();
    let mut id = [0; ObjectId::BYTES];
    id.copy_from_slice(input.get(32..72).unwrap_or(&[0; 40]));
    let runs_at = 72usize.saturating_add(blocks.saturating_mul(32));
    let reference = PackRef {
        id: ObjectId::from_bytes(&id),
        object_bytes: data_bytes.wrapping_add(u64::from(footer_bytes)),
        footer_bytes,
        footer_hash: ObjectHash::of(input),
        block_count: u32_at(input, 16),
        zero_blocks: (0..runs).map(|run| u64::from(u32_at(input, runs_at.saturating_add(run * 8 + 4)))).sum(),
    };
    let Ok(index) = PackIndex::decode(input, &reference) else { return false };
    assert_eq!(index.encode(), input);
    for (block, stored) in index.entries() {
        assert!(u64::from(stored.offset) + u64::from(stored.stored_bytes) <= reference.data_bytes());
        assert!(index.overlaps(block.0..block.0 + 1));
    }
    true
}

fn segment(input: &[u8]) -> bool {
    let entries_at = 32usize.saturating_add(len_at(input, 20).saturating_mul(44));
    let place =
        |entry: usize| u64::from(u32_at(input, entries_at.saturating_add(entry * 32 + 24)) & 0x00ff_ffff);
    let reference = SegmentRef {
        object: ObjectId::from_bytes(&[0; ObjectId::BYTES]),
        offset_bytes: 0,
        stored_bytes: u32::try_from(input.len()).unwrap(),
        data_bytes: (0..len_at(input, 24).min(8192)).map(place).sum(),
        hash: ObjectHash::of(input),
    };
    let index = u32_at(input, 16);
    let Ok(segment) = Segment::decode(input, index, &reference) else { return false };
    assert_eq!(segment.encode(), input);
    assert_eq!(segment.packs().iter().map(|pack| pack.live_bytes).sum::<u64>(), segment.data_bytes());
    assert_eq!(segment.entries().len(), len_at(input, 24));
    true
}

fn map(input: &[u8]) -> bool {
    let id = ObjectId::from_bytes(&[0; ObjectId::BYTES]);
    let object_bytes = u64::try_from(input.len()).unwrap();
    let reference = MapRef { id, object_bytes, hash: ObjectHash::of(input) };
    let Ok(map) = Map::decode(input, &reference) else { return false };
    assert_eq!(map.encode(), input);
    true
}

fn map_reference(input: &[u8]) -> bool {
    let Ok(reference) = serde_json::from_slice::<MapRef>(input) else { return false };
    let again = serde_json::to_vec(&reference).unwrap();
    assert_eq!(serde_json::from_slice::<MapRef>(&again).unwrap(), reference);
    true
}

fn heads() -> Vec<Vec<u8>> {
    let plain = Head {
        uid: Uid([3; 16]),
        nonce: Nonce([4; 16]),
        term: 2,
        floor: 1 << 40,
        map: serde_json::from_str(golden::MAP_REF).unwrap(),
        size_bytes: 1 << 30,
        owner: Some(Owner { node: NodeId([5; 16]), incarnation: Incarnation([6; 16]) }),
        from: Some("image:debian".into()),
        description: None,
        next_snapshot: 3,
        history: vec![TermRecord {
            term: 2,
            node: NodeId([5; 16]),
            last_commit: Some(CommitRecord {
                epoch: 9,
                incarnation: Incarnation([6; 16]),
                at: UnixMillis(1_800_000_000_000),
            }),
            ended: Some(TermEnd::Released),
        }],
        created: UnixMillis(1_800_000_000_000),
        last_commit: None,
    };
    let mut empty = plain.clone();
    (empty.map, empty.owner, empty.history) = (None, None, vec![]);
    vec![plain.encode().to_vec(), empty.encode().to_vec()]
}

fn head(input: &[u8]) -> bool {
    let Ok(head) = Head::decode(input) else { return false };
    assert_eq!(Head::decode(&head.encode()).unwrap(), head);
    // What it decides on never panics, whatever the counts.
    for number in [0, 1, u64::MAX] {
        let _fate = fate(&head, head.term, number, &[Incarnation([6; 16])]);
    }
    true
}

fn epoch_header_seed() -> EpochHeader {
    EpochHeader {
        pool: PoolId([1; 16]),
        uid: Uid([3; 16]),
        file_id: FileId([7; 16]),
        incarnation: Incarnation([6; 16]),
        term: 2,
        number: 9,
        size_bytes: 1 << 30,
    }
}

fn epoch_header(input: &[u8]) -> bool {
    let Ok(header) = EpochHeader::decode(input) else { return false };
    assert_eq!(EpochHeader::decode(&header.encode()).unwrap(), header);
    true
}

fn blocks() -> Vec<Vec<u8>> {
    let text: Vec<u8> = (0..BLOCK_LEN).map(|at| u8::try_from(at / 700 % 200).unwrap()).collect();
    let sizes = [1, 3, 19].map(|level| encode_block(&text, ContentHash::of(&text), level).bytes.to_vec());
    let undeclared = zstd::stream::encode_all(text.as_slice(), 3).unwrap();
    sizes.into_iter().chain([undeclared]).collect()
}

fn block(input: &[u8]) -> bool {
    // What another decoder makes of it, cut where it is too much.
    let mut content = Vec::with_capacity(BLOCK_LEN + 1);
    let limit = u64::try_from(BLOCK_LEN + 1).unwrap();
    let whole = zstd::stream::read::Decoder::new(input)
        .and_then(|decoder| decoder.take(limit).read_to_end(&mut content))
        .is_ok_and(|len| len == BLOCK_LEN);
    let place = StoredBlock {
        offset: 0,
        stored_bytes: u32::try_from(input.len()).unwrap(),
        encoding: Encoding::Zstd,
        pages: ALL_PAGES,
        hash: ContentHash::of(&content),
    };
    assert!(decode_block(input, &StoredBlock { encoding: Encoding::Raw, ..place }).is_err());
    match decode_block(input, &place) {
        Ok(decoded) => {
            assert!(whole && decoded == content);
            true
        }
        Err(_) => false,
    }
}

fn qcow2(input: &[u8]) -> bool {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    }
    let stream = futures::stream::iter([Ok(Bytes::copy_from_slice(input))]).boxed();
    let limits = SourceLimits { raw_bytes_max: 16 << 20, spool_bytes_max: 16 << 20 };
    let read = async {
        let mut source = open_source(stream, None, std::env::temp_dir(), limits).await?;
        while source.next().await?.is_some() {}
        Ok::<_, blockhouse::volume::source::SourceError>(())
    };
    RUNTIME.with(|runtime| runtime.block_on(read)).is_ok()
}
