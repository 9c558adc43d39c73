//! The transmission phase as the server hears it. Pure: bytes in, checked requests out.
//!
//! Owns: cutting the client's bytes into requests and pieces of payload, and judging each request against the disk
//! and what was negotiated.
//! Does not own: running requests ([`super::work`]), replies ([`super::reply`]), or how many run at a time
//! (the transmission).

use super::context::{CONTEXTS_MAX, ContextSet};
use super::handshake::{Negotiated, Replies};
use super::wire::{
    CACHE_BYTES_MAX, CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE, CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, Cookie, EXTENDED_REQUEST_LEN, EXTENTS_MAX, Errno, Fields, Headers, PAYLOAD_BYTES_MAX,
    REQUEST_LEN, RequestHeader,
};
use crate::block::{BlockError, Durability};
use crate::frontend::{Operation, check};
use crate::geometry::{ByteRange, Geometry, SECTOR_BYTES};
use bytes::{Buf, Bytes};
use std::ops::Deref;

/// What came of the bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Nothing whole is left: more bytes, into [`Session::payload_space`] where there is one.
    NeedInput,
    /// A request to run.
    Request { cookie: Cookie, request: Request },
    /// A write whose payload follows: say with [`Session::receive`] how much to gather at a time.
    WriteBegins { cookie: Cookie, range: ByteRange, durability: Durability },
    /// The next piece of that payload. With `Rest::None` it is the last; else say again how much to gather.
    WritePiece { offset_bytes: u64, data: Payload, rest: Rest },
    /// A request that is answered with an error and not run.
    Refused { cookie: Cookie, refusal: Refusal },
    /// The client says goodbye: finish what is under way.
    Disconnect,
}

/// What a client wrote, at the beginning of a buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Payload {
    buffer: Vec<u8>,
    len: usize,
}

impl Payload {
    /// The buffer, to be used again.
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl From<Payload> for Bytes {
    fn from(mut payload: Payload) -> Self {
        // Nothing short keeps the memory of something long.
        if payload.len < payload.buffer.capacity() / 2 {
            return Self::copy_from_slice(&payload);
        }
        payload.buffer.truncate(payload.len);
        Self::from(payload.buffer)
    }
}

/// Whether more of a payload follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rest {
    None,
    Follows,
}

/// A request without payload, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    Read { range: ByteRange, fragments: Fragments },
    Flush,
    Trim { range: ByteRange, durability: Durability },
    WriteZeroes { range: ByteRange, durability: Durability },
    Cache { range: ByteRange },
    BlockStatus { range: ByteRange, extents_max: usize, contexts: ContextSet },
}

/// Whether a structured reply to a read may have several content chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragments {
    Allowed,
    One,
}

/// Why a request is not run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub errno: Errno,
    /// For people.
    pub message: String,
}

/// The client does not speak the protocol: there is no way to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadStream {
    #[error("a request began with the wrong magic number")]
    BadMagic,
    #[error("a payload is longer than the largest that was announced")]
    PayloadTooLong,
}

/// Longest payload of a request for block status: a length, and an id for each context.
const FILTER_LEN_MAX: u64 = 8 + 4 * CONTEXTS_MAX as u64;

/// What one client says.
#[derive(Debug)]
pub struct Session {
    negotiated: Negotiated,
    state: State,
}

#[derive(Debug)]
enum State {
    Header,
    /// A write was announced, and the rest of its payload not yet asked for.
    Announced {
        left: ByteRange,
    },
    Payload {
        /// At least as long as the piece, of which so much has come.
        buffer: Vec<u8>,
        filled: usize,
        piece_len: usize,
        left: ByteRange,
    },
    /// The payload of a request for block status, which says what of it is wanted.
    Filter {
        header: RequestHeader,
    },
    Skip {
        left_bytes: u64,
        cookie: Cookie,
        refusal: Refusal,
    },
    Ended,
}

impl Session {
    pub fn new(negotiated: Negotiated) -> Self {
        Self { negotiated, state: State::Header }
    }

