//! The web page: one moment of a node, to look at.
//!
//! Owns: the overview at `/` and its static files; nothing on it changes anything, and nothing runs in the browser.
//! Does not own: the API beside it ([`super::api`]).

use super::api::Api;
use super::api::problem::Problem;
use super::connect;
use super::text::{age, duration, size, utc};
use crate::clock::{Clock, UnixMillis};
use crate::node::service::{
    Attachment, Finding, ImageInfo, JobInfo, NodeInfo, Refusal, ServiceError, SharedService, SnapshotInfo,
    Space, VolumeInfo,
};
use askama::Template;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use rust_embed::Embed;
use std::time::Duration;

/// Nothing but the page's own style sheet and icon; no scripts, no frames, no forms.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";
/// Jobs shown, the newest first.
const JOBS_SHOWN: usize = 10;

#[derive(Embed)]
#[folder = "web/static"]
struct Static;

pub fn routes() -> Router<Api> {
    Router::new().route("/", get(overview)).route("/static/{file}", get(static_file))
}

async fn static_file(Path(file): Path<String>) -> Result<Response, Problem> {
    let Some(content) = Static::get(&file) else {
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            Refusal::NotFound,
            format!("there is no /static/{file}"),
        ));
    };
    let media = match file.rsplit_once('.') {
        Some((_, "css")) => "text/css; charset=utf-8",
        Some((_, "svg")) => "image/svg+xml",
        _ => "application/octet-stream",
    };
    Ok(secured(
        ([(header::CONTENT_TYPE, media), (header::CACHE_CONTROL, "no-cache")], content.data).into_response(),
    ))
}

async fn overview(State(service): State<SharedService>) -> Result<Response, Problem> {
    let page = Overview::of(&service, Clock::System.wall()).await;
    let html = page.render().map_err(|error| {
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            Refusal::Internal,
            format!("failed to make the page: {error}"),
        )
    })?;
    let headers = [(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CACHE_CONTROL, "no-store")];
    Ok(secured((headers, html).into_response()))
}

