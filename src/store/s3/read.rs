//! Reading objects, and listing them.
//!
//! Owns: ranges, trailers, pages, and the checks of everything that a server says about them.
//! Does not own: changes.

use super::breaker::Backoff;
use super::client::{Client, Lane, parse_etag};
use super::fault::Fault;
use super::trailer::{self, DELETED_BYTES, End, Nonce, TRAILER_BYTES, TRAILER_LEN};
use crate::geometry::len_of;
use crate::store::{ETag, GetRange, Key, Listed, Object, Page, StoreError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::EncodingType;
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use tokio::time::Instant;

/// Most bytes that one request brings.
pub const READ_BYTES_MAX: u64 = 1 << 30;
/// Names in one answer of a listing, as S3 has it.
const PAGE_MAX: usize = 1000;
/// Largest number that every server takes in a range.
const OFFSET_MAX: u64 = 1 << 53;
/// How long one operation tries again.
pub const TRY_TIME: Duration = Duration::from_secs(15);

/// What is stored under a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Seen {
    Nothing,
    Deleted(Nonce, ETag),
    Content(Nonce, ETag),
}

/// Bytes of an answer, and what they are of.
struct Part {
    bytes: Bytes,
    start: u64,
    stored_bytes: u64,
    etag: ETag,
}

/// What to ask a server for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Want {
    /// All, if it is at most that.
    All(u64),
    /// From there to there, the last one included.
    FromTo(u64, u64),
    Last(u64),
}

impl Client {
    /// As [`crate::store::ObjectStore::get`].
    pub async fn get(&self, key: &Key, range: GetRange) -> Result<Object, StoreError> {
        let invalid = |reason: String| StoreError::Invalid { key: key.clone(), reason };
        let (want, span) = match range {
            GetRange::Whole { max_bytes } => (Want::All(max_bytes.saturating_add(TRAILER_BYTES)), None),
            GetRange::Span { start, len } => match start.checked_add(len.max(1)) {
                // A byte of the trailer tells the size where none of the content is asked for.
                Some(end) if end <= OFFSET_MAX => (Want::FromTo(start, end - 1), Some((start, len))),
                _ => (Want::Last(TRAILER_BYTES), Some((start, len))),
            },
            GetRange::Suffix { len } => (Want::Last(len.min(OFFSET_MAX) + TRAILER_BYTES), None),
        };
        let part = self.read(key, want).await?;
        let Some(object_bytes) = trailer::content_bytes(part.stored_bytes) else {
            return Err(match part.stored_bytes {
                DELETED_BYTES => StoreError::NotFound(key.clone()),
                size => invalid(format!("{size} bytes: not an object of this pool")),
            });
        };
        let Part { mut bytes, start, stored_bytes, etag } = part;
        match span {
            Some((from, len)) if from.checked_add(len).is_none_or(|end| end > object_bytes) => {
                return Err(invalid(format!("{object_bytes} bytes, too few for {len} from {from}")));
            }
            // Asked again for its end only, because it was shorter a moment ago.
            Some((from, len)) if len > 0 && start != from => {
                let reason = "the object changes while it is read".to_owned();
                return Err(StoreError::Unavailable { key: key.clone(), reason });
            }
            Some((_, len)) => bytes.truncate(len_of(len)),
            None => {
                if trailer::parse(&bytes, stored_bytes).is_none() {
                    return Err(invalid("its end is not of this pool".to_owned()));
                }
                bytes.truncate(bytes.len() - TRAILER_LEN);
            }
        }
        Ok(Object { bytes, object_bytes, etag })
    }

    /// Whose write stands under `key`.
    ///
    /// # Errors
    /// As `get`.
    pub async fn look(&self, key: &Key) -> Result<Seen, StoreError> {
        match self.read(key, Want::Last(TRAILER_BYTES)).await {
            Err(StoreError::NotFound(_)) => Ok(Seen::Nothing),
            Err(error) => Err(error),
            Ok(part) => match trailer::parse(&part.bytes, part.stored_bytes) {
                Some(End::Content(nonce)) => Ok(Seen::Content(nonce, part.etag)),
                Some(End::Deleted(nonce)) => Ok(Seen::Deleted(nonce, part.etag)),
                None => {
                    let reason = "its end is not of this pool".to_owned();
                    Err(StoreError::Invalid { key: key.clone(), reason })
                }
            },
        }
    }

