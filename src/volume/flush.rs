//! Flushes of one volume: one at a time, and whoever comes while one runs waits for the next.
//!
//! Owns: who joins which flush, and what a failed one means for the volume.
//! Does not own: how one epoch is made durable ([`crate::volume::epoch`]).

use crate::block::BlockError;
use crate::mutant::{self, Mutant};
use crate::volume::Volume;
use crate::volume::epoch::FlushError;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::oneshot;

type Asker = oneshot::Sender<Result<(), BlockError>>;

/// Who waits for the flush that runs, and who for the one that has not started.
#[derive(Default)]
pub struct FlushQueue(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    running: bool,
    current: Vec<Asker>,
    waiting: Vec<Asker>,
}

/// Makes everything acknowledged before the call durable.
///
/// # Errors
/// `Stopped` if a sync failed, now or before; `NoSpace` and `Io` if the flush can be tried again.
///
/// # Cancellation
/// The flush goes on.
pub async fn flush(volume: &Arc<Volume>) -> Result<(), BlockError> {
    volume.check_running()?;
    let (asker, answer) = oneshot::channel();
    let idle = {
        let mut queue = volume.flushes.0.lock();
        // Never one that runs: it may have looked at the counts before this call's writes.
        if queue.running && mutant::on(Mutant::JoinRunningFlush) {
            queue.current.push(asker);
        } else {
            queue.waiting.push(asker);
        }
        !std::mem::replace(&mut queue.running, true)
    };
    if idle {
        tokio::spawn(run(volume.clone()));
    }
    answer.await.unwrap_or_else(|_| Err(BlockError::Stopped("the daemon is stopping".into())))
}

async fn run(volume: Arc<Volume>) {
    loop {
        {
            let mut queue = volume.flushes.0.lock();
            queue.current = std::mem::take(&mut queue.waiting);
            if queue.current.is_empty() {
                queue.running = false;
                return;
            }
        }
        let result = flush_epochs(&volume).await;
        let askers = std::mem::take(&mut volume.flushes.0.lock().current);
        for asker in askers {
            // One that has gone away needs no answer.
            let _gone = asker.send(result.clone()).is_err();
        }
    }
}

async fn flush_epochs(volume: &Arc<Volume>) -> Result<(), BlockError> {
    let layers = volume.layers.load_full();
    for epoch in layers.frozen.iter().chain([&layers.active]) {
        match epoch.flush().await {
            Ok(()) => {}
            Err(FlushError::Again(error)) => return Err(BlockError::from_disk(&error)),
            Err(FlushError::Failed(error)) => {
                volume.stop(format!(
                    "a sync of its local data failed ({error}), so what was not yet flushed may be lost"
                ));
            }
        }
        volume.check_running()?;
    }
    Ok(())
}
