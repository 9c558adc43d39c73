//! What can be asked of a node, done.
//!
//! Owns: `impl Service for Node`: the checks, the turns and the time that an operation has.
//! Does not own: the parts that do the work.

use super::answers::{image_info, invalid, refusal, resolved, restored, snapshot_info, trash_info};
use super::attachments::{Entry, Running};
use super::{Core, Node, Pool};
use crate::clock::UnixMillis;
use crate::node::service::{
    Attachment, CreateVolume, Done, Durable, Export, Finding, ForkSource, ImageInfo, ImageSource, JobInfo,
    NodeInfo, OrphanInfo, Refusal, Resolved, Service, ServiceError, SnapshotInfo, Space, TrashInfo,
    VolumeInfo, VolumeMetrics,
};
use crate::volume::catalog::trash::Snapshots;
use crate::volume::catalog::{self, Made, Named, NewVolume, OwnedSource, orphans, past, trash};
use crate::volume::destage::Request;
use crate::volume::engine::EngineError;
use crate::volume::head::{Head, check_name, check_size};
use crate::volume::image;
use async_trait::async_trait;
use futures::stream::{self, StreamExt, TryStreamExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;

type Answer<T> = Result<T, ServiceError>;

/// Volumes whose snapshots are listed at once.
const LISTS_AT_ONCE: usize = 16;

impl Core {
    fn check_pool(&self) -> Answer<()> {
        match &*self.pool.borrow() {
            Pool::Good => Ok(()),
            Pool::Unseen => Err(ServiceError::new(
                Refusal::Unavailable,
                "the pool has not answered since the daemon started",
            )),
            Pool::Wrong(reason) => Err(ServiceError::new(Refusal::Corrupt, reason.clone())),
        }
    }

    fn uris(&self, export: &str) -> Vec<String> {
        self.addresses.get().into_iter().flatten().map(|address| address.uri(export)).collect()
    }

    fn attachment(&self, name: &str, running: &Running) -> Attachment {
        Attachment {
            volume: name.to_owned(),
            uris: self.uris(name),
            read_only: false,
            size_bytes: crate::block::BlockHandler::geometry(&*running.handler).size_bytes,
        }
    }

    async fn info(&self, name: String, head: Head) -> Answer<VolumeInfo> {
        let mut snapshots = Vec::new();
        for (snapshot, found) in past::snapshots(&self.engine, &name, &head.uid).await? {
            match found {
                Ok(found) => snapshots.push(snapshot_info(found, &name)),
                Err(error) => log::warn!("snapshot {snapshot} is not listed: {error}"),
            }
        }
        Ok(self.info_with(name, head, snapshots))
    }

    fn info_with(&self, name: String, head: Head, snapshots: Vec<SnapshotInfo>) -> VolumeInfo {
        let here = self.table.get(&name);
        let ours = head.owner.as_ref().is_some_and(|owner| owner.node == self.engine.identity.node);
        let (state, stopped) = match &here {
            Some(Entry::Running(running)) => match running.volume.stop_reason() {
                None => ("attached", None),
                Some(reason) => ("stopped", Some(reason.to_owned())),
            },
            Some(Entry::Recovering) => ("stopped", Some("it is being recovered".to_owned())),
            Some(Entry::Failed(reason)) => ("stopped", Some(reason.clone())),
            None if head.owner.is_none() => ("detached", None),
            None if ours => {
                let reason =
                    "it was given up here with writes that are not in the pool; attach it to serve them";
                ("stopped", Some(reason.to_owned()))
            }
            None => ("elsewhere", None),
        };
        let dirty = match &here {
            Some(Entry::Running(running)) => Some(running.volume.dirty()),
            _ => None,
        };
        VolumeInfo {
            uid: head.uid.to_string(),
            size_bytes: head.size_bytes,
            state: state.to_owned(),
            owner_node: head.owner.map(|owner| owner.node.to_string()),
            from: head.from,
            description: head.description,
            created: head.created,
            last_commit: head.last_commit,
            dirty_bytes: dirty.map(|(bytes, _)| bytes),
            oldest_dirty_ms: dirty.and_then(|(_, since)| since).map(age_ms),
            stopped,
            snapshots,
            name,
        }
    }

    async fn volumes(&self) -> Answer<Vec<VolumeInfo>> {
        let heads = catalog::volumes(&self.engine).await?;
        let infos = heads.into_iter().map(|(name, head)| async move {
            match head {
                Ok(head) => self.info(name, head).await,
                Err(error) => Ok(damaged(name, &error)),
            }
        });
        stream::iter(infos).buffered(LISTS_AT_ONCE).try_collect().await
    }

    async fn create(&self, name: &str, request: CreateVolume) -> Answer<Done<VolumeInfo>> {
        let new = NewVolume {
            name: name.to_owned(),
            size_bytes: request.size_bytes,
            description: request.description,
        };
        new.check().map_err(invalid)?;
        let _turn = self.table.turn(name).await;
        let from = request.from.as_ref().map(ToString::to_string);
        let engine = &self.engine;
        let made = match new.find(engine, from.as_deref()).await? {
            Some(head) => Made::Already(head),
            None => match request.from {
                None => {
                    new.size_over(None).map_err(invalid)?;
                    catalog::create(engine, &new, None).await?
                }
                Some(ForkSource::Image(image)) => {
                    let base = catalog::image_base(engine, &image).await?;
                    new.size_over(Some(&base)).map_err(too_small)?;
                    catalog::create(engine, &new, Some(&base)).await?
                }
                Some(ForkSource::Snapshot { volume, number }) => {
                    let base = catalog::snapshot_base(engine, &volume, number).await?;
                    new.size_over(Some(&base)).map_err(too_small)?;
                    catalog::create(engine, &new, Some(&base)).await?
                }
                Some(ForkSource::Volume(source)) => {
                    self.fork_volume(new, source, request.last_commit).await?
                }
            },
        };
        Ok(match made {
            Made::Now(head) => Done::Now(self.info_with(name.to_owned(), head, Vec::new())),
            Made::Already(head) => Done::Already(self.info(name.to_owned(), head).await?),
        })
    }

    async fn fork_volume(&self, new: NewVolume, source: String, last_commit: bool) -> Answer<Made> {
        let (head, _) = catalog::read_volume(&self.engine, &source).await?;
        let base =
            catalog::Base { map: head.map, size_bytes: head.size_bytes, from: format!("volume:{source}") };
        new.size_over(Some(&base)).map_err(too_small)?;
        if let Some(Entry::Running(running)) = self.table.get(&source)
            && running.volume.stop_reason().is_none()
        {
            let (work, made) = catalog::fork_work(&self.engine, new, source);
            running.destager.ask(|reply| Request::WithHead { work, reply }).await?;
            return made
                .await
                .map_err(|_| ServiceError::new(Refusal::Internal, "the fork ended without a result"));
        }
        let owned = if last_commit { OwnedSource::LastCommit } else { OwnedSource::Refuse };
        catalog::fork_of_volume(&self.engine, &new, &source, owned).await.map_err(|error| {
            let attached = head.owner.is_some() && matches!(error, EngineError::Conflict(_));
            let refused = refusal(error);
            if attached { refused.hint("`--last-commit` forks what the pool has of it") } else { refused }
        })
    }

    async fn resize(&self, name: &str, size_bytes: u64, force: bool) -> Answer<VolumeInfo> {
        check_size(size_bytes).map_err(invalid)?;
        let _turn = self.table.turn(name).await;
        let (head, _) = catalog::read_volume(&self.engine, name).await?;
        let shrinks = size_bytes < head.size_bytes;
        if shrinks && !force {
            return Err(invalid(format!(
                "volume {name} has {} bytes: making it smaller cuts off what lies beyond",
                head.size_bytes
            ))
            .hint("`--force` does that"));
        }
        match self.table.get(name) {
            Some(Entry::Running(running)) => {
                running.destager.ask(|reply| Request::Resize { size_bytes, reply }).await?;
            }
            Some(Entry::Recovering | Entry::Failed(_)) => {
                return Err(ServiceError::new(Refusal::Conflict, format!("volume {name} is not served now")));
            }
            None if head.owner.is_some() => self.check_detached(name, &head)?,
            None if shrinks => self.shrink_detached(name, size_bytes).await?,
            None => {
                catalog::grow_detached(&self.engine, name, size_bytes).await?;
            }
        }
        let (head, _) = catalog::read_volume(&self.engine, name).await?;
        self.info(name.to_owned(), head).await
    }

    /// Refuses what needs a volume that nobody has, with the way out.
    fn check_detached(&self, name: &str, head: &Head) -> Answer<()> {
        let conflict = |text: String| ServiceError::new(Refusal::Conflict, text);
        let detach = format!("run `blockhouse volume detach {name}` first");
        if self.table.get(name).is_some() {
            return Err(conflict(format!("volume {name} is attached here")).hint(detach));
        }
        match &head.owner {
            None => Ok(()),
            Some(owner) if owner.node == self.engine.identity.node => {
                Err(conflict(format!("volume {name} was given up here with writes that are not in the pool"))
                    .hint(format!("run `blockhouse volume attach {name}`, then detach it")))
            }
            Some(owner) => {
                Err(conflict(format!("volume {name} is attached on node {}", owner.node))
                    .hint("detach it there"))
            }
        }
    }

    async fn detached(&self, name: &str) -> Answer<Head> {
        let (head, _) = catalog::read_volume(&self.engine, name).await?;
        self.check_detached(name, &head)?;
        Ok(head)
    }

    async fn delete_volume(&self, name: &str, with_snapshots: bool) -> Answer<TrashInfo> {
        let _turn = self.table.turn(name).await;
        let head = self.detached(name).await?;
        let snapshots = if with_snapshots { Snapshots::Delete } else { Snapshots::Refuse };
        let deleted = trash::delete_volume(&self.engine, name, snapshots).await;
        let has_snapshots = matches!(deleted, Err(EngineError::Conflict(_)))
            && snapshots == Snapshots::Refuse
            && !past::snapshot_numbers(&self.engine, &head.uid).await?.is_empty();
        match deleted {
            Ok(entry) => Ok(trash_info(entry)),
            Err(error) if has_snapshots => Err(refusal(error)
                .hint(format!("`blockhouse volume delete --with-snapshots {name}` deletes them too"))),
            Err(error) => Err(error.into()),
        }
    }

    async fn create_snapshot(&self, name: &str, description: Option<String>) -> Answer<SnapshotInfo> {
        if description.as_ref().is_some_and(|text| text.len() > 4096) {
            return Err(invalid("a description has at most 4096 bytes"));
        }
        let _turn = self.table.turn(name).await;
        let snapshot = match self.table.get(name) {
            Some(Entry::Running(running)) => {
                running.destager.ask(|reply| Request::Snapshot { description, reply }).await?
            }
            Some(Entry::Recovering | Entry::Failed(_)) => {
                return Err(ServiceError::new(Refusal::Conflict, format!("volume {name} is not served now")));
            }
            None => {
                self.detached(name).await?;
                past::snapshot_detached(&self.engine, name, description).await?
            }
        };
        Ok(snapshot_info(snapshot, name))
    }

    async fn snapshots_of(&self, name: &str) -> Answer<Vec<SnapshotInfo>> {
        let (head, _) = catalog::read_volume(&self.engine, name).await?;
        Ok(self.info(name.to_owned(), head).await?.snapshots)
    }

    async fn durable(&self, name: &str) -> Answer<Durable> {
        match self.table.get(name) {
            Some(Entry::Running(running)) => {
                let committed = running.destager.ask(|reply| Request::Commit { reply }).await?;
                Ok(Durable { volume: name.to_owned(), committed, dirty_bytes: running.volume.dirty().0 })
            }
            Some(Entry::Recovering | Entry::Failed(_)) => {
                Err(ServiceError::new(Refusal::Conflict, format!("volume {name} is not served now")))
            }
            None => {
                let (head, _) = catalog::read_volume(&self.engine, name).await?;
                Err(ServiceError::new(Refusal::Conflict, format!("volume {name} is not attached here")).hint(
                    match head.owner {
                        None => "all of a detached volume is in the pool".to_owned(),
                        Some(_) => format!("run `blockhouse volume attach {name}`"),
                    },
                ))
            }
        }
    }

    async fn recover_orphan(&self, id: &str, name: &str) -> Answer<VolumeInfo> {
        check_name(name).map_err(invalid)?;
        let _turn = self.table.turn(name).await;
        let _files = self.table.local_files.write().await;
        let head = orphans::recover(&self.engine, &self.table.in_use(), id, name).await?;
        Ok(self.info_with(name.to_owned(), head, Vec::new()))
    }

    async fn resolve(&self, name: &str) -> Answer<Resolved> {
        let (own, named) = catalog::resolve(&self.engine, name).await?;
        let export = match &named {
            Named::Volume(_) => self.table.get(&own).map(|_| own.clone()),
            Named::Image(_) if self.table.get(&own).is_some() => Some(format!("image:{own}")),
            Named::Image(_) | Named::Snapshot(_) => Some(own.clone()),
        };
        let uri = export.and_then(|export| self.uris(&export).into_iter().next());
        Ok(Resolved { uri, ..resolved(own, &named) })
    }
}

fn too_small(reason: String) -> ServiceError {
    invalid(reason).hint("leave the size out to take that of the source")
}

fn age_ms(since: tokio::time::Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// A volume whose head cannot be read, among those that can.
fn damaged(name: String, error: &EngineError) -> VolumeInfo {
    VolumeInfo {
        name,
        uid: String::new(),
        size_bytes: 0,
        state: "stopped".to_owned(),
        owner_node: None,
        from: None,
        description: None,
        created: UnixMillis(0),
        last_commit: None,
        dirty_bytes: None,
        oldest_dirty_ms: None,
        stopped: Some(error.to_string()),
        snapshots: Vec::new(),
    }
}

impl Node {
    /// Runs an operation for as long as an asker waits; it goes on after that, and when the asker leaves.
    async fn within<T: Send + 'static, F>(&self, work: impl FnOnce(Arc<Core>) -> F) -> Answer<T>
    where
        F: Future<Output = Answer<T>> + Send + 'static,
    {
        self.core.check_pool()?;
        let task = tokio::spawn(work(self.core.clone()));
        match tokio::time::timeout(self.core.config.operation_time, task).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ServiceError::new(Refusal::Internal, "the operation ended without a result")),
            Err(_) => Err(ServiceError::new(
                Refusal::Unclear,
                "the pool is slow or does not answer: the operation goes on, and may yet succeed",
            )
            .hint("the same request again settles it")),
        }
    }
}