    async fn read(&self, key: &Key, want: Want) -> Result<Part, StoreError> {
        let end = Instant::now() + TRY_TIME;
        let mut backoff = Backoff::default();
        loop {
            // How long it may take is known with the length of the answer.
            match self.ask(Lane::Read, READ_BYTES_MAX, self.read_once(key, want)).await {
                Ok(part) => return Ok(part),
                Err(Fault::Refused { status: 416, .. }) => {
                    // It ends before: how large it is, or whether it was deleted, its end tells.
                    match want {
                        Want::FromTo(..) => return Box::pin(self.read(key, Want::Last(TRAILER_BYTES))).await,
                        Want::All(_) | Want::Last(_) => {
                            let reason = "0 bytes: not an object of this pool".to_owned();
                            return Err(StoreError::Invalid { key: key.clone(), reason });
                        }
                    }
                }
                Err(fault) if fault.is_missing() => return Err(StoreError::NotFound(key.clone())),
                Err(fault) if fault.is_passing() && backoff.wait(end).await => {}
                Err(fault) => return Err(fault.nothing_done(key)),
            }
        }
    }

    async fn read_once(&self, key: &Key, want: Want) -> Result<Part, Fault> {
        let range = match want {
            Want::All(_) => None,
            Want::FromTo(start, last) => Some(format!("bytes={start}-{last}")),
            Want::Last(len) => Some(format!("bytes=-{len}")),
        };
        let request = self.sdk.get_object().bucket(&self.address.bucket).key(self.name(key)).set_range(range);
        let late = |_| Fault::Lost("the server is too slow".to_owned());
        let answer =
            tokio::time::timeout(self.answer_time, request.send()).await.map_err(late)?.map_err(Fault::of)?;
        let etag = parse_etag(answer.e_tag())?;
        let (start, len, stored_bytes) = extent(&answer, want)?;
        let bytes = tokio::time::timeout(self.time_for(len), collect(answer, len)).await.map_err(late)??;
        Ok(Part { bytes, start, stored_bytes, etag })
    }

    /// As [`crate::store::ObjectStore::list`]. Deleted objects are left out, and come back with their states.
    pub async fn list(
        &self,
        folder: &Key,
        after: Option<&Key>,
        max: usize,
    ) -> Result<(Page, Vec<Tombstone>), StoreError> {
        let within = format!("{folder}/");
        let mut from = after.map(|key| key.as_str().to_owned()).filter(|key| *key > within);
        let (mut page, mut deleted) = (Page::default(), Vec::new());
        loop {
            let wanted = PAGE_MAX.min(max.saturating_sub(page.objects.len()).saturating_add(1));
            let names = self.list_page(folder, &within, from.as_deref(), wanted).await?;
            for name in names.names {
                if from.as_ref().is_some_and(|from| name.name <= *from) || !name.name.starts_with(&within) {
                    let reason = "the server lists names out of order, or of another folder".to_owned();
                    return Err(StoreError::Invalid { key: folder.clone(), reason });
                }
                from = Some(name.name.clone());
                // What no store made here is nobody's object.
                let Some(key) = Key::new(name.name) else { continue };
                let Some(object_bytes) = trailer::content_bytes(name.stored_bytes) else {
                    if name.stored_bytes == DELETED_BYTES && deleted.len() < PAGE_MAX {
                        deleted.push(Tombstone { key, etag: name.etag, unix_ms: name.unix_ms });
                    }
                    continue;
                };
                if page.objects.len() == max {
                    page.more = true;
                    return Ok((page, deleted));
                }
                page.objects.push(Listed { key, object_bytes, modified_unix_ms: name.unix_ms });
            }
            if !names.more {
                return Ok((page, deleted));
            }
        }
    }

    async fn list_page(
        &self,
        folder: &Key,
        within: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Names, StoreError> {
        let prefix = &self.address.prefix;
        let end = Instant::now() + TRY_TIME;
        let mut backoff = Backoff::default();
        loop {
            let request = async {
                let request = self
                    .sdk
                    .list_objects_v2()
                    .bucket(&self.address.bucket)
                    .prefix(format!("{prefix}{within}"))
                    .set_start_after(after.map(|after| format!("{prefix}{after}")))
                    .max_keys(i32::try_from(max).unwrap_or(i32::MAX))
                    // Names that others put there may hold what XML cannot.
                    .encoding_type(EncodingType::Url);
                let answer = request.send().await.map_err(Fault::of)?;
                Names::of(answer, prefix, max)
            };
            match self.ask(Lane::Read, 0, request).await {
                Ok(names) => return Ok(names),
                Err(fault) if fault.is_passing() && backoff.wait(end).await => {}
                Err(fault) => return Err(fault.nothing_done(folder)),
            }
        }
    }
}

/// A deleted object of a swapped key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tombstone {
    pub key: Key,
    pub etag: Option<ETag>,
    pub unix_ms: u64,
}

