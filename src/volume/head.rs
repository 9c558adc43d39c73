//! The small objects of a pool that name everything else: heads of volumes, images, snapshots, trash entries.
//!
//! Owns: their JSON, its checks and caps, names, keys, and the pure decisions on terms and history.
//! Does not own: when they are written ([`crate::volume::commit`], [`crate::volume::catalog`]).

use crate::clock::UnixMillis;
use crate::geometry::{SECTOR_BYTES, VOLUME_BYTES_MAX};
use crate::store::Key;
use crate::volume::ids::{Incarnation, NodeId, Nonce, ObjectId, PoolId, Uid};
use crate::volume::map::MapRef;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Largest small object that is read.
pub const SMALL_OBJECT_BYTES_MAX: u64 = 64 * 1024;
/// Terms that a head remembers.
const HISTORY_MAX: usize = 16;
/// Terms and numbers beyond this are refused: they could not be counted on.
const COUNT_MAX: u64 = 1 << 62;

/// `pool`: what a pool is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PoolObject {
    pub id: PoolId,
    /// Version of the layout of the pool: 1.
    pub format: u32,
    /// Names of features that a reader must know.
    pub features: Vec<String>,
    pub created: UnixMillis,
}

/// Who has a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    pub node: NodeId,
    pub incarnation: Incarnation,
}

/// The last commit of a term.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CommitRecord {
    /// Every epoch of the term up to this number is in the pool.
    pub epoch: u64,
    /// Who made it.
    pub incarnation: Incarnation,
    pub at: UnixMillis,
}

/// What a head remembers of a term.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TermRecord {
    pub term: u64,
    pub node: NodeId,
    #[serde(default)]
    pub last_commit: Option<CommitRecord>,
    /// How it ended; absent while it goes on.
    #[serde(default)]
    pub ended: Option<TermEnd>,
}

/// How a term ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TermEnd {
    /// Detached with everything committed.
    Released,
    /// Set back to a snapshot.
    RolledBack,
    /// Taken over by another node.
    Taken,
}

/// `volumes/<name>`: the one mutable object of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Head {
    pub uid: Uid,
    /// New with every write of the object: no two states of it are ever the same.
    pub nonce: Nonce,
    /// Raised with every change of owner.
    pub term: u64,
    /// Lowest sequence that may still be published in this term: from here up nothing is swept.
    pub floor: u64,
    /// Content. Absent: all zero.
    #[serde(default)]
    pub map: Option<MapRef>,
    pub size_bytes: u64,
    #[serde(default)]
    pub owner: Option<Owner>,
    /// What it was forked from, as it was called then.
    #[serde(default)]
    pub from: Option<String>,
    #[serde(default)]
    pub description: Option<String>,
    /// Number of the next snapshot; a number is never used again.
    pub next_snapshot: u64,
    /// The latest terms, oldest first.
    pub history: Vec<TermRecord>,
    pub created: UnixMillis,
    #[serde(default)]
    pub last_commit: Option<UnixMillis>,
}

/// `images/<name>`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ImageObject {
    pub uid: Uid,
    pub nonce: Nonce,
    pub term: u64,
    pub floor: u64,
    /// Absent while it is being imported.
    #[serde(default)]
    pub map: Option<MapRef>,
    pub size_bytes: u64,
    pub stored_bytes: u64,
    pub source: String,
    #[serde(default)]
    pub description: Option<String>,
    /// Who is importing it.
    #[serde(default)]
    pub importing: Option<Owner>,
    pub created: UnixMillis,
}

impl ImageObject {
    /// Whether it can be forked.
    pub fn is_ready(&self) -> bool {
        self.importing.is_none()
    }
}

/// `snapshots/<uid>/<number>`: never changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotObject {
    pub uid: Uid,
    /// Name of the volume when it was taken.
    pub volume: String,
    pub number: u64,
    pub nonce: Nonce,
    #[serde(default)]
    pub map: Option<MapRef>,
    pub size_bytes: u64,
    #[serde(default)]
    pub description: Option<String>,
    pub created: UnixMillis,
}

/// `trash/<uid>.<random>`: the whole of a deleted root, or the source of a fork.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TrashObject {
    pub name: String,
    pub at: UnixMillis,
    pub root: TrashRoot,
}

/// What a trash entry keeps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrashRoot {
    Volume(Head),
    Image(ImageObject),
    Snapshot(SnapshotObject),
    /// A map that a fork is about to name.
    ForkSource {
        map: Option<MapRef>,
    },
}

/// A small object of a pool, and how much of it is believed.
pub trait SmallObject: Serialize + for<'de> Deserialize<'de> + Sized {
    /// Checks what the types do not say.
    ///
    /// # Errors
    /// What is wrong, for a person.
    fn check(&self) -> Result<(), String>;

    /// From its bytes.
    ///
    /// # Errors
    /// What is wrong, for a person.
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > SMALL_OBJECT_BYTES_MAX {
            return Err(format!("{} bytes are more than such an object has", bytes.len()));
        }
        let object: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        object.check()?;
        Ok(object)
    }

    /// Its bytes.
    ///
    /// # Panics
    /// Never: these types have nothing that JSON cannot say.
    fn encode(&self) -> Bytes {
        Bytes::from(serde_json::to_vec_pretty(self).expect("plain data serialises"))
    }
}

