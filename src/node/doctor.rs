//! What an operator should know before it hurts.
//!
//! Owns: the checks of `doctor`, and how much space there is.
//! Does not own: repairing anything.

use super::Core;
use super::attachments::Entry;
use crate::node::service::{Finding, ServiceError, Space};
use crate::store::s3::Standing;
use crate::store::{GetRange, Key, StoreError};
use crate::volume::catalog::{self, orphans};
use crate::volume::engine::EngineError;
use bytes::Bytes;
use std::time::{Duration, Instant};

/// How long the pool has for one step of the check.
const PROBE_TIME: Duration = Duration::from_secs(10);
/// Open files that a node should be able to have: two for each epoch, one for each client.
const FILES_WANTED: u64 = 16_384;
/// 2025-01-01: a clock before it was never set.
const CLOCK_SANE_MS: u64 = 1_735_689_600_000;

fn finding(level: &str, what: &str, detail: impl Into<String>) -> Finding {
    Finding { level: level.to_owned(), what: what.to_owned(), detail: detail.into() }
}

impl Core {
    /// Looks at everything.
    pub async fn doctor(&self) -> Vec<Finding> {
        let mut all = vec![self.state_finding().await, self.runtime_finding(), self.space_finding().await];
        all.push(self.pool_finding().await);
        all.extend(self.bucket_findings());
        all.push(match self.engine.clock.wall().0 {
            now if now < CLOCK_SANE_MS => {
                finding("problem", "clock", "the clock was never set: start a time service")
            }
            _ => finding("ok", "clock", "plausible"),
        });
        all.push(match rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
            Some(files) if files < FILES_WANTED => finding(
                "warning",
                "open files",
                format!("at most {files}: many volumes and clients need {FILES_WANTED} (LimitNOFILE=)"),
            ),
            _ => finding("ok", "open files", "enough are allowed"),
        });
        all.extend(self.volume_findings());
        all.push(self.orphan_finding().await);
        all
    }

    async fn state_finding(&self) -> Finding {
        let what = "state directory";
        let dir = self.config.state_dir.display();
        let path = crate::disk::DiskPath::state("doctor-probe");
        let disk = &self.engine.disk;
        let started = Instant::now();
        if let Err(error) = disk.write_small(path.clone(), Bytes::from_static(b"probe")).await {
            return finding("problem", what, format!("{dir} cannot be written: {error}"));
        }
        let took = started.elapsed();
        if let Err(error) = disk.remove(path).await {
            return finding("problem", what, format!("nothing can be removed in {dir}: {error}"));
        }
        let state_dir = self.config.state_dir.clone();
        let kind =
            self.engine.offload.run(move || rustix::fs::statfs(&state_dir).map(|found| found.f_type)).await;
        let advice = match kind.ok().and_then(|kind| u64::try_from(kind).ok()) {
            Some(0x0102_1994) => Some("it is on tmpfs: what is acknowledged is lost with the power"),
            Some(0x6969) => {
                Some("it is on NFS: flushes are slow, and locks do not keep a dying process's writes out")
            }
            Some(0x794c_7630) => {
                Some("it is on overlayfs, a container's own layer: it goes with the container")
            }
            Some(0x9123_683e) => {
                Some("it is on btrfs: random writes fragment; `chattr +C` on the empty directory helps")
            }
            _ => None,
        };
        match advice {
            Some(advice) => finding("warning", what, format!("{dir}: {advice}")),
            None => finding("ok", what, format!("{dir}: a durable write took {} ms", took.as_millis())),
        }
    }

    fn runtime_finding(&self) -> Finding {
        if self.runtime_is_tmpfs {
            finding("ok", "runtime directory", "on tmpfs")
        } else {
            finding(
                "warning",
                "runtime directory",
                "not on tmpfs: writes may wait for its disk; give a directory on tmpfs, such as /run/blockhouse",
            )
        }
    }

    async fn space_finding(&self) -> Finding {
        match self.engine.disk.space().await {
            Err(error) => finding("problem", "space", format!("cannot tell how much is free: {error}")),
            Ok((free, total)) => {
                let detail = format!("{} of {} MiB free in the state directory", free >> 20, total >> 20);
                match free {
                    free if free < self.config.engine.reserve_bytes * 2 => {
                        finding("problem", "space", format!("{detail}: writes wait for commits"))
                    }
                    free if free < total / 20 => finding("warning", "space", detail),
                    _ => finding("ok", "space", detail),
                }
            }
        }
    }

    async fn pool_finding(&self) -> Finding {
        let probe = async {
            let text = format!("tmp/probe-{:016x}", self.engine.random());
            let Some(key) = Key::new(text) else { return Err("no key for the probe".to_owned()) };
            let store = &self.engine.store;
            let step = |what: &'static str| move |error: StoreError| format!("{what}: {error}");
            store.put_new(&key, Bytes::from_static(b"probe")).await.map_err(step("write"))?;
            let read = store.get(&key, GetRange::Whole { max_bytes: 64 }).await.map_err(step("read"))?;
            store.delete(&key).await.map_err(step("delete"))?;
            if read.bytes == "probe" {
                Ok(())
            } else {
                Err("read something else than was written".to_owned())
            }
        };
        let started = Instant::now();
        match tokio::time::timeout(PROBE_TIME, probe).await {
            Err(_) => finding("problem", "pool", format!("no answer in {} s", PROBE_TIME.as_secs())),
            Ok(Err(error)) => finding("problem", "pool", error),
            Ok(Ok(())) => {
                let took = started.elapsed().as_millis();
                finding("ok", "pool", format!("write, read and delete took {took} ms"))
            }
        }
    }

    fn bucket_findings(&self) -> Vec<Finding> {
        let Some(s3) = &self.s3 else { return Vec::new() };
        let what = "bucket";
        match s3.standing() {
            Standing::Unproven => vec![finding(
                "problem",
                what,
                "not proven yet, because it did not answer: nothing is changed there until it does",
            )],
            Standing::Refused(reason) => vec![finding("problem", what, reason)],
            Standing::Proven { warnings } if warnings.is_empty() => {
                vec![finding("ok", what, "it keeps conditions, dates and listings")]
            }
            Standing::Proven { warnings } => {
                warnings.into_iter().map(|warning| finding("warning", what, warning)).collect()
            }
        }
    }

    fn volume_findings(&self) -> Vec<Finding> {
        let mut all = Vec::new();
        for (name, entry) in self.table.all() {
            let what = format!("volume {name}");
            match entry {
                Entry::Failed(reason) => all.push(finding("problem", &what, reason)),
                Entry::Recovering => all.push(finding("warning", &what, "being recovered")),
                Entry::Running(running) => {
                    if let Some(reason) = running.volume.stop_reason() {
                        all.push(finding("problem", &what, format!("stopped: {reason}")));
                    }
                }
            }
        }
        if all.is_empty() {
            all.push(finding("ok", "volumes", "all that are attached are served"));
        }
        all
    }

    async fn orphan_finding(&self) -> Finding {
        match tokio::time::timeout(PROBE_TIME, self.orphans()).await {
            Err(_) => finding("warning", "orphans", "cannot be told while the pool does not answer"),
            Ok(Err(error)) => finding("warning", "orphans", error.to_string()),
            Ok(Ok(found)) if found.is_empty() => finding("ok", "orphans", "none"),
            Ok(Ok(found)) => finding(
                "warning",
                "orphans",
                format!(
                    "{} sets of writes are only here and in no history: `blockhouse volume orphans` lists them",
                    found.len()
                ),
            ),
        }
    }

    /// Local epochs that are in no history.
    ///
    /// # Errors
    /// As [`orphans::orphans`].
    pub async fn orphans(&self) -> Result<Vec<orphans::Orphan>, EngineError> {
        let _files = self.table.local_files.write().await;
        orphans::orphans(&self.engine, &self.table.in_use()).await
    }

    /// Space here and in the pool.
    ///
    /// # Errors
    /// The disk or the pool does not tell.
    pub async fn space(&self) -> Result<Space, ServiceError> {
        let (state_free_bytes, state_total_bytes) = self
            .engine
            .disk
            .space()
            .await
            .map_err(|error| EngineError::Disk(format!("cannot tell how much space is free: {error}")))?;
        let cache = self.engine.cache.stats();
        let (mut objects, mut by_kind, mut other) = (0, Vec::new(), 0);
        for folder in ["packs", "maps", "segments", "volumes", "images", "snapshots", "trash"] {
            let listed = catalog::list_folder(&self.engine, folder).await?;
            objects += listed.len() as u64;
            let bytes = listed.iter().map(|listed| listed.object_bytes).sum::<u64>();
            match folder {
                "packs" | "maps" | "segments" => by_kind.push((folder.to_owned(), bytes)),
                _ => other += bytes,
            }
        }
        by_kind.push(("other".to_owned(), other));
        Ok(Space {
            state_free_bytes,
            state_total_bytes,
            cache_used_bytes: cache.used * crate::geometry::BLOCK_BYTES,
            cache_total_bytes: cache.slots * crate::geometry::BLOCK_BYTES,
            dirty_bytes: self.table.running().iter().map(|(_, running)| running.volume.dirty().0).sum(),
            pool_objects: objects,
            pool_bytes: by_kind.iter().map(|(_, bytes)| bytes).sum(),
            pool_bytes_by_kind: by_kind,
        })
    }
}
