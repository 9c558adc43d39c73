//! Replies on their way to the client. Pure: results in, bytes out.
//!
//! Owns: the layout of simple, structured and extended replies, and the queue of bytes that the socket has not taken yet.
//! Does not own: when a reply may be sent (the transmission).

use super::handshake::Replies;
use super::session::Refusal;
use super::status::Status;
use super::wire::{
    CHUNK_LEN_MAX, ChunkHeader, Cookie, Headers, MESSAGE_BYTES_MAX, REPLY_BLOCK_STATUS,
    REPLY_BLOCK_STATUS_EXT, REPLY_ERROR, REPLY_ERROR_OFFSET, REPLY_FLAG_DONE, REPLY_NONE, REPLY_OFFSET_DATA,
    REPLY_OFFSET_HOLE, SIMPLE_REPLY_MAGIC, cut,
};
use crate::block::Keep;
use crate::disk::DiskFile;
use crate::geometry::{ByteRange, len_of};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;

/// A stretch of zeros shorter than this goes as data: a chunk of its own would cost the client more.
const HOLE_BYTES_MIN: u64 = 4096;
/// Data up to this length is copied behind its header, so that many replies leave in one stretch.
const COPY_BYTES_MAX: usize = 16 * 1024;
/// A header up to this length is copied out of the way of data that is not.
const SEAL_COPY_BYTES_MAX: usize = 1024;

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What a read found: bytes, where they are, or zeros.
pub enum Part {
    Data(Bytes),
    /// Only for a stream that takes files.
    File(FileSpan),
    Zeros {
        len_bytes: u64,
    },
}

/// A stretch of a file, which goes to the client without a copy in this process: what the file holds when the client
/// takes it, so no one may put other data there.
pub struct FileSpan {
    pub file: Arc<dyn DiskFile>,
    pub offset_bytes: u64,
    pub len_bytes: u64,
    pub keep: Keep,
}

impl Part {
    fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::File(span) => span.len_bytes,
            Self::Zeros { len_bytes } => *len_bytes,
        }
    }
}

/// Whether more chunks of the same reply follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chunk {
    Last,
    MoreFollow,
}

impl Chunk {
    fn flags(self) -> u16 {
        match self {
            Self::Last => REPLY_FLAG_DONE,
            Self::MoreFollow => 0,
        }
    }
}

/// Bytes for the client, in order.
#[derive(Default)]
pub struct Outbox {
    headers: Headers,
    sealed: VecDeque<Sealed>,
    /// How many of them are files.
    files: usize,
    tail: BytesMut,
    queued_bytes: u64,
    taken_bytes: u64,
}

enum Sealed {
    Bytes(Bytes),
    File(FileSpan),
}

impl Outbox {
    /// For replies with such headers.
    pub fn new(headers: Headers) -> Self {
        Self { headers, ..Self::default() }
    }

