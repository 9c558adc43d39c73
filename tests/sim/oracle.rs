//! What a disk may say: the plain model that the engine is held against.
//!
//! Every write puts its own number into each of its sectors, so that what is read tells which write it came from.

use std::collections::{BTreeMap, BTreeSet};

/// The moment at which something that is still going on ends.
const LATER: u64 = u64::MAX;

/// What an operation put there.
#[derive(Clone, Debug)]
enum Value {
    /// The same everywhere.
    Same(u64),
    /// What was found, by sector.
    Found(Vec<u64>),
}

/// One change of the disk.
#[derive(Clone, Debug)]
struct Change {
    id: u64,
    first: u64,
    end_sector: u64,
    value: Value,
    start: u64,
    end: u64,
    acknowledged: bool,
}

impl Change {
    fn covers(&self, sector: u64) -> bool {
        (self.first..self.end_sector).contains(&sector)
    }

    fn value(&self, sector: u64) -> u64 {
        match &self.value {
            Value::Same(value) => *value,
            Value::Found(all) => all[usize::try_from(sector - self.first).expect("small")],
        }
    }

    fn is_write(&self) -> bool {
        self.id != 0 && matches!(self.value, Value::Same(value) if value != 0)
    }
}

/// All that happened to a disk.
pub struct Oracle {
    pub now: u64,
    changes: Vec<Change>,
    /// Everything acknowledged up to this moment is known to be durable.
    pub durable_to: u64,
    pub violation: Option<String>,
    seen: bool,
    /// The machine lost power, and what it left was not looked at yet.
    pub blind: bool,
    /// Heads that landed meanwhile and fit nothing before: they have to fit what is found.
    unjudged: Vec<(String, Vec<u64>)>,
}

/// Which moments are possible for what was seen.
pub enum When {
    /// Any write acknowledged by `acked` has to be there, any issued by `issued` may be.
    Between { issued: u64, acked: u64 },
}

impl Oracle {
    pub fn new(sectors: u64) -> Self {
        let zeros = Change {
            id: 0,
            first: 0,
            end_sector: sectors,
            value: Value::Same(0),
            start: 0,
            end: 0,
            acknowledged: true,
        };
        Self {
            now: 1,
            changes: vec![zeros],
            durable_to: 0,
            violation: None,
            seen: false,
            blind: false,
            unjudged: Vec::new(),
        }
    }

    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub fn begin(&mut self, id: u64, first: u64, end_sector: u64, value: u64) {
        let start = self.tick();
        self.changes.push(Change {
            id,
            first,
            end_sector,
            value: Value::Same(value),
            start,
            end: LATER,
            acknowledged: false,
        });
    }

    /// The operation ended, with or without success.
    pub fn end(&mut self, id: u64, acknowledged: bool) {
        let now = self.tick();
        if let Some(change) = self.changes.iter_mut().find(|change| change.id == id) {
            change.end = now;
            change.acknowledged = acknowledged;
        }
    }

    /// The process is gone: what had not ended ends now, without success.
    pub fn process_ended(&mut self) {
        let now = self.tick();
        for change in &mut self.changes {
            if change.end == LATER {
                change.end = now;
            }
        }
    }

    pub fn fail(&mut self, what: String) {
        if self.violation.is_none() {
            self.violation = Some(what);
        }
    }

    /// Whether a state was found since the last call.
    pub fn take_seen(&mut self) -> bool {
        std::mem::take(&mut self.seen)
    }

    /// What was found is the truth from now on.
    pub fn found(&mut self, content: &[u64], forget: bool) {
        let now = self.tick();
        self.seen = true;
        if forget {
            self.changes.clear();
            self.durable_to = now;
        }
        self.changes.push(Change {
            id: 0,
            first: 0,
            end_sector: content.len() as u64,
            value: Value::Found(content.to_vec()),
            start: now,
            end: now,
            acknowledged: true,
        });
        self.blind = false;
        for (what, content) in std::mem::take(&mut self.unjudged) {
            self.check_moment(&what, &content, 0);
        }
    }

