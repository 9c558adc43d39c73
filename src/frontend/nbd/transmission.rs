//! Requests and replies of one client: what reads, runs requests and writes replies.
//!
//! ```text
//! receive ─▶ input ─▶ session ─┬ short, nothing to wait for ──────────────────────────────▶ outbox ─▶ send
//!                              └ wanted ─▶ (bytes reserved) ─▶ launch ─┬ done at once ─▶ settle ─▶ outbox
//!                                                                      └ in_flight ────▶ settle      │
//!                     next piece of a long read ◀──────────── its bytes were taken by the client ◀───┘
//! ```
//! Owns: the order of all that, and the bounds on it. One owner, one loop: no lock and no channel.
//! Does not own: what bytes mean ([`super::session`], [`super::reply`]), what a request does ([`super::work`]), the
//! stream ([`super::transport`]), or who polls: a task (`connection`) or an `nbd-N` thread (`threads`).
//!
//! A request that the disk serves without waiting is run inline and its reply leaves with its neighbours': one receive
//! takes many requests, one send many replies. Only what has to wait becomes a future beside the others. Replies leave
//! in the order in which requests finish.

use super::budget::{ConnectionBudget, Reservation};
use super::connection::{ConnectionError, Shared};
use super::crew::Crew;
use super::handshake::{Negotiated, Replies};
use super::reply::{Chunk, Outbox, Part};
use super::scratch::Scratch;
use super::session::{Event, Fragments, Payload, Refusal, Request, Rest, Session};
use super::status::{self, Context as MetaContext};
use super::transport::{Cause, Interest, Transport};
use super::under_way::{Done, Held, Read, Wanted, Write, WritePiece};
use super::wire::{Cookie, REQUESTS_MAX};
use super::work::{self, FileParts};
use crate::block::{BlockError, BlockHandler, Durability, ReadPlan, write_at};
use crate::frontend::Operation;
use crate::geometry::{ByteRange, len_of};
use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Bytes that one receive may take, beside payload that goes where it belongs directly.
const INPUT_BYTES: usize = 128 * 1024;
/// Replies that wait for the client; beyond them no request is taken.
const OUTBOX_BYTES_MAX: usize = 128 * 1024;
/// Reads and writes up to this length are done in the buffers of all connections, without bytes of their own.
const SHORT_BYTES_MAX: u64 = 64 * 1024;
/// A write's payload from this length on is received by itself, where it belongs.
const LONG_WRITE_BYTES_MIN: u64 = 32 * 1024;
/// A long write goes to the disk in pieces of this length, which the processor's cache holds.
const WRITE_PIECE_BYTES_MAX: usize = 256 * 1024;
/// A client that takes nothing for so long gets copies: the space of a file that is removed comes back.
const COPY_AFTER: Duration = Duration::from_secs(1);
/// Rounds of one poll: a client that never pauses must not keep the others from their turn.
const ROUNDS_MAX: u32 = 16;
/// What a buffer for replies begins with.
const OUTPUT_BYTES: usize = OUTBOX_BYTES_MAX + 64 * 1024;

/// What a client asked for.
pub struct Disk {
    pub handler: Arc<dyn BlockHandler>,
    /// The metadata contexts that it selected.
    pub contexts: Arc<[MetaContext]>,
    /// Ends the connection.
    pub closed: CancellationToken,
}

/// What is left when no more is read or written.
pub struct Ended<T> {
    pub transport: T,
    pub client: ClientEnd,
    /// Requests that run on, their replies unheard.
    pub under_way: BoxFuture<'static, ()>,
}

/// Whether the client's half of the stream is still open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClientEnd {
    MaySend,
    Closed,
}

