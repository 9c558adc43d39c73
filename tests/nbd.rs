//! The NBD server as real clients see it: libnbd, QEMU and fio over TCP and Unix sockets, and raw sockets for what
//! no well-behaved client does.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

#[expect(dead_code, reason = "other tests use the rest")]
mod nbd_disk;

use blockhouse::frontend::nbd::wire::{
    CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_WRITE, OPT_EXPORT_NAME, OPT_LIST,
    OPT_STRUCTURED_REPLY, OptionHeader, RequestHeader,
};
use blockhouse::frontend::nbd::{Config, Server};
use nbd_disk::served::{TestExports, World, tool};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

impl World {
    async fn start() -> Self {
        Self::start_with(Config::default()).await
    }

    async fn start_with(config: Config) -> Self {
        Self::serve(config, DISK_BYTES).await
    }

    fn uris(&self, name: &str) -> [String; 2] {
        [
            format!("nbd://{}/{name}", self.tcp()),
            format!("nbd+unix:///{name}?socket={}", self.socket().display()),
        ]
    }

    async fn client(&self, replies: Replies) -> Client<UnixStream> {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let mut client = Client { stream };
        client.shake_hands("disk", replies).await;
        client
    }

    /// That a client which does nothing wrong is served.
    async fn assert_serves(&self) {
        let mut client = self.client(Replies::Simple).await;
        client.request(CMD_READ, 0, 7, 0, 4096).await;
        assert_eq!(client.simple().await, (0, 7));
        client.bytes(4096).await;
        client.request(CMD_DISC, 0, 0, 0, 0).await;
        assert_eq!(client.rest().await, Vec::<u8>::new());
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Replies {
    Simple,
    Structured,
}

struct Client<S> {
    stream: S,
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Client<S> {
    async fn shake_hands(&mut self, name: &str, replies: Replies) {
        assert_eq!(&self.bytes(18).await[..16], b"NBDMAGICIHAVEOPT");
        self.stream.write_all(&hello(name, replies)).await.unwrap();
        if replies == Replies::Structured {
            self.bytes(20).await;
        }
        self.bytes(10).await;
    }

    async fn request(&mut self, command: u16, flags: u16, cookie: u64, offset_bytes: u64, len_bytes: u32) {
        self.stream.write_all(&request(command, flags, cookie, offset_bytes, len_bytes)).await.unwrap();
    }

    async fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = self.stream.read_exact(&mut bytes);
        tokio::time::timeout(Duration::from_secs(60), read).await.expect("the server hangs").unwrap();
        bytes
    }

    /// Error and cookie.
    async fn simple(&mut self) -> (u32, u64) {
        let bytes = self.bytes(16).await;
        assert_eq!(bytes[..4], 0x6744_6698u32.to_be_bytes());
        (
            u32::from_be_bytes(bytes[4..8].try_into().unwrap()),
            u64::from_be_bytes(bytes[8..].try_into().unwrap()),
        )
    }

    /// Flags, type, cookie and payload.
    async fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        let head = self.bytes(20).await;
        assert_eq!(head[..4], 0x668e_33efu32.to_be_bytes());
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        let payload = self.bytes(len as usize).await;
        let short = |at: usize| u16::from_be_bytes(head[at..at + 2].try_into().unwrap());
        (short(4), short(6), u64::from_be_bytes(head[8..16].try_into().unwrap()), payload)
    }

    async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset is as good an end as any.
        drop(self.stream.read_to_end(&mut bytes).await);
        bytes
    }
}

fn request(command: u16, flags: u16, cookie: u64, offset_bytes: u64, len_bytes: u32) -> [u8; 28] {
    RequestHeader { flags, command, cookie, offset_bytes, len_bytes: u64::from(len_bytes) }.encode()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader { option, len_bytes: u32::try_from(data.len()).unwrap() };
    [&header.encode()[..], data].concat()
}

fn hello(name: &str, replies: Replies) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    if replies == Replies::Structured {
        bytes.extend(option(OPT_STRUCTURED_REPLY, &[]));
    }
    bytes.extend(option(OPT_EXPORT_NAME, name.as_bytes()));
    bytes
}

