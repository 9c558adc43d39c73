//! Keeps web pages of others away from the API.
//!
//! Owns: the checks of `Host` and `Origin` on the TCP listener. A browser on this host reaches it, and with it any page
//! that the browser shows.
//! Does not own: access control.

use super::problem::Problem;
use crate::node::service::Refusal;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::sync::Arc;

/// Names under which the TCP listener may be asked.
#[derive(Clone, Debug)]
pub struct AllowedHosts(Arc<[String]>);

impl AllowedHosts {
    /// This host's own name, `localhost`, and those in the settings. IP addresses are always fine: nobody can point a
    /// foreign name at one and still have the browser send the address.
    pub fn new(configured: &[String]) -> Self {
        let own = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
        let configured = configured.iter().map(|name| name.to_ascii_lowercase());
        Self(configured.chain([own, "localhost".to_owned()]).collect())
    }

    fn allow(&self, host: &str) -> bool {
        let name = host_name(host).to_ascii_lowercase();
        let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&name);
        address.parse::<IpAddr>().is_ok() || self.0.contains(&name)
    }
}

/// `host` without its port.
fn host_name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// Refuses requests that a web page of somebody else may have caused.
pub async fn guard(State(allowed): State<AllowedHosts>, request: Request, next: Next) -> Response {
    match check(&allowed, request.method(), request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

fn check(allowed: &AllowedHosts, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    let refuse = |detail: String| Problem::new(StatusCode::FORBIDDEN, Refusal::Invalid, detail);
    let host = match (uri.authority(), headers.get(header::HOST)) {
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host.to_str().unwrap_or(""),
        (None, None) => "",
    };
    if !allowed.allow(host) {
        let hint = format!("add \"{}\" to allowed_hosts in [http] of the settings", host_name(host));
        return Err(refuse(format!("this node is not known as \"{host}\"")).hint(hint));
    }
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return Ok(());
    }
    match headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or("")) {
        None => Ok(()),
        Some(origin) if origin.split_once("://").is_some_and(|(_, from)| from.eq_ignore_ascii_case(host)) => {
            Ok(())
        }
        Some(origin) => Err(refuse(format!("a page of \"{origin}\" may not change anything here"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn allowed(method: Method, host: &str, origin: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, HeaderValue::from_str(origin).unwrap());
        }
        let hosts = AllowedHosts::new(&["Store.example".to_owned()]);
        check(&hosts, &method, &Uri::from_static("/x"), &headers).is_ok()
    }

    #[test]
    fn a_foreign_name_pointed_at_this_host_is_refused() {
        for host in
            ["127.0.0.1:8420", "[::1]:8420", "[::1]", "localhost", "LOCALHOST:1", "store.example:8420"]
        {
            assert!(allowed(Method::GET, host, None), "{host}");
        }
        for host in
            ["evil.example:8420", "", "localhost.evil.example", "127.0.0.1.evil.example", "[::1].x", ":1"]
        {
            assert!(!allowed(Method::GET, host, None), "{host}");
        }
    }

    #[test]
    fn a_page_of_another_origin_changes_nothing() {
        let host = "localhost:8420";
        assert!(allowed(Method::PUT, host, None));
        assert!(allowed(Method::PUT, host, Some("http://localhost:8420")));
        assert!(allowed(Method::GET, host, Some("http://evil.example")));
        for origin in
            ["http://evil.example", "null", "", "http://localhost:80", "http://localhost:8420.evil.example"]
        {
            assert!(!allowed(Method::PUT, host, Some(origin)), "{origin}");
            assert!(!allowed(Method::DELETE, host, Some(origin)), "{origin}");
        }
    }
}
