//! Requests to one bucket, one at a time.
//!
//! Owns: the SDK's client (TLS, credentials, no retries of its own), limits of time, number and size, and the server's
//! time.
//! Does not own: trying again, or what a request means.

use super::breaker::Breaker;
use super::fault::Fault;
use super::{Address, S3Config, S3OpenError};
use crate::store::{ETag, Key};
use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, Intercept, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    RuntimeComponents, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::BoxError;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use aws_smithy_runtime_api::client::orchestrator::Metadata;
use aws_smithy_types::DateTime;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::date_time::Format;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Largest answer that is held in memory whole: listings, errors. Objects have limits of their own.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// Largest file of certificates.
const CA_BYTES_MAX: u64 = 1 << 20;
/// Longest `ETag`.
const ETAG_BYTES_MAX: usize = 256;
/// Slowest transfer that is waited for.
const BYTES_PER_SECOND_MIN: u64 = 512 << 10;

/// Which requests share a limit: cold reads do not wait behind uploads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    Read,
    Change,
}

/// A bucket, and the limits of this node's use of it.
#[derive(Debug)]
pub struct Client {
    pub sdk: aws_sdk_s3::Client,
    pub address: Address,
    pub answer_time: Duration,
    reads: Semaphore,
    changes: Semaphore,
    breaker: Breaker,
    /// The latest date of an answer, in milliseconds since 1970; 0: none had one.
    server_unix_ms: Arc<AtomicU64>,
}

impl Client {
    /// A client; nothing is asked yet.
    ///
    /// # Errors
    /// A file of certificates that cannot be used, or settings that name no server.
    pub async fn new(config: &S3Config) -> Result<Self, S3OpenError> {
        let http = http_client(config).await?;
        let region = config.region.clone();
        let mut chain = aws_config::defaults(BehaviorVersion::latest()).http_client(http.clone());
        if let Some(region) = &region {
            chain = chain.region(Region::new(region.clone()));
        }
        if let Some(endpoint) = &config.endpoint {
            chain = chain.endpoint_url(endpoint);
        }
        let shared = chain.load().await;
        let server_unix_ms = Arc::new(AtomicU64::new(0));
        let mut s3 = aws_sdk_s3::config::Builder::from(&shared)
            .http_client(http)
            .force_path_style(config.path_style.unwrap_or(config.endpoint.is_some()))
            // Whatever is sent again has to know what came of it before.
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::builder().connect_timeout(Duration::from_secs(5)).build())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            // Requests are signed with a hash of their body, and what comes is checked by whoever knows its hash.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .interceptor(Guard { server_unix_ms: Arc::clone(&server_unix_ms) });
        if shared.region().is_none() {
            if config.endpoint.is_none() {
                return Err(S3OpenError::NoRegion);
            }
            s3 = s3.region(Region::from_static("us-east-1"));
        }
        Ok(Self {
            sdk: aws_sdk_s3::Client::from_conf(s3.build()),
            address: config.address.clone(),
            answer_time: config.answer_time,
            reads: Semaphore::new(config.reads_max.max(1)),
            changes: Semaphore::new(config.changes_max.max(1)),
            breaker: Breaker::default(),
            server_unix_ms,
        })
    }

    /// The name of `key` in the bucket.
    pub fn name(&self, key: &Key) -> String {
        format!("{}{key}", self.address.prefix)
    }

    /// The server's time as of its latest answer, in milliseconds since 1970. `None`: it does not date its answers.
    pub fn server_unix_ms(&self) -> Option<u64> {
        Some(self.server_unix_ms.load(Ordering::Relaxed)).filter(|&at| at > 0)
    }

    /// How long a transfer of `bytes` may take.
    pub fn time_for(&self, bytes: u64) -> Duration {
        self.answer_time + Duration::from_millis(bytes.saturating_mul(1000) / BYTES_PER_SECOND_MIN)
    }

    /// Makes one request that moves about `bytes`, once it may go out.
    ///
    /// # Errors
    /// What it ended with.
    ///
    /// # Cancellation
    /// The server may go on with it.
    pub async fn ask<T>(
        &self,
        lane: Lane,
        bytes: u64,
        request: impl Future<Output = Result<T, Fault>> + Send,
    ) -> Result<T, Fault> {
        let lane = match lane {
            Lane::Read => &self.reads,
            Lane::Change => &self.changes,
        };
        let turn = lane.acquire().await;
        self.breaker.admit(Instant::now()).map_err(Fault::Away)?;
        let time =
            self.answer_time + Duration::from_millis(bytes.saturating_mul(1000) / BYTES_PER_SECOND_MIN);
        // On the heap: the SDK's futures are large.
        let result = match tokio::time::timeout(time, Box::pin(request)).await {
            Ok(result) => result,
            Err(_) => Err(Fault::Lost(format!("no answer within {} ms", time.as_millis()))),
        };
        drop(turn);
        match &result {
            Err(fault) if fault.is_outage() => self.breaker.failed(Instant::now(), &fault.to_string()),
            Ok(_) | Err(_) => self.breaker.succeeded(),
        }
        result
    }
}

