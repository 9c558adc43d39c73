//! The NBD server on real connections, byte by byte: TLS, and what no well-behaved client does.
//!
//! What well-behaved clients make of it is shown in `tests/nbd.rs`.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../nbd_disk/mod.rs"]
mod nbd_disk;

mod client;
mod tls;
mod world;
