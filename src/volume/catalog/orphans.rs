//! Local epochs that are in no history: listing them, and making a volume of them.
//!
//! Owns: which epoch files are orphans, and their way into a volume of their own.
//! Does not own: epochs of volumes that are attached here, which nobody else may touch.

use super::{delete_settled, read_volume, volumes};
use crate::disk::DiskPath;
use crate::store::Expect;
use crate::volume::attach::is_blank;
use crate::volume::base::BaseMap;
use crate::volume::destage::{BaseRecord, MapDraft, pack};
use crate::volume::engine::{Engine, EngineError, Stamps};
use crate::volume::epoch::{Epoch, EpochError, EpochHeader};
use crate::volume::head::{
    Fate, Head, Owner, SMALL_OBJECT_BYTES_MAX, SmallObject, TermEnd, check_name, fate, keys,
};
use crate::volume::ids::Uid;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// The epochs of one term of one volume that are in no history.
#[derive(Clone, Debug)]
pub struct Orphan {
    pub id: String,
    pub uid: Uid,
    /// Name that the volume had; empty if that is not known.
    pub volume: String,
    pub term: u64,
    pub numbers: Vec<u64>,
    pub dirty_bytes: u64,
    pub reason: String,
}

/// A volume that is attached here, or about to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InUse {
    pub uid: Uid,
    /// Files of this term are its own, those of others are not; none: all of them may be.
    pub term: Option<u64>,
}

/// One epoch file of the state directory.
struct Local {
    term: u64,
    number: u64,
    epoch: Result<Arc<Epoch>, String>,
}

/// What the pool says of the volume that a folder belongs to.
struct Owned<'a> {
    heads: &'a HashMap<Uid, (String, Head)>,
    unread: bool,
}

/// Lists the orphans of this node. Files that are `in_use` are not touched.
///
/// # Errors
/// `Disk`, `Unavailable`.
pub async fn orphans(engine: &Arc<Engine>, in_use: &[InUse]) -> Result<Vec<Orphan>, EngineError> {
    let mut heads = HashMap::new();
    let mut unread = false;
    for (name, head) in volumes(engine).await? {
        match head {
            Ok(head) => {
                heads.insert(head.uid, (name, head));
            }
            Err(_) => unread = true,
        }
    }
    let owned = Owned { heads: &heads, unread };
    let folders = engine.disk.list(DiskPath::state("volumes")).await.map_err(disk)?;
    let mut all = Vec::new();
    for uid in folders.iter().filter_map(|name| Uid::parse(name)) {
        let own_term = match in_use.iter().find(|used| used.uid == uid) {
            Some(InUse { term: None, .. }) => continue,
            Some(InUse { term, .. }) => *term,
            None => None,
        };
        all.extend(orphans_of(engine, uid, own_term, &owned).await?);
    }
    Ok(all)
}

fn disk(error: std::io::Error) -> EngineError {
    EngineError::Disk(format!("failed to look at the state directory: {error}"))
}

async fn orphans_of(
    engine: &Arc<Engine>,
    uid: Uid,
    own_term: Option<u64>,
    owned: &Owned<'_>,
) -> Result<Vec<Orphan>, EngineError> {
    let mut terms: BTreeMap<u64, Orphan> = BTreeMap::new();
    for local in open_local(engine, &uid, |term| Some(term) != own_term).await? {
        let Some(reason) = orphan_reason(engine, &uid, &local, owned) else { continue };
        let name = match (owned.heads.get(&uid), terms.get(&local.term)) {
            (_, Some(known)) => known.volume.clone(),
            (Some((name, _)), None) => name.clone(),
            (None, None) => read_record(engine, &uid, local.term).await.map_or_else(String::new, |r| r.name),
        };
        let orphan = terms.entry(local.term).or_insert_with(|| Orphan {
            id: format!("{uid}-{}", local.term),
            uid,
            volume: name,
            term: local.term,
            numbers: Vec::new(),
            dirty_bytes: 0,
            reason,
        });
        orphan.numbers.push(local.number);
        orphan.dirty_bytes += local.epoch.map_or(0, |epoch| epoch.dirty_bytes());
    }
    Ok(terms.into_values().collect())
}

