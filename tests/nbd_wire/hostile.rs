//! Clients that mean harm, or die: nothing leaks, and the others are served.

use crate::client::{Ask, Client, MODES, Mode, hello, option, set_contexts};
use crate::world::{DISK_BYTES, MIB, World};
use blockhouse::frontend::nbd::Config;
use blockhouse::frontend::nbd::wire::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ,
    CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, OPT_EXTENDED_HEADERS, OPT_INFO, OPT_LIST_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// What a client of that mode says in a whole life: every command once.
fn life(mode: Mode) -> Vec<u8> {
    let mut bytes = hello("disk", mode);
    let mut cookie = 0;
    let mut ask = |ask: Ask, payload: &[u8]| {
        cookie += 1;
        bytes.extend(ask.proper(mode).encode(mode, cookie));
        bytes.extend(payload);
    };
    ask(Ask::new(CMD_WRITE, 0, 100, 700), &[7; 700]);
    ask(Ask::new(CMD_READ, 0, 0, 8192), &[]);
    ask(Ask::new(CMD_TRIM, 0, 0, MIB), &[]);
    ask(Ask::new(CMD_WRITE_ZEROES, 0, 511, 1024), &[]);
    ask(Ask::new(CMD_CACHE, 0, 0, MIB), &[]);
    ask(Ask::new(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, MIB), &[]);
    if mode == Mode::Extended {
        ask(Ask::new(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 0, 12), &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1]);
        ask(Ask::new(CMD_FLUSH, CMD_FLAG_PAYLOAD_LEN, 0, 9), &[1; 9]);
    }
    ask(Ask::new(CMD_READ, 0, DISK_BYTES, 1), &[]);
    ask(Ask::new(CMD_FLUSH, 0, 0, 0), &[]);
    ask(Ask::new(CMD_DISC, 0, 0, 0), &[]);
    bytes
}

#[tokio::test]
async fn a_client_that_dies_at_any_byte_of_its_life_leaves_nothing_behind() {
    let world = World::start().await;
    for mode in MODES {
        let life = life(mode);
        let mut steady = world.client(mode).await;
        for len in 0..life.len() {
            let mut stream = UnixStream::connect(world.socket()).await.unwrap();
            stream.write_all(&life[..len]).await.unwrap();
            match len % 3 {
                // Its half is closed and it waits, or all of it is closed, or it is closed with answers unread.
                0 => {
                    stream.shutdown().await.unwrap();
                    let mut client = Client { stream, mode, size: 0, flags: 0 };
                    client.rest().await;
                }
                1 => drop(stream),
                _ => {
                    stream.readable().await.unwrap();
                    drop(stream);
                }
            }
            if len % 64 == 0 {
                assert_eq!(steady.ask(Ask::new(CMD_FLUSH, 0, 0, 0), &[]).await.errno, 0);
            }
        }
        drop(steady);
        world.all_left().await;
    }
}

#[tokio::test]
async fn requests_that_overlap_in_flight_leave_one_or_the_other_in_each_sector() {
    for mode in MODES {
        let world = World::start().await;
        let mut client = world.client(mode).await;
        let mut asked = Vec::new();
        let mut bytes = Vec::new();
        for round in 0..100u64 {
            let stamp = u8::try_from(round % 100 + 1).unwrap();
            let (offset, len) = ((round % 7) * 2048, 16384 + (round % 5) * 512);
            let ask = match round % 10 {
                3 => Ask::new(CMD_READ, 0, offset, len),
                6 => Ask::new(CMD_WRITE_ZEROES, 0, offset, len),
                9 => Ask::new(CMD_FLUSH, 0, 0, 0),
                _ => Ask::new(CMD_WRITE, 0, offset, len).proper(mode),
            };
            bytes.extend(ask.encode(mode, round));
            if ask.command == CMD_WRITE {
                bytes.extend(vec![stamp; usize::try_from(len).unwrap()]);
            }
            asked.push(ask);
        }
        let mut answered = vec![false; asked.len()];
        let (sent, ()) = {
            // It is sent while answers are read: neither side waits for the other.
            let Client { stream, .. } = client;
            let (reader, mut writer) = stream.into_split();
            let (hold, _held) = tokio::sync::oneshot::channel::<()>();
            let sender = tokio::spawn(async move {
                writer.write_all(&bytes).await.unwrap();
                drop(hold);
                writer
            });
            let joined = tokio::io::join(reader, tokio::io::sink());
            let mut reading = Client { stream: joined, mode, size: 0, flags: 0 };
            for _ in 0..asked.len() {
                let answer = reading.answer(&asked).await;
                let at = usize::try_from(answer.cookie).unwrap();
                assert!(answer.errno == 0 && !std::mem::replace(&mut answered[at], true), "{answer:?}");
                assert!(answer.data.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
            }
            let writer = sender.await.unwrap();
            (reading.stream.into_inner().0.reunite(writer).unwrap(), ())
        };
        client = Client { stream: sent, mode, size: 0, flags: 0 };
        assert_eq!(client.ask(Ask::new(CMD_FLUSH, 0, 0, 0), &[]).await.errno, 0);
        let end = world.disk.bytes(0, 32768).await;
        assert!(
            end.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])),
            "no sector is torn"
        );
    }
}

