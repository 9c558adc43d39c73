//! One client, from its first byte to its last.
//!
//! Owns: the handshake over a socket, what comes after it in which order, and the end of the socket.
//! Does not own: requests and replies ([`super::transmission`]) or listening ([`super::server`]).

use super::budget::NodeBudget;
use super::handshake::{self, ExportFacts, Handshake, Negotiated};
use super::session::BadStream;
use super::status::Context;
use super::transmission::{ClientEnd, Ended, Transmission};
use super::wire::LIST_MAX;
use super::{Config, Exports, OpenExport, past::Past};
use crate::block::BlockError;
use bytes::BytesMut;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Time that a client has to see our end of the stream before the socket is closed under what it still sends.
const LINGER: Duration = Duration::from_secs(1);

/// What all connections share.
pub struct Shared {
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
pub async fn serve<S>(mut io: S, shared: &Shared) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut input = BytesMut::new();
    let agreed = tokio::select! {
        agreed = timeout(shared.config.handshake_timeout, negotiate(&mut io, &mut input, &*shared.exports)) => {
            agreed.map_err(|_| ConnectionError::HandshakeTimeout)??
        }
        () = shared.stop.cancelled() => None,
    };
    let Some(Agreed { export, negotiated, contexts }) = agreed else { return Ok(()) };
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
struct Agreed {
    export: OpenExport,
    negotiated: Negotiated,
    /// Those that were selected, in the order of their ids.
    contexts: Arc<[Context]>,
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
    let mut past = Past::default();
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
            handshake::Event::Past { name, past: wanted, purpose } => {
                opened = None;
                let found = match exports.open(&name).await {
                    Ok(export) => past.find(&*export.handler, wanted, purpose).await,
                    Err(error) => Err(error),
                };
                handshake.past_found(found.as_deref());
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
                let contexts = handshake.contexts().iter().map(|name| past.context(name)).collect();
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
