//! One client, from its first byte to its last.
//!
//! Owns: the handshake over a socket, what comes after it in which order, and the end of the socket.
//! Does not own: requests and replies ([`super::transmission`]) or listening ([`super::server`]).

use super::budget::NodeBudget;
use super::handshake::{self, ExportFacts, Handshake, Negotiated, Security};
use super::session::BadStream;
use super::status::Context;
use super::tls::Tls;
use super::transmission::{ClientEnd, Ended, Transmission};
use super::wire::LIST_MAX;
use super::{Config, Exports, OpenExport, past::Past};
use crate::block::BlockError;
use bytes::BytesMut;
use std::future::{Future, poll_fn};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// Time that a client has to see our end of the stream before the socket is closed under what it still sends.
const LINGER: Duration = Duration::from_secs(1);

/// What all connections share.
pub struct Shared {
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
pub async fn serve<S>(io: S, security: Security, shared: &Shared) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    // One time limit for all of it, however often the client is asked to begin anew.
    let deadline = Instant::now() + shared.config.handshake_timeout;
    let mut handshake = Handshake::new(security);
    let (agreed, io) = within(deadline, shared, negotiate(&mut handshake, io, &*shared.exports)).await?;
    match agreed {
        Outcome::Gone => Ok(()),
        Outcome::Agreed(agreed) => transmit(io, agreed, shared).await,
        Outcome::StartTls => {
            let Some(tls) = &shared.tls else { return Err(ConnectionError::Handshake("TLS is not set up")) };
            let accept = async { tls.acceptor().await.accept(io).await.map_err(ConnectionError::Tls) };
            let io = within(deadline, shared, accept).await?;
            handshake.secured();
            let (agreed, io) =
                within(deadline, shared, negotiate(&mut handshake, io, &*shared.exports)).await?;
            match agreed {
                Outcome::Agreed(agreed) => transmit(io, agreed, shared).await,
                Outcome::Gone | Outcome::StartTls => Ok(()),
            }
        }
    }
}

async fn within<T>(
    deadline: Instant,
    shared: &Shared,
    step: impl Future<Output = Result<T, ConnectionError>>,
) -> Result<T, ConnectionError> {
    tokio::select! {
        result = timeout_at(deadline, step) => result.map_err(|_| ConnectionError::HandshakeTimeout)?,
        () = shared.stop.cancelled() => Err(ConnectionError::Stopped),
    }
}

async fn transmit<S>(io: S, agreed: Agreed, shared: &Shared) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let Agreed { export, negotiated, contexts, input } = agreed;
    let OpenExport { handler, guard, closed, .. } = export;
    let mut transmission = Transmission::new(io, input, negotiated, contexts, handler, closed, shared);
    let result = poll_fn(|cx| transmission.poll(cx)).await;
    let Ended { io, client, under_way } = transmission.end();
    match &result {
        Ok(()) => say_goodbye(io, client).await,
        Err(_) => drop(io),
    }
    // The guard outlives what the client had asked for: nothing touches the disk after it.
    under_way.await;
    drop(guard);
    result
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
    contexts: Arc<[Context]>,
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