async fn nbdsh(script: &str) -> Option<String> {
    tool("/usr/bin/python3", &["-c", script]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_sees_what_is_served() {
    let world = World::start().await;
    for uri in world.uris("disk") {
        let Some(json) = tool("nbdinfo", &["--json", &uri]).await else { return };
        let info: serde_json::Value = serde_json::from_str(&json).unwrap();
        let export = &info["exports"][0];
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        assert_eq!(export["export-size"], DISK_BYTES);
        assert_eq!(export["description"], "for tests");
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        for can in [
            "can_cache",
            "can_df",
            "can_fast_zero",
            "can_flush",
            "can_fua",
            "can_multi_conn",
            "can_trim",
            "can_zero",
        ] {
            assert_eq!(export[can], true, "{can}");
        }
        assert_eq!(export["is_read_only"], false);
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 32 * MIB);
    }
    for uri in world.uris("fixed") {
        tool("nbdinfo", &["--is", "read-only", &uri]).await;
    }
    for uri in world.uris("") {
        let list = tool("nbdinfo", &["--list", &uri]).await.unwrap();
        assert!(list.contains("export=\"disk\"") && list.contains("export=\"fixed\""), "{list}");
        assert_eq!(tool("nbdinfo", &["--size", &uri]).await.unwrap().trim(), DISK_BYTES.to_string());
    }
    // The end of a connection is not seen by the client that left before it.
    world.server.drain(Duration::from_secs(10)).await;
    assert_eq!(world.clients.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_unknown_disk_a_client_may_ask_for_another() {
    let world = World::start().await;
    let script = format!(
        "import nbd
for name in ['nothing', 'away']:
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix('{}')
    h.set_export_name(name)
    try:
        h.opt_go()
    except nbd.Error as e:
        assert e.errno == 'ENOENT', str(e)
    else:
        raise SystemExit('no error')
    h.set_export_name('disk')
    h.opt_go()
    assert h.pread(512, 0) is not None
    h.shutdown()
",
        world.socket().display()
    );
    nbdsh(&script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_brings_an_image_in_and_out_unchanged() {
    let world = World::start().await;
    let source = world.dir.path().join("source");
    let mut content = vec![0u8; usize::try_from(DISK_BYTES).unwrap()];
    for (index, byte) in content.iter_mut().enumerate() {
        // Stretches of data and of zeros of very different lengths, none aligned.
        if (index / 77_777).is_multiple_of(3) {
            *byte = u8::try_from((index * 31 + index / 513) % 251).unwrap();
        }
    }
    tokio::fs::write(&source, &content).await.unwrap();
    for (number, uri) in world.uris("disk").into_iter().enumerate() {
        let back = world.dir.path().join(format!("back{number}"));
        if tool("nbdcopy", &["--flush", source.to_str().unwrap(), &uri]).await.is_none() {
            return;
        }
        tool("nbdcopy", &[&uri, back.to_str().unwrap()]).await;
        assert!(tokio::fs::read(&back).await.unwrap() == content, "{uri}");
        world.disk.forget_local();
        // All from what has to be loaded now, in one connection and long requests.
        tool(
            "nbdcopy",
            &["--connections=1", "--requests=4", "--request-size=33554432", &uri, back.to_str().unwrap()],
        )
        .await;
        assert!(tokio::fs::read(&back).await.unwrap() == content, "{uri}");
        tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", source.to_str().unwrap(), &uri]).await;
        world.disk.clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_writes_reads_zeroes_and_discards() {
    let world = World::start().await;
    for uri in world.uris("disk") {
        let commands = [
            "write -P 0x5a 0 1M",
            "write -P 0x33 4097 5001",
            "read -P 0x5a 0 4097",
            "read -P 0x33 4097 5001",
            "write -z 8192 1000",
            "read -P 0 8192 1000",
            "write -z -u 64k 64k",
            "read -P 0 64k 64k",
            "discard 256k 256k",
            "read -P 0 256k 256k",
            "write -f -P 7 63M 1M",
            "flush",
            "read -P 7 63M 1M",
            "write -P 9 16M 32M",
            "read -P 9 16M 32M",
            "read -P 0x5a 512k 512k",
        ];
        let mut arguments = vec!["-f", "raw"];
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(&uri);
        let Some(output) = tool("qemu-io", &arguments).await else { return };
        assert!(!output.contains("failed") && !output.contains("error"), "{output}");
        world.disk.forget_local();
        let output =
            tool("qemu-io", &["-f", "raw", "-c", "read -P 9 16M 32M", "-c", "read -P 0x33 4097 4095", &uri])
                .await;
        assert!(!output.unwrap().contains("failed"));
        let map = tool("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).await.unwrap();
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        assert!(map.as_array().unwrap().iter().any(|extent| extent["zero"] == true), "{map}");
        world.disk.clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_what_it_wrote_over_several_connections() {
    let world = World::start().await;
    for uri in world.uris("disk") {
        let uri = format!("--uri={uri}");
        let common = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-256k",
            "--size=24m",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--numjobs=2",
            "--offset_increment=32m",
            "--fsync=64",
        ];
        if tool("fio", &common).await.is_none() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_sees_errors_fragments_and_status_as_the_protocol_has_them() {
    let world = World::start().await;
    let script = format!(
        r#"
import nbd, errno
SIZE = {DISK_BYTES}
def connect(name, structured=True):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if structured: h.add_meta_context('base:allocation')
    h.set_strict_mode(0)
    h.set_export_name(name)
    h.connect_unix('{socket}')
    return h
def fails(want, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errno == want, (want, e.errno, str(e))
        return
    raise SystemExit('no error, wanted ' + want)

for structured in (True, False):
    h = connect('disk', structured)
    h.pwrite(b'A' * 1000, 100)
    assert h.pread(1002, 99) == b'\0' + b'A' * 1000 + b'\0'
    h.pwrite(b'Z', SIZE - 1, nbd.CMD_FLAG_FUA)
    assert h.pread(2, SIZE - 2) == b'\0Z'
    fails('EINVAL', h.pread, 2, SIZE - 1)
    fails('EINVAL', h.pread, 512, SIZE)
    fails('ENOSPC', h.pwrite, b'xx', SIZE - 1)
    fails('ENOSPC', h.zero, 2, SIZE - 1)
    fails('EINVAL', h.trim, 2, SIZE - 1)
    fails('EINVAL', h.cache, 2, SIZE - 1)
    fails('EINVAL', h.pread, 512, 0, 0x40)
    fails('EINVAL', h.pwrite, b'x' * 512, 0, nbd.CMD_FLAG_DF)
    fails('EINVAL', h.zero, 512, 0, nbd.CMD_FLAG_DF)
    fails('EINVAL', h.trim, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
    fails('ENOTSUP', h.zero, 511, 0, nbd.CMD_FLAG_FAST_ZERO)
    h.zero(SIZE, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(4096, 0) == bytes(4096)
    h.pwrite(b'B' * 65536, 65536)
    h.pwrite(b'q' * (32 << 20), 4097)
    assert h.pread(32 << 20, 4097) == b'q' * (32 << 20)
    h.trim(32 << 20, 4097)
    assert h.pread(4097 + 511, 0) == bytes(4097) + b'q' * 511
    h.zero(SIZE, 0)
    h.pwrite(b'B' * 65536, 65536)
    h.cache(SIZE, 0)
    h.flush()
    assert h.pread(65536 * 3, 0) == bytes(65536) + b'B' * 65536 + bytes(65536)
    h.shutdown()

h = connect('disk')
chunks = []
def seen(data, offset, status, error):
    chunks.append((offset, len(data), status))
h.pread_structured(65536 * 3, 0, seen)
assert chunks == [(0, 65536, nbd.READ_HOLE), (65536, 65536, nbd.READ_DATA), (131072, 65536, nbd.READ_HOLE)], chunks
chunks.clear()
h.pread_structured(65536 * 3, 0, seen, nbd.CMD_FLAG_DF)
assert chunks == [(0, 65536 * 3, nbd.READ_DATA)], chunks
chunks.clear()
h.pread_structured(5 << 20, 4096, seen, nbd.CMD_FLAG_DF)
assert chunks == [(4096, 5 << 20, nbd.READ_DATA)], chunks
chunks.clear()
h.pread_structured(4096, 0, seen, nbd.CMD_FLAG_DF)
assert chunks == [(0, 4096, nbd.READ_HOLE)], chunks

extents = []
def extent(context, offset, entries, error):
    assert context == 'base:allocation'
    extents.extend(zip(entries[::2], entries[1::2]))
h.block_status(SIZE, 0, extent)
assert sum(e[0] for e in extents) == SIZE, extents
assert extents[0][1] == 3 and any(e[1] == 0 for e in extents), extents
extents.clear()
h.block_status(131072, 65536, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 1 and extents[0][0] <= 131072 and extents[0][1] == 0, extents
fails('EINVAL', h.block_status, 512, SIZE, extent)

ro = connect('fixed')
assert ro.is_read_only()
fails('EPERM', ro.pwrite, b'x' * 5000000, 0)
fails('EPERM', ro.zero, 512, 0)
fails('EPERM', ro.trim, 512, 0)
assert ro.pread(512, 0) == bytes(512)
ro.flush()
ro.shutdown()
h.shutdown()
"#,
        socket = world.socket().display()
    );
    nbdsh(&script).await;
}

#[tokio::test]
async fn a_client_that_leaves_at_any_byte_harms_nobody() {
    let world = World::start().await;
    let mut steady = world.client(Replies::Structured).await;
    let mut script = hello("disk", Replies::Structured);
    script.extend(request(CMD_WRITE, 0, 1, 0, 600));
    script.extend([7; 600]);
    script.extend(request(CMD_READ, CMD_FLAG_DF, 2, 0, 8192));
    script.extend(request(CMD_FLUSH, 0, 3, 0, 0));
    for len in 0..script.len() {
        let mut stream = UnixStream::connect(world.socket()).await.unwrap();
        stream.write_all(&script[..len]).await.unwrap();
        if len % 2 == 0 {
            stream.shutdown().await.unwrap();
        }
        drop(stream);
        if len % 50 == 0 {
            steady.request(CMD_FLUSH, 0, len as u64, 0, 0).await;
            assert_eq!(steady.simple().await, (0, len as u64));
        }
    }
    drop(steady);
    world.server.drain(Duration::from_secs(20)).await;
    assert_eq!(world.clients.load(Ordering::SeqCst), 0, "every client's guard is gone");
}

#[tokio::test]
async fn a_half_closed_client_gets_all_its_replies() {
    let world = World::start().await;
    world.disk.fill(3);
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = world.client(replies).await;
        client.request(CMD_READ, 0, 1, 512, 32 << 20).await;
        client.request(CMD_FLUSH, 0, 2, 0, 0).await;
        client.stream.write_all(&request(CMD_WRITE, 0, 3, 0, 4096)).await.unwrap();
        client.stream.write_all(&[1; 1000]).await.unwrap();
        client.stream.shutdown().await.unwrap();
        let rest = client.rest().await;
        assert!(rest.len() >= (32 << 20) + 32, "{}", rest.len());
    }
    assert_eq!(world.disk.bytes(0, 4096).await, vec![3; 4096], "half a write is none");
}

#[tokio::test]
async fn garbage_ends_its_connection_only() {
    let world = World::start().await;
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..200usize {
        let garbage: Vec<u8> = (0..700)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                u8::try_from(seed >> 56).unwrap()
            })
            .collect();
        let mut stream = UnixStream::connect(world.socket()).await.unwrap();
        let prefix = match round % 3 {
            0 => Vec::new(),
            1 => 3u32.to_be_bytes().to_vec(),
            _ => hello("disk", Replies::Structured),
        };
        // It may be closed before all is written.
        drop(stream.write_all(&[prefix, garbage].concat()).await);
        drop(stream.shutdown().await);
        let mut client = Client { stream };
        assert!(client.rest().await.len() < 400);
    }
    world.assert_serves().await;
}

#[tokio::test]
async fn a_flood_of_options_is_cut_off() {
    let world = World::start().await;
    let stream = UnixStream::connect(world.socket()).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let flood = tokio::spawn(async move {
        let mut sent = 0;
        drop(writer.write_all(&3u32.to_be_bytes()).await);
        while writer.write_all(&option(OPT_LIST, &[])).await.is_ok() {
            sent += 1;
            assert!(sent < 1_000_000, "nobody stops it");
        }
    });
    let mut answers = Vec::new();
    drop(reader.read_to_end(&mut answers).await);
    assert!(answers.len() < 100_000, "{}", answers.len());
    flood.await.unwrap();
    world.assert_serves().await;
}

#[tokio::test]
async fn a_handshake_that_takes_too_long_is_ended() {
    let config = Config { handshake_timeout: Duration::from_millis(50), ..Config::default() };
    let world = World::start_with(config).await;
    let mut client = Client { stream: TcpStream::connect(world.tcp()).await.unwrap() };
    assert_eq!(client.rest().await.len(), 18);
    world.assert_serves().await;
}

#[tokio::test]
async fn clients_beyond_the_limit_are_turned_away_and_places_come_back() {
    let world = World::start_with(Config { connections_max: 2, ..Config::default() }).await;
    let one = world.client(Replies::Simple).await;
    let two = world.client(Replies::Simple).await;
    let mut three = Client { stream: UnixStream::connect(world.socket()).await.unwrap() };
    assert_eq!(three.rest().await.len(), 0);
    drop(one);
    while world.clients.load(Ordering::SeqCst) > 1 {
        tokio::task::yield_now().await;
    }
    loop {
        let mut next = Client { stream: UnixStream::connect(world.socket()).await.unwrap() };
        let mut greeting = [0; 18];
        if next.stream.read_exact(&mut greeting).await.is_ok() {
            break;
        }
    }
    drop(two);
}

#[tokio::test]
async fn a_client_that_takes_no_replies_holds_no_more_than_its_bound() {
    let config = Config { connection_bytes_max: 4 << 20, node_bytes_max: 6 << 20, ..Config::default() };
    let world = World::start_with(config).await;
    world.disk.forget_local();
    world.disk.fill(9);
    let mut slow = Vec::new();
    for _ in 0..4 {
        let mut client = world.client(Replies::Simple).await;
        for cookie in 0..60 {
            client.request(CMD_READ, 0, cookie, 0, 4 << 20).await;
        }
        slow.push(client);
    }
    // The others are served from what each connection has for itself.
    world.assert_serves().await;
    let mut client = world.client(Replies::Structured).await;
    client.request(CMD_WRITE, CMD_FLAG_FUA, 1, 1 << 20, 3 << 20).await;
    client.stream.write_all(&vec![5; 3 << 20]).await.unwrap();
    assert_eq!(client.simple().await, (0, 1));
    let held = world.disk.bytes_read();
    // Four bounded readers and what the sockets took; unbounded they would have read 960 MiB.
    assert!(held < 40 * MIB, "{held}");
    // And what was asked is answered once it is taken, whole and in one piece.
    for mut client in slow {
        for _ in 0..60 {
            assert_eq!(client.simple().await.0, 0);
            client.bytes(4 << 20).await;
        }
    }
}

#[tokio::test]
async fn an_error_within_a_simple_reply_ends_the_connection_and_a_structured_one_says_where() {
    let world = World::start().await;
    world.disk.fill(1);
    world.disk.fail_reads_from(5 * MIB);
    let mut simple = world.client(Replies::Simple).await;
    simple.request(CMD_READ, 0, 1, 0, 8 << 20).await;
    assert_eq!(simple.simple().await, (0, 1));
    assert!(simple.rest().await.len() < 8 << 20);

    let mut early = world.client(Replies::Simple).await;
    early.request(CMD_READ, 0, 1, 6 * MIB, 4096).await;
    assert_eq!(early.simple().await, (5, 1));

    let mut structured = world.client(Replies::Structured).await;
    for flags in [0, CMD_FLAG_DF] {
        structured.request(CMD_READ, flags, 2, 0, 8 << 20).await;
        let mut data = 0;
        loop {
            let (done, kind, cookie, payload) = structured.chunk().await;
            assert_eq!(cookie, 2);
            if kind == 1 {
                data += payload.len() - 8;
                assert_eq!(done, 0);
                continue;
            }
            assert_eq!((done, kind), (1, 0x8002));
            assert_eq!(payload[..4], 5u32.to_be_bytes());
            assert_eq!(payload[payload.len() - 8..], (5 * MIB).to_be_bytes());
            break;
        }
        assert_eq!(data, if flags == 0 { 5 << 20 } else { 8 << 20 });
    }
    structured.request(CMD_FLUSH, 0, 3, 0, 0).await;
    assert_eq!(structured.simple().await, (0, 3));
}

#[tokio::test]
async fn replies_overtake_a_request_that_waits() {
    let world = World::start().await;
    let mut client = world.client(Replies::Simple).await;
    let gate = world.disk.hold_flushes();
    client.request(CMD_FLUSH, 0, 1, 0, 0).await;
    client.request(CMD_READ, 0, 2, 0, 512).await;
    assert_eq!(client.simple().await, (0, 2));
    client.bytes(512).await;
    drop(gate);
    assert_eq!(client.simple().await, (0, 1));
}

#[tokio::test]
async fn goodbye_waits_for_what_is_under_way() {
    let world = World::start().await;
    let mut client = world.client(Replies::Simple).await;
    let gate = world.disk.hold_flushes();
    client.request(CMD_FLUSH, 0, 1, 0, 0).await;
    client.request(CMD_DISC, 0, 2, 0, 0).await;
    client.request(CMD_READ, 0, 3, 0, 512).await;
    drop(gate);
    assert_eq!(client.simple().await, (0, 1));
    assert_eq!(client.rest().await.len(), 0);
}

#[tokio::test]
async fn draining_answers_what_was_asked_and_takes_nothing_more() {
    let world = World::start().await;
    let mut client = world.client(Replies::Simple).await;
    let gate = world.disk.hold_flushes();
    client.request(CMD_FLUSH, 0, 1, 0, 0).await;
    world.disk.flush_begun().await;
    let socket = world.socket();
    let clients = world.clients.clone();
    let drain = tokio::spawn(world.server.drain(Duration::from_secs(20)));
    drop(gate);
    assert_eq!(client.simple().await, (0, 1));
    assert_eq!(client.rest().await.len(), 0);
    drop(client);
    drain.await.unwrap();
    assert_eq!(clients.load(Ordering::SeqCst), 0);
    assert!(!socket.exists());
}

#[tokio::test]
async fn draining_cuts_off_who_does_not_leave() {
    let world = World::start().await;
    world.disk.fill(1);
    let mut client = world.client(Replies::Simple).await;
    client.request(CMD_READ, 0, 1, 0, 32 << 20).await;
    client.simple().await;
    world.server.drain(Duration::from_millis(50)).await;
    assert!(client.rest().await.len() < 32 << 20);
}

#[tokio::test]
async fn a_disk_that_is_taken_away_ends_its_clients() {
    let world = World::start().await;
    let mut client = world.client(Replies::Simple).await;
    world.closed.cancel();
    assert_eq!(client.rest().await.len(), 0);
    drop(client);
    world.all_left().await;
}

#[tokio::test]
async fn a_dead_socket_is_replaced_a_live_one_and_a_file_are_not() {
    let world = World::start().await;
    let start = |path: PathBuf| {
        let exports = TestExports {
            disk: world.disk.clone(),
            fixed: world.disk.clone(),
            closed: CancellationToken::new(),
            clients: world.clients.clone(),
        };
        let config = Config { unix: Some(path), ..Config::default() };
        Server::start(config, Arc::new(exports), CancellationToken::new())
    };
    assert!(start(world.socket()).await.is_err());
    world.assert_serves().await;
    let file = world.dir.path().join("file");
    tokio::fs::write(&file, b"data").await.unwrap();
    assert!(start(file.clone()).await.is_err());
    assert_eq!(tokio::fs::read(&file).await.unwrap(), b"data");
    let dead = world.dir.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let server = start(dead.clone()).await.unwrap();
    UnixStream::connect(&dead).await.unwrap();
    drop(server);
}

#[tokio::test]
async fn many_connections_see_each_others_flushed_writes() {
    let world = World::start().await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(world.client(Replies::Simple).await);
    }
    for (index, writer) in (0u8..8).enumerate() {
        clients[index].request(CMD_WRITE, CMD_FLAG_FUA, 1, 4096 * u64::from(writer), 4096).await;
        clients[index].stream.write_all(&[writer + 1; 4096]).await.unwrap();
        assert_eq!(clients[index].simple().await, (0, 1));
    }
    for client in &mut clients {
        client.request(CMD_READ, 0, 2, 0, 8 * 4096).await;
        assert_eq!(client.simple().await, (0, 2));
        let bytes = client.bytes(8 * 4096).await;
        assert!(bytes.chunks(4096).zip(1u8..).all(|(block, value)| block.iter().all(|byte| *byte == value)));
    }
}

#[tokio::test]
async fn l8_a_write_holds_no_grant_while_its_payload_comes_in() {
    let world = World::start().await;
    let mut client = world.client(Replies::Simple).await;
    client.request(CMD_WRITE, 0, 1, 0, 4096).await;
    client.stream.write_all(&[1; 4000]).await.unwrap();
    world.assert_serves().await;
    assert_eq!(world.disk.grants(), 0);
    client.stream.write_all(&[1; 96]).await.unwrap();
    assert_eq!(client.simple().await, (0, 1));
    assert_eq!(world.disk.grants(), 1);
}

#[tokio::test]
async fn a_change_of_size_is_seen_by_the_next_request() {
    let world = World::start().await;
    let mut client = world.client(Replies::Simple).await;
    world.disk.show(MIB);
    client.request(CMD_READ, 0, 1, MIB, 512).await;
    assert_eq!(client.simple().await, (22, 1));
    client.request(CMD_WRITE, 0, 2, MIB - 512, 1024).await;
    client.stream.write_all(&[1; 1024]).await.unwrap();
    assert_eq!(client.simple().await, (28, 2));
    world.disk.show(DISK_BYTES);
    client.request(CMD_READ, 0, 3, MIB, 512).await;
    assert_eq!(client.simple().await, (0, 3));
}
