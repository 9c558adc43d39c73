//! Speaks block protocols; knows no volume.

pub mod nbd;
