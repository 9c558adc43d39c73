//! What an operator talks to: settings, command line, HTTP API and web page.
//!
//! Owns: how a node is asked and how it answers, in words of people and in JSON.
//! Does not own: how anything is done; all of it is written against [`crate::node::service::Service`].

mod activation;
pub mod api;
pub mod cli;
pub mod config;
pub mod connect;
pub mod dashboard;
pub mod logging;
pub mod serve;
pub mod size;
pub mod text;
