//! The HTTP API: `/api/v1`, health and metrics.
//!
//! Owns: routes, status codes, and that work which was begun is not given up because the asker went away.
//! Does not own: the work itself ([`crate::node::service::Service`]), the web page ([`super::dashboard`]).

mod extract;
mod guard;
mod images;
mod listen;
mod metrics;
pub mod problem;

pub use extract::JSON_BYTES_MAX;
pub use guard::AllowedHosts;
pub use listen::{BindError, Endpoint, Server};

use crate::node::service::{CreateVolume, Done, Refusal, ServiceError, SharedService};
use axum::extract::{DefaultBodyLimit, FromRef, State};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use extract::{Body, Params, Segments};
use problem::Problem;
use serde::{Deserialize, Serialize};
use std::future::Future;
use tokio_util::task::TaskTracker;

/// What every handler has at hand.
#[derive(Clone)]
pub struct Api {
    service: SharedService,
    /// Work that was begun; a shutdown waits for it.
    tasks: TaskTracker,
}

impl FromRef<Api> for SharedService {
    fn from_ref(api: &Api) -> Self {
        Self::clone(&api.service)
    }
}

type Answer = Result<Response, Problem>;

impl Api {
    pub fn new(service: SharedService, tasks: TaskTracker) -> Self {
        Self { service, tasks }
    }

    /// Routes for a listener that only its owner reaches.
    pub fn router(self) -> Router {
        routes().with_state(self).layer(from_fn(problem::net))
    }

    /// Routes for a listener that a browser reaches.
    pub fn guarded_router(self, allowed: AllowedHosts) -> Router {
        routes()
            .with_state(self)
            .layer(from_fn_with_state(allowed, guard::guard))
            .layer(from_fn(problem::net))
    }

    /// Runs `work` to its end even if nobody waits for it any more: a request that was half done when its client went
    /// away would leave its caller's retry to find out what happened.
    async fn act<T, F>(&self, work: impl FnOnce(SharedService) -> F) -> Result<T, ServiceError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ServiceError>> + Send + 'static,
    {
        let work = work(SharedService::clone(&self.service));
        self.tasks.spawn(work).await.unwrap_or_else(|error| {
            log::error!("work for a request did not end: {error}");
            Err(ServiceError::new(
                Refusal::Internal,
                "the daemon failed in a way that it should not; its log says more",
            ))
        })
    }
}

fn routes() -> Router<Api> {
    let v1 = Router::new()
        .route("/volumes", get(volumes))
        .route("/volumes/{name}", get(volume).put(create_volume).delete(delete_volume))
        .route("/volumes/{name}/attach", post(attach))
        .route("/volumes/{name}/detach", post(detach))
        .route("/volumes/{name}/resize", post(resize))
        .route("/volumes/{name}/rollback", post(rollback))
        .route("/volumes/{name}/wait-durable", post(wait_durable))
        .route("/volumes/{name}/snapshots", get(snapshots_of).post(create_snapshot))
        .route("/volumes/{name}/snapshots/{number}", delete(delete_snapshot))
        .route("/snapshots", get(snapshots))
        .route("/images", get(images::list))
        .route("/images/{name}", get(images::show).put(images::import).delete(images::delete))
        .route("/images/{name}/raw", get(images::export))
        .route("/jobs", get(async |State(api): State<Api>| answer(api.service.jobs().await)))
        .route("/jobs/{id}", get(job))
        .route("/trash", get(async |State(api): State<Api>| answer(api.service.trash().await)))
        .route("/trash/{id}/undelete", post(undelete))
        .route("/orphans", get(async |State(api): State<Api>| answer(api.service.orphans().await)))
        .route("/orphans/{id}/recover", post(recover))
        .route("/resolve/{name}", get(resolve))
        .route("/space", get(async |State(api): State<Api>| answer(api.service.space().await)))
        .route("/doctor", get(async |State(api): State<Api>| answer(api.service.doctor().await)))
        .route("/node", get(async |State(api): State<Api>| answer(api.service.node().await)))
        .route("/attachments", get(async |State(api): State<Api>| answer(api.service.attachments().await)));
    Router::new()
        .nest("/api/v1", v1)
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics::metrics))
        .merge(super::dashboard::routes())
        .layer(DefaultBodyLimit::max(JSON_BYTES_MAX))
        .fallback(async |uri: Uri| {
            Problem::new(StatusCode::NOT_FOUND, Refusal::NotFound, format!("there is no {}", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            let detail = format!("{} cannot be asked with {method}", uri.path());
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, Refusal::Invalid, detail)
        })
}

