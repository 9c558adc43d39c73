//! What the binary object formats have in common: a header, a checksum at the end, bounded reading, errors.
//!
//! Owns: the envelope below. All numbers are little-endian; ids are in their own binary form.
//! Does not own: what lies in it ([`super::pack`], [`super::segment`], [`super::map`]).
//!
//! ```text
//!  at  bytes
//!   0   8     magic, one for each format
//!   8   2     version
//!  10   2     zero
//!  12   4     feature bits; a reader that does not know one of them refuses the object
//!  16   ..    the format's own
//! end-16 16   first half of the BLAKE3 hash of all before it
//! ```
//! The magic comes first so that a wrong object is called that, the checksum last so that it is written in one pass.
//! The checksum lets a tool judge an object by itself; readers believe only the hash that the reference to it holds.

use crate::volume::ids::{ObjectHash, ObjectId};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 16;
/// Bytes of the checksum.
pub const CHECKSUM_BYTES: usize = 16;
/// The version that this code writes, and the only one that it reads.
pub const VERSION: u16 = 1;

/// Why bytes from the pool are not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// Not the bytes that were referred to.
    #[error("{what}: the hash is not the one of the reference")]
    Hash { what: &'static str },
    /// Well protected, but not well formed, or at odds with the reference.
    #[error("{what}: {reason}, at byte {at_bytes}")]
    Malformed { what: &'static str, at_bytes: usize, reason: &'static str },
    /// Made by a newer version.
    #[error("{what}: {reason} is not known to this version")]
    Unsupported { what: &'static str, reason: &'static str },
}

/// Starts an object.
pub fn begin(magic: [u8; 8], bytes_hint: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes_hint.saturating_add(HEADER_BYTES + CHECKSUM_BYTES));
    out.extend_from_slice(&magic);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&0u32.to_le_bytes());
    out
}

/// Ends an object with its checksum.
pub fn seal(out: &mut Vec<u8>) {
    let sum = ObjectHash::of(out);
    out.extend_from_slice(&sum.0[..CHECKSUM_BYTES]);
}

/// Checks hash, magic, version, features and checksum, in this order.
///
/// # Errors
/// [`FormatError`].
pub fn open<'a>(
    what: &'static str,
    magic: [u8; 8],
    bytes: &'a [u8],
    hash: &ObjectHash,
) -> Result<Reader<'a>, FormatError> {
    if ObjectHash::of(bytes) != *hash {
        return Err(FormatError::Hash { what });
    }
    let mut reader = Reader { what, bytes, at_bytes: 0 };
    if reader.array::<8>()? != magic {
        return Err(reader.malformed("wrong magic"));
    }
    if reader.u16()? != VERSION {
        return Err(FormatError::Unsupported { what, reason: "the format version" });
    }
    reader.zeros(2)?;
    if reader.u32()? != 0 {
        return Err(FormatError::Unsupported { what, reason: "a feature" });
    }
    let Some(body_bytes) = bytes.len().checked_sub(CHECKSUM_BYTES).filter(|body| *body >= HEADER_BYTES)
    else {
        return Err(reader.malformed("too short"));
    };
    let (body, sum) = bytes.split_at(body_bytes);
    if ObjectHash::of(body).0[..CHECKSUM_BYTES] != *sum {
        return Err(FormatError::Malformed { what, at_bytes: body_bytes, reason: "wrong checksum" });
    }
    reader.bytes = body;
    Ok(reader)
}

/// Takes values off the front of an object, never beyond its end.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at_bytes: usize,
}

impl<'a> Reader<'a> {
    /// The error for what was just read.
    pub fn malformed(&self, reason: &'static str) -> FormatError {
        FormatError::Malformed { what: self.what, at_bytes: self.at_bytes, reason }
    }

    /// An error of the caller's choice unless `good`.
    ///
    /// # Errors
    /// `Malformed` with `reason`.
    pub fn check(&self, good: bool, reason: &'static str) -> Result<(), FormatError> {
        if good { Ok(()) } else { Err(self.malformed(reason)) }
    }

    /// Bytes not yet taken.
    pub fn left_bytes(&self) -> usize {
        self.bytes.len() - self.at_bytes
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// `Malformed` if there are fewer; as all that follow.
    pub fn slice(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let end = self.at_bytes.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(self.malformed("ends too early")) };
        let slice = &self.bytes[self.at_bytes..end];
        self.at_bytes = end;
        Ok(slice)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.slice(N)?);
        Ok(array)
    }

    pub fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn object_id(&mut self) -> Result<ObjectId, FormatError> {
        self.array().map(|bytes| ObjectId::from_bytes(&bytes))
    }

    /// Bytes that mean nothing yet and must be zero, so that they can mean something later.
    pub fn zeros(&mut self, len: usize) -> Result<(), FormatError> {
        let all_zero = self.slice(len)?.iter().all(|byte| *byte == 0);
        self.check(all_zero, "reserved bytes are not zero")
    }

    /// A count as a length, once that many items of `item_bytes` are known to be there: nothing is allocated for
    /// items that do not exist.
    pub fn count(&self, count: u32, item_bytes: usize) -> Result<usize, FormatError> {
        usize::try_from(count)
            .ok()
            .filter(|count| count.checked_mul(item_bytes).is_some_and(|bytes| bytes <= self.left_bytes()))
            .ok_or_else(|| self.malformed("counts more than is there"))
    }

    /// Everything was taken.
    pub fn finish(self) -> Result<(), FormatError> {
        self.check(self.left_bytes() == 0, "more bytes than the format has")
    }
}
