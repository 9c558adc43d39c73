//! The daemon's life: runtime, node, API, signals.
//!
//! Owns: the order in which they start and stop, and what a newcomer is told at the start.
//! Does not own: what a node does ([`crate::node`]).

use super::api::{AllowedHosts, Api, BindError, Endpoint, Server};
use super::config::{Config, Loaded, NbdConfig};
use crate::frontend::nbd::Passed;
use crate::frontend::nbd::tls::{TlsConfig, TlsDemand, TlsFiles};
use crate::node::service::SharedService;
use crate::node::{Node, NodeConfig};
use anyhow::Context as _;
use futures::future::BoxFuture;
use sd_notify::NotifyState;
use std::fmt::Write as _;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long the last commits may take; what is not in the pool by then is kept here.
const STOP_TIME: Duration = Duration::from_secs(60);

/// A node at work.
pub struct RunningNode {
    pub service: SharedService,
    /// Commits what it can, gives nothing up that is not committed, and ends.
    pub shutdown: Box<dyn FnOnce() -> BoxFuture<'static, anyhow::Result<()>> + Send>,
}

/// Starts the node that `config` describes; its paths are resolved. NBD sockets that were `passed` take the place of
/// those of their kind in the settings.
///
/// # Errors
/// Whatever keeps it from serving: a wrong pool, a state directory in use, a failed recovery.
pub async fn start_node(config: Config, passed: Vec<Arc<Passed>>) -> anyhow::Result<RunningNode> {
    let mut tcp = Vec::new();
    for address in &config.nbd.listen {
        let found = tokio::net::lookup_host(address).await;
        tcp.extend(
            found.with_context(|| format!("failed to find the address nbd.listen = \"{address}\""))?.take(1),
        );
    }
    let s3 = config.pool.s3().map_err(anyhow::Error::msg)?;
    let mut node = NodeConfig::new(config.pool.dir, config.state.dir);
    node.s3 = s3;
    node.engine.pool_wait = Duration::from_secs(config.pool.wait_seconds);
    node.runtime_dir = config.state.runtime_dir;
    node.cache_bytes = config.cache.size.0;
    node.nbd.tcp = tcp;
    node.nbd.passed = passed;
    node.nbd.tls = tls(&config.nbd);
    node.nbd.unix = Some(config.nbd.socket).filter(|path| !path.as_os_str().is_empty());
    node.nbd.connections_max = usize::try_from(config.limits.nbd_connections)?;
    node.engine.commit_dirty_bytes = config.commit.dirty_bytes.0;
    node.engine.commit_age = Duration::from_secs(config.commit.age_seconds);
    let node = Node::start(node).await?;
    let stopping = node.clone();
    Ok(RunningNode {
        service: node,
        shutdown: Box::new(move || {
            Box::pin(async move {
                stopping.shutdown(STOP_TIME).await;
                Ok(())
            })
        }),
    })
}

/// TLS for NBD, if there are files for it.
fn tls(config: &NbdConfig) -> Option<TlsConfig> {
    let certificate = config.tls_certificate.clone()?;
    let files =
        TlsFiles { certificate, key: config.tls_key.clone()?, client_ca: config.tls_client_ca.clone() };
    let demand = if config.tls_required { TlsDemand::Required } else { TlsDemand::Offered };
    Some(TlsConfig { files, demand })
}

/// A runtime whose threads say in their names what they are for: `async-N` poll futures and never block, `blocking-N` do
/// file I/O and computing.
///
/// # Errors
/// No thread could be started.
pub fn runtime(workers: usize) -> io::Result<Runtime> {
    let started = AtomicUsize::new(0);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        // One function names both kinds; the builder itself starts the threads that become workers.
        .thread_name_fn(move || match started.fetch_add(1, Ordering::Relaxed) {
            number if number < workers => format!("async-{number}"),
            number => format!("blocking-{}", number - workers),
        })
        .build()?;
    // Workers are blocking jobs themselves. Asked for another one before they run, a thread named `async-N` may take that
    // instead, and one named `blocking-N` become a worker. A worker without work parks at once.
    let metrics = runtime.metrics();
    while (0..workers).any(|worker| metrics.worker_park_count(worker) == 0) {
        std::thread::yield_now();
    }
    Ok(runtime)
}

/// Runs the daemon until SIGTERM or SIGINT; a second one ends it at once, which loses nothing that was acknowledged.
///
/// # Errors
/// It could not start, or it could not stop in order.
pub fn run(loaded: Loaded) -> anyhow::Result<()> {
    let passed = super::activation::listeners()?;
    let workers = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    let runtime = runtime(workers).context("failed to start the runtime")?;
    let stop = CancellationToken::new();
    let daemon = async move {
        stop_on_signals(&stop)?;
        let start = |config| start_node(config, passed);
        serve(loaded, start, stop, super::cli::print).await
    };
    // Spawned, so that all of it runs on threads of the runtime; this one only waits.
    runtime.block_on(async { tokio::spawn(daemon).await.context("the daemon panicked")? })
}

fn stop_on_signals(stop: &CancellationToken) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("failed to wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to wait for SIGINT")?;
    let stop = stop.clone();
    tokio::spawn(async move {
        for attempt in 0.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if attempt > 0 {
                log::warn!("{name} again: ending at once");
                std::process::exit(130);
            }
            log::info!("{name}: stopping; once more ends at once");
            stop.cancel();
        }
    });
    Ok(())
}

