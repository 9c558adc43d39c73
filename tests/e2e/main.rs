//! The real binary, from outside: a daemon in a directory of its own, the command line, and other people's NBD clients.
//!
//! A client that is missing makes a test say `skipped: `, and fail where `CI` is set.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod daemon;
mod nbd;
mod tools;

mod activation;
mod backup;
mod bad;
mod clients;
mod fio;
mod flow;
mod full;
mod idle;
mod kill;
mod lost;
