//! The S3 store against a real server, which `tests/s3/server` starts: the suite of all stores, the same through a network
//! that fails, what only a bucket can get wrong, and a daemon on it.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod bucket;
#[path = "../e2e/daemon.rs"]
#[expect(dead_code, reason = "shared with the tests of daemons on a directory")]
mod daemon;
mod faults;
#[path = "../e2e/nbd.rs"]
#[expect(dead_code, reason = "shared with the tests of daemons on a directory")]
mod nbd;
mod probe;
mod proxy;
mod serve;
#[path = "../store/suite.rs"]
mod suite;

suite!(s3_store, crate::bucket::pool());
