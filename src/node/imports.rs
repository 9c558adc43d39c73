//! Imports under way and how they ended.
//!
//! Owns: the list of jobs, running an import, reading a URL.
//! Does not own: formats and objects ([`crate::volume::image`]).

use super::Core;
use crate::clock::UnixMillis;
use crate::node::service::{ByteStream, ImageSource, JobInfo, Refusal, ServiceError};
use crate::volume::engine::EngineError;
use crate::volume::image::{NewImage, Progress, Reserved, import, release, reserve};
use crate::volume::source::{SourceLimits, open_source};
use futures::stream::{self, StreamExt};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Jobs that are remembered.
const JOBS_MAX: usize = 200;
/// Imports that run at once; each holds some packs in memory.
const IMPORTS_AT_ONCE: usize = 4;
/// A source that sends nothing for this long has failed.
const STALL_TIME: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 5;

#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    Running,
    Done,
    Failed(String),
}

/// One import.
pub struct Job {
    id: u64,
    what: String,
    total_bytes: AtomicU64,
    started: UnixMillis,
    started_at: Instant,
    progress: Progress,
    state: Mutex<(State, Option<Instant>)>,
}

impl Job {
    /// How far it is.
    pub fn info(&self) -> JobInfo {
        let (state, ended_at) = self.state.lock().clone();
        let (state, error) = match state {
            State::Running => ("running", None),
            State::Done => ("done", None),
            State::Failed(error) => ("failed", Some(error)),
        };
        let done_bytes = self.progress.done_bytes.load(Ordering::Relaxed);
        let took = ended_at.unwrap_or_else(Instant::now).duration_since(self.started_at);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
        let total_bytes = self.total_bytes.load(Ordering::Relaxed);
        JobInfo {
            id: self.id,
            what: self.what.clone(),
            state: state.to_owned(),
            done_bytes,
            total_bytes: (total_bytes > 0).then_some(total_bytes),
            stored_bytes: self.progress.stored_bytes.load(Ordering::Relaxed),
            started: self.started,
            rate_bytes_per_second: done_bytes.saturating_mul(1000) / took_ms,
            error,
        }
    }

    fn end(&self, state: State) {
        *self.state.lock() = (state, Some(Instant::now()));
    }

    fn is_running(&self) -> bool {
        self.state.lock().0 == State::Running
    }
}

/// Jobs, by number.
pub struct Jobs {
    all: Mutex<BTreeMap<u64, Arc<Job>>>,
    last: AtomicU64,
    turns: Semaphore,
}

impl Default for Jobs {
    fn default() -> Self {
        Self { all: Mutex::default(), last: AtomicU64::new(0), turns: Semaphore::new(IMPORTS_AT_ONCE) }
    }
}

impl Jobs {
    /// All that are remembered, latest first.
    pub fn all(&self) -> Vec<JobInfo> {
        self.all.lock().values().rev().map(|job| job.info()).collect()
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<JobInfo> {
        self.all.lock().get(&id).map(|job| job.info())
    }

    fn begin(&self, what: String, started: UnixMillis) -> Result<Arc<Job>, ServiceError> {
        let mut all = self.all.lock();
        while all.len() >= JOBS_MAX {
            let Some(old) = all.values().find(|job| !job.is_running()).map(|job| job.id) else {
                return Err(ServiceError::new(
                    Refusal::Conflict,
                    format!("{JOBS_MAX} imports are under way"),
                ));
            };
            all.remove(&old);
        }
        let job = Arc::new(Job {
            id: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            what,
            total_bytes: AtomicU64::new(0),
            started,
            started_at: Instant::now(),
            progress: Progress::default(),
            state: Mutex::new((State::Running, None)),
        });
        all.insert(job.id, job.clone());
        Ok(job)
    }
}

impl Core {
    /// Begins an import. One of a stream is over when this resolves, one of a URL has begun.
    ///
    /// # Errors
    /// The name is taken; for a stream, whatever kept it from being an image.
    ///
    /// # Cancellation
    /// The import goes on, and fails if its stream does.
    pub async fn import_image(
        self: &Arc<Self>,
        name: &str,
        source: ImageSource,
        description: Option<String>,
    ) -> Result<JobInfo, ServiceError> {
        let new = NewImage {
            name: name.to_owned(),
            source: match &source {
                ImageSource::Stream { .. } => "upload".to_owned(),
                ImageSource::Url(url) => without_secrets(url)?,
            },
            description,
        };
        let reserved = reserve(&self.engine, &new).await?;
        let job = match self.jobs.begin(format!("import image {name}"), self.engine.clock.wall()) {
            Ok(job) => job,
            Err(error) => {
                release(&self.engine, &reserved).await;
                return Err(error);
            }
        };
        let (core, running) = (self.clone(), job.clone());
        match source {
            ImageSource::Stream { bytes, total_bytes } => {
                let task = tokio::spawn(async move {
                    core.run_import(&running, reserved, Box::pin(async move { Ok((bytes, total_bytes)) }))
                        .await
                });
                match task.await {
                    Ok(Ok(())) => Ok(job.info()),
                    Ok(Err(error)) => Err(error.into()),
                    Err(_) => Err(ServiceError::new(Refusal::Internal, "the import ended without a result")),
                }
            }
            ImageSource::Url(url) => {
                tokio::spawn(async move {
                    // The job tells.
                    drop(core.run_import(&running, reserved, Box::pin(open_url(url))).await);
                });
                Ok(job.info())
            }
        }
    }