/// Starts a node with `start` and serves the API for it until `stop`. `welcome` is told once all is up.
///
/// # Errors
/// It could not start, or the node could not stop in order.
pub async fn serve<F: Future<Output = anyhow::Result<RunningNode>> + Send>(
    loaded: Loaded,
    start: impl FnOnce(Config) -> F + Send,
    stop: CancellationToken,
    welcome: impl FnOnce(&str) + Send,
) -> anyhow::Result<()> {
    let config = loaded.resolved();
    // Before the node: a second daemon on the same directory stops here, with nothing touched.
    let unix = Endpoint::unix(&config.http.socket).await?;
    let tcp = Endpoint::tcp(&config.http.listen).await?;
    let addresses = Addresses { http: tcp.address(), socket: unix.address() };
    notify(&[NotifyState::Status("Starting: reading the pool and what was acknowledged before")]);
    let RunningNode { service, shutdown } = start(config.clone()).await.context("failed to start")?;

    let work = TaskTracker::new();
    let api = Api::new(SharedService::clone(&service), work.clone());
    let closing = CancellationToken::new();
    let server = Server::new(config.limits.http_connections, closing.clone());
    server.start(unix, api.clone().router());
    server.start(tcp, api.guarded_router(AllowedHosts::new(&config.http.allowed_hosts)));

    let nbd = match service.node().await {
        Ok(node) => node.nbd,
        Err(_) => config.nbd.listen.clone(),
    };
    log::info!(http = addresses.http.as_str(), socket = addresses.socket.as_str(); "serving");
    notify(&[
        NotifyState::Ready,
        NotifyState::Status(&format!("Serving; http://{}/ and {}", addresses.http, addresses.socket)),
    ]);
    welcome(&welcome_text(&loaded, &config, &addresses, &nbd));

    stop.cancelled().await;
    notify(&[NotifyState::Stopping, NotifyState::Status("Stopping: requests under way, then the volumes")]);
    // Requests first: one that is half done finishes on a node that still works.
    closing.cancel();
    server.finish(&work).await;
    shutdown()
        .await
        .context("failed to stop in order; what was acknowledged is kept and recovered at the next start")?;
    log::info!("stopped");
    Ok(())
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!(error:% = error; "failed to notify the service manager");
    }
}

struct Addresses {
    http: String,
    socket: String,
}

fn welcome_text(loaded: &Loaded, config: &Config, addresses: &Addresses, nbd: &[String]) -> String {
    let settings = match &loaded.file {
        Some(file) => file.display().to_string(),
        None => "defaults (see: blockhouse config show)".to_owned(),
    };
    let nbd = if nbd.is_empty() { "not served".to_owned() } else { nbd.join(" ") };
    let rows = [
        ("settings", settings),
        ("pool", config.pool.place()),
        ("state", config.state.dir.display().to_string()),
        ("NBD", nbd),
        ("NBD socket", config.nbd.socket.display().to_string()),
        ("API socket", addresses.socket.clone()),
        ("web and API", format!("http://{}/", addresses.http)),
    ];
    let mut text = "Blockhouse is serving.\n\n".to_owned();
    for (name, value) in rows {
        // Writing to a String cannot fail.
        writeln!(text, "  {name:<12} {value}").ok();
    }
    let at = super::cli::target_flag(&loaded.data_dir, &config.http.socket);
    write!(
        text,
        "
Try, in another terminal:

  blockhouse{at} image import debian rootfs.raw
  blockhouse{at} volume create vm-7 --from image:debian --size 40G
  blockhouse{at} volume attach vm-7

Ctrl-C stops the daemon; nothing that was acknowledged is lost.
"
    )
    .ok();
    text
}

/// Hint for an error of [`run`].
pub fn hint(error: &anyhow::Error) -> Option<String> {
    match error.downcast_ref::<BindError>()? {
        BindError::Tcp { .. } => Some("choose another address: listen in [http] of the settings".to_owned()),
        BindError::Unix { .. } => {
            Some("choose another path, of at most 90 characters: socket in [http]".to_owned())
        }
        BindError::InUse { .. } => {
            Some("stop that daemon first, or give this one a directory of its own with --data".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::{Arc, Barrier};

    fn here() -> String {
        std::thread::current().name().unwrap_or("").to_owned()
    }

    #[test]
    fn threads_are_named_by_what_they_may_do() {
        let runtime = runtime(2).unwrap();
        let (polling, blocking) = runtime.block_on(async {
            // Each waits for the other, so they are on two threads of their kind.
            let gate = Arc::new(tokio::sync::Barrier::new(2));
            let polls: Vec<_> = (0..32)
                .map(|_| {
                    let gate = Arc::clone(&gate);
                    tokio::spawn(async move {
                        gate.wait().await;
                        here()
                    })
                })
                .collect();
            let gate = Arc::new(Barrier::new(2));
            let blocks: Vec<_> = (0..2)
                .map(|_| {
                    let gate = Arc::clone(&gate);
                    tokio::task::spawn_blocking(move || {
                        gate.wait();
                        here()
                    })
                })
                .collect();
            let mut names = (HashSet::new(), HashSet::new());
            for poll in polls {
                names.0.insert(poll.await.unwrap());
            }
            for block in blocks {
                names.1.insert(block.await.unwrap());
            }
            names
        });
        assert!(polling.iter().all(|name| name == "async-0" || name == "async-1"), "{polling:?}");
        assert_eq!(blocking, HashSet::from(["blocking-0".to_owned(), "blocking-1".to_owned()]));
    }
}
