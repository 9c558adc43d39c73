//! Missing blocks in: what many ask for at once is fetched once.
//!
//! Owns: [`Flights`].
//! Does not own: what is fetched, from where, or where it is kept.

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::future::Shared;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use tokio::sync::oneshot;

/// One piece of work for each key, however many ask for it at the same time.
pub struct Flights<K: Eq + Hash, V, E> {
    in_the_air: Arc<Board<K, V, E>>,
}

// Shared, and not a watch: that one wakes its waiters in an order of chance, and a simulation has to be repeatable.
type Board<K, V, E> = Mutex<HashMap<K, Shared<oneshot::Receiver<Result<V, E>>>>>;

/// The work panicked, or the daemon is stopping: there is no result, and asking again starts afresh.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the work was lost before it had a result")]
pub struct Lost;

impl<K: Eq + Hash, V, E> Default for Flights<K, V, E> {
    fn default() -> Self {
        Self { in_the_air: Arc::default() }
    }
}

impl<K: Eq + Hash, V, E> fmt::Debug for Flights<K, V, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").field("in_the_air", &self.len()).finish()
    }
}

impl<K: Eq + Hash, V, E> Flights<K, V, E> {
    /// Keys that are being worked on.
    pub fn len(&self) -> usize {
        self.in_the_air.lock().len()
    }

    /// Whether nothing is being worked on.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K, V, E> Flights<K, V, E>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
    E: Clone + From<Lost> + Send + Sync + 'static,
{
    /// The result of the work for `key`: of what is under way, else of what `make` gives, on a task of its own.
    /// If that task is lost, one of the waiters starts its own.
    ///
    /// # Errors
    /// The work's own, which all get who waited; [`Lost`] if this caller's own work had no result.
    ///
    /// # Cancellation
    /// Safe; the work goes on, for others and for its effects.
    pub async fn join<F>(&self, key: K, make: F) -> Result<V, E>
    where
        F: FnOnce() -> BoxFuture<'static, Result<V, E>>,
    {
        let mut make = Some(make);
        loop {
            let (result, start) = {
                let mut board = self.in_the_air.lock();
                match board.get(&key) {
                    Some(result) => (result.clone(), None),
                    None => {
                        let Some(make) = make.take() else { return Err(Lost.into()) };
                        let (sender, result) = oneshot::channel();
                        let result = result.shared();
                        board.insert(key.clone(), result.clone());
                        let landing = Landing {
                            board: self.in_the_air.clone(),
                            key: key.clone(),
                            sender: Some(sender),
                        };
                        (result, Some((make, landing)))
                    }
                }
            };
            if let Some((make, landing)) = start {
                let work = make();
                tokio::spawn(async move { landing.land(work.await) });
            }
            // Closed without a result: the work was lost, and the next round takes it over.
            if let Ok(result) = result.await {
                return result;
            }
        }
    }
}

/// Takes the key off the board, whatever becomes of the work.
struct Landing<K: Eq + Hash, V, E> {
    board: Arc<Board<K, V, E>>,
    key: K,
    /// Gone once it landed.
    sender: Option<oneshot::Sender<Result<V, E>>>,
}

impl<K: Eq + Hash, V, E> Landing<K, V, E> {
    fn land(mut self, result: Result<V, E>) {
        // Off the board first: who asks from here on wants what holds from here on.
        self.board.lock().remove(&self.key);
        if let Some(sender) = self.sender.take() {
            // Nobody waits any more: the work was for its effects.
            let _gone = sender.send(result).is_err();
        }
    }
}

impl<K: Eq + Hash, V, E> Drop for Landing<K, V, E> {
    fn drop(&mut self) {
        // Only what never landed is still this flight's: a waiter sees the end only when the sender goes, after this.
        if self.sender.is_some() {
            self.board.lock().remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Clone, PartialEq, Eq, Debug)]
    enum Failure {
        Lost,
        Away,
    }

    impl From<Lost> for Failure {
        fn from(Lost: Lost) -> Self {
            Self::Lost
        }
    }