/// An `ETag` of an answer without its quotes.
pub fn parse_etag(header: Option<&str>) -> Result<ETag, Fault> {
    let bad = |what| Err(Fault::Bad(format!("the server gives an ETag that is {what}")));
    let Some(header) = header else { return bad("missing") };
    let inner = header.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(header);
    if inner.len() > ETAG_BYTES_MAX {
        return bad("too long");
    }
    if inner.is_empty() || !is_etag(inner) {
        return bad("none");
    }
    Ok(ETag(inner.to_owned()))
}

/// Whether a server may have given this one.
pub fn is_etag(inner: &str) -> bool {
    (1..=ETAG_BYTES_MAX).contains(&inner.len())
        && inner.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b',' | b'*'))
}

async fn http_client(config: &S3Config) -> Result<SharedHttpClient, S3OpenError> {
    let is_plain = config.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    let trust = match &config.ca_file {
        Some(path) => TrustStore::empty().with_pem_certificate(read_certificates(path).await?),
        None if is_plain => TrustStore::empty(),
        None => TrustStore::default(),
    };
    let tls = TlsContext::builder().with_trust_store(trust).build();
    let tls = tls.map_err(|error| S3OpenError::Tls(error.to_string()))?;
    Ok(aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
        .tls_context(tls)
        .pool_idle_timeout(Duration::from_secs(20))
        .build_https())
}

/// Certificates of a file, every one of which can be used: the TLS stack does not return on one that cannot.
async fn read_certificates(path: &Path) -> Result<Vec<u8>, S3OpenError> {
    use tokio::io::AsyncReadExt as _;
    let wrong = |message: String| S3OpenError::Ca { path: path.to_owned(), message };
    let mut pem = Vec::new();
    let file = tokio::fs::File::open(path).await.map_err(|error| wrong(error.to_string()))?;
    file.take(CA_BYTES_MAX).read_to_end(&mut pem).await.map_err(|error| wrong(error.to_string()))?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| wrong(format!("not a PEM file: {error}")))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(wrong("there is no certificate in it".to_owned()));
    }
    Ok(pem)
}

/// Looks at each answer before it is read.
#[derive(Debug)]
struct Guard {
    server_unix_ms: Arc<AtomicU64>,
}

impl Intercept for Guard {
    fn name(&self) -> &'static str {
        "guard"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response_mut();
        let date =
            response.headers().get("date").and_then(|date| DateTime::from_str(date, Format::HttpDate).ok());
        if let Some(at) = date.and_then(|date| date.to_millis().ok()).and_then(|at| u64::try_from(at).ok()) {
            self.server_unix_ms.store(at, Ordering::Relaxed);
        }
        let is_object = response.status().is_success()
            && config.load::<Metadata>().is_some_and(|metadata| metadata.name() == "GetObject");
        if !is_object {
            // The SDK reads the rest whole, however long a server makes it.
            let body = http_body_util::Limited::new(response.take_body(), ANSWER_BYTES_MAX);
            *response.body_mut() = SdkBody::from_body_1_x(body);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g19_an_etag_is_what_a_header_can_carry_and_no_list() {
        for (header, inner) in [("\"abc-2\"", "abc-2"), ("abc", "abc")] {
            assert_eq!(parse_etag(Some(header)).unwrap(), ETag(inner.into()));
        }
        let long = "x".repeat(ETAG_BYTES_MAX + 1);
        for bad in [
            None,
            Some(""),
            Some("\"\""),
            Some("*"),
            Some("\"a\", \"b\""),
            Some("W/\"a\""),
            Some("a\r\nb"),
            Some(&long),
        ] {
            assert!(parse_etag(bad).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_file_without_a_usable_certificate_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(matches!(read_certificates(&path).await, Err(S3OpenError::Ca { .. })), "no file");
        for text in [
            "",
            "hello",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "-----BEGIN CERTIFICATE-----\nA",
        ] {
            tokio::fs::write(&path, text).await.unwrap();
            assert!(matches!(read_certificates(&path).await, Err(S3OpenError::Ca { .. })), "{text}");
        }
    }
}
