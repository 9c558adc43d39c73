//! The last bytes of each object in a bucket: whose write it was.
//!
//! Owns: how they look, and telling a deleted object from an empty one.
//! Does not own: when they are read, or what is made of them.
//!
//! ```text
//! content    any bytes, as the caller gave them
//! 45 bytes   "\nblockhouse " 32 hex digits "\n"     the nonce of the write
//! or, of an object that is deleted, alone:
//! 41 bytes   "deleted " 32 hex digits "\n"
//! ```
//! In the body, not in a header of its own: an `ETag` is often a hash of the body, so that two states with equal content
//! would have one; and copies of a bucket keep bodies. At the end: offsets in the content stay what they are. The lengths
//! tell deleted from empty in a listing too.

use bytes::{BufMut, Bytes, BytesMut};
use std::fmt;

const CONTENT: &[u8] = b"\nblockhouse ";
const DELETED: &[u8] = b"deleted ";
const HEX_BYTES: usize = 32;
/// Bytes after the content of an object.
pub const TRAILER_LEN: usize = CONTENT.len() + HEX_BYTES + 1;
/// The same, as sizes of objects are counted.
pub const TRAILER_BYTES: u64 = TRAILER_LEN as u64;
/// Size of a deleted object.
pub const DELETED_BYTES: u64 = (DELETED.len() + HEX_BYTES + 1) as u64;

/// Names one write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Nonce([u8; 16]);

/// What the end of an object says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    Content(Nonce),
    Deleted(Nonce),
}

impl Nonce {
    /// One that nobody has used.
    pub fn random() -> Self {
        Self(rand::random())
    }

    fn parse(hex: &[u8]) -> Option<Self> {
        let mut nonce = [0; 16];
        if hex.len() != HEX_BYTES {
            return None;
        }
        for (byte, digits) in nonce.iter_mut().zip(hex.chunks_exact(2)) {
            let digit = |at: u8| match at {
                b'0'..=b'9' => Some(at - b'0'),
                b'a'..=b'f' => Some(at - b'a' + 10),
                _ => None,
            };
            *byte = digit(digits[0])? << 4 | digit(digits[1])?;
        }
        Some(Self(nonce))
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// `content` as it is stored.
pub fn seal(content: &[u8], nonce: Nonce) -> Bytes {
    let mut sealed = BytesMut::with_capacity(content.len() + TRAILER_LEN);
    sealed.put_slice(content);
    sealed.put_slice(CONTENT);
    sealed.put_slice(format!("{nonce}\n").as_bytes());
    sealed.freeze()
}

/// What stands in the place of an object that was deleted.
pub fn tombstone(nonce: Nonce) -> Bytes {
    let mut sealed = BytesMut::from(DELETED);
    sealed.put_slice(format!("{nonce}\n").as_bytes());
    sealed.freeze()
}

/// Bytes of content in an object of that size. `None`: it is no object with content.
pub fn content_bytes(stored_bytes: u64) -> Option<u64> {
    stored_bytes.checked_sub(TRAILER_BYTES)
}

/// Reads the end of an object of `stored_bytes`, of which `tail` is at least the trailer. `None`: not one of ours.
pub fn parse(tail: &[u8], stored_bytes: u64) -> Option<End> {
    let (magic, make): (&[u8], fn(Nonce) -> End) = match stored_bytes {
        DELETED_BYTES => (DELETED, End::Deleted),
        _ if content_bytes(stored_bytes).is_some() => (CONTENT, End::Content),
        _ => return None,
    };
    let end = tail.len().checked_sub(magic.len() + HEX_BYTES + 1)?;
    let hex = tail.get(end..)?.strip_prefix(magic)?.strip_suffix(b"\n")?;
    Nonce::parse(hex).map(make)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size(bytes: &[u8]) -> u64 {
        bytes.len() as u64
    }

    #[test]
    fn what_is_sealed_is_read_again_and_deleted_is_not_empty() {
        let nonce = Nonce::random();
        for content in [&b""[..], b"x", b"\nblockhouse 00000000000000000000000000000000\n"] {
            let sealed = seal(content, nonce);
            assert_eq!(parse(&sealed, size(&sealed)), Some(End::Content(nonce)));
            assert_eq!(parse(&sealed[content.len()..], size(&sealed)), Some(End::Content(nonce)));
            assert_eq!(content_bytes(size(&sealed)), Some(size(content)));
        }
        let gone = tombstone(nonce);
        assert_eq!((size(&gone), parse(&gone, size(&gone))), (DELETED_BYTES, Some(End::Deleted(nonce))));
        assert_eq!(content_bytes(DELETED_BYTES), None);
    }

    #[test]
    fn g8_the_same_content_is_never_stored_as_the_same_bytes() {
        assert_ne!(seal(b"same", Nonce::random()), seal(b"same", Nonce::random()));
        assert_ne!(tombstone(Nonce::random()), tombstone(Nonce::random()));
    }

    proptest! {
        #[test]
        fn g19_hostile_ends_are_refused_without_a_panic(tail in prop::collection::vec(any::<u8>(), 0..64), stored in any::<u64>()) {
            assert_eq!(parse(&tail, stored), None);
            assert_eq!(parse(&tail, size(&tail)), None);
        }

        #[test]
        fn g19_one_changed_byte_of_the_end_is_another_nonce_or_none(at in 0usize..TRAILER_LEN, to in any::<u8>()) {
            let nonce = Nonce::random();
            let mut sealed = seal(b"", nonce).to_vec();
            prop_assume!(sealed[at] != to);
            sealed[at] = to;
            assert_ne!(parse(&sealed, TRAILER_BYTES), Some(End::Content(nonce)));
        }
    }
}
