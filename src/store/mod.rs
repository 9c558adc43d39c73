//! Moves bytes under keys.
//!
//! Owns: the [`ObjectStore`] trait, keys, and what can go wrong. Its implementations hold the same promises, proven
//! by one suite (`tests/store.rs`).
//! Does not own: what the bytes mean; nothing here knows a block.

pub mod dir;
pub mod memory;
pub mod s3;

use async_trait::async_trait;
use bytes::Bytes;
use std::fmt;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 512;

/// Name of an object below the pool: segments of `a-z A-Z 0-9 . _ -` (none empty, `.` or `..`) joined by `/`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// The key, if it is well formed.
    pub fn new(key: impl Into<String>) -> Option<Self> {
        let key = key.into();
        let good_segment = |segment: &str| {
            !segment.is_empty()
                && !segment.starts_with('.')
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        (key.len() <= KEY_BYTES_MAX && key.split('/').all(good_segment)).then_some(Self(key))
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one state of one object; opaque, and never the same for two states of a key.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ETag(pub String);

/// Which bytes of an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GetRange {
    /// All, unless the object is larger than this.
    Whole { max_bytes: u64 },
    /// `len` bytes from `start`. An object that ends before `start + len` is an error (`Invalid`).
    Span { start: u64, len: u64 },
    /// The last `len` bytes (all, if it has fewer).
    Suffix { len: u64 },
}

/// What a read brought.
#[derive(Clone, Debug)]
pub struct Object {
    pub bytes: Bytes,
    /// Size of the whole object.
    pub object_bytes: u64,
    pub etag: ETag,
}

/// What a swap expects to find.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expect {
    /// Nothing there, or deleted.
    Absent,
    /// Exactly this state.
    State(ETag),
}

/// One name of a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    pub key: Key,
    /// Size in bytes.
    pub object_bytes: u64,
    /// When it was last changed, by the store's clock, in milliseconds since 1970.
    pub modified_unix_ms: u64,
}

/// A part of a listing, in the order of the keys.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub objects: Vec<Listed>,
    /// Whether there is more after the last of `objects`.
    pub more: bool,
}

/// What went wrong, by what the caller does about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("{0}: not found")]
    NotFound(Key),
    /// A condition did not hold: the object is there already, or has another state. Nothing was changed.
    #[error("{0}: changed by someone else")]
    Conflict(Key),
    /// No answer that tells whether the change was made, or will yet be. Read it back, or swap again.
    #[error("{key}: it is not known whether the change was made: {reason}")]
    Unclear { key: Key, reason: String },
    /// The store does not answer, or refuses for now. Nothing was changed, later may work.
    #[error("{key}: the store does not answer: {reason}")]
    Unavailable { key: Key, reason: String },
    /// No space left in the store. Nothing was changed.
    #[error("{0}: no space left in the pool")]
    NoSpace(Key),
    /// The object is larger than the caller takes, shorter than asked for, or not what a store of this kind holds.
    #[error("{key}: {reason}")]
    Invalid { key: Key, reason: String },
}

/// A pool's objects. There are two kinds of keys, and a key is only ever used as one of them:
/// *fixed* objects are made once and never changed; *swapped* ones change by compare-and-swap.
/// All that returns `Ok` is durable and seen by everybody who asks afterwards.
///
/// # Cancellation
/// A change whose future is dropped may still be made, later too.
#[async_trait]
pub trait ObjectStore: Send + Sync + 'static {
    /// Reads an object of either kind. What it returns was, or still is, a state of the object.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`, `Invalid`.
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError>;

    /// Makes a fixed object.
    ///
    /// # Errors
    /// `Conflict` if there is one, whoever made it; `Unclear`, `Unavailable`, `NoSpace`.
    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError>;

    /// Removes a fixed object; one that is gone is fine.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// Makes or replaces a swapped object, whose bytes must not be empty, if it is in the state expected.
    ///
    /// # Errors
    /// `Conflict`: certainly not made, and never will be. `Unclear`: may be made, now or later.
    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError>;

    /// Deletes a swapped object if it is in that state. It may be made again, with an `ETag` of its own.
    ///
    /// # Errors
    /// As [`ObjectStore::swap`].
    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError>;

    /// At most `max` objects whose keys are `folder/…`, after the key `after`, in the order of their keys. An object
    /// that is there during the whole of a listing is in it, however often it is swapped meanwhile.
    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError>;
}
