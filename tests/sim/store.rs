//! The simulated pool: refuses, delays, applies and then loses the answer, lets a swap land long after it was given up.
//! Looks at each head and snapshot that lands, and has the oracle judge it.

use crate::world::World;
use async_trait::async_trait;
use blockhouse::geometry::{BLOCK_LEN, BlockIndex};
use blockhouse::store::{ETag, Expect, GetRange, Key, Listed, Object, ObjectStore, Page, StoreError};
use blockhouse::volume::head::{Head, SmallObject, SnapshotObject, keys};
use blockhouse::volume::map::{Map, MapRef, lookup_unfolded};
use blockhouse::volume::pack::{Lookup, PackIndex, decode_block};
use blockhouse::volume::segment::{Segment, segment_of};
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Called with each head that lands, and each snapshot.
pub type OnHead = Arc<dyn Fn(&Objects, &Head) + Send + Sync>;
pub type OnSnapshot = Arc<dyn Fn(&Objects, &SnapshotObject) + Send + Sync>;

/// What is in the pool.
#[derive(Default)]
pub struct Objects {
    pub fixed: BTreeMap<Key, Bytes>,
    pub swapped: BTreeMap<Key, (u64, Bytes)>,
    next_version: u64,
    /// Swaps that nobody waits for any more, and that may yet land.
    late: Vec<(Key, Option<u64>, Bytes)>,
}

impl Objects {
    /// The head of a volume.
    pub fn head(&self, name: &str) -> Option<Head> {
        self.swapped.get(&keys::volume(name)).and_then(|(_, bytes)| Head::decode(bytes).ok())
    }

    /// The whole content that a map names; what is wrong with it otherwise.
    pub fn content(&self, reference: Option<&MapRef>, size_bytes: u64) -> Result<Vec<u8>, String> {
        let size = usize::try_from(size_bytes).expect("small");
        let mut content = vec![0; size];
        let Some(reference) = reference else { return Ok(content) };
        let get = |key: Key| self.fixed.get(&key).ok_or(format!("{key} is named and not there"));
        let map = Map::decode(get(keys::map(&reference.id))?, reference).map_err(|e| e.to_string())?;
        let mut indexes = Vec::new();
        for pack in map.packs() {
            let object = get(keys::pack(&pack.id))?;
            let from = usize::try_from(pack.data_bytes()).expect("small");
            indexes.push(Arc::new(PackIndex::decode(&object[from..], pack).map_err(|e| e.to_string())?));
        }
        for (at, out) in content.chunks_mut(BLOCK_LEN).enumerate() {
            let block = BlockIndex(at as u64);
            let found = match lookup_unfolded(&indexes, block) {
                Lookup::Absent => match map.segment(block) {
                    None => Lookup::Zero,
                    Some(named) => {
                        let object = get(keys::segments(&named.object))?;
                        let from = named.offset_bytes as usize;
                        let bytes = &object[from..from + named.stored_bytes as usize];
                        Segment::decode(bytes, segment_of(block), named)
                            .map_err(|e| e.to_string())?
                            .lookup(block)
                    }
                },
                found => found,
            };
            if let Lookup::At(location) = found {
                let object = get(keys::pack(&location.pack))?;
                let from = location.stored.offset as usize;
                let bytes = &object[from..from + location.stored.stored_bytes as usize];
                let block = decode_block(bytes, &location.stored).map_err(|e| e.to_string())?;
                let len = out.len();
                out.copy_from_slice(&block[..len]);
            }
        }
        Ok(content)
    }
}

/// The pool of a world.
#[derive(Clone)]
pub struct SimStore {
    pub world: World,
    pub objects: Arc<Mutex<Objects>>,
    pub on_head: OnHead,
    pub on_snapshot: OnSnapshot,
}

enum Fate {
    Done,
    Refused,
    DoneNoAnswer,
    LateNoAnswer,
    NothingNoAnswer,
}

impl SimStore {
    fn fate(&self) -> Fate {
        let bad = self.world.state.lock().profile.bad_store;
        if !self.world.chance(bad) {
            return Fate::Done;
        }
        match self.world.pick(4) {
            0 => Fate::Refused,
            1 => Fate::DoneNoAnswer,
            2 => Fate::LateNoAnswer,
            _ => Fate::NothingNoAnswer,
        }
    }

    async fn pause(&self) {
        self.world.step().await;
        if self.world.chance(50) {
            let ms = self.world.pick(8);
            tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
        }
        self.land_some(20);
        self.world.step().await;
    }

    /// Late swaps land, each with that chance.
    pub fn land_some(&self, percent: u32) {
        let late = std::mem::take(&mut self.objects.lock().late);
        for (key, expect, bytes) in late {
            if self.world.chance(percent) {
                self.world.note(&format!("late swap of {key}"));
                // Whether it still fits is the store's business alone.
                let _landed = self.apply(&key, expect, bytes).is_some();
            } else {
                self.objects.lock().late.push((key, expect, bytes));
            }
        }
    }

