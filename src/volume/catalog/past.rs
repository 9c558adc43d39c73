//! Past states of a volume that is not attached: its snapshots, and going back to one.
//!
//! Owns: reading snapshots; taking one of a detached volume; rollback.
//! Does not own: snapshots of an attached volume (its destager takes them).

use super::{
    Entry, HeadState, READS_AT_ONCE, check_description, check_detached, list_folder, put_fixed, read_volume,
};
use crate::store::Expect;
use crate::volume::engine::{Engine, EngineError};
use crate::volume::head::{Head, SmallObject, SnapshotObject, TermEnd, keys};
use crate::volume::ids::Uid;
use futures::stream::{self, StreamExt};

/// A head that moves while a snapshot is taken is looked at again this often.
const TRIES: usize = 5;

/// One snapshot of a volume.
///
/// # Errors
/// `NotFound`, `Unavailable`, `Corrupt`.
pub async fn read_snapshot(
    engine: &Engine,
    volume: &str,
    uid: &Uid,
    number: u64,
) -> Result<SnapshotObject, EngineError> {
    match engine.read_small::<SnapshotObject>(&keys::snapshot(uid, number)).await {
        Ok((snapshot, _)) if snapshot.uid == *uid && snapshot.number == number => Ok(snapshot),
        Ok(_) => {
            Err(EngineError::Corrupt(format!("snapshot {volume}@{number} in the pool is another one's")))
        }
        Err(EngineError::NotFound(_)) => {
            Err(EngineError::NotFound(format!("there is no snapshot {volume}@{number}")))
        }
        Err(EngineError::Corrupt(reason)) => {
            Err(EngineError::Corrupt(format!("snapshot {volume}@{number}: {reason}")))
        }
        Err(error) => Err(error),
    }
}

/// Numbers of the snapshots of a volume, ascending.
///
/// # Errors
/// `Unavailable`.
pub async fn snapshot_numbers(engine: &Engine, uid: &Uid) -> Result<Vec<u64>, EngineError> {
    let listed = list_folder(engine, &format!("snapshots/{uid}")).await?;
    let number = |key: &str| key.rsplit_once('/').and_then(|(_, digits)| digits.parse().ok());
    Ok(listed.iter().filter_map(|listed| number(listed.key.as_str())).collect())
}

/// The snapshots of a volume, by number; a damaged one does not hide the others.
///
/// # Errors
/// `Unavailable`.
pub async fn snapshots(
    engine: &Engine,
    volume: &str,
    uid: &Uid,
) -> Result<Vec<Entry<SnapshotObject>>, EngineError> {
    let numbers = snapshot_numbers(engine, uid).await?;
    let read = numbers.into_iter().map(|number| async move {
        (format!("{volume}@{number}"), read_snapshot(engine, volume, uid, number).await)
    });
    let all: Vec<_> = stream::iter(read).buffered(READS_AT_ONCE).collect().await;
    Ok(all.into_iter().filter(|(_, found)| !matches!(found, Err(EngineError::NotFound(_)))).collect())
}

/// Takes a snapshot of a volume that nobody has attached.
///
/// # Errors
/// `Conflict` if it is attached, or is all the time; `Unavailable`, `Unclear`.
pub async fn snapshot_detached(
    engine: &Engine,
    name: &str,
    description: Option<String>,
) -> Result<SnapshotObject, EngineError> {
    check_description(description.as_deref()).map_err(EngineError::Conflict)?;
    for _ in 0..TRIES {
        let state = read_volume(engine, name).await?;
        check_detached(name, &state.0)?;
        match keep(engine, name, state, description.clone()).await {
            Ok((snapshot, _)) => return Ok(snapshot),
            Err(EngineError::Conflict(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(EngineError::Conflict(format!("volume {name} changes all the time")))
}

/// Keeps the state of a detached volume as a snapshot: takes its number, puts it, and looks whether the head moved in
/// between, since nobody holds it.
async fn keep(
    engine: &Engine,
    name: &str,
    (mut head, etag): HeadState,
    description: Option<String>,
) -> Result<(SnapshotObject, HeadState), EngineError> {
    let (key, patience) = (keys::volume(name), Some(engine.config.pool_wait));
    let number = head.next_snapshot;
    head.next_snapshot += 1;
    head.nonce = engine.nonce();
    let etag = engine.swap_settled(&key, Expect::State(etag), head.encode(), patience).await?;
    let snapshot = SnapshotObject {
        uid: head.uid,
        volume: name.to_owned(),
        number,
        nonce: engine.nonce(),
        map: head.map,
        size_bytes: head.size_bytes,
        description,
        created: engine.clock.wall(),
    };
    put_fixed(engine, &keys::snapshot(&head.uid, number), snapshot.encode()).await?;
    match engine.read_small::<Head>(&key).await {
        Ok((now, _)) if now.uid == head.uid && now.map == head.map => Ok((snapshot, (head, etag))),
        Ok(_) | Err(EngineError::NotFound(_)) => {
            withdraw(engine, &snapshot).await;
            Err(EngineError::Conflict(format!("volume {name} was changed meanwhile")))
        }
        Err(error) => {
            withdraw(engine, &snapshot).await;
            Err(error)
        }
    }
}

async fn withdraw(engine: &Engine, snapshot: &SnapshotObject) {
    let key = keys::snapshot(&snapshot.uid, snapshot.number);
    if let Err(error) = engine.store.delete(&key).await {
        log::warn!(
            "snapshot {}@{} stays, though it was to be withdrawn: {error}",
            snapshot.volume,
            snapshot.number
        );
    }
}

/// Sets a detached volume back to its snapshot `number`. Its present state is kept as a new snapshot, the answer.
///
/// # Errors
/// `Conflict` if it is attached, or is changed meanwhile; `NotFound`, `Unavailable`, `Unclear`, `Corrupt`.
pub async fn rollback(engine: &Engine, name: &str, number: u64) -> Result<SnapshotObject, EngineError> {
    let state = read_volume(engine, name).await?;
    check_detached(name, &state.0)?;
    let target = read_snapshot(engine, name, &state.0.uid, number).await?;
    let description = Some(format!("before the rollback to {name}@{number}"));
    let (kept, (mut head, etag)) = keep(engine, name, state, description).await?;
    head.nonce = engine.nonce();
    head.map = target.map;
    head.size_bytes = target.size_bytes;
    // A new term: what was written on the state before can never be replayed on this one.
    head.begin_term(None, TermEnd::RolledBack);
    let patience = Some(engine.config.pool_wait);
    match engine.swap_settled(&keys::volume(name), Expect::State(etag), head.encode(), patience).await {
        Ok(_) => Ok(kept),
        Err(error) => {
            if !matches!(error, EngineError::Unclear(_)) {
                withdraw(engine, &kept).await;
            }
            Err(error)
        }
    }
}
