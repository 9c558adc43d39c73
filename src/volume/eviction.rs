//! Which slot of the clean cache is refilled next: S3-FIFO.
//!
//! Owns: the two queues of slots, how often each slot was asked for, and the memory of what left early.
//! Does not own: what is in a slot, or whether it may be refilled; the caller says so for each slot that comes up.
//!
//! Not foyer's: it makes room after an insert, while a slot has to be free before; it evicts what is pinned, whose slot
//! is then lost to the cache for as long; and it looks at any number of entries under its lock.

use std::collections::{HashSet, VecDeque};

/// Asked for more often than this counts no more.
const FREQUENCY_MAX: u8 = 3;
/// Slots looked at for one eviction, then the first that may go goes: the caller holds a lock.
const STEPS_MAX: usize = 256;
/// One of so many slots is for what was asked for only once.
const SMALL_SHARE: usize = 10;

/// What the caller says about a slot that comes up for eviction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It may not be refilled now.
    Held,
    /// It holds nothing.
    Empty,
    /// It holds the content with this fingerprint.
    Full(u64),
}

/// The order of eviction. Each slot is in it at most once, which the caller sees to.
#[derive(Debug)]
pub struct S3Fifo {
    /// Slots in all, in the queues or not.
    slots: usize,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    frequency: Vec<u8>,
    ghosts: HashSet<u64>,
    ghost_order: VecDeque<u64>,
}

impl S3Fifo {
    /// For slots 0 to `slots` - 1, none of them queued.
    pub fn new(slots: u32) -> Self {
        let slots = slots as usize;
        Self {
            slots,
            small: VecDeque::new(),
            main: VecDeque::new(),
            frequency: vec![0; slots],
            ghosts: HashSet::new(),
            ghost_order: VecDeque::new(),
        }
    }

    /// Queues a slot that was filled. What left early before and is wanted again goes with what is wanted often.
    pub fn push(&mut self, slot: u32, fingerprint: u64) {
        self.frequency[slot as usize] = 0;
        if self.ghosts.contains(&fingerprint) { &mut self.main } else { &mut self.small }.push_back(slot);
    }

    /// Queues a slot that has proved itself before.
    pub fn push_proven(&mut self, slot: u32) {
        self.frequency[slot as usize] = 0;
        self.main.push_back(slot);
    }

    /// A slot was asked for.
    pub fn touch(&mut self, slot: u32) {
        let frequency = &mut self.frequency[slot as usize];
        *frequency = FREQUENCY_MAX.min(*frequency + 1);
    }

    /// Takes the slot to refill out of its queue. `None`: all that were looked at are held.
    pub fn evict(&mut self, fate: impl Fn(u32) -> Fate) -> Option<u32> {
        self.evict_fairly(&fate).or_else(|| self.evict_anything(&fate))
    }

    fn evict_fairly(&mut self, fate: &impl Fn(u32) -> Fate) -> Option<u32> {
        for _ in 0..STEPS_MAX {
            let from_small = self.main.is_empty() || self.small.len() > (self.slots / SMALL_SHARE).max(1);
            let queue = if from_small { &mut self.small } else { &mut self.main };
            let slot = queue.pop_front()?;
            let frequency = &mut self.frequency[slot as usize];
            match fate(slot) {
                Fate::Held => queue.push_back(slot),
                Fate::Empty => return Some(slot),
                Fate::Full(_) if *frequency > 0 && from_small => {
                    *frequency = 0;
                    self.main.push_back(slot);
                }
                Fate::Full(_) if *frequency > 0 => {
                    *frequency -= 1;
                    queue.push_back(slot);
                }
                Fate::Full(fingerprint) => {
                    if from_small {
                        self.remember(fingerprint);
                    }
                    return Some(slot);
                }
            }
        }
        None
    }

    fn evict_anything(&mut self, fate: &impl Fn(u32) -> Fate) -> Option<u32> {
        for queue in [&mut self.small, &mut self.main] {
            for _ in 0..STEPS_MAX.min(queue.len()) {
                let slot = queue.pop_front()?;
                if fate(slot) != Fate::Held {
                    return Some(slot);
                }
                queue.push_back(slot);
            }
        }
        None
    }

