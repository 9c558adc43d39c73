//! What NBD clients send: the decoders, the handshake, the requests, and a whole server that hears it.
//!
//! The seeds are what real clients said to this server: libnbd with simple and with structured replies, QEMU with
//! extended headers.

#[path = "../nbd_disk/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod nbd_disk;

use crate::Target;
use blockhouse::frontend::nbd::budget::NodeBudget;
use blockhouse::frontend::nbd::connection::{Shared, serve};
use blockhouse::frontend::nbd::context::{ContextSet, Queries};
use blockhouse::frontend::nbd::handshake::{self, ExportFacts, Handshake, Negotiated, Replies, Security};
use blockhouse::frontend::nbd::session::{self, Rest, Session};
use blockhouse::frontend::nbd::wire::{
    EXTENDED_REQUEST_LEN, EXTENDED_REQUEST_MAGIC, Headers, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO,
    OPT_LIST_META_CONTEXT, OPTION_LEN, OPTION_MAGIC, OptionHeader, REQUEST_LEN, REQUEST_MAGIC, RequestHeader,
};
use blockhouse::frontend::nbd::{Config, ExportError, ExportListing, Exports, OpenExport};
use blockhouse::geometry::{Access, Geometry};
use bytes::BytesMut;
use nbd_disk::TestDisk;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

const DISK_BYTES: u64 = 1 << 20;
/// Client flags stand in front of the first option.
const FLAGS_LEN: usize = 4;

const SIMPLE: &[u8] = include_bytes!("../golden/nbd-libnbd-simple.bin");
const STRUCTURED: &[u8] = include_bytes!("../golden/nbd-libnbd-structured.bin");
const EXTENDED: &[u8] = include_bytes!("../golden/nbd-qemu-extended.bin");

pub fn targets() -> Vec<Target> {
    let lives = || vec![SIMPLE.to_vec(), STRUCTURED.to_vec(), EXTENDED.to_vec()];
    vec![
        Target {
            name: "nbd headers",
            seeds: lives().iter().map(|life| life[after_handshake(life)..].to_vec()).collect(),
            heap_bytes_max: |len| 8 * len + 4096,
            fix: |_| (),
            decode: headers,
        },
        Target {
            name: "nbd handshake",
            seeds: lives(),
            heap_bytes_max: |len| 64 * len + (4 << 20),
            fix: |life| fix_life(life),
            decode: whole_handshake,
        },
        Target {
            name: "nbd requests",
            seeds: lives(),
            heap_bytes_max: |len| 64 * len + (4 << 20),
            fix: |life| fix_life(life),
            decode: requests,
        },
        Target {
            name: "nbd session",
            seeds: lives(),
            // Some pieces of reads and writes, and what the pipes hold.
            heap_bytes_max: |len| 64 * len + (16 << 20),
            fix: |life| fix_life(life),
            decode: whole_session,
        },
    ]
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().unwrap()))
}

/// Where the requests begin, if all options are whole.
fn after_handshake(life: &[u8]) -> usize {
    let mut at = FLAGS_LEN;
    while at + OPTION_LEN <= life.len() {
        let (option, len) = (be32(life, at + 8), be32(life, at + 12));
        at = at.saturating_add(OPTION_LEN + usize::try_from(len).unwrap());
        if option == OPT_GO || option == OPT_EXPORT_NAME {
            break;
        }
    }
    at.min(life.len())
}

fn is_extended(life: &[u8]) -> bool {
    let header = [&OPTION_MAGIC.to_be_bytes()[..], &OPT_EXTENDED_HEADERS.to_be_bytes()].concat();
    life[..after_handshake(life)].windows(header.len()).any(|bytes| bytes == header)
}

