//! Work that computes or waits, off the threads that serve.
//!
//! Owns: where closures run that compress, hash or block.
//! Does not own: local file I/O ([`crate::disk`]) or any policy of how much runs at once.

/// Runs closures off the caller's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// On the runtime's threads for blocking work, named `blocking-N`.
    Threads,
    /// At once, on the caller's thread: for a simulation, which has one.
    Inline,
}

impl Offload {
    /// Runs `work` and resolves to what it returned.
    ///
    /// # Panics
    /// If `work` panicked.
    ///
    /// # Cancellation
    /// Work that has begun goes on.
    pub async fn run<T: Send + 'static>(self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self {
            Self::Inline => work(),
            Self::Threads => match tokio::task::spawn_blocking(work).await {
                Ok(value) => value,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // The runtime is shutting down and dropped the work: so is whoever waits for it.
                    Err(_) => std::future::pending().await,
                },
            },
        }
    }
}
