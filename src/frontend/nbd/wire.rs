//! Numbers and fixed layouts of the NBD protocol. All fields are big-endian.
//!
//! Owns: constants, and turning headers into bytes and back.
//! Does not own: what may follow what ([`super::handshake`], [`super::session`]).

use crate::block::{BlockError, ChangeKind, ExtentKind};
use crate::frontend::Operation;
use bytes::{BufMut, BytesMut};

/// `NBDMAGIC`, the first thing a server says.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before each option and in the greeting.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before each request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before each chunk of a reply with an extended header.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags, ours and the client's: the same two bits.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags.
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
pub const FLAG_READ_ONLY: u16 = 1 << 1;
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
pub const FLAG_SEND_FUA: u16 = 1 << 3;
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub const FLAG_SEND_DF: u16 = 1 << 7;
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
pub const FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Options.
pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Types of replies to options.
pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub const REP_ERR_POLICY: u32 = (1 << 31) + 2;
pub const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub const REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
pub const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
pub const REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

/// Information about an export.
pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Commands.
pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Command flags.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub const CMD_FLAG_DF: u16 = 1 << 2;
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// With extended headers only: the length in the header is that of a payload.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Flag and types of the chunks of a structured reply.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;
pub const REPLY_NONE: u16 = 0;
pub const REPLY_OFFSET_DATA: u16 = 1;
pub const REPLY_OFFSET_HOLE: u16 = 2;
pub const REPLY_BLOCK_STATUS: u16 = 5;
pub const REPLY_BLOCK_STATUS_EXT: u16 = 6;
pub const REPLY_ERROR: u16 = (1 << 15) + 1;
pub const REPLY_ERROR_OFFSET: u16 = (1 << 15) + 2;

/// The metadata context of data and holes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its states.
pub const STATE_HOLE: u32 = 1 << 0;
pub const STATE_ZERO: u32 = 1 << 1;
/// What our own metadata contexts begin with, and those of changes since a past state, whose name follows.
pub const OWN_NAMESPACE: &str = "blockhouse:";
pub const CHANGED_SINCE: &str = "blockhouse:changed-since:";
/// The state of what differs, or may differ.
pub const STATE_CHANGED: u32 = 1 << 0;

/// Errors in replies. Their numbers are the protocol's, whatever `errno` is here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Errno {
    Perm = 1,
    Io = 5,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// What a client is told. The protocol wants a write beyond the end called "no space".
    pub fn of(error: &BlockError, operation: Operation) -> Self {
        match (error, operation) {
            (BlockError::Invalid, Operation::Read) => Self::Inval,
            (BlockError::Invalid, Operation::Write) => Self::NoSpc,
            (BlockError::ReadOnly, _) => Self::Perm,
            (BlockError::NoSpace, _) => Self::NoSpc,
            (BlockError::Unavailable(_) | BlockError::Io(_), _) => Self::Io,
            (BlockError::Stopped(_), _) => Self::Shutdown,
        }
    }
}

/// Bytes of the header of a request.
pub const REQUEST_LEN: usize = 28;
/// The same of an extended one.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Bytes of the header of an option.
pub const OPTION_LEN: usize = 16;
/// Most option data that is looked at.
pub const OPTION_BYTES_MAX: u32 = 64 * 1024;
/// Longest string that the protocol has.
pub const STRING_BYTES_MAX: usize = 4096;
/// Options in a handshake.
pub const OPTIONS_MAX: u32 = 256;
/// Names in a listing, of disks or of past states.
pub const LIST_MAX: usize = 1000;
/// Longest description in an answer; the rest is cut off.
pub const DESCRIPTION_BYTES_MAX: usize = 512;
/// Longest text with an error; the rest is cut off.
pub const MESSAGE_BYTES_MAX: usize = 512;
/// Smallest request that is served, and the preferred one where the disk names a smaller one.
pub const BLOCK_BYTES_MIN: u32 = 1;
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Most bytes that one request reads or writes.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Most bytes that one hint brings into the cache.
pub const CACHE_BYTES_MAX: u64 = 4 << 30;
/// Requests under way in one connection.
pub const REQUESTS_MAX: usize = 128;
/// Extents in one answer about block status.
pub const EXTENTS_MAX: usize = 4096;

const _: () = assert!(OPTION_BYTES_MAX as usize > STRING_BYTES_MAX + 64, "any name fits its option");

