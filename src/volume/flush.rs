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
use tokio::sync::watch;

type Outcome = Option<Result<(), BlockError>>;

/// The flush that runs, and the one that has not started.
#[derive(Default)]
pub struct FlushQueue(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    running: Option<watch::Receiver<Outcome>>,
    waiting: Option<watch::Receiver<Outcome>>,
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
    let mut outcome = join(volume);
    match outcome.wait_for(Option::is_some).await {
        Ok(result) => result.clone().unwrap_or(Ok(())),
        Err(_) => Err(BlockError::Stopped("the daemon is stopping".into())),
    }
}

/// Joins a flush that has not started: one that runs may have looked at the counts before this call's writes.
fn join(volume: &Arc<Volume>) -> watch::Receiver<Outcome> {
    let mut queue = volume.flushes.0.lock();
    if mutant::on(Mutant::JoinRunningFlush)
        && let Some(running) = &queue.running
    {
        return running.clone();
    }
    if let Some(waiting) = &queue.waiting {
        return waiting.clone();
    }
    let (sender, receiver) = watch::channel(None);
    if queue.running.is_some() {
        queue.waiting = Some(receiver.clone());
    } else {
        queue.running = Some(receiver.clone());
    }
    let started = queue.waiting.is_none();
    drop(queue);
    if started {
        tokio::spawn(run(volume.clone(), sender));
    } else {
        // Its turn comes when the one that runs is done; whoever asked first keeps the sender until then.
        tokio::spawn(run_after(volume.clone(), sender));
    }
    receiver
}

async fn run_after(volume: Arc<Volume>, sender: watch::Sender<Outcome>) {
    let running = volume.flushes.0.lock().running.clone();
    if let Some(mut running) = running {
        // A closed channel is a flush that is over, too.
        drop(running.wait_for(Option::is_some).await);
    }
    {
        let mut queue = volume.flushes.0.lock();
        queue.running = queue.waiting.take();
    }
    run(volume, sender).await;
}

async fn run(volume: Arc<Volume>, sender: watch::Sender<Outcome>) {
    let result = flush_epochs(&volume).await;
    {
        let mut queue = volume.flushes.0.lock();
        if queue.waiting.is_none() {
            queue.running = None;
        }
    }
    sender.send_replace(Some(result));
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
