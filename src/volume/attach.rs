//! Takes a volume into use on this node: owns its head, and finds what an earlier run left behind.
//!
//! Recovery is a cut: every epoch with a record is frozen, a fresh file becomes active, and all frozen ones go into one
//! commit, always, since after a power loss and then a kill nobody remembers that they belong together.
//!
//! Owns: the order of locking, owning, judging and deleting.
//! Does not own: which volumes are to be attached (the node's table).

use crate::disk::{DiskPath, Lock};
use crate::mutant::{self, Mutant};
use crate::store::{ETag, Expect};
use crate::volume::Volume;
use crate::volume::base::BaseMap;
use crate::volume::destage::{BaseRecord, Destager, DestagerHandle, HeldHead, write_base_record};
use crate::volume::engine::{Engine, EngineError};
use crate::volume::epoch::{Epoch, EpochError, EpochHeader};
use crate::volume::head::{Fate, Head, Owner, SmallObject, TermEnd, TermRecord, fate, keys};
use crate::volume::ids::Uid;
use crate::volume::layers::Layers;
use crate::volume::sector_map::MAP_PAGE_BYTES;
use std::sync::Arc;

/// A volume in use.
pub struct Attached {
    pub volume: Arc<Volume>,
    pub destager: DestagerHandle,
    /// Epochs of other histories that were found beside its own: kept.
    pub orphans: usize,
}

impl From<EpochError> for EngineError {
    fn from(error: EpochError) -> Self {
        let text = error.to_string();
        match error {
            EpochError::Disk { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Self::NoSpace(text)
            }
            EpochError::Disk { .. } => Self::Disk(text),
            EpochError::Corrupt { .. } => Self::Corrupt(format!(
                "{text}; it may hold writes that are nowhere else: move it away to go on without them"
            )),
        }
    }
}

/// Attaches the volume `name`, whose name was checked. Nobody else in this process may have it.
///
/// # Errors
/// `NotFound`; `Conflict` if another node has it; `Stopped` if a sync of its local data failed once; `Corrupt`,
/// `Disk`, `NoSpace`, `Unavailable`.
///
/// # Cancellation
/// As a crash: the next attach recovers.
pub async fn attach(engine: &Arc<Engine>, name: &str) -> Result<Attached, EngineError> {
    let key = keys::volume(name);
    let (head, etag) = engine.read_small::<Head>(&key).await?;
    check_owner(engine, name, &head)?;
    // Locked before the head is read for good: writes of a killed process that are still in the kernel hold the lock.
    let epochs = open_epochs(engine, &head.uid).await?;
    let held = own(engine, name, head, etag).await?;
    recover(engine, held, epochs).await
}

fn check_owner(engine: &Engine, name: &str, head: &Head) -> Result<(), EngineError> {
    let Some(owner) = &head.owner else { return Ok(()) };
    if owner.node != engine.identity.node {
        return Err(EngineError::Conflict(format!("volume {name} is attached on node {}", owner.node)));
    }
    if !engine.identity.ours.contains(&owner.incarnation) {
        return Err(EngineError::Conflict(format!(
            "volume {name} is attached by another daemon with this node's identity: \
             its state directory was cloned, or set back to an older copy"
        )));
    }
    Ok(())
}

