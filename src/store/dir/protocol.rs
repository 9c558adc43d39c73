//! The rules by which processes that share nothing but a folder of versions read and swap one key.
//!
//! Owns: the order of steps and every decision; no file is touched here. The folder is a trait, so the model in
//! `model.rs` runs these very functions, step by step, in all orders.
//! Does not own: how a step is done on a file system (`versions.rs`), or how often an attempt is made.
//!
//! Why it is safe, where *first* means the first file that ever had a number:
//! - A version is linked by somebody who read the one below, and only then: the firsts form one chain. Names that were
//!   tidied can come back, from writers who slept since they read; these are *late*.
//! - Tidying removes the lowest name first, so while first `n` is there, first `n + 1` was never removed.
//! - Each version records the nonce of the one below. A late `n` names first `n - 1`, which is gone; should another late
//!   one stand in its place, it has another nonce. So `n` counts, exactly, while the version that it names is below it.
//! - A reader opens `n` before it looks below, a writer looks after its link: what was true then was true before.

/// How many versions tidying leaves. A version counts only with the one below it, so no fewer.
pub const VERSIONS_KEPT: u64 = 2;

/// Drawn anew for each version, whatever its content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Nonce(pub [u8; 16]);

impl Nonce {
    /// Version 0, which the folder is made with, has no content and no nonce of its own.
    pub const VERSION_ZERO: Self = Self([0; 16]);
}

/// A version as it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Version {
    /// Its place in the folder, from 0.
    pub number: u64,
    pub nonce: Nonce,
    /// Nonce of the version that it was made from.
    pub below: Nonce,
}

/// What a listing of the folder found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Highest {
    /// There is no folder: the key was never made.
    NoFolder,
    /// No version was seen, as when all changed while it was listed.
    Nothing,
    /// The highest number seen; there may be higher ones.
    Number(u64),
}

/// What `link` answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LinkAnswer {
    Linked,
    /// The name is taken; over a network perhaps by this very link.
    Exists,
}

/// One attempt's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attempt<T> {
    Done(T),
    /// Others changed the folder meanwhile.
    Again,
}

/// How a swap ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// This number is the caller's, and durable.
    Won(u64),
    /// Not made, and never will be.
    Conflict,
    /// It may have been made, and built upon.
    Unclear,
}

/// One folder of versions, seen by one process. Each call is one step; anything may happen between two.
pub trait Folder {
    /// Why a step could not be done.
    type Stop;

    fn highest(&mut self) -> Result<Highest, Self::Stop>;
    /// Opens a version and keeps it; `None` if there is none.
    fn open(&mut self, number: u64) -> Result<Option<Version>, Self::Stop>;
    /// Nonce of a version that is there now, not one remembered.
    fn nonce_of(&mut self, number: u64) -> Result<Option<Nonce>, Self::Stop>;
    /// Whether the state that was read (`None`: there is no folder) is the one that the swap expects.
    fn is_expected(&mut self, found: Option<&Version>) -> bool;
    /// Moves a folder with version 0 into place, unless there is one.
    fn create(&mut self) -> Result<(), Self::Stop>;
    /// Links the new version, which names the nonce below it.
    fn link(&mut self, number: u64, below: Nonce) -> Result<LinkAnswer, Self::Stop>;
    /// Whether what has this number is the file that `link` was called with.
    fn is_mine(&mut self, number: u64) -> Result<bool, Self::Stop>;
    /// Makes the names in the folder, and the folder's own, durable.
    fn sync(&mut self) -> Result<(), Self::Stop>;
    /// The numbers up to this one, from a listing that began after this call.
    fn numbers_up_to(&mut self, last: u64) -> Result<Vec<u64>, Self::Stop>;
    /// Removes a version; one that is gone is fine.
    fn unlink(&mut self, number: u64) -> Result<(), Self::Stop>;
}

/// Finds the current version; `None`: the key was never made. It is a state of the key, perhaps not yet durable.
pub fn find<F: Folder>(folder: &mut F) -> Result<Attempt<Option<Version>>, F::Stop> {
    let number = match folder.highest()? {
        Highest::NoFolder => return Ok(Attempt::Done(None)),
        Highest::Nothing => return Ok(Attempt::Again),
        Highest::Number(number) => number,
    };
    let Some(version) = folder.open(number)? else { return Ok(Attempt::Again) };
    if number > 0 && folder.nonce_of(number - 1)? != Some(version.below) {
        return Ok(Attempt::Again);
    }
    Ok(Attempt::Done(Some(version)))
}

/// Reads the current version so that the reader may act on it: it survives power loss.
pub fn read<F: Folder>(folder: &mut F) -> Result<Attempt<Option<Version>>, F::Stop> {
    let found = find(folder)?;
    if matches!(found, Attempt::Done(Some(_))) {
        folder.sync()?;
    }
    Ok(found)
}

/// Links a version on top of the current one if that is the one expected.
pub fn swap<F: Folder>(folder: &mut F) -> Result<Attempt<Outcome>, F::Stop> {
    let found = match find(folder)? {
        Attempt::Done(found) => found,
        Attempt::Again => return Ok(Attempt::Again),
    };
    if !folder.is_expected(found.as_ref()) {
        return Ok(Attempt::Done(Outcome::Conflict));
    }
    let Some(base) = found else {
        folder.create()?;
        return Ok(Attempt::Again);
    };
    let Some(number) = base.number.checked_add(1) else { return Ok(Attempt::Done(Outcome::Conflict)) };
    let mine = match folder.link(number, base.nonce)? {
        LinkAnswer::Linked => true,
        LinkAnswer::Exists => folder.is_mine(number)?,
    };
    // The base still there says that the first to take the number still has it, whoever that is.
    let settled = folder.nonce_of(base.number)? == Some(base.nonce);
    Ok(Attempt::Done(match (settled, mine) {
        (false, _) => Outcome::Unclear,
        (true, false) => Outcome::Conflict,
        (true, true) => {
            folder.sync()?;
            Outcome::Won(number)
        }
    }))
}

/// Removes what nobody needs once version `won` is durable.
pub fn tidy<F: Folder>(folder: &mut F, won: u64) -> Result<(), F::Stop> {
    let Some(last) = won.checked_sub(VERSIONS_KEPT) else { return Ok(()) };
    // A listing of its own: one from before the swap may lack a low version, and the next one up would go first.
    let mut numbers = folder.numbers_up_to(last)?;
    numbers.sort_unstable();
    // The first failure ends it: skipping a version would break the order that everything above rests on.
    numbers.into_iter().try_for_each(|number| folder.unlink(number))
}
