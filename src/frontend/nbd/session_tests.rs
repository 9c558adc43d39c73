//! Tests of the session: what each request is refused or let through for.

use super::*;
use crate::frontend::nbd::wire::Errno::{Inval, NoSpc, NotSup, Overflow, Perm};
use crate::geometry::Access;
use bytes::BytesMut;
use proptest::prelude::*;

const SIZE: u64 = 1 << 30;

fn disk(access: Access) -> Geometry {
    Geometry { size_bytes: SIZE, logical_block_bytes: 512, physical_block_bytes: 4096, access }
}

fn session(replies: Replies) -> Session {
    Session::new(Negotiated { replies, block_status: BlockStatus::BaseAllocation })
}

fn request(command: u16, flags: u16, offset_bytes: u64, len_bytes: u32) -> Vec<u8> {
    RequestHeader { flags, command, cookie: Cookie(9), offset_bytes, len_bytes }.encode().to_vec()
}

/// What the first request comes to: its error, or none.
fn verdict(
    replies: Replies,
    access: Access,
    (command, flags, offset_bytes, len_bytes): (u16, u16, u64, u32),
) -> Option<Errno> {
    let mut session = session(replies);
    let mut bytes = BytesMut::from(&request(command, flags, offset_bytes, len_bytes)[..]);
    loop {
        match session.next(&mut bytes, &disk(access)).unwrap() {
            Event::Refused { cookie, refusal } => {
                assert_eq!(cookie, Cookie(9));
                return Some(refusal.errno);
            }
            // A refused payload: its bytes are skipped without being kept.
            Event::NeedInput => {
                assert!(session.payload_space().is_none());
                bytes.resize(1 << 16, 0);
            }
            Event::Request { .. } | Event::WriteBegins { .. } | Event::Disconnect => return None,
            Event::WritePiece { .. } => panic!("not asked for"),
        }
    }
}

#[test]
fn each_command_flag_and_edge_is_answered_as_the_protocol_wants() {
    const OK: Option<Errno> = None;
    let (fua, df, one) = (CMD_FLAG_FUA, CMD_FLAG_DF, CMD_FLAG_REQ_ONE);
    let (no_hole, fast) = (CMD_FLAG_NO_HOLE, CMD_FLAG_FAST_ZERO);
    let mib32 = PAYLOAD_BYTES_MAX;
    // Command, flags, offset, length; structured and writable, simple and writable, structured and read-only.
    let table = [
        ((CMD_READ, 0, 0, 512), OK, OK, OK),
        ((CMD_READ, fua, 1, 3), OK, OK, OK),
        ((CMD_READ, 0, 0, 0), OK, OK, OK),
        ((CMD_READ, 0, SIZE, 0), OK, OK, OK),
        ((CMD_READ, 0, SIZE - 1, 1), OK, OK, OK),
        ((CMD_READ, 0, SIZE - 1, 2), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_READ, 0, u64::MAX, 1), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_READ, 0, 0, mib32), OK, OK, OK),
        ((CMD_READ, 0, 0, mib32 + 1), Some(Overflow), Some(Inval), Some(Overflow)),
        ((CMD_READ, df, 0, 512), OK, Some(Inval), OK),
        ((CMD_READ, no_hole, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_READ, 1 << 15, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_WRITE, 0, 0, 512), OK, OK, Some(Perm)),
        ((CMD_WRITE, fua, 1, 3), OK, OK, Some(Perm)),
        ((CMD_WRITE, 0, 0, 0), OK, OK, Some(Perm)),
        ((CMD_WRITE, 0, SIZE - 1, 1), OK, OK, Some(Perm)),
        ((CMD_WRITE, 0, SIZE - 1, 2), Some(NoSpc), Some(NoSpc), Some(Perm)),
        ((CMD_WRITE, 0, SIZE + 1, 0), Some(NoSpc), Some(NoSpc), Some(Perm)),
        ((CMD_WRITE, 0, 0, mib32), OK, OK, Some(Perm)),
        ((CMD_WRITE, 0, 0, mib32 + 1), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_WRITE, df, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_DISC, 0, 0, 0), OK, OK, OK),
        ((CMD_FLUSH, 0, 0, 0), OK, OK, OK),
        ((CMD_FLUSH, fua, 0, 0), OK, OK, OK),
        ((CMD_FLUSH, 0, 512, 0), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_FLUSH, 0, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_FLUSH, fast, 0, 0), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_TRIM, fua, 1, 600), OK, OK, Some(Perm)),
        ((CMD_TRIM, 0, 0, 1 << 30), OK, OK, Some(Perm)),
        ((CMD_TRIM, 0, 1, 1 << 30), Some(Inval), Some(Inval), Some(Perm)),
        ((CMD_TRIM, no_hole, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_CACHE, 0, 0, 1 << 30), OK, OK, OK),
        ((CMD_CACHE, 0, 1, 1 << 30), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_CACHE, df, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_WRITE_ZEROES, fua | no_hole | fast, 0, 1 << 30), OK, OK, Some(Perm)),
        ((CMD_WRITE_ZEROES, 0, 1, 1), OK, OK, Some(Perm)),
        ((CMD_WRITE_ZEROES, fast, 1, 511), Some(NotSup), Some(NotSup), Some(Perm)),
        ((CMD_WRITE_ZEROES, 0, 0, 0), OK, OK, Some(Perm)),
        ((CMD_WRITE_ZEROES, 0, SIZE, 1), Some(NoSpc), Some(NoSpc), Some(Perm)),
        ((CMD_WRITE_ZEROES, 0, 0, u32::MAX), Some(NoSpc), Some(NoSpc), Some(Perm)),
        ((CMD_WRITE_ZEROES, one, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_BLOCK_STATUS, 0, 0, 1 << 30), OK, OK, OK),
        ((CMD_BLOCK_STATUS, one | fua, 7, 9), OK, OK, OK),
        ((CMD_BLOCK_STATUS, 0, 0, 0), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_BLOCK_STATUS, 0, SIZE, 1), Some(Inval), Some(Inval), Some(Inval)),
        ((CMD_BLOCK_STATUS, df, 0, 512), Some(Inval), Some(Inval), Some(Inval)),
        ((8, 0, 0, 0), Some(Inval), Some(Inval), Some(Inval)),
        ((u16::MAX, u16::MAX, u64::MAX, u32::MAX), Some(Inval), Some(Inval), Some(Inval)),
    ];
    for (what, structured, simple, read_only) in table {
        assert_eq!(verdict(Replies::Structured, Access::ReadWrite, what), structured, "structured {what:?}");
        assert_eq!(verdict(Replies::Simple, Access::ReadWrite, what), simple, "simple {what:?}");
        assert_eq!(verdict(Replies::Structured, Access::ReadOnly, what), read_only, "read-only {what:?}");
    }
}

