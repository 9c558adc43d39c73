//! A client that says exactly what it is told to, and checks the form of every answer.

use blockhouse::frontend::nbd::wire::{
    CMD_FLAG_PAYLOAD_LEN, CMD_READ, CMD_WRITE, OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY, OptionHeader, REPLY_BLOCK_STATUS, REPLY_BLOCK_STATUS_EXT, REPLY_ERROR,
    REPLY_ERROR_OFFSET, REPLY_NONE, REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE, RequestHeader,
};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const PATIENCE: Duration = Duration::from_secs(60);

/// What is negotiated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

pub const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub len: u64,
}

/// One whole answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub errno: u32,
    /// What was read, zeros of holes included.
    pub data: Vec<u8>,
    pub content_chunks: usize,
    /// Context and extents: length, state.
    pub status: Vec<(u32, Vec<(u64, u64)>)>,
}

pub struct Client<S> {
    pub stream: S,
    pub mode: Mode,
    pub size: u64,
    pub flags: u16,
}

pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader { option, len_bytes: u32::try_from(data.len()).unwrap() };
    [&header.encode()[..], data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
}

pub fn go(disk: &str) -> Vec<u8> {
    option(OPT_GO, &[string(disk), vec![0, 1, 0, 3]].concat())
}

pub fn set_contexts(disk: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(disk);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query)));
    option(OPT_SET_META_CONTEXT, &data)
}

/// Everything that a client of that mode says before its first request.
pub fn hello(disk: &str, mode: Mode) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    match mode {
        Mode::Simple => {}
        Mode::Structured => bytes.extend(option(OPT_STRUCTURED_REPLY, &[])),
        Mode::Extended => bytes.extend(option(OPT_EXTENDED_HEADERS, &[])),
    }
    if mode != Mode::Simple {
        bytes.extend(set_contexts(disk, &["base:allocation"]));
    }
    bytes.extend(go(disk));
    bytes
}

impl Ask {
    pub fn new(command: u16, flags: u16, offset: u64, len: u64) -> Self {
        Self { command, flags, offset, len }
    }

    /// Its header. Lengths beyond 32 bits are cut where there is no place for them.
    pub fn encode(&self, mode: Mode, cookie: u64) -> Vec<u8> {
        let Self { command, flags, offset, len } = *self;
        let header = RequestHeader { flags, command, cookie, offset_bytes: offset, len_bytes: len };
        match mode {
            Mode::Extended => header.encode_extended().to_vec(),
            Mode::Simple | Mode::Structured => {
                RequestHeader { len_bytes: len & u64::from(u32::MAX), ..header }.encode().to_vec()
            }
        }
    }

    /// As a client sends it that does as it should: a write says that it has a payload.
    pub fn proper(self, mode: Mode) -> Self {
        let with = if mode == Mode::Extended && self.command == CMD_WRITE { CMD_FLAG_PAYLOAD_LEN } else { 0 };
        Self { flags: self.flags | with, ..self }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub async fn shake_hands(stream: S, disk: &str, mode: Mode) -> Self {
        let mut client = Self { stream, mode, size: 0, flags: 0 };
        assert_eq!(client.bytes(18).await, b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&hello(disk, mode)).await;
        client.haggled().await;
        client
    }

    /// Reads answers to options until the disk is open.
    pub async fn haggled(&mut self) {
        loop {
            let (option, kind, data) = self.option_reply().await;
            assert!(kind < 1 << 31, "option {option}: {}", String::from_utf8_lossy(&data));
            match (option, kind) {
                (OPT_GO, 1) => return,
                (OPT_GO, 3) if data[..2] == [0, 0] => {
                    self.size = u64::from_be_bytes(data[2..10].try_into().unwrap());
                    self.flags = u16::from_be_bytes(data[10..12].try_into().unwrap());
                }
                _ => {}
            }
        }
    }

    /// Option, type and data.
    pub async fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        let head = self.bytes(20).await;
        assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        let long = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let data = self.bytes(long(16) as usize).await;
        (long(8), long(12), data)
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(PATIENCE, sent).await.expect("the server does not listen").unwrap();
    }

