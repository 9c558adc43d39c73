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
    Session::new(Negotiated { replies, headers: Headers::Compact, contexts: ContextSet::first(1) })
}

fn extended_session() -> Session {
    let (replies, headers) = (Replies::Structured, Headers::Extended);
    Session::new(Negotiated { replies, headers, contexts: ContextSet::first(3) })
}

fn cookie(offset_bytes: u64) -> Cookie {
    Cookie { number: 9, offset_bytes }
}

fn request(command: u16, flags: u16, offset_bytes: u64, len_bytes: u32) -> Vec<u8> {
    let len_bytes = u64::from(len_bytes);
    RequestHeader { flags, command, cookie: 9, offset_bytes, len_bytes }.encode().to_vec()
}

fn extended(command: u16, flags: u16, offset_bytes: u64, len_bytes: u64) -> Vec<u8> {
    RequestHeader { flags, command, cookie: 9, offset_bytes, len_bytes }.encode_extended().to_vec()
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
            Event::Refused { cookie: named, refusal } => {
                assert_eq!(named, cookie(offset_bytes));
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
    let contexts = ContextSet::EMPTY;
    let negotiated = Negotiated { replies: Replies::Structured, headers: Headers::Compact, contexts };
    let mut bytes = BytesMut::from(&request(CMD_BLOCK_STATUS, 0, 0, 512)[..]);
    let event = Session::new(negotiated).next(&mut bytes, &disk(Access::ReadWrite)).unwrap();
    assert!(matches!(event, Event::Refused { refusal: Refusal { errno: Inval, .. }, .. }));
}

#[test]
fn a_trim_leaves_parts_of_sectors_alone() {
    let mut bytes = BytesMut::from(&request(CMD_TRIM, 0, 100, 1500)[..]);
    let event = session(Replies::Simple).next(&mut bytes, &disk(Access::ReadWrite)).unwrap();
    let request = Request::Trim { range: ByteRange::new(512, 1024), durability: Durability::Acknowledged };
    assert_eq!(event, Event::Request { cookie: cookie(100), request });
}

#[test]
fn a_wrong_magic_number_is_the_end() {
    let mut bytes = BytesMut::from(&[0u8; 28][..]);
    assert_eq!(session(Replies::Simple).next(&mut bytes, &disk(Access::ReadWrite)), Err(BadStream::BadMagic));
}

/// What the first request with an extended header comes to; what follows it must be heard.
fn extended_verdict(
    (command, flags, offset_bytes, len_bytes): (u16, u16, u64, u64),
    payload: &[u8],
) -> Event {
    let mut session = extended_session();
    let disk = disk(Access::ReadWrite);
    let header = extended(command, flags, offset_bytes, len_bytes);
    let mut bytes = BytesMut::from(&[&header, payload, &extended(CMD_FLUSH, 0, 0, 0)].concat()[..]);
    let event = session.next(&mut bytes, &disk).unwrap();
    if let Event::WriteBegins { .. } = event {
        session.receive(1 << 25, Vec::new());
        assert!(matches!(session.next(&mut bytes, &disk), Ok(Event::WritePiece { .. })));
    }
    let flush = Event::Request { cookie: cookie(0), request: Request::Flush };
    assert_eq!(session.next(&mut bytes, &disk), Ok(flush), "{command} {flags} {offset_bytes} {len_bytes}");
    event
}

#[test]
fn extended_requests_are_judged_by_64_bits_and_their_payload_flag() {
    const OK: Option<Errno> = None;
    let (with, one) = (CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE);
    let table = [
        ((CMD_READ, 0, 0, 512), OK),
        ((CMD_READ, 0, 0, 1 << 40), Some(Overflow)),
        ((CMD_READ, 0, 0, u64::MAX), Some(Overflow)),
        ((CMD_READ, CMD_FLAG_DF, 0, 512), OK),
        ((CMD_READ, with, 0, 512), Some(Inval)),
        ((CMD_WRITE, with, 0, 512), OK),
        ((CMD_WRITE, with | CMD_FLAG_FUA, 1, 3), OK),
        ((CMD_WRITE, with, 0, 0), OK),
        ((CMD_WRITE, 0, 0, 512), OK),
        ((CMD_WRITE, with, SIZE, 512), Some(NoSpc)),
        ((CMD_WRITE, with | CMD_FLAG_DF, 0, 512), Some(Inval)),
        ((CMD_TRIM, 0, 0, SIZE), OK),
        ((CMD_TRIM, 0, 0, 1 << 33), Some(Inval)),
        ((CMD_TRIM, with, 0, 512), Some(Inval)),
        ((CMD_CACHE, 0, 0, SIZE), OK),
        ((CMD_CACHE, 0, 0, u64::MAX), Some(Inval)),
        ((CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 0, SIZE), OK),
        ((CMD_WRITE_ZEROES, 0, 0, 1 << 33), Some(NoSpc)),
        ((CMD_WRITE_ZEROES, with, 0, 512), Some(Inval)),
        ((CMD_FLUSH, with, 0, 512), Some(Inval)),
        ((CMD_FLUSH, with, 0, 0), Some(Inval)),
        ((CMD_BLOCK_STATUS, one, 0, SIZE), OK),
        ((CMD_BLOCK_STATUS, 0, 0, SIZE + 1), Some(Inval)),
        ((CMD_BLOCK_STATUS, with, 0, 0), Some(Inval)),
        ((CMD_BLOCK_STATUS, with, 0, 9), Some(Inval)),
        ((CMD_BLOCK_STATUS, with, 0, FILTER_LEN_MAX + 1), Some(Inval)),
        ((CMD_BLOCK_STATUS, with, 0, 1 << 20), Some(Inval)),
        ((77, with, 0, 1 << 20), Some(Inval)),
    ];
    for (what, expected) in table {
        let payload = if what.1 & with == 0 && what.0 != CMD_WRITE { 0 } else { what.3 };
        let found = match extended_verdict(what, &vec![0; crate::geometry::len_of(payload)]) {
            Event::Refused { cookie: named, refusal } => {
                assert_eq!(named, cookie(what.2));
                Some(refusal.errno)
            }
            _ => None,
        };
        assert_eq!(found, expected, "{what:?}");
    }
}

#[test]
fn a_payload_of_block_status_picks_contexts_and_the_length() {
    let ask = |len_bytes: u64, ids: &[u32]| {
        let ids = ids.iter().flat_map(|id| id.to_be_bytes());
        let payload: Vec<u8> = len_bytes.to_be_bytes().into_iter().chain(ids).collect();
        extended_verdict((CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 512, payload.len() as u64), &payload)
    };
    let contexts = ContextSet::of_ids([3, 1], ContextSet::first(3)).unwrap();
    let request =
        Request::BlockStatus { range: ByteRange::new(512, 1 << 29), extents_max: EXTENTS_MAX, contexts };
    assert_eq!(ask(1 << 29, &[3, 1]), Event::Request { cookie: cookie(512), request });
    for (len_bytes, ids) in
        [(SIZE, &[1][..]), (0, &[1]), (u64::MAX, &[1]), (512, &[]), (512, &[1, 1]), (512, &[4]), (512, &[0])]
    {
        let event = ask(len_bytes, ids);
        assert!(matches!(event, Event::Refused { refusal: Refusal { errno: Inval, .. }, .. }), "{ids:?}");
    }
}

#[test]
fn an_extended_payload_beyond_the_largest_and_compact_headers_in_extended_mode_are_the_end() {
    let disk = disk(Access::ReadWrite);
    let too_long = u64::from(PAYLOAD_BYTES_MAX) + 1;
    for command in [CMD_WRITE, CMD_READ, CMD_BLOCK_STATUS, 77] {
        let mut bytes = BytesMut::from(&extended(command, CMD_FLAG_PAYLOAD_LEN, 0, too_long)[..]);
        assert_eq!(extended_session().next(&mut bytes, &disk), Err(BadStream::PayloadTooLong));
    }
    let mut bytes = BytesMut::from(&[request(CMD_FLUSH, 0, 0, 0), vec![0; 4]].concat()[..]);
    assert_eq!(extended_session().next(&mut bytes, &disk), Err(BadStream::BadMagic));
    let mut bytes = BytesMut::from(&extended(CMD_FLUSH, 0, 0, 0)[..]);
    assert_eq!(session(Replies::Structured).next(&mut bytes, &disk), Err(BadStream::BadMagic));
}

#[test]
fn nothing_after_goodbye_is_looked_at() {
    let mut session = session(Replies::Simple);
    let mut bytes = BytesMut::from(&[request(CMD_DISC, 0, 0, 0), request(CMD_FLUSH, 0, 0, 0)].concat()[..]);
    assert_eq!(session.next(&mut bytes, &disk(Access::ReadWrite)), Ok(Event::Disconnect));
    assert_eq!(session.next(&mut bytes, &disk(Access::ReadWrite)), Ok(Event::NeedInput));
}

/// Hears `bytes` in the given pieces, directly into the payload where that is offered, and tells all events.
fn hear(pieces: &[&[u8]], piece_bytes_max: usize) -> Result<Vec<Event>, BadStream> {
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
    session.skip_payload(cookie(0), refusal.clone());
    assert_eq!(session.next(&mut input, &disk), Ok(Event::NeedInput));
    assert!(!session.at_boundary());
    input.extend_from_slice(&[vec![1; 400], request(CMD_FLUSH, 0, 0, 0)].concat());
    assert_eq!(session.next(&mut input, &disk), Ok(Event::Refused { cookie: cookie(0), refusal }));
    let request = Request::Flush;
    assert_eq!(session.next(&mut input, &disk), Ok(Event::Request { cookie: cookie(0), request }));
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
