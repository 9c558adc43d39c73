//! Metadata contexts: their names, their numbers, and sets of them. Pure.
//!
//! Owns: what a client may ask block status about, and how many contexts at a time.
//! Does not own: when it may ask ([`super::handshake`], [`super::session`]) or the answer ([`super::status`]).

use super::wire::{BASE_ALLOCATION, CHANGED_SINCE, Fields, OPT_LIST_META_CONTEXT, OWN_NAMESPACE};

/// Contexts that one client may select.
pub const CONTEXTS_MAX: usize = 16;

/// A context, as clients name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ContextName {
    /// `base:allocation`: data and holes.
    Allocation,
    /// `blockhouse:changed-since:X`: what differs from the past state that the client calls X.
    ChangedSince(String),
}

impl ContextName {
    /// The name on the wire.
    pub fn text(&self) -> String {
        match self {
            Self::Allocation => BASE_ALLOCATION.to_owned(),
            Self::ChangedSince(past) => format!("{CHANGED_SINCE}{past}"),
        }
    }
}

/// What the queries of one option mean.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queries {
    pub allocation: Allocation,
    pub past: PastStates,
}

/// Whether `base:allocation` is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    Meant,
    NotMeant,
}

/// Which past states are meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PastStates {
    /// Those of these names that there are; perhaps no name at all.
    Named(Vec<String>),
    All,
}

impl Queries {
    /// The disk and the queries in the data of an option; `None` if it is malformed.
    pub fn parse(option: u32, data: &[u8]) -> Option<(String, Self)> {
        let mut fields = Fields(data);
        let disk = fields.string()?.to_owned();
        let count = fields.u32()?;
        let list = option == OPT_LIST_META_CONTEXT;
        let (mut allocation, mut all) = (list && count == 0, list && count == 0);
        let mut named: Vec<String> = Vec::new();
        for _ in 0..count {
            let query = fields.string()?;
            allocation |= query == BASE_ALLOCATION || (list && query == "base:");
            all |= list && (query == OWN_NAMESPACE || query == CHANGED_SINCE);
            let past = query.strip_prefix(CHANGED_SINCE).filter(|past| !past.is_empty());
            // One more than are allowed is enough to refuse.
            if let Some(past) = past
                && named.len() <= CONTEXTS_MAX
                && !named.iter().any(|known| known == past)
            {
                named.push(past.to_owned());
            }
        }
        fields.is_empty().then_some(())?;
        let allocation = if allocation { Allocation::Meant } else { Allocation::NotMeant };
        Some((disk, Self { allocation, past: if all { PastStates::All } else { PastStates::Named(named) } }))
    }

    /// Whether more contexts are named than a client may select.
    pub fn are_too_many(&self) -> bool {
        match &self.past {
            PastStates::All => false,
            PastStates::Named(named) => {
                named.len() + usize::from(self.allocation == Allocation::Meant) > CONTEXTS_MAX
            }
        }
    }

    /// The contexts that match, where `past` are the past states that were found.
    pub fn contexts(&self, past: &[String]) -> Vec<ContextName> {
        let allocation = (self.allocation == Allocation::Meant).then_some(ContextName::Allocation);
        allocation.into_iter().chain(past.iter().cloned().map(ContextName::ChangedSince)).collect()
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

    fn parse(option: u32, queries: &[&str]) -> (bool, Option<Vec<String>>) {
        let mut data = b"\0\0\0\x01d".to_vec();
        data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
        for query in queries {
            data.extend(u32::try_from(query.len()).unwrap().to_be_bytes());
            data.extend(query.as_bytes());
        }
        let (disk, found) = Queries::parse(option, &data).unwrap();
        assert_eq!(disk, "d");
        for len in 0..data.len() {
            assert_eq!(Queries::parse(option, &data[..len]), None);
        }
        let past = match found.past {
            PastStates::All => None,
            PastStates::Named(named) => Some(named),
        };
        (found.allocation == Allocation::Meant, past)
    }

    #[test]
    fn queries_mean_what_they_name_and_wildcards_only_list() {
        let (list, set) = (OPT_LIST_META_CONTEXT, OPT_LIST_META_CONTEXT + 1);
        let named = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(parse(list, &[]), (true, None));
        assert_eq!(parse(set, &[]), (false, named(&[])));
        assert_eq!(parse(list, &["base:"]), (true, named(&[])));
        assert_eq!(parse(set, &["base:", "blockhouse:", "blockhouse:changed-since:"]), (false, named(&[])));
        assert_eq!(parse(list, &["blockhouse:"]), (false, None));
        assert_eq!(parse(list, &["blockhouse:changed-since:"]), (false, None));
        let queries = ["blockhouse:changed-since:7", "base:allocation", "blockhouse:changed-since:v@2"];
        assert_eq!(parse(set, &queries), (true, named(&["7", "v@2"])));
        let twice = ["blockhouse:changed-since:7", "qemu:x", "nonsense", "blockhouse:changed-since:7"];
        assert_eq!(parse(set, &twice), (false, named(&["7"])));
    }

    #[test]
    fn no_more_contexts_are_named_than_may_be_selected() {
        let named = |count| Queries {
            allocation: Allocation::Meant,
            past: PastStates::Named(vec!["1".into(); count]),
        };
        assert!(!named(CONTEXTS_MAX - 1).are_too_many());
        assert!(named(CONTEXTS_MAX).are_too_many());
    }

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