/// Why an epoch is an orphan; `None` if it is not one.
fn orphan_reason(engine: &Engine, uid: &Uid, local: &Local, owned: &Owned<'_>) -> Option<String> {
    let epoch = match &local.epoch {
        Ok(epoch) => epoch,
        Err(reason) => return Some(reason.clone()),
    };
    if !epoch.has_records() && epoch.map().is_empty() {
        return None;
    }
    let Some((name, head)) = owned.heads.get(uid) else {
        // A head that cannot be read may be this volume's: nothing of it is given away.
        return (!owned.unread).then(|| "the volume no longer exists".to_owned());
    };
    match fate(head, local.term, local.number, &engine.identity.ours) {
        Fate::Committed => None,
        Fate::Orphan => Some(format!("volume {name} went on without these writes, as another history")),
        Fate::Replayed if epoch.has_failed() => {
            Some(format!("a sync of these writes failed once, so volume {name} is not served with them"))
        }
        Fate::Replayed => match &head.owner {
            Some(owner) if owner.node == engine.identity.node => None,
            _ => Some(format!("volume {name} is no longer this node's")),
        },
    }
}

/// The epoch files of a volume in the terms that are `wanted`.
async fn open_local(
    engine: &Arc<Engine>,
    uid: &Uid,
    wanted: impl Fn(u64) -> bool,
) -> Result<Vec<Local>, EngineError> {
    let folder = EpochHeader::folder(uid);
    let names = engine.disk.list(DiskPath::state(&*folder)).await.map_err(disk)?;
    let mut found = Vec::new();
    for name in names {
        let numbers = name.strip_prefix("epoch-").and_then(|rest| rest.split_once('-'));
        let Some((term, number)) = numbers.and_then(|(t, n)| Some((t.parse().ok()?, n.parse().ok()?))) else {
            continue;
        };
        if !wanted(term) {
            continue;
        }
        let path = DiskPath::state(format!("{folder}/{name}"));
        let epoch = match Epoch::open(&engine.disk, engine.offload, &path).await {
            Ok(epoch) if epoch.header().pool != engine.identity.pool => {
                Err(format!("it belongs to pool {}", epoch.header().pool))
            }
            Ok(epoch) => Ok(epoch),
            // The making of it was cut short: no write was ever sent to it.
            Err(EpochError::Corrupt { .. }) if is_blank(engine, &path).await? => continue,
            Err(error @ EpochError::Corrupt { .. }) => Err(error.to_string()),
            Err(error @ EpochError::Disk { .. }) => return Err(error.into()),
        };
        found.push(Local { term, number, epoch });
    }
    Ok(found)
}

async fn read_record(engine: &Engine, uid: &Uid, term: u64) -> Option<BaseRecord> {
    let bytes = engine.disk.read_small(BaseRecord::path(uid, term), SMALL_OBJECT_BYTES_MAX).await.ok()?;
    let record: BaseRecord = serde_json::from_slice(&bytes).ok()?;
    (record.uid == *uid && record.term == term).then_some(record)
}

/// Makes the volume `name` of an orphan: its epochs, as one commit, on the last commit that they lie on. The files go
/// once the volume stands.
///
/// # Errors
/// `NotFound`; `Conflict` if the name is taken; `Corrupt` if a file or the base cannot be read; `Unavailable`, `Unclear`.
///
/// # Cancellation
/// The files stay; the same call again goes on.
pub async fn recover(
    engine: &Arc<Engine>,
    in_use: &[InUse],
    id: &str,
    name: &str,
) -> Result<Head, EngineError> {
    check_name(name).map_err(EngineError::Conflict)?;
    let missing = || EngineError::NotFound(format!("there is no orphan {}", id.escape_default()));
    let orphan =
        orphans(engine, in_use).await?.into_iter().find(|orphan| orphan.id == id).ok_or_else(missing)?;
    let record = read_record(engine, &orphan.uid, orphan.term).await.ok_or_else(|| {
        EngineError::Corrupt(format!(
            "the note of the commit that orphan {id} lies on is lost; its files are kept in {}",
            EpochHeader::folder(&orphan.uid)
        ))
    })?;
    let mut epochs = Vec::new();
    for local in open_local(engine, &orphan.uid, |term| term == orphan.term).await? {
        if local.number > record.epoch {
            epochs.push(local.epoch.map_err(EngineError::Corrupt)?);
        }
    }
    check_gap(engine, &orphan, &record, &epochs).await?;
    epochs.sort_by_key(|epoch| epoch.number());
    let failed = epochs.iter().any(|epoch| epoch.has_failed());
    let head = build(engine, &orphan, &record, &epochs, name, failed).await?;
    for epoch in epochs {
        if let Err(error) = epoch.unlink(&engine.disk).await {
            log::warn!("{} stays, though it is recovered: {error}", epoch.header().path().path);
        }
    }
    let record = BaseRecord::path(&orphan.uid, orphan.term);
    if let Err(error) = engine.disk.remove(record.clone()).await {
        log::debug!("{} stays: {error}", record.path);
    }
    // Not empty while there are other orphans.
    drop(engine.disk.remove_dir(record.parent()).await);
    Ok(head)
}

