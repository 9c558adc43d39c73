//! The daemon's NBD server with clients that nobody here wrote: the nbd project's tester, libnbd, QEMU. Each in the
//! version of this machine, and in a newer one that is unpacked beside the system.
//!
//! Owns: what such clients ask for, against real volumes.
//! Does not own: clients that break the protocol on purpose (tests/nbd.rs).

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod clients;
#[path = "../e2e/daemon.rs"]
#[expect(dead_code, reason = "shared with the tests of the whole daemon")]
mod daemon;
#[path = "../e2e/nbd.rs"]
#[expect(dead_code, reason = "shared with the tests of the whole daemon")]
mod nbd;

mod extensions;
mod libnbd;

mod qemu;
mod tester;
