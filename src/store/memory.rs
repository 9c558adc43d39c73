//! A pool in memory, for tests and simulations.
//!
//! Owns: the promises of an [`ObjectStore`] without anything that fails, and counts of what was asked.
//! Does not own: faults, delays or lost answers; a test puts those around it.

use super::{ETag, Expect, GetRange, Key, Listed, Object, ObjectStore, Page, StoreError};
use crate::clock::Clock;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// How often each operation was asked for, whatever came of it, and the bytes that really moved.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    pub gets: u64,
    pub get_bytes: u64,
    pub put_news: u64,
    pub put_new_bytes: u64,
    pub deletes: u64,
    pub swaps: u64,
    pub swap_bytes: u64,
    pub swap_deletes: u64,
    pub lists: u64,
}

/// An [`ObjectStore`] in memory. Clones are the same pool. The same calls in the same order give the same answers.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Mutex<Pool>>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Pool {
    objects: BTreeMap<Key, Stored>,
    /// States made so far, by which each is named.
    states: u64,
    counts: Counts,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Fixed,
    Swapped,
}

#[derive(Debug)]
struct Stored {
    kind: Kind,
    bytes: Bytes,
    state: u64,
    modified_unix_ms: u64,
}

impl MemoryStore {
    /// An empty pool, whose objects are dated by this clock.
    pub fn new(clock: Clock) -> Self {
        Self { shared: Arc::default(), clock }
    }

    /// What was asked of it so far.
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    fn stored(&self, pool: &mut Pool, kind: Kind, bytes: Bytes) -> Stored {
        pool.states += 1;
        Stored { kind, bytes, state: pool.states, modified_unix_ms: self.clock.wall().0 }
    }
}

impl Stored {
    fn etag(&self) -> ETag {
        ETag(self.state.to_string())
    }
}

impl Pool {
    /// The object if it is of that kind; `Invalid` if the key is used as both.
    fn find(&self, key: &Key, kind: Kind) -> Result<Option<&Stored>, StoreError> {
        match self.objects.get(key) {
            Some(stored) if stored.kind != kind => {
                Err(StoreError::Invalid { key: key.clone(), reason: format!("not a {kind:?} object") })
            }
            found => Ok(found),
        }
    }

    fn check(&self, key: &Key, expect: &Expect) -> Result<(), StoreError> {
        let holds = match (self.find(key, Kind::Swapped)?, expect) {
            (None, Expect::Absent) => true,
            (Some(stored), Expect::State(etag)) => stored.etag() == *etag,
            (Some(_), Expect::Absent) | (None, Expect::State(_)) => false,
        };
        if holds { Ok(()) } else { Err(StoreError::Conflict(key.clone())) }
    }
}

#[async_trait]
impl ObjectStore for MemoryStore {
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        let mut pool = self.shared.lock();
        pool.counts.gets += 1;
        let stored = pool.objects.get(key).ok_or_else(|| StoreError::NotFound(key.clone()))?;
        let object_bytes = count(stored.bytes.len());
        let invalid = |reason| Err(StoreError::Invalid { key: key.clone(), reason });
        let (start, len) = match range {
            GetRange::Whole { max_bytes } if object_bytes > max_bytes => {
                return invalid(format!("{object_bytes} bytes, more than {max_bytes}"));
            }
            GetRange::Whole { .. } => (0, object_bytes),
            GetRange::Span { start, len } => match start.checked_add(len) {
                Some(end) if end <= object_bytes => (start, len),
                _ => return invalid(format!("{object_bytes} bytes, too few for {len} from {start}")),
            },
            GetRange::Suffix { len } => (object_bytes.saturating_sub(len), len.min(object_bytes)),
        };
        let (start, len) = (crate::geometry::len_of(start), crate::geometry::len_of(len));
        let object =
            Object { bytes: stored.bytes.slice(start..start + len), object_bytes, etag: stored.etag() };
        pool.counts.get_bytes += count(len);
        Ok(object)
    }

    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError> {
        let mut pool = self.shared.lock();
        pool.counts.put_news += 1;
        if pool.find(key, Kind::Fixed)?.is_some() {
            return Err(StoreError::Conflict(key.clone()));
        }
        pool.counts.put_new_bytes += count(bytes.len());
        let stored = self.stored(&mut pool, Kind::Fixed, bytes);
        pool.objects.insert(key.clone(), stored);
        Ok(())
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let mut pool = self.shared.lock();
        pool.counts.deletes += 1;
        if pool.find(key, Kind::Fixed)?.is_some() {
            pool.objects.remove(key);
        }
        Ok(())
    }

    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError> {
        let mut pool = self.shared.lock();
        pool.counts.swaps += 1;
        if bytes.is_empty() {
            let reason = "a swapped object is not empty".into();
            return Err(StoreError::Invalid { key: key.clone(), reason });
        }
        pool.check(key, &expect)?;
        pool.counts.swap_bytes += count(bytes.len());
        let stored = self.stored(&mut pool, Kind::Swapped, bytes);
        let etag = stored.etag();
        pool.objects.insert(key.clone(), stored);
        Ok(etag)
    }

    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError> {
        let mut pool = self.shared.lock();
        pool.counts.swap_deletes += 1;
        pool.check(key, &Expect::State(expect))?;
        pool.objects.remove(key);
        Ok(())
    }

    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError> {
        let mut pool = self.shared.lock();
        pool.counts.lists += 1;
        let Some(folder) = Key::new(folder) else {
            let reason = "not a folder's name".into();
            return Err(StoreError::Invalid { key: Key(folder.chars().take(64).collect()), reason });
        };
        let prefix = Key(format!("{folder}/"));
        let from = match after {
            Some(after) if *after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(&prefix),
        };
        let mut found = pool
            .objects
            .range::<Key, _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.as_str().starts_with(prefix.as_str()))
            .map(|(key, stored)| Listed {
                key: key.clone(),
                object_bytes: count(stored.bytes.len()),
                modified_unix_ms: stored.modified_unix_ms,
            });
        let objects = found.by_ref().take(max).collect();
        Ok(Page { objects, more: found.next().is_some() })
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
