//! Metadata contexts: their names, their numbers, and sets of them. Pure.
//!
//! Owns: what a client may ask block status about, and how many contexts at a time.
//! Does not own: when it may ask ([`super::handshake`], [`super::session`]) or the answer ([`super::status`]).

use super::wire::BASE_ALLOCATION;

/// Contexts that one client may select.
pub const CONTEXTS_MAX: usize = 16;

/// A context, as clients name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ContextName {
    /// `base:allocation`: data and holes.
    Allocation,
}

impl ContextName {
    /// The name on the wire.
    pub fn text(&self) -> String {
        match self {
            Self::Allocation => BASE_ALLOCATION.to_owned(),
        }
    }
}

/// Some of the contexts that a client selected. The first selected one has the id 1, the next 2 and so on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ContextSet(u32);

const _: () = assert!(CONTEXTS_MAX <= 32, "a bit for each context");

impl ContextSet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// The first `count`, at most [`CONTEXTS_MAX`].
    pub fn first(count: usize) -> Self {
        (0..count.min(CONTEXTS_MAX)).fold(Self::EMPTY, |set, index| Self(set.0 | 1 << index))
    }

    /// Those with these ids; `None` if one of them is not in `all`, or twice there.
    pub fn of_ids(ids: impl IntoIterator<Item = u32>, all: Self) -> Option<Self> {
        let mut set = Self::EMPTY;
        for id in ids {
            let bit = 1u32.checked_shl(id.checked_sub(1)?)?;
            if all.0 & bit == 0 || set.0 & bit != 0 {
                return None;
            }
            set.0 |= bit;
        }
        Some(set)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many.
    pub fn count(self) -> usize {
        self.ids().count()
    }

    /// Their ids, ascending.
    pub fn ids(self) -> impl Iterator<Item = u32> {
        (0..32).filter(move |index| self.0 >> index & 1 == 1).map(|index| index + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_takes_each_selected_id_once_and_no_other() {
        let all = ContextSet::first(3);
        assert_eq!(all.ids().collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(ContextSet::first(99).count(), CONTEXTS_MAX);
        let two = ContextSet::of_ids([3, 1], all).unwrap();
        assert_eq!((two.ids().collect::<Vec<_>>(), two.count()), (vec![1, 3], 2));
        for wrong in [vec![0], vec![4], vec![1, 1], vec![33], vec![u32::MAX]] {
            assert_eq!(ContextSet::of_ids(wrong.clone(), all), None, "{wrong:?}");
        }
        assert!(ContextSet::of_ids([], all).unwrap().is_empty());
    }
}