    pub async fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = self.stream.read_exact(&mut bytes);
        tokio::time::timeout(PATIENCE, read).await.expect("the server hangs").unwrap();
        bytes
    }

    /// All until the end; a reset is as good an end as any.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = self.stream.read_to_end(&mut bytes);
        drop(tokio::time::timeout(PATIENCE, read).await.expect("the server does not close"));
        bytes
    }

    /// Sends a request as it is, and reads its answer.
    pub async fn ask(&mut self, ask: Ask, payload: &[u8]) -> Answer {
        self.send(&[&ask.encode(self.mode, 77), payload].concat()).await;
        let answer = self.answer(&[ask]).await;
        assert_eq!(answer.cookie, 77);
        answer
    }

    /// Reads the next answer, to a request whose cookie is its place in `asked`, or any if there is only one.
    pub async fn answer(&mut self, asked: &[Ask]) -> Answer {
        let of = |cookie: u64| {
            if asked.len() == 1 { asked[0] } else { asked[usize::try_from(cookie).unwrap()] }
        };
        let mut answer = Answer::default();
        let mut covered = Vec::new();
        loop {
            let magic = self.u32().await;
            if magic == 0x6744_6698 {
                assert_ne!(self.mode, Mode::Extended, "no simple replies with extended headers");
                assert_eq!(answer, Answer::default(), "a simple reply is whole");
                answer.errno = self.u32().await;
                answer.cookie = self.u64().await;
                let ask = of(answer.cookie);
                if self.mode == Mode::Simple && ask.command == CMD_READ && answer.errno == 0 {
                    answer.data = self.bytes(usize::try_from(ask.len).unwrap()).await;
                }
                assert!(self.mode == Mode::Simple || ask.command != CMD_READ, "reads are answered in chunks");
                return answer;
            }
            assert_ne!(self.mode, Mode::Simple);
            let extended = self.mode == Mode::Extended;
            assert_eq!(magic, if extended { 0x6e8a_278c } else { 0x668e_33ef });
            let (flags, kind) = (self.u16().await, self.u16().await);
            answer.cookie = self.u64().await;
            let ask = of(answer.cookie);
            let len = if extended {
                assert_eq!(self.u64().await, ask.offset, "the offset of the request comes back");
                self.u64().await
            } else {
                u64::from(self.u32().await)
            };
            assert!(len <= (32 << 20) + 8, "{len}");
            let payload = self.bytes(usize::try_from(len).unwrap()).await;
            let long = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
            let short = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match kind {
                REPLY_NONE => assert_eq!((flags, len), (1, 0)),
                REPLY_OFFSET_DATA => {
                    assert!(len > 8);
                    covered.push((long(0), payload[8..].to_vec()));
                }
                REPLY_OFFSET_HOLE => {
                    assert!(len == 12 && short(8) > 0);
                    covered.push((long(0), vec![0; short(8) as usize]));
                }
                REPLY_BLOCK_STATUS => {
                    assert!(!extended && len >= 12 && len % 8 == 4);
                    let extents = (4..payload.len())
                        .step_by(8)
                        .map(|at| (u64::from(short(at)), u64::from(short(at + 4))));
                    answer.status.push((short(0), extents.collect()));
                }
                REPLY_BLOCK_STATUS_EXT => {
                    assert!(extended && len >= 24 && len % 16 == 8);
                    let extents: Vec<_> =
                        (8..payload.len()).step_by(16).map(|at| (long(at), long(at + 8))).collect();
                    assert_eq!(short(4) as usize, extents.len());
                    answer.status.push((short(0), extents));
                }
                REPLY_ERROR | REPLY_ERROR_OFFSET => {
                    answer.errno = short(0);
                    assert_ne!(answer.errno, 0);
                    let text = u64::from(u16::from_be_bytes(payload[4..6].try_into().unwrap()));
                    assert_eq!(len, 6 + text + if kind == REPLY_ERROR { 0 } else { 8 });
                }
                _ => panic!("a chunk of type {kind}"),
            }
            if flags & 1 == 1 {
                answer.content_chunks = covered.len();
                covered.sort();
                let mut at = ask.offset;
                for (offset, data) in covered {
                    assert!(answer.errno != 0 || offset == at, "chunks cover the range once");
                    at = offset + data.len() as u64;
                    answer.data.extend(data);
                }
                for (_, extents) in &answer.status {
                    let total: u64 = extents.iter().map(|(len, _)| len).sum();
                    let filtered = ask.flags & CMD_FLAG_PAYLOAD_LEN != 0;
                    assert!(extents.iter().all(|(len, _)| *len > 0) && (filtered || total <= ask.len));
                }
                return answer;
            }
        }
    }

    async fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes(2).await.try_into().unwrap())
    }

    async fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).await.try_into().unwrap())
    }

    async fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes(8).await.try_into().unwrap())
    }
}
