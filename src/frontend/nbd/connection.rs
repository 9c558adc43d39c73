//! One client, from its first byte to its last.
//!
//! Owns: the handshake over a socket, what comes after it in which order, and the end of the socket.
//! Does not own: requests and replies ([`super::transmission`]) or listening ([`super::server`]).

use super::budget::NodeBudget;
use super::handshake::{self, ExportFacts, Handshake, Negotiated, Security};
use super::scratch::Scratch;
use super::session::BadStream;
use super::status::Context as MetaContext;
use super::threads::{Finished, Threads};
use super::tls::Tls;
use super::transmission::{ClientEnd, Disk, Ended, Transmission};
use super::transport::{Cause, PlainSocket, Streamed, Transport};
use super::wire::LIST_MAX;
use super::{Config, Exports, OpenExport, past::Past};
use crate::block::BlockError;
use bytes::BytesMut;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// Time that a client has to see our end of the stream before the socket is closed under what it still sends.
const LINGER: Duration = Duration::from_secs(1);

/// A stream that a client can come on.
pub trait Client: AsyncRead + AsyncWrite + Send + Unpin + Sized {
    /// The socket itself, if nothing lies between it and what the client says.
    ///
    /// # Errors
    /// The runtime does not let it go.
    fn into_plain(self) -> io::Result<Plain<Self>> {
        Ok(Err(self))
    }
}

/// A plain socket and the way back, or what is none.
pub type Plain<S> = Result<(PlainSocket, fn(PlainSocket) -> io::Result<S>), S>;

impl Client for TcpStream {
    fn into_plain(self) -> io::Result<Plain<Self>> {
        let socket = PlainSocket::new(self.into_std()?.into());
        Ok(Ok((socket, |socket| Self::from_std(socket.into_fd().into()))))
    }
}

impl Client for UnixStream {
    fn into_plain(self) -> io::Result<Plain<Self>> {
        let socket = PlainSocket::new(self.into_std()?.into());
        Ok(Ok((socket, |socket| Self::from_std(socket.into_fd().into()))))
    }
}

