//! The volumes that this node serves.
//!
//! Owns: the table of attachments (`attachments.json`, the only source of what is attached at the next start), taking
//! volumes into use and giving them up, one operation a name at a time.
//! Does not own: a volume's data ([`crate::volume`]), or who connects to it ([`super::exports`]).

use super::Core;
use super::meter::{Meter, Metered};
use crate::disk::{Disk, DiskPath};
use crate::node::service::{Done, Refusal, ServiceError};
use crate::volume::attach::attach;
use crate::volume::catalog::orphans::InUse;
use crate::volume::catalog::read_volume;
use crate::volume::destage::{DestagerHandle, Request};
use crate::volume::engine::EngineError;
use crate::volume::ids::Uid;
use crate::volume::{Volume, VolumeHandler};
use anyhow::Context as _;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, OwnedMutexGuard, RwLock};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Volumes that are recovered at once after a start.
const RECOVERIES_AT_ONCE: usize = 4;
/// How long clients of a volume that is detached have to take their last answers.
const LEAVE_TIME: Duration = Duration::from_secs(5);
const TABLE_BYTES_MAX: u64 = 16 << 20;
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// A volume that is served.
pub struct Running {
    pub uid: Uid,
    pub volume: Arc<Volume>,
    pub destager: DestagerHandle,
    pub meter: Arc<Meter>,
    pub handler: Arc<Metered<VolumeHandler>>,
    /// Ends all connections to it; a new one each time it is offered.
    door: Mutex<Option<CancellationToken>>,
    clients: TaskTracker,
}

impl Running {
    /// The token and guard of a new client, unless the volume is being withdrawn.
    pub fn admit(&self) -> Option<(CancellationToken, tokio_util::task::task_tracker::TaskTrackerToken)> {
        let door = self.door.lock();
        door.as_ref().map(|closed| (closed.clone(), self.clients.token()))
    }

    fn offer(&self) {
        *self.door.lock() = Some(CancellationToken::new());
        self.clients.reopen();
    }

    /// Takes no clients any more, and waits a while until those that are there have left.
    async fn withdraw(&self) {
        if let Some(door) = self.door.lock().take() {
            door.cancel();
        }
        self.clients.close();
        if tokio::time::timeout(LEAVE_TIME, self.clients.wait()).await.is_err() {
            log::warn!(volume = self.uid.to_string().as_str(); "clients of a volume that is detached do not leave");
        }
    }
}

/// What has become of an entry of the table.
#[derive(Clone)]
pub enum Entry {
    /// It will be served as soon as it is recovered.
    Recovering,
    Running(Arc<Running>),
    /// It could not be attached.
    Failed(String),
}

struct Row {
    uid: Uid,
    entry: Entry,
}

/// The table.
#[derive(Default)]
pub struct Table {
    rows: Mutex<BTreeMap<String, Row>>,
    changes: Notify,
    /// Held while the file is written.
    writing: tokio::sync::Mutex<()>,
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Read while epoch files of a volume are taken into use, written while orphans are looked at.
    pub local_files: RwLock<()>,
}

#[derive(Serialize, Deserialize)]
struct TableFile {
    volumes: Vec<FileRow>,
}

#[derive(Serialize, Deserialize)]
struct FileRow {
    name: String,
    uid: Uid,
}

impl Table {
    fn path() -> DiskPath {
        DiskPath::state("attachments.json")
    }

    /// Reads what was attached when the last run ended.
    ///
    /// # Errors
    /// It is damaged, or cannot be read.
    pub async fn read(disk: &dyn Disk) -> anyhow::Result<Self> {
        let file = match disk.read_small(Self::path(), TABLE_BYTES_MAX).await {
            Ok(bytes) => serde_json::from_slice::<TableFile>(&bytes)
                .context("attachments.json of the state directory is damaged")?,
            Err(error) if error.kind() == ErrorKind::NotFound => TableFile { volumes: Vec::new() },
            Err(error) => {
                return Err(error).context("failed to read attachments.json of the state directory");
            }
        };
        let table = Self::default();
        table.rows.lock().extend(
            file.volumes.into_iter().map(|row| (row.name, Row { uid: row.uid, entry: Entry::Recovering })),
        );
        Ok(table)
    }

    async fn write(&self, disk: &dyn Disk) -> Result<(), ServiceError> {
        let _turn = self.writing.lock().await;
        let volumes =
            self.rows.lock().iter().map(|(name, row)| FileRow { name: name.clone(), uid: row.uid }).collect();
        let bytes = serde_json::to_vec_pretty(&TableFile { volumes }).unwrap_or_default();
        disk.write_small(Self::path(), Bytes::from(bytes)).await.map_err(|error| {
            ServiceError::new(Refusal::Internal, format!("failed to write attachments.json: {error}"))
        })
    }