fn answer<T: Serialize>(result: Result<T, ServiceError>) -> Answer {
    Ok(Json(result?).into_response())
}

fn created<T: Serialize>(answer: T) -> Response {
    (StatusCode::CREATED, Json(answer)).into_response()
}

fn done<T: Serialize>(done: Done<T>) -> Response {
    match done {
        Done::Now(answer) => created(answer),
        Done::Already(answer) => Json(answer).into_response(),
    }
}

async fn readyz(State(service): State<SharedService>) -> Response {
    match service.ready().await {
        Ok(()) => "ready\n".into_response(),
        Err(error) => {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            Problem { status: status.as_u16(), ..Problem::from(error) }.into_response()
        }
    }
}

async fn volumes(State(service): State<SharedService>) -> Answer {
    answer(service.volumes().await)
}

async fn volume(State(service): State<SharedService>, Segments(name): Segments<String>) -> Answer {
    answer(service.volume(&name).await)
}

async fn create_volume(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(request): Body<CreateVolume>,
) -> Answer {
    Ok(done(api.act(|service| async move { service.create_volume(&name, request).await }).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteVolume {
    #[serde(default)]
    with_snapshots: bool,
}

async fn delete_volume(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Params(DeleteVolume { with_snapshots }): Params<DeleteVolume>,
) -> Answer {
    answer(api.act(|service| async move { service.delete_volume(&name, with_snapshots).await }).await)
}

/// A body without fields.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

async fn attach(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer {
    Ok(done(api.act(|service| async move { service.attach(&name).await }).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Detach {
    #[serde(default)]
    keep_local: bool,
}

async fn detach(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(Detach { keep_local }): Body<Detach>,
) -> Answer {
    api.act(|service| async move { service.detach(&name, keep_local).await }).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    size_bytes: u64,
    #[serde(default)]
    force: bool,
}

async fn resize(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(Resize { size_bytes, force }): Body<Resize>,
) -> Answer {
    answer(api.act(|service| async move { service.resize_volume(&name, size_bytes, force).await }).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rollback {
    snapshot: u64,
}

async fn rollback(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(Rollback { snapshot }): Body<Rollback>,
) -> Answer {
    answer(api.act(|service| async move { service.rollback(&name, snapshot).await }).await)
}

async fn wait_durable(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer {
    answer(api.act(|service| async move { service.wait_durable(&name).await }).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshots {
    volume: Option<String>,
}

async fn snapshots(
    State(service): State<SharedService>,
    Params(Snapshots { volume }): Params<Snapshots>,
) -> Answer {
    answer(service.snapshots(volume.as_deref()).await)
}

async fn snapshots_of(State(service): State<SharedService>, Segments(name): Segments<String>) -> Answer {
    answer(service.snapshots(Some(&name)).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    description: Option<String>,
}

async fn create_snapshot(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Body(Described { description }): Body<Described>,
) -> Answer {
    let work = api.act(|service| async move { service.create_snapshot(&name, description).await });
    Ok(created(work.await?))
}

async fn delete_snapshot(
    State(api): State<Api>,
    Segments((volume, number)): Segments<(String, u64)>,
) -> Answer {
    api.act(|service| async move { service.delete_snapshot(&volume, number).await }).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn job(State(service): State<SharedService>, Segments(id): Segments<u64>) -> Answer {
    answer(service.job(id).await)
}

async fn resolve(State(service): State<SharedService>, Segments(name): Segments<String>) -> Answer {
    answer(service.resolve(&name).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Undelete {
    name: Option<String>,
}

async fn undelete(
    State(api): State<Api>,
    Segments(id): Segments<String>,
    Body(Undelete { name }): Body<Undelete>,
) -> Answer {
    let work = api.act(|service| async move { service.undelete(&id, name.as_deref()).await });
    Ok(created(work.await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recover {
    name: String,
}

async fn recover(
    State(api): State<Api>,
    Segments(id): Segments<String>,
    Body(Recover { name }): Body<Recover>,
) -> Answer {
    let work = api.act(|service| async move { service.recover(&id, &name).await });
    Ok(created(work.await?))
}
