//! The `nbd-N` threads: plain sockets, served without a runtime between them and the kernel.
//!
//! ```text
//! epoll (one, of all threads, one shot a connection) ─▶ any free thread ─▶ Transmission::poll ─▶ armed again
//! wakers of what was waited for ─▶ queue + eventfd ────▶     "                   │
//!                                                              the client is gone └─▶ Finished, to the task that waits
//! ```
//! Owns: which thread serves which connection when, the spin after a reply, and the end of the threads.
//! Does not own: the protocol ([`super::transmission`]) or what a connection was before and is after (`connection`).
//!
//! Any thread serves any connection, one thread at a time: a thread that waits for the local disk with a write in its
//! hands keeps only that client waiting. There are more threads than processors for this, and no more of them than
//! [`Crew`] says wait at a time.

use super::connection::ConnectionError;
use super::crew::{Crew, Turn};
use super::scratch::Scratch;
use super::transmission::{Ended, Transmission};
use super::transport::{Cause, PlainSocket};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// How long a thread looks for the next request itself, after a reply to a client that waits for each.
const SPIN: Duration = Duration::from_micros(50);
/// Only a connection that alone was active for so long is spun for.
const ALONE: Duration = Duration::from_millis(2);
/// A client that asks again later than this after a reply is not spun for.
const PROMPT: Duration = Duration::from_micros(100);
/// Looks at the socket between two looks at the clock.
const LOOKS: u32 = 8;

/// `epoll` data of the two descriptors that are no connections.
const KICK: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;

/// The threads. Dropped, they end; connections that are left are closed.
pub struct Threads {
    core: Arc<Core>,
}

/// What a connection came to.
pub struct Finished {
    pub result: Result<(), ConnectionError>,
    pub ended: Ended<PlainSocket>,
}

struct Core {
    epoll: OwnedFd,
    /// Readable once: there is something in the queue.
    kick: OwnedFd,
    /// Readable from the end on.
    stop: OwnedFd,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    next_id: AtomicU64,
    /// Woken by something else than their sockets.
    queue: Mutex<VecDeque<Arc<Connection>>>,
    crew: Arc<Crew>,
    /// One connection at a time is spun for, and only where another processor can run the client meanwhile.
    may_spin: bool,
    /// The connection polled last, and when it was first so without another in between, in ns since `began`.
    last_id: AtomicU64,
    alone_since_ns: AtomicU64,
    began: Instant,
}

/// [`Connection::state`]: a thread has it, or it lies in the queue.
const TAKEN: u8 = 1;
/// [`Connection::state`]: its waker was used since it was last polled.
const WOKEN: u8 = 2;
/// [`Connection::state`]: its socket was ready while a thread had it.
const READY: u8 = 4;

struct Connection {
    id: u64,
    core: std::sync::Weak<Core>,
    state: AtomicU8,
    aborted: AtomicBool,
    /// Gone once it has ended. Locked by whoever has taken it.
    body: Mutex<Option<Body>>,
}

struct Body {
    transmission: Transmission<PlainSocket>,
    finished: oneshot::Sender<Finished>,
    habit: Habit,
}

/// Whether a client is worth a spin.
#[derive(Default)]
struct Habit {
    answered: Option<Instant>,
    is_prompt: bool,
}

