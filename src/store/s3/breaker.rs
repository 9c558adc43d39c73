//! Leaves a server alone that does not answer.
//!
//! Owns: when a request may go out, and pauses between tries.
//! Does not own: what counts as no answer.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Failures in a row after which requests are refused here.
const FAILURES_MAX: u32 = 8;
/// The first time that they are.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// The longest such time: a server that is back is found after it.
const PAUSE_MAX: Duration = Duration::from_secs(4);
/// A try whose asker went away without an outcome no longer keeps others from trying.
const TRIAL_MAX: Duration = Duration::from_secs(30);

/// Counts failures in a row of one server.
#[derive(Debug, Default)]
pub struct Breaker {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    since: Instant,
    /// From here on one may try.
    retry_at: Instant,
    pause: Duration,
    why: String,
}

impl Breaker {
    /// Whether a request may go out at `now`.
    ///
    /// # Errors
    /// Why not, for a person.
    pub fn admit(&self, now: Instant) -> Result<(), String> {
        let mut state = self.state.lock();
        let Some(open) = &mut state.open else { return Ok(()) };
        if now < open.retry_at {
            let seconds = now.saturating_duration_since(open.since).as_secs();
            return Err(format!("no answer for {seconds} s: {}", open.why));
        }
        // One tries for all: the others wait for what comes of it.
        open.retry_at = now + TRIAL_MAX;
        Ok(())
    }

    /// The server answered.
    pub fn succeeded(&self) {
        let mut state = self.state.lock();
        state.failures = 0;
        if let Some(open) = state.open.take() {
            log::info!("the S3 server answers again");
            drop(open);
        }
    }

    /// It did not.
    pub fn failed(&self, now: Instant, why: &str) {
        let mut state = self.state.lock();
        state.failures = state.failures.saturating_add(1);
        if state.failures < FAILURES_MAX {
            return;
        }
        let (since, pause) = match &state.open {
            Some(open) => (open.since, (open.pause * 2).min(PAUSE_MAX)),
            None => {
                log::warn!("the S3 server does not answer: {why}");
                (now, PAUSE_MIN)
            }
        };
        state.open = Some(Open { since, retry_at: now + jittered(pause), pause, why: why.to_owned() });
    }
}

/// Pauses that grow, each partly of chance, so that clients that failed together do not come back together.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: Duration::from_millis(25) }
    }
}

impl Backoff {
    /// Waits, if there is time for it until `end`; tells whether there was.
    pub async fn wait(&mut self, end: Instant) -> bool {
        let pause = jittered(self.next);
        self.next = (self.next * 2).min(Duration::from_secs(2));
        if Instant::now() + pause >= end {
            return false;
        }
        tokio::time::sleep(pause).await;
        true
    }
}

/// Between half of `pause` and all of it.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn after_failures_in_a_row_one_tries_at_a_time_and_an_answer_lets_all_in() {
        let breaker = Breaker::default();
        for _ in 1..FAILURES_MAX {
            breaker.failed(Instant::now(), "reset");
            assert_eq!(breaker.admit(Instant::now()), Ok(()));
        }
        breaker.failed(Instant::now(), "reset");
        let refused = breaker.admit(Instant::now()).unwrap_err();
        assert_eq!(refused, "no answer for 0 s: reset");
        for _ in 0..5 {
            tokio::time::advance(PAUSE_MAX).await;
            assert_eq!(breaker.admit(Instant::now()), Ok(()), "one may try");
            assert!(breaker.admit(Instant::now()).is_err(), "but not two");
            breaker.failed(Instant::now(), "still");
        }
        assert_eq!(breaker.admit(Instant::now()).unwrap_err(), "no answer for 20 s: still");
        tokio::time::advance(PAUSE_MAX).await;
        assert_eq!(breaker.admit(Instant::now()), Ok(()));
        tokio::time::advance(TRIAL_MAX).await;
        assert_eq!(breaker.admit(Instant::now()), Ok(()), "the one who tried went away");
        breaker.succeeded();
        for _ in 0..3 {
            assert_eq!(breaker.admit(Instant::now()), Ok(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_backoff_ends_before_its_deadline() {
        let end = Instant::now() + Duration::from_secs(10);
        let mut backoff = Backoff::default();
        let mut tries = 0;
        while backoff.wait(end).await {
            tries += 1;
        }
        assert!((8..40).contains(&tries) && Instant::now() < end, "{tries}");
    }
}
