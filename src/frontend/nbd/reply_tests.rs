//! Tests of replies: what is put into the socket is what the protocol says.

use super::super::wire::Errno;
use super::*;
use crate::frontend::nbd::status::Stretch;
use proptest::prelude::*;

const COOKIE: Cookie = Cookie { number: 5, offset_bytes: 0x1234 };

fn take(outbox: &mut Outbox) -> Vec<u8> {
    let len = outbox.remaining();
    let bytes = outbox.copy_to_bytes(len).to_vec();
    assert_eq!(outbox.queued_bytes(), outbox.taken_bytes());
    bytes
}

/// Flags, type and payload of the chunks in `bytes`.
fn chunks(mut bytes: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes.get_u32(), super::super::wire::STRUCTURED_REPLY_MAGIC);
        let (flags, kind) = (bytes.get_u16(), bytes.get_u16());
        assert_eq!(bytes.get_u64(), COOKIE.number);
        let len = bytes.get_u32() as usize;
        found.push((flags, kind, bytes.copy_to_bytes(len).to_vec()));
    }
    found
}

/// The same of chunks with extended headers.
fn extended_chunks(mut bytes: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes.get_u32(), super::super::wire::EXTENDED_REPLY_MAGIC);
        let (flags, kind) = (bytes.get_u16(), bytes.get_u16());
        assert_eq!((bytes.get_u64(), bytes.get_u64()), (COOKIE.number, COOKIE.offset_bytes));
        let len = len_of(bytes.get_u64());
        found.push((flags, kind, bytes.copy_to_bytes(len).to_vec()));
    }
    found
}

#[test]
fn errors_are_numbers_to_simple_clients_and_texts_to_the_others() {
    let refusal = Refusal { errno: Errno::Perm, message: "no".into() };
    let mut outbox = Outbox::default();
    outbox.put_error(COOKIE, Replies::Simple, &refusal);
    assert_eq!(take(&mut outbox), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5]);
    outbox.put_error(COOKIE, Replies::Structured, &refusal);
    assert_eq!(chunks(&take(&mut outbox)), [(1, REPLY_ERROR, b"\0\0\0\x01\0\x02no".to_vec())]);
    outbox.put_error_at(COOKIE, &refusal, 512);
    let payload = b"\0\0\0\x01\0\x02no\0\0\0\0\0\0\x02\0".to_vec();
    assert_eq!(chunks(&take(&mut outbox)), [(1, REPLY_ERROR_OFFSET, payload)]);
    outbox.put_none(COOKIE);
    assert_eq!(chunks(&take(&mut outbox)), [(1, REPLY_NONE, vec![])]);
}

#[test]
fn short_stretches_of_zeros_go_as_data_and_long_ones_as_holes() {
    let zeros = |len_bytes| Part::Zeros { len_bytes };
    let data = |len| Part::Data(Bytes::from(vec![1; len]));
    let mut outbox = Outbox::default();
    let parts = vec![zeros(512), data(100), zeros(4096), zeros(8192), data(20_000)];
    outbox.put_parts(COOKIE, 1000, parts, Chunk::Last);
    let found = chunks(&take(&mut outbox));
    let shape: Vec<_> = found.iter().map(|(flags, kind, payload)| (*flags, *kind, payload.len())).collect();
    let expected = [(0, REPLY_OFFSET_DATA, 620), (0, REPLY_OFFSET_HOLE, 12), (1, REPLY_OFFSET_DATA, 20_008)];
    assert_eq!(shape, expected);
    assert_eq!(found[1].2, [0, 0, 0, 0, 0, 0, 6, 0x4c, 0, 0, 0x30, 0]);
}

#[test]
fn a_read_that_must_not_be_fragmented_has_one_chunk() {
    let range = ByteRange::new(0, 9000);
    let mut outbox = Outbox::default();
    let data = Part::Data(Bytes::from(vec![1; 1000]));
    outbox.put_one(COOKIE, range, vec![data, Part::Zeros { len_bytes: 8000 }]);
    let found = chunks(&take(&mut outbox));
    assert_eq!((found.len(), found[0].0, found[0].1, found[0].2.len()), (1, 1, REPLY_OFFSET_DATA, 9008));
    outbox.put_one(COOKIE, range, vec![Part::Zeros { len_bytes: 9000 }]);
    assert_eq!(chunks(&take(&mut outbox))[0].1, REPLY_OFFSET_HOLE);
}