fn secured(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// The page, all of it text that is escaped by the template.
#[derive(Template)]
#[template(path = "overview.html", config = "web/askama.toml")]
struct Overview {
    now: String,
    not_ready: Option<String>,
    failures: Vec<String>,
    node: Option<NodeRow>,
    space: Option<SpaceRow>,
    dirty: String,
    findings: Vec<FindingRow>,
    volumes: Vec<VolumeRow>,
    attachments: Vec<AttachmentRow>,
    images: Vec<ImageRow>,
    snapshots: Vec<SnapshotRow>,
    jobs: Vec<JobRow>,
}

struct NodeRow {
    pool: String,
    nbd: Vec<String>,
    started: String,
    version: String,
    attached: u64,
}

struct SpaceRow {
    pool: String,
    cache: String,
    state: String,
}

struct FindingRow {
    class: &'static str,
    level: String,
    what: String,
    detail: String,
}

struct VolumeRow {
    name: String,
    size: String,
    class: &'static str,
    state: String,
    why: Option<String>,
    from: String,
    dirty: String,
    last_commit: String,
}

struct AttachmentRow {
    volume: String,
    size: String,
    read_only: bool,
    uris: Vec<String>,
    commands: Vec<(&'static str, String)>,
}

struct ImageRow {
    name: String,
    size: String,
    stored: String,
    state: String,
    created: String,
    source: String,
}

struct SnapshotRow {
    name: String,
    size: String,
    created: String,
    description: String,
}

struct JobRow {
    what: String,
    class: &'static str,
    state: String,
    error: Option<String>,
    percent: Option<u64>,
    read: String,
    stored: String,
    started: String,
}

impl Overview {
    /// Asks for all of it at once; what cannot be read is said on the page, beside what can.
    async fn of(service: &SharedService, now: UnixMillis) -> Self {
        let mut failures = Vec::new();
        let (ready, node, space, doctor) =
            futures::join!(service.ready(), service.node(), service.space(), service.doctor());
        let (volumes, attachments, images, snapshots, jobs) = futures::join!(
            service.volumes(),
            service.attachments(),
            service.images(),
            service.snapshots(None),
            service.jobs(),
        );
        let node = read("node", node, &mut failures);
        let space = read("space", space, &mut failures);
        let volumes = read("volumes", volumes, &mut failures).unwrap_or_default();
        let attachments = read("attachments", attachments, &mut failures).unwrap_or_default();
        let images = read("images", images, &mut failures).unwrap_or_default();
        let snapshots = read("snapshots", snapshots, &mut failures).unwrap_or_default();
        let mut jobs = read("jobs", jobs, &mut failures).unwrap_or_default();
        let findings = read("health", doctor, &mut failures).unwrap_or_default();
        jobs.sort_by_key(|job| std::cmp::Reverse(job.id));
        Self {
            now: utc(now),
            not_ready: ready.err().map(|error| error.message),
            failures,
            dirty: dirty_in_all(&volumes),
            node: node.map(|node| NodeRow::of(node, now)),
            space: space.as_ref().map(SpaceRow::of),
            findings: findings.into_iter().filter_map(FindingRow::of).collect(),
            volumes: volumes.into_iter().map(|volume| VolumeRow::of(volume, now)).collect(),
            attachments: attachments.into_iter().map(AttachmentRow::of).collect(),
            images: images.into_iter().map(|image| ImageRow::of(image, now)).collect(),
            snapshots: snapshots.into_iter().map(|snapshot| SnapshotRow::of(snapshot, now)).collect(),
            jobs: jobs.into_iter().take(JOBS_SHOWN).map(|job| JobRow::of(job, now)).collect(),
        }
    }
}

fn read<T>(what: &str, answer: Result<T, ServiceError>, failures: &mut Vec<String>) -> Option<T> {
    answer.map_err(|error| failures.push(format!("{what}: {error}"))).ok()
}

fn dirty(bytes: u64, oldest_ms: Option<u64>) -> String {
    match (bytes, oldest_ms) {
        (0, _) => "nothing".to_owned(),
        (bytes, Some(ms)) => {
            format!("{}, the oldest for {}", size(bytes), duration(Duration::from_millis(ms)))
        }
        (bytes, None) => size(bytes),
    }
}

fn dirty_in_all(volumes: &[VolumeInfo]) -> String {
    let bytes = volumes.iter().filter_map(|volume| volume.dirty_bytes).fold(0, u64::saturating_add);
    let oldest =
        volumes.iter().filter(|volume| volume.dirty_bytes > Some(0)).filter_map(|v| v.oldest_dirty_ms);
    dirty(bytes, oldest.max())
}

impl NodeRow {
    fn of(node: NodeInfo, now: UnixMillis) -> Self {
        let NodeInfo { version, pool, started, attached, nbd, .. } = node;
        Self { pool, nbd, started: age(started, now), version, attached }
    }
}

impl SpaceRow {
    fn of(space: &Space) -> Self {
        Self {
            pool: format!("{} in {} objects", size(space.pool_bytes), space.pool_objects),
            cache: format!("{} of {}", size(space.cache_used_bytes), size(space.cache_total_bytes)),
            state: format!("{} of {}", size(space.state_free_bytes), size(space.state_total_bytes)),
        }
    }
}

impl FindingRow {
    /// None for what is as it should be.
    fn of(finding: Finding) -> Option<Self> {
        let class = match finding.level.as_str() {
            "ok" => return None,
            "warning" => "warn",
            _ => "bad",
        };
        Some(Self { class, level: finding.level, what: finding.what, detail: finding.detail })
    }
}

impl VolumeRow {
    fn of(volume: VolumeInfo, now: UnixMillis) -> Self {
        let class = match volume.state.as_str() {
            "attached" => "good",
            "stopped" => "bad",
            _ => "soft",
        };
        Self {
            size: size(volume.size_bytes),
            class,
            why: volume.stopped.or_else(|| volume.owner_node.filter(|_| volume.state == "elsewhere")),
            from: volume.from.unwrap_or_else(|| "empty".to_owned()),
            dirty: volume
                .dirty_bytes
                .map_or_else(|| "–".to_owned(), |bytes| dirty(bytes, volume.oldest_dirty_ms)),
            last_commit: volume.last_commit.map_or_else(|| "never".to_owned(), |time| age(time, now)),
            name: volume.name,
            state: volume.state,
        }
    }
}

impl AttachmentRow {
    fn of(attachment: Attachment) -> Self {
        let commands = connect::commands(&attachment);
        let Attachment { volume, uris, read_only, size_bytes } = attachment;
        Self { volume, size: size(size_bytes), read_only, uris, commands }
    }
}

impl ImageRow {
    fn of(image: ImageInfo, now: UnixMillis) -> Self {
        Self {
            name: image.name,
            size: size(image.size_bytes),
            stored: size(image.stored_bytes),
            state: image.state,
            created: age(image.created, now),
            source: image.source,
        }
    }
}

impl SnapshotRow {
    fn of(snapshot: SnapshotInfo, now: UnixMillis) -> Self {
        Self {
            name: snapshot.name,
            size: size(snapshot.size_bytes),
            created: age(snapshot.created, now),
            description: snapshot.description.unwrap_or_default(),
        }
    }
}

impl JobRow {
    fn of(job: JobInfo, now: UnixMillis) -> Self {
        let class = match job.state.as_str() {
            "done" => "good",
            "failed" => "bad",
            _ => "soft",
        };
        let running = job.state == "running";
        let percent = |total: u64| {
            let percent = u128::from(job.done_bytes) * 100 / u128::from(total.max(1));
            u64::try_from(percent.min(100)).unwrap_or(100)
        };
        let of_total = job.total_bytes.map(|total| format!(" of {}", size(total))).unwrap_or_default();
        let rate = if running { format!(", {}/s", size(job.rate_bytes_per_second)) } else { String::new() };
        Self {
            percent: job.total_bytes.filter(|_| running).map(percent),
            read: format!("{}{of_total}{rate}", size(job.done_bytes)),
            what: job.what,
            class,
            state: job.state,
            error: job.error,
            stored: size(job.stored_bytes),
            started: age(job.started, now),
        }
    }
}
