//! What an operator can ask of a node: the requests, the answers, and why one was refused.
//!
//! Owns: [`Service`], which the HTTP API, the CLI and the dashboard are written against, and its plain-data types
//! (their JSON is the API's).
//! Does not own: how it is done ([`crate::node`]) or how it is spoken ([`crate::control`]).

use crate::clock::UnixMillis;
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

/// What a new volume is made from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ForkSource {
    /// `image:NAME`
    Image(String),
    /// `snapshot:VOLUME@N`
    Snapshot { volume: String, number: u64 },
    /// `volume:NAME`
    Volume(String),
}

impl fmt::Display for ForkSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(name) => write!(f, "image:{name}"),
            Self::Snapshot { volume, number } => write!(f, "snapshot:{volume}@{number}"),
            Self::Volume(name) => write!(f, "volume:{name}"),
        }
    }
}

impl FromStr for ForkSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("\"{text}\" is no source; write image:NAME, snapshot:VOLUME@NUMBER or volume:NAME");
        let (kind, rest) = text.split_once(':').ok_or_else(wrong)?;
        match kind {
            "image" => Ok(Self::Image(rest.to_owned())),
            "volume" => Ok(Self::Volume(rest.to_owned())),
            "snapshot" => {
                let (volume, number) = rest.rsplit_once('@').ok_or_else(wrong)?;
                let number = number.parse().map_err(|_| wrong())?;
                Ok(Self::Snapshot { volume: volume.to_owned(), number })
            }
            _ => Err(wrong()),
        }
    }
}

impl Serialize for ForkSource {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ForkSource {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A volume to be made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// What it is forked from; none: an empty disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ForkSource>,
    /// Size; by default that of the source. At least that of the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Fork the last commit of a volume that another node has attached, however old that is.
    #[serde(default)]
    pub last_commit: bool,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// A volume, as the pool and this node know it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeInfo {
    pub name: String,
    pub uid: String,
    pub size_bytes: u64,
    /// `detached`, `attached` (here), `elsewhere`, or `stopped` (attached here, and failed: see `stopped`).
    pub state: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_node: Option<String>,
    /// What it was forked from, as it was called then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub created: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit: Option<UnixMillis>,
    /// Bytes acknowledged here and not yet in the pool. `None` unless attached here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_bytes: Option<u64>,
    /// Age of the oldest of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_dirty_ms: Option<u64>,
    /// Why it stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    pub snapshots: Vec<SnapshotInfo>,
}

/// A past state of a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// `VOLUME@NUMBER`
    pub name: String,
    pub volume: String,
    pub number: u64,
    pub size_bytes: u64,
    pub created: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// An image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageInfo {
    pub name: String,
    pub uid: String,
    pub size_bytes: u64,
    /// `ready`, or `importing`.
    pub state: String,
    /// Where it came from.
    pub source: String,
    pub created: UnixMillis,
    /// Bytes that it takes in the pool.
    pub stored_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// How to reach an attached volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    pub volume: String,
    /// NBD URIs, the preferred one first.
    pub uris: Vec<String>,
    pub read_only: bool,
    pub size_bytes: u64,
}

/// How far an import or export is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobInfo {
    pub id: u64,
    /// For people: `import image debian`.
    pub what: String,
    /// `running`, `done`, or `failed`.
    pub state: String,
    /// Bytes of the source read so far, and in all where that is known.
    pub done_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Bytes put into the pool so far.
    pub stored_bytes: u64,
    pub started: UnixMillis,
    pub rate_bytes_per_second: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a name is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resolved {
    pub name: String,
    /// `volume`, `image` or `snapshot`.
    pub kind: String,
    pub uid: String,
    pub size_bytes: u64,
    /// NBD URI of it on this node, if it is served here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
}

/// Space on the node and in the pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Space {
    pub state_free_bytes: u64,
    pub state_total_bytes: u64,
    pub cache_used_bytes: u64,
    pub cache_total_bytes: u64,
    pub dirty_bytes: u64,
    pub pool_objects: u64,
    pub pool_bytes: u64,
    /// Bytes by kind of object: packs, maps, segments, other.
    pub pool_bytes_by_kind: Vec<(String, u64)>,
}

/// One thing that `doctor` looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// `ok`, `warning` or `problem`.
    pub level: String,
    /// What was looked at.
    pub what: String,
    /// What was found, and what to do about it.
    pub detail: String,
}

/// Local data of a volume that is in no history: kept until somebody decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrphanInfo {
    pub id: String,
    pub volume_uid: String,
    /// Name that the volume had when it was last attached here.
    pub volume: String,
    pub term: u64,
    pub epochs: Vec<u64>,
    pub dirty_bytes: u64,
    pub reason: String,
}

/// A deleted volume, image or snapshot that can still be had back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrashInfo {
    pub id: String,
    pub kind: String,
    pub name: String,
    pub deleted: UnixMillis,
    pub size_bytes: u64,
}

/// What is in the pool of a volume, and what is not yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Durable {
    pub volume: String,
    pub committed: UnixMillis,
    pub dirty_bytes: u64,
}

/// Health of the node, in a line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeInfo {
    pub version: String,
    pub node_id: String,
    pub pool: String,
    pub pool_id: String,
    pub started: UnixMillis,
    pub ready: bool,
    pub attached: u64,
    pub nbd: Vec<String>,
}