impl SmallObject for PoolObject {
    fn check(&self) -> Result<(), String> {
        if self.format != 1 {
            return Err(format!("format {} is not one that this version can read", self.format));
        }
        match self.features.first() {
            Some(feature) => Err(format!("feature \"{feature}\" is not one that this version knows")),
            None => Ok(()),
        }
    }
}

impl SmallObject for Head {
    fn check(&self) -> Result<(), String> {
        check_size(self.size_bytes)?;
        let counts = [self.term, self.floor, self.next_snapshot];
        if counts.into_iter().chain(self.history.iter().map(|record| record.term)).any(|n| n > COUNT_MAX) {
            return Err("a count is out of range".into());
        }
        if self.history.len() > HISTORY_MAX || !self.history.is_sorted_by(|a, b| a.term < b.term) {
            return Err("its history is out of order".into());
        }
        if self.history.last().is_some_and(|record| record.term > self.term) {
            return Err("its history is ahead of its term".into());
        }
        Ok(())
    }
}

impl SmallObject for ImageObject {
    fn check(&self) -> Result<(), String> {
        check_size(self.size_bytes)
    }
}

impl SmallObject for SnapshotObject {
    fn check(&self) -> Result<(), String> {
        check_size(self.size_bytes)
    }
}

impl SmallObject for TrashObject {
    fn check(&self) -> Result<(), String> {
        match &self.root {
            TrashRoot::Volume(head) => head.check(),
            TrashRoot::Image(image) => image.check(),
            TrashRoot::Snapshot(snapshot) => snapshot.check(),
            TrashRoot::ForkSource { .. } => Ok(()),
        }
    }
}

/// Checks a volume's size.
///
/// # Errors
/// What is wrong, for a person.
pub fn check_size(size_bytes: u64) -> Result<(), String> {
    if size_bytes == 0 || size_bytes > VOLUME_BYTES_MAX || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(format!(
            "{size_bytes} bytes is no size for a disk: it has to be a multiple of 512 up to 64 TiB"
        ));
    }
    Ok(())
}

/// Checks a name of a volume or image.
///
/// # Errors
/// What is wrong, for a person.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 128 {
        return Err(format!("a name has 1 to 128 characters, this one has {}", name.len()));
    }
    if !name.bytes().all(good) || !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(format!(
            "\"{}\" is no name: use a-z A-Z 0-9 . _ - and begin with a letter or digit",
            name.escape_default()
        ));
    }
    Ok(())
}

impl Head {
    /// The record of `term`.
    pub fn term_record(&self, term: u64) -> Option<&TermRecord> {
        self.history.iter().find(|record| record.term == term)
    }

    /// Highest epoch number that the history knows.
    pub fn last_epoch(&self) -> u64 {
        let epochs = self.history.iter().filter_map(|record| record.last_commit.as_ref()).map(|c| c.epoch);
        epochs.max().unwrap_or(0)
    }

    /// Ends the present term, if one goes on, and begins the next with that owner.
    pub fn begin_term(&mut self, owner: Option<Owner>, ended: TermEnd) {
        self.end_term(ended);
        self.term += 1;
        self.floor = 0;
        if let Some(owner) = &owner {
            self.history.push(TermRecord {
                term: self.term,
                node: owner.node,
                last_commit: None,
                ended: None,
            });
            if self.history.len() > HISTORY_MAX {
                self.history.remove(0);
            }
        }
        self.owner = owner;
    }

    /// Ends the present term.
    pub fn end_term(&mut self, how: TermEnd) {
        if let Some(record) = self.history.last_mut().filter(|record| record.ended.is_none()) {
            record.ended = Some(how);
        }
    }

    /// Records a commit of all epochs up to `epoch` in the present term.
    pub fn record_commit(&mut self, epoch: u64, incarnation: Incarnation, at: UnixMillis) {
        let term = self.term;
        if let Some(record) = self.history.iter_mut().find(|record| record.term == term) {
            record.last_commit = Some(CommitRecord { epoch, incarnation, at });
        }
        self.last_commit = Some(at);
    }
}

/// What becomes of an epoch file that recovery found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The head's history shows it as committed, by this state directory: its file goes.
    Committed,
    /// It is the newest there is of this volume: it is served and committed.
    Replayed,
    /// It belongs to another history: kept, listed, recoverable.
    Orphan,
}

/// Decides on the epoch `number` of `term`, found beside a head that this node now owns with `head.term`.
/// `ours`: every incarnation that this state directory ever had.
pub fn fate(head: &Head, term: u64, number: u64, ours: &[Incarnation]) -> Fate {
    let last = head.term_record(term).and_then(|record| record.last_commit.as_ref());
    let by_us = last.is_none_or(|commit| ours.contains(&commit.incarnation));
    if !by_us {
        return Fate::Orphan;
    }
    if last.is_some_and(|commit| number <= commit.epoch) {
        return Fate::Committed;
    }
    let current = term == head.term || crate::mutant::on(crate::mutant::Mutant::OtherTermReplayed);
    if current { Fate::Replayed } else { Fate::Orphan }
}