/// A pipe within this process.
impl Client for DuplexStream {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Client for TlsStream<S> {}

/// What all connections share.
pub struct Shared {
    /// For plain sockets. Without them the clients' tasks serve those too.
    pub threads: Option<Threads>,
    pub config: Config,
    pub exports: Arc<dyn Exports>,
    pub budget: NodeBudget,
    /// For clients that want it, or have to.
    pub tls: Option<Tls>,
    /// Ends each connection at the next border between requests.
    pub stop: CancellationToken,
}

/// Why a connection ended early. Nobody but its client is affected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("handshake: {0}")]
    Handshake(&'static str),
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("the server stopped before the handshake was over")]
    Stopped,
    #[error("handshake took too long")]
    HandshakeTimeout,
    #[error(transparent)]
    BadStream(#[from] BadStream),
    /// A simple reply has no place for an error once its data has begun.
    #[error("read failed after its reply had begun: {0}")]
    BrokenReply(BlockError),
    #[error("the client did not take its replies in time when it was to leave")]
    CloseTimeout,
    #[error("a bug of the server: the log has a panic's message")]
    Bug,
    #[error("socket: {0}")]
    Socket(#[from] io::Error),
}

/// Serves one client until it leaves or is made to.
///
/// # Errors
/// Why it did not end as the protocol wants; for a log.
///
/// # Cancellation
/// Closes the socket; writes that have begun go on, unacknowledged.
pub async fn serve<S: Client>(io: S, security: Security, shared: &Shared) -> Result<(), ConnectionError> {
    // One time limit for all of it, however often the client is asked to begin anew.
    let deadline = Instant::now() + shared.config.handshake_timeout;
    let mut handshake = Handshake::new(security);
    let (agreed, io) =
        within(deadline, shared, Box::pin(negotiate(&mut handshake, io, &*shared.exports))).await?;
    match agreed {
        Outcome::Gone => Ok(()),
        Outcome::Agreed(agreed) => transmit(io, agreed, shared).await,
        Outcome::StartTls => {
            let Some(tls) = &shared.tls else { return Err(ConnectionError::Handshake("TLS is not set up")) };
            let accept = async { tls.acceptor().await.accept(io).await.map_err(ConnectionError::Tls) };
            let io = within(deadline, shared, Box::pin(accept)).await?;
            handshake.secured();
            let (agreed, io) =
                within(deadline, shared, Box::pin(negotiate(&mut handshake, io, &*shared.exports))).await?;
            match agreed {
                Outcome::Agreed(agreed) => transmit(io, agreed, shared).await,
                Outcome::Gone | Outcome::StartTls => Ok(()),
            }
        }
    }
}

/// `step` is boxed: what a handshake needs is given back before the long part begins.
async fn within<T>(
    deadline: Instant,
    shared: &Shared,
    step: Pin<Box<impl Future<Output = Result<T, ConnectionError>>>>,
) -> Result<T, ConnectionError> {
    tokio::select! {
        result = timeout_at(deadline, step) => result.map_err(|_| ConnectionError::HandshakeTimeout)?,
        () = shared.stop.cancelled() => Err(ConnectionError::Stopped),
    }
}

async fn transmit<S: Client>(io: S, agreed: Agreed, shared: &Shared) -> Result<(), ConnectionError> {
    let Agreed { export, negotiated, contexts, input } = agreed;
    let OpenExport { handler, guard, closed, .. } = export;
    let (input, disk) = (Vec::from(input), Disk { handler, contexts, closed });
    let plain = match &shared.threads {
        Some(threads) => io.into_plain()?.map(|(socket, back)| (socket, back, threads)),
        None => Err(io),
    };
    let (result, io, client, under_way) = match plain {
        Ok((socket, back, threads)) => {
            let waits = Some(threads.crew());
            let transmission = Transmission::new(socket, input, negotiated, disk, shared, waits);
            let Finished { result, ended } = threads.serve(transmission).await?;
            (result, back(ended.transport), ended.client, ended.under_way)
        }
        Err(io) => {
            let mut transmission = Transmission::new(Streamed(io), input, negotiated, disk, shared, None);
            let result = poll_fn(|cx| poll_here(&mut transmission, cx)).await;
            let Ended { transport: Streamed(io), client, under_way } = transmission.end();
            (result, Ok(io), client, under_way)
        }
    };
    let result = match (result, io) {
        (Ok(()), Ok(io)) => {
            say_goodbye(io, client).await;
            Ok(())
        }
        (Ok(()), Err(error)) => Err(error.into()),
        // Closed at once.
        (Err(error), _io) => Err(error),
    };
    // The guard outlives what the client had asked for: nothing touches the disk after it.
    under_way.await;
    drop(guard);
    result
}

fn poll_here<T: Transport>(
    transmission: &mut Transmission<T>,
    cx: &mut Context<'_>,
) -> Poll<Result<(), ConnectionError>> {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|scratch| {
        transmission.resume(scratch);
        let polled = transmission.poll(cx, scratch, Cause::Woken);
        transmission.suspend(scratch);
        polled
    })
}

/// Closing a socket that still has unread bytes in it resets it, and a reset can overtake the last replies.
async fn say_goodbye<S: AsyncRead + AsyncWrite + Unpin>(mut io: S, client: ClientEnd) {
    let drain = async {
        io.shutdown().await?;
        let mut scratch = BytesMut::with_capacity(4096);
        while client == ClientEnd::MaySend && io.read_buf(&mut scratch).await? > 0 {
            scratch.clear();
        }
        io::Result::Ok(())
    };
    // Whatever goes wrong here, the client has left.
    drop(timeout(LINGER, drain).await);
}

/// What a handshake came to.
enum Outcome {
    Agreed(Agreed),
    StartTls,
    /// The client has left.
    Gone,
}

struct Agreed {
    export: OpenExport,
    negotiated: Negotiated,
    /// Those that were selected, in the order of their ids.
    contexts: Arc<[MetaContext]>,
    /// What came after the handshake.
    input: BytesMut,
}

async fn negotiate<S>(
    handshake: &mut Handshake,
    mut io: S,
    exports: &dyn Exports,
) -> Result<(Outcome, S), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut input = BytesMut::new();
    let mut opened = None;
    let mut past = Past::default();
    loop {
        let event = handshake.next(&mut input);
        match event {
            handshake::Event::List => handshake.listed(&exports.list(LIST_MAX).await),
            handshake::Event::Open { name } => {
                opened = None;
                match exports.open(&name).await {
                    Ok(export) => {
                        handshake.opened(Ok(&ExportFacts {
                            name: export.name.clone(),
                            description: export.description.clone(),
                            geometry: export.handler.geometry(),
                        }));
                        opened = Some(export);
                    }
                    Err(error) => handshake.opened(Err(&error)),
                }
            }
            handshake::Event::Past { name, past: wanted, purpose } => {
                opened = None;
                let found = match exports.open(&name).await {
                    Ok(export) => past.find(&*export.handler, wanted, purpose).await,
                    Err(error) => Err(error),
                };
                handshake.past_found(found.as_deref());
            }
            handshake::Event::NeedInput => {
                send(&mut io, handshake).await?;
                input.reserve(1024);
                if io.read_buf(&mut input).await? == 0 {
                    return Ok((Outcome::Gone, io));
                }
            }
            handshake::Event::StartTls => {
                send(&mut io, handshake).await?;
                return Ok((Outcome::StartTls, io));
            }
            handshake::Event::Transmit(negotiated) => {
                send(&mut io, handshake).await?;
                let contexts = handshake.contexts().iter().map(|name| past.context(name)).collect();
                let agreed = opened.map(|export| Agreed { export, negotiated, contexts, input });
                return Ok((agreed.map_or(Outcome::Gone, Outcome::Agreed), io));
            }
            handshake::Event::Close(reason) => {
                send(&mut io, handshake).await?;
                io.shutdown().await?;
                return Err(ConnectionError::Handshake(reason));
            }
        }
    }
}

async fn send<S: AsyncWrite + Unpin>(io: &mut S, handshake: &mut Handshake) -> io::Result<()> {
    io.write_all_buf(handshake.output()).await?;
    io.flush().await
}
