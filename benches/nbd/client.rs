//! A client that costs little: as many requests as may be in flight go out in one send, as many replies as there are
//! come in with one receive, one thread a connection. It speaks simple and structured replies.

use anyhow::{Context as _, Result, bail, ensure};
use hdrhistogram::Histogram;
use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;

/// A server that says nothing for this long hangs.
const PATIENCE: Duration = Duration::from_secs(10);
const RECEIVE_BYTES: usize = 1 << 20;
/// `writev` takes no more pieces.
const PIECES_MAX: usize = 1024;

/// How to reach a server.
#[derive(Clone, Debug)]
pub enum Address {
    Unix(PathBuf),
    Tcp(u16),
}

/// What is read or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
}

/// Where the next request goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    Random,
    Sequential,
}

/// What one row of the table does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub kind: Kind,
    pub order: Order,
    pub request_bytes: usize,
    /// Requests in flight on each connection.
    pub depth: usize,
    pub connections: usize,
}

/// What a client saw.
pub struct Seen {
    pub requests: u64,
    pub seconds: f64,
    /// Nanoseconds.
    pub latency: Histogram<u64>,
}

/// Which replies are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replies {
    Simple,
    Structured,
}

trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// A connection that is ready for requests.
pub struct Connection {
    stream: Box<dyn Stream>,
    pub size_bytes: u64,
    received: Vec<u8>,
    /// Bytes of `received` that are there and not looked at.
    filled: usize,
    /// Bytes of a reply's data still to come, of this request.
    payload: Option<Payload>,
}

struct Payload {
    slot: usize,
    left_bytes: usize,
    /// The request is answered once these bytes are here.
    last: bool,
}

impl Connection {
    pub fn new(address: &Address, export: &str, replies: Replies) -> Result<Self> {
        let stream: Box<dyn Stream> = match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
            Address::Tcp(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
        };
        let received = vec![0; RECEIVE_BYTES];
        let mut connection = Self { stream, size_bytes: 0, received, filled: 0, payload: None };
        connection.negotiate(export, replies).context("negotiation")?;
        Ok(connection)
    }