    async fn run_import(
        &self,
        job: &Job,
        reserved: Reserved,
        opening: futures::future::BoxFuture<'static, Result<(ByteStream, Option<u64>), EngineError>>,
    ) -> Result<(), EngineError> {
        let result = async {
            let turn = self.jobs.turns.acquire().await;
            let opened = async {
                let (bytes, total_bytes) = opening.await?;
                let spool_dir = self.config.state_dir.join("spool");
                tokio::fs::create_dir_all(&spool_dir).await.map_err(|error| {
                    EngineError::Disk(format!("failed to make {}: {error}", spool_dir.display()))
                })?;
                let source = open_source(watched(bytes), total_bytes, spool_dir, SourceLimits::default());
                Ok::<_, EngineError>(source.await?)
            };
            let source = match opened.await {
                Ok(source) => source,
                Err(error) => {
                    release(&self.engine, &reserved).await;
                    return Err(error);
                }
            };
            job.total_bytes.store(source.size_bytes.unwrap_or(0), Ordering::Relaxed);
            let image = import(&self.engine, reserved, source, &job.progress).await;
            drop(turn);
            image.map(drop)
        }
        .await;
        match &result {
            Ok(()) => job.end(State::Done),
            Err(error) => {
                log::warn!("{} failed: {error}", job.what);
                job.end(State::Failed(error.to_string()));
            }
        }
        result
    }
}

/// A URL as it may be shown: without user and password.
fn without_secrets(url: &str) -> Result<String, ServiceError> {
    let wrong = || ServiceError::new(Refusal::Invalid, "an image comes from an http or https URL");
    let mut parsed = reqwest::Url::parse(url).map_err(|_| wrong())?;
    if !matches!(parsed.scheme(), "http" | "https") {
        return Err(wrong());
    }
    let cleaned = parsed.set_username("").and_then(|()| parsed.set_password(None));
    cleaned.map_err(|()| wrong())?;
    parsed.set_query(None);
    Ok(parsed.to_string())
}

async fn open_url(url: String) -> Result<(ByteStream, Option<u64>), EngineError> {
    let failed = |error: reqwest::Error| EngineError::Source(describe(&error.without_url()));
    let client = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::limited(REDIRECTS_MAX))
        .connect_timeout(STALL_TIME)
        .build()
        .map_err(failed)?;
    let answer = tokio::time::timeout(STALL_TIME, client.get(url).send())
        .await
        .map_err(|_| EngineError::Source("the server does not answer".into()))?
        .map_err(failed)?;
    if !answer.status().is_success() {
        return Err(EngineError::Source(format!("the server answered {}", answer.status())));
    }
    let total_bytes = answer.content_length();
    let bytes = answer.bytes_stream().map(|part| part.map_err(|error| io::Error::other(describe(&error))));
    Ok((bytes.boxed(), total_bytes))
}

fn describe(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// The stream, ending with an error where nothing comes for too long.
fn watched(bytes: ByteStream) -> ByteStream {
    let watched = stream::unfold(Some(bytes), |bytes| async move {
        let mut bytes = bytes?;
        match tokio::time::timeout(STALL_TIME, bytes.next()).await {
            Ok(Some(Ok(part))) => Some((Ok(part), Some(bytes))),
            Ok(Some(Err(error))) => Some((Err(error), None)),
            Ok(None) => None,
            Err(_) => {
                let text = format!("nothing came from the source for {} s", STALL_TIME.as_secs());
                Some((Err(io::Error::new(io::ErrorKind::TimedOut, text)), None))
            }
        }
    });
    watched.boxed()
}