    /// Holds a name: one operation at a time.
    pub async fn turn(&self, name: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock();
            if turns.len() > 1000 {
                turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            }
            turns.entry(name.to_owned()).or_default().clone()
        };
        turn.lock_owned().await
    }

    /// What has become of a volume that is to be served here.
    pub fn get(&self, name: &str) -> Option<Entry> {
        self.rows.lock().get(name).map(|row| row.entry.clone())
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<(String, Entry)> {
        self.rows.lock().iter().map(|(name, row)| (name.clone(), row.entry.clone())).collect()
    }

    /// Those that are served.
    pub fn running(&self) -> Vec<(String, Arc<Running>)> {
        let running = |(name, entry)| match entry {
            Entry::Running(running) => Some((name, running)),
            Entry::Recovering | Entry::Failed(_) => None,
        };
        self.all().into_iter().filter_map(running).collect()
    }

    /// Volumes whose local files are, or are about to be, in use.
    pub fn in_use(&self) -> Vec<InUse> {
        let in_use = |row: &Row| match &row.entry {
            Entry::Running(running) => Some(InUse { uid: row.uid, term: Some(running.volume.term()) }),
            Entry::Recovering => Some(InUse { uid: row.uid, term: None }),
            Entry::Failed(_) => None,
        };
        self.rows.lock().values().filter_map(in_use).collect()
    }

    fn name_of(&self, uid: &Uid) -> Option<String> {
        self.rows.lock().iter().find(|(_, row)| row.uid == *uid).map(|(name, _)| name.clone())
    }

    fn set(&self, name: &str, entry: Entry) {
        if let Some(row) = self.rows.lock().get_mut(name) {
            row.entry = entry;
        }
        self.changes.notify_waiters();
    }

    /// Resolves when every row has been recovered or has failed.
    pub async fn settled(&self) {
        loop {
            let changed = self.changes.notified();
            tokio::pin!(changed);
            // Heard from here on, so that a change after the look is not missed.
            changed.as_mut().enable();
            if !self.rows.lock().values().any(|row| matches!(row.entry, Entry::Recovering)) {
                return;
            }
            changed.await;
        }
    }

    fn uid(&self, name: &str) -> Option<Uid> {
        self.rows.lock().get(name).map(|row| row.uid)
    }
}

impl Core {
    /// Takes what was attached when the last run ended into use again.
    pub async fn recover_all(self: Arc<Self>) {
        let names: Vec<String> = self.table.all().into_iter().map(|(name, _)| name).collect();
        let stopping = self.stopping.clone();
        let work = stream::iter(names).for_each_concurrent(RECOVERIES_AT_ONCE, move |name| {
            let core = self.clone();
            async move {
                if core.recover_one(&name).await == Recovered::Later {
                    tokio::spawn(core.recover_later(name));
                }
            }
        });
        // A recovery that is cut short is a crash, which the next one is made for.
        let _stopped = stopping.run_until_cancelled(work).await;
    }

