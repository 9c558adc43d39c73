//! Requests and replies of one client: a task that reads, runs requests and writes replies.
//!
//! ```text
//! poll_read ─▶ input ─▶ session ─▶ wanted ─▶ (bytes reserved) ─▶ launch ─┬ done at once ─▶ settle ─▶ outbox ─▶ poll_write
//!                                                                        └ in_flight ────▶ settle      │
//!                       next piece of a long read ◀──────────── its bytes were taken by the client ◀───┘
//! ```
//! Owns: the order of all that, and the bounds on it. One owner, one loop: no lock and no channel.
//! Does not own: what bytes mean ([`super::session`], [`super::reply`]) or what a request does ([`super::work`]).
//!
//! A request that the disk serves without waiting is run inline and its reply leaves with its neighbours'; only
//! what has to wait becomes a future beside the others. Replies leave in the order in which requests finish.

use super::budget::{ConnectionBudget, Reservation};
use super::connection::{ConnectionError, Shared};
use super::handshake::{Negotiated, Replies};
use super::reply::{Chunk, Outbox, Part};
use super::session::{Event, Fragments, Refusal, Request, Rest, Session};
use super::status::{self, Context as MetaContext, Status, Stretch};
use super::wire::{Cookie, REQUESTS_MAX};
use super::work;
use crate::block::{BlockError, BlockHandler, Durability, write_at};
use crate::frontend::Operation;
use crate::geometry::{ByteRange, len_of};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;
use tokio_util::io::{poll_read_buf, poll_write_buf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Bytes that one read from the socket may take, beside payload that goes where it belongs directly.
const INPUT_BYTES: usize = 64 * 1024;
/// Payload that is missing this much is read directly; less is read together with what follows it.
const DIRECT_BYTES_MIN: usize = 16 * 1024;
/// Replies that wait for the client; beyond them no request is taken.
const OUTBOX_BYTES_MAX: usize = 512 * 1024;

/// What is left when no more is read or written.
pub struct Ended<S> {
    pub io: S,
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
pub struct Transmission<S> {
    io: S,
    input: BytesMut,
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

enum Wanted {
    Request { cookie: Cookie, request: Request },
    Write { cookie: Cookie, range: ByteRange, durability: Durability },
}

struct Write {
    cookie: Cookie,
    durability: Durability,
    reservation: Reservation,
    piece: WritePiece,
}

/// What a long write waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum WritePiece {
    Payload,
    Disk,
}

/// A read that is sent piece by piece.
struct Read {
    cookie: Cookie,
    range: ByteRange,
    /// Where the next piece begins.
    at_bytes: u64,
    fragments: Fragments,
    reservation: Reservation,
}

/// What is kept until the client has taken the bytes before.
enum Held {
    Bytes(Reservation),
    Read(Read),
}

/// A request, or a piece of one, that is ready to be answered.
enum Done {
    Read {
        read: Read,
        piece: ByteRange,
        result: Result<Vec<Part>, BlockError>,
    },
    /// A piece of a long write, not the last.
    Piece(Result<(), Refusal>),
    Plain {
        cookie: Cookie,
        result: Result<(), Refusal>,
    },
    Status {
        cookie: Cookie,
        reservation: Reservation,
        result: Result<Vec<Status>, Refusal>,
    },
}

impl<S: AsyncRead + AsyncWrite + Unpin> Transmission<S> {
    /// Goes on from what was agreed; `input` holds what came after the handshake.
    pub fn new(
        io: S,
        input: BytesMut,
        negotiated: Negotiated,
        contexts: Arc<[MetaContext]>,
        handler: Arc<dyn BlockHandler>,
        closed: CancellationToken,
        shared: &Shared,
    ) -> Self {
        Self {
            io,
            input,
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
    pub fn end(self) -> Ended<S> {
        let client = match self.incoming {
            Incoming::Eof | Incoming::EofUnread => ClientEnd::Closed,
            Incoming::Open | Incoming::Goodbye => ClientEnd::MaySend,
        };
        self.left.cancel();
        let mut in_flight = self.in_flight;
        let under_way = Box::pin(async move { while in_flight.next().await.is_some() {} });
        Ended { io: self.io, client, under_way }
    }

    /// Goes on as far as it can; `Ready` once all is said.
    ///
    /// # Errors
    /// The stream cannot go on; what is under way runs on in [`Ended::under_way`].
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            let mut progress = self.poll_stop(cx)?;
            progress |= self.poll_in_flight(cx);
            progress |= self.take_input(cx)?;
            if let Some(error) = self.failed.take() {
                return Poll::Ready(Err(error));
            }
            progress |= self.poll_write(cx)?;
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            progress |= self.poll_read(cx)?;
            if !progress {
                return Poll::Pending;
            }
        }
    }

    fn is_over(&self) -> bool {
        let no_more = match self.incoming {
            Incoming::Goodbye | Incoming::Eof => true,
            Incoming::Open | Incoming::EofUnread => self.stopping.is_some() && self.session.at_boundary(),
        };
        no_more && self.active == 0 && !self.outbox.has_remaining() && !self.unflushed
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut progress = false;
        for stop in &mut self.stop {
            if stop.as_mut().is_some_and(|stop| stop.as_mut().poll(cx).is_ready()) {
                *stop = None;
                progress = true;
                self.left.cancel();
                self.stopping.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.close_timeout)));
            }
        }
        let late = self.stopping.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready());
        if late { Err(ConnectionError::CloseTimeout) } else { Ok(progress) }
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

    fn take_input(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut progress = false;
        self.needs_input = false;
        loop {
            if let Some(wanted) = self.wanted.take() {
                match self.budget.poll_reserve(wanted.bytes(), cx) {
                    Poll::Ready(reservation) => self.begin(wanted, reservation),
                    Poll::Pending => {
                        self.wanted = Some(wanted);
                        return Ok(progress);
                    }
                }
                progress = true;
            }
            if !self.may_take() || self.failed.is_some() {
                return Ok(progress);
            }
            match self.session.next(&mut self.input, &self.handler.geometry())? {
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
                    self.active += 1;
                    self.wanted = Some(Wanted::Request { cookie, request });
                }
                Event::WriteBegins { cookie, range, durability } => {
                    self.active += 1;
                    self.wanted = Some(Wanted::Write { cookie, range, durability });
                }
                Event::WritePiece { offset_bytes, data, rest } => self.write_piece(offset_bytes, data, rest),
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

    fn begin(&mut self, wanted: Wanted, reservation: Reservation) {
        let (cookie, request) = match wanted {
            Wanted::Write { cookie, durability, .. } => {
                self.session.receive(reservation.bytes());
                self.write = Some(Write { cookie, durability, reservation, piece: WritePiece::Payload });
                return;
            }
            Wanted::Request { cookie, request } => (cookie, request),
        };
        let handler = Arc::clone(&self.handler);
        let plain = move |result: Result<(), BlockError>, operation| Done::Plain {
            cookie,
            result: result.map_err(|error| Refusal::of(&error, operation)),
        };
        match request {
            Request::Read { range, fragments } => {
                self.read_piece(Read { cookie, range, at_bytes: range.start(), fragments, reservation });
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

    fn read_piece(&mut self, read: Read) {
        let left = read.range.end() - read.at_bytes;
        let max = read.reservation.bytes() as u64;
        let len = if left <= max { left } else { max - read.at_bytes % max };
        let piece = ByteRange::new(read.at_bytes, len);
        if piece.is_empty() {
            self.settle(Done::Read { read, piece, result: Ok(Vec::new()) });
            return;
        }
        let handler = Arc::clone(&self.handler);
        self.launch(Box::pin(async move {
            let result = work::read(&*handler, piece).await;
            Done::Read { read, piece, result }
        }));
    }

    fn write_piece(&mut self, offset_bytes: u64, data: Bytes, rest: Rest) {
        let Some(mut write) = self.write.take() else { return };
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

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut progress = false;
        while self.outbox.has_remaining() {
            match poll_write_buf(Pin::new(&mut self.io), cx, &mut self.outbox)? {
                Poll::Ready(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Poll::Ready(_) => progress = true,
                Poll::Pending => break,
            }
        }
        self.unflushed |= progress;
        if self.unflushed && Pin::new(&mut self.io).poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        let taken_bytes = self.outbox.taken_bytes();
        while let Some((_, held)) = self.held.pop_front_if(|(at_bytes, _)| *at_bytes <= taken_bytes) {
            match held {
                Held::Bytes(reservation) => drop(reservation),
                Held::Read(read) => self.read_piece(read),
            }
            progress = true;
        }
        Ok(progress)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        if !self.needs_input || self.incoming != Incoming::Open {
            return Ok(false);
        }
        let io = Pin::new(&mut self.io);
        let read = match self.session.payload_space() {
            Some((payload, missing)) if missing >= DIRECT_BYTES_MIN => {
                poll_read_buf(io, cx, &mut payload.limit(missing))?
            }
            Some(_) | None => {
                self.input.reserve(INPUT_BYTES);
                poll_read_buf(io, cx, &mut self.input)?
            }
        };
        match read {
            Poll::Ready(0) => {
                self.incoming = Incoming::EofUnread;
                self.left.cancel();
            }
            Poll::Ready(_) => {}
            Poll::Pending => {
                if self.input.is_empty() {
                    // What an idle connection holds.
                    self.input = BytesMut::new();
                }
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Done {
    /// Whether it is the rest of a reply that others must not interrupt: there is one at a time.
    fn continues(&self, replies: Replies) -> bool {
        match self {
            Self::Read { read, .. } => read.at_bytes > read.range.start() && read.streams(replies),
            Self::Piece(_) | Self::Plain { .. } | Self::Status { .. } => false,
        }
    }
}

impl Wanted {
    /// Bytes that it has in memory, if it is done in one piece.
    fn bytes(&self) -> usize {
        match self {
            Self::Write { range, .. } => len_of(range.len()),
            Self::Request { request, .. } => match request {
                Request::Read { range, .. } | Request::Cache { range } => len_of(range.len()),
                Request::BlockStatus { extents_max, contexts, .. } => {
                    // The extents, the answers made of them, and the reply.
                    *extents_max * contexts.count() * 4 * size_of::<Stretch>()
                }
                Request::Flush | Request::Trim { .. } | Request::WriteZeroes { .. } => 0,
            },
        }
    }
}

impl Read {
    /// Whether its data has to lie in the stream without anything between.
    fn streams(&self, replies: Replies) -> bool {
        match replies {
            Replies::Simple => true,
            Replies::Structured => self.fragments == Fragments::One,
        }
    }
}
