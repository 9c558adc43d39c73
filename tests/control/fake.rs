//! A service in memory: enough of one to prove routes, JSON and texts. It stores nothing.

use async_trait::async_trait;
use blockhouse::clock::UnixMillis;
use blockhouse::node::service::{
    Attachment, CreateVolume, Done, Durable, Export, Finding, ImageInfo, ImageSource, JobInfo, NodeInfo,
    OrphanInfo, Refusal, Resolved, Service, ServiceError, SnapshotInfo, Space, TrashInfo, VolumeInfo,
    VolumeMetrics,
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

type Answer<T> = Result<T, ServiceError>;

const MADE: UnixMillis = UnixMillis(1_700_000_000_000);

#[derive(Default)]
pub struct Fake {
    volumes: Mutex<BTreeMap<String, VolumeInfo>>,
    attached: Mutex<Vec<String>>,
    /// Content of images.
    pub images: Mutex<BTreeMap<String, Vec<u8>>>,
    jobs: Mutex<Vec<JobInfo>>,
    pub not_ready: AtomicBool,
    /// `wait_durable` says that it began, and ends when it is told.
    pub began: Notify,
    pub go_on: Notify,
    pub ended: Arc<Notify>,
}

fn missing(what: &str, name: &str) -> ServiceError {
    ServiceError::new(Refusal::NotFound, format!("there is no {what} {name}"))
}

/// Names `refuse-<refusal>` are refused that way.
fn refuse(name: &str) -> Answer<()> {
    let Some(kind) = name.strip_prefix("refuse-") else { return Ok(()) };
    assert_ne!(kind, "panic", "asked to");
    let refusal: Refusal = serde_json::from_value(kind.into()).expect("a refusal");
    Err(ServiceError::new(refusal, format!("refused as {kind}")).hint("try another name"))
}

impl Fake {
    fn volume_info(name: &str, request: &CreateVolume) -> VolumeInfo {
        VolumeInfo {
            name: name.to_owned(),
            uid: "00".repeat(16),
            size_bytes: request.size_bytes.unwrap_or(1 << 30),
            state: "detached".to_owned(),
            owner_node: None,
            from: request.from.as_ref().map(ToString::to_string),
            description: request.description.clone(),
            created: MADE,
            last_commit: Some(MADE),
            dirty_bytes: None,
            oldest_dirty_ms: None,
            stopped: None,
            snapshots: Vec::new(),
        }
    }

    fn job_of(&self, name: &str, bytes: u64) -> JobInfo {
        let mut jobs = self.jobs.lock().expect("jobs");
        let job = JobInfo {
            id: u64::try_from(jobs.len()).expect("few"),
            what: format!("import image {name}"),
            state: "done".to_owned(),
            done_bytes: bytes,
            total_bytes: Some(bytes),
            stored_bytes: bytes / 2,
            started: MADE,
            rate_bytes_per_second: 1,
            error: None,
        };
        jobs.push(job.clone());
        job
    }

    fn trash_of(kind: &str, name: &str) -> TrashInfo {
        TrashInfo {
            id: format!("t-{name}"),
            kind: kind.to_owned(),
            name: name.to_owned(),
            deleted: MADE,
            size_bytes: 1,
        }
    }

    fn attachment(name: &str, size_bytes: u64) -> Attachment {
        let uris =
            vec![format!("nbd://127.0.0.1:10809/{name}"), format!("nbd+unix:///{name}?socket=/run/nbd.sock")];
        Attachment { volume: name.to_owned(), uris, read_only: false, size_bytes }
    }
}

#[async_trait]
impl Service for Fake {
    async fn node(&self) -> Answer<NodeInfo> {
        Ok(NodeInfo {
            version: "0.1.0".to_owned(),
            node_id: "n".to_owned(),
            pool: "dir:/srv/pool".to_owned(),
            pool_id: "p".to_owned(),
            started: MADE,
            ready: true,
            attached: 0,
            nbd: vec!["127.0.0.1:10809".to_owned()],
        })
    }

    async fn ready(&self) -> Answer<()> {
        match self.not_ready.load(Ordering::SeqCst) {
            true => Err(ServiceError::new(Refusal::Conflict, "recovering")),
            false => Ok(()),
        }
    }

    async fn metrics(&self) -> Vec<VolumeMetrics> {
        vec![VolumeMetrics { volume: "vm-7".to_owned(), write_bytes: 4096, ..VolumeMetrics::default() }]
    }

    async fn volumes(&self) -> Answer<Vec<VolumeInfo>> {
        Ok(self.volumes.lock().expect("volumes").values().cloned().collect())
    }

    async fn volume(&self, name: &str) -> Answer<VolumeInfo> {
        refuse(name)?;
        let volumes = self.volumes.lock().expect("volumes");
        volumes.get(name).cloned().ok_or_else(|| missing("volume", name))
    }

    async fn create_volume(&self, name: &str, request: CreateVolume) -> Answer<Done<VolumeInfo>> {
        refuse(name)?;
        let mut volumes = self.volumes.lock().expect("volumes");
        if let Some(volume) = volumes.get(name) {
            return Ok(Done::Already(volume.clone()));
        }
        let volume = Self::volume_info(name, &request);
        volumes.insert(name.to_owned(), volume.clone());
        Ok(Done::Now(volume))
    }

    async fn resize_volume(&self, name: &str, size_bytes: u64, force: bool) -> Answer<VolumeInfo> {
        let mut volumes = self.volumes.lock().expect("volumes");
        let volume = volumes.get_mut(name).ok_or_else(|| missing("volume", name))?;
        if size_bytes < volume.size_bytes && !force {
            return Err(ServiceError::new(Refusal::Invalid, "that is smaller").hint("add --force"));
        }
        volume.size_bytes = size_bytes;
        Ok(volume.clone())
    }

    async fn delete_volume(&self, name: &str, _with_snapshots: bool) -> Answer<TrashInfo> {
        let mut volumes = self.volumes.lock().expect("volumes");
        volumes.remove(name).ok_or_else(|| missing("volume", name))?;
        Ok(Self::trash_of("volume", name))
    }

    async fn attach(&self, name: &str) -> Answer<Done<Attachment>> {
        let volume = self.volume(name).await?;
        let attachment = Self::attachment(name, volume.size_bytes);
        let mut attached = self.attached.lock().expect("attached");
        if attached.iter().any(|other| other == name) {
            return Ok(Done::Already(attachment));
        }
        attached.push(name.to_owned());
        Ok(Done::Now(attachment))
    }

    async fn attachments(&self) -> Answer<Vec<Attachment>> {
        let attached = self.attached.lock().expect("attached");
        Ok(attached.iter().map(|name| Self::attachment(name, 1 << 30)).collect())
    }

    async fn detach(&self, name: &str, _keep_local: bool) -> Answer<()> {
        self.attached.lock().expect("attached").retain(|other| other != name);
        Ok(())
    }

    async fn rollback(&self, name: &str, _snapshot: u64) -> Answer<SnapshotInfo> {
        self.create_snapshot(name, None).await
    }

    async fn wait_durable(&self, name: &str) -> Answer<Durable> {
        self.began.notify_one();
        self.go_on.notified().await;
        self.ended.notify_one();
        Ok(Durable { volume: name.to_owned(), committed: MADE, dirty_bytes: 0 })
    }

    async fn trash(&self) -> Answer<Vec<TrashInfo>> {
        Ok(vec![Self::trash_of("volume", "gone")])
    }

    async fn undelete(&self, id: &str, name: Option<&str>) -> Answer<Resolved> {
        self.resolve(name.unwrap_or(id)).await
    }

    async fn orphans(&self) -> Answer<Vec<OrphanInfo>> {
        Ok(Vec::new())
    }

    async fn recover(&self, _orphan_id: &str, name: &str) -> Answer<VolumeInfo> {
        Ok(Self::volume_info(name, &CreateVolume::default()))
    }

    async fn snapshots(&self, volume: Option<&str>) -> Answer<Vec<SnapshotInfo>> {
        let volumes = self.volumes.lock().expect("volumes");
        let chosen = volumes.values().filter(|info| volume.is_none_or(|name| name == info.name));
        Ok(chosen.flat_map(|info| info.snapshots.clone()).collect())
    }

    async fn create_snapshot(&self, volume: &str, description: Option<String>) -> Answer<SnapshotInfo> {
        let mut volumes = self.volumes.lock().expect("volumes");
        let info = volumes.get_mut(volume).ok_or_else(|| missing("volume", volume))?;
        let number = u64::try_from(info.snapshots.len()).expect("few") + 1;
        let snapshot = SnapshotInfo {
            name: format!("{volume}@{number}"),
            volume: volume.to_owned(),
            number,
            size_bytes: info.size_bytes,
            created: MADE,
            description,
        };
        info.snapshots.push(snapshot.clone());
        Ok(snapshot)
    }

    async fn delete_snapshot(&self, volume: &str, number: u64) -> Answer<()> {
        let mut volumes = self.volumes.lock().expect("volumes");
        let info = volumes.get_mut(volume).ok_or_else(|| missing("volume", volume))?;
        info.snapshots.retain(|snapshot| snapshot.number != number);
        Ok(())
    }

    async fn images(&self) -> Answer<Vec<ImageInfo>> {
        let names: Vec<String> = self.images.lock().expect("images").keys().cloned().collect();
        let mut images = Vec::new();
        for name in names {
            images.push(self.image(&name).await?);
        }
        Ok(images)
    }

    async fn image(&self, name: &str) -> Answer<ImageInfo> {
        let images = self.images.lock().expect("images");
        let bytes = images.get(name).ok_or_else(|| missing("image", name))?;
        Ok(ImageInfo {
            name: name.to_owned(),
            uid: "11".repeat(16),
            size_bytes: u64::try_from(bytes.len()).expect("small"),
            state: "ready".to_owned(),
            source: "<script>alert(1)</script>".to_owned(),
            created: MADE,
            stored_bytes: 1,
            description: None,
        })
    }

    async fn import_image(&self, name: &str, source: ImageSource, _: Option<String>) -> Answer<JobInfo> {
        refuse(name)?;
        let content = match source {
            ImageSource::Url(url) => url.into_bytes(),
            ImageSource::Stream { mut bytes, total_bytes } => {
                let mut content = Vec::new();
                while let Some(part) = bytes.next().await {
                    let part =
                        part.map_err(|error| ServiceError::new(Refusal::Invalid, error.to_string()))?;
                    content.extend_from_slice(&part);
                }
                if let Some(total) = total_bytes {
                    assert_eq!(u64::try_from(content.len()), Ok(total), "Content-Length is what came");
                }
                content
            }
        };
        let length = u64::try_from(content.len()).expect("small");
        self.images.lock().expect("images").insert(name.to_owned(), content);
        Ok(self.job_of(name, length))
    }

    async fn export_image(&self, name: &str) -> Answer<Export> {
        let images = self.images.lock().expect("images");
        let content = images.get(name).ok_or_else(|| missing("image", name))?;
        let size_bytes = u64::try_from(content.len()).expect("small");
        let mut parts: Vec<io::Result<Bytes>> =
            content.chunks(100_000).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        if name == "torn" {
            parts.pop();
            parts.push(Err(io::Error::other("the pool went away")));
        }
        Ok(Export { size_bytes, bytes: stream::iter(parts).boxed() })
    }

    async fn delete_image(&self, name: &str) -> Answer<TrashInfo> {
        self.images.lock().expect("images").remove(name).ok_or_else(|| missing("image", name))?;
        Ok(Self::trash_of("image", name))
    }

    async fn jobs(&self) -> Answer<Vec<JobInfo>> {
        Ok(self.jobs.lock().expect("jobs").clone())
    }

    async fn job(&self, id: u64) -> Answer<JobInfo> {
        let jobs = self.jobs.lock().expect("jobs");
        jobs.iter().find(|job| job.id == id).cloned().ok_or_else(|| missing("job", &id.to_string()))
    }

    async fn resolve(&self, name: &str) -> Answer<Resolved> {
        let volume = self.volume(name).await?;
        let (kind, uid) = ("volume".to_owned(), volume.uid);
        Ok(Resolved { name: name.to_owned(), kind, uid, size_bytes: volume.size_bytes, uri: None })
    }

    async fn space(&self) -> Answer<Space> {
        Ok(Space {
            state_free_bytes: 3 << 30,
            state_total_bytes: 4 << 30,
            cache_used_bytes: 0,
            cache_total_bytes: 1 << 30,
            dirty_bytes: 0,
            pool_objects: 7,
            pool_bytes: 1 << 20,
            pool_bytes_by_kind: vec![("packs".to_owned(), 1 << 20)],
        })
    }

    async fn doctor(&self) -> Answer<Vec<Finding>> {
        let level = if self.not_ready.load(Ordering::SeqCst) { "problem" } else { "ok" };
        Ok(vec![Finding { level: level.to_owned(), what: "pool".to_owned(), detail: "answers".to_owned() }])
    }
}
