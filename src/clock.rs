//! The only file that asks the time.
//!
//! Owns: wall-clock time and the monotonic clock behind timers, and how both are written down.
//! Does not own: any policy about how old is too old.

use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970-01-01 00:00 UTC, as they stand in pool objects and answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// Time from `earlier` to `self`; zero if the clock was set back between the two.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Where the time comes from.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clocks.
    System,
    /// The runtime's clock, which a simulation pauses, counted from a fixed date.
    Simulated(tokio::time::Instant),
}

impl Clock {
    /// A clock that starts at a fixed date and moves only with the runtime's own.
    pub fn simulated() -> Self {
        Self::Simulated(tokio::time::Instant::now())
    }

    /// Wall-clock time. For people and for ages that are compared generously; never for ordering.
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the time")]
    pub fn wall(&self) -> UnixMillis {
        match self {
            Self::System => {
                let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                UnixMillis(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
            }
            Self::Simulated(start) => {
                let age = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                UnixMillis(1_800_000_000_000u64.saturating_add(age))
            }
        }
    }

    /// Monotonic time, the one that timers run on.
    pub fn now(&self) -> tokio::time::Instant {
        tokio::time::Instant::now()
    }
}