    /// Makes the swap if it is expected; the new version.
    pub fn apply(&self, key: &Key, expect: Option<u64>, bytes: Bytes) -> Option<u64> {
        let mut objects = self.objects.lock();
        if objects.swapped.get(key).map(|(version, _)| *version) != expect {
            return None;
        }
        objects.next_version += 1;
        let version = objects.next_version;
        objects.swapped.insert(key.clone(), (version, bytes.clone()));
        if key.as_str().starts_with("volumes/")
            && let Ok(head) = Head::decode(&bytes)
        {
            (self.on_head)(&objects, &head);
        }
        Some(version)
    }
}

fn etag(version: u64) -> ETag {
    ETag(version.to_string())
}

fn unclear(key: &Key) -> StoreError {
    StoreError::Unclear { key: key.clone(), reason: "no answer (simulated)".into() }
}

#[async_trait]
impl ObjectStore for SimStore {
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        self.pause().await;
        if !matches!(self.fate(), Fate::Done) {
            return Err(StoreError::Unavailable { key: key.clone(), reason: "simulated".into() });
        }
        let objects = self.objects.lock();
        let (bytes, version) = match (objects.fixed.get(key), objects.swapped.get(key)) {
            (Some(bytes), _) => (bytes.clone(), 0),
            (None, Some((version, bytes))) => (bytes.clone(), *version),
            (None, None) => return Err(StoreError::NotFound(key.clone())),
        };
        let object_bytes = bytes.len() as u64;
        let invalid = || StoreError::Invalid { key: key.clone(), reason: "range".into() };
        let at = |n: u64| usize::try_from(n).expect("small");
        let bytes = match range {
            GetRange::Whole { max_bytes } if object_bytes > max_bytes => return Err(invalid()),
            GetRange::Whole { .. } => bytes,
            GetRange::Span { start, len } if start + len > object_bytes => return Err(invalid()),
            GetRange::Span { start, len } => bytes.slice(at(start)..at(start + len)),
            GetRange::Suffix { len } => bytes.slice(at(object_bytes.saturating_sub(len))..),
        };
        Ok(Object { bytes, object_bytes, etag: etag(version) })
    }

    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError> {
        self.pause().await;
        let fate = self.fate();
        match fate {
            Fate::Refused => {
                return Err(StoreError::Unavailable { key: key.clone(), reason: "simulated".into() });
            }
            Fate::LateNoAnswer | Fate::NothingNoAnswer => return Err(unclear(key)),
            Fate::Done | Fate::DoneNoAnswer => {}
        }
        {
            let mut objects = self.objects.lock();
            if objects.fixed.contains_key(key) {
                return Err(StoreError::Conflict(key.clone()));
            }
            objects.fixed.insert(key.clone(), bytes.clone());
            if key.as_str().starts_with("snapshots/")
                && let Ok(snapshot) = SnapshotObject::decode(&bytes)
            {
                (self.on_snapshot)(&objects, &snapshot);
            }
        }
        self.world.step().await;
        if matches!(fate, Fate::DoneNoAnswer) { Err(unclear(key)) } else { Ok(()) }
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.pause().await;
        self.objects.lock().fixed.remove(key);
        Ok(())
    }

    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError> {
        let expect = match expect {
            Expect::Absent => None,
            Expect::State(tag) => Some(tag.0.parse().expect("a tag of this store")),
        };
        // In flight from the first moment: a killed process's swap may land.
        self.world.step().await;
        if self.world.chance(30) && self.world.state.lock().profile.bad_store > 0 {
            let parked = (key.clone(), expect, bytes.clone());
            self.objects.lock().late.push(parked.clone());
            self.world.step().await;
            let mut objects = self.objects.lock();
            objects.late.retain(|late| *late != parked);
        }
        self.pause().await;
        let fate = self.fate();
        match fate {
            Fate::Refused => {
                return Err(StoreError::Unavailable { key: key.clone(), reason: "simulated".into() });
            }
            Fate::NothingNoAnswer => return Err(unclear(key)),
            Fate::LateNoAnswer => {
                self.objects.lock().late.push((key.clone(), expect, bytes));
                return Err(unclear(key));
            }
            Fate::Done | Fate::DoneNoAnswer => {}
        }
        let landed = self.apply(key, expect, bytes);
        self.world.step().await;
        match (landed, fate) {
            (_, Fate::DoneNoAnswer) => Err(unclear(key)),
            (Some(version), _) => Ok(etag(version)),
            (None, _) => Err(StoreError::Conflict(key.clone())),
        }
    }

    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError> {
        self.pause().await;
        let mut objects = self.objects.lock();
        match objects.swapped.get(key) {
            Some((version, _)) if etag(*version) == expect => {
                objects.swapped.remove(key);
                Ok(())
            }
            _ => Err(StoreError::Conflict(key.clone())),
        }
    }

    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError> {
        self.pause().await;
        let objects = self.objects.lock();
        let prefix = format!("{folder}/");
        let mut names: Vec<&Key> = objects.fixed.keys().chain(objects.swapped.keys()).collect();
        names.sort();
        let all: Vec<Listed> = names
            .into_iter()
            .filter(|key| key.as_str().starts_with(&prefix) && after.is_none_or(|after| *key > after))
            .map(|key| Listed { key: key.clone(), object_bytes: 0, modified_unix_ms: 0 })
            .collect();
        Ok(Page { more: all.len() > max, objects: all.into_iter().take(max).collect() })
    }
}
