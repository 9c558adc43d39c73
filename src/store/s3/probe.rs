//! What is demanded of a server before anything is entrusted to it.
//!
//! Owns: the questions, which answers are refused, and that nothing of it stays in the bucket.
//! Does not own: when they are asked.
//!
//! Several servers take a conditional PUT, ignore its condition and overwrite what is there: two nodes would both own a
//! volume, and one's writes be gone. Only trying tells.

use super::breaker::Backoff;
use super::change::{Condition, ETagForm};
use super::client::{Client, Lane};
use super::delete::{delete_many, delete_one};
use super::fault::Fault;
use super::read::Seen;
use super::trailer::{self, Nonce};
use crate::clock::Clock;
use crate::store::{ETag, GetRange, Key, StoreError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{BucketVersioningStatus, CompletedMultipartUpload, CompletedPart, ObjectLockEnabled};
use std::time::Duration;
use tokio::time::Instant;

/// Writers that race for one object.
const RACERS: usize = 8;
/// How long all of it may take.
const PROBE_TIME: Duration = Duration::from_secs(30);
/// What a probe that was killed left behind is removed by the next one after this.
const LEFT_BEHIND_MS: u64 = 24 * 3_600_000;
/// Where probes write.
const FOLDER: &str = "tmp";
/// How far this machine's clock may be from the server's before it is told.
const SKEW_MS: u64 = 5 * 60_000;

/// What a server can do beyond what it must.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// An upload in parts does not replace what is there.
    pub parts_if_none: bool,
    /// A DELETE respects a condition.
    pub deletes_if_match: bool,
    /// Many objects are deleted in one request.
    pub deletes_many: bool,
    /// For an operator.
    pub warnings: Vec<String>,
}

/// Why a server is not used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Its answers are wrong.
    Unsafe(String),
    /// It did not answer all that was asked.
    Trouble(String),
}

enum Stop {
    Unsafe(String),
    Trouble(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        match &fault {
            // What cannot be understood is no trouble that passes.
            Fault::Bad(reason) => Self::Unsafe(reason.clone()),
            Fault::Refused { status: 501, .. } => Self::Unsafe(fault.to_string()),
            _ => Self::Trouble(fault),
        }
    }
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Invalid { reason, .. } => Self::Unsafe(reason),
            other => Self::Trouble(Fault::Lost(other.to_string())),
        }
    }
}

/// Asks all questions.
pub async fn run(client: &Client, form: &ETagForm) -> Result<Found, Refusal> {
    let probe = Probe { client, form, end: Instant::now() + PROBE_TIME };
    match all(&probe).await {
        Err(Refusal::Unsafe(reason)) if probe.keeps_versions().await => Err(Refusal::Unsafe(format!(
            "{reason}; or try a bucket that does not keep versions: some servers keep conditions only there"
        ))),
        other => other,
    }
}

async fn all(probe: &Probe<'_>) -> Result<Found, Refusal> {
    // The first answer shows whether there is a bucket at all, and that these credentials may write.
    let conditions = probe.step(Question::Conditions).await;
    if let Err(Refusal::Unsafe(quoted)) = conditions {
        // Some honour a condition only if it comes without the quotes.
        probe.form.set_bare(true);
        probe.step(Question::Conditions).await.map_err(|second| match second {
            Refusal::Unsafe(_) => Refusal::Unsafe(quoted),
            trouble @ Refusal::Trouble(_) => trouble,
        })?;
    } else {
        conditions?;
    }
    probe.step(Question::Races).await?;
    probe.step(Question::Reads).await?;
    let Answer(parts_if_none, _) = probe.step(Question::Parts).await?;
    let Answer(deletes_if_match, deletes_many) = probe.step(Question::Deletes).await?;
    let warnings = probe.warnings().await;
    probe.sweep().await;
    Ok(Found { parts_if_none, deletes_if_match, deletes_many, warnings })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Question {
    Conditions,
    Races,
    Reads,
    Parts,
    Deletes,
}

/// What is only of use, where a question has such answers.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Answer(bool, bool);

struct Probe<'a> {
    client: &'a Client,
    form: &'a ETagForm,
    end: Instant,
}

