//! TLS of the server: certificates from files, read again when they change.
//!
//! Owns: what keys and authorities are used, and that a connection begins with those that lie in the files now.
//! Does not own: when a client must use TLS ([`super::handshake`]), or who may reach which disk: a client certificate
//! that the authority signed opens all of them.

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;

/// A file with certificates or a key is not larger.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where keys and certificates are, all as PEM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    /// Certificate of the server, then those that lead from it to its authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Authorities; with them, clients without a certificate signed by one of them are turned away.
    pub client_ca: Option<PathBuf>,
}

/// Whether clients that connect by TCP may do without TLS. By the Unix socket they always may.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TlsDemand {
    Offered,
    Required,
}

/// TLS as a server has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsConfig {
    pub files: TlsFiles,
    pub demand: TlsDemand,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("failed to read {what} from {}: {source}", path.display())]
    Read { what: &'static str, path: PathBuf, source: io::Error },
    #[error("there is no {what} in {} (it must be PEM)", path.display())]
    Missing { what: &'static str, path: PathBuf },
    #[error("{what} in {} is of no use: {reason}", path.display())]
    Unusable { what: &'static str, path: PathBuf, reason: String },
    #[error("the key in {} is not that of the certificate in {}", key.display(), certificate.display())]
    Mismatch { key: PathBuf, certificate: PathBuf },
}

/// Certificates that are in use, and the files that they came from.
pub struct Tls {
    files: TlsFiles,
    current: ArcSwap<Loaded>,
    /// Held while files are looked at.
    turn: tokio::sync::Mutex<()>,
}

struct Loaded {
    stamps: Vec<Stamp>,
    config: Arc<ServerConfig>,
}

/// What changes when a file is replaced or written.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Stamp(Option<(u64, u64, i64, i64)>);

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// One of them is missing, is not what it should be, or does not belong to the others.
    pub async fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let loaded = load_off_thread(files.clone()).await?;
        Ok(Self { files, current: ArcSwap::from_pointee(loaded), turn: tokio::sync::Mutex::new(()) })
    }

    /// For one new connection: with what is in the files now, or, if that is of no use, with what was there before.
    pub async fn acceptor(&self) -> TlsAcceptor {
        let _turn = self.turn.lock().await;
        let files = self.files.clone();
        let now = tokio::task::spawn_blocking(move || stamps(&files)).await.ok();
        if now.is_some_and(|now| now != self.current.load().stamps) {
            match load_off_thread(self.files.clone()).await {
                Ok(loaded) => {
                    log::info!(
                        "NBD clients get the TLS certificate that was put into {}",
                        self.files.certificate.display()
                    );
                    self.current.store(Arc::new(loaded));
                }
                Err(error) => log::error!("new TLS files are not used, the old ones still are: {error}"),
            }
        }
        TlsAcceptor::from(self.current.load().config.clone())
    }
}

async fn load_off_thread(files: TlsFiles) -> Result<Loaded, TlsError> {
    let path = files.certificate.clone();
    match tokio::task::spawn_blocking(move || load(&files)).await {
        Ok(loaded) => loaded,
        Err(error) => Err(TlsError::Read { what: "certificates", path, source: io::Error::other(error) }),
    }
}

fn stamps(files: &TlsFiles) -> Vec<Stamp> {
    [Some(&files.certificate), Some(&files.key), files.client_ca.as_ref()]
        .into_iter()
        .flatten()
        .map(|path| {
            #[expect(clippy::disallowed_methods, reason = "on a thread that may block")]
            let found = std::fs::metadata(path).ok();
            Stamp(found.map(|found| (found.ino(), found.size(), found.mtime(), found.mtime_nsec())))
        })
        .collect()
}

fn load(files: &TlsFiles) -> Result<Loaded, TlsError> {
    // Before the content: what is written in between is seen as a change by the next connection.
    let stamps = stamps(files);
    let chain = certificates("a certificate", &files.certificate)?;
    let pem = read("a private key", &files.key)?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| TlsError::Missing { what: "private key", path: files.key.clone() })?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let unusable =
        |what, path: &Path, reason: String| TlsError::Unusable { what, path: path.to_owned(), reason };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("the certificate", &files.certificate, error.to_string()))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates("a certificate of an authority", path)? {
                roots
                    .add(authority)
                    .map_err(|error| unusable("a certificate of an authority", path, error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| unusable("a certificate of an authority", path, error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder.with_single_cert(chain, key).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::Mismatch { key: files.key.clone(), certificate: files.certificate.clone() }
        }
        error => unusable("the certificate or its key", &files.certificate, error.to_string()),
    })?;
    Ok(Loaded { stamps, config: Arc::new(config) })
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(what, path)?;
    let unusable = |reason: String| TlsError::Unusable { what, path: path.to_owned(), reason };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(error.to_string()))?;
    if found.is_empty() {
        Err(TlsError::Missing { what: "certificate", path: path.to_owned() })
    } else {
        Ok(found)
    }
}

#[expect(clippy::disallowed_methods, reason = "on a thread that may block")]
fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read as _;
    let failed = |source| TlsError::Read { what, path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB")));
    }
    Ok(bytes)
}