    /// The next thing in `input`, taking the bytes it uses.
    ///
    /// # Errors
    /// What follows in the stream means nothing: close the connection.
    pub fn next<I>(&mut self, input: &mut I, geometry: &Geometry) -> Result<Event, BadStream>
    where
        I: Buf + Deref<Target = [u8]>,
    {
        match &mut self.state {
            State::Header => self.header(input, geometry),
            State::Payload { buffer, filled, piece_len, left } => {
                let taken = input.len().min(*piece_len - *filled);
                buffer[*filled..*filled + taken].copy_from_slice(&input[..taken]);
                input.advance(taken);
                *filled += taken;
                if *filled < *piece_len {
                    return Ok(Event::NeedInput);
                }
                let data = Payload { buffer: std::mem::take(buffer), len: *piece_len };
                let offset_bytes = left.start();
                let end_bytes = offset_bytes + *piece_len as u64;
                let left = ByteRange::new(end_bytes, left.end() - end_bytes);
                let rest = if left.is_empty() { Rest::None } else { Rest::Follows };
                self.state = match rest {
                    Rest::None => State::Header,
                    Rest::Follows => State::Announced { left },
                };
                Ok(Event::WritePiece { offset_bytes, data, rest })
            }
            State::Skip { left_bytes, cookie, refusal } => {
                let skipped = usize::try_from(*left_bytes).unwrap_or(usize::MAX).min(input.len());
                input.advance(skipped);
                *left_bytes -= skipped as u64;
                if *left_bytes > 0 {
                    return Ok(Event::NeedInput);
                }
                let refused = Event::Refused { cookie: *cookie, refusal: refusal.clone() };
                self.state = State::Header;
                Ok(refused)
            }
            State::Filter { header } => {
                let header = *header;
                let len = crate::geometry::len_of(header.len_bytes);
                if input.len() < len {
                    return Ok(Event::NeedInput);
                }
                self.state = State::Header;
                let judged = self.filtered_block_status(&header, &input[..len], geometry);
                input.advance(len);
                Ok(event(&header, judged))
            }
            State::Announced { .. } | State::Ended => Ok(Event::NeedInput),
        }
    }

    /// Whether [`Session::receive`] has to be called before anything more comes of the input.
    pub fn is_announced(&self) -> bool {
        matches!(self.state, State::Announced { .. })
    }

    /// Gathers the next piece of the announced write, of at most `piece_bytes_max`, a power of two unless it is all of
    /// the payload, in `buffer`. Pieces end at multiples of it, so that only the first and last can be part of a block.
    pub fn receive(&mut self, piece_bytes_max: usize, mut buffer: Vec<u8>) {
        if let State::Announced { left } = self.state {
            let max = piece_bytes_max.max(1) as u64;
            let len = if left.len() <= max { left.len() } else { max - left.start() % max };
            let piece_len = crate::geometry::len_of(len);
            // Nothing short keeps the memory of something long, while it waits for the client.
            if buffer.len() / 2 > piece_len {
                buffer = Vec::new();
            }
            if buffer.len() < piece_len {
                buffer.resize(piece_len, 0);
            }
            self.state = State::Payload { buffer, filled: 0, piece_len, left };
        }
    }