#[test]
fn block_status_needs_a_selected_context() {
    let negotiated = Negotiated { replies: Replies::Structured, block_status: BlockStatus::NotSelected };
    let mut bytes = BytesMut::from(&request(CMD_BLOCK_STATUS, 0, 0, 512)[..]);
    let event = Session::new(negotiated).next(&mut bytes, &disk(Access::ReadWrite)).unwrap();
    assert!(matches!(event, Event::Refused { refusal: Refusal { errno: Inval, .. }, .. }));
}

#[test]
fn a_trim_leaves_parts_of_sectors_alone() {
    let mut bytes = BytesMut::from(&request(CMD_TRIM, 0, 100, 1500)[..]);
    let event = session(Replies::Simple).next(&mut bytes, &disk(Access::ReadWrite)).unwrap();
    let request = Request::Trim { range: ByteRange::new(512, 1024), durability: Durability::Acknowledged };
    assert_eq!(event, Event::Request { cookie: Cookie(9), request });
}

#[test]
fn a_wrong_magic_number_is_the_end() {
    let mut bytes = BytesMut::from(&[0u8; 28][..]);
    assert_eq!(session(Replies::Simple).next(&mut bytes, &disk(Access::ReadWrite)), Err(BadMagic));
}

#[test]
fn nothing_after_goodbye_is_looked_at() {
    let mut session = session(Replies::Simple);
    let mut bytes = BytesMut::from(&[request(CMD_DISC, 0, 0, 0), request(CMD_FLUSH, 0, 0, 0)].concat()[..]);
    assert_eq!(session.next(&mut bytes, &disk(Access::ReadWrite)), Ok(Event::Disconnect));
    assert_eq!(session.next(&mut bytes, &disk(Access::ReadWrite)), Ok(Event::NeedInput));
}

