//! Bugs that a test can switch on, one at a time, to prove that the suite catches each.
//!
//! Owns: the list. Every use is `if mutant::on(Mutant::X)` beside the rule that it breaks; without the `mutants`
//! feature the answer is `false` at compile time.
//! Does not own: anything that runs in a release.

/// A known bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// A write's bits are set before its bytes are in place (L2).
    BitBeforeData,
    /// Map words are copied after the data sync instead of before it (L3).
    CopyAfterSync,
    /// A flush joins one that is already running (L5).
    JoinRunningFlush,
    /// A failed fsync is forgotten and the next one believed (L4).
    RetrySync,
    /// A writer does not look again whether its epoch is still the active one (L6).
    NoSecondLook,
    /// The head is swapped before its packs are there.
    HeadBeforePack,
    /// A swap that lost is repeated with the new state's `ETag` (G5).
    RefreshedETag,
    /// A block that became zero is left out of the map (G10).
    ZeroNotRecorded,
    /// Epochs of another term are replayed (G1, G26).
    OtherTermReplayed,
    /// Epoch files are removed before the head is swapped.
    RemovedTooEarly,
    /// A snapshot's object is put before the head (G12).
    SnapshotBeforeHead,
    /// A whole-block discard empties its words (L19).
    DiscardEmptiesWords,
    /// A live map that was only partly copied is believed (L22).
    HalfLiveMap,
    /// Epochs found at recovery are committed one after the other (L15, L21).
    CommittedOneByOne,
    /// Nobody asks for write-back errors before a commit (L23).
    NoWriteBackCheck,
    /// A discard asks only the active epoch and the base whether it needs a record (L20).
    DiscardSkipsFrozen,
    /// Everything found at a restart is taken as synced (L25).
    CleanAfterRestart,
    /// Recovery believes the head that it read, without swapping it to its own incarnation (L28).
    HeadOnlyRead,
}

impl Mutant {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::BitBeforeData,
        Self::CopyAfterSync,
        Self::JoinRunningFlush,
        Self::RetrySync,
        Self::NoSecondLook,
        Self::HeadBeforePack,
        Self::RefreshedETag,
        Self::ZeroNotRecorded,
        Self::OtherTermReplayed,
        Self::RemovedTooEarly,
        Self::SnapshotBeforeHead,
        Self::DiscardEmptiesWords,
        Self::HalfLiveMap,
        Self::CommittedOneByOne,
        Self::NoWriteBackCheck,
        Self::DiscardSkipsFrozen,
        Self::CleanAfterRestart,
        Self::HeadOnlyRead,
    ];
}

#[cfg(feature = "mutants")]
mod switch {
    use super::Mutant;
    use std::cell::Cell;

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether that bug is in, on this thread.
    pub fn on(mutant: Mutant) -> bool {
        ON.get() == Some(mutant)
    }

    /// Puts a bug in, on this thread, and takes out the one before.
    pub fn set(mutant: Option<Mutant>) {
        ON.set(mutant);
    }
}

#[cfg(feature = "mutants")]
pub use switch::{on, set};

/// Whether that bug is in: never, in this build.
#[cfg(not(feature = "mutants"))]
pub const fn on(_mutant: Mutant) -> bool {
    false
}
