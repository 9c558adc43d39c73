//! Which of the `nbd-N` threads look for work, and which may wait for the local disk.
//!
//! Owns: these two counts. As many threads look for work as there are processors, so that the same few, whose buffers are
//! in the processors' caches, do it all; the rest sleep until somebody waits for the disk and nobody is left to look.
//! Does not own: what the work is (`threads`).

use parking_lot::{Condvar, Mutex};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The threads, as a number.
#[derive(Debug)]
pub struct Crew {
    lookers_max: usize,
    lookers: AtomicUsize,
    /// How many more may wait for the disk.
    waits: AtomicUsize,
    asleep: Mutex<Asleep>,
    rouse: Condvar,
}

#[derive(Debug, Default)]
struct Asleep {
    /// Somebody is to get up.
    called: bool,
    is_over: bool,
}

/// What a thread that would look for work does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    Look,
    End,
}

impl Crew {
    /// `lookers_max` of `count` look for work; the others may wait for the disk.
    pub fn new(lookers_max: usize, count: usize) -> Self {
        Self {
            lookers_max,
            lookers: AtomicUsize::new(0),
            waits: AtomicUsize::new(count - lookers_max),
            asleep: Mutex::default(),
            rouse: Condvar::new(),
        }
    }

    /// Returns when the caller is one of those that look for work.
    pub fn turn(&self) -> Turn {
        loop {
            if self.lookers.fetch_add(1, Ordering::SeqCst) < self.lookers_max {
                return Turn::Look;
            }
            self.lookers.fetch_sub(1, Ordering::SeqCst);
            let mut asleep = self.asleep.lock();
            while !asleep.called && !asleep.is_over {
                self.rouse.wait(&mut asleep);
            }
            if asleep.is_over {
                return Turn::End;
            }
            asleep.called = false;
        }
    }

    /// The caller has found some.
    pub fn found(&self) {
        self.lookers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Runs `work`, which may wait for the disk, if one more may. Somebody goes on looking meanwhile.
    pub fn wait<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let take = |free: usize| free.checked_sub(1);
        self.waits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).ok()?;
        let _waiting = Waiting(self);
        if self.lookers.load(Ordering::SeqCst) == 0 {
            let mut asleep = self.asleep.lock();
            asleep.called = true;
            self.rouse.notify_one();
        }
        Some(work())
    }

    /// Nobody sleeps any more.
    pub fn end(&self) {
        self.asleep.lock().is_over = true;
        self.rouse.notify_all();
    }
}

/// One that waits.
struct Waiting<'a>(&'a Crew);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waits.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    #[test]
    fn one_more_looks_when_all_that_looked_wait_and_sleeps_again_when_they_are_back() {
        let crew = Arc::new(Crew::new(1, 3));
        let (say, hear) = mpsc::channel();
        let (answer, go) = mpsc::channel::<()>();
        assert_eq!(crew.turn(), Turn::Look);
        let other = std::thread::spawn({
            let crew = crew.clone();
            move || {
                while crew.turn() == Turn::Look {
                    crew.found();
                    say.send(()).unwrap();
                    go.recv().unwrap();
                }
            }
        });
        assert!(hear.try_recv().is_err(), "one is enough");
        crew.found();
        // Asleep or still on its way there, it looks while this thread waits for it.
        crew.wait(|| hear.recv().unwrap()).unwrap();
        assert_eq!(crew.turn(), Turn::Look);
        answer.send(()).unwrap();
        crew.end();
        other.join().unwrap();
    }

    #[test]
    fn no_more_wait_than_leave_one_for_each_processor() {
        let crew = Crew::new(2, 3);
        assert_eq!(crew.wait(|| crew.wait(|| ())), Some(None));
        assert_eq!(crew.wait(|| ()), Some(()));
    }
}
