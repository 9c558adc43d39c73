//! Listens, and runs a task for each client.
//!
//! Owns: TCP and Unix listeners, the bound on clients, stopping.
//! Does not own: what a client says ([`super::connection`]).

use super::budget::NodeBudget;
use super::connection::{Client, Shared, serve};
use super::handshake::Security;
use super::threads::Threads;
use super::tls::{Tls, TlsDemand, TlsError};
use super::{Config, Exports, Passed};
use rustix::net::sockopt;
use std::io;
use std::net::SocketAddr;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Pause after a failed accept: out of descriptors, most likely, and they come back when clients leave.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes of replies that the kernel holds for a client which is slow to take them.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("failed to listen on {address}: {source}")]
    Listen { address: String, source: io::Error },
    #[error("failed to start the threads of the NBD server: {0}")]
    Threads(io::Error),
    #[error("TLS for NBD: {0}")]
    Tls(#[from] TlsError),
}

/// A server that runs.
pub struct Server {
    tcp: Vec<SocketAddr>,
    /// The one that was made here.
    unix: Option<UnixSocket>,
    unix_paths: Vec<PathBuf>,
    stop: CancellationToken,
    abort: CancellationToken,
    tasks: TaskTracker,
}

struct UnixSocket {
    path: PathBuf,
    inode: u64,
}

impl Server {
    /// Listens on all addresses of `config` before it returns. Stops when `shutdown` comes.
    ///
    /// # Errors
    /// An address cannot be listened on; nothing runs then. A Unix socket that nobody listens on any more is
    /// replaced, one that somebody does is an error.
    pub async fn start(
        config: Config,
        exports: Arc<dyn Exports>,
        shutdown: CancellationToken,
    ) -> Result<Self, StartError> {
        let tls = match &config.tls {
            Some(tls) => Some(Tls::open(tls.files.clone()).await?),
            None => None,
        };
        let Taken { tcp: mut listeners, unix: mut unix_listeners, mut unix_paths } = take(&config.passed)?;
        let mut tcp = Vec::with_capacity(config.tcp.len());
        for listener in &listeners {
            let failed = |source| StartError::Listen { address: "a socket that was passed".into(), source };
            tcp.push(listener.local_addr().map_err(failed)?);
        }
        let own_tcp: &[SocketAddr] = if listeners.is_empty() { &config.tcp } else { &[] };
        for &address in own_tcp {
            let failed = |source| StartError::Listen { address: address.to_string(), source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            tcp.push(listener.local_addr().map_err(failed)?);
            listeners.push(listener);
        }
        let mut unix = None;
        if let Some(path) = config.unix.as_ref().filter(|_| unix_listeners.is_empty()) {
            let (listener, socket) = bind_unix(path, config.unix_mode)
                .await
                .map_err(|source| StartError::Listen { address: path.display().to_string(), source })?;
            unix_listeners.push(listener);
            unix_paths.push(path.clone());
            unix = Some(socket);
        }
        let processors = std::thread::available_parallelism().map_or(2, NonZero::get);
        let threads = Threads::start(processors, 2 * processors + 2).map_err(StartError::Threads)?;
        let stop = shutdown.child_token();
        let gate = Gate {
            places: Arc::new(Semaphore::new(config.connections_max.min(Semaphore::MAX_PERMITS))),
            shared: Arc::new(Shared {
                threads: Some(threads),
                budget: NodeBudget::new(config.node_bytes_max),
                config,
                exports,
                tls,
                stop: stop.clone(),
            }),
            abort: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let (abort, tasks) = (gate.abort.clone(), gate.tasks.clone());
        for listener in listeners {
            tasks.spawn(accept_tcp(listener, gate.clone()));
        }
        for listener in unix_listeners {
            tasks.spawn(accept_unix(listener, gate.clone()));
        }
        tasks.close();
        Ok(Self { tcp, unix, unix_paths, stop, abort, tasks })
    }

    /// The TCP addresses it listens on, in the order of the configuration.
    pub fn tcp_addresses(&self) -> &[SocketAddr] {
        &self.tcp
    }

    /// Paths of the Unix sockets that it listens on.
    pub fn unix_paths(&self) -> &[PathBuf] {
        &self.unix_paths
    }

    /// Accepts nobody any more, answers what was asked, and closes. What is left after `patience` is cut off.
    pub async fn drain(self, patience: Duration) {
        self.stop.cancel();
        if tokio::time::timeout(patience, self.tasks.wait()).await.is_err() {
            log::warn!("NBD clients did not leave in time and are cut off");
            self.abort.cancel();
            self.tasks.wait().await;
        }
        if let Some(socket) = &self.unix {
            let ours = tokio::fs::symlink_metadata(&socket.path)
                .await
                .is_ok_and(|found| found.ino() == socket.inode);
            if ours && let Err(error) = tokio::fs::remove_file(&socket.path).await {
                log::warn!("failed to remove {}: {error}", socket.path.display());
            }
        }
    }
}

/// Listeners that were passed.
struct Taken {
    tcp: Vec<TcpListener>,
    unix: Vec<UnixListener>,
    /// Where they have one.
    unix_paths: Vec<PathBuf>,
}

fn take(passed: &[Arc<Passed>]) -> Result<Taken, StartError> {
    let failed = |source| StartError::Listen { address: "a socket that was passed".into(), source };
    let mut taken = Taken { tcp: Vec::new(), unix: Vec::new(), unix_paths: Vec::new() };
    for listener in passed {
        match &**listener {
            Passed::Tcp(listener) => {
                let listener = listener.try_clone().map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                taken.tcp.push(TcpListener::from_std(listener).map_err(failed)?);
            }
            Passed::Unix(listener) => {
                let listener = listener.try_clone().map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                taken.unix_paths.extend(address.as_pathname().map(Path::to_owned));
                taken.unix.push(UnixListener::from_std(listener).map_err(failed)?);
            }
        }
    }
    Ok(taken)
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What every client passes.
#[derive(Clone)]
struct Gate {
    shared: Arc<Shared>,
    places: Arc<Semaphore>,
    abort: CancellationToken,
    tasks: TaskTracker,
}

impl Gate {
    /// What clients of TCP, and what those on this host, may or must do with TLS.
    fn security(&self) -> (Security, Security) {
        match self.shared.config.tls.as_ref().map(|tls| tls.demand) {
            None => (Security::Plain, Security::Plain),
            Some(TlsDemand::Offered) => (Security::Offered, Security::Offered),
            Some(TlsDemand::Required) => (Security::Required, Security::Offered),
        }
    }

    fn admit<S>(&self, io: S, security: Security, peer: String)
    where
        S: Client + 'static,
    {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            log::warn!("turned NBD client {peer} away: {} are connected", self.shared.config.connections_max);
            return;
        };
        self.tasks.spawn(run(io, security, peer, place, Arc::clone(&self.shared), self.abort.clone()));
    }
}

async fn run<S>(
    io: S,
    security: Security,
    peer: String,
    place: OwnedSemaphorePermit,
    shared: Arc<Shared>,
    abort: CancellationToken,
) where
    S: Client + 'static,
{
    tokio::select! {
        result = serve(io, security, &shared) => match result {
            Ok(()) => log::debug!("NBD client {peer} left"),
            Err(error) => log::info!("NBD client {peer} dropped: {error}"),
        },
        () = abort.cancelled() => log::info!("NBD client {peer} cut off"),
    }
    drop(place);
}

async fn accept_tcp(listener: TcpListener, gate: Gate) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = gate.shared.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Err(error) = prepare(&stream) {
                    log::debug!("NBD client {peer}: socket options: {error}");
                }
                gate.admit(stream, gate.security().0, peer.to_string());
            }
            Err(error) => pause(&gate, &error).await,
        }
    }
}