#[test]
fn extents_lie_end_to_end() {
    let stretch = |len_bytes, state| Stretch { len_bytes, state };
    let mut outbox = Outbox::default();
    let first = Status { context_id: 1, stretches: vec![stretch(512, 0), stretch(1024, 3)] };
    let second = Status { context_id: 7, stretches: vec![stretch(1 << 31, 1)] };
    outbox.put_block_status(COOKIE, &[first.clone(), second.clone()]);
    let payload = [0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 3].to_vec();
    let other = [0, 0, 0, 7, 0x80, 0, 0, 0, 0, 0, 0, 1].to_vec();
    let expected = [(0, REPLY_BLOCK_STATUS, payload), (1, REPLY_BLOCK_STATUS, other)];
    assert_eq!(chunks(&take(&mut outbox)), expected);

    let mut outbox = Outbox::new(Headers::Extended);
    outbox.put_block_status(COOKIE, &[Status { stretches: vec![stretch(1 << 40, 3)], ..first }, second]);
    let found = extended_chunks(&take(&mut outbox));
    let payload = [[0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 3]].concat();
    assert_eq!(found[0], (0, REPLY_BLOCK_STATUS_EXT, payload));
    assert_eq!((found.len(), found[1].0, found[1].2.len()), (2, 1, 24));
}

#[test]
fn extended_replies_have_one_kind_of_header_with_the_offset_of_the_request() {
    let refusal = Refusal { errno: Errno::Perm, message: "no".into() };
    let mut outbox = Outbox::new(Headers::Extended);
    outbox.put_done(COOKIE);
    outbox.put_error(COOKIE, Replies::Structured, &refusal);
    outbox.put_parts(COOKIE, 0x2000, vec![Part::Data(Bytes::from_static(b"x"))], Chunk::Last);
    let found = extended_chunks(&take(&mut outbox));
    assert_eq!(found[0], (1, REPLY_NONE, vec![]));
    assert_eq!(found[1], (1, REPLY_ERROR, b"\0\0\0\x01\0\x02no".to_vec()));
    assert_eq!(found[2], (1, REPLY_OFFSET_DATA, b"\0\0\0\0\0\0\x20\0x".to_vec()));
    let mut outbox = Outbox::new(Headers::Compact);
    outbox.put_done(COOKIE);
    assert_eq!(take(&mut outbox).len(), 16);
}

#[test]
fn an_emptied_outbox_holds_nothing() {
    let mut outbox = Outbox::default();
    outbox.put_zeros(1 << 20);
    outbox.put_simple(COOKIE, 0);
    let len = outbox.remaining();
    outbox.advance(len);
    assert_eq!((outbox.sealed.len(), outbox.tail.capacity()), (0, 0));
}

proptest! {
    #[test]
    fn bytes_leave_as_they_came_however_they_are_taken(
        parts in proptest::collection::vec((any::<u8>(), 0usize..40_000, any::<bool>()), 0..8),
        step in 1usize..70_000,
    ) {
        let mut outbox = Outbox::default();
        let mut expected = Vec::new();
        for (byte, len, zeros) in parts {
            expected.extend(vec![if zeros { 0 } else { byte }; len]);
            let data = Part::Data(Bytes::from(vec![byte; len]));
            outbox.put_raw(vec![if zeros { Part::Zeros { len_bytes: len as u64 } } else { data }]);
        }
        let mut taken: Vec<u8> = Vec::new();
        while outbox.has_remaining() {
            let mut slices = [IoSlice::new(&[]); 64];
            let count = outbox.chunks_vectored(&mut slices);
            let all = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect::<Vec<_>>();
            let len = step.min(all.len());
            taken.extend_from_slice(&all[..len]);
            outbox.advance(len);
        }
        prop_assert_eq!(taken, expected);
    }
}