    /// The announced write's payload, if all of it has come.
    pub fn whole_payload<'a>(&self, input: &'a [u8]) -> Option<&'a [u8]> {
        match &self.state {
            State::Announced { left } => input.get(..crate::geometry::len_of(left.len())),
            _ => None,
        }
    }

    /// The announced write was done with [`Session::whole_payload`], which the caller takes out of the input.
    pub fn payload_was_used(&mut self) {
        if let State::Announced { .. } = self.state {
            self.state = State::Header;
        }
    }

    /// Skips what is left of the payload of the write under way; then it is [`Event::Refused`].
    pub fn skip_payload(&mut self, cookie: Cookie, refusal: Refusal) {
        if let State::Announced { left } | State::Payload { left, .. } = &self.state {
            self.state = State::Skip { left_bytes: left.len(), cookie, refusal };
        }
    }

    /// Where the next bytes from the client may go directly, once `next` has taken all input.
    pub fn payload_space(&mut self) -> Option<&mut [u8]> {
        match &mut self.state {
            State::Payload { buffer, filled, piece_len, .. } => Some(&mut buffer[*filled..*piece_len]),
            State::Header
            | State::Announced { .. }
            | State::Filter { .. }
            | State::Skip { .. }
            | State::Ended => None,
        }
    }

    /// So many bytes were put there.
    pub fn payload_came(&mut self, bytes: usize) {
        if let State::Payload { filled, piece_len, .. } = &mut self.state {
            *filled = (*filled + bytes).min(*piece_len);
        }
    }

    /// Bytes of a request before its payload.
    pub fn header_len(&self) -> usize {
        match self.negotiated.headers {
            Headers::Compact => REQUEST_LEN,
            Headers::Extended => EXTENDED_REQUEST_LEN,
        }
    }

    /// Whether no request is half received, beyond bytes that `next` has not taken.
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header | State::Ended)
    }

    fn header<I>(&mut self, input: &mut I, geometry: &Geometry) -> Result<Event, BadStream>
    where
        I: Buf + Deref<Target = [u8]>,
    {
        let Some(parsed) = parse(self.negotiated.headers, input) else { return Ok(Event::NeedInput) };
        let header = parsed?;
        if header.command == CMD_DISC {
            self.state = State::Ended;
            return Ok(Event::Disconnect);
        }
        let write = header.command == CMD_WRITE;
        match self.negotiated.headers {
            Headers::Compact if write => self.payload(&header, input, geometry),
            // The protocol wants the flag with each write. QEMU as a client leaves it away, and as a server does not
            // miss it; its payload follows all the same.
            Headers::Extended if write || header.flags & CMD_FLAG_PAYLOAD_LEN != 0 => {
                let header = RequestHeader { flags: header.flags & !CMD_FLAG_PAYLOAD_LEN, ..header };
                if header.len_bytes > u64::from(PAYLOAD_BYTES_MAX) {
                    return Err(BadStream::PayloadTooLong);
                }
                self.payload(&header, input, geometry)
            }
            Headers::Compact | Headers::Extended => Ok(event(&header, self.judge(&header, geometry))),
        }
    }

    /// A request whose length is that of the payload that follows.
    fn payload<I>(
        &mut self,
        header: &RequestHeader,
        input: &mut I,
        geometry: &Geometry,
    ) -> Result<Event, BadStream>
    where
        I: Buf + Deref<Target = [u8]>,
    {
        let skip = |refusal| State::Skip { left_bytes: header.len_bytes, cookie: header.cookie(), refusal };
        self.state = match header.command {
            CMD_WRITE => match self.write(header, geometry) {
                Ok(event) => return Ok(event),
                Err(refusal) => skip(refusal),
            },
            CMD_BLOCK_STATUS if header.len_bytes <= FILTER_LEN_MAX => State::Filter { header: *header },
            CMD_BLOCK_STATUS => skip(Refusal::invalid("more metadata contexts than were selected")),
            _ => skip(Refusal::invalid("this command has no payload")),
        };
        self.next(input, geometry)
    }

    fn write(&mut self, header: &RequestHeader, geometry: &Geometry) -> Result<Event, Refusal> {
        allow_flags(header, 0)?;
        bounded_payload(header, Errno::Inval)?;
        let range = in_disk(header, geometry, Operation::Write)?;
        let (cookie, durability) = (header.cookie(), durability(header));
        if range.is_empty() {
            return Ok(Event::Request { cookie, request: Request::WriteZeroes { range, durability } });
        }
        self.state = State::Announced { left: range };
        Ok(Event::WriteBegins { cookie, range, durability })
    }

    fn filtered_block_status(
        &self,
        header: &RequestHeader,
        payload: &[u8],
        geometry: &Geometry,
    ) -> Result<Request, Refusal> {
        let wrong =
            || Refusal::invalid("the payload names contexts twice, or that were not selected, or none");
        let mut fields = Fields(payload);
        let len_bytes = fields.u64().ok_or_else(wrong)?;
        let mut ids = Vec::new();
        while !fields.is_empty() {
            ids.push(fields.u32().ok_or_else(wrong)?);
        }
        let contexts = ContextSet::of_ids(ids, self.negotiated.contexts).ok_or_else(wrong)?;
        if contexts.is_empty() {
            return Err(wrong());
        }
        block_status(&RequestHeader { len_bytes, ..*header }, contexts, geometry)
    }

    fn judge(&self, header: &RequestHeader, geometry: &Geometry) -> Result<Request, Refusal> {
        match header.command {
            CMD_READ => {
                let structured = self.negotiated.replies == Replies::Structured;
                allow_flags(header, if structured { CMD_FLAG_DF } else { 0 })?;
                bounded_payload(header, if structured { Errno::Overflow } else { Errno::Inval })?;
                let range = in_disk(header, geometry, Operation::Read)?;
                let one = header.flags & CMD_FLAG_DF != 0;
                Ok(Request::Read { range, fragments: if one { Fragments::One } else { Fragments::Allowed } })
            }
            CMD_FLUSH => {
                allow_flags(header, 0)?;
                if header.offset_bytes != 0 || header.len_bytes != 0 {
                    return Err(Refusal::invalid("a flush has neither offset nor length"));
                }
                Ok(Request::Flush)
            }
            CMD_TRIM => {
                allow_flags(header, 0)?;
                // The protocol calls a trim beyond the end invalid, where a write would be out of space.
                let range =
                    in_disk(header, geometry, Operation::Write).map_err(|refusal| match refusal.errno {
                        Errno::NoSpc => Refusal { errno: Errno::Inval, ..refusal },
                        _ => refusal,
                    })?;
                // A hint: parts of sectors at its ends stay as they are.
                Ok(Request::Trim { range: range.shrink_to(SECTOR_BYTES), durability: durability(header) })
            }
            CMD_WRITE_ZEROES => {
                allow_flags(header, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO)?;
                let range = in_disk(header, geometry, Operation::Write)?;
                if header.flags & CMD_FLAG_FAST_ZERO != 0 && !range.is_aligned(SECTOR_BYTES) {
                    return Err(Refusal::new(Errno::NotSup, "parts of sectors are not zeroed fast"));
                }
                Ok(Request::WriteZeroes { range, durability: durability(header) })
            }
            CMD_CACHE => {
                allow_flags(header, 0)?;
                let range = in_disk(header, geometry, Operation::Read)?;
                Ok(Request::Cache { range: ByteRange::new(range.start(), range.len().min(CACHE_BYTES_MAX)) })
            }
            CMD_BLOCK_STATUS => block_status(header, self.negotiated.contexts, geometry),
            _ => Err(Refusal::invalid("unknown command")),
        }
    }
}