    fn negotiate(&mut self, export: &str, replies: Replies) -> Result<()> {
        let mut hello = [0; 18];
        self.stream.read_exact(&mut hello)?;
        self.stream.write_all(&3u32.to_be_bytes())?;
        if replies == Replies::Structured {
            self.option(OPT_STRUCTURED_REPLY, &[])?;
            // A server may refuse; then its replies are simple.
            self.option_reply()?;
        }
        let mut data = u32::try_from(export.len())?.to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend([0, 0]);
        self.option(OPT_GO, &data)?;
        loop {
            match self.option_reply()? {
                (REP_ACK, _) => return Ok(()),
                (REP_INFO, data) if data.starts_with(&[0, 0]) => self.size_bytes = u64_at(&data, 2),
                (REP_INFO, _) => {}
                (code, data) => bail!("refused with {code:#x}: {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    fn option(&mut self, code: u32, data: &[u8]) -> Result<()> {
        let mut option = OPTION_MAGIC.to_be_bytes().to_vec();
        option.extend(code.to_be_bytes());
        option.extend(u32::try_from(data.len())?.to_be_bytes());
        option.extend(data);
        Ok(self.stream.write_all(&option)?)
    }

    fn option_reply(&mut self) -> Result<(u32, Vec<u8>)> {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header)?;
        ensure!(u64_at(&header, 0) == OPTION_REPLY_MAGIC, "no reply to an option");
        let length = usize::try_from(u32_at(&header, 16))?;
        ensure!(length <= RECEIVE_BYTES, "an option's reply of {length} bytes");
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok((u32_at(&header, 12), data))
    }

    /// Writes, and waits for the reply.
    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        let header = request(WRITE, 0, at, data.len())?;
        self.stream.write_all(&header)?;
        self.stream.write_all(data)?;
        self.one_reply(&mut |_| {})
    }

    /// Flushes, and waits for the reply.
    pub fn flush(&mut self) -> Result<()> {
        self.stream.write_all(&request(FLUSH, 0, 0, 0)?)?;
        self.one_reply(&mut |_| {})
    }

    /// Reads, and waits for the data. The server is expected to send it in order.
    pub fn read(&mut self, at: u64, length: usize) -> Result<Vec<u8>> {
        self.stream.write_all(&request(READ, 0, at, length)?)?;
        let mut data = Vec::with_capacity(length);
        let mut left = vec![length];
        let mut done = false;
        while !done {
            self.receive(&mut left, &mut |_| done = true, &mut |bytes, zeros| {
                data.extend_from_slice(bytes);
                data.resize(data.len() + zeros, 0);
            })?;
        }
        ensure!(data.len() == length, "{} bytes instead of {length}", data.len());
        Ok(data)
    }

    fn one_reply(&mut self, seen: &mut dyn FnMut(usize)) -> Result<()> {
        let mut done = false;
        while !done {
            self.receive(
                &mut [0],
                &mut |slot| {
                    seen(slot);
                    done = true;
                },
                &mut |_, _| {},
            )?;
        }
        Ok(())
    }

    /// Takes what the socket has, at least one byte. `left` says for each slot how many bytes its read still has to
    /// return; `done` is told the slots that are answered, `data` the bytes and zeros that came.
    fn receive(
        &mut self,
        left: &mut [usize],
        done: &mut dyn FnMut(usize),
        data: &mut dyn FnMut(&[u8], usize),
    ) -> Result<()> {
        let count = self.stream.read(&mut self.received[self.filled..])?;
        ensure!(count > 0, "the server closed the connection");
        self.filled += count;
        let mut at = 0;
        loop {
            let bytes = &self.received[at..self.filled];
            if let Some(payload) = &mut self.payload {
                let take = payload.left_bytes.min(bytes.len());
                data(&bytes[..take], 0);
                at += take;
                payload.left_bytes -= take;
                if payload.left_bytes > 0 {
                    break;
                }
                if payload.last {
                    ensure!(left[payload.slot] == 0, "a read came back short");
                    done(payload.slot);
                }
                self.payload = None;
                continue;
            }
            if bytes.len() < 16 {
                break;
            }
            let slot = usize::try_from(u64_at(bytes, 8))?;
            ensure!(slot < left.len(), "a reply to nothing that was asked");
            match u32_at(bytes, 0) {
                SIMPLE_REPLY_MAGIC => {
                    ensure!(u32_at(bytes, 4) == 0, "error {}", u32_at(bytes, 4));
                    at += 16;
                    self.payload = Some(Payload { slot, left_bytes: left[slot], last: true });
                    left[slot] = 0;
                }
                STRUCTURED_REPLY_MAGIC => {
                    if bytes.len() < 20 {
                        break;
                    }
                    let last = u16_at(bytes, 4) & CHUNK_DONE != 0;
                    let length = usize::try_from(u32_at(bytes, 16))?;
                    let (head, returned, zeros) = match u16_at(bytes, 6) {
                        CHUNK_NONE => (20, 0, 0),
                        CHUNK_DATA => (28, length.checked_sub(8).context("a short chunk")?, 0),
                        CHUNK_HOLE if bytes.len() < 32 => break,
                        CHUNK_HOLE => (32, 0, usize::try_from(u32_at(bytes, 28))?),
                        other => bail!("a chunk of type {other:#x}"),
                    };
                    if bytes.len() < head {
                        break;
                    }
                    let all = returned + zeros;
                    left[slot] = left[slot].checked_sub(all).context("a read came back long")?;
                    data(&[], zeros);
                    at += head;
                    self.payload = Some(Payload { slot, left_bytes: returned, last });
                }
                other => bail!("{other:#x} is no reply"),
            }
        }
        self.received.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The server may be gone.
        if let Ok(request) = request(DISCONNECT, 0, 0, 0) {
            self.stream.write_all(&request).ok();
        }
    }
}

/// Connections that wait for a load.
pub struct Client {
    connections: Vec<Connection>,
}

impl Client {
    pub fn connect(address: &Address, export: &str, replies: Replies, count: usize) -> Result<Self> {
        let connect = |_| Connection::new(address, export, replies);
        let connections = (0..count).map(connect).collect::<Result<_>>()?;
        Ok(Self { connections })
    }

    /// Runs a load for so long; all that was asked is answered when it returns.
    pub fn run(&mut self, load: &Load, time: Duration) -> Result<Seen> {
        let barrier = Barrier::new(self.connections.len() + 1);
        let stop = AtomicBool::new(false);
        let count = u64::try_from(self.connections.len())?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(&mut self.connections)
                .map(|(index, connection)| {
                    let (barrier, stop) = (&barrier, &stop);
                    scope.spawn(move || {
                        barrier.wait();
                        let result = Run::new(connection, load, index, count).run(stop);
                        // One that failed ends the others.
                        stop.fetch_or(result.is_err(), Ordering::Relaxed);
                        result
                    })
                })
                .collect();
            barrier.wait();
            let started = Instant::now();
            while started.elapsed() < time && !stop.load(Ordering::Relaxed) {
                std::thread::sleep((time.saturating_sub(started.elapsed())).min(Duration::from_millis(50)));
            }
            stop.store(true, Ordering::Relaxed);
            let seconds = started.elapsed().as_secs_f64();
            let mut latency = histogram();
            for thread in threads {
                latency.add(thread.join().map_err(|_| anyhow::anyhow!("a client's thread panicked"))??)?;
            }
            Ok(Seen { requests: latency.len(), seconds, latency })
        })
    }
}

