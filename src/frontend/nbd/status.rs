//! Answers to block status.
//!
//! Owns: what each selected context says of a range, as the protocol's numbers, and refusing answers of a handler that
//! would break the stream.
//! Does not own: which contexts are selected ([`super::handshake`]) or the layout of replies ([`super::reply`]).

use super::context::ContextSet;
use super::wire::{allocation_state, change_state};
use super::work::mismatch;
use crate::block::{BlockError, BlockHandler, PastState};
use crate::geometry::ByteRange;

/// A context that a client selected, with what it takes to answer for it.
#[derive(Clone)]
pub enum Context {
    Allocation,
    ChangedSince(PastState),
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
                let found = handler.extents(range, extents_max).await?;
                let found = found.into_iter().map(|extent| (extent.range, allocation_state(extent.kind)));
                stretches(range, extents_max, found)?
            }
            Context::ChangedSince(past) => {
                let found = handler.changes_since(past, range, extents_max).await?;
                let found = found.into_iter().map(|change| (change.range, change_state(change.kind)));
                stretches(range, extents_max, found)?
            }
        };
        answers.push(Status { context_id, stretches });
    }
    Ok(answers)
}

/// Stretches of `range` from its start on: at least one, end to end, none beyond its end, neighbours different.
fn stretches(
    range: ByteRange,
    extents_max: usize,
    found: impl Iterator<Item = (ByteRange, u32)>,
) -> Result<Vec<Stretch>, BlockError> {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut at_bytes = range.start();
    for (stretch, state) in found {
        if stretch.start() != at_bytes || stretch.is_empty() {
            return Err(mismatch());
        }
        let Some(inside) = stretch.intersect(range) else { break };
        at_bytes = stretch.end();
        let full = stretches.len() == extents_max;
        match stretches.last_mut() {
            Some(last) if last.state == state => last.len_bytes += inside.len(),
            Some(_) | None if full => break,
            Some(_) | None => stretches.push(Stretch { len_bytes: inside.len(), state }),
        }
    }
    if stretches.is_empty() { Err(mismatch()) } else { Ok(stretches) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_the_beginning_of_the_range_once() {
        let range = ByteRange::new(512, 1024);
        let of = |found: &[(u64, u64, u32)], max| {
            let found = found.iter().map(|(start, len, state)| (ByteRange::new(*start, *len), *state));
            stretches(range, max, found)
                .map(|all| all.iter().map(|one| (one.len_bytes, one.state)).collect::<Vec<_>>())
        };
        assert_eq!(of(&[(512, 100, 0), (612, 10, 0), (622, 4096, 3)], 9), Ok(vec![(110, 0), (914, 3)]));
        assert_eq!(of(&[(512, 100, 0), (612, 10, 3), (622, 1, 3), (623, 1, 0)], 1), Ok(vec![(100, 0)]));
        assert_eq!(of(&[(512, 100, 1)], 9), Ok(vec![(100, 1)]));
        for wrong in [&[][..], &[(0, 512, 0)], &[(512, 0, 0)], &[(512, 1, 0), (514, 1, 0)]] {
            assert_eq!(of(wrong, 9), Err(mismatch()));
        }
    }
}