    type Tested = Flights<u32, u32, Failure>;

    fn answer(value: Result<u32, Failure>) -> BoxFuture<'static, Result<u32, Failure>> {
        async move { value }.boxed()
    }

    fn never() -> BoxFuture<'static, Result<u32, Failure>> {
        panic!("started although one is under way")
    }

    #[tokio::test]
    async fn however_many_ask_one_works() {
        let flights = Tested::default();
        let (go, wait) = oneshot::channel::<()>();
        let started = AtomicU32::new(0);
        let mut wait = Some(wait);
        let mut first = Box::pin(flights.join(1, || {
            started.fetch_add(1, Ordering::Relaxed);
            let wait = wait.take().unwrap();
            async move {
                wait.await.unwrap();
                Ok(7)
            }
            .boxed()
        }));
        assert!(first.as_mut().now_or_never().is_none());
        let others = futures::future::join_all((0..100).map(|_| flights.join(1, never)));
        let elsewhere = flights.join(2, || answer(Ok(8))).await;
        assert_eq!(elsewhere, Ok(8));
        let (first, others, ()) = futures::join!(first, others, async { go.send(()).unwrap() });
        assert_eq!((first, started.load(Ordering::Relaxed)), (Ok(7), 1));
        assert!(others.into_iter().all(|result| result == Ok(7)));
        assert!(flights.is_empty());
        assert_eq!(flights.join(1, || answer(Ok(9))).await, Ok(9));
    }

    #[tokio::test]
    async fn a_failure_reaches_all_and_the_next_one_starts_afresh() {
        let flights = Tested::default();
        let (a, b) = futures::join!(flights.join(1, || answer(Err(Failure::Away))), flights.join(1, never));
        assert_eq!((a, b), (Err(Failure::Away), Err(Failure::Away)));
        assert_eq!(flights.join(1, || answer(Ok(1))).await, Ok(1));
    }

    #[tokio::test]
    async fn who_leaves_does_not_end_the_work_for_others() {
        let flights = Tested::default();
        let (go, wait) = oneshot::channel::<()>();
        let mut first = Box::pin(flights.join(1, || {
            async move {
                wait.await.unwrap();
                Ok(7)
            }
            .boxed()
        }));
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = Box::pin(flights.join(1, never));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        go.send(()).unwrap();
        assert_eq!(second.await, Ok(7));
        assert!(flights.is_empty());
    }

    #[tokio::test]
    async fn a_waiter_takes_over_from_work_that_panicked() {
        let flights = Tested::default();
        let (go, wait) = oneshot::channel::<()>();
        let mut first = Box::pin(flights.join(1, || {
            async move {
                wait.await.unwrap();
                panic!("the filler fails")
            }
            .boxed()
        }));
        assert!(first.as_mut().now_or_never().is_none());
        let started = AtomicU32::new(0);
        let waiters = futures::future::join_all((0..10).map(|_| {
            flights.join(1, || {
                started.fetch_add(1, Ordering::Relaxed);
                answer(Ok(8))
            })
        }));
        let mut waiters = Box::pin(waiters);
        assert!(waiters.as_mut().now_or_never().is_none());
        go.send(()).unwrap();
        let results = waiters.await;
        assert!(results.into_iter().all(|result| result == Ok(8)));
        assert_eq!(started.load(Ordering::Relaxed), 1);
        // The one whose own work it was hears of it, if nobody else's is under way.
        assert_eq!(first.await, Err(Failure::Lost));
        assert!(flights.is_empty());
    }

    #[tokio::test]
    async fn work_that_cannot_even_start_leaves_nothing_behind() {
        let flights = Tested::default();
        let failing = std::panic::AssertUnwindSafe(flights.join(1, || panic!("no work")));
        assert!(failing.catch_unwind().await.is_err());
        assert!(flights.is_empty());
        assert_eq!(flights.join(1, || answer(Ok(2))).await, Ok(2));
    }
}
