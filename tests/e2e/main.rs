//! The real binary, from outside: a daemon in a directory of its own, the command line, and other people's NBD clients.
//!
//! A client that is missing makes a test say SKIPPED, and fail where `CI` is set.

#![expect(clippy::disallowed_methods, reason = "a test may wait for a disk or a process")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod daemon;
mod nbd;
mod tools;

mod bad;
mod flow;
mod full;
mod kill;
mod lost;