/// One client after its handshake.
pub struct Transmission<T> {
    transport: T,
    /// Input not looked at, while it is not polled.
    rest: Vec<u8>,
    /// Requests taken since the last receive.
    batch: u32,
    /// It could have gone on.
    yields: bool,
    /// While files are in the outbox, now and then: when it is looked at, and how much the client had taken.
    copy: Option<(Pin<Box<Sleep>>, u64)>,
    /// The last request was a long write: the next one's payload is not received behind its header.
    expects_long_write: bool,
    waits: Option<Arc<Crew>>,
    session: Session,
    replies: Replies,
    handler: Arc<dyn BlockHandler>,
    contexts: Arc<[MetaContext]>,
    budget: ConnectionBudget,
    /// Hints that run are not worth finishing.
    left: CancellationToken,
    /// The server's stop and the disk's; gone once one has come.
    stop: [Option<Pin<Box<WaitForCancellationFutureOwned>>>; 2],
    /// Set once no further request is taken: until when the client has to take its replies.
    stopping: Option<Pin<Box<Sleep>>>,
    close_timeout: Duration,
    incoming: Incoming,
    /// The session has used up the input.
    needs_input: bool,
    /// A request that waits for its bytes; nothing behind it is looked at before.
    wanted: Option<Wanted>,
    /// The write whose payload is coming in.
    write: Option<Write>,
    /// Requests taken and not answered.
    active: usize,
    in_flight: FuturesUnordered<BoxFuture<'static, Done>>,
    outbox: Outbox,
    /// The socket may still hold back what it took.
    unflushed: bool,
    /// What happens once the client has taken that many bytes; in order.
    held: VecDeque<(u64, Held)>,
    stream: Stream,
    /// Replies that wait for its end.
    deferred: VecDeque<Done>,
    failed: Option<ConnectionError>,
}

/// Whether more can come from the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Incoming {
    Open,
    /// It said goodbye; whatever follows is not looked at.
    Goodbye,
    /// Its half of the stream is closed, and all whole requests in it were taken.
    Eof,
    /// The same, with bytes not looked at yet.
    EofUnread,
}

/// What may go into the outbox.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stream {
    Free,
    /// A reply's data is half sent and must not be interrupted by others.
    InReply,
}

impl<T: Transport> Transmission<T> {
    /// Goes on from what was agreed; `input` holds what came after the handshake. With `waits`, whoever polls may wait
    /// for the local disk.
    pub fn new(
        transport: T,
        input: Vec<u8>,
        negotiated: Negotiated,
        disk: Disk,
        shared: &Shared,
        waits: Option<Arc<Crew>>,
    ) -> Self {
        let Disk { handler, contexts, closed } = disk;
        Self {
            transport,
            rest: input,
            batch: 0,
            yields: false,
            copy: None,
            expects_long_write: false,
            waits,
            session: Session::new(negotiated),
            replies: negotiated.replies,
            handler,
            contexts,
            budget: shared.budget.connection(shared.config.connection_bytes_max),
            left: CancellationToken::new(),
            stop: [shared.stop.clone(), closed].map(|token| Some(Box::pin(token.cancelled_owned()))),
            stopping: None,
            close_timeout: shared.config.close_timeout,
            incoming: Incoming::Open,
            needs_input: false,
            wanted: None,
            write: None,
            active: 0,
            in_flight: FuturesUnordered::new(),
            outbox: Outbox::new(negotiated.headers),
            unflushed: false,
            held: VecDeque::new(),
            stream: Stream::Free,
            deferred: VecDeque::new(),
            failed: None,
        }
    }

    /// What outlives the stream.
    pub fn end(self) -> Ended<T> {
        let client = match self.incoming {
            Incoming::Eof | Incoming::EofUnread => ClientEnd::Closed,
            Incoming::Open | Incoming::Goodbye => ClientEnd::MaySend,
        };
        self.left.cancel();
        let mut in_flight = self.in_flight;
        let under_way = Box::pin(async move { while in_flight.next().await.is_some() {} });
        Ended { transport: self.transport, client, under_way }
    }

    /// Takes the buffers, before it is polled.
    pub fn resume(&mut self, scratch: &mut Scratch) {
        (scratch.at, scratch.end) = (0, 0);
        if !self.rest.is_empty() {
            scratch.put(&std::mem::take(&mut self.rest));
        }
        if scratch.output.capacity() < OUTPUT_BYTES {
            scratch.output.reserve(OUTPUT_BYTES);
        }
        self.outbox.lend(&mut scratch.output);
    }