impl Threads {
    /// Starts `count` threads, at least two, of which all but `serving` may wait for the local disk at a time.
    ///
    /// # Errors
    /// No descriptors, or no threads.
    pub fn start(serving: usize, count: usize) -> io::Result<Self> {
        let count = count.max(2);
        let serving = serving.clamp(1, count - 1);
        let core = Arc::new(Core {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            connections: Mutex::default(),
            next_id: AtomicU64::new(0),
            queue: Mutex::default(),
            crew: Arc::new(Crew::new(serving, count)),
            may_spin: serving > 1,
            last_id: AtomicU64::new(u64::MAX),
            alone_since_ns: AtomicU64::new(0),
            began: Instant::now(),
        });
        let data = epoll::EventData::new_u64;
        epoll::add(&core.epoll, &core.kick, data(KICK), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        epoll::add(&core.epoll, &core.stop, data(STOP), epoll::EventFlags::IN)?;
        // Made before its threads: if one cannot be started, the others end.
        let threads = Self { core };
        let runtime = Handle::current();
        for index in 0..count {
            let (core, runtime) = (threads.core.clone(), runtime.clone());
            std::thread::Builder::new().name(format!("nbd-{index}")).spawn(move || {
                // What a request waits for lives in the runtime.
                let _runtime = runtime.enter();
                core.run();
            })?;
        }
        Ok(threads)
    }

    /// Leave for those who poll here to wait for the local disk.
    pub fn crew(&self) -> Arc<Crew> {
        self.core.crew.clone()
    }

    /// Serves a client to its end.
    ///
    /// # Errors
    /// The socket cannot be watched, or the threads are ending.
    ///
    /// # Cancellation
    /// Closes the socket.
    pub async fn serve(&self, transmission: Transmission<PlainSocket>) -> io::Result<Finished> {
        let (finished, end) = oneshot::channel();
        let id = self.core.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            core: Arc::downgrade(&self.core),
            state: AtomicU8::new(0),
            aborted: AtomicBool::new(false),
            body: Mutex::new(None),
        });
        // Nothing is armed yet: the first poll is asked for by the waker below.
        let data = epoll::EventData::new_u64(id);
        epoll::add(&self.core.epoll, transmission.transport(), data, epoll::EventFlags::ONESHOT)?;
        *connection.body.lock() = Some(Body { transmission, finished, habit: Habit::default() });
        self.core.connections.lock().insert(id, connection.clone());
        let mut guard = Guard { connection: Some(connection.clone()) };
        connection.wake();
        let result = end.await.map_err(|_| io::Error::other("the threads of the NBD server have ended"));
        guard.connection = None;
        result
    }
}

/// Ends a connection that nobody waits for any more.
struct Guard {
    connection: Option<Arc<Connection>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.aborted.store(true, Ordering::SeqCst);
            connection.wake();
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let left: Vec<_> = self.core.connections.lock().values().cloned().collect();
        for connection in left {
            connection.aborted.store(true, Ordering::SeqCst);
            connection.wake();
        }
        signal(&self.core.stop);
        self.core.crew.end();
    }
}

impl Wake for Connection {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.fetch_or(TAKEN | WOKEN, Ordering::SeqCst) & TAKEN == 0
            && let Some(core) = self.core.upgrade()
        {
            core.queue.lock().push_back(self.clone());
            signal(&core.kick);
        }
    }
}

/// Makes an eventfd readable.
fn signal(eventfd: &OwnedFd) {
    match rustix::io::write(eventfd, &1_u64.to_ne_bytes()) {
        // A full counter is readable already.
        Ok(_) | Err(Errno::AGAIN) => {}
        Err(error) => log::error!("the threads of the NBD server cannot be woken: {error}"),
    }
}

impl Core {
    fn run(self: &Arc<Self>) {
        let mut scratch = Scratch::default();
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        while self.crew.turn() == Turn::Look {
            // One at a time: what is behind it must not wait for it.
            let found = epoll::wait(&self.epoll, &mut events, None);
            self.crew.found();
            match found {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => {
                    log::error!("the NBD server cannot wait for its clients: {error}");
                    return;
                }
            }
            match events[0].data.u64() {
                STOP => return self.end_queue(),
                KICK => self.run_queue(&mut scratch),
                id => {
                    let connection = self.connections.lock().get(&id).cloned();
                    if let Some(connection) = connection
                        && connection.state.fetch_or(TAKEN | READY, Ordering::SeqCst) & TAKEN == 0
                    {
                        self.serve(&connection, &mut scratch);
                    }
                    // Sockets that are always ready must not keep those waiting that were woken.
                    self.run_queue(&mut scratch);
                }
            }
        }
    }

    fn run_queue(self: &Arc<Self>, scratch: &mut Scratch) {
        let connection = {
            let mut queue = self.queue.lock();
            let connection = queue.pop_front();
            if !queue.is_empty() {
                // Others take what is behind it, and sockets that are ready have their turn in between.
                signal(&self.kick);
            }
            connection
        };
        if let Some(connection) = connection {
            self.serve(&connection, scratch);
        }
    }

    /// Ends what is left, which nobody waits for.
    fn end_queue(self: &Arc<Self>) {
        while let Some(connection) = self.queue.lock().pop_front() {
            self.close(&connection, connection.body.lock().take());
        }
    }

    /// Forgets a connection and its socket.
    fn close(&self, connection: &Connection, body: Option<Body>) -> Option<Body> {
        self.connections.lock().remove(&connection.id);
        let body = body?;
        // It may live on outside, with its descriptor: no events of it from here on.
        if let Err(error) = epoll::delete(&self.epoll, body.transmission.transport()) {
            log::warn!("an NBD client's socket stays watched: {error}");
        }
        Some(body)
    }