    /// Counts all bytes ever put in: a place in the stream.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// Counts all bytes ever taken out.
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }

    /// Forgets what was not taken.
    pub fn clear(&mut self) {
        self.sealed.clear();
        self.files = 0;
        self.tail = BytesMut::new();
        self.taken_bytes = self.queued_bytes;
    }

    /// That a request without data is done.
    pub fn put_done(&mut self, cookie: Cookie) {
        match self.headers {
            Headers::Compact => self.put_simple(cookie, 0),
            Headers::Extended => self.put_none(cookie),
        }
    }

    /// A simple reply without data, or the header of one with data that follows.
    pub fn put_simple(&mut self, cookie: Cookie, errno_code: u32) {
        self.tail.reserve(16);
        self.tail.put_u32(SIMPLE_REPLY_MAGIC);
        self.tail.put_u32(errno_code);
        self.tail.put_u64(cookie.number);
        self.queued_bytes += 16;
    }

    /// An error as the only reply, with its text where the client can take one.
    pub fn put_error(&mut self, cookie: Cookie, replies: Replies, refusal: &Refusal) {
        match replies {
            Replies::Simple => self.put_simple(cookie, refusal.errno.code()),
            Replies::Structured => {
                let message = cut(&refusal.message, MESSAGE_BYTES_MAX);
                self.put_chunk(cookie, REPLY_ERROR, Chunk::Last, 6 + message.len() as u64);
                self.put_error_fields(refusal, message);
            }
        }
    }

    /// The last chunk of a read that failed at `offset_bytes`. What was sent before it stays good.
    pub fn put_error_at(&mut self, cookie: Cookie, refusal: &Refusal, offset_bytes: u64) {
        let message = cut(&refusal.message, MESSAGE_BYTES_MAX);
        self.put_chunk(cookie, REPLY_ERROR_OFFSET, Chunk::Last, 14 + message.len() as u64);
        self.put_error_fields(refusal, message);
        self.put_u64(offset_bytes);
    }

    /// The chunk that ends a reply whose content went before.
    pub fn put_none(&mut self, cookie: Cookie) {
        self.put_chunk(cookie, REPLY_NONE, Chunk::Last, 0);
    }

    /// Content chunks for the parts of a read, which lie end to end from `start_bytes` on.
    pub fn put_parts(&mut self, cookie: Cookie, start_bytes: u64, parts: Vec<Part>, chunk: Chunk) {
        let mut at_bytes = start_bytes;
        let mut parts = parts.into_iter().filter(|part| part.len_bytes() > 0).peekable();
        while let Some(first) = parts.next() {
            let hole = is_hole(&first);
            let mut len_bytes = first.len_bytes();
            let mut run = vec![first];
            while let Some(part) = parts.next_if(|part| is_hole(part) == hole) {
                len_bytes += part.len_bytes();
                run.push(part);
            }
            let this = if parts.peek().is_none() { chunk } else { Chunk::MoreFollow };
            if hole {
                self.put_hole(cookie, ByteRange::new(at_bytes, len_bytes), this);
            } else {
                self.put_data_header(cookie, ByteRange::new(at_bytes, len_bytes), this);
                self.put_raw(run);
            }
            at_bytes += len_bytes;
        }
    }

    /// The only content chunk of a read that must not be fragmented, all of it at hand.
    pub fn put_one(&mut self, cookie: Cookie, range: ByteRange, parts: Vec<Part>) {
        if parts.iter().all(|part| matches!(part, Part::Zeros { .. })) {
            self.put_hole(cookie, range, Chunk::Last);
        } else {
            self.put_data_header(cookie, range, Chunk::Last);
            self.put_raw(parts);
        }
    }

    /// The head of a content chunk; exactly that many bytes have to follow.
    pub fn put_data_header(&mut self, cookie: Cookie, range: ByteRange, chunk: Chunk) {
        self.put_chunk(cookie, REPLY_OFFSET_DATA, chunk, 8 + range.len());
        self.put_u64(range.start());
    }

    /// Data without a header.
    pub fn put_raw(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Data(data) => self.put_data(data),
                Part::File(span) => self.put_file(span),
                Part::Zeros { len_bytes } => self.put_zeros(len_bytes),
            }
        }
    }

    /// Zeros without a header; they take no memory however many they are.
    pub fn put_zeros(&mut self, len_bytes: u64) {
        let mut left = len_of(len_bytes);
        while left > 0 {
            let len = left.min(ZEROS.len());
            self.put_data(Bytes::from_static(&ZEROS[..len]));
            left -= len;
        }
    }

    /// A chunk for each metadata context. There is at least one.
    pub fn put_block_status(&mut self, cookie: Cookie, answers: &[Status]) {
        for (index, status) in answers.iter().enumerate() {
            let chunk = if index + 1 == answers.len() { Chunk::Last } else { Chunk::MoreFollow };
            let count = status.stretches.len();
            let (kind, len) = match self.headers {
                Headers::Compact => (REPLY_BLOCK_STATUS, 4 + 8 * count),
                Headers::Extended => (REPLY_BLOCK_STATUS_EXT, 8 + 16 * count),
            };
            self.put_chunk(cookie, kind, chunk, len as u64);
            self.tail.reserve(len);
            self.tail.put_u32(status.context_id);
            match self.headers {
                Headers::Compact => {
                    for stretch in &status.stretches {
                        self.tail.put_u32(short(stretch.len_bytes));
                        self.tail.put_u32(stretch.state);
                    }
                }
                Headers::Extended => {
                    self.tail.put_u32(short(count as u64));
                    for stretch in &status.stretches {
                        self.tail.put_u64(stretch.len_bytes);
                        self.tail.put_u64(u64::from(stretch.state));
                    }
                }
            }
            self.queued_bytes += len as u64;
        }
    }

    fn put_hole(&mut self, cookie: Cookie, range: ByteRange, chunk: Chunk) {
        self.put_chunk(cookie, REPLY_OFFSET_HOLE, chunk, 12);
        self.put_u64(range.start());
        self.tail.put_u32(short(range.len()));
        self.queued_bytes += 4;
    }

    fn put_chunk(&mut self, cookie: Cookie, kind: u16, chunk: Chunk, len_bytes: u64) {
        self.tail.reserve(CHUNK_LEN_MAX + 16);
        let header = ChunkHeader { flags: chunk.flags(), kind, cookie, len_bytes: short(len_bytes) };
        self.queued_bytes += header.put(self.headers, &mut self.tail) as u64;
    }

    fn put_error_fields(&mut self, refusal: &Refusal, message: &str) {
        self.tail.reserve(14 + message.len());
        self.tail.put_u32(refusal.errno.code());
        self.tail.put_u16(u16::try_from(message.len()).expect("a cut message is short"));
        self.tail.put_slice(message.as_bytes());
        self.queued_bytes += 6 + message.len() as u64;
    }

    fn put_u64(&mut self, value: u64) {
        self.tail.put_u64(value);
        self.queued_bytes += 8;
    }

    fn put_data(&mut self, data: Bytes) {
        self.queued_bytes += data.len() as u64;
        if data.len() <= COPY_BYTES_MAX {
            self.tail.extend_from_slice(&data);
        } else {
            self.seal();
            self.sealed.push_back(Sealed::Bytes(data));
        }
    }

    fn put_file(&mut self, span: FileSpan) {
        self.queued_bytes += span.len_bytes;
        self.seal();
        self.files += 1;
        self.sealed.push_back(Sealed::File(span));
    }

    /// Puts `len` bytes in that `fill` knows; `false`, and none of them, if it does not. `head` puts what is to
    /// stand before them.
    pub fn put_filled(
        &mut self,
        len: usize,
        head: impl FnOnce(&mut Self),
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let (tail_bytes, queued_bytes) = (self.tail.len(), self.queued_bytes);
        head(self);
        let start = self.tail.len();
        self.tail.resize(start + len, 0);
        self.queued_bytes += len as u64;
        let filled = fill(&mut self.tail[start..]);
        if !filled {
            self.tail.truncate(tail_bytes);
            self.queued_bytes = queued_bytes;
        }
        filled
    }

    fn seal(&mut self) {
        if self.tail.is_empty() {
            return;
        }
        // A copy of what is short leaves the buffer whole for the replies after it.
        let bytes = if self.tail.len() <= SEAL_COPY_BYTES_MAX {
            let bytes = Bytes::copy_from_slice(&self.tail);
            self.tail.clear();
            bytes
        } else {
            self.tail.split().freeze()
        };
        self.sealed.push_back(Sealed::Bytes(bytes));
    }

    /// The file at the front, if one is.
    pub fn front_file(&self) -> Option<&FileSpan> {
        match self.sealed.front() {
            Some(Sealed::File(span)) => Some(span),
            Some(Sealed::Bytes(_)) | None => None,
        }
    }

    /// Copies what is at hand of files, so that they need not be kept for a client that does not read.
    pub fn copy_files(&mut self) {
        for sealed in &mut self.sealed {
            if let Sealed::File(span) = sealed {
                let mut data = vec![0; len_of(span.len_bytes)];
                if span.file.try_read_at(&mut data, span.offset_bytes).is_ok_and(|got| got == data.len()) {
                    *sealed = Sealed::Bytes(data.into());
                    self.files -= 1;
                }
            }
        }
    }

    /// Whether there is a file in it.
    pub fn has_file(&self) -> bool {
        self.files > 0
    }

    /// Takes a buffer to gather replies in, where it has none.
    pub fn lend(&mut self, buffer: &mut BytesMut) {
        if self.tail.is_empty() && self.tail.capacity() < buffer.capacity() {
            self.tail = std::mem::take(buffer);
        }
    }

    /// Gives the buffer back, unless replies are in it.
    pub fn give_back(&mut self, buffer: &mut BytesMut) {
        if self.tail.is_empty() {
            *buffer = std::mem::take(&mut self.tail);
        }
    }
}

