//! What must be shown of the engine, on the real disk: what it costs, and that each case stays fixed.
//!
//! The cases that need a lost power, reordered writes or thousands of interleavings are the simulation's
//! (`tests/sim`); L9, L12 and L13 are shown beside the disk and the clean cache, L6 by the model checker.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod changes;
mod cost;
mod disk;
mod local;
mod pool;
mod rig;
mod store;
