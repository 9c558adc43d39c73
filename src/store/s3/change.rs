//! Changes under a condition, and what came of them.
//!
//! Owns: conditional PUTs of whole objects, settling those whose answer was lost, deleting by swap.
//! Does not own: uploads in parts ([`super::multipart`]).
//!
//! Every change carries a nonce of its own at the end of the object. Whatever the answer was, unless it said that the
//! change was made, the nonce that stands there decides:
//!
//! ```text
//! what stands there               fixed object      swapped object
//! mine                            made              made
//! what the condition asks for     send it again     send it again
//! anything else                   Conflict          Conflict; Unclear once an earlier try had no clear answer
//! ```
//! The last one is unclear because others may have built on a change that was made before it could be seen. Sending it
//! again is safe: of two copies of one conditional PUT, only one finds what it asks for. A fixed object never changes, so
//! another's nonce there means that this one never was.
//!
//! A swapped object is deleted by a swap, to a tombstone: a DELETE has no nonce, so a lost answer could not be settled, and
//! a PUT that comes late would find nothing there and bring the object back.

use super::breaker::Backoff;
use super::client::{Client, Lane, is_etag, parse_etag};
use super::fault::Fault;
use super::read::{Seen, TRY_TIME};
use super::trailer::{self, Nonce};
use crate::store::{ETag, Expect, Key, StoreError};
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::time::Instant;

/// What a PUT finds there, or does nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    Nothing,
    State(ETag),
}

/// How a server wants an `ETag` in a condition.
#[derive(Debug, Default)]
pub struct ETagForm {
    /// Without the quotes that HTTP has around it.
    bare: AtomicBool,
}

impl ETagForm {
    /// Changes what is sent from here on.
    pub fn set_bare(&self, bare: bool) {
        self.bare.store(bare, Ordering::Relaxed);
    }

    /// As it is sent.
    pub fn of(&self, etag: &ETag) -> String {
        if self.bare.load(Ordering::Relaxed) { etag.0.clone() } else { format!("\"{}\"", etag.0) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Fixed,
    Swapped,
}

impl Client {
    /// Makes or replaces a swapped object.
    pub async fn swap(
        &self,
        form: &ETagForm,
        key: &Key,
        expect: &Expect,
        content: &[u8],
    ) -> Result<ETag, StoreError> {
        let nonce = Nonce::random();
        let body = trailer::seal(content, nonce);
        self.settle(Kind::Swapped, key, expect, nonce, |condition| {
            self.put(form, key, condition, body.clone())
        })
        .await
    }

    /// Deletes a swapped object.
    pub async fn swap_delete(&self, form: &ETagForm, key: &Key, expect: ETag) -> Result<(), StoreError> {
        let nonce = Nonce::random();
        let body = trailer::tombstone(nonce);
        let expect = Expect::State(expect);
        self.settle(Kind::Swapped, key, &expect, nonce, |condition| {
            self.put(form, key, condition, body.clone())
        })
        .await
        .map(drop)
    }

    /// Makes a fixed object in one request.
    pub async fn put_new(&self, form: &ETagForm, key: &Key, content: &[u8]) -> Result<(), StoreError> {
        let nonce = Nonce::random();
        let body = trailer::seal(content, nonce);
        self.settle(Kind::Fixed, key, &Expect::Absent, nonce, |condition| {
            self.put(form, key, condition, body.clone())
        })
        .await
        .map(drop)
    }

    /// One conditional PUT.
    ///
    /// # Errors
    /// What it ended with.
    pub async fn put(
        &self,
        form: &ETagForm,
        key: &Key,
        condition: Condition,
        body: Bytes,
    ) -> Result<ETag, Fault> {
        let bytes = u64::try_from(body.len()).unwrap_or(u64::MAX);
        let request = async {
            let mut request = self
                .sdk
                .put_object()
                .bucket(&self.address.bucket)
                .key(self.name(key))
                .body(ByteStream::from(body));
            request = match &condition {
                Condition::Nothing => request.if_none_match("*"),
                Condition::State(etag) => request.if_match(form.of(etag)),
            };
            let answer = request.send().await.map_err(Fault::of)?;
            parse_etag(answer.e_tag())
        };
        self.ask(Lane::Change, bytes, request).await
    }

    /// Sends a change until it is known what came of it, or time is up.
    pub async fn settle<F>(
        &self,
        kind: Kind,
        key: &Key,
        expect: &Expect,
        nonce: Nonce,
        send: impl Fn(Condition) -> F,
    ) -> Result<ETag, StoreError>
    where
        F: Future<Output = Result<ETag, Fault>>,
    {
        let mut condition = match expect {
            Expect::Absent => Condition::Nothing,
            // No server gave this one, so nothing is in that state.
            Expect::State(etag) if !is_etag(&etag.0) => return Err(StoreError::Conflict(key.clone())),
            Expect::State(etag) => Condition::State(etag.clone()),
        };
        let end = Instant::now() + TRY_TIME;
        let mut backoff = Backoff::default();
        // Once set, only the sight of the nonce tells that it was made, and only that of the condition that it was not.
        let mut unclear: Option<String> = None;
        loop {
            let fault = match send(condition.clone()).await {
                Ok(etag) => return Ok(etag),
                Err(fault) => fault,
            };
            if fault.may_be_done() {
                unclear.get_or_insert_with(|| fault.to_string());
            }
            let must_look = fault.is_condition() || fault.may_be_done() || unclear.is_some();
            if !must_look {
                if fault.is_passing() && backoff.wait(end).await {
                    continue;
                }
                return Err(fault.nothing_done(key));
            }
            let seen = match self.look(key).await {
                Ok(seen) => seen,
                Err(error) => {
                    return Err(match unclear {
                        Some(reason) => StoreError::Unclear { key: key.clone(), reason },
                        None => error,
                    });
                }
            };
            let is_mine = |found: &Nonce| *found == nonce;
            let stands = match seen {
                Seen::Content(found, etag) | Seen::Deleted(found, etag) if is_mine(&found) => {
                    return Ok(etag);
                }
                Seen::Nothing => *expect == Expect::Absent && condition == Condition::Nothing,
                Seen::Deleted(_, etag) if *expect == Expect::Absent && kind == Kind::Swapped => {
                    let there = Condition::State(etag);
                    // What is deleted now may be what an earlier try had made.
                    let is_new = condition != there;
                    if is_new && unclear.is_none() {
                        condition = there;
                        continue;
                    }
                    !is_new
                }
                Seen::Deleted(_, etag) | Seen::Content(_, etag) => condition == Condition::State(etag),
            };
            if !stands {
                return Err(match unclear {
                    Some(reason) if kind == Kind::Swapped => StoreError::Unclear {
                        key: key.clone(),
                        reason: format!("{reason}; others went on meanwhile, perhaps from it"),
                    },
                    Some(_) | None => StoreError::Conflict(key.clone()),
                });
            }
            if !backoff.wait(end).await {
                return Err(match unclear {
                    Some(reason) => StoreError::Unclear { key: key.clone(), reason },
                    None => fault.nothing_done(key),
                });
            }
        }
    }
}
