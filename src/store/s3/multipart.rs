//! Objects too large for one request.
//!
//! Owns: uploads in parts, and that none is left behind by a process that lives.
//! Does not own: settling the last step, which makes the object ([`super::change`]).

use super::breaker::Backoff;
use super::change::{Condition, Kind};
use super::client::{Client, Lane};
use super::fault::Fault;
use super::read::TRY_TIME;
use super::trailer::{self, Nonce};
use crate::store::{ETag, Expect, Key, StoreError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use std::sync::Arc;
use tokio::time::Instant;

/// Objects from here on are uploaded in parts.
pub const PARTS_FROM_BYTES: usize = 64 << 20;
/// Size of each but the last: S3 takes 5 MiB at least, and ten thousand of them.
const PART_BYTES: usize = 16 << 20;
/// Parts under way at once.
const PARTS_AT_ONCE: usize = 4;
/// Most parts of one object, as S3 has it.
const PARTS_MAX: usize = 10_000;
/// Longest id of an upload that is believed.
const UPLOAD_ID_BYTES_MAX: usize = 4096;

impl Client {
    /// Makes a fixed object of any size. One that was not made leaves no parts.
    pub async fn put_new_in_parts(self: &Arc<Self>, key: &Key, content: &Bytes) -> Result<(), StoreError> {
        let nonce = Nonce::random();
        let parts = parts_of(content, nonce);
        if parts.len() > PARTS_MAX {
            let reason = format!("{} bytes are too many for one object", content.len());
            return Err(StoreError::Invalid { key: key.clone(), reason });
        }
        let upload = Upload::begin(self, key).await?;
        let sent = stream::iter(parts.into_iter().zip(1..))
            .map(|(part, number)| upload.send(number, part))
            .buffered(PARTS_AT_ONCE)
            .try_collect::<Vec<_>>()
            .await;
        let outcome = match sent {
            Ok(sent) => self
                .settle(Kind::Fixed, key, &Expect::Absent, nonce, |condition| {
                    upload.complete(condition, &sent)
                })
                .await
                .map(drop),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => upload.forget(),
            // Parts of an upload that may yet become the object stay.
            Err(StoreError::Unclear { .. }) => upload.forget(),
            Err(_) => upload.abort().await,
        }
        outcome
    }
}

/// `content` and its trailer, cut: slices of it, and the last one a copy.
fn parts_of(content: &Bytes, nonce: Nonce) -> Vec<Bytes> {
    let mut parts = Vec::with_capacity(content.len() / PART_BYTES + 1);
    let mut rest = content.clone();
    while rest.len() > PART_BYTES {
        parts.push(rest.split_to(PART_BYTES));
    }
    parts.push(trailer::seal(&rest, nonce));
    parts
}

/// An upload that has begun.
struct Upload {
    client: Arc<Client>,
    key: Key,
    id: String,
    is_over: bool,
}

impl Upload {
    async fn begin(client: &Arc<Client>, key: &Key) -> Result<Self, StoreError> {
        let end = Instant::now() + TRY_TIME;
        let mut backoff = Backoff::default();
        loop {
            let request = async {
                let request = client.sdk.create_multipart_upload();
                let request = request.bucket(&client.address.bucket).key(client.name(key));
                let id = request.send().await.map_err(Fault::of)?.upload_id.unwrap_or_default();
                if id.is_empty() || id.len() > UPLOAD_ID_BYTES_MAX {
                    return Err(Fault::Bad("the server gives an upload an id that is none".to_owned()));
                }
                Ok(id)
            };
            match client.ask(Lane::Change, 0, request).await {
                Ok(id) => {
                    return Ok(Self { client: Arc::clone(client), key: key.clone(), id, is_over: false });
                }
                Err(fault) if fault.is_passing() && backoff.wait(end).await => {}
                Err(fault) => return Err(fault.nothing_done(key)),
            }
        }
    }

    /// A part, as often as it takes: the last one sent counts, and all are the same.
    async fn send(&self, number: i32, part: Bytes) -> Result<CompletedPart, StoreError> {
        let bytes = u64::try_from(part.len()).unwrap_or(u64::MAX);
        let end = Instant::now() + TRY_TIME;
        let mut backoff = Backoff::default();
        loop {
            let client = &self.client;
            let request = async {
                let request =
                    client.sdk.upload_part().bucket(&client.address.bucket).key(client.name(&self.key));
                let request =
                    request.upload_id(&self.id).part_number(number).body(ByteStream::from(part.clone()));
                let answer = request.send().await.map_err(Fault::of)?;
                super::client::parse_etag(answer.e_tag())?;
                // As it came, quotes and all.
                Ok(answer.e_tag.unwrap_or_default())
            };
            match client.ask(Lane::Change, bytes, request).await {
                Ok(etag) => return Ok(CompletedPart::builder().part_number(number).e_tag(etag).build()),
                Err(fault) if fault.is_passing() && backoff.wait(end).await => {}
                Err(fault) => return Err(fault.nothing_done(&self.key)),
            }
        }
    }

    async fn complete(&self, condition: Condition, parts: &[CompletedPart]) -> Result<ETag, Fault> {
        let client = &self.client;
        let request = async {
            debug_assert_eq!(condition, Condition::Nothing, "a fixed object is made where there is none");
            let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
            let request = client.sdk.complete_multipart_upload().bucket(&client.address.bucket);
            let request = request.key(client.name(&self.key)).upload_id(&self.id).multipart_upload(parts);
            let answer = request.if_none_match("*").send().await.map_err(Fault::of)?;
            super::client::parse_etag(answer.e_tag())
        };
        match client.ask(Lane::Change, 64 << 20, request).await {
            // Over, by an earlier try or by someone who cleaned up: what stands there tells.
            Err(Fault::Refused { status: 404, code, message }) if code == "NoSuchUpload" => {
                Err(Fault::Lost(format!("the upload is over: {message}")))
            }
            other => other,
        }
    }

    fn forget(mut self) {
        self.is_over = true;
    }

    async fn abort(mut self) {
        self.is_over = true;
        abort(&self.client, &self.key, &self.id).await;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Whoever asked for it went away.
        if !self.is_over
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (client, key, id) =
                (Arc::clone(&self.client), self.key.clone(), std::mem::take(&mut self.id));
            runtime.spawn(async move { abort(&client, &key, &id).await });
        }
    }
}

async fn abort(client: &Client, key: &Key, id: &str) {
    let end = Instant::now() + TRY_TIME;
    let mut backoff = Backoff::default();
    loop {
        let request = async {
            let request = client.sdk.abort_multipart_upload().bucket(&client.address.bucket);
            request.key(client.name(key)).upload_id(id).send().await.map_err(Fault::of)
        };
        match client.ask(Lane::Change, 0, request).await {
            Ok(_) | Err(Fault::Refused { status: 404, .. }) => return,
            Err(fault) if fault.is_passing() && backoff.wait(end).await => {}
            Err(fault) => {
                log::warn!("parts of {key} stay in the bucket until they are swept: {fault}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_content_and_its_trailer_and_none_is_too_small() {
        for len in [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 2 * PART_BYTES + 5] {
            let content = Bytes::from(vec![7; len]);
            let nonce = Nonce::random();
            let parts = parts_of(&content, nonce);
            assert_eq!(parts.concat(), trailer::seal(&content, nonce));
            let (_, all_but_last) = parts.split_last().unwrap();
            assert!(all_but_last.iter().all(|part| part.len() == PART_BYTES));
        }
    }
}