/// Which headers requests and replies have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Headers {
    /// Lengths of 32 bits.
    #[default]
    Compact,
    /// Lengths of 64 bits, and an offset in replies.
    Extended,
}

/// Names a request in its replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cookie {
    /// Means something to the client only.
    pub number: u64,
    /// Where the request began: extended replies repeat it.
    pub offset_bytes: u64,
}

/// The header of a request, not yet judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset_bytes: u64,
    pub len_bytes: u64,
}

impl RequestHeader {
    /// `None` if it does not begin with the magic number.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == REQUEST_MAGIC).then_some(())?;
        Self::parse_fields(&mut fields, |fields| fields.u32().map(u64::from))
    }

    /// The same of an extended header.
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == EXTENDED_REQUEST_MAGIC).then_some(())?;
        Self::parse_fields(&mut fields, |fields| fields.u64())
    }

    fn parse_fields(
        fields: &mut Fields<'_>,
        len: impl FnOnce(&mut Fields<'_>) -> Option<u64>,
    ) -> Option<Self> {
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset_bytes: fields.u64()?,
            len_bytes: len(fields)?,
        })
    }

    /// What its replies repeat.
    pub fn cookie(&self) -> Cookie {
        Cookie { number: self.cookie, offset_bytes: self.offset_bytes }
    }

    /// As a client sends it.
    ///
    /// # Panics
    /// If the length needs an extended header.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        let mut out = &mut bytes[..];
        self.put(&mut out, REQUEST_MAGIC);
        out.put_u32(u32::try_from(self.len_bytes).expect("compact lengths have 32 bits"));
        bytes
    }

    /// As a client with extended headers sends it.
    pub fn encode_extended(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        let mut bytes = [0; EXTENDED_REQUEST_LEN];
        let mut out = &mut bytes[..];
        self.put(&mut out, EXTENDED_REQUEST_MAGIC);
        out.put_u64(self.len_bytes);
        bytes
    }

    fn put(&self, out: &mut &mut [u8], magic: u32) {
        out.put_u32(magic);
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset_bytes);
    }
}

/// The header of an option, not yet judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionHeader {
    pub option: u32,
    pub len_bytes: u32,
}

impl OptionHeader {
    /// `None` if it does not begin with the magic number.
    pub fn parse(bytes: &[u8; OPTION_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u64()? == OPTION_MAGIC).then_some(())?;
        Some(Self { option: fields.u32()?, len_bytes: fields.u32()? })
    }

    /// As a client sends it.
    pub fn encode(&self) -> [u8; OPTION_LEN] {
        let mut bytes = [0; OPTION_LEN];
        let mut out = &mut bytes[..];
        out.put_u64(OPTION_MAGIC);
        out.put_u32(self.option);
        out.put_u32(self.len_bytes);
        bytes
    }
}

/// Takes fields off the front of hostile bytes; `None` where they end too early.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string as the protocol writes one: its length in 32 bits, then UTF-8 without NUL, at most
    /// [`STRING_BYTES_MAX`].
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        string(self.bytes(len)?)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A string of the protocol, if the bytes are one.
pub fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// As much of `text` as fits `bytes_max`, cut between characters.
pub fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

/// Appends a reply to an option.
///
/// # Panics
/// If `data` is longer than 4 GiB.
pub fn put_option_reply(out: &mut BytesMut, option: u32, reply: u32, data: &[u8]) {
    out.reserve(20 + data.len());
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(u32::try_from(data.len()).expect("replies to options are short"));
    out.put_slice(data);
}

/// Most bytes of the header of a chunk.
pub const CHUNK_LEN_MAX: usize = 32;

/// The header of a chunk of a structured or extended reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkHeader {
    pub flags: u16,
    pub kind: u16,
    pub cookie: Cookie,
    pub len_bytes: u32,
}

impl ChunkHeader {
    /// As a server sends it. Returns how many bytes it has.
    pub fn put(&self, headers: Headers, out: &mut impl BufMut) -> usize {
        out.put_u32(match headers {
            Headers::Compact => STRUCTURED_REPLY_MAGIC,
            Headers::Extended => EXTENDED_REPLY_MAGIC,
        });
        out.put_u16(self.flags);
        out.put_u16(self.kind);
        out.put_u64(self.cookie.number);
        match headers {
            Headers::Compact => {
                out.put_u32(self.len_bytes);
                20
            }
            Headers::Extended => {
                out.put_u64(self.cookie.offset_bytes);
                out.put_u64(u64::from(self.len_bytes));
                CHUNK_LEN_MAX
            }
        }
    }
}

