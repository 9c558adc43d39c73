//! What of one client is under way: requests that wait, writes and reads in pieces, and what they came to.
//!
//! Owns: these values.
//! Does not own: what happens to them when (the transmission).

use super::budget::Reservation;
use super::handshake::Replies;
use super::reply::Part;
use super::session::{Fragments, Refusal, Request};
use super::status::{Status, Stretch};
use super::wire::Cookie;
use crate::block::{BlockError, Durability, ReadPlan};
use crate::geometry::{ByteRange, len_of};

pub(super) enum Wanted {
    /// A read perhaps with its plan, unless that has become old.
    Request {
        cookie: Cookie,
        request: Request,
        plan: Option<Result<ReadPlan, BlockError>>,
    },
    Write {
        cookie: Cookie,
        range: ByteRange,
        durability: Durability,
    },
}

pub(super) struct Write {
    pub cookie: Cookie,
    pub durability: Durability,
    pub reservation: Reservation,
    pub piece: WritePiece,
}

/// What a long write waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WritePiece {
    Payload,
    Disk,
}

/// A read that is sent piece by piece.
pub(super) struct Read {
    pub cookie: Cookie,
    pub range: ByteRange,
    /// Where the next piece begins.
    pub at_bytes: u64,
    pub fragments: Fragments,
    pub reservation: Reservation,
}

/// What is kept until the client has taken the bytes before.
pub(super) enum Held {
    Bytes(Reservation),
    Read(Read),
}

/// A request, or a piece of one, that is ready to be answered.
pub(super) enum Done {
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

impl Done {
    /// Whether it is the rest of a reply that others must not interrupt: there is one at a time.
    pub fn continues(&self, replies: Replies) -> bool {
        match self {
            Self::Read { read, .. } => read.at_bytes > read.range.start() && read.streams(replies),
            Self::Piece(_) | Self::Plain { .. } | Self::Status { .. } => false,
        }
    }
}

impl Wanted {
    /// A plan keeps files alive: not while a client is waited for.
    pub fn without_plan(self) -> Self {
        match self {
            Self::Request { cookie, request, .. } => Self::Request { cookie, request, plan: None },
            write @ Self::Write { .. } => write,
        }
    }

    /// Bytes that it has in memory, if it is done in one piece.
    pub fn bytes(&self) -> usize {
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
    pub fn streams(&self, replies: Replies) -> bool {
        match replies {
            Replies::Simple => true,
            Replies::Structured => self.fragments == Fragments::One,
        }
    }
}
