//! Builds, drains and stops everything on this host.

pub mod service;
