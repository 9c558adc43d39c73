//! Tests of the handshake: tables, cuts at every byte, arbitrary bytes.

use super::super::wire::{FLAG_READ_ONLY as READ_ONLY, REP_ERR_UNSUP as UNSUP};
use super::*;
use proptest::prelude::*;

fn facts(access: Access) -> ExportFacts {
    let geometry =
        Geometry { size_bytes: 1 << 20, logical_block_bytes: 512, physical_block_bytes: 4096, access };
    ExportFacts { name: "vm-7".into(), description: "a disk".into(), geometry }
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader { option, len_bytes: u32::try_from(data.len()).unwrap() };
    [&header.encode()[..], data].concat()
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, name);
    data.put_u16(u16::try_from(wanted.len()).unwrap());
    wanted.iter().for_each(|kind| data.put_u16(*kind));
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, name);
    data.put_u32(u32::try_from(queries.len()).unwrap());
    queries.iter().for_each(|query| put_string(&mut data, query));
    data
}

/// Answers questions as a node with the one disk `vm-7` does; gives all output and how it ended.
fn run(pieces: &[&[u8]]) -> (Vec<u8>, Event, BytesMut) {
    run_with(Handshake::new(Security::Plain), pieces)
}

/// The same of a handshake that takes TLS as soon as it is wanted.
fn run_with(mut handshake: Handshake, pieces: &[&[u8]]) -> (Vec<u8>, Event, BytesMut) {
    let mut input = BytesMut::new();
    let mut pieces = pieces.iter();
    loop {
        match handshake.next(&mut input) {
            Event::NeedInput => match pieces.next() {
                Some(piece) => input.extend_from_slice(piece),
                None => return (handshake.output().to_vec(), Event::NeedInput, input),
            },
            Event::List => {
                handshake.listed(&[ExportListing { name: "vm-7".into(), description: "a disk".into() }]);
            }
            Event::Open { name } if name == "vm-7" || name.is_empty() => {
                handshake.opened(Ok(&facts(Access::ReadWrite)));
            }
            Event::Open { .. } => handshake.opened(Err(&ExportError::Unknown)),
            Event::StartTls => handshake.secured(),
            Event::Past { name, past, .. } if name == "vm-7" || name.is_empty() => {
                let known = ["3", "4"].map(String::from);
                let found = match past {
                    PastStates::All => known.to_vec(),
                    PastStates::Named(named) => {
                        named.into_iter().filter(|name| known.contains(name)).collect()
                    }
                };
                handshake.past_found(Ok(&found));
            }
            Event::Past { .. } => handshake.past_found(Err(&ExportError::Unknown)),
            end => return (handshake.output().to_vec(), end, input),
        }
    }
}

/// The replies after the greeting: option, type, data.
fn replies(mut output: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    output.advance(18);
    let mut found = Vec::new();
    while !output.is_empty() {
        assert_eq!(output.get_u64(), super::super::wire::OPTION_REPLY_MAGIC);
        let (option, kind, len) = (output.get_u32(), output.get_u32(), output.get_u32() as usize);
        found.push((option, kind, output.copy_to_bytes(len).to_vec()));
    }
    found
}

/// The replies to options of a client that speaks fixed newstyle, and how it ended.
fn haggle(options: &[Vec<u8>]) -> (Vec<(u32, u32, Vec<u8>)>, Event) {
    let (output, end, _) = run(&[&[&3u32.to_be_bytes()[..], &options.concat()[..]].concat()]);
    (replies(&output), end)
}

