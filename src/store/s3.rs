//! A pool in a bucket of an S3 server.
//!
//! Owns: [`S3Store`] and its settings; which part answers what.
//! Does not own: requests and their limits (`client`), reading (`read`), changes and what came of them (`change`,
//! `multipart`, `delete`), how an object ends (`trailer`), what is demanded of a server (`probe`).
//!
//! Names in the bucket are the pool's prefix and the key. Nothing is believed of a server: that it refuses a change whose
//! condition does not hold is tried before the first change, and every size, name, date and header is checked.

mod breaker;
mod change;
mod client;
mod delete;
mod fault;
mod multipart;
mod probe;
mod read;
mod trailer;

use super::{ETag, Expect, GetRange, Key, Object, ObjectStore, Page, StoreError};
use async_trait::async_trait;
use bytes::Bytes;
use change::ETagForm;
use client::{Client, Lane};
use delete::Deleter;
use fault::Fault;
use probe::{Found, Refusal};
use read::Tombstone;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::OnceCell;

/// Largest swapped object: it goes in one request, again and again.
const SWAPPED_BYTES_MAX: usize = 16 << 20;
/// Longest prefix of a pool.
const PREFIX_BYTES_MAX: usize = 256;
/// A deleted object is removed for good after this: longer than a request that is under way can be believed, which S3
/// limits to 15 minutes.
const TOMBSTONE_AGE_MS: u64 = 3_600_000;

/// Where a pool is: a bucket, and what all names in it begin with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    pub bucket: String,
    /// Empty, or ends with a slash.
    pub prefix: String,
}

impl Address {
    /// Of `s3://bucket/prefix`.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("s3://") else {
            return Err("write it like s3://bucket/prefix".to_owned());
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if !(3..=255).contains(&bucket.len()) || !bucket.bytes().all(good) {
            return Err(
                "the bucket's name has 3 to 255 letters, digits, dots, hyphens and underscores".to_owned()
            );
        }
        if prefix.is_empty() {
            return Ok(Self { bucket: bucket.to_owned(), prefix: String::new() });
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        if prefix.len() > PREFIX_BYTES_MAX || Key::new(prefix).is_none() {
            return Err(format!(
                "the prefix has at most {PREFIX_BYTES_MAX} letters, digits, dots, hyphens and underscores, in parts \
                 between slashes that do not begin with a dot"
            ));
        }
        Ok(Self { bucket: bucket.to_owned(), prefix: format!("{prefix}/") })
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

/// How a bucket is reached. Credentials come from where all AWS tools look: environment, files, the machine's role.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct S3Config {
    pub address: Address,
    /// URL of a server that is not Amazon's.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// The bucket in the path, not in the host's name. None: with an endpoint of one's own.
    pub path_style: Option<bool>,
    /// PEM file; only these authorities are trusted then, instead of the machine's.
    pub ca_file: Option<PathBuf>,
    /// How long a small request may take.
    pub answer_time: Duration,
    /// Reads under way at once; more wait for their turn.
    pub reads_max: usize,
    /// Changes under way at once.
    pub changes_max: usize,
}

impl S3Config {
    /// With all else as it is by default.
    pub fn new(address: Address) -> Self {
        Self {
            address,
            endpoint: None,
            region: None,
            path_style: None,
            ca_file: None,
            answer_time: Duration::from_secs(10),
            reads_max: 64,
            changes_max: 32,
        }
    }
}

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum S3OpenError {
    #[error("failed to use the certificates in {}: {message}", path.display())]
    Ca { path: PathBuf, message: String },
    #[error("failed to set up TLS: {0}")]
    Tls(String),
    #[error("no region is set: give one, or the endpoint of a server that needs none")]
    NoRegion,
    /// The server answers, and a pool would not be safe there.
    #[error("{0}")]
    Refused(String),
    /// It does not answer, or not with what could be judged.
    #[error("{0}")]
    Unavailable(String),
}

/// What is known of a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It has not answered all questions yet: nothing is changed there.
    Unproven,
    /// A pool is safe there; what an operator should know all the same.
    Proven { warnings: Vec<String> },
    /// It is not, and nothing is changed there.
    Refused(String),
}

/// An [`ObjectStore`] in a bucket. Clones are the same store.
#[derive(Clone, Debug)]
pub struct S3Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Arc<Client>,
    form: ETagForm,
    deleter: Arc<Deleter>,
    /// Once the server answered all questions.
    found: OnceCell<Result<Found, String>>,
    is_tidying: AtomicBool,
}

