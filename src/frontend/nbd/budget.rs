//! How many bytes of clients' data are in memory at one time.
//!
//! Owns: the bound of each connection and of the node, and the promise that no client can starve another: beside
//! what it gets of the node's bytes, each connection has [`OWN_BYTES`] for itself, so a client that takes no
//! replies can slow others down but never stop them. In all at most
//! `node_bytes_max + connections × OWN_BYTES`.
//! Does not own: what the bytes are for (the transmission).

use futures::future::BoxFuture;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// Most bytes that one request has in memory; longer ones are served piece by piece.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// What a connection has for itself when the node's bytes are used up.
pub const OWN_BYTES: usize = 128 * 1024;

const _: () = assert!(
    PIECE_BYTES_MAX.is_power_of_two() && OWN_BYTES.is_power_of_two() && OWN_BYTES >= 4096,
    "pieces of a long write end at multiples of these, which must be whole sectors"
);

/// Bytes shared by all connections.
#[derive(Clone, Debug)]
pub struct NodeBudget {
    bytes: Arc<Semaphore>,
}

impl NodeBudget {
    /// At least one piece, or no long request could ever have a whole one.
    pub fn new(bytes_max: usize) -> Self {
        let bytes = bytes_max.clamp(PIECE_BYTES_MAX, Semaphore::MAX_PERMITS);
        Self { bytes: Arc::new(Semaphore::new(bytes)) }
    }

    /// The share of one connection.
    pub fn connection(&self, bytes_max: usize) -> ConnectionBudget {
        let bytes = bytes_max.clamp(PIECE_BYTES_MAX, Semaphore::MAX_PERMITS);
        ConnectionBudget {
            node: Arc::clone(&self.bytes),
            waiting: None,
            connection: Arc::new(Semaphore::new(bytes)),
            own: Arc::new(Semaphore::new(1)),
        }
    }
}

/// Bytes that one connection may have.
pub struct ConnectionBudget {
    node: Arc<Semaphore>,
    /// A place in the node's queue, for that many bytes.
    waiting: Option<(usize, BoxFuture<'static, Result<OwnedSemaphorePermit, AcquireError>>)>,
    connection: Arc<Semaphore>,
    own: Arc<Semaphore>,
}

/// Bytes that a request may have in memory until this is dropped.
#[derive(Debug)]
pub struct Reservation {
    bytes: usize,
    _held: [Option<OwnedSemaphorePermit>; 2],
}

impl Reservation {
    /// For requests without data.
    pub fn none() -> Self {
        Self { bytes: 0, _held: [None, None] }
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl ConnectionBudget {
    /// Bytes for a request of `wanted` in all: that many, or a power of two that it is to be cut into.
    ///
    /// `Pending` without a wake-up until this connection drops a reservation, when the connection's own bound is
    /// reached; with one when the node's is. A connection that holds nothing always gets something.
    pub fn poll_reserve(&mut self, wanted: usize, cx: &mut Context<'_>) -> Poll<Reservation> {
        if wanted == 0 {
            return Poll::Ready(Reservation::none());
        }
        let bytes = wanted.min(PIECE_BYTES_MAX);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(connection) = Arc::clone(&self.connection).try_acquire_many_owned(permits) else {
            return Poll::Pending;
        };
        if self.waiting.is_none()
            && let Ok(node) = Arc::clone(&self.node).try_acquire_many_owned(permits)
        {
            return Poll::Ready(Reservation { bytes, _held: [Some(connection), Some(node)] });
        }
        if let Ok(own) = Arc::clone(&self.own).try_acquire_owned() {
            // A place in the queue that nobody looks at would keep bytes from the others.
            self.waiting = None;
            return Poll::Ready(Reservation {
                bytes: bytes.min(OWN_BYTES),
                _held: [Some(connection), Some(own)],
            });
        }
        let mut place = match self.waiting.take() {
            Some((waited_for, place)) if waited_for == bytes => place,
            _ => Box::pin(Arc::clone(&self.node).acquire_many_owned(permits)),
        };
        match place.as_mut().poll(cx) {
            Poll::Ready(Ok(node)) => {
                Poll::Ready(Reservation { bytes, _held: [Some(connection), Some(node)] })
            }
            // The semaphore is never closed.
            Poll::Ready(Err(_)) => Poll::Pending,
            Poll::Pending => {
                self.waiting = Some((bytes, place));
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn reserve(budget: &mut ConnectionBudget, wanted: usize) -> Option<Reservation> {
        match budget.poll_reserve(wanted, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(reservation) => Some(reservation),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_connection_stops_at_its_own_bound() {
        let node = NodeBudget::new(64 << 20);
        let mut connection = node.connection(2 << 20);
        let first = reserve(&mut connection, 1 << 20).unwrap();
        let _second = reserve(&mut connection, 32 << 20).unwrap();
        assert!(reserve(&mut connection, 1).is_none());
        assert_eq!(reserve(&mut connection, 0).unwrap().bytes(), 0);
        drop(first);
        assert_eq!(reserve(&mut connection, 4096).unwrap().bytes(), 4096);
    }

    #[test]
    fn a_connection_that_takes_everything_leaves_the_others_their_own_bytes() {
        let node = NodeBudget::new(4 << 20);
        let mut greedy = node.connection(32 << 20);
        let taken: Vec<_> = std::iter::from_fn(|| reserve(&mut greedy, 1 << 20)).collect();
        assert_eq!(taken.iter().map(Reservation::bytes).sum::<usize>(), (4 << 20) + OWN_BYTES);
        let mut modest = node.connection(32 << 20);
        let own = reserve(&mut modest, 1 << 20).unwrap();
        assert_eq!(own.bytes(), OWN_BYTES);
        assert!(reserve(&mut modest, 4096).is_none());
        drop(own);
        assert_eq!(reserve(&mut modest, 4096).unwrap().bytes(), 4096);
    }

    #[test]
    fn a_connection_that_waits_for_the_node_can_still_use_its_own_bytes_when_they_are_free() {
        let node = NodeBudget::new(1 << 20);
        let mut other = node.connection(32 << 20);
        let _all = reserve(&mut other, 1 << 20).unwrap();
        let mut connection = node.connection(32 << 20);
        let own = reserve(&mut connection, 1 << 20).unwrap();
        assert!(reserve(&mut connection, 1 << 20).is_none());
        drop(own);
        assert_eq!(reserve(&mut connection, 1 << 20).unwrap().bytes(), OWN_BYTES);
    }
}