/// Bytes only: who takes files asks for [`Outbox::front_file`] first.
impl Buf for Outbox {
    fn remaining(&self) -> usize {
        len_of(self.queued_bytes - self.taken_bytes)
    }

    fn chunk(&self) -> &[u8] {
        match self.sealed.front() {
            Some(Sealed::Bytes(bytes)) => bytes,
            Some(Sealed::File(_)) => &[],
            None => &self.tail,
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (slice, sealed) in slices.iter_mut().zip(&self.sealed) {
            let Sealed::Bytes(bytes) = sealed else { return count };
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        if count < slices.len() && !self.tail.is_empty() {
            slices[count] = IoSlice::new(&self.tail);
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut len: usize) {
        self.taken_bytes += len as u64;
        while let Some(front) = self.sealed.front_mut() {
            match front {
                Sealed::Bytes(bytes) if len < bytes.len() => {
                    bytes.advance(len);
                    return;
                }
                Sealed::File(span) if (len as u64) < span.len_bytes => {
                    span.offset_bytes += len as u64;
                    span.len_bytes -= len as u64;
                    return;
                }
                Sealed::Bytes(bytes) => len -= bytes.len(),
                Sealed::File(span) => {
                    len -= len_of(span.len_bytes);
                    self.files -= 1;
                }
            }
            self.sealed.pop_front();
        }
        self.tail.advance(len);
        if self.tail.is_empty() {
            self.tail.clear();
        }
    }
}

fn is_hole(part: &Part) -> bool {
    matches!(part, Part::Zeros { len_bytes } if *len_bytes >= HOLE_BYTES_MIN)
}

/// A length in a reply that has 32 bits: that of a payload, which is limited, or of a part of a request with a compact
/// header.
fn short(len_bytes: u64) -> u32 {
    u32::try_from(len_bytes).expect("payloads are limited, and compact requests shorter than 4 GiB")
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
