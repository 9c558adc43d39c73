//! The NBD server on real connections, byte by byte: every request against what the protocol demands, TLS, resizing,
//! clients that mean harm.
//!
//! What well-behaved clients make of it is shown in `tests/nbd.rs`.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../nbd_disk/mod.rs"]
mod nbd_disk;

mod client;
mod hostile;
mod huge;
mod resize;
mod table;
mod tls;
mod world;
