//! A server over two disks in memory, one of them read-only, and other people's clients.

use super::TestDisk;
use blockhouse::block::BlockHandler;
use blockhouse::frontend::nbd::{Config, ExportError, ExportListing, Exports, OpenExport, Server};
use blockhouse::geometry::Access;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

pub struct TestExports {
    pub disk: Arc<TestDisk>,
    pub fixed: Arc<TestDisk>,
    pub closed: CancellationToken,
    pub clients: Arc<AtomicUsize>,
}

struct Guard(Arc<AtomicUsize>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait::async_trait]
impl Exports for TestExports {
    async fn list(&self, max: usize) -> Vec<ExportListing> {
        let listing = |name: &str| ExportListing { name: name.into(), description: "for tests".into() };
        ["disk", "fixed"].map(listing).into_iter().take(max).collect()
    }

    async fn open(&self, name: &str) -> Result<OpenExport, ExportError> {
        let handler: Arc<dyn BlockHandler> = match name {
            "" | "disk" => self.disk.clone(),
            "fixed" => self.fixed.clone(),
            "away" => return Err(ExportError::Unavailable("its pool does not answer".into())),
            _ => return Err(ExportError::Unknown),
        };
        self.clients.fetch_add(1, Ordering::SeqCst);
        Ok(OpenExport {
            name: if name.is_empty() { "disk".into() } else { name.into() },
            handler,
            description: "for tests".into(),
            guard: Box::new(Guard(self.clients.clone())),
            closed: self.closed.clone(),
        })
    }
}

pub struct World {
    pub server: Server,
    pub disk: Arc<TestDisk>,
    pub fixed: Arc<TestDisk>,
    pub closed: CancellationToken,
    pub clients: Arc<AtomicUsize>,
    pub dir: tempfile::TempDir,
}

impl World {
    pub async fn serve(config: Config, disk_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            tcp: vec!["127.0.0.1:0".parse().unwrap()],
            unix: Some(dir.path().join("nbd.sock")),
            ..config
        };
        let disk = Arc::new(TestDisk::new(disk_bytes, Access::ReadWrite));
        let fixed = Arc::new(TestDisk::new(disk_bytes, Access::ReadOnly));
        let closed = CancellationToken::new();
        let clients = Arc::new(AtomicUsize::new(0));
        let exports = TestExports {
            disk: disk.clone(),
            fixed: fixed.clone(),
            closed: closed.clone(),
            clients: clients.clone(),
        };
        let server = Server::start(config, Arc::new(exports), CancellationToken::new()).await.unwrap();
        Self { server, disk, fixed, closed, clients, dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    pub fn tcp(&self) -> SocketAddr {
        self.server.tcp_addresses()[0]
    }

    /// Waits until no client holds a disk any more.
    pub async fn all_left(&self) {
        let left = async {
            while self.clients.load(Ordering::SeqCst) > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), left).await.expect("a client's guard is kept");
    }
}

/// Runs a program: whether it was content, and what it said. A machine without it skips that part, continuous
/// integration fails.
pub async fn try_tool(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(Duration::from_secs(120), output).await.expect("the client hangs") {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{program} is missing: {error}");
            eprintln!("skipped: {program} is missing: {error}");
            None
        }
    }
}

/// The same of one that has to be content.
pub async fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    let (success, text) = try_tool(program, arguments).await?;
    assert!(success, "{program} {arguments:?}: {text}");
    Some(text)
}