/// Counters of one attached volume since it was attached. Latencies are histograms of microseconds with the given
/// upper bounds; the last count is of all that took longer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VolumeMetrics {
    pub volume: String,
    pub read_ops: u64,
    pub read_bytes: u64,
    pub write_ops: u64,
    pub write_bytes: u64,
    pub zero_ops: u64,
    pub flush_ops: u64,
    pub errors: u64,
    pub dirty_bytes: u64,
    pub oldest_dirty_ms: u64,
    pub last_commit: Option<UnixMillis>,
    pub commits: u64,
    pub committed_bytes: u64,
    pub cold_loads: u64,
    pub latency_us_bounds: Vec<u64>,
    pub read_latency: Vec<u64>,
    pub write_latency: Vec<u64>,
    pub flush_latency: Vec<u64>,
}

/// Why a request was refused, by what the asker does about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// The request is wrong. 400, exit 2.
    Invalid,
    /// There is no such thing. 404, exit 3.
    NotFound,
    /// It is there already, or in use, or changed meanwhile. 409, exit 4.
    Conflict,
    /// No space, on the node or in the pool. 507, exit 5.
    NoSpace,
    /// The pool does not answer; later may work. 503, exit 6.
    Unavailable,
    /// It is not known whether it was done; the same request again settles it. 504, exit 7.
    Unclear,
    /// Data in the pool or on the disk fails its checks. 500, exit 8.
    Corrupt,
    /// Anything else. 500, exit 1.
    Internal,
}

/// A refused request. `message` says what was wrong, `hint` what to do about it.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct ServiceError {
    pub refusal: Refusal,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ServiceError {
    pub fn new(refusal: Refusal, message: impl Into<String>) -> Self {
        Self { refusal, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Answer of an idempotent request: whether this call did it, or it was so already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Done<T> {
    /// 201
    Now(T),
    /// 200
    Already(T),
}

/// Bytes as they come in; an error ends them.
pub type ByteStream = BoxStream<'static, io::Result<Bytes>>;

/// Where an image comes from.
pub enum ImageSource {
    /// The body of the request: raw, `.gz`, `.xz`, `.zst` of raw, or qcow2, told apart by their first bytes.
    Stream { bytes: ByteStream, total_bytes: Option<u64> },
    /// An http(s) URL that the node reads itself; the same formats.
    Url(String),
}

/// An image or other disk read out as raw bytes.
pub struct Export {
    pub size_bytes: u64,
    pub bytes: ByteStream,
}

type Answer<T> = Result<T, ServiceError>;

/// All that can be asked of a node.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    async fn node(&self) -> Answer<NodeInfo>;
    /// `Err` says why the node is not ready.
    async fn ready(&self) -> Answer<()>;
    async fn metrics(&self) -> Vec<VolumeMetrics>;

    async fn volumes(&self) -> Answer<Vec<VolumeInfo>>;
    async fn volume(&self, name: &str) -> Answer<VolumeInfo>;
    async fn create_volume(&self, name: &str, request: CreateVolume) -> Answer<Done<VolumeInfo>>;
    /// `force` allows a smaller size, which cuts off what lies beyond.
    async fn resize_volume(&self, name: &str, size_bytes: u64, force: bool) -> Answer<VolumeInfo>;
    /// Deletes a detached volume; `with_snapshots` its snapshots too.
    async fn delete_volume(&self, name: &str, with_snapshots: bool) -> Answer<TrashInfo>;
    async fn attach(&self, name: &str) -> Answer<Done<Attachment>>;
    async fn attachments(&self) -> Answer<Vec<Attachment>>;
    /// Commits, then gives the volume up. `keep_local`: without the pool; what is not committed stays here.
    async fn detach(&self, name: &str, keep_local: bool) -> Answer<()>;
    /// Sets a detached volume back to one of its snapshots; its present state is kept as a new snapshot, the answer.
    async fn rollback(&self, name: &str, snapshot: u64) -> Answer<SnapshotInfo>;
    /// Commits what is acknowledged now and waits until the pool has it.
    async fn wait_durable(&self, name: &str) -> Answer<Durable>;

    async fn trash(&self) -> Answer<Vec<TrashInfo>>;
    /// Brings a deleted volume or image back, under `name`.
    async fn undelete(&self, trash_id_or_name: &str, name: Option<&str>) -> Answer<Resolved>;
    async fn orphans(&self) -> Answer<Vec<OrphanInfo>>;
    /// Makes an orphan a new volume called `name`.
    async fn recover(&self, orphan_id: &str, name: &str) -> Answer<VolumeInfo>;

    async fn snapshots(&self, volume: Option<&str>) -> Answer<Vec<SnapshotInfo>>;
    async fn create_snapshot(&self, volume: &str, description: Option<String>) -> Answer<SnapshotInfo>;
    async fn delete_snapshot(&self, volume: &str, number: u64) -> Answer<()>;

    async fn images(&self) -> Answer<Vec<ImageInfo>>;
    async fn image(&self, name: &str) -> Answer<ImageInfo>;
    /// Begins an import; for a `Stream` it resolves when all is in the pool, for a `Url` at once.
    async fn import_image(
        &self,
        name: &str,
        source: ImageSource,
        description: Option<String>,
    ) -> Answer<JobInfo>;
    async fn export_image(&self, name: &str) -> Answer<Export>;
    async fn delete_image(&self, name: &str) -> Answer<TrashInfo>;

    async fn jobs(&self) -> Answer<Vec<JobInfo>>;
    async fn job(&self, id: u64) -> Answer<JobInfo>;
    async fn resolve(&self, name: &str) -> Answer<Resolved>;
    async fn space(&self) -> Answer<Space>;
    async fn doctor(&self) -> Answer<Vec<Finding>>;
}

/// A node that is being asked.
pub type SharedService = Arc<dyn Service>;
