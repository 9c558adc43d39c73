//! How bytes get from and to a client.
//!
//! Owns: [`Transport`], what a transmission needs of a stream, over any stream of tokio's (TLS among them) and over a
//! plain socket, which can be handed pages of a file; and why and for what a stream is waited for.
//! Does not own: what the bytes say ([`super::session`]) or who polls (`connection`, `threads`).

use super::reply::{FileSpan, Outbox};
use crate::geometry::len_of;
use bytes::Buf;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use std::io;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_write_buf;

/// Slices of one send.
const SLICES_MAX: usize = 64;

/// A stream to a client. `Pending` promises that the task is woken when it is worth trying again.
pub trait Transport: Send + Unpin {
    /// Whether it sends stretches of files ([`super::reply::Part::File`]).
    fn takes_files(&self) -> bool;

    /// Puts what has come into `into`, which is not empty. 0: the client sends no more.
    fn poll_receive(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Sends from the front of `outbox` and takes from it what was sent. 0: the stream takes no more, for ever.
    fn poll_send(&mut self, cx: &mut Context<'_>, outbox: &mut Outbox) -> Poll<io::Result<usize>>;

    /// Passes on what is held back.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

/// Why a transmission is polled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// Its waker was used, or it is the first time.
    Woken,
    /// The stream is ready; nothing else happened.
    Stream,
}

/// What the stream has to be ready for, for a transmission to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interest {
    pub receive: bool,
    pub send: bool,
}

/// A stream that tokio polls.
pub struct Streamed<S>(pub S);

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Transport for Streamed<S> {
    fn takes_files(&self) -> bool {
        false
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(into);
        let received = Pin::new(&mut self.0).poll_read(cx, &mut buffer)?;
        received.map(|()| Ok(buffer.filled().len()))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, outbox: &mut Outbox) -> Poll<io::Result<usize>> {
        poll_write_buf(Pin::new(&mut self.0), cx, outbox)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
}

/// A connected socket that does not block, and whose owner is told by other means (epoll) when it is ready.
pub struct PlainSocket(OwnedFd);

impl PlainSocket {
    /// `fd` is in non-blocking mode.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The socket itself.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for PlainSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Calls again when a signal interrupts, and turns "not now" into `Pending`.
fn ready(mut call: impl FnMut() -> Result<usize, Errno>) -> Poll<io::Result<usize>> {
    loop {
        match call() {
            Ok(count) => return Poll::Ready(Ok(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Poll::Pending,
            Err(error) => return Poll::Ready(Err(error.into())),
        }
    }
}

impl Transport for PlainSocket {
    fn takes_files(&self) -> bool {
        true
    }

    fn poll_receive(&mut self, _: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        ready(|| Ok(rustix::net::recv(&self.0, &mut *into, RecvFlags::DONTWAIT)?.0))
    }

    fn poll_send(&mut self, _: &mut Context<'_>, outbox: &mut Outbox) -> Poll<io::Result<usize>> {
        let sent = match outbox.front_file() {
            Some(span) => self.send_file(span),
            None => self.send_bytes(outbox),
        };
        if let Poll::Ready(Ok(count)) = sent {
            outbox.advance(count);
        }
        sent
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl PlainSocket {
    fn send_bytes(&self, outbox: &Outbox) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = outbox.chunks_vectored(&mut slices);
        let mut flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if outbox.has_file() {
            // Not a packet of its own for a header.
            flags |= SendFlags::MORE;
        }
        match &slices[..count] {
            [only] => ready(|| rustix::net::send(&self.0, only, flags)),
            many => ready(|| rustix::net::sendmsg(&self.0, many, &mut SendAncillaryBuffer::default(), flags)),
        }
    }

    fn send_file(&self, span: &FileSpan) -> Poll<io::Result<usize>> {
        let Some(file) = span.file.as_fd() else {
            return Poll::Ready(Err(io::Error::other("a file without a descriptor")));
        };
        ready(|| {
            let mut offset_bytes = span.offset_bytes;
            rustix::fs::sendfile(&self.0, file, Some(&mut offset_bytes), len_of(span.len_bytes))
        })
    }
}