/// Puts magic numbers back and makes lengths fit, mostly, so that what is behind them is heard.
fn fix_life(life: &mut [u8]) {
    if life.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).is_multiple_of(4) {
        return;
    }
    if let Some(flags) = life.first_chunk_mut::<FLAGS_LEN>() {
        *flags = [0, 0, 0, flags[3] & 3];
    }
    let mut at = FLAGS_LEN;
    while at + OPTION_LEN <= life.len() {
        life[at..at + 8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        let left = u32::try_from(life.len() - at - OPTION_LEN).unwrap();
        let (option, len) = (be32(life, at + 8), be32(life, at + 12));
        if len > left {
            life[at + 12..at + 16].copy_from_slice(&(len % (left + 1)).to_be_bytes());
        }
        at += OPTION_LEN + usize::try_from(be32(life, at + 12)).unwrap();
        if option == OPT_GO || option == OPT_EXPORT_NAME {
            break;
        }
    }
    let extended = is_extended(life);
    let (magic, len) =
        if extended { (EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST_LEN) } else { (REQUEST_MAGIC, REQUEST_LEN) };
    while at + len <= life.len() {
        life[at..at + 4].copy_from_slice(&magic.to_be_bytes());
        let payload = match (extended, life[at + 7], life[at + 5] & 0x20) {
            (_, 1, _) | (true, _, 0x20) => be32(life, at + len - 4),
            _ => 0,
        };
        let left = u32::try_from(life.len() - at - len).unwrap();
        let payload = if payload > left { payload % (left + 1) } else { payload };
        if life[at + 7] == 1 {
            life[at + len - 4..at + len].copy_from_slice(&payload.to_be_bytes());
        }
        at += len + usize::try_from(payload).unwrap();
    }
}

fn headers(input: &[u8]) -> bool {
    let mut accepted = false;
    if let Some(request) = input.first_chunk().and_then(RequestHeader::parse) {
        assert_eq!(request.encode(), input[..REQUEST_LEN]);
        accepted = true;
    }
    if let Some(request) = input.first_chunk().and_then(RequestHeader::parse_extended) {
        assert_eq!(request.encode_extended(), input[..EXTENDED_REQUEST_LEN]);
        accepted = true;
    }
    if let Some(option) = input.first_chunk().and_then(OptionHeader::parse) {
        assert_eq!(option.encode(), input[..OPTION_LEN]);
    }
    if let Some((disk, queries)) = Queries::parse(OPT_LIST_META_CONTEXT, input) {
        assert!(disk.len() <= 4096 && queries.contexts(&[]).len() <= 1);
    }
    accepted
}

fn facts() -> ExportFacts {
    let geometry = Geometry {
        size_bytes: DISK_BYTES,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
    };
    ExportFacts { name: "disk".into(), description: "for tests".into(), geometry }
}

/// What is said to a handshake that hears `pieces`, what it comes to, and the bytes that it leaves.
fn negotiate(pieces: &[&[u8]]) -> (Vec<u8>, handshake::Event, Vec<u8>) {
    let mut handshake = Handshake::new(Security::Plain);
    let mut input = BytesMut::new();
    let mut pieces = pieces.iter();
    loop {
        match handshake.next(&mut input) {
            handshake::Event::NeedInput => match pieces.next() {
                Some(piece) => input.extend_from_slice(piece),
                None => return (handshake.output().to_vec(), handshake::Event::NeedInput, input.to_vec()),
            },
            handshake::Event::List => {
                handshake.listed(&[ExportListing { name: "disk".into(), description: "for tests".into() }])
            }
            handshake::Event::Open { name } if name.len() < 64 => handshake.opened(Ok(&facts())),
            handshake::Event::Open { .. } => handshake.opened(Err(&ExportError::Unknown)),
            handshake::Event::Past { .. } => handshake.past_found(Ok(&["1".to_owned()])),
            end => {
                input.extend(pieces.flat_map(|piece| piece.iter()));
                return (handshake.output().to_vec(), end, input.to_vec());
            }
        }
    }
}

fn whole_handshake(input: &[u8]) -> bool {
    let whole = negotiate(&[input]);
    let cut = input.len() / 3;
    let parts = negotiate(&[&input[..cut], &input[cut..]]);
    // What comes after the end may have been heard in part.
    assert_eq!((&parts.0, &parts.1), (&whole.0, &whole.1));
    assert!(whole.0.starts_with(b"NBDMAGICIHAVEOPT"));
    matches!(whole.1, handshake::Event::Transmit(_))
}

