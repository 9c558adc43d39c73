//! Blockhouse: one daemon that turns an object store into fast block volumes.
//!
//! ```text
//! guest ─ frontend::nbd ─ block::BlockHandler ─ volume ─ epoch + cache            acknowledged
//!                                                └ destage ─ pack, map ─ store    in the pool
//! operator ─ control::{cli, api} ─ node ─ {frontend, volume, store}
//! ```

pub mod block;
pub mod clock;
pub mod control;
pub mod disk;
pub mod frontend;
pub mod geometry;
pub mod mutant;
pub mod node;
pub mod offload;
pub mod store;
pub mod volume;