    /// Polls a connection that this thread has taken, until there is nothing to do for it.
    fn serve(self: &Arc<Self>, connection: &Arc<Connection>, scratch: &mut Scratch) {
        let waker = Waker::from(connection.clone());
        let mut cx = Context::from_waker(&waker);
        let mut slot = connection.body.lock();
        let Some(body) = slot.as_mut() else { return };
        self.note_active(connection.id);
        body.transmission.resume(scratch);
        let outcome = loop {
            let state = connection.state.fetch_and(TAKEN, Ordering::SeqCst);
            if connection.aborted.load(Ordering::SeqCst) {
                break None;
            }
            let cause = if state & WOKEN == 0 { Cause::Stream } else { Cause::Woken };
            // A bug in what one client asks for must not take the thread from the others.
            let poll = AssertUnwindSafe(|| body.poll(&mut cx, scratch, cause, || self.is_alone(connection)));
            match catch_unwind(poll) {
                Ok(Poll::Ready(result)) => break Some(result),
                Ok(Poll::Pending) => {}
                Err(_) => break Some(Err(ConnectionError::Bug)),
            }
            let yields = body.transmission.take_yielded();
            if !yields && connection.state.load(Ordering::SeqCst) != TAKEN {
                continue;
            }
            body.transmission.suspend(scratch);
            if yields {
                // Taken by nobody but the queue: behind all who wait already.
                self.queue.lock().push_back(connection.clone());
                signal(&self.kick);
                return;
            }
            // Armed while this thread still has it: nobody else arms it for something older.
            if let Err(error) = self.arm(connection.id, &body.transmission) {
                body.transmission.resume(scratch);
                break Some(Err(error.into()));
            }
            if connection.state.compare_exchange(TAKEN, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                return;
            }
            body.transmission.resume(scratch);
        };
        body.transmission.suspend(scratch);
        if let Some(body) = self.close(connection, slot.take())
            && let Some(result) = outcome
        {
            // Nobody may wait for it any more.
            drop(body.finished.send(Finished { result, ended: body.transmission.end() }));
        }
    }

    fn arm(&self, id: u64, transmission: &Transmission<PlainSocket>) -> io::Result<()> {
        let interest = transmission.interest();
        let mut flags = epoll::EventFlags::ONESHOT;
        flags.set(epoll::EventFlags::IN, interest.receive);
        flags.set(epoll::EventFlags::OUT, interest.send);
        if !interest.receive && !interest.send {
            return Ok(());
        }
        Ok(epoll::modify(&self.epoll, transmission.transport(), epoll::EventData::new_u64(id), flags)?)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn note_active(&self, id: u64) {
        if self.may_spin && self.last_id.swap(id, Ordering::Relaxed) != id {
            self.alone_since_ns.store(self.now_ns(), Ordering::Relaxed);
        }
    }

    /// Whether no other connection was active lately.
    fn is_alone(&self, connection: &Connection) -> bool {
        let alone_ns = u64::try_from(ALONE.as_nanos()).unwrap_or(u64::MAX);
        self.may_spin
            && self.last_id.load(Ordering::Relaxed) == connection.id
            && self.now_ns().saturating_sub(self.alone_since_ns.load(Ordering::Relaxed)) > alone_ns
            && connection.state.load(Ordering::SeqCst) == TAKEN
    }
}

impl Body {
    /// Polls until there is nothing to do, and looks for the next request a little longer where that pays.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        mut cause: Cause,
        is_alone: impl Fn() -> bool,
    ) -> Poll<Result<(), ConnectionError>> {
        if let Some(answered) = self.habit.answered.take() {
            self.habit.is_prompt = answered.elapsed() <= PROMPT;
        }
        loop {
            let polled = self.transmission.poll(cx, scratch, cause);
            if polled.is_ready() || !self.transmission.take_answered() {
                return polled;
            }
            let answered = Instant::now();
            self.habit.answered = Some(answered);
            if !self.habit.is_prompt || !self.spin(cx, scratch, answered, &is_alone)? {
                return Poll::Pending;
            }
            self.habit.answered = None;
            cause = Cause::Stream;
        }
    }

    /// Whether something came in time.
    fn spin(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        since: Instant,
        is_alone: &impl Fn() -> bool,
    ) -> Result<bool, ConnectionError> {
        while is_alone() && since.elapsed() < SPIN {
            for _ in 0..LOOKS {
                if self.transmission.poll_receive(cx, scratch)? {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
        }
        Ok(false)
    }
}
