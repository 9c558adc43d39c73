//! What came of one request.
//!
//! Owns: which errors of the wire mean that nothing was done, and what callers are told.
//! Does not own: trying again.

use crate::store::{Key, StoreError};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use std::error::Error;

/// Longest text of a server that is repeated.
const TEXT_CHARS_MAX: usize = 200;

/// Why a request brought no result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It never left this machine.
    NotSent(String),
    /// Nothing else would leave it either, for now.
    Away(String),
    /// No answer, or one that says nothing about what was done.
    Lost(String),
    /// The server refused it.
    Refused { status: u16, code: String, message: String },
    /// An answer that no S3 server gives.
    Bad(String),
}

impl Fault {
    /// Of an error of the SDK.
    pub fn of<E>(error: SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        match &error {
            SdkError::ServiceError(service) => {
                let status = service.raw().status().as_u16();
                let code = harmless(service.err().code().unwrap_or_default());
                let message = harmless(service.err().message().unwrap_or_default());
                Self::Refused { status, code, message }
            }
            SdkError::ConstructionFailure(_) => Self::NotSent(text_of(&error)),
            SdkError::DispatchFailure(_) if never_connected(&error) => Self::NotSent(text_of(&error)),
            // Of a kind that is not there yet: nothing is known of it.
            _ => Self::Lost(text_of(&error)),
        }
    }

    /// Whether the server gave no answer of its own, or said that it is in trouble.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::NotSent(_) | Self::Lost(_) => true,
            Self::Away(_) | Self::Bad(_) => false,
            Self::Refused { status, .. } => *status >= 500 && *status != 501 && *status != 507,
        }
    }

    /// Whether the same request may bring a result a moment later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Refused { status, code, .. } => {
                self.is_outage()
                    || matches!(status, 408 | 409 | 429)
                    || matches!(code.as_str(), "RequestTimeout" | "IncompleteBody" | "SlowDown")
            }
            Self::NotSent(_) | Self::Lost(_) => true,
            Self::Away(_) | Self::Bad(_) => false,
        }
    }

    /// Whether a change that was asked for may have been made, or may yet be.
    pub fn may_be_done(&self) -> bool {
        match self {
            Self::NotSent(_) | Self::Away(_) => false,
            Self::Lost(_) | Self::Bad(_) => true,
            // A conflict may be with this request itself, sent twice by something on the way.
            Self::Refused { status, .. } => *status >= 500 && *status != 501 || matches!(status, 408 | 409),
        }
    }

    /// Whether a condition did not hold.
    pub fn is_condition(&self) -> bool {
        match self {
            Self::Refused { status, code, .. } => {
                matches!(status, 409 | 412) || (*status == 404 && code == "NoSuchKey")
            }
            Self::NotSent(_) | Self::Away(_) | Self::Lost(_) | Self::Bad(_) => false,
        }
    }

    /// Whether there is no such object; a bucket that is gone, or a 404 from something on the way, says nothing of it.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { status: 404, code, .. } if code == "NoSuchKey")
    }

    /// What a caller is told who asked for nothing to be changed, or knows that nothing was.
    pub fn nothing_done(self, key: &Key) -> StoreError {
        let key = key.clone();
        match self {
            Self::Refused { status: 507, .. } => StoreError::NoSpace(key),
            Self::Refused { code, .. } if code == "QuotaExceeded" => StoreError::NoSpace(key),
            Self::Refused { status: 413 | 501, .. } | Self::Bad(_) => {
                StoreError::Invalid { key, reason: self.to_string() }
            }
            Self::NotSent(_) | Self::Away(_) | Self::Lost(_) | Self::Refused { .. } => {
                StoreError::Unavailable { key, reason: self.to_string() }
            }
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotSent(why) | Self::Away(why) | Self::Lost(why) | Self::Bad(why) => f.write_str(why),
            Self::Refused { status, code, message } => {
                let advice = match code.as_str() {
                    "RequestTimeTooSkewed" => "; set this machine's clock",
                    "NoSuchBucket" => "; create the bucket first",
                    "AccessDenied" | "InvalidAccessKeyId" | "SignatureDoesNotMatch" => {
                        "; check the credentials and the bucket's policy"
                    }
                    _ => "",
                };
                write!(f, "the server answered {status}")?;
                if !code.is_empty() {
                    write!(f, " {code}")?;
                }
                if !message.is_empty() && message != code {
                    write!(f, " ({message})")?;
                }
                f.write_str(advice)
            }
        }
    }
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

fn never_connected(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|error| {
        error.downcast_ref::<hyper_util::client::legacy::Error>().is_some_and(|error| error.is_connect())
    })
}

fn text_of(error: &(dyn Error + 'static)) -> String {
    // The innermost says what happened; those around it repeat that something did.
    let last = chain(error).last();
    let text = last.map_or_else(|| DisplayErrorContext(error).to_string(), ToString::to_string);
    harmless(&text)
}

/// A text from outside, cut and without what could drive a terminal or a log.
pub fn harmless(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, code: &str) -> Fault {
        Fault::Refused { status, code: code.into(), message: String::new() }
    }

    #[test]
    fn g9_only_a_clear_refusal_says_that_nothing_was_done() {
        for unclear in [500, 502, 503, 504, 408, 409] {
            assert!(refused(unclear, "").may_be_done(), "{unclear}");
        }
        for clear in [400, 401, 403, 404, 412, 429, 501] {
            assert!(!refused(clear, "").may_be_done(), "{clear}");
        }
        assert!(Fault::Lost("reset".into()).may_be_done());
        assert!(!Fault::NotSent("refused".into()).may_be_done());
    }

    #[test]
    fn a_missing_bucket_or_a_proxys_page_is_no_missing_object() {
        let key = Key::new("volumes/a").unwrap();
        assert!(refused(404, "NoSuchKey").is_missing());
        for other in [refused(404, "NoSuchBucket"), refused(404, ""), refused(410, "NoSuchKey")] {
            assert!(!other.is_missing());
            assert!(matches!(other.nothing_done(&key), StoreError::Unavailable { .. }));
        }
        assert!(matches!(refused(403, "QuotaExceeded").nothing_done(&key), StoreError::NoSpace(_)));
        assert!(matches!(refused(507, "").nothing_done(&key), StoreError::NoSpace(_)));
    }

    #[test]
    fn g19_texts_of_a_server_are_cut_and_tamed() {
        let text = harmless(&("\u{1b}[2J\n".to_owned() + &"x".repeat(10_000)));
        assert!(text.chars().count() == TEXT_CHARS_MAX && !text.contains(char::is_control));
    }
}
