//! What the engine knows, in the words of the service.
//!
//! Owns: how errors and objects of the engine become answers.
//! Does not own: what is done.

use crate::node::service::{ImageInfo, Refusal, Resolved, ServiceError, SnapshotInfo, TrashInfo};
use crate::volume::catalog::Named;
use crate::volume::catalog::trash::{Restored, Trashed};
use crate::volume::engine::EngineError;
use crate::volume::head::{ImageObject, SnapshotObject, TrashRoot};

/// An error of the engine as a refusal.
pub fn refusal(error: EngineError) -> ServiceError {
    match error {
        EngineError::Unavailable(text) => ServiceError::new(Refusal::Unavailable, text)
            .hint("the pool does not answer; the same request later may work"),
        EngineError::Corrupt(text) => ServiceError::new(Refusal::Corrupt, text),
        EngineError::NotFound(text) => ServiceError::new(Refusal::NotFound, text),
        EngineError::Conflict(text) | EngineError::Stopped(text) => {
            ServiceError::new(Refusal::Conflict, text)
        }
        EngineError::Unclear(text) => {
            ServiceError::new(Refusal::Unclear, text).hint("the same request again settles it")
        }
        EngineError::Disk(text) => ServiceError::new(Refusal::Internal, text),
        EngineError::NoSpace(text) => ServiceError::new(Refusal::NoSpace, text),
        EngineError::Source(text) => ServiceError::new(Refusal::Invalid, text),
    }
}

impl From<EngineError> for ServiceError {
    fn from(error: EngineError) -> Self {
        refusal(error)
    }
}

/// A request that is wrong.
pub fn invalid(reason: impl Into<String>) -> ServiceError {
    ServiceError::new(Refusal::Invalid, reason)
}

pub fn snapshot_info(snapshot: SnapshotObject, volume: &str) -> SnapshotInfo {
    SnapshotInfo {
        name: format!("{volume}@{}", snapshot.number),
        volume: volume.to_owned(),
        number: snapshot.number,
        size_bytes: snapshot.size_bytes,
        created: snapshot.created,
        description: snapshot.description,
    }
}

pub fn image_info(name: String, image: ImageObject) -> ImageInfo {
    let state = if image.is_ready() { "ready" } else { "importing" };
    ImageInfo {
        name,
        uid: image.uid.to_string(),
        size_bytes: image.size_bytes,
        state: state.to_owned(),
        source: image.source,
        created: image.created,
        stored_bytes: image.stored_bytes,
        description: image.description,
    }
}

pub fn trash_info(entry: Trashed) -> TrashInfo {
    let (kind, size_bytes) = match &entry.object.root {
        TrashRoot::Volume(head) => ("volume", head.size_bytes),
        TrashRoot::Image(image) => ("image", image.size_bytes),
        TrashRoot::Snapshot(snapshot) => ("snapshot", snapshot.size_bytes),
        TrashRoot::ForkSource { .. } => ("source of a fork", 0),
    };
    TrashInfo {
        id: entry.id,
        kind: kind.to_owned(),
        name: entry.object.name,
        deleted: entry.object.at,
        size_bytes,
    }
}

/// A name and what it is, without its address.
pub fn resolved(name: String, named: &Named) -> Resolved {
    let (kind, uid, size_bytes) = match named {
        Named::Volume(head) => ("volume", head.uid, head.size_bytes),
        Named::Image(image) => ("image", image.uid, image.size_bytes),
        Named::Snapshot(snapshot) => ("snapshot", snapshot.uid, snapshot.size_bytes),
    };
    Resolved { name, kind: kind.to_owned(), uid: uid.to_string(), size_bytes, uri: None }
}

pub fn restored(restored: Restored) -> Resolved {
    match restored {
        Restored::Volume(name, head) => resolved(name, &Named::Volume(head)),
        Restored::Image(name, image) => resolved(name, &Named::Image(image)),
        Restored::Snapshot(snapshot) => {
            resolved(format!("{}@{}", snapshot.volume, snapshot.number), &Named::Snapshot(snapshot))
        }
    }
}
