//! Removing fixed objects, many in one request.
//!
//! Owns: gathering deletes that are asked for at the same time.
//! Does not own: what may be deleted.

use super::breaker::Backoff;
use super::client::{Client, Lane};
use super::fault::{Fault, harmless};
use super::read::TRY_TIME;
use crate::store::{Key, StoreError};
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

/// Keys in one request, as S3 has it.
const BATCH_MAX: usize = 1000;
/// Requests under way at once; what is asked for meanwhile gathers for the next one.
const BATCHES_AT_ONCE: usize = 2;

/// Deletes that wait for a request to take them along.
#[derive(Debug)]
pub struct Deleter {
    waiting: Mutex<Vec<Waiting>>,
    turns: Semaphore,
    /// The server does not know such requests.
    singly: AtomicBool,
}

#[derive(Debug)]
struct Waiting {
    key: Key,
    done: oneshot::Sender<Result<(), Fault>>,
}

impl Default for Deleter {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            turns: Semaphore::new(BATCHES_AT_ONCE),
            singly: AtomicBool::new(false),
        }
    }
}

impl Deleter {
    /// From here on each has a request of its own.
    pub fn set_singly(&self) {
        self.singly.store(true, Ordering::Relaxed);
    }

    /// As [`crate::store::ObjectStore::delete`].
    pub async fn delete(self: &Arc<Self>, client: &Arc<Client>, key: &Key) -> Result<(), StoreError> {
        let end = Instant::now() + TRY_TIME;
        let mut backoff = Backoff::default();
        let mut is_unclear = false;
        loop {
            let fault = match self.once(client, key).await {
                Ok(()) => return Ok(()),
                Err(fault) => fault,
            };
            is_unclear |= fault.may_be_done();
            if fault.is_passing() && backoff.wait(end).await {
                continue;
            }
            let reason = fault.to_string();
            return Err(match fault.nothing_done(key) {
                StoreError::Unavailable { key, .. } if is_unclear => StoreError::Unclear { key, reason },
                error => error,
            });
        }
    }

    async fn once(self: &Arc<Self>, client: &Arc<Client>, key: &Key) -> Result<(), Fault> {
        let (done, answer) = oneshot::channel();
        self.waiting.lock().push(Waiting { key: key.clone(), done });
        let (deleter, client) = (Arc::clone(self), Arc::clone(client));
        // On a task of its own: whoever drives a request may go away, and others wait for it.
        tokio::spawn(async move { deleter.take_turn(&client).await });
        answer.await.unwrap_or_else(|_| Err(Fault::Lost("the request was given up".to_owned())))
    }

    async fn take_turn(&self, client: &Client) {
        let turn = self.turns.acquire().await;
        let batch = {
            let mut waiting = self.waiting.lock();
            let count = if self.singly.load(Ordering::Relaxed) { 1 } else { BATCH_MAX };
            let count = waiting.len().min(count);
            let rest = waiting.split_off(count);
            std::mem::replace(&mut *waiting, rest)
        };
        if let [_] = &batch[..] {
            for one in batch {
                let outcome = delete_one(client, &one.key).await;
                one.answer(outcome);
            }
        } else if !batch.is_empty() {
            self.delete_all(client, batch).await;
        }
        drop(turn);
    }

    async fn delete_all(&self, client: &Client, batch: Vec<Waiting>) {
        let names: Vec<String> = batch.iter().map(|one| client.name(&one.key)).collect();
        match delete_many(client, &names).await {
            Ok(mut refused) => {
                for (one, name) in batch.into_iter().zip(&names) {
                    one.answer(refused.remove(name).map_or(Ok(()), Err));
                }
            }
            Err(fault) => batch.into_iter().for_each(|one| one.answer(Err(fault.clone()))),
        }
    }
}

impl Waiting {
    fn answer(self, outcome: Result<(), Fault>) {
        // Whoever asked may have gone away.
        let _gone = self.done.send(outcome).is_err();
    }
}

/// Deletes one object; one that is gone is fine.
pub async fn delete_one(client: &Client, key: &Key) -> Result<(), Fault> {
    let request = async {
        let request = client.sdk.delete_object().bucket(&client.address.bucket).key(client.name(key));
        request.send().await.map_err(Fault::of)
    };
    match client.ask(Lane::Change, 0, request).await {
        Ok(_) => Ok(()),
        Err(fault) if fault.is_missing() => Ok(()),
        Err(fault) => Err(fault),
    }
}

/// Deletes objects by their names in the bucket; answers which were not.
pub async fn delete_many(client: &Client, names: &[String]) -> Result<HashMap<String, Fault>, Fault> {
    let request = async {
        let objects = names.iter().map(|name| ObjectIdentifier::builder().key(name).build());
        let objects = objects.collect::<Result<Vec<_>, _>>();
        let delete = objects.and_then(|objects| Delete::builder().set_objects(Some(objects)).build());
        let delete = delete.map_err(|error| Fault::NotSent(error.to_string()))?;
        // Not quiet: a server that skips some says so by not naming them.
        let request = client.sdk.delete_objects().bucket(&client.address.bucket).delete(delete);
        request.send().await.map_err(Fault::of)
    };
    let answer = client.ask(Lane::Change, 0, request).await?;
    let deleted: Vec<String> =
        answer.deleted.unwrap_or_default().into_iter().filter_map(|one| one.key).collect();
    let mut refused: HashMap<String, Fault> = names
        .iter()
        .map(|name| (name.clone(), Fault::Lost("the server does not say whether it was deleted".to_owned())))
        .collect();
    for name in &deleted {
        refused.remove(name);
    }
    for error in answer.errors.unwrap_or_default() {
        let (Some(name), code) = (error.key, harmless(&error.code.unwrap_or_default())) else { continue };
        let Some(fault) = refused.get_mut(&name) else { continue };
        if code == "NoSuchKey" {
            refused.remove(&name);
            continue;
        }
        let status = if matches!(code.as_str(), "InternalError" | "SlowDown" | "ServiceUnavailable") {
            503
        } else {
            403
        };
        *fault = Fault::Refused { status, code, message: harmless(&error.message.unwrap_or_default()) };
    }
    Ok(refused)
}
