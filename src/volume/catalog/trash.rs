//! Deleting, and bringing back what was deleted.
//!
//! Owns: the order copy to the trash, then deletion; what the trash holds; undelete.
//! Does not own: when an entry is swept.

use super::{
    Made, READS_AT_ONCE, check_detached, delete_settled, list_folder, past, put_fixed, read_image,
    read_volume,
};
use crate::store::{Expect, Key};
use crate::volume::engine::{Engine, EngineError};
use crate::volume::head::{
    Head, ImageObject, SmallObject, SnapshotObject, TermEnd, TrashObject, TrashRoot, check_name, keys,
};
use crate::volume::ids::Uid;
use futures::stream::{self, StreamExt};

/// An entry of the trash.
#[derive(Clone, Debug)]
pub struct Trashed {
    pub id: String,
    pub object: TrashObject,
}

/// What becomes of the snapshots of a volume that is deleted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Snapshots {
    /// Refuse while there are any.
    Refuse,
    /// They are deleted too, each with an entry of its own.
    Delete,
}

/// Deletes a detached volume.
///
/// # Errors
/// `Conflict` if it is attached, has snapshots, or was changed meanwhile; `NotFound`, `Unavailable`, `Unclear`.
pub async fn delete_volume(
    engine: &Engine,
    name: &str,
    snapshots: Snapshots,
) -> Result<Trashed, EngineError> {
    let (head, etag) = read_volume(engine, name).await?;
    check_detached(name, &head)?;
    let numbers = past::snapshot_numbers(engine, &head.uid).await?;
    if let (Some(last), Snapshots::Refuse) = (numbers.last(), snapshots) {
        return Err(EngineError::Conflict(format!(
            "volume {name} has {} snapshots, the last is {name}@{last}",
            numbers.len()
        )));
    }
    for number in numbers {
        delete_snapshot_of(engine, name, &head.uid, number).await?;
    }
    let uid = head.uid;
    let entry = put_entry(engine, &uid, name, TrashRoot::Volume(head)).await?;
    withdrawn_on_failure(engine, entry, delete_settled(engine, &keys::volume(name), etag, &uid).await).await
}

/// Deletes an image. One whose import was cut short leaves no entry.
///
/// # Errors
/// `Conflict` while this process imports it; `NotFound`, `Unavailable`, `Unclear`.
pub async fn delete_image(engine: &Engine, name: &str) -> Result<Trashed, EngineError> {
    let (image, etag) = read_image(engine, name).await?;
    if image.importing.as_ref().is_some_and(|owner| owner.incarnation == engine.identity.incarnation) {
        return Err(EngineError::Conflict(format!("image {name} is being imported")));
    }
    let uid = image.uid;
    let entry = put_entry(engine, &uid, name, TrashRoot::Image(image)).await?;
    withdrawn_on_failure(engine, entry, delete_settled(engine, &keys::image(name), etag, &uid).await).await
}

/// Deletes a snapshot.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unavailable`, `Unclear`.
pub async fn delete_snapshot(engine: &Engine, volume: &str, number: u64) -> Result<Trashed, EngineError> {
    let (head, _) = read_volume(engine, volume).await?;
    delete_snapshot_of(engine, volume, &head.uid, number).await
}

async fn delete_snapshot_of(
    engine: &Engine,
    volume: &str,
    uid: &Uid,
    number: u64,
) -> Result<Trashed, EngineError> {
    let snapshot = past::read_snapshot(engine, volume, uid, number).await?;
    let name = format!("{volume}@{number}");
    let entry = put_entry(engine, uid, &name, TrashRoot::Snapshot(snapshot)).await?;
    let key = keys::snapshot(uid, number);
    let patience = Some(engine.config.pool_wait);
    let deleted = engine.patiently(patience, || engine.store.delete(&key)).await.map_err(EngineError::from);
    withdrawn_on_failure(engine, entry, deleted).await
}

async fn put_entry(engine: &Engine, uid: &Uid, name: &str, root: TrashRoot) -> Result<Trashed, EngineError> {
    let object = TrashObject { name: name.to_owned(), at: engine.clock.wall(), root };
    let key = keys::trash(uid, engine.random());
    put_fixed(engine, &key, object.encode()).await?;
    Ok(Trashed { id: id_of(&key), object })
}

async fn withdrawn_on_failure(
    engine: &Engine,
    entry: Trashed,
    deleted: Result<(), EngineError>,
) -> Result<Trashed, EngineError> {
    match deleted {
        Ok(()) => Ok(entry),
        // It may be gone, or be gone later: then the entry is all that is left of it.
        Err(error @ EngineError::Unclear(_)) => Err(error),
        Err(error) => {
            if let Some(key) = key_of(&entry.id) {
                super::forget(engine, &key).await;
            }
            Err(error)
        }
    }
}

fn id_of(key: &Key) -> String {
    key.as_str().strip_prefix("trash/").unwrap_or_default().to_owned()
}