#[test]
fn the_greeting_offers_fixed_newstyle_and_no_zeroes() {
    assert_eq!(run(&[]).0, [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat());
}

#[test]
fn unknown_client_flags_and_a_wrong_magic_number_close() {
    assert!(matches!(run(&[&4u32.to_be_bytes()]).1, Event::Close(_)));
    assert!(matches!(run(&[&3u32.to_be_bytes(), b"IHAVEOPS\0\0\0\x01\0\0\0\0"]).1, Event::Close(_)));
}

#[test]
fn export_name_is_padded_unless_the_client_declined() {
    for (flags, padding) in [(3u32, 0), (1, 124), (0, 124)] {
        let (output, end, _) = run(&[&flags.to_be_bytes(), &option(OPT_EXPORT_NAME, b"vm-7")]);
        assert_eq!(output.len(), 18 + 10 + padding);
        assert_eq!(output[18..26], (1u64 << 20).to_be_bytes());
        assert!(matches!(end, Event::Transmit(Negotiated { replies: Replies::Simple, .. })));
    }
    let (output, end, _) = run(&[&3u32.to_be_bytes(), &option(OPT_EXPORT_NAME, b"other")]);
    assert_eq!((output.len(), matches!(end, Event::Close(_))), (18, true));
    let long = option(OPT_EXPORT_NAME, &[b'a'; 4097]);
    assert!(matches!(haggle(&[long]).1, Event::Close(_)));
}

#[test]
fn malformed_options_are_invalid_and_unknown_ones_unsupported() {
    let mut long_name = info_data("vm-7", &[]);
    long_name[3] = 200;
    let table = [
        (OPT_LIST, vec![0], REP_ERR_INVALID),
        (OPT_STRUCTURED_REPLY, vec![0], REP_ERR_INVALID),
        (OPT_INFO, vec![], REP_ERR_INVALID),
        (OPT_GO, long_name, REP_ERR_INVALID),
        (OPT_GO, [info_data("vm-7", &[3]), vec![0]].concat(), REP_ERR_INVALID),
        (OPT_GO, info_data("a\0b", &[]), REP_ERR_INVALID),
        (OPT_GO, info_data(&"a".repeat(4096), &[]), REP_ERR_UNKNOWN),
        (OPT_GO, info_data("other", &[]), REP_ERR_UNKNOWN),
        (OPT_SET_META_CONTEXT, meta_data("vm-7", &["base:allocation"]), REP_ERR_INVALID),
        (OPT_LIST_META_CONTEXT, meta_data("vm-7", &[]), REP_ERR_INVALID),
        (OPT_STARTTLS, vec![], REP_ERR_POLICY),
        (4, vec![], UNSUP),
        (OPT_EXTENDED_HEADERS, vec![0], REP_ERR_INVALID),
        (12, vec![], UNSUP),
        (0x7fff_ffff, vec![1, 2, 3], UNSUP),
        (OPT_LIST, vec![0; 70_000], REP_ERR_TOO_BIG),
    ];
    for (number, data, expected) in table {
        let (replies, end) = haggle(&[option(number, &data), option(OPT_ABORT, b"bye")]);
        assert_eq!((replies[0].0, replies[0].1), (number, expected), "option {number}");
        assert!(std::str::from_utf8(&replies[0].2).is_ok());
        assert_eq!((replies[1].0, replies[1].1), (OPT_ABORT, REP_ACK));
        assert!(matches!(end, Event::Close(_)));
    }
}

#[test]
fn an_unknown_disk_is_named_in_the_answer() {
    let (replies, end) = haggle(&[option(OPT_GO, &info_data("other", &[]))]);
    assert_eq!(String::from_utf8_lossy(&replies[0].2), "\"other\": there is no disk of this name here");
    assert_eq!(end, Event::NeedInput);
}

#[test]
fn go_tells_what_was_asked_for_and_transmits() {
    let wanted = [INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION, 77];
    let (replies, end) =
        haggle(&[option(OPT_INFO, &info_data("", &wanted)), option(OPT_GO, &info_data("vm-7", &[]))]);
    let kinds: Vec<_> = replies.iter().map(|(option, kind, _)| (*option, *kind)).collect();
    let info = (OPT_INFO, REP_INFO);
    assert_eq!(kinds, [info, info, info, info, (OPT_INFO, REP_ACK), (OPT_GO, REP_INFO), (OPT_GO, REP_ACK)]);
    assert_eq!(replies[1].2, b"\0\x01vm-7");
    assert_eq!(replies[2].2, b"\0\x02a disk");
    assert_eq!(replies[3].2, [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    let (replies, headers, contexts) = (Replies::Simple, Headers::Compact, ContextSet::EMPTY);
    let negotiated = Negotiated { replies, headers, contexts };
    assert_eq!(end, Event::Transmit(negotiated));
}

#[test]
fn block_status_holds_only_for_the_disk_it_was_selected_for_and_the_last_selection() {
    let structured = option(OPT_STRUCTURED_REPLY, &[]);
    let set = |name: &str, queries: &[&str]| option(OPT_SET_META_CONTEXT, &meta_data(name, queries));
    let go = option(OPT_GO, &info_data("vm-7", &[]));
    let broken = option(OPT_SET_META_CONTEXT, &[0, 0, 0, 9]);
    let good = set("vm-7", &["x-other:1", "base:allocation"]);
    let table = [
        (vec![good.clone()], 1),
        (vec![], 0),
        (vec![set("", &["base:allocation"])], 0),
        (vec![set("vm-7", &["base:"])], 0),
        (vec![set("vm-7", &["base:other", "nonsense"])], 0),
        (vec![good.clone(), set("vm-7", &[])], 0),
        (vec![good.clone(), broken], 0),
        (vec![good.clone(), set("other", &["base:allocation"])], 0),
    ];
    for (index, (options, count)) in table.into_iter().enumerate() {
        let all = [vec![structured.clone()], options, vec![go.clone()]].concat();
        let (replies, headers) = (Replies::Structured, Headers::Compact);
        let negotiated = Negotiated { replies, headers, contexts: ContextSet::first(count) };
        assert_eq!(haggle(&all).1, Event::Transmit(negotiated), "row {index}");
    }
    let since = "blockhouse:changed-since:";
    for (queries, found) in [
        (&[][..], 3),
        (&["base:"], 1),
        (&["base:allocation"], 1),
        (&["qemu:"], 0),
        (&["blockhouse:"], 2),
        (&[since], 2),
        (&["blockhouse:changed-since:4", "base:"], 2),
        (&["blockhouse:changed-since:5"], 0),
    ] {
        let list = option(OPT_LIST_META_CONTEXT, &meta_data("vm-7", queries));
        let (replies, _) = haggle(&[structured.clone(), list]);
        assert_eq!(
            replies.iter().filter(|(_, kind, _)| *kind == REP_META_CONTEXT).count(),
            found,
            "{queries:?}"
        );
    }
}

#[test]
fn several_contexts_are_selected_with_an_id_each_and_unknown_past_states_do_not_match() {
    let structured = option(OPT_STRUCTURED_REPLY, &[]);
    let since = |past: &str| format!("blockhouse:changed-since:{past}");
    let queries = [since("4"), "base:allocation".into(), since("9"), since("3"), since("4")];
    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
    let set = option(OPT_SET_META_CONTEXT, &meta_data("vm-7", &queries));
    let go = option(OPT_GO, &info_data("vm-7", &[]));
    let (answers, end) = haggle(&[structured.clone(), set, go]);
    let named: Vec<&[u8]> = answers[1..4].iter().map(|(_, _, data)| &data[..]).collect();
    let expected: [&[u8]; 3] = [
        b"\0\0\0\x01base:allocation",
        b"\0\0\0\x02blockhouse:changed-since:4",
        b"\0\0\0\x03blockhouse:changed-since:3",
    ];
    assert_eq!(named, expected);
    assert!(matches!(end, Event::Transmit(Negotiated { contexts, .. }) if contexts == ContextSet::first(3)));

    let many: Vec<String> = (0..17).map(|past| since(&past.to_string())).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for number in [OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT] {
        let (answers, _) = haggle(&[structured.clone(), option(number, &meta_data("vm-7", &many))]);
        assert_eq!((answers.len(), answers[1].1), (2, REP_ERR_TOO_BIG));
    }
}

#[test]
fn flags_say_what_the_disk_and_the_client_can() {
    let mut handshake = Handshake::new(Security::Plain);
    let simple = handshake.transmission_flags("vm-7", &facts(Access::ReadWrite));
    assert_eq!(simple & FLAG_SEND_DF, 0);
    assert_ne!(simple & FLAG_SEND_FAST_ZERO, 0);
    handshake.replies = Replies::Structured;
    assert_eq!(handshake.transmission_flags("vm-7", &facts(Access::ReadWrite)), simple | FLAG_SEND_DF);
    handshake.headers = Headers::Extended;
    handshake.selected = Some(("vm-7".into(), vec![ContextName::Allocation]));
    let filter = FLAG_BLOCK_STATUS_PAYLOAD | FLAG_SEND_DF;
    assert_eq!(handshake.transmission_flags("vm-7", &facts(Access::ReadWrite)), simple | filter);
    assert_eq!(handshake.transmission_flags("", &facts(Access::ReadWrite)), simple | FLAG_SEND_DF);
    let fixed = handshake.transmission_flags("vm-7", &facts(Access::ReadOnly));
    assert_ne!(fixed & READ_ONLY, 0);
    assert_eq!(fixed & (FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO), 0);
}

#[test]
fn extended_headers_imply_chunks_and_cannot_be_left() {
    let extended = option(OPT_EXTENDED_HEADERS, &[]);
    let structured = option(OPT_STRUCTURED_REPLY, &[]);
    let set = option(OPT_SET_META_CONTEXT, &meta_data("vm-7", &["base:allocation"]));
    let go = option(OPT_GO, &info_data("vm-7", &[]));
    let (answers, end) = haggle(&[extended.clone(), structured.clone(), set.clone(), go.clone()]);
    let kinds: Vec<_> = answers.iter().map(|(option, kind, _)| (*option, *kind)).collect();
    assert_eq!(
        kinds[..2],
        [(OPT_EXTENDED_HEADERS, REP_ACK), (OPT_STRUCTURED_REPLY, REP_ERR_EXT_HEADER_REQD)]
    );
    let (replies, headers) = (Replies::Structured, Headers::Extended);
    let negotiated = Negotiated { replies, headers, contexts: ContextSet::first(1) };
    assert_eq!(end, Event::Transmit(negotiated));
    assert_eq!(haggle(&[structured, extended.clone(), set, go]).1, Event::Transmit(negotiated));
    assert!(matches!(haggle(&[extended, option(OPT_EXPORT_NAME, b"vm-7")]).1, Event::Close(_)));
}

#[test]
fn options_are_counted() {
    let flood = vec![option(OPT_LIST, &[]); OPTIONS_MAX as usize + 1];
    let (replies, end) = haggle(&flood);
    assert_eq!(replies.len(), 2 * OPTIONS_MAX as usize);
    assert!(matches!(end, Event::Close(_)));
}

/// The replies to options of a client of a server with TLS, each sent once the one before was answered.
fn haggle_with(security: Security, flags: u32, options: &[Vec<u8>]) -> (Vec<(u32, u32)>, Event) {
    let flags = flags.to_be_bytes();
    let pieces: Vec<&[u8]> = std::iter::once(&flags[..]).chain(options.iter().map(|one| &one[..])).collect();
    let (output, end, _) = run_with(Handshake::new(security), &pieces);
    (replies(&output).into_iter().map(|(option, kind, _)| (option, kind)).collect(), end)
}

#[test]
fn a_server_that_requires_tls_tells_nothing_before_it() {
    let before = [
        (OPT_LIST, vec![], REP_ERR_TLS_REQD),
        (OPT_INFO, info_data("vm-7", &[]), REP_ERR_TLS_REQD),
        (OPT_GO, info_data("vm-7", &[]), REP_ERR_TLS_REQD),
        (OPT_GO, info_data("other", &[]), REP_ERR_TLS_REQD),
        (OPT_GO, vec![], REP_ERR_TLS_REQD),
        (OPT_STRUCTURED_REPLY, vec![], REP_ERR_TLS_REQD),
        (OPT_EXTENDED_HEADERS, vec![], REP_ERR_TLS_REQD),
        (OPT_SET_META_CONTEXT, vec![], REP_ERR_TLS_REQD),
        (77, vec![], REP_ERR_TLS_REQD),
        (OPT_LIST, vec![0; 70_000], REP_ERR_TLS_REQD),
        (OPT_STARTTLS, vec![1], REP_ERR_INVALID),
        (OPT_STARTTLS, vec![], REP_ACK),
        // And within it nothing is refused for it any more.
        (OPT_STARTTLS, vec![], REP_ERR_INVALID),
        (77, vec![], UNSUP),
    ];
    let options: Vec<_> = before.iter().map(|(number, data, _)| option(*number, data)).collect();
    let (answers, end) = haggle_with(Security::Required, 3, &options);
    let expected: Vec<_> = before.iter().map(|(number, _, kind)| (*number, *kind)).collect();
    assert_eq!((answers, end), (expected, Event::NeedInput));
    let name = option(OPT_EXPORT_NAME, b"vm-7");
    assert!(matches!(haggle_with(Security::Required, 3, &[name]).1, Event::Close(_)));
    let abort = option(OPT_ABORT, &[]);
    assert_eq!(haggle_with(Security::Required, 3, &[abort]).0, [(OPT_ABORT, REP_ACK)]);
}

#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    let before = [
        option(OPT_STRUCTURED_REPLY, &[]),
        option(OPT_EXTENDED_HEADERS, &[]),
        option(OPT_SET_META_CONTEXT, &meta_data("vm-7", &["base:allocation"])),
    ];
    let (tls, go) = (option(OPT_STARTTLS, &[]), option(OPT_GO, &info_data("vm-7", &[])));
    let (_, end) = haggle_with(Security::Offered, 3, &[&before[..], &[tls, go.clone()]].concat());
    let (replies, headers, contexts) = (Replies::Simple, Headers::Compact, ContextSet::EMPTY);
    assert_eq!(end, Event::Transmit(Negotiated { replies, headers, contexts }));
    // Where it is only offered, a client may do without.
    let (_, end) = haggle_with(Security::Offered, 3, &[&before[..], &[go]].concat());
    assert!(matches!(end, Event::Transmit(Negotiated { headers: Headers::Extended, .. })));
}

#[test]
fn bytes_between_the_start_of_tls_and_tls_are_not_honoured() {
    let injected = [option(OPT_STARTTLS, &[]), option(OPT_STRUCTURED_REPLY, &[])].concat();
    for len in 17..injected.len() {
        let (answers, end) = haggle_with(Security::Required, 3, &[injected[..len].to_vec()]);
        assert!(answers.is_empty() && matches!(end, Event::Close(_)), "{len} bytes");
    }
    let (answers, _) = haggle_with(Security::Required, 2, &[option(OPT_STARTTLS, &[])]);
    assert_eq!(answers, [(OPT_STARTTLS, REP_ERR_INVALID)], "only fixed newstyle has TLS");
}

#[test]
fn answers_that_nobody_asked_for_change_nothing() {
    let mut handshake = Handshake::new(Security::Plain);
    handshake.listed(&[]);
    handshake.opened(Ok(&facts(Access::ReadWrite)));
    assert_eq!(handshake.output().len(), 18);
    assert_eq!(handshake.next(&mut BytesMut::new()), Event::NeedInput);
}

#[test]
fn cut_at_any_byte_a_handshake_goes_the_same_way() {
    let mut script = 3u32.to_be_bytes().to_vec();
    script.extend(option(OPT_LIST, &[]));
    script.extend(option(99, b"abc"));
    script.extend(option(OPT_STRUCTURED_REPLY, &[]));
    script.extend(option(OPT_SET_META_CONTEXT, &meta_data("vm-7", &["base:allocation"])));
    script.extend(option(OPT_INFO, &info_data("other", &[INFO_BLOCK_SIZE])));
    script.extend(option(OPT_GO, &info_data("vm-7", &[INFO_BLOCK_SIZE])));
    script.extend(b"and a request");
    let whole = run(&[&script]);
    assert_eq!(&whole.2[..], b"and a request");
    for at in 0..=script.len() {
        let (output, end, _) = run(&[&script[..at], &script[at..]]);
        assert_eq!((output, end), (whole.0.clone(), whole.1.clone()), "cut at {at}");
    }
    let bytes: Vec<&[u8]> = script.chunks(1).collect();
    assert_eq!(run(&bytes).0, whole.0);
}

proptest! {
    #[test]
    fn any_bytes_end_or_go_on(
        flags in 0u32..6,
        options in proptest::collection::vec((0u32..13, proptest::collection::vec(any::<u8>(), 0..60), 0u32..3), 0..12),
        garbage in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut script = flags.to_be_bytes().to_vec();
        for (number, data, longer) in options {
            let header = OptionHeader { option: number, len_bytes: u32::try_from(data.len()).unwrap() + longer };
            script.extend(header.encode());
            script.extend(data);
        }
        script.extend(garbage);
        let (output, _, left) = run(&[&script]);
        prop_assert!(output.len() >= 18 && left.len() <= script.len());
    }
}