/// Opens and locks all epoch files of a volume. Files that were never used are left out, and removed later.
async fn open_epochs(engine: &Arc<Engine>, uid: &Uid) -> Result<Vec<Found>, EngineError> {
    let folder = DiskPath::state(EpochHeader::folder(uid));
    let names = engine.disk.list(folder.clone()).await.map_err(disk("list epoch files"))?;
    let mut found = Vec::new();
    for name in names.iter().filter(|name| name.starts_with("epoch-")) {
        let path = DiskPath::state(format!("{}/{name}", folder.path));
        match Epoch::open(&engine.disk, engine.offload, &path).await {
            Ok(epoch) if epoch.header().pool != engine.identity.pool => {
                return Err(EngineError::Conflict(format!(
                    "epoch file {} belongs to pool {}, not to {}: this is the state directory of another pool",
                    path.path,
                    epoch.header().pool,
                    engine.identity.pool
                )));
            }
            Ok(epoch) => found.push(Found::Epoch(epoch)),
            // The making of it was cut short: no write was ever sent to it.
            Err(EpochError::Corrupt { .. }) if is_blank(engine, &path).await? => {
                found.push(Found::Blank(path));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

enum Found {
    Epoch(Arc<Epoch>),
    Blank(DiskPath),
}

pub(super) async fn is_blank(engine: &Engine, path: &DiskPath) -> Result<bool, EngineError> {
    let file =
        engine.disk.open(path.clone(), Lock::Exclusive).await.map_err(disk("look at an epoch file"))?;
    let data = file.data_stretches(MAP_PAGE_BYTES, 1).await.map_err(disk("look at an epoch file"))?;
    Ok(data.is_empty())
}

fn disk(what: &'static str) -> impl FnOnce(std::io::Error) -> EngineError {
    move |error| EngineError::Disk(format!("failed to {what}: {error}"))
}

/// Swaps the head to this incarnation: from here on no swap of a killed process can land any more.
async fn own(engine: &Arc<Engine>, name: &str, head: Head, etag: ETag) -> Result<HeldHead, EngineError> {
    let key = keys::volume(name);
    let (mut head, mut etag) = (head, etag);
    loop {
        let owner = Owner { node: engine.identity.node, incarnation: engine.identity.incarnation };
        let mut next = head.clone();
        next.nonce = engine.nonce();
        if next.owner.is_some() {
            if mutant::on(Mutant::HeadOnlyRead) {
                return Ok(HeldHead { name: name.to_owned(), head, etag });
            }
            next.owner = Some(owner.clone());
            // Beyond everything that the process before may have used.
            next.floor = ((next.floor >> 40) + 1) << 40;
            ensure_record(&mut next);
        } else {
            next.begin_term(Some(owner.clone()), TermEnd::Released);
        }
        let patience = Some(engine.config.pool_wait);
        match engine.swap_settled(&key, Expect::State(etag.clone()), next.encode(), patience).await {
            Ok(etag) => return Ok(HeldHead { name: name.to_owned(), head: next, etag }),
            // A swap of the killed process may have landed in between: look again.
            Err(EngineError::Conflict(_)) => {
                let uid = head.uid;
                (head, etag) = engine.read_small::<Head>(&key).await?;
                if head.uid != uid {
                    return Err(EngineError::Conflict(format!("volume {name} was made anew meanwhile")));
                }
                check_owner(engine, name, &head)?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The history of a head that lost its oldest terms still has the present one.
fn ensure_record(head: &mut Head) {
    if head.term_record(head.term).is_none()
        && let Some(owner) = &head.owner
    {
        let record = TermRecord { term: head.term, node: owner.node, last_commit: None, ended: None };
        head.history.push(record);
    }
}

async fn recover(engine: &Arc<Engine>, held: HeldHead, found: Vec<Found>) -> Result<Attached, EngineError> {
    let (head, uid) = (&held.head, held.head.uid);
    let base = BaseMap::open(engine, head.map, head.size_bytes).await?;
    let (mut replayed, mut orphans, mut removed) = (Vec::new(), Vec::new(), Vec::new());
    let mut last_number = head.last_epoch();
    for found in found {
        let epoch = match found {
            Found::Epoch(epoch) => epoch,
            Found::Blank(path) => {
                engine.disk.remove(path).await.map_err(disk("remove an epoch file"))?;
                continue;
            }
        };
        last_number = last_number.max(epoch.number());
        match fate(head, epoch.header().term, epoch.number(), &engine.identity.ours) {
            Fate::Committed => removed.push(epoch),
            _ if !epoch.has_records() && epoch.map().is_empty() => removed.push(epoch),
            Fate::Replayed => replayed.push(epoch),
            Fate::Orphan => orphans.push(epoch),
        }
    }
    replayed.sort_by_key(|epoch| (epoch.header().term, epoch.number()));
    if let Some(failed) = replayed.iter().find(|epoch| epoch.has_failed()) {
        return Err(EngineError::Stopped(format!(
            "a sync of {} failed once, so what was written to it and not flushed may be lost: \
             volume {} is not served. Its data is kept; `blockhouse volume recover` makes a new volume of it",
            failed.header().path().path,
            held.name
        )));
    }
    if !orphans.is_empty() {
        log::warn!(
            volume = held.name.as_str();
            "{} epoch files belong to another history of this volume: they are kept, see `blockhouse volume orphans`",
            orphans.len()
        );
    }
    remove_stray_maps(engine, &uid, replayed.iter().chain(&orphans)).await?;
    let number = last_number + 1;
    let header = EpochHeader {
        pool: engine.identity.pool,
        uid,
        file_id: engine.new_file_id(),
        incarnation: engine.identity.incarnation,
        term: head.term,
        number,
        size_bytes: head.size_bytes,
    };
    let record = base_record(&held);
    let noted = async {
        write_base_record(engine, &record).await;
        remove_stray_records(engine, &held.head, &orphans).await;
    };
    let active = if removed.is_empty() {
        // Side by side: each waits for the disk, and somebody waits for the attach.
        futures::future::join(noted, Epoch::create(&engine.disk, engine.offload, header)).await.1?
    } else {
        noted.await;
        for epoch in removed {
            epoch.unlink(&engine.disk).await.map_err(disk("remove an epoch file"))?;
        }
        Epoch::create(&engine.disk, engine.offload, header).await?
    };
    let pages = replayed.iter().map(|epoch| epoch.map().touched_pages()).sum();
    engine.pressure.note_map_pages(pages, 0);
    let size_bytes = head.size_bytes;
    let layers = Layers { active, frozen: replayed, base };
    let volume = Volume::new(engine.clone(), uid, layers, size_bytes);
    let destager = Destager::start(engine.clone(), volume.clone(), held, number + 1);
    Ok(Attached { volume, destager, orphans: orphans.len() })
}

fn base_record(held: &HeldHead) -> BaseRecord {
    BaseRecord {
        name: held.name.clone(),
        uid: held.head.uid,
        term: held.head.term,
        epoch: held.head.last_epoch(),
        map: held.head.map,
        size_bytes: held.head.size_bytes,
    }
}

/// Removes records of the bases of terms that left no orphans. They are only of use beside one.
async fn remove_stray_records(engine: &Engine, head: &Head, orphans: &[Arc<Epoch>]) {
    let folder = EpochHeader::folder(&head.uid);
    let names = engine.disk.list(DiskPath::state(&*folder)).await.unwrap_or_default();
    let terms = orphans.iter().map(|epoch| epoch.header().term).chain([head.term]);
    let kept: Vec<String> = terms.map(|term| BaseRecord::path(&head.uid, term).path).collect();
    for path in names.iter().filter(|name| name.starts_with("base-")).map(|name| format!("{folder}/{name}")) {
        if !kept.contains(&path)
            && let Err(error) = engine.disk.remove(DiskPath::state(&*path)).await
        {
            log::debug!("{path} stays: {error}");
        }
    }
}

/// Removes live maps of the volume that belong to no epoch file.
async fn remove_stray_maps(
    engine: &Engine,
    uid: &Uid,
    kept: impl Iterator<Item = &Arc<Epoch>>,
) -> Result<(), EngineError> {
    let kept: Vec<String> = kept.map(|epoch| epoch.header().live_path().path).collect();
    let names = engine.disk.list(DiskPath::runtime("live")).await.map_err(disk("list live maps"))?;
    let prefix = format!("{uid}-");
    for name in names.into_iter().filter(|name| name.starts_with(&prefix)) {
        let path = DiskPath::runtime(format!("live/{name}"));
        if !kept.contains(&path.path) {
            engine.disk.remove(path).await.map_err(disk("remove a live map"))?;
        }
    }
    Ok(())
}
