//! Sockets that a service manager listens on and hands over (`LISTEN_FDS`).
//!
//! Owns: which of them are of use: listening stream sockets for NBD, TCP or Unix.
//! Does not own: what is done with them ([`crate::frontend::nbd::server`]).

use crate::frontend::nbd::Passed;
use anyhow::{Context as _, bail};
use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;
use std::sync::Arc;

/// The sockets that were passed to this process. To be called before there are threads: it changes the environment.
///
/// # Errors
/// One of them is of no use, which is said with its number.
pub fn listeners() -> anyhow::Result<Vec<Arc<Passed>>> {
    // Checks that they are meant for this process and are open; the other believes any number.
    let count = sd_notify::listen_fds().context("the sockets passed by LISTEN_FDS are not there")?.len();
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut fds = ListenFd::from_env();
    let mut passed = Vec::with_capacity(count);
    for index in 0..count {
        let number = index + 3;
        let listener = match (fds.take_tcp_listener(index), fds.take_unix_listener(index)) {
            (Ok(Some(listener)), _) => Passed::Tcp(listener),
            (_, Ok(Some(listener))) => Passed::Unix(listener),
            _ => bail!(
                "descriptor {number} passed by LISTEN_FDS is neither a TCP nor a Unix stream socket: only sockets for \
                 NBD can be passed (ListenStream= in the socket unit)"
            ),
        };
        let listens = match &listener {
            Passed::Tcp(listener) => socket_acceptconn(listener),
            Passed::Unix(listener) => socket_acceptconn(listener),
        };
        if !listens.unwrap_or(false) {
            bail!(
                "descriptor {number} passed by LISTEN_FDS is a connection, not a socket that listens (Accept=no in the socket unit)"
            );
        }
        passed.push(Arc::new(listener));
    }
    Ok(passed)
}