struct Names {
    names: Vec<Name>,
    more: bool,
}

struct Name {
    /// Below the pool's prefix.
    name: String,
    stored_bytes: u64,
    etag: Option<ETag>,
    unix_ms: u64,
}

impl Names {
    fn of(answer: ListObjectsV2Output, prefix: &str, max: usize) -> Result<Self, Fault> {
        let bad = |what: &str| Fault::Bad(format!("the server's listing has {what}"));
        let is_encoded = answer.encoding_type() == Some(&EncodingType::Url);
        let contents = answer.contents.unwrap_or_default();
        let more = answer.is_truncated.unwrap_or(false);
        if contents.len() > max || (more && contents.is_empty()) {
            return Err(bad("too many names, or none and more to come"));
        }
        let names = contents
            .into_iter()
            .map(|object| {
                let name = object.key.ok_or_else(|| bad("an object without a name"))?;
                let name =
                    if is_encoded { decode(&name).ok_or_else(|| bad("a name that is none"))? } else { name };
                let name = name.strip_prefix(prefix).ok_or_else(|| bad("names of elsewhere"))?.to_owned();
                let stored_bytes = object.size.and_then(|size| u64::try_from(size).ok());
                let stored_bytes = stored_bytes.ok_or_else(|| bad("an object without a size"))?;
                let unix_ms = object.last_modified.and_then(|date| date.to_millis().ok());
                let unix_ms = unix_ms.and_then(|at| u64::try_from(at).ok());
                let unix_ms = unix_ms.ok_or_else(|| bad("an object without a date"))?;
                let etag = parse_etag(object.e_tag.as_deref()).ok();
                Ok(Name { name, stored_bytes, etag, unix_ms })
            })
            .collect::<Result<_, Fault>>()?;
        Ok(Self { names, more })
    }
}

