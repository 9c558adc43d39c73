//! Runs the rules of `protocol.rs` in every order of their steps, on a folder that is as unhelpful as it may be.
//!
//! Covered: any step of one process between any two of another, so a stop or a kill anywhere; listings that are not
//! atomic (a name that comes or goes meanwhile may be seen or not, one that stays is seen); a network that repeats
//! `link` after a lost answer; readers; power loss that takes all that was not synced.
//! Each rule is also left out, by a folder that lies to the rules: the search must then find what breaks.
//!
//! Owns: the folder of the model, its processes, and the search through their steps.
//! Does not own: the rules ([`super::protocol`]), or what real file systems do (the suite of all stores).

use super::protocol::{
    Attempt, Folder, Highest, LinkAnswer, Nonce, Outcome, Version, find, read, swap, tidy,
};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Which rule is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    Nothing,
    /// A reader lists, then opens, and takes what it opened.
    ReaderOpensOnly,
    /// A reader takes any version below for the one that was built upon.
    ReaderLooksByNumber,
    /// A writer takes any version with its base's number for its base.
    WriterLooksByNumber,
    /// `EEXIST` means lost.
    ExistsIsLost,
    /// After its link a writer believes to have won.
    LinkedIsWon,
    TidyHighestFirst,
    KeepOnlyTheHighest,
    /// The first version is linked into a folder that is made empty.
    FirstIntoEmptyFolder,
    /// A reader acts on what it read without syncing.
    ReadWithoutSync,
    LoserUnlinks,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Network {
    Local,
    RepeatsLink,
}

struct World {
    wrong: Wrong,
    /// Swaps of each writer.
    writers: &'static [u8],
    readers: usize,
    network: Network,
    /// Whether the folder stands, with version 0, when it begins.
    made: bool,
    states_max: usize,
}