impl Refusal {
    /// An error of the disk, as the client is told.
    pub fn of(error: &BlockError, operation: Operation) -> Self {
        Self { errno: Errno::of(error, operation), message: error.to_string() }
    }

    fn new(errno: Errno, message: &str) -> Self {
        Self { errno, message: message.to_owned() }
    }

    fn invalid(message: &str) -> Self {
        Self::new(Errno::Inval, message)
    }
}

/// The header that `input` begins with, taken; `None` if it is not whole.
fn parse<I>(headers: Headers, input: &mut I) -> Option<Result<RequestHeader, BadStream>>
where
    I: Buf + Deref<Target = [u8]>,
{
    let (parsed, len) = match headers {
        Headers::Compact => (RequestHeader::parse(input.first_chunk()?), REQUEST_LEN),
        Headers::Extended => (RequestHeader::parse_extended(input.first_chunk()?), EXTENDED_REQUEST_LEN),
    };
    input.advance(len);
    Some(parsed.ok_or(BadStream::BadMagic))
}

fn event(header: &RequestHeader, judged: Result<Request, Refusal>) -> Event {
    let cookie = header.cookie();
    match judged {
        Ok(request) => Event::Request { cookie, request },
        Err(refusal) => Event::Refused { cookie, refusal },
    }
}

fn block_status(
    header: &RequestHeader,
    contexts: ContextSet,
    geometry: &Geometry,
) -> Result<Request, Refusal> {
    allow_flags(header, CMD_FLAG_REQ_ONE)?;
    if contexts.is_empty() {
        return Err(Refusal::invalid("no metadata context was selected"));
    }
    if header.len_bytes == 0 {
        return Err(Refusal::invalid("block status of nothing"));
    }
    let range = in_disk(header, geometry, Operation::Read)?;
    let one = header.flags & CMD_FLAG_REQ_ONE != 0;
    Ok(Request::BlockStatus { range, extents_max: if one { 1 } else { EXTENTS_MAX }, contexts })
}

fn durability(header: &RequestHeader) -> Durability {
    if header.flags & CMD_FLAG_FUA == 0 { Durability::Acknowledged } else { Durability::Flushed }
}

/// FUA goes with every command: clients are known to send it with reads.
fn allow_flags(header: &RequestHeader, allowed: u16) -> Result<(), Refusal> {
    if header.flags & !(allowed | CMD_FLAG_FUA) == 0 {
        Ok(())
    } else {
        Err(Refusal::invalid("a flag that this command does not have, or that was not negotiated"))
    }
}

fn bounded_payload(header: &RequestHeader, errno: Errno) -> Result<(), Refusal> {
    if header.len_bytes <= u64::from(PAYLOAD_BYTES_MAX) {
        Ok(())
    } else {
        Err(Refusal::new(errno, "the request is longer than the largest payload"))
    }
}

fn in_disk(header: &RequestHeader, geometry: &Geometry, operation: Operation) -> Result<ByteRange, Refusal> {
    check(header.offset_bytes, header.len_bytes, geometry, operation)
        .map_err(|error| Refusal::of(&error, operation))
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
