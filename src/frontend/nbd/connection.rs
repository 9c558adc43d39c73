//! One client, from its first byte to its last.
//!
//! Owns: the handshake over a socket, what comes after it in which order, and the end of the socket.
//! Does not own: requests and replies ([`super::transmission`]) or listening ([`super::server`]).

use super::budget::NodeBudget;
use super::handshake::{self, ExportFacts, Handshake, Negotiated};
use super::session::BadStream;
use super::status::Context as MetaContext;
use super::threads::{Finished, Threads};
use super::transmission::{Cause, ClientEnd, Disk, Ended, Scratch, Transmission};
use super::transport::{PlainSocket, Streamed, Transport};
use super::wire::LIST_MAX;
use super::{Config, Exports, OpenExport};
use crate::block::BlockError;
use bytes::BytesMut;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Time that a client has to see our end of the stream before the socket is closed under what it still sends.
const LINGER: Duration = Duration::from_secs(1);

/// A stream that a client can come on.
pub trait Client: AsyncRead + AsyncWrite + Send + Unpin + Sized {
    /// The socket itself, if nothing lies between it and what the client says.
    ///
    /// # Errors
    /// The runtime does not let it go.
    fn into_plain(self) -> io::Result<Result<PlainSocket, Self>>;

    /// Back from what [`Client::into_plain`] gave.
    ///
    /// # Errors
    /// The runtime does not take it.
    fn from_plain(socket: PlainSocket) -> io::Result<Self>;
}

impl Client for TcpStream {
    fn into_plain(self) -> io::Result<Result<PlainSocket, Self>> {
        Ok(Ok(PlainSocket::new(self.into_std()?.into())))
    }

    fn from_plain(socket: PlainSocket) -> io::Result<Self> {
        Self::from_std(socket.into_fd().into())
    }
}

impl Client for UnixStream {
    fn into_plain(self) -> io::Result<Result<PlainSocket, Self>> {
        Ok(Ok(PlainSocket::new(self.into_std()?.into())))
    }

    fn from_plain(socket: PlainSocket) -> io::Result<Self> {
        Self::from_std(socket.into_fd().into())
    }
}

/// What all connections share.
pub struct Shared {
    pub threads: Threads,
    pub config: Config,
    pub exports: Arc<dyn Exports>,
    pub budget: NodeBudget,
    /// Ends each connection at the next border between requests.
    pub stop: CancellationToken,
}

/// Why a connection ended early. Nobody but its client is affected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("handshake: {0}")]
    Handshake(&'static str),
    #[error("handshake took too long")]
    HandshakeTimeout,
    #[error(transparent)]
    BadStream(#[from] BadStream),
    /// A simple reply has no place for an error once its data has begun.
    #[error("read failed after its reply had begun: {0}")]
    BrokenReply(BlockError),
    #[error("the client did not take its replies in time when it was to leave")]
    CloseTimeout,
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
pub async fn serve<S: Client>(mut io: S, shared: &Shared) -> Result<(), ConnectionError> {
    let mut input = BytesMut::new();
    let agreed = {
        // Boxed: its memory is given back before the long part begins.
        let negotiate = Box::pin(negotiate(&mut io, &mut input, &*shared.exports));
        tokio::select! {
            agreed = timeout(shared.config.handshake_timeout, negotiate) => {
                agreed.map_err(|_| ConnectionError::HandshakeTimeout)??
            }
            () = shared.stop.cancelled() => None,
        }
    };
    let Some(Agreed { export, negotiated, contexts }) = agreed else { return Ok(()) };
    let OpenExport { handler, guard, closed, .. } = export;
    let (input, disk) = (Vec::from(input), Disk { handler, contexts, closed });
    let (result, ended) = match io.into_plain()? {
        Ok(socket) => {
            let waits = Some(shared.threads.waits());
            let transmission = Transmission::new(socket, input, negotiated, disk, shared, waits);
            let Finished { result, ended } = shared.threads.serve(transmission).await?;
            let Ended { transport, client, under_way } = ended;
            (result, Ended { transport: S::from_plain(transport)?, client, under_way })
        }
        Err(io) => {
            let mut transmission = Transmission::new(Streamed(io), input, negotiated, disk, shared, None);
            let result = poll_fn(|cx| poll_here(&mut transmission, cx)).await;
            let Ended { transport: Streamed(io), client, under_way } = transmission.end();
            (result, Ended { transport: io, client, under_way })
        }
    };
    let Ended { transport: io, client, under_way } = ended;
    match &result {
        Ok(()) => say_goodbye(io, client).await,
        Err(_) => drop(io),
    }
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
struct Agreed {
    export: OpenExport,
    negotiated: Negotiated,
    /// Those that were selected, in the order of their ids.
    contexts: Arc<[MetaContext]>,
}

async fn negotiate<S>(
    io: &mut S,
    input: &mut BytesMut,
    exports: &dyn Exports,
) -> Result<Option<Agreed>, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut handshake = Handshake::new();
    let mut opened = None;
    loop {
        let event = handshake.next(input);
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
            handshake::Event::NeedInput => {
                io.write_all_buf(handshake.output()).await?;
                io.flush().await?;
                input.reserve(1024);
                if io.read_buf(input).await? == 0 {
                    return Ok(None);
                }
            }
            handshake::Event::Transmit(negotiated) => {
                io.write_all_buf(handshake.output()).await?;
                io.flush().await?;
                let contexts = handshake.contexts().iter().map(MetaContext::from).collect();
                return Ok(opened.map(|export| Agreed { export, negotiated, contexts }));
            }
            handshake::Event::Close(reason) => {
                io.write_all_buf(handshake.output()).await?;
                io.shutdown().await?;
                return Err(ConnectionError::Handshake(reason));
            }
        }
    }
}