/// State of a stretch in `blockhouse:changed-since:`.
pub fn change_state(kind: ChangeKind) -> u32 {
    match kind {
        ChangeKind::Changed => STATE_CHANGED,
        ChangeKind::Unchanged => 0,
    }
}

/// State of an extent in `base:allocation`.
pub fn allocation_state(kind: ExtentKind) -> u32 {
    match kind {
        ExtentKind::Data => 0,
        ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn magic_numbers_spell_what_the_protocol_says() {
        assert_eq!(&INIT_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
        assert_eq!(OPTION_REPLY_MAGIC, 0x3e889045565a9);
    }

    #[test]
    fn a_request_stands_on_the_wire_as_the_protocol_draws_it() {
        let header = RequestHeader {
            flags: CMD_FLAG_FUA,
            command: CMD_WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset_bytes: 0x1000,
            len_bytes: 512,
        };
        let expected = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0,
        ];
        assert_eq!(header.encode(), expected);
        assert_eq!(RequestHeader::parse(&expected), Some(header));
        let long = RequestHeader { len_bytes: 1 << 40, ..header };
        let mut expected =
            [&[0x21, 0xe4, 0x1c, 0x71][..], &expected[4..24], &[0, 0, 1, 0, 0, 0, 0, 0]].concat();
        assert_eq!(long.encode_extended()[..], expected);
        assert_eq!(RequestHeader::parse_extended(&long.encode_extended()), Some(long));
        expected[3] = 0x72;
        assert_eq!(RequestHeader::parse_extended(&expected.try_into().unwrap()), None);
    }

    #[test]
    fn errors_are_the_protocols_numbers() {
        let read = |error| Errno::of(&error, Operation::Read).code();
        let write = |error| Errno::of(&error, Operation::Write).code();
        assert_eq!((read(BlockError::Invalid), write(BlockError::Invalid)), (22, 28));
        assert_eq!(write(BlockError::ReadOnly), 1);
        assert_eq!(write(BlockError::NoSpace), 28);
        assert_eq!(read(BlockError::Unavailable(String::new())), 5);
        assert_eq!(read(BlockError::Io(String::new())), 5);
        assert_eq!(write(BlockError::Stopped(String::new())), 108);
        for errno in [Errno::Overflow, Errno::NotSup, Errno::Inval] {
            assert_eq!(errno.code(), errno as u32);
        }
    }

    #[test]
    fn strings_are_utf8_without_nul_and_of_limited_length() {
        assert_eq!(string(b"vm-7"), Some("vm-7"));
        assert_eq!(string(b""), Some(""));
        assert_eq!(string(b"a\0b"), None);
        assert_eq!(string(b"\xff"), None);
        assert!(string(&[b'a'; STRING_BYTES_MAX]).is_some());
        assert!(string(&[b'a'; STRING_BYTES_MAX + 1]).is_none());
        assert_eq!(cut("añb", 2), "a");
        assert_eq!(cut("añb", 3), "añ");
        assert_eq!(cut("añb", 99), "añb");
    }

    proptest! {
        #[test]
        fn headers_come_back_as_they_were(flags: u16, command: u16, cookie: u64, offset_bytes: u64, len_bytes: u32) {
            let request = RequestHeader { flags, command, cookie, offset_bytes, len_bytes: u64::from(len_bytes) };
            prop_assert_eq!(RequestHeader::parse(&request.encode()), Some(request));
            let request = RequestHeader { len_bytes: offset_bytes, ..request };
            prop_assert_eq!(RequestHeader::parse_extended(&request.encode_extended()), Some(request));
            let option = OptionHeader { option: len_bytes, len_bytes: u32::from(flags) };
            prop_assert_eq!(OptionHeader::parse(&option.encode()), Some(option));
        }

        #[test]
        fn fields_never_read_past_the_end(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut fields = Fields(&bytes);
            let _ = fields.string();
            let _ = fields.u64();
            let _ = fields.u16();
            prop_assert!(fields.0.len() <= bytes.len());
        }
    }
}