type Names = BTreeMap<u8, (u8, u8)>; // number → (nonce, nonce below); 0 is version 0's

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    folder: Option<Names>,
    /// What was ever current, with what it was built on; by number.
    history: Vec<(u8, u8)>,
    synced: usize,
    processes: Vec<Process>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Process {
    program: Program,
    tries: u8,
    /// Answers to the steps done so far; the program runs from its start over them.
    answers: Vec<Answer>,
    listing_from: Option<Names>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Program {
    Swap,
    Tidy(u8),
    Read,
    Stopped,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Answer {
    Highest(Highest),
    Open(Option<Version>),
    Nonce(Option<Nonce>),
    Done,
    Link(LinkAnswer),
    Mine(bool),
    Numbers(Vec<u64>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Highest,
    Open(u64),
    NonceOf(u64),
    Create,
    Link(u64, Nonce),
    IsMine(u64),
    Sync,
    NumbersUpTo(u64),
    Unlink(u64),
}

/// Answers from the record; the first step without an answer stops the program.
struct Replay<'a> {
    answers: std::slice::Iter<'a, Answer>,
    wrong: Wrong,
    last_opened: Option<Version>,
}

macro_rules! replay {
    ($self:ident, $step:expr, $pattern:pat => $value:expr) => {
        match $self.answers.next() {
            Some($pattern) => Ok($value),
            Some(other) => panic!("{other:?} for {:?}", $step),
            None => Err($step),
        }
    };
}

impl Folder for Replay<'_> {
    type Stop = Step;

    fn highest(&mut self) -> Result<Highest, Step> {
        let found = replay!(self, Step::Highest, Answer::Highest(found) => *found)?;
        let is_empty = found == Highest::Nothing && self.wrong == Wrong::FirstIntoEmptyFolder;
        Ok(if is_empty { Highest::Number(0) } else { found })
    }

    fn open(&mut self, number: u64) -> Result<Option<Version>, Step> {
        let opened = if number == 0 && self.wrong == Wrong::FirstIntoEmptyFolder {
            Some(Version { number: 0, nonce: Nonce::VERSION_ZERO, below: Nonce::VERSION_ZERO })
        } else {
            replay!(self, Step::Open(number), Answer::Open(opened) => *opened)?
        };
        self.last_opened = opened;
        Ok(opened)
    }

    fn nonce_of(&mut self, number: u64) -> Result<Option<Nonce>, Step> {
        let opened = self.last_opened.expect("opened before");
        let looks_below = number + 1 == opened.number;
        let truth = match self.wrong {
            Wrong::ReaderOpensOnly if looks_below => Some(opened.below),
            Wrong::LinkedIsWon if !looks_below => Some(opened.nonce),
            Wrong::FirstIntoEmptyFolder if number == 0 => Some(Nonce::VERSION_ZERO),
            _ => replay!(self, Step::NonceOf(number), Answer::Nonce(nonce) => *nonce)?,
        };
        Ok(match self.wrong {
            Wrong::ReaderLooksByNumber if looks_below => truth.map(|_| opened.below),
            Wrong::WriterLooksByNumber if !looks_below => truth.map(|_| opened.nonce),
            Wrong::ExistsIsLost if !looks_below => Some(opened.nonce),
            _ => truth,
        })
    }

    fn is_expected(&mut self, _: Option<&Version>) -> bool {
        true
    }

    fn create(&mut self) -> Result<(), Step> {
        replay!(self, Step::Create, Answer::Done => ())
    }

    fn link(&mut self, number: u64, below: Nonce) -> Result<LinkAnswer, Step> {
        replay!(self, Step::Link(number, below), Answer::Link(answer) => *answer)
    }

    fn is_mine(&mut self, number: u64) -> Result<bool, Step> {
        let mine = replay!(self, Step::IsMine(number), Answer::Mine(mine) => *mine)?;
        Ok(mine && self.wrong != Wrong::ExistsIsLost)
    }

    fn sync(&mut self) -> Result<(), Step> {
        replay!(self, Step::Sync, Answer::Done => ())
    }

    fn numbers_up_to(&mut self, last: u64) -> Result<Vec<u64>, Step> {
        let last = if self.wrong == Wrong::KeepOnlyTheHighest { last + 1 } else { last };
        replay!(self, Step::NumbersUpTo(last), Answer::Numbers(numbers) => numbers.clone())
    }

    fn unlink(&mut self, number: u64) -> Result<(), Step> {
        replay!(self, Step::Unlink(number), Answer::Done => ())
    }
}

fn nonce(small: u8) -> Nonce {
    Nonce([small; 16])
}

fn version(number: u8, (own, below): (u8, u8)) -> Version {
    Version { number: u64::from(number), nonce: nonce(own), below: nonce(below) }
}

fn small(number: u64) -> u8 {
    u8::try_from(number).expect("the model's numbers are small")
}

/// What a program that ran over its answers wants next, or how it ended.
enum Ran {
    Wants(Step),
    Again,
    Swapped(Outcome),
    Tidied,
    Read(Option<Version>),
}

fn run(process: &Process, world: &World) -> Ran {
    let mut replay = Replay { answers: process.answers.iter(), wrong: world.wrong, last_opened: None };
    let ran = match process.program {
        Program::Stopped => unreachable!("a stopped process does not run"),
        Program::Swap => swap(&mut replay).map(|end| match end {
            Attempt::Again => Ran::Again,
            Attempt::Done(outcome) => Ran::Swapped(outcome),
        }),
        Program::Tidy(won) => tidy(&mut replay, u64::from(won)).map(|()| Ran::Tidied),
        Program::Read if world.wrong == Wrong::ReadWithoutSync => find(&mut replay).map(read_end),
        Program::Read => read(&mut replay).map(read_end),
    };
    ran.unwrap_or_else(Ran::Wants)
}

fn read_end(end: Attempt<Option<Version>>) -> Ran {
    match end {
        Attempt::Again => Ran::Again,
        Attempt::Done(found) => Ran::Read(found),
    }
}

impl World {
    fn sound(writers: &'static [u8], readers: usize, network: Network) -> Self {
        Self { wrong: Wrong::Nothing, writers, readers, network, made: true, states_max: 3_000_000 }
    }

    fn without(self, wrong: Wrong) -> Self {
        Self { wrong, ..self }
    }

    fn not_made(self) -> Self {
        Self { made: false, ..self }
    }

    fn start(&self) -> State {
        let process = |program, tries| Process { program, tries, answers: Vec::new(), listing_from: None };
        let writers = self.writers.iter().map(|&tries| process(Program::Swap, tries));
        let readers = (0..self.readers).map(|_| process(Program::Read, 1));
        State {
            folder: self.made.then(|| Names::from([(0, (0, 0))])),
            history: vec![(0, 0)],
            synced: 0,
            processes: writers.chain(readers).collect(),
        }
    }

    /// Searches breadth first; what is wrong first, with the shortest way there, and how many states were seen.
    fn search(&self) -> (usize, Result<(), String>) {
        let start = self.start();
        let mut came_from: Vec<(usize, String)> = vec![(0, String::new())];
        let mut seen = HashMap::from([(start.clone(), 0)]);
        let mut queue = VecDeque::from([(0, start)]);
        while let Some((index, state)) = queue.pop_front() {
            for (label, next) in self.steps(&state) {
                let next = match next {
                    Ok(next) => next,
                    Err(broken) => return (seen.len(), Err(trace(&came_from, index, &label, &broken))),
                };
                if seen.contains_key(&next) {
                    continue;
                }
                came_from.push((index, label));
                seen.insert(next.clone(), came_from.len() - 1);
                queue.push_back((came_from.len() - 1, next));
            }
            assert!(seen.len() < self.states_max, "the search is not complete");
        }
        (seen.len(), Ok(()))
    }

    fn steps(&self, state: &State) -> Vec<(String, Result<State, String>)> {
        let mut nexts = Vec::new();
        for who in 0..state.processes.len() {
            if state.processes[who].program == Program::Stopped {
                continue;
            }
            match run(&state.processes[who], self) {
                Ran::Wants(step) => {
                    for (answer, mut next) in self.act(state, who, step) {
                        let label = format!("{who}: {step:?} -> {answer:?}");
                        if let Some(answer) = answer {
                            next.processes[who].answers.push(answer);
                            next.processes[who].listing_from = None;
                        }
                        let checked = self.check(next).and_then(|next| self.finish(next, who));
                        nexts.push((label, checked));
                    }
                }
                // Only a program that wants nothing at its start ends here: tidying with nothing to tidy.
                _ => nexts.push((format!("{who}: ends"), self.finish(state.clone(), who))),
            }
        }
        nexts
    }

    /// All that the step may do and answer; no answer: a listing that has begun.
    fn act(&self, state: &State, who: usize, step: Step) -> Vec<(Option<Answer>, State)> {
        let mut next = state.clone();
        let process = &state.processes[who];
        let names = state.folder.as_ref();
        let at = |number: u64| names.and_then(|names| names.get(&small(number)).copied());
        let answer = match step {
            Step::Highest | Step::NumbersUpTo(_) => {
                let (Some(names), Some(from)) = (names, process.listing_from.as_ref()) else {
                    if names.is_none() {
                        return vec![(Some(Answer::Highest(Highest::NoFolder)), next)];
                    }
                    next.processes[who].listing_from = state.folder.clone();
                    return vec![(None, next)];
                };
                return listings(from, names, step).into_iter().map(|a| (Some(a), next.clone())).collect();
            }
            Step::Open(number) => Answer::Open(at(number).map(|entry| version(small(number), entry))),
            Step::NonceOf(number) => Answer::Nonce(at(number).map(|(own, _)| nonce(own))),
            Step::Create => {
                let empty = self.wrong == Wrong::FirstIntoEmptyFolder;
                let fresh = if empty { Names::new() } else { Names::from([(0, (0, 0))]) };
                next.folder.get_or_insert(fresh);
                Answer::Done
            }
            Step::Link(number, below) => {
                if at(number).is_some() {
                    return vec![(Some(Answer::Link(LinkAnswer::Exists)), next)];
                }
                let entry = (self.value_of(state, who), below.0[0]);
                let names = next.folder.as_mut().expect("a folder to link into");
                names.insert(small(number), entry);
                if names.last_key_value() == Some((&small(number), &entry)) {
                    next.history.push(entry);
                }
                let mut answers = vec![(Some(Answer::Link(LinkAnswer::Linked)), next.clone())];
                if self.network == Network::RepeatsLink {
                    answers.push((Some(Answer::Link(LinkAnswer::Exists)), next));
                }
                return answers;
            }
            Step::IsMine(number) => {
                Answer::Mine(at(number).is_some_and(|(own, _)| own == self.value_of(state, who)))
            }
            Step::Sync => {
                next.synced = state.history.len() - 1;
                Answer::Done
            }
            Step::Unlink(number) => {
                // The k-th from the top instead of the k-th from the bottom.
                let listed = process.answers.iter().find_map(|answer| match answer {
                    Answer::Numbers(numbers) => Some(numbers),
                    _ => None,
                });
                let number = match listed {
                    Some(numbers) if self.wrong == Wrong::TidyHighestFirst => {
                        let place = numbers.iter().position(|&n| n == number).unwrap_or(0);
                        numbers[numbers.len() - 1 - place]
                    }
                    _ => number,
                };
                next.folder.as_mut().expect("a folder to tidy").remove(&small(number));
                Answer::Done
            }
        };
        vec![(Some(answer), next)]
    }

    /// The value that the writer's present try makes.
    fn value_of(&self, state: &State, who: usize) -> u8 {
        small(who as u64) * 16 + state.processes[who].tries
    }

    fn check(&self, state: State) -> Result<State, String> {
        for (index, pair) in state.history.windows(2).enumerate() {
            if pair[1].1 != pair[0].0 {
                return Err(format!("lost update: version {} was not built on {}", index + 1, pair[0].0));
            }
        }
        if let Some(names) = &state.folder
            && let Some((&top, &(_, below))) = names.last_key_value()
            && top > 0
            && self.wrong != Wrong::FirstIntoEmptyFolder
            && names.get(&(top - 1)).map(|entry| entry.0) != Some(below)
        {
            return Err("the version below the current one is gone: readers try for ever".into());
        }
        Ok(state)
    }

    /// Ends a program that has all its answers, and begins the next.
    fn finish(&self, mut state: State, who: usize) -> Result<State, String> {
        let ran = match run(&state.processes[who], self) {
            Ran::Wants(_) => return Ok(state),
            ran => ran,
        };
        let value = self.value_of(&state, who);
        let position = |value: u8| state.history.iter().position(|entry| entry.0 == value);
        let tries = state.processes[who].tries;
        let (program, tries) = match ran {
            Ran::Wants(_) => unreachable!("handled above"),
            Ran::Again => (state.processes[who].program, tries),
            Ran::Swapped(Outcome::Won(number)) => match position(value) {
                None => return Err(format!("{value} was reported won and never was current")),
                Some(index) if index > state.synced => return Err(format!("{value} won, not durable")),
                Some(_) => (Program::Tidy(small(number)), tries),
            },
            Ran::Swapped(Outcome::Conflict) if position(value).is_some() => {
                return Err(format!("{value} was reported lost and was current"));
            }
            Ran::Swapped(outcome) => {
                let top = state.processes[who].answers.iter().rev().find_map(|answer| match answer {
                    Answer::Open(Some(version)) => Some(small(version.number) + 1),
                    _ => None,
                });
                if self.wrong == Wrong::LoserUnlinks
                    && outcome == Outcome::Unclear
                    && let (Some(top), Some(names)) = (top, state.folder.as_mut())
                    && names.get(&top).is_some_and(|entry| entry.0 == value)
                {
                    names.remove(&top);
                }
                (Program::Swap, tries - 1)
            }
            Ran::Tidied => (Program::Swap, tries - 1),
            Ran::Read(None) => (Program::Stopped, 0),
            Ran::Read(Some(found)) => match position(found.nonce.0[0]) {
                None => return Err(format!("a reader returned {found:?}, which never was current")),
                Some(index) if index > state.synced => {
                    return Err(format!("a reader acted on {found:?}, which power loss takes back"));
                }
                Some(_) => (Program::Stopped, 0),
            },
        };
        let program = if tries == 0 { Program::Stopped } else { program };
        state.processes[who] = Process { program, tries, answers: Vec::new(), listing_from: None };
        self.check(state)
    }
}

/// All that a listing which began at `from` and ends at `now` may say.
fn listings(from: &Names, now: &Names, step: Step) -> Vec<Answer> {
    let stayed = |number: &&u8| from.get(number) == now.get(number);
    let sure: Vec<u8> = from.keys().filter(stayed).copied().collect();
    let mut may: Vec<u8> = from.keys().chain(now.keys()).filter(|n| !sure.contains(n)).copied().collect();
    may.sort_unstable();
    may.dedup();
    match step {
        Step::NumbersUpTo(last) => {
            let up_to_last = |numbers: &[u8]| -> Vec<u64> {
                numbers.iter().map(|&n| u64::from(n)).filter(|&n| n <= last).collect()
            };
            let (sure, may) = (up_to_last(&sure), up_to_last(&may));
            let subset = |bits: usize| may.iter().enumerate().filter(move |(i, _)| bits >> i & 1 == 1);
            (0..1usize << may.len())
                .map(|bits| {
                    Answer::Numbers(sure.iter().copied().chain(subset(bits).map(|(_, &n)| n)).collect())
                })
                .collect()
        }
        _ => {
            let top = sure.last().copied();
            let least = top.map_or(Highest::Nothing, |n| Highest::Number(u64::from(n)));
            let higher = may.iter().filter(|&&n| Some(n) > top).map(|&n| Highest::Number(u64::from(n)));
            std::iter::once(least).chain(higher).map(Answer::Highest).collect()
        }
    }
}

fn trace(came_from: &[(usize, String)], mut index: usize, last: &str, broken: &str) -> String {
    let mut steps = vec![last.to_owned()];
    while index != 0 {
        steps.push(came_from[index].1.clone());
        index = came_from[index].0;
    }
    steps.reverse();
    format!("{broken}\n  {}", steps.join("\n  "))
}

fn holds(name: &str, world: &World) {
    let (states, result) = world.search();
    println!("{name}: {states} states");
    if let Err(broken) = result {
        panic!("{name}: {broken}");
    }
}

fn breaks(world: &World) {
    let (states, result) = world.search();
    let broken = result.expect_err("a rule was left out and nothing broke");
    let first = broken.lines().next().unwrap_or_default();
    println!("{:?}: {states} states: {first}", world.wrong);
}

use Network::{Local, RepeatsLink};

#[test]
fn g27_no_order_of_steps_loses_an_update() {
    holds("two writers, one reader", &World::sound(&[2, 2], 1, Local));
    holds("a repeated link", &World::sound(&[2, 2], 0, RepeatsLink));
    holds("the first version", &World::sound(&[2, 1], 0, RepeatsLink).not_made());
    holds("three writers", &World::sound(&[2, 1, 1], 0, Local));
    holds("one far behind", &World::sound(&[4, 1], 0, RepeatsLink));
}

#[test]
#[ignore = "minutes"]
fn g27_no_order_of_steps_loses_an_update_at_length() {
    let long = |world: World| World { states_max: 60_000_000, ..world };
    holds("two late writers", &long(World::sound(&[4, 1, 1], 0, Local)));
    holds("three writers", &long(World::sound(&[2, 2, 1], 0, RepeatsLink)));
    holds("two writers, one reader, repeats", &long(World::sound(&[3, 2], 1, RepeatsLink)));
    holds("the first version, three writers", &long(World::sound(&[1, 1, 1], 1, RepeatsLink).not_made()));
}

#[test]
fn g27_each_rule_is_needed() {
    breaks(&World::sound(&[4, 1], 1, Local).without(Wrong::ReaderOpensOnly));
    breaks(&World::sound(&[2, 2], 0, RepeatsLink).without(Wrong::ExistsIsLost));
    breaks(&World::sound(&[4, 1], 0, Local).without(Wrong::LinkedIsWon));
    breaks(&World::sound(&[2, 1, 1], 0, Local).without(Wrong::TidyHighestFirst));
    breaks(&World::sound(&[2, 2], 0, Local).without(Wrong::LoserUnlinks));
    breaks(&World::sound(&[2, 1], 0, Local).without(Wrong::KeepOnlyTheHighest));
    breaks(&World::sound(&[4, 1], 0, Local).not_made().without(Wrong::FirstIntoEmptyFolder));
    breaks(&World::sound(&[1], 1, Local).without(Wrong::ReadWithoutSync));
}

/// Two writers who slept since they read n - 1 and n, while a third went on: the second finds the first's late n in the
/// place of what it read. A reader who slept since it listed finds both, one on the other.
#[test]
fn g27_below_is_known_by_its_nonce_not_by_its_number() {
    breaks(&World::sound(&[4, 1, 1], 0, Local).without(Wrong::WriterLooksByNumber));
}

#[test]
#[ignore = "minutes"]
fn g27_below_is_known_by_its_nonce_to_readers_too() {
    let world = World::sound(&[4, 1, 1], 1, Local).without(Wrong::ReaderLooksByNumber);
    breaks(&World { states_max: 8_000_000, ..world });
}