/// Undoes the percent encoding of a name.
fn decode(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Start and length of what an answer brings, and the size of the object it is of.
fn extent(answer: &GetObjectOutput, want: Want) -> Result<(u64, u64, u64), Fault> {
    let len = answer.content_length().and_then(|len| u64::try_from(len).ok());
    let content_range = answer.content_range();
    let (start, len, stored_bytes) = match (content_range, want) {
        (Some(range), Want::FromTo(..) | Want::Last(_)) => {
            let (start, last, size) = parse_content_range(range)
                .ok_or_else(|| Fault::Bad("the server answers with a range that is none".to_owned()))?;
            let fits = match want {
                Want::FromTo(from, to) => start == from && last == to.min(size - 1),
                Want::Last(count) => last == size - 1 && start == size.saturating_sub(count),
                Want::All(_) => false,
            };
            if !fits || len.is_some_and(|len| len != last - start + 1) {
                return Err(Fault::Bad(
                    "the server answers with another range than it was asked for".to_owned(),
                ));
            }
            (start, last - start + 1, size)
        }
        // A range that is all of an object may come as all of it.
        (None, Want::All(max) | Want::Last(max)) => match len {
            Some(len) if len <= max => (0, len, len),
            Some(len) => {
                let object = len.saturating_sub(TRAILER_BYTES);
                return Err(Fault::Bad(format!("{object} bytes, more than {}", max - TRAILER_BYTES)));
            }
            None => return Err(Fault::Bad("the server does not say how long the object is".to_owned())),
        },
        (Some(_), Want::All(_)) => {
            return Err(Fault::Bad("the server answers with a part of the object".to_owned()));
        }
        (None, Want::FromTo(..)) => return Err(Fault::Bad("the server does not know ranges".to_owned())),
    };
    if len > READ_BYTES_MAX {
        return Err(Fault::Bad(format!("{len} bytes at once, more than {READ_BYTES_MAX}")));
    }
    Ok((start, len, stored_bytes))
}

/// First, last and total of `bytes 0-9/10`.
fn parse_content_range(header: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = header.strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let (start, last, size) = (number(start)?, number(last)?, number(size)?);
    (start <= last && last < size && size <= OFFSET_MAX).then_some((start, last, size))
}

/// The body, which has to have that length.
async fn collect(answer: GetObjectOutput, len: u64) -> Result<Bytes, Fault> {
    let mut body = answer.body;
    let len = len_of(len);
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|error| {
            Fault::Lost(super::fault::harmless(&format!("the answer broke off: {error}")))
        })?;
        let so_far = first.as_ref().map_or(all.len(), Bytes::len);
        if chunk.len() > len - so_far.min(len) {
            return Err(Fault::Lost("the answer is longer than it says".to_owned()));
        }
        match first.take() {
            None if all.is_empty() => first = Some(chunk),
            None => all.extend_from_slice(&chunk),
            Some(before) => {
                all.reserve(len);
                all.extend_from_slice(&before);
                all.extend_from_slice(&chunk);
            }
        }
    }
    let bytes = first.unwrap_or_else(|| all.freeze());
    if bytes.len() < len {
        return Err(Fault::Lost("the answer broke off".to_owned()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_s3::primitives::ByteStream;
    use proptest::prelude::*;

    fn answer(len: Option<i64>, range: Option<&str>) -> GetObjectOutput {
        GetObjectOutput::builder()
            .set_content_length(len)
            .set_content_range(range.map(ToOwned::to_owned))
            .build()
    }

    #[test]
    fn g19_an_answer_is_taken_only_for_what_was_asked() {
        let from_to = Want::FromTo(10, 19);
        assert_eq!(extent(&answer(Some(10), Some("bytes 10-19/100")), from_to), Ok((10, 10, 100)));
        assert_eq!(extent(&answer(None, Some("bytes 10-14/15")), from_to), Ok((10, 5, 15)));
        assert_eq!(extent(&answer(Some(5), Some("bytes 95-99/100")), Want::Last(5)), Ok((95, 5, 100)));
        assert_eq!(extent(&answer(Some(50), None), Want::Last(60)), Ok((0, 50, 50)));
        assert_eq!(extent(&answer(Some(50), None), Want::All(50)), Ok((0, 50, 50)));
        for (len, range, want) in [
            (Some(10), Some("bytes 11-20/100"), from_to),
            (Some(9), Some("bytes 10-19/100"), from_to),
            (Some(10), Some("bytes 10-18/100"), from_to),
            (Some(10), Some("bytes 10-19/*"), from_to),
            (Some(10), Some("bytes 10-19/18446744073709551615"), from_to),
            (Some(100), None, from_to),
            (Some(-1), None, Want::All(50)),
            (None, None, Want::All(50)),
            (Some(51), None, Want::All(50)),
            (Some(i64::MAX), None, Want::All(u64::MAX)),
            (Some(5), Some("bytes 0-4/100"), Want::Last(5)),
        ] {
            assert!(extent(&answer(len, range), want).is_err(), "{len:?} {range:?} {want:?}");
        }
    }

    #[tokio::test]
    async fn g19_a_body_has_the_length_that_was_announced() {
        let body =
            |bytes: &'static [u8]| GetObjectOutput::builder().body(ByteStream::from_static(bytes)).build();
        assert_eq!(collect(body(b"12345"), 5).await, Ok(Bytes::from_static(b"12345")));
        assert_eq!(collect(body(b""), 0).await, Ok(Bytes::new()));
        assert!(matches!(collect(body(b"1234"), 5).await, Err(Fault::Lost(_))));
        assert!(matches!(collect(body(b"123456"), 5).await, Err(Fault::Lost(_))));
    }

    #[test]
    fn encoded_names_are_decoded() {
        assert_eq!(decode("a%2Fb-c._%41").as_deref(), Some("a/b-cA".replace("cA", "c._A").as_str()));
        for bad in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn g19_no_header_makes_a_panic(text in "\\PC{0,40}|bytes [0-9]{0,25}-[0-9]{0,25}/[0-9*]{0,25}", len in any::<Option<i64>>()) {
            for want in [Want::All(100), Want::FromTo(0, 9), Want::Last(10)] {
                if let Ok((start, len, size)) = extent(&answer(len, Some(&text)), want) {
                    prop_assert!(start + len <= size && len <= 100);
                }
            }
            decode(&text);
        }
    }
}
