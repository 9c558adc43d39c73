//! The NBD server: fixed newstyle; simple, structured and extended replies; block status.
//!
//! Follows <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.
//!
//! ```text
//! socket ─ server (accept, limits, stop)
//!            └ connection (one task a client) ─ handshake P, tls                     which disk
//!                ├ a plain socket: threads (`nbd-N`) ─┐
//!                └ any other stream: the task itself ─┴ transport                     who polls
//!                                                     └ transmission ─ session P, reply P    bytes ⇄ requests
//!                                                                    └ work ─ BlockHandler   requests ⇄ disk
//! ```
//! P = pure: bytes and values in, bytes and values out.
//!
//! Owns: the protocol, its limits, and how many bytes of clients' data are in memory ([`budget`]).
//! Does not own: which disks there are ([`Exports`], which the node implements) or what they hold.
//!
//! # Limits, and what happens beyond them
//! | limit | beyond it |
//! | --- | --- |
//! | connections ([`Config::connections_max`]) | the connection is closed at once |
//! | handshake, TLS included: [`Config::handshake_timeout`], [`wire::OPTIONS_MAX`] options | the connection is closed |
//! | option data [`wire::OPTION_BYTES_MAX`] | skipped, answered `ERR_TOO_BIG` (`ERR_TLS_REQD` where TLS has to come first) |
//! | names and other strings [`wire::STRING_BYTES_MAX`] | `ERR_INVALID`; as an export name the connection is closed |
//! | descriptions and error texts [`wire::DESCRIPTION_BYTES_MAX`], [`wire::MESSAGE_BYTES_MAX`] | cut off |
//! | files with certificates and keys: 1 MiB | refused at the start; later the old ones stay in use |
//! | names in a listing, of disks or metadata contexts [`wire::LIST_MAX`] | the list is cut off there |
//! | read and write payload [`wire::PAYLOAD_BYTES_MAX`] | skipped, answered `EINVAL` (`EOVERFLOW` for structured reads); with extended headers a longer payload closes the connection |
//! | metadata contexts [`context::CONTEXTS_MAX`] | `ERR_TOO_BIG`, and none is selected |
//! | extents in one answer [`wire::EXTENTS_MAX`] | the answer covers the beginning of the range |
//! | requests under way [`wire::REQUESTS_MAX`] a connection | the server stops reading from that socket |
//! | bytes under way ([`Config::connection_bytes_max`], [`Config::node_bytes_max`]) | the same |
//! | replies not taken by the client: 192 KiB beside what was reserved, and in the kernel 2 MiB of a Unix socket or what it allows a TCP one | the same |
//! | one client's input not looked at: 128 KiB | the same |
//! | bytes of one cache hint [`wire::CACHE_BYTES_MAX`] | the rest of its range is not fetched |
//! | cache hints of clients that leave, or that are made to | given up |
//! | silence of a TCP client's host: two minutes | keepalive closes the connection |
//! | replies not taken when the disk or the server goes ([`Config::close_timeout`]) | the connection is closed |
//!
//! # A disk that changes its size
//! NBD has no word for it. Requests are judged by the size of the moment: in what was added they are served at once,
//! beyond what was cut off they are refused (`EINVAL`, writes and zeroes `ENOSPC`), and block status follows. A client
//! that is connected still believes the size that it was told; the new one is told to those that ask or connect anew.

pub mod budget;
pub mod connection;
pub mod context;
pub mod crew;
pub mod handshake;
mod past;
pub mod reply;
mod scratch;
pub mod server;
pub mod session;
pub mod status;
pub mod threads;
pub mod tls;
pub mod transmission;
pub mod transport;
mod under_way;
pub mod wire;
pub mod work;

pub use server::Server;

use crate::block::BlockHandler;
use async_trait::async_trait;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Where the server listens and how much it lets clients use.
#[derive(Clone, Debug)]
pub struct Config {
    /// TCP addresses; port 0 takes any free one.
    pub tcp: Vec<SocketAddr>,
    /// Path of a Unix socket.
    pub unix: Option<PathBuf>,
    /// Sockets that somebody else listens on for us; those of a kind take the place of all others of that kind.
    pub passed: Vec<Arc<Passed>>,
    /// Permissions of the Unix socket.
    pub unix_mode: u32,
    pub tls: Option<tls::TlsConfig>,
    /// Clients at one time, over all listeners.
    pub connections_max: usize,
    /// Bytes of reads and writes under way in one connection.
    pub connection_bytes_max: usize,
    /// The same over all connections, beside [`budget::OWN_BYTES`] that each connection has for itself.
    pub node_bytes_max: usize,
    /// Time for everything before the first request.
    pub handshake_timeout: Duration,
    /// Time that a client whose disk is taken away, or that is stopped, has to take the replies to what it asked.
    pub close_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tcp: Vec::new(),
            unix: None,
            passed: Vec::new(),
            unix_mode: 0o660,
            tls: None,
            connections_max: 1024,
            connection_bytes_max: 32 << 20,
            node_bytes_max: 256 << 20,
            handshake_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(10),
        }
    }
}

/// A socket that listens already. It is not removed at the end.
#[derive(Debug)]
pub enum Passed {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// A disk as it stands in a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportListing {
    pub name: String,
    /// For people.
    pub description: String,
}

/// A disk that a client asked for.
pub struct OpenExport {
    /// Its own name, also where the client asked for the default one.
    pub name: String,
    pub handler: Arc<dyn BlockHandler>,
    /// For people.
    pub description: String,
    /// Dropped when the client has left and nothing of it is under way any more.
    pub guard: Box<dyn Send + Sync>,
    /// Ends the connection: what was asked is answered, nothing more is taken.
    pub closed: CancellationToken,
}

/// Why a disk could not be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExportError {
    /// There is none of that name.
    #[error("there is no disk of this name here")]
    Unknown,
    /// There is, but it cannot be served now.
    #[error("{0}")]
    Unavailable(String),
}

/// The disks that are served.
#[async_trait]
pub trait Exports: Send + Sync + 'static {
    /// Names and descriptions, at most `max`.
    async fn list(&self, max: usize) -> Vec<ExportListing>;

    /// The disk called `name`; the empty name is the default one, if there is exactly one.
    async fn open(&self, name: &str) -> Result<OpenExport, ExportError>;
}