pub fn histogram() -> Histogram<u64> {
    // Up to a minute: nothing takes longer, and a bound keeps recording cheap.
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("3 digits")
}

/// One connection under load.
struct Run<'a> {
    connection: &'a mut Connection,
    load: &'a Load,
    payload: Vec<u8>,
    /// When the request of a slot was sent.
    sent: Vec<Instant>,
    /// Bytes that the read of a slot still has to return.
    left: Vec<usize>,
    free: Vec<usize>,
    next: u64,
    random: u64,
    headers: Vec<[u8; 28]>,
    latency: Histogram<u64>,
}

impl<'a> Run<'a> {
    fn new(connection: &'a mut Connection, load: &'a Load, index: u64, count: u64) -> Self {
        let requests = connection.size_bytes / load.request_bytes as u64;
        let mut payload = vec![0; load.request_bytes];
        blake3::Hasher::new().update(&index.to_le_bytes()).finalize_xof().fill(&mut payload);
        Self {
            payload,
            sent: vec![Instant::now(); load.depth],
            left: vec![0; load.depth],
            free: (0..load.depth).collect(),
            next: requests / count * index,
            random: rand::random::<u64>() | 1,
            headers: Vec::with_capacity(load.depth),
            latency: histogram(),
            connection,
            load,
        }
    }

    fn run(mut self, stop: &AtomicBool) -> Result<Histogram<u64>> {
        self.send()?;
        while self.free.len() < self.load.depth {
            let now = &mut None;
            let (sent, free, latency) = (&self.sent, &mut self.free, &mut self.latency);
            let mut answered = |slot: usize| {
                let now = now.get_or_insert_with(Instant::now);
                latency.saturating_record(u64::try_from((*now - sent[slot]).as_nanos()).unwrap_or(u64::MAX));
                free.push(slot);
            };
            self.connection.receive(&mut self.left, &mut answered, &mut |_, _| {})?;
            if !stop.load(Ordering::Relaxed) {
                self.send()?;
            }
        }
        Ok(self.latency)
    }

    /// Sends all that may be in flight, in one call.
    fn send(&mut self) -> Result<()> {
        if self.free.is_empty() {
            return Ok(());
        }
        let length = self.load.request_bytes;
        let requests = self.connection.size_bytes / length as u64;
        let now = Instant::now();
        self.headers.clear();
        for slot in self.free.drain(..) {
            let index = match self.load.order {
                Order::Random => {
                    // xorshift64: a request costs the client next to nothing.
                    self.random ^= self.random << 13;
                    self.random ^= self.random >> 7;
                    self.random ^= self.random << 17;
                    self.random % requests
                }
                Order::Sequential => {
                    self.next += 1;
                    self.next % requests
                }
            };
            let kind = if self.load.kind == Kind::Read { READ } else { WRITE };
            self.headers.push(request(kind, slot as u64, index * length as u64, length)?);
            self.sent[slot] = now;
            self.left[slot] = if self.load.kind == Kind::Read { length } else { 0 };
        }
        let mut pieces: Vec<IoSlice<'_>> = Vec::with_capacity(self.headers.len() * 2);
        for header in &self.headers {
            pieces.push(IoSlice::new(header));
            if self.load.kind == Kind::Write {
                pieces.push(IoSlice::new(&self.payload));
            }
        }
        let mut pieces = pieces.as_mut_slice();
        while !pieces.is_empty() {
            let count = self.connection.stream.write_vectored(&pieces[..pieces.len().min(PIECES_MAX)])?;
            ensure!(count > 0, "the server takes nothing");
            IoSlice::advance_slices(&mut pieces, count);
        }
        Ok(())
    }
}

fn request(kind: u16, cookie: u64, at: u64, length: usize) -> Result<[u8; 28]> {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&at.to_be_bytes());
    bytes[24..].copy_from_slice(&u32::try_from(length)?.to_be_bytes());
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}
