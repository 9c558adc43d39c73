//! What the tests ask of a server over disks in memory.

use crate::client::{Client, Mode};
pub use crate::nbd_disk::served::{World, tool, try_tool};
use blockhouse::frontend::nbd::{Config, ExportError, ExportListing, Exports, OpenExport};
use tokio::net::UnixStream;

pub const MIB: u64 = 1 << 20;
pub const DISK_BYTES: u64 = 40 * MIB;

impl World {
    pub async fn start() -> Self {
        Self::start_with(Config::default()).await
    }

    pub async fn start_with(config: Config) -> Self {
        Self::serve(config, DISK_BYTES).await
    }

    pub async fn client(&self, mode: Mode) -> Client<UnixStream> {
        self.client_of("disk", mode).await
    }

    pub async fn client_of(&self, disk: &str, mode: Mode) -> Client<UnixStream> {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        Client::shake_hands(stream, disk, mode).await
    }
}

/// No disks at all.
pub struct NoExports;

#[async_trait::async_trait]
impl Exports for NoExports {
    async fn list(&self, _: usize) -> Vec<ExportListing> {
        Vec::new()
    }

    async fn open(&self, _: &str) -> Result<OpenExport, ExportError> {
        Err(ExportError::Unknown)
    }
}