    /// Gives the buffers back, and keeps for itself what is in them.
    pub fn suspend(&mut self, scratch: &mut Scratch) {
        self.rest.extend_from_slice(scratch.unread());
        self.outbox.give_back(&mut scratch.output);
    }

    /// Goes on as far as it can; `Ready` once all is said. Between [`Transmission::resume`] and
    /// [`Transmission::suspend`].
    ///
    /// # Errors
    /// The stream cannot go on; what is under way runs on in [`Ended::under_way`].
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        cause: Cause,
    ) -> Poll<Result<(), ConnectionError>> {
        if cause == Cause::Woken {
            self.poll_stop(cx)?;
        }
        self.poll_copy(cx, cause);
        for _ in 0..ROUNDS_MAX {
            let mut progress = self.poll_in_flight(cx);
            progress |= self.take_input(cx, scratch)?;
            if let Some(error) = self.failed.take() {
                return Poll::Ready(Err(error));
            }
            progress |= self.poll_send(cx)?;
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            progress |= self.poll_receive(cx, scratch)?;
            if !progress {
                self.poll_copy(cx, cause);
                return Poll::Pending;
            }
        }
        self.yields = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Whether it stopped only to let others have their turn. Once for each time.
    pub fn take_yielded(&mut self) -> bool {
        std::mem::take(&mut self.yields)
    }

    /// What it waits for, when pending.
    pub fn interest(&self) -> Interest {
        Interest {
            receive: self.needs_input && self.incoming == Incoming::Open,
            send: self.outbox.has_remaining(),
        }
    }

    /// Whether the client was just answered its only request, and waits for nothing. Once for each.
    pub fn take_answered(&mut self) -> bool {
        let is_answered =
            self.batch == 1 && self.active == 0 && !self.outbox.has_remaining() && self.session.at_boundary();
        if is_answered {
            self.batch = 0;
        }
        is_answered
    }

    /// The stream.
    pub fn transport(&self) -> &T {
        &self.transport
    }

    fn is_over(&self) -> bool {
        let no_more = match self.incoming {
            Incoming::Goodbye | Incoming::Eof => true,
            Incoming::Open | Incoming::EofUnread => self.stopping.is_some() && self.session.at_boundary(),
        };
        no_more && self.active == 0 && !self.outbox.has_remaining() && !self.unflushed
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Result<(), ConnectionError> {
        for stop in &mut self.stop {
            if stop.as_mut().is_some_and(|stop| stop.as_mut().poll(cx).is_ready()) {
                *stop = None;
                self.left.cancel();
                self.stopping.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.close_timeout)));
            }
        }
        let late = self.stopping.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready());
        if late { Err(ConnectionError::CloseTimeout) } else { Ok(()) }
    }

    /// Files that a client does not take are not kept for it.
    fn poll_copy(&mut self, cx: &mut Context<'_>, cause: Cause) {
        if let Some((timer, taken_bytes)) = &mut self.copy {
            if cause == Cause::Woken && timer.as_mut().poll(cx).is_ready() {
                let is_stuck = self.outbox.taken_bytes() == *taken_bytes;
                self.copy = None;
                if is_stuck {
                    self.outbox.copy_files();
                }
            }
        } else if self.outbox.has_file() {
            let mut timer = Box::pin(tokio::time::sleep(COPY_AFTER));
            // Only to be woken: it has just begun.
            if timer.as_mut().poll(cx).is_pending() {
                self.copy = Some((timer, self.outbox.taken_bytes()));
            }
        }
    }

    fn poll_in_flight(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready(Some(done)) = self.in_flight.poll_next_unpin(cx) {
            self.settle(done);
            progress = true;
        }
        progress
    }

    fn may_take(&self) -> bool {
        if self.incoming == Incoming::Goodbye || self.incoming == Incoming::Eof {
            return false;
        }
        if self.write.as_ref().is_some_and(|write| write.piece == WritePiece::Disk) {
            return false;
        }
        // A payload that was begun is taken to its end: its bytes are reserved.
        !self.session.at_boundary()
            || (self.stopping.is_none()
                && self.active < REQUESTS_MAX
                && self.outbox.remaining() < OUTBOX_BYTES_MAX)
    }

    fn take_input(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch) -> Result<bool, ConnectionError> {
        let mut progress = false;
        self.needs_input = false;
        loop {
            if let Some(wanted) = self.wanted.take() {
                match self.budget.poll_reserve(wanted.bytes(), cx) {
                    Poll::Ready(reservation) => self.begin(wanted, reservation),
                    Poll::Pending => {
                        self.wanted = Some(wanted.without_plan());
                        return Ok(progress);
                    }
                }
                progress = true;
            }
            if !self.may_take() || self.failed.is_some() {
                return Ok(progress);
            }
            if let Some(write) = &self.write
                && self.session.is_announced()
            {
                let piece_bytes_max = write.reservation.bytes().min(WRITE_PIECE_BYTES_MAX);
                self.session.receive(piece_bytes_max, std::mem::take(&mut scratch.payload));
            }
            let mut input = scratch.unread();
            let before = input.len();
            let event = self.session.next(&mut input, &self.handler.geometry())?;
            let used = before - input.len();
            scratch.at += used;
            match event {
                Event::NeedInput => {
                    if self.incoming == Incoming::EofUnread {
                        self.incoming = Incoming::Eof;
                        if self.write.take().is_some() {
                            self.active -= 1;
                        }
                        return Ok(true);
                    }
                    self.needs_input = true;
                    return Ok(progress);
                }
                Event::Request { cookie, request } => {
                    self.expects_long_write = false;
                    self.take_request(cookie, request);
                }
                Event::WriteBegins { cookie, range, durability } => {
                    self.active += 1;
                    self.batch += 1;
                    self.expects_long_write = range.len() >= LONG_WRITE_BYTES_MIN;
                    let written = match self.session.whole_payload(scratch.unread()) {
                        Some(payload) if range.len() <= SHORT_BYTES_MAX => {
                            let waits = self.waits.as_deref();
                            work::write_now(&*self.handler, range.start(), payload, waits)
                        }
                        Some(_) | None => None,
                    };
                    match written {
                        Some(result) => {
                            scratch.at += len_of(range.len());
                            self.session.payload_was_used();
                            self.finish_write(cookie, durability, Reservation::none(), result);
                        }
                        None => self.wanted = Some(Wanted::Write { cookie, range, durability }),
                    }
                }
                Event::WritePiece { offset_bytes, data, rest } => {
                    self.write_piece(offset_bytes, data, rest, scratch);
                }
                Event::Refused { cookie, refusal } => {
                    // A long write that failed on its way was counted when it began.
                    if self.write.take().is_none() {
                        self.active += 1;
                    }
                    self.settle(Done::Plain { cookie, result: Err(refusal) });
                }
                Event::Disconnect => self.incoming = Incoming::Goodbye,
            }
            progress = true;
        }
    }

    fn take_request(&mut self, cookie: Cookie, request: Request) {
        self.active += 1;
        self.batch += 1;
        let mut plan = None;
        if let Request::Read { range, .. } = request
            && !range.is_empty()
            && range.len() <= SHORT_BYTES_MAX
            && self.stream == Stream::Free
        {
            match self.read_now(cookie, range) {
                ControlFlow::Break(()) => {
                    self.active -= 1;
                    return;
                }
                ControlFlow::Continue(planned) => plan = Some(planned),
            }
        }
        self.wanted = Some(Wanted::Request { cookie, request, plan });
    }

    /// Answers a short read in the outbox itself. If its disk has to be waited for, goes on with what was planned.
    fn read_now(
        &mut self,
        cookie: Cookie,
        range: ByteRange,
    ) -> ControlFlow<(), Result<ReadPlan, BlockError>> {
        let plan = match work::plan(&*self.handler, range) {
            Ok(plan) => plan,
            Err(error) => return ControlFlow::Continue(Err(error)),
        };
        let replies = self.replies;
        if work::is_zeros(&plan) && replies == Replies::Structured {
            let zeros = vec![Part::Zeros { len_bytes: range.len() }];
            self.outbox.put_parts(cookie, range.start(), zeros, Chunk::Last);
            return ControlFlow::Break(());
        }
        let head = |outbox: &mut Outbox| match replies {
            Replies::Simple => outbox.put_simple(cookie, 0),
            Replies::Structured => outbox.put_data_header(cookie, range, Chunk::Last),
        };
        let filled = self.outbox.put_filled(len_of(range.len()), head, |out| work::fill(&plan, out));
        if filled { ControlFlow::Break(()) } else { ControlFlow::Continue(Ok(plan)) }
    }

    fn begin(&mut self, wanted: Wanted, reservation: Reservation) {
        let (cookie, request, plan) = match wanted {
            Wanted::Write { cookie, durability, .. } => {
                self.write = Some(Write { cookie, durability, reservation, piece: WritePiece::Payload });
                return;
            }
            Wanted::Request { cookie, request, plan } => (cookie, request, plan),
        };
        let handler = Arc::clone(&self.handler);
        let plain = move |result: Result<(), BlockError>, operation| Done::Plain {
            cookie,
            result: result.map_err(|error| Refusal::of(&error, operation)),
        };
        match request {
            Request::Read { range, fragments } => {
                let read = Read { cookie, range, at_bytes: range.start(), fragments, reservation };
                self.read_piece(read, plan);
            }
            Request::Flush => self.launch(Box::pin(async move {
                let result = handler.flush().await;
                plain(result, Operation::Write)
            })),
            Request::Trim { range, durability } => self.launch(Box::pin(async move {
                plain(work::trim(&*handler, range, durability).await, Operation::Write)
            })),
            Request::WriteZeroes { range, durability } => self.launch(Box::pin(async move {
                plain(work::write_zeroes(&*handler, range, durability).await, Operation::Write)
            })),
            Request::Cache { range } => {
                let left = self.left.clone();
                self.launch(Box::pin(async move {
                    // It may be long, and has no effect that anybody waits for.
                    let result = tokio::select! {
                        result = work::cache(&*handler, range) => result,
                        () = left.cancelled() => Ok(()),
                    };
                    drop(reservation);
                    plain(result, Operation::Read)
                }));
            }
            Request::BlockStatus { range, extents_max, contexts: asked } => {
                let contexts = Arc::clone(&self.contexts);
                self.launch(Box::pin(async move {
                    let result = status::block_status(&*handler, &contexts, asked, range, extents_max).await;
                    let result = result.map_err(|error| Refusal::of(&error, Operation::Read));
                    Done::Status { cookie, reservation, result }
                }));
            }
        }
    }

    /// The next piece of a read; `plan` is of all of it.
    fn read_piece(&mut self, read: Read, plan: Option<Result<ReadPlan, BlockError>>) {
        let left = read.range.end() - read.at_bytes;
        let max = read.reservation.bytes() as u64;
        let len = if left <= max { left } else { max - read.at_bytes % max };
        let piece = ByteRange::new(read.at_bytes, len);
        if piece.is_empty() {
            self.settle(Done::Read { read, piece, result: Ok(Vec::new()) });
            return;
        }
        let planned = match plan {
            Some(plan) if piece == read.range => plan,
            Some(_) | None => work::plan(&*self.handler, piece),
        };
        let plan = match planned {
            Ok(plan) => plan,
            Err(error) => return self.settle(Done::Read { read, piece, result: Err(error) }),
        };
        let handler = Arc::clone(&self.handler);
        let files = if self.transport.takes_files() { FileParts::Taken } else { FileParts::Copied };
        self.launch(Box::pin(async move {
            let result = work::read(&*handler, plan, files).await;
            Done::Read { read, piece, result }
        }));
    }

    fn write_piece(&mut self, offset_bytes: u64, data: Payload, rest: Rest, scratch: &mut Scratch) {
        let Some(mut write) = self.write.take() else { return };
        let written = work::write_now(&*self.handler, offset_bytes, &data, self.waits.as_deref());
        if let Some(result) = written {
            scratch.payload = data.into_buffer();
            match (result, rest) {
                (result, Rest::None) => {
                    self.finish_write(write.cookie, write.durability, write.reservation, result);
                }
                (result, Rest::Follows) => {
                    self.write = Some(write);
                    self.piece_written(result.map_err(|error| Refusal::of(&error, Operation::Write)));
                }
            }
            return;
        }
        let data = Bytes::from(data);
        let handler = Arc::clone(&self.handler);
        let run = move |durability| async move {
            let result = write_at(&*handler, offset_bytes, data, durability).await;
            result.map_err(|error| Refusal::of(&error, Operation::Write))
        };
        match rest {
            Rest::None => {
                // The flush of the last piece covers those before it, which are done.
                let Write { cookie, durability, reservation, .. } = write;
                self.launch(Box::pin(async move {
                    let result = run(durability).await;
                    drop(reservation);
                    Done::Plain { cookie, result }
                }));
            }
            Rest::Follows => {
                write.piece = WritePiece::Disk;
                self.write = Some(write);
                self.launch(Box::pin(async move { Done::Piece(run(Durability::Acknowledged).await) }));
            }
        }
    }

    /// The last bytes of a write are where they belong, or will never be.
    fn finish_write(
        &mut self,
        cookie: Cookie,
        durability: Durability,
        reservation: Reservation,
        result: Result<(), BlockError>,
    ) {
        drop(reservation);
        let result = result.map_err(|error| Refusal::of(&error, Operation::Write));
        if result.is_err() || durability == Durability::Acknowledged {
            return self.settle(Done::Plain { cookie, result });
        }
        let handler = Arc::clone(&self.handler);
        self.launch(Box::pin(async move {
            let result = handler.flush().await;
            Done::Plain { cookie, result: result.map_err(|error| Refusal::of(&error, Operation::Write)) }
        }));
    }

    /// Runs a request inline if it need not wait. One that waits is polled again at once, with a real waker.
    fn launch(&mut self, mut request: BoxFuture<'static, Done>) {
        match request.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(done) => self.settle(done),
            Poll::Pending => self.in_flight.push(request),
        }
    }

    fn settle(&mut self, done: Done) {
        match done {
            Done::Piece(result) => self.piece_written(result),
            done if self.stream == Stream::Free || done.continues(self.replies) => self.reply(done),
            done => self.deferred.push_back(done),
        }
        while self.stream == Stream::Free
            && let Some(done) = self.deferred.pop_front()
        {
            self.reply(done);
        }
    }

    fn piece_written(&mut self, result: Result<(), Refusal>) {
        let Some(write) = &mut self.write else { return };
        write.piece = WritePiece::Payload;
        if let Err(refusal) = result {
            write.reservation = Reservation::none();
            let cookie = write.cookie;
            self.session.skip_payload(cookie, refusal);
        }
    }

    fn reply(&mut self, done: Done) {
        match done {
            Done::Read { read, piece, result } => self.reply_read(read, piece, result),
            Done::Piece(result) => self.piece_written(result),
            Done::Plain { cookie, result } => {
                match result {
                    Ok(()) => self.outbox.put_done(cookie),
                    Err(refusal) => self.outbox.put_error(cookie, self.replies, &refusal),
                }
                self.active -= 1;
            }
            Done::Status { cookie, reservation, result } => {
                match result {
                    Ok(answers) => self.outbox.put_block_status(cookie, &answers),
                    Err(refusal) => self.outbox.put_error(cookie, self.replies, &refusal),
                }
                self.hold(Held::Bytes(reservation));
                self.active -= 1;
            }
        }
    }

    fn reply_read(&mut self, mut read: Read, piece: ByteRange, result: Result<Vec<Part>, BlockError>) {
        let first = piece.start() == read.range.start();
        let last = piece.end() == read.range.end();
        let refusal = result.as_ref().err().map(|error| Refusal::of(error, Operation::Read));
        match (result, self.replies, read.fragments) {
            (Ok(parts), Replies::Simple, _) => {
                if first {
                    self.outbox.put_simple(read.cookie, 0);
                }
                self.outbox.put_raw(parts);
            }
            (Ok(_), Replies::Structured, _) if read.range.is_empty() => self.outbox.put_none(read.cookie),
            (Ok(parts), Replies::Structured, Fragments::Allowed) => {
                let chunk = if last { Chunk::Last } else { Chunk::MoreFollow };
                self.outbox.put_parts(read.cookie, piece.start(), parts, chunk);
            }
            (Ok(parts), Replies::Structured, Fragments::One) if first && last => {
                self.outbox.put_one(read.cookie, piece, parts);
            }
            (Ok(parts), Replies::Structured, Fragments::One) => {
                if first {
                    self.outbox.put_data_header(read.cookie, read.range, Chunk::MoreFollow);
                }
                self.outbox.put_raw(parts);
                if last {
                    self.outbox.put_none(read.cookie);
                }
            }
            (Err(error), Replies::Simple, _) if !first => {
                self.outbox.clear();
                self.failed = Some(ConnectionError::BrokenReply(error));
            }
            (Err(_), Replies::Simple, _) => {
                if let Some(refusal) = &refusal {
                    self.outbox.put_error(read.cookie, self.replies, refusal);
                }
            }
            (Err(_), Replies::Structured, fragments) => {
                if fragments == Fragments::One && !first {
                    // The chunk that was begun must have its length.
                    self.outbox.put_zeros(read.range.end() - piece.start());
                }
                if let Some(refusal) = &refusal {
                    self.outbox.put_error_at(read.cookie, refusal, piece.start());
                }
            }
        }
        self.stream = Stream::Free;
        if last || refusal.is_some() {
            self.hold(Held::Bytes(read.reservation));
            self.active -= 1;
            return;
        }
        if read.streams(self.replies) {
            self.stream = Stream::InReply;
        }
        read.at_bytes = piece.end();
        self.hold(Held::Read(read));
    }

    fn hold(&mut self, held: Held) {
        self.held.push_back((self.outbox.queued_bytes(), held));
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut progress = false;
        while self.outbox.has_remaining() {
            match self.transport.poll_send(cx, &mut self.outbox)? {
                Poll::Ready(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Poll::Ready(_) => progress = true,
                Poll::Pending => break,
            }
        }
        self.unflushed |= progress;
        if self.unflushed && self.transport.poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        let taken_bytes = self.outbox.taken_bytes();
        while let Some((_, held)) = self.held.pop_front_if(|(at_bytes, _)| *at_bytes <= taken_bytes) {
            match held {
                Held::Bytes(reservation) => drop(reservation),
                Held::Read(read) => self.read_piece(read, None),
            }
            progress = true;
        }
        Ok(progress)
    }

    /// Receives once, if input is wanted.
    pub fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
    ) -> Result<bool, ConnectionError> {
        if !self.needs_input || self.incoming != Incoming::Open {
            return Ok(false);
        }
        let received = match self.session.payload_space() {
            Some(space) => {
                let received = self.transport.poll_receive(cx, space)?;
                if let Poll::Ready(bytes) = received {
                    self.session.payload_came(bytes);
                }
                received
            }
            None => {
                let bytes = if self.expects_long_write { self.session.header_len() } else { INPUT_BYTES };
                let received = self.transport.poll_receive(cx, scratch.room(bytes))?;
                if let Poll::Ready(bytes) = received {
                    scratch.end += bytes;
                }
                received
            }
        };
        match received {
            Poll::Ready(0) => {
                self.incoming = Incoming::EofUnread;
                self.left.cancel();
            }
            Poll::Ready(_) => self.batch = 0,
            Poll::Pending => return Ok(false),
        }
        Ok(true)
    }
}