impl S3Store {
    /// A store that has asked nothing yet: it reads at once, and changes nothing before [`S3Store::prove`] succeeded.
    ///
    /// # Errors
    /// Settings that cannot be used.
    pub async fn new(config: &S3Config) -> Result<Self, S3OpenError> {
        let shared = Shared {
            client: Arc::new(Client::new(config).await?),
            form: ETagForm::default(),
            deleter: Arc::default(),
            found: OnceCell::new(),
            is_tidying: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Tries whether a pool is safe in this bucket, unless that is known. Leaves nothing behind.
    ///
    /// # Errors
    /// `Refused`: it is not. `Unavailable`: it cannot be told, later may work.
    pub async fn prove(&self) -> Result<(), S3OpenError> {
        self.found().await?.as_ref().map(drop).map_err(|reason| S3OpenError::Refused(reason.clone()))
    }

    /// What is known by now.
    pub fn standing(&self) -> Standing {
        match self.shared.found.get() {
            None => Standing::Unproven,
            Some(Ok(found)) => Standing::Proven { warnings: found.warnings.clone() },
            Some(Err(reason)) => Standing::Refused(reason.clone()),
        }
    }

    async fn found(&self) -> Result<&Result<Found, String>, S3OpenError> {
        let init = || async {
            let shared = Arc::clone(&self.shared);
            // On a task of its own: whoever asked may go away, and what was made has to be removed.
            let probe = tokio::spawn(async move { probe::run(&shared.client, &shared.form).await }).await;
            match probe {
                Ok(Ok(found)) => {
                    for warning in &found.warnings {
                        log::warn!("{}: {warning}", self.shared.client.address);
                    }
                    if !found.deletes_many {
                        self.shared.deleter.set_singly();
                    }
                    Ok(Ok(found))
                }
                Ok(Err(Refusal::Unsafe(reason))) => {
                    log::error!("nothing is changed in {}: {reason}", self.shared.client.address);
                    Ok(Err(reason))
                }
                Ok(Err(Refusal::Trouble(reason))) => Err(S3OpenError::Unavailable(reason)),
                Err(lost) => Err(S3OpenError::Unavailable(lost.to_string())),
            }
        };
        self.shared.found.get_or_try_init(init).await
    }

    /// What the server can do, before anything is changed there.
    async fn ready(&self, key: &Key) -> Result<&Found, StoreError> {
        match self.found().await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(reason)) => Err(StoreError::Invalid { key: key.clone(), reason: reason.clone() }),
            Err(error) => Err(StoreError::Unavailable { key: key.clone(), reason: error.to_string() }),
        }
    }

    /// Removes what was deleted long ago, if the server does that under a condition.
    fn tidy(&self, tombstones: Vec<Tombstone>) {
        let can = matches!(self.shared.found.get(), Some(Ok(found)) if found.deletes_if_match);
        let Some(now) = self.shared.client.server_unix_ms().filter(|_| can) else { return };
        let is_old = |one: &Tombstone| now.saturating_sub(one.unix_ms) > TOMBSTONE_AGE_MS;
        let old: Vec<Tombstone> = tombstones.into_iter().filter(is_old).collect();
        if old.is_empty() || self.shared.is_tidying.swap(true, Ordering::Relaxed) {
            return;
        }
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            for Tombstone { key, etag, .. } in old {
                let Some(etag) = etag else { continue };
                // Another try comes with another listing.
                if let Err(fault) = shared.delete_if(&key, &etag).await {
                    log::debug!("{key} was deleted and stays as a mark: {fault}");
                    break;
                }
            }
            shared.is_tidying.store(false, Ordering::Relaxed);
        });
    }
}

impl Shared {
    /// Removes an object if it is in that state.
    async fn delete_if(&self, key: &Key, etag: &ETag) -> Result<(), Fault> {
        let client = &self.client;
        let request = async {
            let request = client.sdk.delete_object().bucket(&client.address.bucket).key(client.name(key));
            request.if_match(self.form.of(etag)).send().await.map_err(Fault::of)
        };
        match client.ask(Lane::Change, 0, request).await {
            Ok(_) => Ok(()),
            Err(fault) if fault.is_condition() => Ok(()),
            Err(fault) => Err(fault),
        }
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        self.shared.client.get(key, range).await
    }

    async fn put_new(&self, key: &Key, bytes: Bytes) -> Result<(), StoreError> {
        let found = self.ready(key).await?;
        let Shared { client, form, .. } = &*self.shared;
        if bytes.len() >= multipart::PARTS_FROM_BYTES && found.parts_if_none {
            return client.put_new_in_parts(key, &bytes).await;
        }
        client.put_new(form, key, &bytes).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.ready(key).await?;
        self.shared.deleter.delete(&self.shared.client, key).await
    }

    async fn swap(&self, key: &Key, expect: Expect, bytes: Bytes) -> Result<ETag, StoreError> {
        if bytes.is_empty() || bytes.len() > SWAPPED_BYTES_MAX {
            let reason = format!("a swapped object has 1 to {SWAPPED_BYTES_MAX} bytes");
            return Err(StoreError::Invalid { key: key.clone(), reason });
        }
        self.ready(key).await?;
        self.shared.client.swap(&self.shared.form, key, &expect, &bytes).await
    }

    async fn swap_delete(&self, key: &Key, expect: ETag) -> Result<(), StoreError> {
        self.ready(key).await?;
        self.shared.client.swap_delete(&self.shared.form, key, expect).await
    }

    async fn list(&self, folder: &str, after: Option<&Key>, max: usize) -> Result<Page, StoreError> {
        let Some(folder) = Key::new(folder) else {
            let reason = "not a folder's name".into();
            return Err(StoreError::Invalid { key: Key(folder.chars().take(64).collect()), reason });
        };
        let (page, tombstones) = self.shared.client.list(&folder, after, max).await?;
        self.tidy(tombstones);
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g19_an_address_is_a_bucket_and_harmless_parts() {
        for (text, shown) in [
            ("s3://bucket", "s3://bucket/"),
            ("s3://bucket/", "s3://bucket/"),
            ("s3://my.bucket-1/a/b", "s3://my.bucket-1/a/b/"),
            ("s3://bucket/a/", "s3://bucket/a/"),
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "/srv/pool",
            "s3:/bucket",
            "s3://",
            "s3://b",
            "s3://a b c",
            "s3://bucket//",
            "s3://bucket/../x",
            "s3://bucket/a//b",
            "s3://bucket/.a",
            "s3://user@host/x",
            "s3://bucket/ä",
        ] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
        assert!(Address::parse(&format!("s3://bucket/{}", "x".repeat(257))).is_err());
    }
}