/// Keys of a pool. Names and ids are checked before a key is made of them, so all of these are well formed.
pub mod keys {
    use super::{Key, ObjectId, Uid};

    fn key(text: String) -> Key {
        Key::new(text).expect("a key made of checked names and hex ids is well formed")
    }

    /// `pool`
    pub fn pool() -> Key {
        key("pool".into())
    }

    /// `volumes/<name>`; the name must have been checked.
    pub fn volume(name: &str) -> Key {
        key(format!("volumes/{name}"))
    }

    /// `images/<name>`; the name must have been checked.
    pub fn image(name: &str) -> Key {
        key(format!("images/{name}"))
    }

    /// `snapshots/<uid>/<number>`, twenty digits so that they list in order.
    pub fn snapshot(uid: &Uid, number: u64) -> Key {
        key(format!("snapshots/{uid}/{number:020}"))
    }

    /// `trash/<uid>.<random>`
    pub fn trash(uid: &Uid, random: u64) -> Key {
        key(format!("trash/{uid}.{random:016x}"))
    }

    /// `packs/<id>`
    pub fn pack(id: &ObjectId) -> Key {
        key(format!("packs/{id}"))
    }

    /// `segments/<id>`
    pub fn segments(id: &ObjectId) -> Key {
        key(format!("segments/{id}"))
    }

    /// `maps/<id>`
    pub fn map(id: &ObjectId) -> Key {
        key(format!("maps/{id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(term: u64, history: Vec<TermRecord>) -> Head {
        Head {
            uid: Uid([1; 16]),
            nonce: Nonce([2; 16]),
            term,
            floor: 0,
            map: None,
            size_bytes: 512,
            owner: None,
            from: None,
            description: None,
            next_snapshot: 1,
            history,
            created: UnixMillis(0),
            last_commit: None,
        }
    }

    fn record(term: u64, commit: Option<(u64, u8)>) -> TermRecord {
        let last_commit = commit.map(|(epoch, who)| CommitRecord {
            epoch,
            incarnation: Incarnation([who; 16]),
            at: UnixMillis(1),
        });
        TermRecord { term, node: NodeId([9; 16]), last_commit, ended: None }
    }

    #[test]
    fn g1_epoch_of_another_term_is_neither_deleted_nor_replayed_by_its_number() {
        let ours = [Incarnation([7; 16])];
        let stolen = head(5, vec![record(4, Some((6, 7))), record(5, Some((9, 8)))]);
        assert_eq!(fate(&stolen, 4, 6, &ours), Fate::Committed);
        assert_eq!(fate(&stolen, 4, 7, &ours), Fate::Orphan);
        assert_eq!(fate(&stolen, 4, 8, &ours), Fate::Orphan);
        assert_eq!(fate(&stolen, 5, 10, &ours), Fate::Orphan);
    }

    #[test]
    fn g23_commit_by_a_clone_under_the_same_term_and_number_deletes_nothing() {
        let ours = [Incarnation([7; 16])];
        let cloned = head(4, vec![record(4, Some((7, 8)))]);
        assert_eq!(fate(&cloned, 4, 7, &ours), Fate::Orphan);
        assert_eq!(fate(&cloned, 4, 8, &ours), Fate::Orphan);
    }

    #[test]
    fn term_that_the_history_forgot_is_an_orphan() {
        assert_eq!(fate(&head(30, vec![record(30, None)]), 3, 1, &[]), Fate::Orphan);
        assert_eq!(fate(&head(30, vec![record(30, None)]), 30, 1, &[]), Fate::Replayed);
    }

    #[test]
    fn g19_hostile_heads_are_refused() {
        let mut beyond = head(1, vec![]);
        beyond.term = u64::MAX;
        assert!(Head::decode(&beyond.encode()).is_err());
        let mut huge = head(1, vec![]);
        huge.size_bytes = u64::MAX - 511;
        assert!(Head::decode(&huge.encode()).is_err());
        let text = String::from_utf8(head(1, vec![]).encode().to_vec()).expect("JSON is text");
        assert!(
            Head::decode(text.replace("\"map\": null", "\"map\": {\"id\":\"../../x\"}").as_bytes()).is_err()
        );
        assert!(Head::decode(&vec![b' '; 70_000]).is_err());
        assert!(Head::decode(b"{").is_err());
    }

    #[test]
    fn names_are_what_the_design_says() {
        for good in ["a", "vm-7", "9.x_Y", &"n".repeat(128)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "-a", ".hidden", "a/b", "a b", "ä", "a@1", &"n".repeat(129), "a\0"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn head_round_trips(term in 1u64..100, size in 1u64..1000, epochs in proptest::collection::vec(0u64..50, 0..16)) {
            let history = epochs.iter().enumerate().map(|(at, &e)| record(at as u64, Some((e, 1)))).collect();
            let mut head = head(term.max(16), history);
            head.size_bytes = size * 512;
            prop_assert_eq!(Head::decode(&head.encode()), Ok(head));
        }
    }
}