impl Probe<'_> {
    /// Runs one question with a key of its own, again with another one after trouble, and removes what it made.
    async fn step(&self, question: Question) -> Result<Answer, Refusal> {
        let mut backoff = Backoff::default();
        loop {
            let key = Key(format!("{FOLDER}/s3-probe-{}", Nonce::random()));
            let answer = self.ask(question, &key).await;
            self.remove(&key).await;
            match answer {
                Ok(answer) => return Ok(answer),
                Err(Stop::Unsafe(reason)) => {
                    return Err(Refusal::Unsafe(format!(
                        "this server cannot hold a pool: {reason}; use one that honours If-None-Match and If-Match on \
                         PUT, such as Amazon S3 or Ceph RGW on RADOS"
                    )));
                }
                Err(Stop::Trouble(fault)) => {
                    if !(fault.is_passing() && backoff.wait(self.end).await) {
                        return Err(Refusal::Trouble(fault.to_string()));
                    }
                }
            }
        }
    }

    async fn ask(&self, question: Question, key: &Key) -> Result<Answer, Stop> {
        match question {
            Question::Conditions => self.conditions(key).await.map(|()| Answer::default()),
            Question::Races => self.races(key).await.map(|()| Answer::default()),
            Question::Reads => self.reads(key).await.map(|()| Answer::default()),
            Question::Parts => self.parts(key).await.map(|respected| Answer(respected, false)),
            Question::Deletes => self.deletes(key).await.map(|(respected, many)| Answer(respected, many)),
        }
    }

    async fn remove(&self, key: &Key) {
        let mut backoff = Backoff::default();
        while let Err(fault) = delete_one(self.client, key).await {
            if !(fault.is_passing() && backoff.wait(self.end).await) {
                log::debug!("{key} of a probe stays for a day: {fault}");
                return;
            }
        }
    }

    /// One PUT. `None`: its condition did not hold.
    async fn put(&self, key: &Key, condition: Condition, nonce: Nonce) -> Result<Option<ETag>, Stop> {
        let body = trailer::seal(b"What is here is removed within a day.", nonce);
        match self.client.put(self.form, key, condition, body).await {
            Ok(etag) => Ok(Some(etag)),
            Err(fault) if fault.is_condition() => Ok(None),
            Err(Fault::Refused { status: status @ (400 | 501), code, .. }) if code != "RequestTimeout" => {
                let reason = format!("it does not know conditional PUTs ({status} {code})");
                Err(Stop::Unsafe(reason))
            }
            Err(fault) => Err(fault.into()),
        }
    }

    async fn expect(&self, key: &Key, nonce: Nonce, etag: &ETag) -> Result<(), Stop> {
        match self.client.look(key).await? {
            Seen::Content(found, there) if found == nonce && there == *etag => Ok(()),
            Seen::Content(found, _) if found == nonce => {
                Err(Stop::Unsafe("a GET gives another ETag than the PUT before it".to_owned()))
            }
            Seen::Content(..) | Seen::Deleted(..) | Seen::Nothing => {
                Err(Stop::Unsafe("a GET does not give what was just written".to_owned()))
            }
        }
    }

    async fn conditions(&self, key: &Key) -> Result<(), Stop> {
        let bad = |reason: &str| Err(Stop::Unsafe(reason.to_owned()));
        let (first, second) = (Nonce::random(), Nonce::random());
        let Some(made) = self.put(key, Condition::Nothing, first).await? else {
            return bad("it refuses a PUT with If-None-Match: * where nothing is");
        };
        if self.put(key, Condition::Nothing, Nonce::random()).await?.is_some() {
            return bad("it overwrites what is there although If-None-Match: * forbids it");
        }
        self.expect(key, first, &made).await?;
        let Some(swapped) = self.put(key, Condition::State(made.clone()), second).await? else {
            return bad("it refuses a PUT with If-Match of the very object that is there");
        };
        if swapped == made {
            return bad("it gives two contents the same ETag");
        }
        if self.put(key, Condition::State(made), Nonce::random()).await?.is_some() {
            return bad("it overwrites what is there although If-Match names another state");
        }
        self.expect(key, second, &swapped).await
    }

    /// Some check a condition and write later, with nothing in between to keep another one out.
    async fn races(&self, key: &Key) -> Result<(), Stop> {
        let made = self.race(key, Condition::Nothing).await?;
        self.race(key, Condition::State(made)).await.map(drop)
    }

    async fn race(&self, key: &Key, condition: Condition) -> Result<ETag, Stop> {
        let racers = (0..RACERS).map(|_| self.put(key, condition.clone(), Nonce::random()));
        let (mut winners, mut trouble) = (Vec::new(), None);
        for outcome in futures::future::join_all(racers).await {
            match outcome {
                Ok(Some(etag)) => winners.push(etag),
                Ok(None) => {}
                Err(stop) => trouble = Some(stop),
            }
        }
        if winners.len() > 1 {
            let reason = format!("{} of {RACERS} PUTs at once under one condition succeed", winners.len());
            return Err(Stop::Unsafe(reason));
        }
        match (trouble, winners.pop()) {
            (Some(stop), _) => Err(stop),
            (None, Some(etag)) => Ok(etag),
            (None, None) => Err(Stop::Trouble(Fault::Lost("no PUT of a race succeeds".to_owned()))),
        }
    }

    async fn reads(&self, key: &Key) -> Result<(), Stop> {
        let bad = |reason: &str| Err(Stop::Unsafe(reason.to_owned()));
        let content = b"0123456789";
        let body = trailer::seal(content, Nonce::random());
        let etag = self.client.put(self.form, key, Condition::Nothing, body).await?;
        for (range, wanted) in [
            (GetRange::Whole { max_bytes: 10 }, &content[..]),
            (GetRange::Span { start: 3, len: 4 }, &content[3..7]),
            (GetRange::Suffix { len: 2 }, &content[8..]),
            (GetRange::Suffix { len: 1 << 20 }, content),
        ] {
            let object = self.client.get(key, range).await?;
            if object.bytes != wanted || object.etag != etag || object.object_bytes != 10 {
                return bad("a range of an object is not that part of it");
            }
        }
        let before = Key(format!("{FOLDER}/s3-probe"));
        let (page, _) = self.client.list(&Key(FOLDER.to_owned()), Some(&before), 10_000).await?;
        let Some(listed) = page.objects.iter().find(|listed| listed.key == *key) else {
            return bad("a listing does not have what was just written");
        };
        if listed.object_bytes != 10 {
            return bad("a listing has another size than the object");
        }
        if self.client.server_unix_ms().is_some_and(|now| now.abs_diff(listed.modified_unix_ms) > SKEW_MS) {
            return bad("a listing does not date what was just written to now");
        }
        Ok(())
    }

    /// Whether an upload in parts respects what is there.
    async fn parts(&self, key: &Key) -> Result<bool, Stop> {
        let client = self.client;
        let nonce = Nonce::random();
        let Some(etag) = self.put(key, Condition::Nothing, nonce).await? else {
            return Err(Stop::Trouble(Fault::Lost("a new name is taken".to_owned())));
        };
        let (bucket, name) = (&client.address.bucket, client.name(key));
        let begin = async {
            client.sdk.create_multipart_upload().bucket(bucket).key(&name).send().await.map_err(Fault::of)
        };
        let id = match client.ask(Lane::Change, 0, begin).await {
            Ok(begun) => begun.upload_id.unwrap_or_default(),
            Err(fault) if fault.is_outage() => return Err(fault.into()),
            // It has none; then objects go in one request.
            Err(_) => return Ok(false),
        };
        let finish = async {
            let body = ByteStream::from(trailer::seal(b"", Nonce::random()));
            let part =
                client.sdk.upload_part().bucket(bucket).key(&name).upload_id(&id).part_number(1).body(body);
            let sent = part.send().await.map_err(Fault::of)?.e_tag.unwrap_or_default();
            let part = CompletedPart::builder().part_number(1).e_tag(sent).build();
            let parts = CompletedMultipartUpload::builder().parts(part).build();
            let request = client.sdk.complete_multipart_upload().bucket(bucket).key(&name).upload_id(&id);
            request.multipart_upload(parts).if_none_match("*").send().await.map_err(Fault::of)
        };
        let finished = client.ask(Lane::Change, 0, finish).await;
        let abort = async {
            client
                .sdk
                .abort_multipart_upload()
                .bucket(bucket)
                .key(&name)
                .upload_id(&id)
                .send()
                .await
                .map_err(Fault::of)
        };
        // Gone with the object if it was made; else the sweep of a later probe finds it.
        if let Err(fault) = client.ask(Lane::Change, 0, abort).await {
            log::debug!("an upload of a probe may stay for a day: {fault}");
        }
        match finished {
            Ok(_) => Ok(false),
            Err(fault) if fault.is_outage() => Err(fault.into()),
            Err(fault) => {
                self.expect(key, nonce, &etag).await?;
                Ok(fault.is_condition())
            }
        }
    }

    /// Whether deletes respect a condition, and whether many go in one request.
    async fn deletes(&self, key: &Key) -> Result<(bool, bool), Stop> {
        let client = self.client;
        let nonce = Nonce::random();
        let Some(etag) = self.put(key, Condition::Nothing, nonce).await? else {
            return Err(Stop::Trouble(Fault::Lost("a new name is taken".to_owned())));
        };
        let Some(newer) = self.put(key, Condition::State(etag.clone()), Nonce::random()).await? else {
            return Err(Stop::Trouble(Fault::Lost("another one writes to a probe's name".to_owned())));
        };
        let respects = match self.delete_if(key, &etag).await {
            Err(fault) if fault.is_outage() => return Err(fault.into()),
            Err(fault) => fault.is_condition() && client.look(key).await? != Seen::Nothing,
            Ok(_) => false,
        };
        let respects =
            respects && self.delete_if(key, &newer).await.is_ok() && client.look(key).await? == Seen::Nothing;
        self.put(key, Condition::Nothing, nonce).await?;
        let names = [client.name(key), format!("{}-absent", client.name(key))];
        let many = match delete_many(client, &names).await {
            Err(fault) if fault.is_outage() => return Err(fault.into()),
            Err(_) => false,
            Ok(refused) => refused.is_empty() && client.look(key).await? == Seen::Nothing,
        };
        delete_one(client, key).await?;
        if client.look(key).await? != Seen::Nothing {
            return Err(Stop::Unsafe("an object is still there after its DELETE".to_owned()));
        }
        Ok((respects, many))
    }

    async fn delete_if(&self, key: &Key, etag: &ETag) -> Result<(), Fault> {
        let client = self.client;
        let request = async {
            let request = client.sdk.delete_object().bucket(&client.address.bucket).key(client.name(key));
            request.if_match(self.form.of(etag)).send().await.map_err(Fault::of)
        };
        client.ask(Lane::Change, 0, request).await.map(drop)
    }

    async fn keeps_versions(&self) -> bool {
        let client = self.client;
        let request = async {
            let request = client.sdk.get_bucket_versioning().bucket(&client.address.bucket);
            request.send().await.map_err(Fault::of)
        };
        match client.ask(Lane::Read, 0, request).await {
            Ok(answer) => answer.status() == Some(&BucketVersioningStatus::Enabled),
            Err(fault) => {
                log::debug!("cannot tell whether the bucket keeps versions: {fault}");
                false
            }
        }
    }

    async fn warnings(&self) -> Vec<String> {
        let client = self.client;
        let bucket = &client.address.bucket;
        let mut warnings = Vec::new();
        if self.keeps_versions().await {
            warnings.push(
                "the bucket keeps old versions: deleting frees nothing, and every commit leaves one; turn versioning \
                 off, or let a lifecycle rule expire noncurrent versions"
                    .to_owned(),
            );
        }
        let lock = async {
            client.sdk.get_object_lock_configuration().bucket(bucket).send().await.map_err(Fault::of)
        };
        match client.ask(Lane::Read, 0, lock).await {
            Ok(answer) => {
                let enabled = answer.object_lock_configuration().and_then(|lock| lock.object_lock_enabled());
                if enabled == Some(&ObjectLockEnabled::Enabled) {
                    warnings.push(
                        "the bucket has object lock: what is deleted stays until its retention ends; use a bucket \
                         without it"
                            .to_owned(),
                    );
                }
            }
            Err(fault) => log::debug!("cannot tell whether the bucket locks objects: {fault}"),
        }
        match client.server_unix_ms() {
            None => warnings
                .push("the server does not date its answers: marks of deleted objects stay".to_owned()),
            Some(server) => {
                let skew = server.abs_diff(Clock::System.wall().0);
                if skew > SKEW_MS {
                    warnings.push(format!(
                        "this machine's clock and the server's are {} s apart: start a time service",
                        skew / 1000
                    ));
                }
            }
        }
        warnings
    }

    /// Removes what processes that died left: objects of probes, and parts of uploads that nobody finished.
    async fn sweep(&self) {
        let client = self.client;
        let Some(now) = client.server_unix_ms() else { return };
        let is_old = |at: u64| now.saturating_sub(at) > LEFT_BEHIND_MS;
        if let Ok((page, _)) = client.list(&Key(FOLDER.to_owned()), None, 1000).await {
            for listed in page.objects {
                let name = listed.key.as_str();
                let is_probe = name.starts_with("tmp/s3-probe-") || name.starts_with("tmp/probe-");
                if is_probe && is_old(listed.modified_unix_ms) {
                    self.remove(&listed.key).await;
                }
            }
        }
        let bucket = &client.address.bucket;
        let prefix = &client.address.prefix;
        let uploads = async {
            let request = client.sdk.list_multipart_uploads().bucket(bucket).prefix(prefix);
            request.send().await.map_err(Fault::of)
        };
        let Ok(found) = client.ask(Lane::Read, 0, uploads).await else { return };
        for upload in found.uploads.unwrap_or_default() {
            let at =
                upload.initiated.and_then(|at| at.to_millis().ok()).and_then(|at| u64::try_from(at).ok());
            let (Some(name), Some(id), Some(at)) = (upload.key, upload.upload_id, at) else { continue };
            if name.strip_prefix(prefix.as_str()).and_then(Key::new).is_none() || !is_old(at) {
                continue;
            }
            let abort = async {
                let request = client.sdk.abort_multipart_upload().bucket(bucket).key(&name).upload_id(&id);
                request.send().await.map_err(Fault::of)
            };
            match client.ask(Lane::Change, 0, abort).await {
                Ok(_) => log::info!("removed the parts of an upload that nobody finished: {name:?}"),
                Err(fault) => log::debug!("parts of {name:?} stay: {fault}"),
            }
        }
    }
}
