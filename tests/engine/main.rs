//! What must be shown of the engine, on the real disk: what it costs, and that each case stays fixed.
//!
//! The cases that need a lost power, reordered writes or thousands of interleavings are the simulation's
//! (`tests/sim`); L9, L12, L13 and L14 are shown beside the disk and the clean cache, L6 by the model checker.
#![expect(clippy::disallowed_methods, reason = "a test may wait for a disk or a process")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod cost;
mod disk;
mod local;
mod pool;
mod rig;
mod store;