    fn remember(&mut self, fingerprint: u64) {
        if self.ghosts.insert(fingerprint) {
            self.ghost_order.push_back(fingerprint);
        }
        if self.ghost_order.len() > self.slots
            && let Some(oldest) = self.ghost_order.pop_front()
        {
            self.ghosts.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A cache of numbers, one a slot.
    struct Numbers {
        order: S3Fifo,
        free: Vec<u32>,
        held: HashSet<u32>,
        content: HashMap<u32, u64>,
    }

    impl Numbers {
        fn new(slots: u32) -> Self {
            Self {
                order: S3Fifo::new(slots),
                free: (0..slots).collect(),
                held: HashSet::new(),
                content: HashMap::new(),
            }
        }

        fn find(&self, number: u64) -> Option<u32> {
            self.content.iter().find_map(|(&slot, &found)| (found == number).then_some(slot))
        }

        /// Whether it was there; it is afterwards, unless all slots are held.
        fn want(&mut self, number: u64) -> bool {
            if let Some(slot) = self.find(number) {
                self.order.touch(slot);
                return true;
            }
            let (held, content) = (&self.held, &self.content);
            let fate = |slot: u32| match content.get(&slot) {
                _ if held.contains(&slot) => Fate::Held,
                Some(&number) => Fate::Full(number),
                None => Fate::Empty,
            };
            if let Some(slot) = self.free.pop().or_else(|| self.order.evict(fate)) {
                assert!(!self.held.contains(&slot), "a held slot is never given out");
                self.content.insert(slot, number);
                self.order.push(slot, number);
            }
            false
        }
    }

    proptest! {
        #[test]
        fn every_slot_is_queued_once_and_held_ones_stay(
            slots in 1u32..40,
            steps in proptest::collection::vec((0u8..8, 0u64..60), 0..400),
        ) {
            let mut numbers = Numbers::new(slots);
            for (step, number) in steps {
                let slot = u32::try_from(number).unwrap() % slots;
                match step {
                    0 if numbers.content.contains_key(&slot) => { numbers.held.insert(slot); }
                    1 => { numbers.held.remove(&slot); }
                    2 if !numbers.held.contains(&slot) => { numbers.content.remove(&slot); }
                    _ => {
                        let before: Vec<_> = numbers.held.iter().map(|slot| numbers.content.get(slot).copied()).collect();
                        numbers.want(number);
                        let full = numbers.find(number).is_some();
                        prop_assert!(full || numbers.held.len() == slots as usize);
                        let after: Vec<_> = numbers.held.iter().map(|slot| numbers.content.get(slot).copied()).collect();
                        let kept = before.iter().zip(&after).all(|(before, after)| before.is_none() || before == after);
                        prop_assert!(kept);
                    }
                }
                let mut all: Vec<u32> = numbers.order.small.iter().chain(&numbers.order.main).copied().collect();
                all.extend(&numbers.free);
                all.sort_unstable();
                prop_assert_eq!(all, (0..slots).collect::<Vec<_>>());
                prop_assert!(numbers.order.ghost_order.len() <= slots as usize);
                prop_assert_eq!(numbers.order.ghost_order.len(), numbers.order.ghosts.len());
            }
        }
    }

    #[test]
    fn one_scan_over_everything_leaves_what_is_wanted_often() {
        let mut numbers = Numbers::new(100);
        for round in 0..50 {
            for number in 0..50 {
                let hit = numbers.want(number);
                assert!(hit || round == 0, "{number} was lost in round {round}");
                numbers.want(number);
            }
            for number in 0..60 {
                numbers.want(1000 + round * 60 + number);
            }
        }
    }

    #[test]
    fn what_left_early_and_comes_back_stays_longer() {
        let mut numbers = Numbers::new(20);
        numbers.want(0);
        for number in 1..30 {
            numbers.want(number);
        }
        assert_eq!(numbers.find(0), None);
        numbers.want(0);
        for number in 100..140 {
            numbers.want(number);
        }
        assert!(numbers.find(0).is_some());
    }

    #[test]
    fn an_eviction_looks_at_a_bounded_number_of_slots() {
        let mut order = S3Fifo::new(100_000);
        (0..100_000).for_each(|slot| order.push(slot, slot.into()));
        (0..3 * 100_000).for_each(|step| order.touch(step % 100_000));
        let looked = std::cell::Cell::new(0);
        let evicted = order.evict(|slot| {
            looked.set(looked.get() + 1);
            Fate::Full(slot.into())
        });
        assert!(evicted.is_some() && looked.get() <= 3 * STEPS_MAX, "{looked:?}");
    }
}