async fn accept_unix(listener: UnixListener, gate: Gate) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = gate.shared.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                widen(&stream);
                let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
                gate.admit(
                    stream,
                    gate.security().1,
                    peer.map_or_else(|| "on the socket".into(), |pid| format!("process {pid}")),
                );
            }
            Err(error) => pause(&gate, &error).await,
        }
    }
}

async fn pause(gate: &Gate, error: &io::Error) {
    log::warn!("failed to accept an NBD client: {error}");
    tokio::select! {
        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
        () = gate.shared.stop.cancelled() => {}
    }
}

/// More than the default of Unix sockets lets a long reply leave in fewer steps. TCP finds its own size, and does better so.
fn widen(socket: impl AsFd) {
    // Without the privilege for more, as much as the system lets everybody have.
    if sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER_BYTES).is_err()
        && let Err(error) = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES)
    {
        log::debug!("the send buffer of a client's socket stays as it is: {error}");
    }
}

/// Replies are not held back to fill packets, and a client whose host died is noticed.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream.as_fd(), true)?;
    sockopt::set_tcp_keepidle(stream.as_fd(), Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream.as_fd(), Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(stream.as_fd(), 6)?;
    Ok(())
}

async fn bind_unix(path: &Path, mode: u32) -> io::Result<(UnixListener, UnixSocket)> {
    match tokio::fs::symlink_metadata(path).await {
        Ok(found) if found.file_type().is_socket() => match UnixStream::connect(path).await {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                tokio::fs::remove_file(path).await?;
            }
            Err(error) => return Err(error),
        },
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something else than a socket is there",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    tokio::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).await?;
    let inode = tokio::fs::symlink_metadata(path).await?.ino();
    Ok((listener, UnixSocket { path: path.to_owned(), inode }))
}
