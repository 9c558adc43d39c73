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
        self.join_and_keep(key, make, |_| std::future::ready(()).boxed()).await
    }

    /// The same, and who asks while a good result is being kept where it will be looked for gets it from here: between
    /// the end of the work and that nobody starts it again. Nobody waits for the keeping.
    ///
    /// # Errors
    /// As [`Flights::join`].
    ///
    /// # Cancellation
    /// As [`Flights::join`].
    pub async fn join_and_keep<F, G>(&self, key: K, make: F, keep: G) -> Result<V, E>
    where
        F: FnOnce() -> BoxFuture<'static, Result<V, E>>,
        G: FnOnce(V) -> BoxFuture<'static, ()> + Send + 'static,
    {
        let mut make = Some((make, keep));
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
                            is_on_board: true,
                        };
                        (result, Some((make, landing)))
                    }
                }
            };
            if let Some(((make, keep), mut landing)) = start {
                let work = make();
                tokio::spawn(async move {
                    match work.await {
                        Ok(value) => {
                            landing.tell(Ok(value.clone()));
                            keep(value).await;
                        }
                        failed => {
                            // Off the board first: who asks from here on wants what holds from here on.
                            landing.leave();
                            landing.tell(failed);
                        }
                    }
                });
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
    is_on_board: bool,
}

impl<K: Eq + Hash, V, E> Landing<K, V, E> {
    fn tell(&mut self, result: Result<V, E>) {
        if let Some(sender) = self.sender.take() {
            // Nobody waits any more: the work was for its effects.
            let _gone = sender.send(result).is_err();
        }
    }

    fn leave(&mut self) {
        if std::mem::take(&mut self.is_on_board) {
            self.board.lock().remove(&self.key);
        }
    }
}

impl<K: Eq + Hash, V, E> Drop for Landing<K, V, E> {
    fn drop(&mut self) {
        // Before the sender goes: only by that does a waiter see the end of what never landed.
        self.leave();
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
    async fn what_is_being_kept_is_not_fetched_again_and_nobody_waits_for_it() {
        let flights = Tested::default();
        let (go, wait) = oneshot::channel::<()>();
        let keep = |value: u32| {
            assert_eq!(value, 7);
            async move { wait.await.unwrap() }.boxed()
        };
        assert_eq!(flights.join_and_keep(1, || answer(Ok(7)), keep).await, Ok(7));
        for _ in 0..3 {
            assert_eq!(flights.join(1, never).await, Ok(7));
        }
        go.send(()).unwrap();
        while !flights.is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(flights.join(1, || answer(Ok(8))).await, Ok(8));
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