/// The requests that are in `bytes`, heard in pieces.
fn hear(negotiated: Negotiated, pieces: &[&[u8]]) -> (Vec<session::Event>, bool) {
    let geometry = facts().geometry;
    let mut session = Session::new(negotiated);
    let mut input = BytesMut::new();
    let mut events = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match session.next(&mut input, &geometry) {
                Err(_) => return (events, false),
                Ok(session::Event::NeedInput) => break,
                Ok(event) => {
                    if session.is_announced() {
                        session.receive(4096, Vec::new());
                    }
                    match &event {
                        session::Event::WriteBegins { range, .. } => {
                            assert!(range.end() <= DISK_BYTES && !range.is_empty());
                        }
                        session::Event::WritePiece { offset_bytes, data, rest } => {
                            assert!(offset_bytes + data.len() as u64 <= DISK_BYTES);
                            assert!(
                                *rest == Rest::None
                                    || (offset_bytes + data.len() as u64).is_multiple_of(4096)
                            );
                        }
                        session::Event::Request { request, .. } => {
                            let range = match request {
                                session::Request::Flush => None,
                                session::Request::Read { range, .. }
                                | session::Request::Trim { range, .. }
                                | session::Request::WriteZeroes { range, .. }
                                | session::Request::Cache { range }
                                | session::Request::BlockStatus { range, .. } => Some(range),
                            };
                            assert!(range.is_none_or(|range| range.end() <= DISK_BYTES));
                        }
                        session::Event::Disconnect => {
                            events.push(event);
                            return (events, true);
                        }
                        session::Event::NeedInput | session::Event::Refused { .. } => {}
                    }
                    events.push(event);
                }
            }
        }
    }
    (events, true)
}

fn requests(input: &[u8]) -> bool {
    let bytes = &input[after_handshake(input)..];
    let mut accepted = false;
    for (replies, headers) in [
        (Replies::Simple, Headers::Compact),
        (Replies::Structured, Headers::Compact),
        (Replies::Structured, Headers::Extended),
    ] {
        let negotiated = Negotiated { replies, headers, contexts: ContextSet::first(2) };
        let whole = hear(negotiated, &[bytes]);
        let cut = bytes.len() / 3;
        assert_eq!(hear(negotiated, &[&bytes[..cut], &bytes[cut..]]), whole);
        accepted |= whole.1 && !whole.0.is_empty();
    }
    accepted
}

struct OneDisk(Arc<TestDisk>);

#[async_trait::async_trait]
impl Exports for OneDisk {
    async fn list(&self, _: usize) -> Vec<ExportListing> {
        vec![ExportListing { name: "disk".into(), description: "for tests".into() }]
    }

    async fn open(&self, name: &str) -> Result<OpenExport, ExportError> {
        if name.len() >= 64 {
            return Err(ExportError::Unknown);
        }
        Ok(OpenExport {
            name: "disk".into(),
            handler: self.0.clone(),
            description: "for tests".into(),
            guard: Box::new(()),
            closed: CancellationToken::new(),
        })
    }
}

/// A server that hears `input` through a pipe and then its end, while everything that it says is read.
fn whole_session(input: &[u8]) -> bool {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        static DISK: Arc<TestDisk> = Arc::new(TestDisk::new(DISK_BYTES, Access::ReadWrite));
    }
    let disk = DISK.with(Arc::clone);
    let config = Config { connection_bytes_max: 2 << 20, node_bytes_max: 2 << 20, ..Config::default() };
    let shared = Shared {
        threads: None,
        budget: NodeBudget::new(config.node_bytes_max),
        config,
        exports: Arc::new(OneDisk(disk.clone())),
        tls: None,
        stop: CancellationToken::new(),
    };
    let (client, server) = tokio::io::duplex(8192);
    let (mut reader, mut writer) = tokio::io::split(client);
    let talk = async {
        let send = async {
            // The server may have closed before all is said.
            drop(writer.write_all(input).await);
            drop(writer.shutdown().await);
        };
        let receive = async {
            let mut said = Vec::with_capacity(8192);
            let mut total = 0u64;
            while reader.read_buf(&mut said).await.is_ok_and(|len| len > 0) {
                total += said.len() as u64;
                said.clear();
            }
            total
        };
        tokio::join!(serve(server, Security::Plain, &shared), send, receive)
    };
    let (result, (), total) = RUNTIME
        .with(|runtime| runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), talk).await }))
        .expect("the session hangs");
    assert!(total >= 18, "a greeting at least");
    // Only the exports of this call hold it beside the thread: nothing of the session is left.
    drop(shared);
    assert_eq!(Arc::strong_count(&disk), 2, "the session has ended wholly");
    result.is_ok()
}
