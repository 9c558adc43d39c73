//! Where the API is reached: TCP and a Unix socket.
//!
//! Owns: binding, limits on connections and slow clients, and an orderly end.
//! Does not own: what is answered.

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A connection that sends no complete request head for so long is closed; also one that idles between requests.
const HEAD_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a shutdown waits for requests that are under way.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(10);
/// Pause after an accept that failed for want of files or memory, which the next would find missing too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Why the API is not reachable.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("failed to listen on {address}: {source}")]
    Tcp { address: String, source: io::Error },
    #[error("failed to listen on {}: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
    #[error("another daemon is listening on {}", path.display())]
    InUse { path: PathBuf },
}

/// A bound listener.
pub enum Endpoint {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// A socket's name in the file system; its end removes it, if it is still the same.
pub struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    /// Removes the name, unless somebody else's socket has it by now. One that stays is taken over by the next start.
    async fn remove(mut self) {
        let (path, inode) = (std::mem::take(&mut self.path), self.inode);
        tokio::task::spawn_blocking(move || remove_socket(&path, inode)).await.ok();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let (path, inode) = (std::mem::take(&mut self.path), self.inode);
        if path.as_os_str().is_empty() {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || remove_socket(&path, inode))),
            Err(_) => remove_socket(&path, inode),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on a thread for blocking work, or outside a runtime")]
fn remove_socket(path: &Path, inode: (u64, u64)) {
    if fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == inode) {
        fs::remove_file(path).ok();
    }
}

impl Endpoint {
    pub async fn tcp(address: &str) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address).await;
        listener.map(Self::Tcp).map_err(|source| BindError::Tcp { address: address.to_owned(), source })
    }

    /// Binds a socket that only this user may connect to. A name that is there is taken over only if it is a socket that
    /// nobody listens on.
    pub async fn unix(path: &Path) -> Result<Self, BindError> {
        let path = path.to_owned();
        let failed = {
            let path = path.clone();
            move |source| BindError::Unix { path: path.clone(), source }
        };
        let bound = tokio::task::spawn_blocking(move || bind_unix(&path)).await;
        let (listener, file) = bound.map_err(|error| failed(io::Error::other(error)))??;
        Ok(Self::Unix(UnixListener::from_std(listener).map_err(failed)?, file))
    }

    /// The address or path that is listened on.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => {
                listener.local_addr().map(|address| address.to_string()).unwrap_or_default()
            }
            Self::Unix(_, file) => file.path.display().to_string(),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on a thread for blocking work")]
fn bind_unix(path: &Path) -> Result<(std::os::unix::net::UnixListener, SocketFile), BindError> {
    use std::os::unix::net;
    let failed = |source| BindError::Unix { path: path.to_owned(), source };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => match net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => return Err(BindError::InUse { path: path.to_owned() }),
            Err(error) => return Err(failed(error)),
        },
        Ok(_) => return Err(failed(io::Error::other("there is a file of that name that is no socket"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Under another name until its mode is set: nobody else can connect in between. The rename takes a stale one's place.
    let hidden = path.with_file_name(format!(".{:08x}", rand::random::<u32>()));
    let listener = net::UnixListener::bind(&hidden).map_err(failed)?;
    let named = || {
        fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        fs::rename(&hidden, path)?;
        fs::symlink_metadata(path)
    };
    match named() {
        Ok(meta) => {
            let file = SocketFile { path: path.to_owned(), inode: (meta.dev(), meta.ino()) };
            Ok((listener, file))
        }
        Err(error) => {
            fs::remove_file(&hidden).ok();
            Err(failed(error))
        }
    }
}

/// Serves endpoints until it is told to stop.
pub struct Server {
    connections_max: usize,
    shutdown: CancellationToken,
    /// Connections.
    tasks: TaskTracker,
}

impl Server {
    /// `connections_max` is for each endpoint: those who crowd one do not lock out the other.
    pub fn new(connections_max: u32, shutdown: CancellationToken) -> Self {
        let connections_max =
            usize::try_from(connections_max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { connections_max, shutdown, tasks: TaskTracker::new() }
    }

    /// Begins to serve an endpoint.
    pub fn start(&self, endpoint: Endpoint, router: Router) {
        let slots = Arc::new(Semaphore::new(self.connections_max));
        let (shutdown, tasks) = (self.shutdown.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            match endpoint {
                Endpoint::Tcp(listener) => accept(listener, router, slots, shutdown, tasks).await,
                Endpoint::Unix(listener, file) => {
                    accept(listener, router, slots, shutdown, tasks).await;
                    file.remove().await;
                }
            }
        });
    }

    /// Waits until it was told to stop, then for the requests that are under way and for `work`, but not forever.
    pub async fn finish(self, work: &TaskTracker) {
        self.shutdown.cancelled().await;
        self.tasks.close();
        work.close();
        let all = async {
            self.tasks.wait().await;
            work.wait().await;
        };
        if tokio::time::timeout(SHUTDOWN_TIME_MAX, all).await.is_err() {
            log::warn!("requests were still under way at the end of the daemon");
        }
    }
}

/// A listener of either kind.
trait Listen: Send + Sync {
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listen for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        Ok(self.accept().await?.0)
    }
}

impl Listen for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

async fn accept(
    listener: impl Listen,
    router: Router,
    slots: Arc<Semaphore>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME_MAX);
    loop {
        let accepted = async {
            let slot = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((slot, listener.next().await?))
        };
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            accepted = accepted => accepted,
        };
        let (slot, stream) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_peer(&error) => continue,
            Err(error) => {
                log::warn!(error:% = error; "failed to accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = shutdown.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                log::debug!(error:% = error; "a connection ended early");
            }
            drop(slot);
        });
    }
}

fn is_of_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}
