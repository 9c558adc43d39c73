//! The engine: volumes on epochs, a clean cache and a pool. Knows no frontend.

pub mod format;
pub mod ids;
pub mod map;
pub mod pack;
pub mod segment;
pub mod source;
