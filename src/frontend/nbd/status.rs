//! Answers to block status.
//!
//! Owns: what each selected context says of a range, as the protocol's numbers.
//! Does not own: which contexts are selected ([`super::handshake`]) or the layout of replies ([`super::reply`]).

use super::context::{ContextName, ContextSet};
use super::wire::allocation_state;
use super::work;
use crate::block::{BlockError, BlockHandler};
use crate::geometry::ByteRange;

/// A context that a client selected, with what it takes to answer for it.
#[derive(Clone)]
pub enum Context {
    Allocation,
}

/// A stretch of one state; stretches lie end to end from the start of the request on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    pub len_bytes: u64,
    pub state: u32,
}

/// What one context says. There is at least one stretch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    pub context_id: u32,
    pub stretches: Vec<Stretch>,
}

impl From<&ContextName> for Context {
    fn from(name: &ContextName) -> Self {
        match name {
            ContextName::Allocation => Self::Allocation,
        }
    }
}

/// One answer for each of the contexts in `asked`, in the order of their ids.
///
/// # Errors
/// Of the handler; then there is no answer at all.
pub async fn block_status(
    handler: &dyn BlockHandler,
    contexts: &[Context],
    asked: ContextSet,
    range: ByteRange,
    extents_max: usize,
) -> Result<Vec<Status>, BlockError> {
    let mut answers = Vec::with_capacity(asked.count());
    for (context_id, context) in (1..).zip(contexts) {
        if !asked.ids().any(|id| id == context_id) {
            continue;
        }
        let stretches = match context {
            Context::Allocation => {
                let extents = work::block_status(handler, range, extents_max).await?;
                let stretch = |len_bytes, kind| Stretch { len_bytes, state: allocation_state(kind) };
                extents.into_iter().map(|extent| stretch(extent.range.len(), extent.kind)).collect()
            }
        };
        answers.push(Status { context_id, stretches });
    }
    Ok(answers)
}
