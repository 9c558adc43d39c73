//! Which disks clients find here, and under which names.
//!
//! Owns: names of exports: attached volumes, and images and snapshots read-only. A volume wins under the bare name;
//! `volume:NAME`, `image:NAME` and `snapshot:VOLUME@N` always work.
//! Does not own: the protocol that clients speak.

use super::Core;
use super::attachments::Entry;
use crate::frontend::nbd::{ExportError, ExportListing, Exports, OpenExport};
use crate::volume::base::BaseMap;
use crate::volume::catalog::{self, Named};
use crate::volume::engine::EngineError;
use crate::volume::ids::Uid;
use crate::volume::read_only::ReadOnlyDisk;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A listing without the pool's names is better than one that comes too late.
const LIST_TIME: Duration = Duration::from_secs(5);

/// Read-only disks that clients use, so that two clients of an image share one.
#[derive(Default)]
pub struct Readers(Mutex<HashMap<(Uid, u64), Weak<ReadOnlyDisk>>>);

/// The disks of a node.
pub struct NodeExports(pub Arc<Core>);

#[async_trait]
impl Exports for NodeExports {
    async fn list(&self, max: usize) -> Vec<ExportListing> {
        let mut all: Vec<ExportListing> = Vec::new();
        for (name, entry) in self.0.table.all() {
            let description = match entry {
                Entry::Running(running) => match running.volume.stop_reason() {
                    None => "volume".to_owned(),
                    Some(reason) => format!("volume, stopped: {reason}"),
                },
                Entry::Recovering => "volume, being recovered".to_owned(),
                Entry::Failed(_) => continue,
            };
            all.push(ExportListing { name, description });
        }
        if let Ok(Ok(images)) = tokio::time::timeout(LIST_TIME, catalog::images(&self.0.engine)).await {
            for (name, image) in images {
                let Ok(image) = image else { continue };
                if image.is_ready() {
                    let taken = all.iter().any(|listing| listing.name == name);
                    let name = if taken { format!("image:{name}") } else { name };
                    let description = image.description.unwrap_or_else(|| "image, read-only".to_owned());
                    all.push(ExportListing { name, description });
                }
            }
        }
        all.truncate(max);
        all
    }

    async fn open(&self, name: &str) -> Result<OpenExport, ExportError> {
        let default;
        let name = if name.is_empty() {
            let mut running = self.0.table.running();
            let only = if running.len() == 1 { running.pop() } else { None };
            default = only.ok_or(ExportError::Unknown)?.0;
            &default
        } else {
            name
        };
        let volume = match name.split_once(':') {
            None => Some(name),
            Some(("volume", volume)) => Some(volume),
            Some(_) => None,
        };
        match volume.and_then(|volume| self.0.table.get(volume)) {
            Some(Entry::Running(running)) => {
                let (closed, guard) =
                    running.admit().ok_or_else(|| ExportError::Unavailable("it is being detached".into()))?;
                Ok(OpenExport {
                    name: name.to_owned(),
                    handler: running.handler.clone(),
                    description: "volume".into(),
                    guard: Box::new(guard),
                    closed,
                })
            }
            Some(Entry::Recovering) => Err(ExportError::Unavailable("it is being recovered".into())),
            Some(Entry::Failed(reason)) => Err(ExportError::Unavailable(reason)),
            None => self.open_reader(name).await,
        }
    }
}

impl NodeExports {
    async fn open_reader(&self, name: &str) -> Result<OpenExport, ExportError> {
        let engine = &self.0.engine;
        let refused = |error: EngineError| match error {
            EngineError::NotFound(_) => ExportError::Unknown,
            error => ExportError::Unavailable(error.to_string()),
        };
        let (_, named) = match catalog::resolve(engine, name).await {
            // A volume that is not attached hides no image.
            Ok((_, Named::Volume(_))) if !name.contains(':') => {
                catalog::resolve(engine, &format!("image:{name}")).await.map_err(|error| match error {
                    EngineError::NotFound(_) => {
                        ExportError::Unavailable("the volume is not attached here".into())
                    }
                    error => ExportError::Unavailable(error.to_string()),
                })?
            }
            other => other.map_err(refused)?,
        };
        let (key, map, size_bytes, description, volume) = match named {
            Named::Volume(_) => {
                return Err(ExportError::Unavailable("the volume is not attached here".into()));
            }
            Named::Image(image) if !image.is_ready() => {
                return Err(ExportError::Unavailable("the image is being imported".into()));
            }
            Named::Image(image) => ((image.uid, 0), image.map, image.size_bytes, image.description, None),
            Named::Snapshot(snapshot) => {
                let key = (snapshot.uid, snapshot.number);
                (key, snapshot.map, snapshot.size_bytes, snapshot.description, Some(snapshot.uid))
            }
        };
        let known = self.0.readers.0.lock().get(&key).and_then(Weak::upgrade);
        let disk = match known {
            Some(disk) => disk,
            None => {
                let base = BaseMap::open(engine, map, size_bytes).await.map_err(refused)?;
                let disk = ReadOnlyDisk::new(engine.clone(), base, size_bytes);
                let disk = Arc::new(match volume {
                    None => disk,
                    Some(uid) => disk.of_volume(uid),
                });
                let mut readers = self.0.readers.0.lock();
                readers.retain(|_, disk| disk.strong_count() > 0);
                readers.insert(key, Arc::downgrade(&disk));
                disk
            }
        };
        Ok(OpenExport {
            name: name.to_owned(),
            handler: disk,
            description: description.unwrap_or_else(|| "read-only".into()),
            guard: Box::new(()),
            closed: self.0.stopping.child_token(),
        })
    }
}
