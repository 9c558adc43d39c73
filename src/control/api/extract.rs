//! Requests into values.
//!
//! Owns: extractors whose rejections are problem documents, and the limits on what is read.
//! Does not own: image bodies ([`super::images`]), which have no limit.

use super::problem::Problem;
use crate::node::service::Refusal;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Bytes of a JSON body; a larger one is refused with 413.
pub const JSON_BYTES_MAX: usize = 64 << 10;
/// A JSON body that takes longer to arrive is refused with 408.
const JSON_TIME_MAX: Duration = Duration::from_secs(30);

/// A JSON body; an empty one is `{}`.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let declared_json = is_json(request.headers());
        let body = tokio::time::timeout(JSON_TIME_MAX, Bytes::from_request(request, state))
            .await
            .map_err(|_| {
                Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    Refusal::Invalid,
                    "the body took too long to arrive",
                )
            })?
            .map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => Problem::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    Refusal::Invalid,
                    format!("the body is larger than {} KiB", JSON_BYTES_MAX >> 10),
                ),
                status => Problem::new(status, Refusal::Invalid, rejection.body_text()),
            })?;
        if body.is_empty() {
            return parse(b"{}");
        }
        if !declared_json {
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                Refusal::Invalid,
                "the body is not declared to be JSON",
            )
            .hint("send it with the header Content-Type: application/json"));
        }
        parse(&body)
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<Body<T>, Problem> {
    serde_json::from_slice(body).map(Body).map_err(|error| {
        Problem::new(StatusCode::BAD_REQUEST, Refusal::Invalid, format!("the JSON body is wrong: {error}"))
    })
}

/// Whether the body is declared to be JSON.
pub fn is_json(headers: &HeaderMap) -> bool {
    let declared = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    declared.split(';').next().is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json"))
}

/// The variable segments of a path.
pub struct Segments<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Segments<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(value) = Path::<T>::from_request_parts(parts, state).await.map_err(|rejection| {
            Problem::new(rejection.status(), Refusal::Invalid, rejection.body_text().to_ascii_lowercase())
        })?;
        Ok(Self(value))
    }
}

/// The parameters behind the `?`.
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(value) = Query::<T>::from_request_parts(parts, state).await.map_err(|rejection| {
            Problem::new(rejection.status(), Refusal::Invalid, rejection.body_text().to_ascii_lowercase())
        })?;
        Ok(Self(value))
    }
}
