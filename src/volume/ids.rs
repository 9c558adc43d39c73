//! Ids and hashes that name things in a pool, and their text forms.
//!
//! Owns: fixed-length hex parsing, so that no key is ever made of anything else.
//! Does not own: formats that hold them.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::fmt;

/// Declares a fixed-length byte id with hex text and serde forms.
macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Parses exactly as many lower-case hex digits as the id has.
            pub fn parse(text: &str) -> Option<Self> {
                parse_hex::<$len>(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                Self::parse(&text).ok_or_else(|| {
                    D::Error::custom(concat!(stringify!($name), " is not ", $len, " bytes of hex"))
                })
            }
        }
    };
}

hex_id!(
    /// Identity of a pool, made with it.
    PoolId, 16
);
hex_id!(
    /// Identity of a volume or image, made with it; never used again, unlike its name.
    Uid, 16
);
hex_id!(
    /// Identity of a node: of one state directory.
    NodeId, 16
);
hex_id!(
    /// One run of a node's daemon.
    Incarnation, 16
);
hex_id!(
    /// Identity of an epoch file.
    FileId, 16
);
hex_id!(
    /// Makes every write of a swapped object different from every other.
    Nonce, 16
);
hex_id!(
    /// First 128 bits of the BLAKE3 hash of a block's uncompressed content.
    ContentHash, 16
);
hex_id!(
    /// BLAKE3 hash of an object, or of a part of one.
    ObjectHash, 32
);

impl ContentHash {
    /// Hash of a block's content.
    pub fn of(content: &[u8]) -> Self {
        let mut short = [0; 16];
        short.copy_from_slice(&blake3::hash(content).as_bytes()[..16]);
        Self(short)
    }
}

impl ObjectHash {
    /// Hash of an object's bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

/// Name of an immutable object: a stamp that says who made it when, so that a sweep can tell an object that is yet to
/// be published from garbage. Text form: 80 hex digits, whose order is the order of the stamps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// The volume or image that made it.
    pub uid: Uid,
    /// The term that it was made in.
    pub term: u64,
    /// Counts up within a term.
    pub sequence: u64,
    /// Keeps two processes apart that believe to be the same.
    pub random: u64,
}

impl ObjectId {
    /// Bytes of its binary form: uid, then term, sequence and random, big-endian.
    pub const BYTES: usize = 40;

    /// The binary form.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.uid.0);
        bytes[16..24].copy_from_slice(&self.term.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[32..].copy_from_slice(&self.random.to_be_bytes());
        bytes
    }

    /// From the binary form; every value is one.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(word)
        };
        let mut uid = [0; 16];
        uid.copy_from_slice(&bytes[..16]);
        Self { uid: Uid(uid), term: word(16), sequence: word(24), random: word(32) }
    }

    /// Parses exactly 80 lower-case hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        parse_hex::<{ Self::BYTES }>(text).map(|bytes| Self::from_bytes(&bytes))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.uid, self.term, self.sequence)
    }
}

impl Serialize for ObjectId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ObjectId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom("object id is not 80 digits of lower-case hex"))
    }
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn object_id_text_round_trips_and_keeps_order(a: [u8; 40], b: [u8; 40]) {
            let (x, y) = (ObjectId::from_bytes(&a), ObjectId::from_bytes(&b));
            prop_assert_eq!(ObjectId::parse(&x.to_string()), Some(x));
            prop_assert_eq!(x.cmp(&y), x.to_string().cmp(&y.to_string()));
        }

        #[test]
        fn nothing_but_fixed_length_hex_parses(text in "\\PC{0,90}") {
            if ObjectId::parse(&text).is_some() {
                prop_assert!(text.len() == 80 && text.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()));
            }
        }
    }
}
