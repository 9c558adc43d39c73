//! The engine: volumes on epochs, a clean cache and a pool. Knows no frontend.

pub mod ids;
