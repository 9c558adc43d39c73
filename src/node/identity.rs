//! Who this node is: the lock of its state directory, its ids, its runs.
//!
//! Owns: `lock` and `node.json` of the state directory, and that a new run is written down before it is used.
//! Does not own: what the ids are good for.

use crate::disk::{Disk, DiskPath};
use crate::volume::engine::Identity;
use crate::volume::ids::{Incarnation, NodeId, PoolId};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Runs that are remembered.
const INCARNATIONS_MAX: usize = 1000;
const NODE_FILE_BYTES_MAX: u64 = 256 * 1024;

/// Holds the state directory for this process.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes it, and makes the directory if it is not there. Blocks, but does not wait for another holder.
    ///
    /// # Errors
    /// Another daemon has it.
    #[expect(clippy::disallowed_methods, reason = "before anything is served, and never waits")]
    pub fn take(state_dir: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .with_context(|| format!("failed to make the state directory {}", state_dir.display()))?;
        let path = state_dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("failed to open {}", path.display()))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(error) if std::io::Error::from(error).kind() == ErrorKind::WouldBlock => {
                let mut holder = String::new();
                // Only for the message: a holder that has not written its number yet is one without.
                drop(std::io::Read::by_ref(&mut file).take(32).read_to_string(&mut holder));
                let holder = match holder.trim() {
                    "" => "another daemon".to_owned(),
                    pid => format!("another daemon, process {pid},"),
                };
                bail!(
                    "{holder} uses the state directory {}: stop it, or give this one its own",
                    state_dir.display()
                );
            }
            Err(error) => {
                return Err(error).with_context(|| format!("failed to lock {}", path.display()));
            }
        }
        file.set_len(0)
            .and_then(|()| file.write_all(std::process::id().to_string().as_bytes()))
            .with_context(|| format!("failed to write {}", path.display()))?;
        Ok(Self { _file: file })
    }
}

/// `node.json`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeFile {
    node: NodeId,
    pool: PoolId,
    /// Every run, oldest first.
    incarnations: Vec<Incarnation>,
}

impl NodeFile {
    fn path() -> DiskPath {
        DiskPath::state("node.json")
    }

    /// Reads it; `None` in a new state directory.
    ///
    /// # Errors
    /// It is damaged, or cannot be read.
    pub async fn read(disk: &dyn Disk) -> anyhow::Result<Option<Self>> {
        let bytes = match disk.read_small(Self::path(), NODE_FILE_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("failed to read node.json of the state directory"),
        };
        let file = serde_json::from_slice(&bytes).context("node.json of the state directory is damaged")?;
        Ok(Some(file))
    }

    /// A new node of `pool`.
    pub fn new(pool: PoolId) -> Self {
        Self { node: NodeId(rand::random()), pool, incarnations: Vec::new() }
    }

    /// The pool that this state directory belongs to.
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    /// Refuses another pool than this state directory's own.
    ///
    /// # Errors
    /// It is another one.
    pub fn check_pool(&self, pool: PoolId) -> anyhow::Result<()> {
        if self.pool != pool {
            bail!(
                "the state directory belongs to pool {}, and this is pool {pool}: give each pool its own state directory",
                self.pool
            );
        }
        Ok(())
    }

    /// Begins a run: it is in the file before it is used.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn begin(mut self, disk: &dyn Disk) -> anyhow::Result<Identity> {
        let incarnation = Incarnation(rand::random());
        self.incarnations.push(incarnation);
        let extra = self.incarnations.len().saturating_sub(INCARNATIONS_MAX);
        self.incarnations.drain(..extra);
        let bytes = serde_json::to_vec_pretty(&self).context("failed to write node.json")?;
        disk.write_small(Self::path(), Bytes::from(bytes))
            .await
            .context("failed to write node.json of the state directory")?;
        Ok(Identity { pool: self.pool, node: self.node, incarnation, ours: self.incarnations })
    }
}
