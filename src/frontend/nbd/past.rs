//! The past states that one client asked for in its handshake.
//!
//! Owns: finding them, and holding those that were found until requests need them.
//! Does not own: how clients name contexts ([`super::context`]), or what a past state is (the disk's handler).

use super::ExportError;
use super::context::{ContextName, PastStates};
use super::handshake::Purpose;
use super::status::Context;
use super::wire::LIST_MAX;
use crate::block::{BlockHandler, PastState};
use std::sync::Arc;

/// Those that were selected last, by the client's names.
#[derive(Default)]
pub struct Past(Vec<(String, PastState)>);

impl Past {
    /// Names of the past states that are `wanted` and that there are.
    pub async fn find(
        &mut self,
        handler: &dyn BlockHandler,
        wanted: PastStates,
        purpose: Purpose,
    ) -> Result<Vec<String>, ExportError> {
        let unavailable = |error: crate::block::BlockError| ExportError::Unavailable(error.to_string());
        let names = match wanted {
            PastStates::All => return handler.past_states(LIST_MAX).await.map_err(unavailable),
            PastStates::Named(names) => names,
        };
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            if let Some(state) = handler.past_state(&name).await.map_err(unavailable)? {
                found.push((name, state));
            }
        }
        let names = found.iter().map(|(name, _)| name.clone()).collect();
        match purpose {
            Purpose::List => {}
            Purpose::Select => self.0 = found,
        }
        Ok(names)
    }

    /// The context of that name, to be asked about.
    pub fn context(&self, name: &ContextName) -> Context {
        match name {
            ContextName::Allocation => Context::Allocation,
            ContextName::ChangedSince(past) => {
                let known = self.0.iter().find(|(known, _)| known == past);
                // To a state that no handler knows everything has changed.
                Context::ChangedSince(
                    known.map_or_else(|| Arc::new(()) as PastState, |(_, state)| state.clone()),
                )
            }
        }
    }
}
