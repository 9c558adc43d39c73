//! Images over HTTP: bytes in, bytes out.
//!
//! Owns: the two ways of an import (a body, a URL) and the export stream.
//! Does not own: formats.

use super::extract::{Body, Params, Segments, is_json};
use super::problem::Problem;
use super::{Answer, Api, answer, created};
use crate::node::service::{ByteStream, ImageSource, Refusal, SharedService};
use axum::Json;
use axum::body::BodyDataStream;
use axum::extract::{FromRequest as _, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde::Deserialize;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::oneshot;

pub async fn list(State(service): State<SharedService>) -> Answer {
    answer(service.images().await)
}

pub async fn show(State(service): State<SharedService>, Segments(name): Segments<String>) -> Answer {
    answer(service.image(&name).await)
}

pub async fn delete(State(api): State<Api>, Segments(name): Segments<String>) -> Answer {
    answer(api.act(|service| async move { service.delete_image(&name).await }).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportParams {
    description: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportUrl {
    url: String,
    description: Option<String>,
}

/// 202 for a URL, which the node goes on reading; 201 for a body, once all of it is in the pool.
pub async fn import(
    State(api): State<Api>,
    Segments(name): Segments<String>,
    Params(params): Params<ImportParams>,
    request: Request,
) -> Answer {
    if is_json(request.headers()) {
        let Body(ImportUrl { url, description }) = Body::from_request(request, &api).await?;
        let description = description.or(params.description);
        let work = api.act(|service| async move {
            service.import_image(&name, ImageSource::Url(url), description).await
        });
        return Ok((StatusCode::ACCEPTED, Json(work.await?)).into_response());
    }
    let total_bytes = content_length(&request)?;
    let (back, unread) = oneshot::channel();
    let body = LentBody { body: Some(request.into_body().into_data_stream()), back: Some(back) };
    let bytes: ByteStream = body.boxed();
    let work = api.act(|service| async move {
        service.import_image(&name, ImageSource::Stream { bytes, total_bytes }, params.description).await
    });
    match work.await {
        Ok(job) => Ok(created(job)),
        Err(error) => {
            if let Ok(unread) = unread.await {
                api.tasks.spawn(drain(unread));
            }
            Err(error.into())
        }
    }
}

fn content_length(request: &Request) -> Result<Option<u64>, Problem> {
    let Some(value) = request.headers().get(header::CONTENT_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.map(Some).ok_or_else(|| {
        Problem::new(StatusCode::BAD_REQUEST, Refusal::Invalid, "Content-Length is not a number of bytes")
    })
}

/// How long a client whose image was refused may go on sending before the connection is closed on it. Closed at once, it
/// would see a broken connection instead of the answer.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

async fn drain(mut unread: BodyDataStream) {
    let all = async { while let Some(Ok(_)) = unread.next().await {} };
    // Beyond the limit the connection is closed by dropping what is left.
    tokio::time::timeout(DRAIN_TIME_MAX, all).await.ok();
}

/// A request's body that comes back when it is dropped before its end.
struct LentBody {
    body: Option<BodyDataStream>,
    back: Option<oneshot::Sender<BodyDataStream>>,
}

impl Stream for LentBody {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let item = ready!(body.poll_next_unpin(context));
        if !matches!(item, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(item.map(|result| result.map_err(io::Error::other)))
    }
}

impl Drop for LentBody {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take()) {
            // Nobody waits for it where the import succeeded.
            back.send(body).ok();
        }
    }
}

pub async fn export(State(service): State<SharedService>, Segments(name): Segments<String>) -> Answer {
    let export = service.export_image(&name).await?;
    let mut response = Response::new(axum::body::Body::from_stream(export.bytes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, export.size_bytes.into());
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    // A name that the service knows has only characters that need no quoting.
    if let Ok(file) = HeaderValue::try_from(format!("attachment; filename=\"{name}.raw\"")) {
        headers.insert(header::CONTENT_DISPOSITION, file);
    }
    Ok(response)
}
