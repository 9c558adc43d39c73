//! The engine: volumes on epochs, a clean cache and a pool. Knows no frontend.

pub mod cache;
pub mod eviction;
pub mod ids;
pub mod load;