    /// May `sector` hold `value`? Bytes of a write show for as long as a write that overlapped it in time may still
    /// set that sector's bit.
    fn ok(&self, sector: u64, value: u64, issued: u64, acked: u64) -> bool {
        let on: Vec<&Change> = self.changes.iter().filter(|change| change.covers(sector)).collect();
        let end = |write: &Change| {
            let overlapping = on
                .iter()
                .filter(|other| other.is_write() && other.start <= write.end && write.start <= other.end);
            overlapping.map(|other| other.end).max().unwrap_or(0).max(write.end)
        };
        on.iter().any(|write| {
            write.value(sector) == value && write.start <= issued && {
                let end = if write.is_write() { end(write) } else { write.end };
                !on.iter().any(|other| other.acknowledged && other.end <= acked && other.start > end)
            }
        })
    }

    /// Sectors that stand for all others: the content and the history change only there.
    fn distinct(&self, first: u64, content: &[u64]) -> Vec<(u64, u64)> {
        let mut borders: BTreeSet<u64> = [first].into();
        for change in &self.changes {
            borders.extend([change.first, change.end_sector]);
            if let Value::Found(all) = &change.value {
                borders.extend((1..all.len()).filter(|&at| all[at] != all[at - 1]).map(|at| at as u64));
            }
        }
        let mut seen = BTreeMap::new();
        for (sector, &value) in (first..).zip(content) {
            let class = *borders.range(..=sector).next_back().unwrap_or(&first);
            seen.entry((class, value)).or_insert(sector);
        }
        seen.into_iter().map(|((_, value), sector)| (sector, value)).collect()
    }

    /// Judges what was seen from sector `first` on.
    pub fn check(&mut self, what: &str, first: u64, content: &[u64], when: When) {
        let When::Between { issued, acked } = when;
        for (sector, value) in self.distinct(first, content) {
            if !self.ok(sector, value, issued, acked) {
                self.fail(format!(
                    "{what}: sector {sector} = {value} (issued by {issued}, acknowledged by {acked})"
                ));
            }
        }
    }

    /// Judges a state that has to be one of a single moment, not before `earliest`.
    pub fn check_moment(&mut self, what: &str, content: &[u64], earliest: u64) {
        let pairs = self.distinct(0, content);
        let mut moments: BTreeSet<u64> = [earliest, self.now].into();
        let ends =
            self.changes.iter().flat_map(|change| [change.start, change.end, change.end.saturating_sub(1)]);
        moments.extend(ends.filter(|&at| at >= earliest && at <= self.now));
        let mut nearest = None::<(usize, u64, Vec<_>)>;
        for &moment in moments.iter().rev() {
            let wrong: Vec<_> =
                pairs.iter().filter(|(sector, value)| !self.ok(*sector, *value, moment, moment)).collect();
            if wrong.is_empty() {
                return;
            }
            if nearest.as_ref().is_none_or(|(count, ..)| wrong.len() < *count) {
                nearest = Some((wrong.len(), moment, wrong.into_iter().copied().collect()));
            }
        }
        if self.blind {
            self.unjudged.push((what.to_owned(), content.to_vec()));
            return;
        }
        self.fail(format!("{what}: no moment since {earliest} fits; now {}, nearest (wrong, moment, [sector, value]): {nearest:?}", self.now));
    }
}

/// The numbers in the sectors of `bytes`; a torn sector has one that nobody wrote.
pub fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks(512)
        .map(|sector| {
            let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
            let whole = (0..sector.len()).step_by(8).all(|at| word(at) == word(0));
            if whole { word(0) } else { u64::MAX - 1 }
        })
        .collect()
}

/// Bytes of a write.
pub fn payload(id: u64, sectors: u64) -> Vec<u8> {
    id.to_le_bytes().repeat(usize::try_from(sectors * 64).expect("small"))
}
