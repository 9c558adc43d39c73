//! Requests longer than 32 bits can say, over a disk that is large enough for them.

use crate::client::{Ask, Client, Mode};
use blockhouse::block::{
    BlockError, BlockHandler, Change, ChangeKind, Extent, ExtentKind, MissingToken, PastState, Piece,
    ReadPlan, Source, WriteGrant,
};
use blockhouse::frontend::nbd::wire::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLAG_FAST_ZERO, CMD_FLAG_PAYLOAD_LEN, CMD_READ, CMD_TRIM,
    CMD_WRITE_ZEROES,
};
use blockhouse::frontend::nbd::{Config, ExportError, ExportListing, Exports, OpenExport, Server};
use blockhouse::geometry::{Access, ByteRange, Geometry};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::{Arc, Mutex};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const SIZE: u64 = 1 << 46;
/// Where data begins, for block status.
const DATA_FROM: u64 = 5 << 40;

/// Notes what is zeroed.
struct Huge {
    zeroed: Mutex<Vec<ByteRange>>,
    turn: tokio::sync::Mutex<()>,
    size: watch::Sender<u64>,
}

impl BlockHandler for Huge {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: SIZE,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadWrite,
        }
    }

    fn plan_read(&self, range: ByteRange) -> Result<ReadPlan, BlockError> {
        Ok(std::iter::once(Piece { range, source: Source::Zeros }).collect())
    }

    fn load<'a>(&'a self, _: ByteRange, _: &'a MissingToken) -> BoxFuture<'a, Result<Bytes, BlockError>> {
        async { Err(BlockError::Invalid) }.boxed()
    }

    fn begin_write(&self, _: ByteRange) -> Result<Option<Box<dyn WriteGrant>>, BlockError> {
        Err(BlockError::NoSpace)
    }

    fn writable(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        async { Ok(()) }.boxed()
    }

    fn small_write_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.turn
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), BlockError>> {
        async { Ok(()) }.boxed()
    }

    fn zero(&self, range: ByteRange) -> BoxFuture<'_, Result<(), BlockError>> {
        async move {
            self.zeroed.lock().unwrap().push(range);
            Ok(())
        }
        .boxed()
    }

    fn extents(&self, range: ByteRange, max: usize) -> BoxFuture<'_, Result<Vec<Extent>, BlockError>> {
        async move {
            let (hole, data) = (ByteRange::new(0, DATA_FROM), ByteRange::new(DATA_FROM, SIZE - DATA_FROM));
            let kinds = [(hole, ExtentKind::Hole), (data, ExtentKind::Data)];
            let found = kinds.into_iter().filter_map(|(all, kind)| {
                all.intersect(range).filter(|part| !part.is_empty()).map(|range| Extent { range, kind })
            });
            Ok(found.take(max).collect())
        }
        .boxed()
    }

    fn past_state<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<PastState>, BlockError>> {
        async move { Ok((name == "7").then(|| Arc::new(7u8) as PastState)) }.boxed()
    }

    fn changes_since<'a>(
        &'a self,
        _: &'a PastState,
        range: ByteRange,
        _: usize,
    ) -> BoxFuture<'a, Result<Vec<Change>, BlockError>> {
        async move { Ok(vec![Change { range, kind: ChangeKind::Unchanged }]) }.boxed()
    }

    fn size_changes(&self) -> watch::Receiver<u64> {
        self.size.subscribe()
    }
}

struct OneDisk(Arc<Huge>);

#[async_trait::async_trait]
impl Exports for OneDisk {
    async fn list(&self, _: usize) -> Vec<ExportListing> {
        Vec::new()
    }

    async fn open(&self, name: &str) -> Result<OpenExport, ExportError> {
        Ok(OpenExport {
            name: name.to_owned(),
            handler: self.0.clone(),
            description: String::new(),
            guard: Box::new(()),
            closed: CancellationToken::new(),
        })
    }
}

async fn serve() -> (Arc<Huge>, Server) {
    let disk = Arc::new(Huge {
        zeroed: Mutex::default(),
        turn: tokio::sync::Mutex::new(()),
        size: watch::Sender::new(SIZE),
    });
    let config = Config { tcp: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default() };
    let server =
        Server::start(config, Arc::new(OneDisk(disk.clone())), CancellationToken::new()).await.unwrap();
    (disk, server)
}

#[tokio::test]
async fn a_whole_disk_of_terabytes_is_trimmed_zeroed_and_described_at_once() {
    let (disk, server) = serve().await;
    let stream = TcpStream::connect(server.tcp_addresses()[0]).await.unwrap();
    let mut client = Client::shake_hands(stream, "huge", Mode::Extended).await;
    assert_eq!(client.size, SIZE);
    let tail = (1 << 33) + 512;
    for (command, flags, offset, len) in [
        (CMD_TRIM, 0, 0, SIZE),
        (CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, tail, SIZE - tail),
        (CMD_WRITE_ZEROES, 0, 512, (1 << 32) + 512),
    ] {
        assert_eq!(client.ask(Ask::new(command, flags, offset, len), &[]).await.errno, 0);
        assert_eq!(disk.zeroed.lock().unwrap().pop(), Some(ByteRange::new(offset, len)));
    }
    assert_eq!(client.ask(Ask::new(CMD_TRIM, 0, 512, SIZE), &[]).await.errno, 22);
    assert_eq!(client.ask(Ask::new(CMD_READ, 0, 0, SIZE), &[]).await.errno, 75);
    assert_eq!(client.ask(Ask::new(CMD_CACHE, 0, 0, SIZE), &[]).await.errno, 0);
    let whole = vec![(1, vec![(DATA_FROM, 3), (SIZE - DATA_FROM, 0)])];
    assert_eq!(client.ask(Ask::new(CMD_BLOCK_STATUS, 0, 0, SIZE), &[]).await.status, whole);
    let payload: Vec<u8> = SIZE.to_be_bytes().into_iter().chain(1u32.to_be_bytes()).collect();
    let filtered = Ask::new(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 0, payload.len() as u64);
    assert_eq!(client.ask(filtered, &payload).await.status, whole);
}

#[tokio::test]
async fn several_contexts_are_answered_at_once_or_those_that_are_asked_for() {
    let (_disk, server) = serve().await;
    for mode in [Mode::Structured, Mode::Extended] {
        let stream = TcpStream::connect(server.tcp_addresses()[0]).await.unwrap();
        let mut client = Client { stream, mode, size: 0, flags: 0 };
        client.bytes(18).await;
        let hello = crate::client::hello("huge", mode);
        let go = crate::client::go("huge");
        let since = |past: u8| format!("blockhouse:changed-since:{past}");
        let queries = [since(6), "base:allocation".into(), since(7)];
        let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
        // In place of what was selected before.
        let again = crate::client::set_contexts("huge", &queries);
        client.send(&[&hello[..hello.len() - go.len()], &again, &go].concat()).await;
        client.haggled().await;
        let answer = client.ask(Ask::new(CMD_BLOCK_STATUS, 0, 512, 1 << 30), &[]).await;
        assert_eq!(answer.status, [(1, vec![(1 << 30, 3)]), (2, vec![(1 << 30, 0)])]);
        if mode == Mode::Extended {
            let payload = [&(1u64 << 40).to_be_bytes()[..], &2u32.to_be_bytes()].concat();
            let filtered = Ask::new(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 512, payload.len() as u64);
            assert_eq!(client.ask(filtered, &payload).await.status, [(2, vec![(1 << 40, 0)])]);
        }
    }
}
