//! Names in a pool: what there is, and making a volume in one small request.
//!
//! Owns: the pool object, listing and reading heads, creating and forking. [`past`]: snapshots and rollback.
//! [`trash`]: deleting and bringing back. [`orphans`]: local epochs that are in no history.
//! Does not own: the head of an attached volume (its destager), or which volumes are attached (the node).

pub mod orphans;
pub mod past;
pub mod trash;

use crate::clock::Clock;
use crate::store::{ETag, Expect, GetRange, Key, Listed, ObjectStore, StoreError};
use crate::volume::destage::HeadWork;
use crate::volume::engine::{Engine, EngineError};
use crate::volume::head::{
    Head, ImageObject, PoolObject, SMALL_OBJECT_BYTES_MAX, SmallObject, SnapshotObject, TrashObject,
    TrashRoot, check_name, check_size, keys,
};
use crate::volume::ids::{PoolId, Uid};
use crate::volume::map::MapRef;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::oneshot;

/// Names that are asked for at once.
const LIST_PAGE: usize = 1000;
/// Small objects that are read at once.
const READS_AT_ONCE: usize = 16;
/// A source that moves while it is forked is looked at again this often.
const FORK_TRIES: usize = 5;

/// Reads the pool object of `store`, or makes one with the id `proposed`.
///
/// # Errors
/// `Unavailable`; `Corrupt` if it is the pool of something that this version cannot read.
pub async fn open_pool(
    store: &dyn ObjectStore,
    clock: &Clock,
    proposed: PoolId,
) -> Result<PoolObject, EngineError> {
    let key = keys::pool();
    let range = GetRange::Whole { max_bytes: SMALL_OBJECT_BYTES_MAX };
    let found = match store.get(&key, range).await {
        Err(StoreError::NotFound(_)) => {
            let pool = PoolObject { id: proposed, format: 1, features: Vec::new(), created: clock.wall() };
            match store.put_new(&key, pool.encode()).await {
                // Whoever was first has made it, and an unclear put may have been ours: what is there counts.
                Ok(()) | Err(StoreError::Conflict(_) | StoreError::Unclear { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            store.get(&key, range).await?
        }
        other => other?,
    };
    PoolObject::decode(&found.bytes).map_err(|reason| {
        EngineError::Corrupt(format!("this is no pool that this version of Blockhouse can use: {reason}"))
    })
}

/// A state in the pool that a new volume begins with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Base {
    pub map: Option<MapRef>,
    pub size_bytes: u64,
    /// What it is called, as the new volume's `from`.
    pub from: String,
}

/// A volume to be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewVolume {
    pub name: String,
    /// By default that of the source.
    pub size_bytes: Option<u64>,
    pub description: Option<String>,
}

/// Whether a create made something, or found that it had been made before.
#[derive(Clone, Debug)]
pub enum Made {
    Now(Head),
    Already(Head),
}

/// A volume's head with its state.
pub type HeadState = (Head, ETag);

impl NewVolume {
    /// Checks what does not depend on the source.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn check(&self) -> Result<(), String> {
        check_name(&self.name)?;
        check_description(self.description.as_deref())?;
        self.size_bytes.map_or(Ok(()), check_size)
    }

    /// The volume of that name, if it is what this request made, or would have made.
    ///
    /// # Errors
    /// `Conflict` if it is another; `Unavailable`, `Corrupt`.
    pub async fn find(&self, engine: &Engine, from: Option<&str>) -> Result<Option<Head>, EngineError> {
        let head = match read_volume(engine, &self.name).await {
            Ok((head, _)) => head,
            Err(EngineError::NotFound(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let same = self.size_bytes.is_none_or(|size| size == head.size_bytes)
            && head.from.as_deref() == from
            && head.description == self.description;
        if same {
            return Ok(Some(head));
        }
        Err(EngineError::Conflict(format!(
            "a volume called {} exists already, and is another one",
            self.name
        )))
    }

    /// The size over `base`.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn size_over(&self, base: Option<&Base>) -> Result<u64, String> {
        let size_bytes = match (self.size_bytes, base) {
            (Some(size), Some(base)) if size < base.size_bytes => {
                return Err(format!(
                    "{} has {} bytes and does not fit into a volume of {size} bytes",
                    base.from, base.size_bytes
                ));
            }
            (Some(size), _) => size,
            (None, Some(base)) => base.size_bytes,
            (None, None) => return Err("an empty volume needs a size".into()),
        };
        check_size(size_bytes).map(|()| size_bytes)
    }

    fn head(&self, engine: &Engine, base: Option<&Base>, size_bytes: u64) -> Head {
        Head {
            uid: engine.new_uid(),
            nonce: engine.nonce(),
            term: 0,
            floor: 0,
            map: base.and_then(|base| base.map),
            size_bytes,
            owner: None,
            from: base.map(|base| base.from.clone()),
            description: self.description.clone(),
            next_snapshot: 1,
            history: Vec::new(),
            created: engine.clock.wall(),
            last_commit: None,
        }
    }
}

fn check_description(text: Option<&str>) -> Result<(), String> {
    match text {
        Some(text) if text.len() > 4096 => Err("a description has at most 4096 bytes".into()),
        _ => Ok(()),
    }
}

/// For a request that was checked before: what is wrong with it all the same.
fn refused(reason: String) -> EngineError {
    EngineError::Conflict(reason)
}

/// Makes a volume over `base`, which cannot change or go away meanwhile (an image or a snapshot that was just read), or
/// an empty one.
///
/// # Errors
/// `Conflict` if the name is taken; `Unavailable`: it was not made; `Unclear`.
pub async fn create(engine: &Engine, new: &NewVolume, base: Option<&Base>) -> Result<Made, EngineError> {
    put_head(engine, new, base).await.map(|(made, _)| made)
}

async fn put_head(
    engine: &Engine,
    new: &NewVolume,
    base: Option<&Base>,
) -> Result<(Made, Option<ETag>), EngineError> {
    let size_bytes = new.size_over(base).map_err(refused)?;
    let head = new.head(engine, base, size_bytes);
    let patience = Some(engine.config.pool_wait);
    let key = keys::volume(&new.name);
    match engine.swap_settled(&key, Expect::Absent, head.encode(), patience).await {
        Ok(etag) => Ok((Made::Now(head), Some(etag))),
        Err(EngineError::Conflict(reason)) => {
            match new.find(engine, base.map(|base| base.from.as_str())).await? {
                Some(head) => Ok((Made::Already(head), None)),
                None => Err(EngineError::Conflict(reason)),
            }
        }
        Err(error) => Err(error),
    }
}

/// An image as a base.
///
/// # Errors
/// `NotFound`, `Conflict` while it is being imported, `Unavailable`, `Corrupt`.
pub async fn image_base(engine: &Engine, name: &str) -> Result<Base, EngineError> {
    let (image, _) = read_image(engine, name).await?;
    if !image.is_ready() {
        return Err(EngineError::Conflict(format!("image {name} is still being imported")));
    }
    Ok(Base { map: image.map, size_bytes: image.size_bytes, from: format!("image:{name}") })
}

/// A snapshot as a base.
///
/// # Errors
/// As [`image_base`].
pub async fn snapshot_base(engine: &Engine, volume: &str, number: u64) -> Result<Base, EngineError> {
    let (head, _) = read_volume(engine, volume).await?;
    let snapshot = past::read_snapshot(engine, volume, &head.uid, number).await?;
    let from = format!("snapshot:{volume}@{number}");
    Ok(Base { map: snapshot.map, size_bytes: snapshot.size_bytes, from })
}

/// What a fork may read of a volume that this node does not hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OwnedSource {
    /// Refuse a volume that is attached: its newest writes are not in the pool.
    Refuse,
    /// Take the last commit, however old.
    LastCommit,
}

/// Forks a volume that is not attached here, by what the pool has of it.
///
/// # Errors
/// `Conflict` if it is attached and may not be; as [`create`].
pub async fn fork_of_volume(
    engine: &Engine,
    new: &NewVolume,
    source: &str,
    owned: OwnedSource,
) -> Result<Made, EngineError> {
    for _ in 0..FORK_TRIES {
        let (head, _) = read_volume(engine, source).await?;
        if let Some(owner) = &head.owner
            && owned == OwnedSource::Refuse
        {
            let age = head.last_commit.map_or_else(
                || "has none".to_owned(),
                |at| format!("is {} s old", engine.clock.wall().since(at).as_secs()),
            );
            return Err(EngineError::Conflict(format!(
                "volume {source} is attached on node {}, and its newest writes are only there; its last commit {age}",
                owner.node
            )));
        }
        let base = Base { map: head.map, size_bytes: head.size_bytes, from: format!("volume:{source}") };
        let entry = name_source(engine, &head.uid, source, head.map).await?;
        let (made, etag) = match put_head(engine, new, Some(&base)).await {
            Ok(made) => made,
            Err(error) => {
                forget_source(engine, &entry, &error).await;
                return Err(error);
            }
        };
        let (Made::Now(fork), Some(etag)) = (&made, etag) else {
            forget(engine, &entry).await;
            return Ok(made);
        };
        // Nobody holds the source's head here: if it moved, its old map may be gone before the fork named it.
        let outcome = match read_volume(engine, source).await {
            Ok((now, _)) if now.uid == head.uid && now.map == head.map => return Ok(made),
            Ok(_) | Err(EngineError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = delete_settled(engine, &keys::volume(&new.name), etag, &fork.uid).await {
            return Err(EngineError::Unclear(format!(
                "volume {} was made, but not checked against its source: {error}",
                new.name
            )));
        }
        forget(engine, &entry).await;
        outcome?;
    }
    Err(EngineError::Conflict(format!("volume {source} changes all the time: fork a snapshot of it")))
}

/// The part of a fork of a volume attached here that runs while its destager holds the head. What came of it arrives
/// at the receiver.
pub fn fork_work(
    engine: &Arc<Engine>,
    new: NewVolume,
    source: String,
) -> (HeadWork, oneshot::Receiver<Made>) {
    let (sender, receiver) = oneshot::channel();
    let engine = engine.clone();
    let work: HeadWork = Box::new(move |head| {
        Box::pin(async move {
            let base = Base { map: head.map, size_bytes: head.size_bytes, from: format!("volume:{source}") };
            let entry = name_source(&engine, &head.uid, &source, head.map).await?;
            match create(&engine, &new, Some(&base)).await {
                Ok(made) => {
                    if matches!(made, Made::Already(_)) {
                        forget(&engine, &entry).await;
                    }
                    // An asker that has gone away needs no answer.
                    drop(sender.send(made));
                    Ok(())
                }
                Err(error) => {
                    forget_source(&engine, &entry, &error).await;
                    Err(error)
                }
            }
        })
    });
    (work, receiver)
}

/// Names a map in the trash before a fork of it: one place more where a sweep finds it.
async fn name_source(
    engine: &Engine,
    uid: &Uid,
    source: &str,
    map: Option<MapRef>,
) -> Result<Key, EngineError> {
    let entry =
        TrashObject { name: source.to_owned(), at: engine.clock.wall(), root: TrashRoot::ForkSource { map } };
    let key = keys::trash(uid, engine.random());
    put_fixed(engine, &key, entry.encode()).await?;
    Ok(key)
}

async fn forget_source(engine: &Engine, entry: &Key, error: &EngineError) {
    // A fork that may yet appear needs it.
    if !matches!(error, EngineError::Unclear(_)) {
        forget(engine, entry).await;
    }
}

async fn forget(engine: &Engine, entry: &Key) {
    if let Err(error) = engine.store.delete(entry).await {
        log::debug!("{entry} stays until it is swept: {error}");
    }
}

/// A volume's head. The name is checked here.
///
/// # Errors
/// `NotFound`, `Unavailable`, `Corrupt`.
pub async fn read_volume(engine: &Engine, name: &str) -> Result<HeadState, EngineError> {
    let missing = || EngineError::NotFound(format!("there is no volume called {}", name.escape_default()));
    if check_name(name).is_err() {
        return Err(missing());
    }
    match engine.read_small::<Head>(&keys::volume(name)).await {
        Err(EngineError::NotFound(_)) => Err(missing()),
        other => other,
    }
}

/// An image's object. The name is checked here.
///
/// # Errors
/// `NotFound`, `Unavailable`, `Corrupt`.
pub async fn read_image(engine: &Engine, name: &str) -> Result<(ImageObject, ETag), EngineError> {
    let missing = || EngineError::NotFound(format!("there is no image called {}", name.escape_default()));
    if check_name(name).is_err() {
        return Err(missing());
    }
    match engine.read_small::<ImageObject>(&keys::image(name)).await {
        Err(EngineError::NotFound(_)) => Err(missing()),
        other => other,
    }
}

/// One thing of a listing: a damaged one does not hide the others.
pub type Entry<T> = (String, Result<T, EngineError>);

/// All volumes, by name.
///
/// # Errors
/// `Unavailable`.
pub async fn volumes(engine: &Engine) -> Result<Vec<Entry<Head>>, EngineError> {
    read_folder(engine, "volumes").await
}

/// All images, by name.
///
/// # Errors
/// `Unavailable`.
pub async fn images(engine: &Engine) -> Result<Vec<Entry<ImageObject>>, EngineError> {
    read_folder(engine, "images").await
}

/// All objects of a folder.
///
/// # Errors
/// `Unavailable`.
pub async fn list_folder(engine: &Engine, folder: &str) -> Result<Vec<Listed>, EngineError> {
    let mut all: Vec<Listed> = Vec::new();
    loop {
        let after = all.last().map(|listed| listed.key.clone());
        let patience = Some(engine.config.pool_wait);
        let page =
            engine.patiently(patience, || engine.store.list(folder, after.as_ref(), LIST_PAGE)).await?;
        let more = page.more && !page.objects.is_empty();
        all.extend(page.objects);
        if !more {
            return Ok(all);
        }
    }
}

async fn read_folder<T: SmallObject>(engine: &Engine, folder: &str) -> Result<Vec<Entry<T>>, EngineError> {
    let listed = list_folder(engine, folder).await?;
    let prefix = format!("{folder}/");
    let read = listed.into_iter().map(|listed| {
        let name = listed.key.as_str().strip_prefix(&prefix).unwrap_or_default().to_owned();
        async move {
            let object = engine.read_small::<T>(&listed.key).await;
            (name, object.map(|(object, _)| object))
        }
    });
    let all: Vec<Entry<T>> = stream::iter(read).buffered(READS_AT_ONCE).collect().await;
    // Deleted since the listing.
    Ok(all.into_iter().filter(|(_, object)| !matches!(object, Err(EngineError::NotFound(_)))).collect())
}

/// What a name in the pool stands for.
#[derive(Clone, Debug)]
pub enum Named {
    Volume(Head),
    Image(ImageObject),
    Snapshot(SnapshotObject),
}

/// Finds a name: `volume:X`, `image:X`, `snapshot:X@N`, or without a prefix `X@N`, a volume, an image, in this order.
///
/// # Errors
/// `NotFound`, `Unavailable`, `Corrupt`.
pub async fn resolve(engine: &Engine, text: &str) -> Result<(String, Named), EngineError> {
    let (kind, name) = text.split_once(':').map_or((None, text), |(kind, name)| (Some(kind), name));
    let missing = || EngineError::NotFound(format!("there is nothing called {}", text.escape_default()));
    let snapshot = name.rsplit_once('@').and_then(|(volume, number)| Some((volume, number.parse().ok()?)));
    let named = match (kind, snapshot) {
        (None | Some("snapshot"), Some((volume, number))) => {
            let (head, _) = read_volume(engine, volume).await?;
            Named::Snapshot(past::read_snapshot(engine, volume, &head.uid, number).await?)
        }
        (Some("volume"), _) => Named::Volume(read_volume(engine, name).await?.0),
        (Some("image"), _) => Named::Image(read_image(engine, name).await?.0),
        (None, None) => match read_volume(engine, name).await {
            Ok((head, _)) => Named::Volume(head),
            Err(EngineError::NotFound(_)) => match read_image(engine, name).await {
                Ok((image, _)) => Named::Image(image),
                Err(EngineError::NotFound(_)) => return Err(missing()),
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        },
        _ => return Err(missing()),
    };
    Ok((name.to_owned(), named))
}

/// Gives a detached volume another size, no smaller than it has.
///
/// # Errors
/// `Conflict` if it is attached or changed meanwhile; `Unavailable`, `Unclear`.
pub async fn grow_detached(engine: &Engine, name: &str, size_bytes: u64) -> Result<Head, EngineError> {
    let (mut head, etag) = read_volume(engine, name).await?;
    check_detached(name, &head)?;
    if head.size_bytes == size_bytes {
        return Ok(head);
    }
    head.nonce = engine.nonce();
    head.size_bytes = size_bytes;
    let patience = Some(engine.config.pool_wait);
    engine.swap_settled(&keys::volume(name), Expect::State(etag), head.encode(), patience).await?;
    Ok(head)
}

fn check_detached(name: &str, head: &Head) -> Result<(), EngineError> {
    match &head.owner {
        None => Ok(()),
        Some(owner) => Err(EngineError::Conflict(format!(
            "volume {name} is attached on node {}, or has writes there that are not in the pool",
            owner.node
        ))),
    }
}

/// Puts a small object that is never changed, and settles whether it was this call that made it.
///
/// # Errors
/// `Conflict` if another one is there; `Unavailable`: nothing was made; `Unclear`.
pub(super) async fn put_fixed(engine: &Engine, key: &Key, bytes: Bytes) -> Result<(), EngineError> {
    let patience = Some(engine.config.pool_wait);
    let unclear = AtomicBool::new(false);
    let answer = engine
        .patiently(patience, || async {
            let answer = engine.store.put_new(key, bytes.clone()).await;
            if matches!(answer, Err(StoreError::Unclear { .. })) {
                unclear.store(true, Ordering::Relaxed);
            }
            answer
        })
        .await;
    let unsettled = unclear.load(Ordering::Relaxed);
    match answer {
        Ok(()) => Ok(()),
        Err(StoreError::Conflict(_)) if unsettled => {
            let range = GetRange::Whole { max_bytes: SMALL_OBJECT_BYTES_MAX };
            let found = engine.patiently(patience, || engine.store.get(key, range)).await;
            match found {
                Ok(found) if found.bytes == bytes => Ok(()),
                Ok(_) => Err(EngineError::Conflict(format!("{key} is there already"))),
                Err(error) => {
                    Err(EngineError::Unclear(format!("it is not known whether {key} was made: {error}")))
                }
            }
        }
        Err(error) if unsettled => {
            Err(EngineError::Unclear(format!("it is not known whether {key} was made: {error}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Deletes a root of `uid` that is in the state `etag`, and settles the outcome.
///
/// # Errors
/// `Conflict`: it is there, changed, and certainly not deleted by this; `Unavailable`: nothing was changed; `Unclear`.
pub(super) async fn delete_settled(
    engine: &Engine,
    key: &Key,
    etag: ETag,
    uid: &Uid,
) -> Result<(), EngineError> {
    #[derive(Deserialize)]
    struct Identity {
        uid: Uid,
    }
    let patience = Some(engine.config.pool_wait);
    let unclear = AtomicBool::new(false);
    let answer = engine
        .patiently(patience, || async {
            let answer = engine.store.swap_delete(key, etag.clone()).await;
            if matches!(answer, Err(StoreError::Unclear { .. })) {
                unclear.store(true, Ordering::Relaxed);
            }
            answer
        })
        .await;
    let unsettled = unclear.load(Ordering::Relaxed);
    let lost = |error: StoreError| {
        EngineError::Unclear(format!("it is not known whether {key} was deleted: {error}"))
    };
    match answer {
        Ok(()) => Ok(()),
        Err(StoreError::Conflict(_) | StoreError::NotFound(_)) if unsettled => {
            let range = GetRange::Whole { max_bytes: SMALL_OBJECT_BYTES_MAX };
            match engine.patiently(patience, || engine.store.get(key, range)).await {
                Err(StoreError::NotFound(_)) => Ok(()),
                Err(error) => Err(lost(error)),
                Ok(found) => match serde_json::from_slice::<Identity>(&found.bytes) {
                    // Deleted, and the name was used again since.
                    Ok(there) if there.uid != *uid => Ok(()),
                    _ => Err(EngineError::Conflict(format!("{key} was changed by someone else"))),
                },
            }
        }
        Err(error) if unsettled => Err(lost(error)),
        Err(error) => Err(error.into()),
    }
}
