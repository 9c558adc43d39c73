//! Every command with every flag at every edge of the disk, against what the protocol demands of it.

use crate::client::{Ask, Client, MODES, Mode, option};
use crate::world::{DISK_BYTES, MIB, World};
use blockhouse::frontend::nbd::wire::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    FLAG_BLOCK_STATUS_PAYLOAD, FLAG_CAN_MULTI_CONN, FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_SEND_CACHE,
    FLAG_SEND_DF, FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES, OPT_GO, OPT_INFO, OPT_LIST, REP_ACK, REP_INFO, REP_SERVER,
};
use tokio::net::UnixStream;

const PERM: u32 = 1;
const INVAL: u32 = 22;
const NOSPC: u32 = 28;
const OVERFLOW: u32 = 75;
const NOTSUP: u32 = 95;

const PAYLOAD_MAX: u64 = 32 * MIB;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Access {
    ReadOnly,
    ReadWrite,
}

/// Errors that the protocol allows or wants for a request; none: it has to be done.
fn demanded(mode: Mode, access: Access, ask: &Ask) -> Vec<u32> {
    let mut errors = Vec::new();
    let allowed = match ask.command {
        CMD_READ if mode != Mode::Simple => CMD_FLAG_DF,
        CMD_WRITE if mode == Mode::Extended => CMD_FLAG_PAYLOAD_LEN,
        CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS if mode == Mode::Extended => CMD_FLAG_REQ_ONE | CMD_FLAG_PAYLOAD_LEN,
        CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
        _ => 0,
    };
    // "It also SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly documented as applicable";
    // FUA MUST be accepted with all commands.
    if ask.flags & !(allowed | CMD_FLAG_FUA) != 0 {
        errors.push(INVAL);
    }
    let changes = matches!(ask.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if changes && access == Access::ReadOnly {
        errors.push(PERM);
    }
    let beyond = ask.offset.checked_add(ask.len).is_none_or(|end| end > DISK_BYTES);
    match ask.command {
        CMD_FLUSH if ask.offset != 0 || ask.len != 0 => errors.push(INVAL),
        CMD_READ | CMD_TRIM | CMD_CACHE | CMD_BLOCK_STATUS if beyond => errors.push(INVAL),
        CMD_WRITE | CMD_WRITE_ZEROES if beyond => errors.push(NOSPC),
        CMD_READ | CMD_WRITE | CMD_FLUSH | CMD_TRIM | CMD_CACHE | CMD_WRITE_ZEROES | CMD_BLOCK_STATUS => {}
        _ => errors.push(INVAL),
    }
    match ask.command {
        CMD_READ if ask.len > PAYLOAD_MAX => errors.push(if mode == Mode::Simple { INVAL } else { OVERFLOW }),
        CMD_WRITE if ask.len > PAYLOAD_MAX => errors.push(INVAL),
        // No context can be selected without chunks; of nothing nothing can be said.
        CMD_BLOCK_STATUS if mode == Mode::Simple || ask.len == 0 => errors.push(INVAL),
        // The payload that goes with it here names no contexts.
        CMD_BLOCK_STATUS if ask.flags & CMD_FLAG_PAYLOAD_LEN != 0 => errors.push(INVAL),
        CMD_WRITE_ZEROES if ask.flags & CMD_FLAG_FAST_ZERO != 0 && (ask.offset | ask.len) & 511 != 0 => {
            errors.push(NOTSUP);
        }
        _ => {}
    }
    errors
}

/// Bytes that follow the header.
fn payload_len(mode: Mode, ask: &Ask) -> u64 {
    // A write has one with and without the flag for it: QEMU leaves it away.
    let flagged = mode == Mode::Extended && ask.flags & CMD_FLAG_PAYLOAD_LEN != 0;
    if flagged || ask.command == CMD_WRITE { ask.len } else { 0 }
}

fn edges(mode: Mode, command: u16) -> Vec<(u64, u64)> {
    let end = DISK_BYTES;
    let mut edges = vec![
        (0, 0),
        (0, 512),
        (0, 1),
        (511, 2),
        (4097, 5001),
        (end - 512, 512),
        (end - 1, 1),
        (end - 1, 2),
        (end, 0),
        (end, 1),
        (end + 1, 0),
        (end + 512, 512),
        (u64::MAX, 1),
        (u64::MAX - 511, 512),
    ];
    // Long ones, where no payload makes them slow: the whole disk, and over the largest payload and 32 bits.
    if command != CMD_WRITE {
        edges.extend([(0, end), (0, PAYLOAD_MAX + 1), (1, end), (0, u64::from(u32::MAX))]);
        if mode == Mode::Extended {
            edges.extend([(0, 1 << 32), (0, (1 << 32) + 512), (512, u64::MAX - 511), (0, u64::MAX)]);
        }
    }
    edges
}

/// The disk as it should be.
struct Model(Vec<u8>);

impl Model {
    fn range(ask: &Ask) -> std::ops::Range<usize> {
        usize::try_from(ask.offset).unwrap()..usize::try_from(ask.offset + ask.len).unwrap()
    }

    fn apply(&mut self, ask: &Ask, payload: &[u8]) {
        match ask.command {
            CMD_WRITE => self.0[Self::range(ask)].copy_from_slice(payload),
            CMD_WRITE_ZEROES => self.0[Self::range(ask)].fill(0),
            // Whole sectors of it, as this server does; the protocol would allow none.
            CMD_TRIM => {
                let (start, end) = (ask.offset.next_multiple_of(512), (ask.offset + ask.len) / 512 * 512);
                if start < end {
                    self.0[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(0);
                }
            }
            _ => {}
        }
    }
}

async fn check(client: &mut Client<UnixStream>, access: Access, ask: Ask, model: &mut Model, stamp: u8) {
    let payload = vec![stamp; usize::try_from(payload_len(client.mode, &ask)).unwrap()];
    let answer = client.ask(ask, &payload).await;
    let what = format!("{:?} {access:?} {ask:?}", client.mode);
    let errors = demanded(client.mode, access, &ask);
    if errors.is_empty() {
        assert_eq!(answer.errno, 0, "{what}");
        model.apply(&ask, &payload);
        match ask.command {
            CMD_READ => {
                assert!(answer.data == model.0[Model::range(&ask)], "{what}: other bytes");
                assert!(ask.flags & CMD_FLAG_DF == 0 || answer.content_chunks <= 1, "{what}");
            }
            CMD_BLOCK_STATUS => {
                let [(1, extents)] = &answer.status[..] else { panic!("{what}: {:?}", answer.status) };
                assert!(ask.flags & CMD_FLAG_REQ_ONE == 0 || extents.len() == 1, "{what}");
                let mut at = usize::try_from(ask.offset).unwrap();
                for (len, state) in extents {
                    let end = at + usize::try_from(*len).unwrap();
                    let zeros = model.0[at..end].iter().all(|byte| *byte == 0);
                    assert!(*state == 0 || (*state == 3 && zeros), "{what}: {at} {end} {state}");
                    at = end;
                }
            }
            _ => assert!(answer.data.is_empty() && answer.status.is_empty(), "{what}"),
        }
    } else {
        assert!(errors.contains(&answer.errno), "{what}: {}, not one of {errors:?}", answer.errno);
        assert!(answer.data.is_empty() && answer.status.is_empty(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_flag_and_edge_is_answered_as_the_protocol_demands() {
    let commands = [
        CMD_READ,
        CMD_WRITE,
        CMD_FLUSH,
        CMD_TRIM,
        CMD_CACHE,
        CMD_WRITE_ZEROES,
        CMD_BLOCK_STATUS,
        8,
        9,
        0x1234,
    ];
    for mode in MODES {
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let world = World::start().await;
            let disk = if access == Access::ReadOnly { "fixed" } else { "disk" };
            let mut client = world.client_of(disk, mode).await;
            let mut model = Model(vec![0; usize::try_from(DISK_BYTES).unwrap()]);
            let mut stamp = 0u8;
            for command in commands {
                let singles = (0..16).map(|bit| 1u16 << bit);
                for flags in singles.chain([0, !CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_FUA | CMD_FLAG_NO_HOLE]) {
                    for (offset, len) in edges(mode, command) {
                        let ask = Ask::new(command, flags, offset, len).proper(mode);
                        // A payload that long ends an extended connection; that has its own test.
                        if mode == Mode::Extended && ask.flags & CMD_FLAG_PAYLOAD_LEN != 0 && len > MIB {
                            continue;
                        }
                        stamp = stamp % 250 + 1;
                        check(&mut client, access, ask, &mut model, stamp).await;
                        if ask.flags & CMD_FLAG_PAYLOAD_LEN != 0 && command == CMD_WRITE {
                            let without = Ask { flags: ask.flags & !CMD_FLAG_PAYLOAD_LEN, ..ask };
                            check(&mut client, access, without, &mut model, stamp).await;
                        }
                    }
                }
            }
            let disk = if access == Access::ReadOnly { &world.fixed } else { &world.disk };
            assert!(disk.bytes(0, model.0.len()).await == model.0, "{mode:?}: the disk is another");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_payload_is_served_whole_and_one_byte_more_is_not() {
    for mode in MODES {
        let world = World::start().await;
        let mut client = world.client(mode).await;
        let payload: Vec<u8> = (0..PAYLOAD_MAX).map(|at| u8::try_from(at / 1000 % 251).unwrap()).collect();
        let write = Ask::new(CMD_WRITE, 0, 513, PAYLOAD_MAX).proper(mode);
        assert_eq!(client.ask(write, &payload).await.errno, 0);
        let flags = if mode == Mode::Simple { [0, 0] } else { [0, CMD_FLAG_DF] };
        for flags in flags {
            let answer = client.ask(Ask::new(CMD_READ, flags, 513, PAYLOAD_MAX), &[]).await;
            assert!(answer.errno == 0 && answer.data == payload);
            assert!(flags == 0 || answer.content_chunks == 1);
        }
        let longer = Ask::new(CMD_WRITE, 0, 0, PAYLOAD_MAX + 1).proper(mode);
        if mode == Mode::Extended {
            // "A server SHOULD initiate hard disconnect".
            client.send(&longer.encode(mode, 1)).await;
            assert_eq!(client.rest().await, [0; 0]);
        } else {
            let payload = vec![9; usize::try_from(PAYLOAD_MAX).unwrap() + 1];
            assert_eq!(client.ask(longer, &payload).await.errno, INVAL);
            assert_eq!(client.ask(Ask::new(CMD_FLUSH, 0, 0, 0), &[]).await.errno, 0);
        }
        assert_eq!(world.disk.bytes(0, 513).await, [0; 513]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effect_lengths_beyond_32_bits_are_answered_for_what_they_are() {
    let world = World::start().await;
    let mut client = world.client(Mode::Extended).await;
    let huge = |command| Ask::new(command, 0, 0, (1 << 32) + 512);
    for (command, errno) in [
        (CMD_READ, &[OVERFLOW][..]),
        (CMD_TRIM, &[INVAL]),
        (CMD_CACHE, &[INVAL]),
        (CMD_WRITE_ZEROES, &[NOSPC]),
        (CMD_BLOCK_STATUS, &[INVAL]),
    ] {
        assert!(errno.contains(&client.ask(huge(command), &[]).await.errno), "{command}");
    }
    // Cut to 32 bits it would have been 512 bytes, and zeroed them.
    assert_eq!(client.ask(Ask::new(CMD_WRITE, CMD_FLAG_PAYLOAD_LEN, 0, 512), &[7; 512]).await.errno, 0);
    assert_eq!(client.ask(huge(CMD_TRIM), &[]).await.errno, INVAL);
    assert_eq!(world.disk.bytes(0, 512).await, [7; 512]);
}

#[tokio::test]
async fn block_status_may_name_the_contexts_that_it_wants() {
    let world = World::start().await;
    let mut client = world.client(Mode::Extended).await;
    let payload = |len: u64, ids: &[u32]| {
        let ids = ids.iter().flat_map(|id| id.to_be_bytes());
        len.to_be_bytes().into_iter().chain(ids).collect::<Vec<u8>>()
    };
    for (len, ids, errno) in [
        (DISK_BYTES, &[1][..], 0),
        (512, &[1], 0),
        (DISK_BYTES + 1, &[1], INVAL),
        (512, &[1, 1], INVAL),
        (512, &[2], INVAL),
        (512, &[], INVAL),
        (512, &[1; 100], INVAL),
    ] {
        let payload = payload(len, ids);
        let ask = Ask::new(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 0, payload.len() as u64);
        let answer = client.ask(ask, &payload).await;
        assert_eq!(answer.errno, errno, "{len} {ids:?}");
        if errno == 0 {
            assert_eq!(answer.status, [(1, vec![(len, 3)])]);
        }
    }
}

#[tokio::test]
async fn what_is_told_of_a_disk_is_what_it_can() {
    let world = World::start().await;
    let always = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE;
    let writable = FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
    for (mode, chunks) in [
        (Mode::Simple, 0),
        (Mode::Structured, FLAG_SEND_DF),
        (Mode::Extended, FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD),
    ] {
        for (disk, access) in [("disk", writable), ("fixed", FLAG_READ_ONLY)] {
            let client = world.client_of(disk, mode).await;
            assert_eq!(
                (client.size, client.flags),
                (DISK_BYTES, always | access | chunks),
                "{mode:?} {disk}"
            );
        }
    }
    // The same to INFO and GO, each item that was asked for, and the listing.
    let stream = UnixStream::connect(world.socket()).await.unwrap();
    let mut client = Client { stream, mode: Mode::Simple, size: 0, flags: 0 };
    client.bytes(18).await;
    client.send(&3u32.to_be_bytes()).await;
    client.send(&option(OPT_LIST, &[])).await;
    for name in ["disk", "fixed"] {
        let (_, kind, data) = client.option_reply().await;
        let length = u32::try_from(name.len()).unwrap().to_be_bytes();
        assert_eq!((kind, data), (REP_SERVER, [&length[..], name.as_bytes(), b"for tests"].concat()));
    }
    assert_eq!(client.option_reply().await.1, REP_ACK);
    let asked = [b"\0\0\0\0\0\x04".as_slice(), &[0, 1, 0, 2, 0, 3, 0, 0]].concat();
    let mut told = Vec::new();
    for number in [OPT_INFO, OPT_GO] {
        client.send(&option(number, &asked)).await;
        let mut items = Vec::new();
        loop {
            let (of, kind, data) = client.option_reply().await;
            assert_eq!(of, number);
            if kind == REP_ACK {
                break;
            }
            assert_eq!(kind, REP_INFO);
            items.push(data);
        }
        assert_eq!(items.len(), 4);
        assert!(items.contains(&b"\0\x01disk".to_vec()), "the default disk by its own name");
        assert!(items.contains(&b"\0\x02for tests".to_vec()));
        assert!(items.contains(&vec![0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]));
        told.push(items);
    }
    assert_eq!(told[0], told[1]);
    assert_eq!(client.ask(Ask::new(CMD_FLUSH, 0, 0, 0), &[]).await.errno, 0);
}