fn key_of(id: &str) -> Option<Key> {
    let (uid, random) = id.split_once('.')?;
    let good = random.len() == 16 && random.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let random = u64::from_str_radix(random, 16).ok().filter(|_| good)?;
    Some(keys::trash(&Uid::parse(uid)?, random))
}

/// What can be brought back, latest first; and how many entries are damaged.
///
/// # Errors
/// `Unavailable`.
pub async fn trash(engine: &Engine) -> Result<(Vec<Trashed>, usize), EngineError> {
    let listed = list_folder(engine, "trash").await?;
    let read = listed.into_iter().map(|listed| async move {
        let id = id_of(&listed.key);
        engine.read_small::<TrashObject>(&listed.key).await.map(|(object, _)| Trashed { id, object })
    });
    let read: Vec<_> = stream::iter(read).buffered(READS_AT_ONCE).collect().await;
    let (mut entries, mut damaged) = (Vec::new(), 0);
    for entry in read {
        match entry {
            Ok(entry) if matches!(entry.object.root, TrashRoot::ForkSource { .. }) => {}
            Ok(entry) => entries.push(entry),
            Err(EngineError::NotFound(_)) => {}
            Err(EngineError::Corrupt(reason)) => {
                log::warn!("an entry of the trash cannot be read: {reason}");
                damaged += 1;
            }
            Err(error) => return Err(error),
        }
    }
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.object.at));
    Ok((entries, damaged))
}

/// What was brought back.
#[derive(Clone, Debug)]
pub enum Restored {
    Volume(String, Head),
    Image(String, ImageObject),
    Snapshot(SnapshotObject),
}

/// Brings back an entry, by its id or by the name of what was deleted (the latest), under `name` or its own.
///
/// # Errors
/// `NotFound`; `Conflict` if the name is taken, or it is back already; `Unavailable`, `Unclear`.
pub async fn undelete(
    engine: &Engine,
    id_or_name: &str,
    name: Option<&str>,
) -> Result<Restored, EngineError> {
    let entry = find(engine, id_or_name).await?;
    let name = name.unwrap_or(&entry.name).to_owned();
    if !matches!(entry.root, TrashRoot::Snapshot(_)) {
        check_name(&name).map_err(EngineError::Conflict)?;
    }
    match entry.root {
        TrashRoot::Volume(mut head) => {
            // Two volumes of one uid would share their snapshots and their local files.
            for (other, found) in super::volumes(engine).await? {
                if found.is_ok_and(|found| found.uid == head.uid) {
                    return Err(EngineError::Conflict(format!("it is back already, as volume {other}")));
                }
            }
            head.nonce = engine.nonce();
            head.begin_term(None, TermEnd::Released);
            swap_in(engine, &keys::volume(&name), &head, "volume", &name).await?;
            Ok(Restored::Volume(name, head))
        }
        TrashRoot::Image(mut image) => {
            if !image.is_ready() {
                return Err(EngineError::NotFound(format!("the import of image {name} was never finished")));
            }
            image.nonce = engine.nonce();
            image.term += 1;
            swap_in(engine, &keys::image(&name), &image, "image", &name).await?;
            Ok(Restored::Image(name, image))
        }
        TrashRoot::Snapshot(snapshot) => {
            put_fixed(engine, &keys::snapshot(&snapshot.uid, snapshot.number), snapshot.encode()).await?;
            Ok(Restored::Snapshot(snapshot))
        }
        TrashRoot::ForkSource { .. } => {
            Err(EngineError::NotFound(format!("{} is nothing that was deleted", id_or_name.escape_default())))
        }
    }
}

async fn swap_in<T: SmallObject>(
    engine: &Engine,
    key: &Key,
    object: &T,
    kind: &str,
    name: &str,
) -> Result<(), EngineError> {
    let patience = Some(engine.config.pool_wait);
    match engine.swap_settled(key, Expect::Absent, object.encode(), patience).await {
        Ok(_) => Ok(()),
        Err(EngineError::Conflict(_)) => {
            Err(EngineError::Conflict(format!("there is another {kind} called {name}: give another name")))
        }
        Err(error) => Err(error),
    }
}

async fn find(engine: &Engine, id_or_name: &str) -> Result<TrashObject, EngineError> {
    let missing =
        || EngineError::NotFound(format!("the trash has nothing called {}", id_or_name.escape_default()));
    if let Some(key) = key_of(id_or_name) {
        return match engine.read_small::<TrashObject>(&key).await {
            Ok((object, _)) => Ok(object),
            Err(EngineError::NotFound(_)) => Err(missing()),
            Err(error) => Err(error),
        };
    }
    let (entries, _) = trash(engine).await?;
    let latest = entries.into_iter().find(|entry| entry.object.name == id_or_name);
    latest.map(|entry| entry.object).ok_or_else(missing)
}

/// The head of either outcome.
impl Made {
    pub fn head(&self) -> &Head {
        match self {
            Self::Now(head) | Self::Already(head) => head,
        }
    }
}