#[tokio::test]
async fn clients_that_take_no_replies_stop_only_themselves() {
    let config = Config { connection_bytes_max: 4 << 20, node_bytes_max: 6 << 20, ..Config::default() };
    let world = World::start_with(config).await;
    world.disk.fill(9);
    let mut slow = Vec::new();
    for mode in MODES {
        let mut client = world.client(mode).await;
        let mut bytes = Vec::new();
        for cookie in 0..60 {
            bytes.extend(Ask::new(CMD_READ, 0, 0, 8 * MIB).encode(mode, cookie));
            if mode != Mode::Simple {
                bytes.extend(Ask::new(CMD_BLOCK_STATUS, 0, 0, DISK_BYTES).encode(mode, 100 + cookie));
            }
        }
        client.send(&bytes).await;
        slow.push(client);
    }
    for mode in MODES {
        let mut client = world.client(mode).await;
        let write = Ask::new(CMD_WRITE, 0, 0, 3 * MIB).proper(mode);
        let payload = vec![9; usize::try_from(3 * MIB).unwrap()];
        assert_eq!(client.ask(write, &payload).await.errno, 0);
        assert_eq!(client.ask(Ask::new(CMD_READ, 0, 0, 4096), &[]).await.data, [9; 4096]);
    }
    let held = world.disk.bytes_read();
    assert!(held < 60 * MIB, "{held} bytes were read for clients that take none");
    drop(slow);
    world.all_left().await;
}

#[tokio::test]
async fn a_hint_that_takes_long_holds_nothing_once_its_client_has_left() {
    for mode in MODES {
        let world = World::start().await;
        world.disk.fill(1);
        let held = world.disk.hold_loads();
        let mut client = world.client(mode).await;
        client.send(&Ask::new(CMD_CACHE, 0, 0, DISK_BYTES).encode(mode, 0)).await;
        world.disk.load_begun().await;
        drop(client);
        world.all_left().await;
        drop(held);
    }
}

#[tokio::test]
async fn floods_of_every_option_end_the_connection_that_sends_them() {
    let world = World::start().await;
    let info = b"\0\0\0\x04disk\0\0".to_vec();
    let floods = [
        option(OPT_INFO, &info),
        option(OPT_STRUCTURED_REPLY, &[]),
        [option(OPT_EXTENDED_HEADERS, &[]), set_contexts("disk", &["base:allocation"; 100])].concat(),
        [option(OPT_EXTENDED_HEADERS, &[]), option(OPT_LIST_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\0")]
            .concat(),
        option(99, &[7; 60_000]),
        option(99, &[7; 70_000]),
    ];
    for flood in floods {
        let stream = UnixStream::connect(world.socket()).await.unwrap();
        let (reader, mut writer) = stream.into_split();
        let sending = tokio::spawn(async move {
            drop(writer.write_all(&3u32.to_be_bytes()).await);
            let mut sent = 0;
            while writer.write_all(&flood).await.is_ok() {
                sent += 1;
                assert!(sent < 100_000, "nobody stops it");
            }
        });
        let stream = tokio::io::join(reader, tokio::io::sink());
        let mut client = Client { stream, mode: Mode::Simple, size: 0, flags: 0 };
        assert!(client.rest().await.len() < 200_000);
        sending.await.unwrap();
        world.all_left().await;
    }
    assert_eq!(world.client(Mode::Simple).await.size, DISK_BYTES);
}

#[tokio::test]
async fn a_client_that_sends_a_byte_at_a_time_has_no_more_time_than_others() {
    let config = Config { handshake_timeout: Duration::from_millis(300), ..Config::default() };
    let world = World::start_with(config).await;
    let stream = UnixStream::connect(world.socket()).await.unwrap();
    let (reader, mut writer) = stream.into_split();
    let drip = tokio::spawn(async move {
        for byte in hello("disk", Mode::Simple).into_iter().cycle() {
            if writer.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let stream = tokio::io::join(reader, tokio::io::sink());
    let mut client = Client { stream, mode: Mode::Simple, size: 0, flags: 0 };
    assert_eq!(client.rest().await.len(), 18);
    drip.await.unwrap();
    world.all_left().await;
}