    async fn recover_later(self: Arc<Self>, name: String) {
        let mut pause = RETRY_FIRST;
        let stopping = self.stopping.clone();
        let work = async {
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
                if self.recover_one(&name).await == Recovered::Definitely {
                    return;
                }
            }
        };
        let _stopped = stopping.run_until_cancelled(work).await;
    }

    async fn recover_one(&self, name: &str) -> Recovered {
        let _turn = self.table.turn(name).await;
        let Some(uid) = self.table.uid(name) else { return Recovered::Definitely };
        if let Some(Entry::Running(_)) = self.table.get(name) {
            return Recovered::Definitely;
        }
        match self.take(name, Some(uid)).await {
            Ok(running) => {
                log::info!(volume = name; "attached again");
                self.table.set(name, Entry::Running(running));
                Recovered::Definitely
            }
            Err(error) => {
                log::error!(volume = name; "cannot be attached again: {error}");
                let later = matches!(error, EngineError::Unavailable(_) | EngineError::Unclear(_));
                self.table.set(name, Entry::Failed(error.to_string()));
                if later { Recovered::Later } else { Recovered::Definitely }
            }
        }
    }

    /// Takes a volume into use. The caller has its turn.
    async fn take(&self, name: &str, uid: Option<Uid>) -> Result<Arc<Running>, EngineError> {
        let (head, _) = read_volume(&self.engine, name).await?;
        if uid.is_some_and(|uid| uid != head.uid) {
            return Err(EngineError::Conflict(format!(
                "the volume {name} that was attached here is gone, and another one has its name"
            )));
        }
        let _files = self.table.local_files.read().await;
        let attached = attach(&self.engine, name).await?;
        let meter = Arc::new(Meter::new(name));
        let handler = Metered { inner: VolumeHandler(attached.volume.clone()), meter: meter.clone() };
        let running = Running {
            uid: attached.volume.uid(),
            volume: attached.volume,
            destager: attached.destager,
            meter,
            handler: Arc::new(handler),
            door: Mutex::new(Some(CancellationToken::new())),
            clients: TaskTracker::new(),
        };
        if running.uid != head.uid {
            running.destager.abandon().await;
            return Err(EngineError::Conflict(format!("volume {name} was made anew meanwhile")));
        }
        Ok(Arc::new(running))
    }

    /// Attaches a volume.
    ///
    /// # Errors
    /// Why not; it is then not attached.
    pub async fn attach(&self, name: &str) -> Result<Done<Arc<Running>>, ServiceError> {
        let _turn = self.table.turn(name).await;
        let listed = match self.table.get(name) {
            Some(Entry::Running(running)) if running.volume.stop_reason().is_none() => {
                return Ok(Done::Already(running));
            }
            Some(Entry::Running(running)) => {
                running.withdraw().await;
                running.destager.abandon().await;
                true
            }
            Some(Entry::Recovering | Entry::Failed(_)) => true,
            None => false,
        };
        let (head, _) = read_volume(&self.engine, name).await?;
        match self.table.name_of(&head.uid) {
            Some(other) if other != name => {
                return Err(ServiceError::new(
                    Refusal::Conflict,
                    format!("volume {name} is the one that is attached as {other}"),
                ));
            }
            _ => {}
        }
        if !listed {
            // In the table before the head is swapped: after a crash nothing is owned that is not served again.
            let row = Row { uid: head.uid, entry: Entry::Recovering };
            self.table.rows.lock().insert(name.to_owned(), row);
            if let Err(error) = self.table.write(&*self.engine.disk).await {
                self.table.rows.lock().remove(name);
                return Err(error);
            }
        }
        match self.take(name, self.table.uid(name)).await {
            Ok(running) => {
                self.table.set(name, Entry::Running(running.clone()));
                Ok(Done::Now(running))
            }
            Err(error) if listed => {
                self.table.set(name, Entry::Failed(error.to_string()));
                Err(error.into())
            }
            Err(error) => {
                self.drop_row(name).await;
                Err(error.into())
            }
        }
    }

    async fn drop_row(&self, name: &str) {
        self.table.rows.lock().remove(name);
        if let Err(error) = self.table.write(&*self.engine.disk).await {
            log::warn!(volume = name; "stays in the table of attachments, and is attached at the next start: {error}");
        }
    }

    /// Commits a volume and gives it up.
    ///
    /// # Errors
    /// Why not; it is then attached and served as before.
    pub async fn detach(&self, name: &str) -> Result<(), ServiceError> {
        let _turn = self.table.turn(name).await;
        let running = match self.table.get(name) {
            Some(Entry::Running(running)) => running,
            Some(Entry::Recovering) => {
                return Err(ServiceError::new(
                    Refusal::Unavailable,
                    format!("volume {name} is being recovered"),
                ));
            }
            Some(Entry::Failed(reason)) => {
                return Err(ServiceError::new(
                    Refusal::Conflict,
                    format!("volume {name} may have writes here that are not in the pool: {reason}"),
                )
                .hint(format!(
                    "`blockhouse volume attach {name}` tries again; `blockhouse volume detach --keep-local {name}` \
                     leaves them here"
                )));
            }
            None => return self.check_not_attached(name).await,
        };
        running.withdraw().await;
        match running.destager.ask(|reply| Request::Release { reply }).await {
            Ok(()) => {
                self.drop_row(name).await;
                Ok(())
            }
            Err(error) => {
                running.offer();
                Err(super::answers::refusal(error)
                    .hint(format!("it stays attached; `blockhouse volume detach --keep-local {name}` gives it up without the pool")))
            }
        }
    }

    async fn check_not_attached(&self, name: &str) -> Result<(), ServiceError> {
        let (head, _) = read_volume(&self.engine, name).await?;
        match head.owner {
            None => Ok(()),
            Some(owner) if owner.node == self.engine.identity.node => Err(ServiceError::new(
                Refusal::Conflict,
                format!("volume {name} was given up here with writes that are not in the pool"),
            )
            .hint(format!("`blockhouse volume attach {name}`, then detach it"))),
            Some(owner) => Err(ServiceError::new(
                Refusal::Conflict,
                format!("volume {name} is attached on node {}", owner.node),
            )),
        }
    }

    /// Gives a volume up without the pool: what is not committed stays here, and the volume stays this node's.
    ///
    /// # Errors
    /// It is not attached here.
    pub async fn detach_keeping(&self, name: &str) -> Result<(), ServiceError> {
        let _turn = self.table.turn(name).await;
        match self.table.get(name) {
            None => return self.check_not_attached(name).await,
            Some(Entry::Running(running)) => {
                running.withdraw().await;
                running.destager.abandon().await;
            }
            Some(Entry::Recovering | Entry::Failed(_)) => {}
        }
        self.drop_row(name).await;
        Ok(())
    }

    /// Makes a volume smaller that is not attached: it is taken into use for as long as that takes.
    ///
    /// # Errors
    /// Why not.
    pub async fn shrink_detached(&self, name: &str, size_bytes: u64) -> Result<(), ServiceError> {
        let running = self.take(name, None).await?;
        let result = running.destager.ask(|reply| Request::Resize { size_bytes, reply }).await;
        let released = running.destager.ask(|reply| Request::Release { reply }).await;
        if released.is_err() {
            running.destager.abandon().await;
        }
        result?;
        Ok(released?)
    }
}

/// Whether a recovery is worth trying again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Recovered {
    Definitely,
    Later,
}
