//! Errors as the API tells them: RFC 9457 problem documents, and nothing else.
//!
//! Owns: the document, the status of each refusal, and the net that turns any other error answer into one.
//! Does not own: exit codes of the command line ([`crate::control::cli`]).

use crate::node::service::{Refusal, ServiceError};
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt as _;
use serde::{Deserialize, Serialize};
use std::panic::AssertUnwindSafe;

/// Media type of the document.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// An error answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:blockhouse:refusal:` and the refusal.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    pub refusal: Refusal,
}

impl Problem {
    pub fn new(status: StatusCode, refusal: Refusal, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:blockhouse:refusal:{}", slug(refusal)),
            title: title(refusal).to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            hint: None,
            refusal,
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Status that a refusal is answered with.
pub fn status(refusal: Refusal) -> StatusCode {
    match refusal {
        Refusal::Invalid => StatusCode::BAD_REQUEST,
        Refusal::NotFound => StatusCode::NOT_FOUND,
        Refusal::Conflict => StatusCode::CONFLICT,
        Refusal::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Refusal::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Refusal::Unclear => StatusCode::GATEWAY_TIMEOUT,
        Refusal::Corrupt | Refusal::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn slug(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Invalid => "invalid",
        Refusal::NotFound => "not-found",
        Refusal::Conflict => "conflict",
        Refusal::NoSpace => "no-space",
        Refusal::Unavailable => "unavailable",
        Refusal::Unclear => "unclear",
        Refusal::Corrupt => "corrupt",
        Refusal::Internal => "internal",
    }
}

fn title(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Invalid => "The request is wrong",
        Refusal::NotFound => "There is no such thing",
        Refusal::Conflict => "It is there already, in use, or changed meanwhile",
        Refusal::NoSpace => "No space left",
        Refusal::Unavailable => "The pool does not answer",
        Refusal::Unclear => "It is not known whether it was done",
        Refusal::Corrupt => "Data fails its checks",
        Refusal::Internal => "Something went wrong",
    }
}

/// Refusal that comes closest to a status that axum chose.
fn refusal_of(status: StatusCode) -> Refusal {
    match status {
        StatusCode::NOT_FOUND => Refusal::NotFound,
        status if status.is_client_error() => Refusal::Invalid,
        _ => Refusal::Internal,
    }
}

impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        let ServiceError { refusal, message, hint } = error;
        Self { hint, ..Self::new(status(refusal), refusal, message) }
    }
}

impl From<Problem> for ServiceError {
    fn from(problem: Problem) -> Self {
        Self { refusal: problem.refusal, message: problem.detail, hint: problem.hint }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response()
    }
}

/// Answers any error that is no problem document yet, a panic included, with one.
pub async fn net(request: Request, next: Next) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let Ok(response) = AssertUnwindSafe(next.run(request)).catch_unwind().await else {
        log::error!("the answer to {what} panicked");
        return Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            Refusal::Internal,
            "the daemon failed in a way that it should not; its log says more",
        )
        .into_response();
    };
    let status = response.status();
    let is_problem = response.headers().get(header::CONTENT_TYPE).is_some_and(|value| value == PROBLEM_JSON);
    if !(status.is_client_error() || status.is_server_error()) || is_problem {
        return response;
    }
    let detail = status.canonical_reason().unwrap_or("error").to_ascii_lowercase();
    let mut problem = Problem::new(status, refusal_of(status), detail).into_response();
    // What the error answer said besides, `Allow` for one, still holds.
    for (name, value) in response.headers() {
        if !matches!(*name, header::CONTENT_TYPE | header::CONTENT_LENGTH) {
            problem.headers_mut().append(name, HeaderValue::clone(value));
        }
    }
    problem
}