/// Hears `bytes` in the given pieces, directly into the payload where that is offered, and tells all events.
fn hear(pieces: &[&[u8]], piece_bytes_max: usize) -> Result<Vec<Event>, BadMagic> {
    let mut session = session(Replies::Structured);
    let disk = disk(Access::ReadWrite);
    let mut input = BytesMut::new();
    let mut events = Vec::new();
    for piece in pieces {
        let mut piece = *piece;
        loop {
            match session.next(&mut input, &disk)? {
                Event::NeedInput if piece.is_empty() => break,
                Event::NeedInput => match session.payload_space() {
                    Some(space) => {
                        let len = space.len().min(piece.len());
                        space[..len].copy_from_slice(&piece[..len]);
                        session.payload_came(len);
                        piece.advance(len);
                    }
                    None => {
                        input.extend_from_slice(piece);
                        piece = &[];
                    }
                },
                event => {
                    if session.is_announced() {
                        session.receive(piece_bytes_max, Vec::new());
                    }
                    events.push(event);
                }
            }
        }
    }
    Ok(events)
}

fn script() -> Vec<u8> {
    let mut script = request(CMD_READ, CMD_FLAG_DF, 0, 4096);
    script.extend(request(CMD_WRITE, CMD_FLAG_FUA, 100, 300));
    script.extend((0..300u32).map(|byte| u8::try_from(byte % 251).unwrap()));
    script.extend(request(CMD_WRITE, 0, SIZE - 10, 40));
    script.extend([0xee; 40]);
    script.extend(request(77, 0, 0, 0));
    script.extend(request(CMD_WRITE_ZEROES, 0, 0, u32::MAX >> 3));
    script.extend(request(CMD_DISC, 0, 0, 0));
    script
}

#[test]
fn cut_at_any_byte_requests_come_out_the_same() {
    let script = script();
    let whole = hear(&[&script], 128).unwrap();
    assert_eq!(whole.len(), 10, "{whole:?}");
    for at in 0..=script.len() {
        assert_eq!(hear(&[&script[..at], &script[at..]], 128).unwrap(), whole, "cut at {at}");
    }
    let bytes: Vec<&[u8]> = script.chunks(1).collect();
    assert_eq!(hear(&bytes, 128).unwrap(), whole);
}

#[test]
fn pieces_of_a_write_end_at_multiples_and_make_up_its_payload() {
    let events = hear(&[&script()], 128).unwrap();
    let pieces: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::WritePiece { offset_bytes, data, rest } => Some((*offset_bytes, data.len(), *rest)),
            _ => None,
        })
        .collect();
    let follows = Rest::Follows;
    assert_eq!(pieces, [(100, 28, follows), (128, 128, follows), (256, 128, follows), (384, 16, Rest::None)]);
}

#[test]
fn a_write_that_failed_on_its_way_is_refused_once_its_payload_has_passed() {
    let mut session = session(Replies::Simple);
    let disk = disk(Access::ReadWrite);
    let mut input = BytesMut::from(&[request(CMD_WRITE, 0, 0, 1000), vec![1; 600]].concat()[..]);
    assert!(matches!(session.next(&mut input, &disk), Ok(Event::WriteBegins { .. })));
    session.receive(512, Vec::new());
    assert!(matches!(session.next(&mut input, &disk), Ok(Event::WritePiece { rest: Rest::Follows, .. })));
    let refusal = Refusal::new(Errno::NoSpc, "full");
    session.skip_payload(Cookie(9), refusal.clone());
    assert_eq!(session.next(&mut input, &disk), Ok(Event::NeedInput));
    assert!(!session.at_boundary());
    input.extend_from_slice(&[vec![1; 400], request(CMD_FLUSH, 0, 0, 0)].concat());
    assert_eq!(session.next(&mut input, &disk), Ok(Event::Refused { cookie: Cookie(9), refusal }));
    let request = Request::Flush;
    assert_eq!(session.next(&mut input, &disk), Ok(Event::Request { cookie: Cookie(9), request }));
}

proptest! {
    #[test]
    fn any_requests_in_any_pieces_make_progress_or_end(
        requests in proptest::collection::vec((any::<u16>(), 0u16..10, 0u64..SIZE * 2, 0u32..3000), 0..12),
        garbage in proptest::collection::vec(any::<u8>(), 0..200),
        cut in 1usize..999,
    ) {
        let mut script = Vec::new();
        for (flags, command, offset_bytes, len_bytes) in requests {
            script.extend(request(command, flags & 0x1f, offset_bytes, len_bytes));
            if command == CMD_WRITE {
                script.extend(vec![0; len_bytes as usize]);
            }
        }
        script.extend(garbage);
        let pieces: Vec<&[u8]> = script.chunks(cut).collect();
        prop_assert_eq!(hear(&pieces, 512), hear(&[&script], 512));
    }
}
