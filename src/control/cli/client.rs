//! Speaks the API.
//!
//! Owns: finding the daemon, requests, and problem documents back into errors.
//! Does not own: what answers look like to people.

use super::args::Global;
use crate::control::api::problem::Problem;
use crate::control::config::Loaded;
use crate::node::service::{Refusal, ServiceError};
use bytes::Bytes;
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub type Outcome<T> = Result<T, ServiceError>;

const SYSTEM_SOCKET: &str = "/run/blockhouse/control.sock";
/// An error answer larger than this is cut off.
const PROBLEM_BYTES_MAX: usize = 256 << 10;
/// Any other JSON answer larger than this is refused.
const ANSWER_BYTES_MAX: usize = 256 << 20;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);

/// A daemon to ask.
pub struct Client {
    http: reqwest::Client,
    base: String,
    /// For messages.
    place: String,
}

/// An answer's JSON, as it came.
pub struct Reply(pub Bytes);

impl Reply {
    pub fn parse<T: DeserializeOwned>(&self) -> Outcome<T> {
        serde_json::from_slice(&self.0).map_err(|error| {
            ServiceError::new(Refusal::Internal, format!("the daemon's answer is not understood: {error}"))
                .hint("is it of the same version as this command? Compare with: blockhouse --version")
        })
    }
}

fn socket_of(global: &Global) -> Outcome<PathBuf> {
    if let Some(socket) = &global.socket {
        return Ok(socket.clone());
    }
    if let Some(socket) = std::env::var_os("BLOCKHOUSE_SOCKET").filter(|value| !value.is_empty()) {
        return Ok(socket.into());
    }
    let asked_for = global.config.is_some() || global.data.is_some();
    match Loaded::load(global.config.as_deref(), global.data.as_deref()) {
        Ok(loaded) => {
            let socket = loaded.resolved().http.socket;
            let system = Path::new(SYSTEM_SOCKET);
            let elsewhere = !asked_for && !is_there(&socket) && is_there(system);
            Ok(if elsewhere { system.to_owned() } else { socket })
        }
        Err(error) if asked_for => Err(ServiceError::new(Refusal::Invalid, error.to_string())),
        Err(_) => Ok(SYSTEM_SOCKET.into()),
    }
}

#[expect(clippy::disallowed_methods, reason = "a command that serves nobody but its caller")]
fn is_there(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

impl Client {
    pub fn new(global: &Global) -> Outcome<Self> {
        let builder = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT_TIME_MAX);
        let (builder, base, place) = match &global.url {
            Some(url) => {
                if !(url.starts_with("http://") || url.starts_with("https://")) {
                    let message = format!("--url {url}: write it like http://127.0.0.1:8420");
                    return Err(ServiceError::new(Refusal::Invalid, message));
                }
                (builder, url.trim_end_matches('/').to_owned(), url.clone())
            }
            None => {
                let socket = socket_of(global)?;
                let place = socket.display().to_string();
                (builder.unix_socket(socket), "http://localhost".to_owned(), place)
            }
        };
        // Without TLS none of the system's certificates is looked for, which a small system may not have.
        let plain = global.url.as_ref().is_none_or(|url| !url.starts_with("https://"));
        let builder = if plain { builder.tls_certs_only([]) } else { builder };
        let http = builder.build().map_err(|error| {
            ServiceError::new(Refusal::Internal, format!("failed to make an HTTP client: {}", chain(&error)))
        })?;
        Ok(Self { http, base, place })
    }

    /// A request for a path below `/api/v1`.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/api/v1{path}", self.base))
    }

    pub async fn get(&self, path: &str) -> Outcome<Reply> {
        self.reply(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: &impl Serialize) -> Outcome<Reply> {
        self.reply(self.request(Method::POST, path).json(body)).await
    }

    pub async fn put(&self, path: &str, body: &impl Serialize) -> Outcome<Reply> {
        self.reply(self.request(Method::PUT, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Outcome<Reply> {
        self.reply(self.request(Method::DELETE, path)).await
    }

    /// Sends a request and reads its whole answer.
    pub async fn reply(&self, request: RequestBuilder) -> Outcome<Reply> {
        let (_, body) = self.status_and_body(request).await?;
        Ok(Reply(body))
    }

    /// The same, with the status of the answer.
    pub async fn status_and_body(&self, request: RequestBuilder) -> Outcome<(u16, Bytes)> {
        let mut response = self.send(request).await?;
        let status = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(part) = response.chunk().await.map_err(|error| self.broken(&error))? {
            if body.len() + part.len() > ANSWER_BYTES_MAX {
                return Err(ServiceError::new(Refusal::Internal, "the daemon's answer is too long"));
            }
            body.extend_from_slice(&part);
        }
        Ok((status, body.into()))
    }

    /// Sends a request; an answer that is an error is one.
    pub async fn send(&self, request: RequestBuilder) -> Outcome<Response> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.problem(response).await)
    }

    async fn problem(&self, mut response: Response) -> ServiceError {
        let status = response.status();
        let mut body = Vec::new();
        while let Ok(Some(part)) = response.chunk().await {
            body.extend_from_slice(&part);
            if body.len() > PROBLEM_BYTES_MAX {
                break;
            }
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => problem.into(),
            Err(_) => ServiceError::new(Refusal::Internal, format!("{} answered {status}", self.place))
                .hint("is that a Blockhouse daemon?"),
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> ServiceError {
        if !error.is_connect() {
            return self.broken(error);
        }
        ServiceError::new(
            Refusal::Unavailable,
            format!("the daemon is not running, or not reachable at {}: {}", self.place, root(error)),
        )
        .hint("start it with: blockhouse serve (or say where it is with --socket, --data or --url)")
    }

    /// The daemon took the request and then went away.
    fn broken(&self, error: &reqwest::Error) -> ServiceError {
        ServiceError::new(
            Refusal::Unclear,
            format!("the connection to the daemon at {} broke off: {}", self.place, root(error)),
        )
        .hint("the same command again settles whether it was done")
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// The innermost cause: what reqwest wraps around it names URLs that nobody wrote.
fn root(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// `text` as one segment of a path, or one value behind the `?`.
pub fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric()
            || b"-_~".contains(&byte)
            || (byte == b'.' && !matches!(text, "." | ".."))
        {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_segment() {
        assert_eq!(encode("vm-7.a_b"), "vm-7.a_b");
        assert_eq!(encode("../a b?c#d%"), "..%2Fa%20b%3Fc%23d%25");
        assert_eq!(encode(".."), "%2E%2E");
    }
}