/// The note of the base is written after the head: one that could not be written is older than epochs that are gone.
async fn check_gap(
    engine: &Engine,
    orphan: &Orphan,
    record: &BaseRecord,
    epochs: &[Arc<Epoch>],
) -> Result<(), EngineError> {
    let head = match read_volume(engine, &orphan.volume).await {
        Ok((head, _)) if head.uid == orphan.uid => head,
        Ok(_) | Err(EngineError::NotFound(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let commit = head.term_record(orphan.term).and_then(|term| term.last_commit.as_ref());
    let ours = commit.filter(|commit| engine.identity.ours.contains(&commit.incarnation));
    match ours {
        Some(commit)
            if commit.epoch > record.epoch && !epochs.iter().any(|epoch| epoch.number() == commit.epoch) =>
        {
            Err(EngineError::Corrupt(format!(
                "orphan {} lies on epoch {}, and the note of that commit was never written; its files are kept",
                orphan.id, commit.epoch
            )))
        }
        _ => Ok(()),
    }
}

async fn build(
    engine: &Arc<Engine>,
    orphan: &Orphan,
    record: &BaseRecord,
    epochs: &[Arc<Epoch>],
    name: &str,
    failed: bool,
) -> Result<Head, EngineError> {
    let from = format!("orphan:{}", orphan.id);
    let now = engine.clock.wall();
    let warning = if failed {
        "; a sync of its data failed once, so what was written then may be missing or damaged"
    } else {
        ""
    };
    let size_bytes = epochs.last().map_or(record.size_bytes, |epoch| epoch.header().size_bytes);
    let mut head = Head {
        uid: engine.new_uid(),
        nonce: engine.nonce(),
        term: 0,
        floor: 0,
        map: record.map,
        size_bytes,
        owner: None,
        from: Some(from.clone()),
        description: Some(format!(
            "recovered from writes to {} that were only on this node{warning}",
            orphan.volume
        )),
        next_snapshot: 1,
        history: Vec::new(),
        created: now,
        last_commit: None,
    };
    let owner = Owner { node: engine.identity.node, incarnation: engine.identity.incarnation };
    head.begin_term(Some(owner), TermEnd::Released);
    let (key, patience) = (keys::volume(name), Some(engine.config.pool_wait));
    // What an earlier attempt left that was cut short is taken over: no commit was ever made in it.
    let expect = match read_volume(engine, name).await {
        Err(EngineError::NotFound(_)) => Expect::Absent,
        Ok((old, etag))
            if old.from.as_deref() == Some(&*from)
                && old.last_commit.is_none()
                && old
                    .owner
                    .as_ref()
                    .is_some_and(|owner| engine.identity.ours.contains(&owner.incarnation)) =>
        {
            Expect::State(etag)
        }
        Ok(_) => return Err(EngineError::Conflict(format!("a volume called {name} exists already"))),
        Err(error) => return Err(error),
    };
    // The head stands before the first upload: so nothing of it is swept.
    let etag = engine.swap_settled(&key, expect, head.encode(), patience).await?;
    let uid = head.uid;
    let outcome = async {
        let base = BaseMap::open(engine, record.map, record.size_bytes).await?;
        let mut stamps = Stamps::new(uid, head.term, head.floor);
        let packed = pack(engine, &mut stamps, &base, epochs).await?;
        let mut draft = MapDraft::new(&base, size_bytes);
        for pack in packed.packs {
            draft.push(engine, &mut stamps, pack).await?;
        }
        let published = draft.publish(engine, &mut stamps, size_bytes).await?;
        let mut done = head.clone();
        done.nonce = engine.nonce();
        done.map = published.reference;
        done.last_commit = Some(now);
        done.owner = None;
        done.end_term(TermEnd::Released);
        engine.swap_settled(&key, Expect::State(etag.clone()), done.encode(), patience).await?;
        Ok(done)
    }
    .await;
    if let Err(error) = &outcome
        && !matches!(error, EngineError::Unclear(_))
        && let Err(error) = delete_settled(engine, &key, etag, &uid).await
    {
        log::warn!("the half-made volume {name} stays: {error}");
    }
    outcome
}