#[async_trait]
impl Service for Node {
    async fn node(&self) -> Answer<NodeInfo> {
        let core = &self.core;
        Ok(NodeInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_id: core.engine.identity.node.to_string(),
            pool: core.config.pool_place(),
            pool_id: core.engine.identity.pool.to_string(),
            started: core.started,
            ready: self.ready().await.is_ok(),
            attached: core.table.running().len() as u64,
            nbd: core.uris(""),
        })
    }

    async fn ready(&self) -> Answer<()> {
        self.core.check_pool()?;
        if self.core.stopping.is_cancelled() {
            return Err(ServiceError::new(Refusal::Unavailable, "the daemon is stopping"));
        }
        let recovering: Vec<String> = self
            .core
            .table
            .all()
            .into_iter()
            .filter_map(|(name, entry)| matches!(entry, Entry::Recovering).then_some(name))
            .collect();
        if recovering.is_empty() {
            return Ok(());
        }
        Err(ServiceError::new(Refusal::Unavailable, format!("being recovered: {}", recovering.join(", "))))
    }

    async fn metrics(&self) -> Vec<VolumeMetrics> {
        let metrics = |(name, running): (String, Arc<Running>)| {
            let (dirty_bytes, since) = running.volume.dirty();
            let counters = running.volume.counters();
            let last_commit = counters.last_commit_unix_ms.load(Ordering::Relaxed);
            let mut metrics = VolumeMetrics {
                volume: name,
                dirty_bytes,
                oldest_dirty_ms: since.map_or(0, age_ms),
                last_commit: (last_commit > 0).then_some(UnixMillis(last_commit)),
                commits: counters.commits.load(Ordering::Relaxed),
                committed_bytes: counters.committed_bytes.load(Ordering::Relaxed),
                cold_loads: counters.cold_loads.load(Ordering::Relaxed),
                ..VolumeMetrics::default()
            };
            running.meter.fill(&mut metrics);
            metrics
        };
        self.core.table.running().into_iter().map(metrics).collect()
    }

    async fn volumes(&self) -> Answer<Vec<VolumeInfo>> {
        self.within(|core| async move { core.volumes().await }).await
    }

    async fn volume(&self, name: &str) -> Answer<VolumeInfo> {
        let name = name.to_owned();
        self.within(|core| async move {
            let (head, _) = catalog::read_volume(&core.engine, &name).await?;
            core.info(name, head).await
        })
        .await
    }

    async fn create_volume(&self, name: &str, request: CreateVolume) -> Answer<Done<VolumeInfo>> {
        let name = name.to_owned();
        self.within(|core| async move { core.create(&name, request).await }).await
    }

    async fn resize_volume(&self, name: &str, size_bytes: u64, force: bool) -> Answer<VolumeInfo> {
        let name = name.to_owned();
        self.within(|core| async move { core.resize(&name, size_bytes, force).await }).await
    }

    async fn delete_volume(&self, name: &str, with_snapshots: bool) -> Answer<TrashInfo> {
        let name = name.to_owned();
        self.within(|core| async move { core.delete_volume(&name, with_snapshots).await }).await
    }

    async fn attach(&self, name: &str) -> Answer<Done<Attachment>> {
        let name = name.to_owned();
        self.within(|core| async move {
            Ok(match core.attach(&name).await? {
                Done::Now(running) => Done::Now(core.attachment(&name, &running)),
                Done::Already(running) => Done::Already(core.attachment(&name, &running)),
            })
        })
        .await
    }

    async fn attachments(&self) -> Answer<Vec<Attachment>> {
        let running = self.core.table.running();
        Ok(running.iter().map(|(name, running)| self.core.attachment(name, running)).collect())
    }

    async fn detach(&self, name: &str, keep_local: bool) -> Answer<()> {
        let name = name.to_owned();
        self.within(|core| async move {
            if keep_local { core.detach_keeping(&name).await } else { core.detach(&name).await }
        })
        .await
    }

    async fn rollback(&self, name: &str, snapshot: u64) -> Answer<SnapshotInfo> {
        let name = name.to_owned();
        self.within(|core| async move {
            let _turn = core.table.turn(&name).await;
            core.detached(&name).await?;
            Ok(snapshot_info(past::rollback(&core.engine, &name, snapshot).await?, &name))
        })
        .await
    }

    async fn wait_durable(&self, name: &str) -> Answer<Durable> {
        let name = name.to_owned();
        self.within(|core| async move { core.durable(&name).await }).await
    }

    async fn trash(&self) -> Answer<Vec<TrashInfo>> {
        self.within(|core| async move {
            let (entries, _) = trash::trash(&core.engine).await?;
            Ok(entries.into_iter().map(trash_info).collect())
        })
        .await
    }

    async fn undelete(&self, trash_id_or_name: &str, name: Option<&str>) -> Answer<Resolved> {
        if let Some(name) = name {
            check_name(name).map_err(invalid)?;
        }
        let (id, name) = (trash_id_or_name.to_owned(), name.map(str::to_owned));
        self.within(
            |core| async move { Ok(restored(trash::undelete(&core.engine, &id, name.as_deref()).await?)) },
        )
        .await
    }

    async fn orphans(&self) -> Answer<Vec<OrphanInfo>> {
        self.within(|core| async move {
            let orphans = core.orphans().await?;
            let info = |orphan: orphans::Orphan| OrphanInfo {
                id: orphan.id,
                volume_uid: orphan.uid.to_string(),
                volume: orphan.volume,
                term: orphan.term,
                epochs: orphan.numbers,
                dirty_bytes: orphan.dirty_bytes,
                reason: orphan.reason,
            };
            Ok(orphans.into_iter().map(info).collect())
        })
        .await
    }

    async fn recover(&self, orphan_id: &str, name: &str) -> Answer<VolumeInfo> {
        let (id, name) = (orphan_id.to_owned(), name.to_owned());
        self.within(|core| async move { core.recover_orphan(&id, &name).await }).await
    }

    async fn snapshots(&self, volume: Option<&str>) -> Answer<Vec<SnapshotInfo>> {
        let volume = volume.map(str::to_owned);
        self.within(|core| async move {
            match volume {
                Some(name) => core.snapshots_of(&name).await,
                None => Ok(core.volumes().await?.into_iter().flat_map(|volume| volume.snapshots).collect()),
            }
        })
        .await
    }

    async fn create_snapshot(&self, volume: &str, description: Option<String>) -> Answer<SnapshotInfo> {
        let name = volume.to_owned();
        self.within(|core| async move { core.create_snapshot(&name, description).await }).await
    }

    async fn delete_snapshot(&self, volume: &str, number: u64) -> Answer<()> {
        let name = volume.to_owned();
        self.within(|core| async move {
            let _turn = core.table.turn(&name).await;
            trash::delete_snapshot(&core.engine, &name, number).await?;
            Ok(())
        })
        .await
    }

    async fn images(&self) -> Answer<Vec<ImageInfo>> {
        self.within(|core| async move {
            let mut all = Vec::new();
            for (name, image) in catalog::images(&core.engine).await? {
                match image {
                    Ok(image) => all.push(image_info(name, image)),
                    Err(error) => all.push(ImageInfo {
                        name,
                        uid: String::new(),
                        size_bytes: 0,
                        state: "damaged".to_owned(),
                        source: error.to_string(),
                        created: UnixMillis(0),
                        stored_bytes: 0,
                        description: None,
                    }),
                }
            }
            Ok(all)
        })
        .await
    }

    async fn image(&self, name: &str) -> Answer<ImageInfo> {
        let name = name.to_owned();
        self.within(|core| async move {
            let (image, _) = catalog::read_image(&core.engine, &name).await?;
            Ok(image_info(name, image))
        })
        .await
    }

    async fn import_image(
        &self,
        name: &str,
        source: ImageSource,
        description: Option<String>,
    ) -> Answer<JobInfo> {
        check_name(name).map_err(invalid)?;
        self.core.check_pool()?;
        self.core.import_image(name, source, description).await
    }

    async fn export_image(&self, name: &str) -> Answer<Export> {
        let name = name.to_owned();
        self.within(|core| async move {
            // Images first: a volume is not exported, its snapshots are.
            let named = match catalog::read_image(&core.engine, &name).await {
                Ok((image, _)) => Named::Image(image),
                Err(EngineError::NotFound(_)) => catalog::resolve(&core.engine, &name).await?.1,
                Err(error) => return Err(error.into()),
            };
            let (map, size_bytes) = match named {
                Named::Image(image) if !image.is_ready() => {
                    return Err(ServiceError::new(
                        Refusal::Conflict,
                        format!("image {name} is being imported"),
                    ));
                }
                Named::Image(image) => (image.map, image.size_bytes),
                Named::Snapshot(snapshot) => (snapshot.map, snapshot.size_bytes),
                Named::Volume(_) => {
                    return Err(invalid(format!("{name} is a volume, which changes while it is read"))
                        .hint("export a snapshot of it"));
                }
            };
            let bytes = image::export(&core.engine, map, size_bytes).await?;
            Ok(Export { size_bytes, bytes })
        })
        .await
    }

    async fn delete_image(&self, name: &str) -> Answer<TrashInfo> {
        let name = name.to_owned();
        self.within(|core| async move { Ok(trash_info(trash::delete_image(&core.engine, &name).await?)) })
            .await
    }

    async fn jobs(&self) -> Answer<Vec<JobInfo>> {
        Ok(self.core.jobs.all())
    }

    async fn job(&self, id: u64) -> Answer<JobInfo> {
        let missing = || ServiceError::new(Refusal::NotFound, format!("there is no job {id}"));
        self.core.jobs.get(id).ok_or_else(missing)
    }

    async fn resolve(&self, name: &str) -> Answer<Resolved> {
        let name = name.to_owned();
        self.within(|core| async move { core.resolve(&name).await }).await
    }

    async fn space(&self) -> Answer<Space> {
        self.within(|core| async move { core.space().await }).await
    }

    async fn doctor(&self) -> Answer<Vec<Finding>> {
        Ok(self.core.doctor().await)
    }
}
