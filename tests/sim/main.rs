//! The real engine in a simulated world: one seed is one world, on one thread, with a paused clock, a disk and a pool that
//! delay, fail, apply and then fail, lose and reorder. Clients write, zero, flush, read, snapshot, resize; the process is
//! killed and the power cut anywhere; whatever is read, recovered or lands in the pool is judged by a plain model.
//!
//! `BLOCKHOUSE_SIM_SEEDS=N` sets how many worlds are tried, `BLOCKHOUSE_SIM_SEED=N` runs one and shows what happens.

mod oracle;
mod store;
mod world;

use blockhouse::block::{self, BlockHandler, Durability};
use blockhouse::clock::Clock;
use blockhouse::geometry::{ByteRange, len_of};
use blockhouse::mutant::Mutant;
use blockhouse::offload::Offload;
use blockhouse::volume::VolumeHandler;
use blockhouse::volume::attach::{Attached, attach};
use blockhouse::volume::cache::{CacheConfig, CleanCache};
use blockhouse::volume::destage::Request;
use blockhouse::volume::engine::{Engine, EngineConfig, EngineError, Identity, Parts};
use blockhouse::volume::head::{Head, Owner, SmallObject, TermEnd, keys};
use blockhouse::volume::ids::{Incarnation, NodeId, Nonce, PoolId, Uid};
use bytes::{Bytes, BytesMut};
use oracle::{Oracle, When, numbers, payload};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use store::{Objects, SimStore};
use world::{Profile, SimDisk, World};

/// Two blocks: enough for every rule, small enough to judge whole.
const SIZE: u64 = 2 * 128 * 1024;
const SMALL: u64 = 192 * 1024;
const SECTORS: u64 = SIZE / 512;
const NAME: &str = "v";

/// One world, and what is known of it outside the process that is killed.
struct Run {
    world: World,
    store: SimStore,
    oracle: Arc<Mutex<Oracle>>,
    incarnations: Vec<Incarnation>,
    next_id: Arc<AtomicU64>,
    shrinks: bool,
    thief: bool,
}

#[derive(Default, Debug, Clone)]
struct Stats {
    lives: u64,
    reads: u64,
    commits: u64,
    flushes: u64,
    snapshots: u64,
    resizes: u64,
    stopped: u64,
}

struct Outcome {
    violation: Option<String>,
    trace: u64,
    stats: Stats,
}

fn identity(run: &Run) -> Identity {
    Identity {
        pool: PoolId([1; 16]),
        node: NodeId([2; 16]),
        incarnation: *run.incarnations.last().expect("a life has one"),
        ours: run.incarnations.clone(),
    }
}

fn first_head() -> Head {
    Head {
        uid: Uid([3; 16]),
        nonce: Nonce([0; 16]),
        term: 0,
        floor: 0,
        map: None,
        size_bytes: SIZE,
        owner: None,
        from: None,
        description: None,
        next_snapshot: 1,
        history: vec![],
        created: blockhouse::clock::UnixMillis(0),
        last_commit: None,
    }
}

impl Run {
    fn new(seed: u64, show: bool) -> Self {
        let mut profile = Profile { write_back: [10, 100, 400][(seed % 3) as usize], ..Profile::default() };
        match seed / 3 % 8 {
            0 => profile.no_space = 2,
            1 => profile.bad_disk = true,
            2 => (profile.bad_disk, profile.evict) = (true, true),
            3 | 4 => profile.bad_store = 8,
            5 => (profile.bad_store, profile.no_space) = (4, 1),
            _ => {}
        }
        let world = World::new(seed, profile, show);
        let oracle = Arc::new(Mutex::new(Oracle::new(SECTORS)));
        let foreign = Arc::new(Mutex::new(false));
        let (judge, stolen, noting) = (oracle.clone(), foreign.clone(), world.clone());
        let last_map = Mutex::new(None);
        let on_head = Arc::new(move |objects: &Objects, head: &Head| {
            let mut oracle = judge.lock();
            let ours = head.owner.as_ref().is_none_or(|owner| owner.node == NodeId([2; 16]));
            let mut stolen = stolen.lock();
            let given_back = head.owner.is_none()
                && head.history.last().and_then(|record| record.ended) == Some(TermEnd::Taken);
            if !ours {
                *stolen = true;
            } else if given_back {
                *stolen = false;
            } else if *stolen {
                oracle
                    .fail(format!("P5: a head of term {} landed after the volume was taken over", head.term));
            }
            noting.note(&format!("head of term {} lands, commit {:?}", head.term, head.last_epoch()));
            // Content that was judged when it came; what it is of may be forgotten by now.
            let known =
                last_map.lock().replace((head.map, head.size_bytes)) == Some((head.map, head.size_bytes));
            match objects.content(head.map.as_ref(), head.size_bytes) {
                Ok(_) if known => {}
                Err(error) => oracle.fail(format!("P4: head cannot be read: {error}")),
                Ok(content) => oracle.check_moment("P4: head", &numbers(&content), 0),
            }
        });
        let judge = oracle.clone();
        let on_snapshot =
            Arc::new(move |objects: &Objects, snapshot: &blockhouse::volume::head::SnapshotObject| {
                let mut oracle = judge.lock();
                let head = objects.head(NAME).expect("a snapshot has a volume");
                if head.next_snapshot <= snapshot.number || head.map != snapshot.map {
                    oracle.fail(format!(
                        "G12: snapshot {} stands and the head does not know it",
                        snapshot.number
                    ));
                }
            });
        let store = SimStore {
            world: world.clone(),
            objects: Arc::new(Mutex::new(Objects::default())),
            on_head,
            on_snapshot,
        };
        store.apply(&keys::volume(NAME), None, first_head().encode());
        Self {
            shrinks: seed.is_multiple_of(5),
            thief: seed.is_multiple_of(7),
            world,
            store,
            oracle,
            incarnations: Vec::new(),
            next_id: Arc::new(AtomicU64::new(100)),
        }
    }

    fn violation(&self) -> Option<String> {
        self.oracle.lock().violation.clone()
    }
}

async fn engine_of(run: &Run) -> Arc<Engine> {
    let disk = Arc::new(SimDisk(run.world.clone()));
    let cache = loop {
        match CleanCache::open(disk.clone(), Offload::Inline, CacheConfig { bytes: 8 * 128 * 1024 }).await {
            Ok(cache) => break cache,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&run.world.pick(u64::MAX).to_le_bytes());
    Engine::new(Parts {
        disk,
        store: Arc::new(run.store.clone()),
        offload: Offload::Inline,
        clock: Clock::simulated(),
        identity: identity(run),
        config: EngineConfig {
            commit_dirty_bytes: 200 * 1024,
            commit_age: Duration::from_millis(40),
            pool_wait: Duration::from_secs(2),
            ..EngineConfig::default()
        },
        cache,
        seed,
    })
}

/// What the clients of one life share.
#[derive(Clone)]
struct Clients {
    handler: Arc<VolumeHandler>,
    world: World,
    oracle: Arc<Mutex<Oracle>>,
    next_id: Arc<AtomicU64>,
    stats: Arc<Mutex<Stats>>,
}

impl Clients {
    fn range(&self) -> ByteRange {
        let size = self.handler.geometry().size_bytes / 512;
        if self.world.chance(35) {
            let block = self.world.pick(size.div_ceil(256));
            let start = block * 256;
            return ByteRange::new(start * 512, 256.min(size - start) * 512);
        }
        // Few borders, so that operations meet.
        let borders = [0, 1, 31, 32, 33, 100, 200, 255, 256, 257, 300, 383, 384, 480, 511];
        let start = borders[usize::try_from(self.world.pick(15)).expect("small")] % size;
        let len = [1, 2, 31, 32, 64, 120][usize::try_from(self.world.pick(6)).expect("small")];
        ByteRange::new(start * 512, len.min(size - start) * 512)
    }

    async fn write(&self) {
        let range = self.range();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (first, end) = (range.start() / 512, range.end() / 512);
        self.oracle.lock().begin(id, first, end, id);
        self.world.note(&format!("write {id} {first}..{end}"));
        let data = Bytes::from(payload(id, end - first));
        let result = block::write_at(&*self.handler, range.start(), data, Durability::Acknowledged).await;
        self.world.note(&format!("write {id} {result:?}"));
        self.oracle.lock().end(id, result.is_ok());
    }

    async fn zero(&self) {
        let range = self.range();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (first, end) = (range.start() / 512, range.end() / 512);
        self.oracle.lock().begin(id, first, end, 0);
        self.world.note(&format!("zero {id} {first}..{end}"));
        self.world.step().await;
        let result = self.handler.zero(range).await;
        self.world.note(&format!("zero {id} {result:?}"));
        self.oracle.lock().end(id, result.is_ok());
    }

    async fn flush(&self) {
        let start = self.oracle.lock().tick();
        let result = self.handler.flush().await;
        self.world.note(&format!("flush of {start} {result:?}"));
        if result.is_ok() {
            let mut oracle = self.oracle.lock();
            oracle.durable_to = oracle.durable_to.max(start);
            self.stats.lock().flushes += 1;
        }
    }

    async fn read(&self) {
        let range = self.range();
        let start = self.oracle.lock().tick();
        let mut out = BytesMut::new();
        if block::read_at(&*self.handler, range, &mut out).await.is_ok() && !self.world.state.lock().hurt {
            let mut oracle = self.oracle.lock();
            let issued = oracle.tick();
            let first = range.start() / 512;
            oracle.check("read", first, &numbers(&out), When::Between { issued, acked: start });
            self.stats.lock().reads += 1;
        }
    }

    async fn run(self, operations: u64) {
        for _ in 0..operations {
            match self.world.pick(10) {
                0..4 => self.write().await,
                4..6 => self.zero().await,
                6..8 => self.flush().await,
                _ => self.read().await,
            }
            self.world.step().await;
        }
    }
}

async fn administer(run: &Run, clients: &Clients, attached: &Attached, operations: u64) {
    for _ in 0..operations {
        for _ in 0..clients.world.pick(30) {
            clients.world.step().await;
        }
        match clients.world.pick(6) {
            0 | 1 => {
                let start = clients.oracle.lock().tick();
                if attached.destager.ask(|reply| Request::Commit { reply }).await.is_ok() {
                    let objects = run.store.objects.lock();
                    let head = objects.head(NAME).expect("it is there");
                    let content = objects.content(head.map.as_ref(), head.size_bytes).unwrap_or_default();
                    let mut oracle = clients.oracle.lock();
                    oracle.durable_to = oracle.durable_to.max(start);
                    oracle.check_moment("wait-durable", &numbers(&content), start);
                    clients.stats.lock().commits += 1;
                }
            }
            2 | 3 => {
                let start = clients.oracle.lock().tick();
                let asked = attached.destager.ask(|reply| Request::Snapshot { description: None, reply });
                if let Ok(snapshot) = asked.await {
                    let objects = run.store.objects.lock();
                    let content = objects.content(snapshot.map.as_ref(), snapshot.size_bytes);
                    let mut oracle = clients.oracle.lock();
                    match content {
                        Ok(content) => oracle.check_moment("snapshot", &numbers(&content), start),
                        Err(error) => oracle.fail(format!("snapshot cannot be read: {error}")),
                    }
                    clients.stats.lock().snapshots += 1;
                }
            }
            4 if run.shrinks => {
                let now = clients.handler.geometry().size_bytes;
                let id = clients.next_id.fetch_add(1, Ordering::Relaxed);
                let size_bytes = if now == SIZE { SMALL } else { SIZE };
                if size_bytes == SMALL {
                    clients.oracle.lock().begin(id, SMALL / 512, SECTORS, 0);
                }
                clients.world.note(&format!("resize {id} to {size_bytes}"));
                let result = attached.destager.ask(|reply| Request::Resize { size_bytes, reply }).await;
                clients.world.note(&format!("resize {id} {result:?}"));
                if size_bytes == SMALL {
                    clients.oracle.lock().end(id, result.is_ok());
                }
                clients.stats.lock().resizes += u64::from(result.is_ok());
            }
            5 if run.thief && clients.world.chance(40) => {
                steal(run, Some(NodeId([9; 16])));
                return;
            }
            _ => {}
        }
    }
}

/// Another node takes the volume, or took it and gave it back.
fn steal(run: &Run, by: Option<NodeId>) {
    let (version, mut head) = {
        let objects = run.store.objects.lock();
        let version = objects.swapped[&keys::volume(NAME)].0;
        (version, objects.head(NAME).expect("it is there"))
    };
    run.world.note(&format!("taken over by {by:?}"));
    let owner = by.map(|node| Owner { node, incarnation: Incarnation([9; 16]) });
    head.begin_term(owner, TermEnd::Taken);
    head.nonce = Nonce([u8::try_from(run.world.pick(255)).expect("a byte"); 16]);
    run.store.apply(&keys::volume(NAME), Some(version), head.encode());
}

async fn whole_content(handler: &VolumeHandler) -> Option<Vec<u64>> {
    let size = handler.geometry().size_bytes;
    for _ in 0..50 {
        let mut out = BytesMut::with_capacity(len_of(size));
        if block::read_at(handler, ByteRange::new(0, size), &mut out).await.is_ok() {
            let mut content = numbers(&out);
            content.resize(usize::try_from(SECTORS).expect("small"), 0);
            return Some(content);
        }
    }
    None
}

/// How the life before ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Before {
    Nothing,
    Kill,
    PowerLoss,
    /// Another node had the volume since: what was not committed is out of its history.
    Foreign,
}

/// Attaches, judges what is found; `None` if the volume cannot be served any more.
async fn recover(run: &Run, engine: &Arc<Engine>, before: Before) -> Option<Attached> {
    let attached = loop {
        match attach(engine, NAME).await {
            Ok(attached) => break attached,
            Err(EngineError::Stopped(_) | EngineError::Conflict(_)) => return None,
            Err(EngineError::Corrupt(error)) => {
                run.oracle.lock().fail(format!("attach: {error}"));
                return None;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let handler = VolumeHandler(attached.volume.clone());
    let hurt = run.world.state.lock().hurt;
    let content = whole_content(&handler).await;
    let stopped = attached.volume.stop_reason().is_some();
    if hurt || stopped {
        return Some(attached);
    }
    let Some(content) = content else { return Some(attached) };
    let mut oracle = run.oracle.lock();
    let size_sectors = usize::try_from(handler.geometry().size_bytes / 512).expect("small");
    let issued = oracle.now;
    let acked = match before {
        Before::Kill | Before::Nothing => issued,
        Before::PowerLoss => oracle.durable_to,
        Before::Foreign => 0,
    };
    let what = format!("after {before:?}");
    if before != Before::Foreign {
        oracle.check(&what, 0, &content[..size_sectors], When::Between { issued, acked });
    } else {
        let objects = run.store.objects.lock();
        let head = objects.head(NAME).expect("it is there");
        if let Ok(committed) = objects.content(head.map.as_ref(), head.size_bytes)
            && numbers(&committed) != content[..size_sectors]
        {
            oracle.fail("G1: epochs of another term were laid over the history".into());
        }
    }
    oracle.found(&content, before != Before::Kill);
    Some(attached)
}

async fn live(run: &Run, before: Before, stats: Arc<Mutex<Stats>>, last: bool) -> bool {
    let engine = engine_of(run).await;
    let Some(attached) = recover(run, &engine, before).await else {
        stats.lock().stopped += 1;
        return false;
    };
    let clients = Clients {
        handler: Arc::new(VolumeHandler(attached.volume.clone())),
        world: run.world.clone(),
        oracle: run.oracle.clone(),
        next_id: run.next_id.clone(),
        stats,
    };
    if last {
        return finish(run, &attached, &clients).await;
    }
    let operations = 5 + run.world.pick(30);
    let workers: Vec<_> = (0..3).map(|_| tokio::spawn(clients.clone().run(operations))).collect();
    let rounds = 2 + run.world.pick(5);
    administer(run, &clients, &attached, rounds).await;
    for worker in workers {
        worker.await.expect("a client does not panic");
    }
    attached.volume.stop_reason().is_none()
}

/// With nothing failing any more everything goes to the pool, and nothing stays behind.
async fn finish(run: &Run, attached: &Attached, clients: &Clients) -> bool {
    let Some(content) = whole_content(&clients.handler).await else { return false };
    let size = clients.handler.geometry().size_bytes;
    if attached.destager.ask(|reply| Request::Release { reply }).await.is_err() {
        return false;
    }
    let objects = run.store.objects.lock();
    let head = objects.head(NAME).expect("it is there");
    let mut oracle = run.oracle.lock();
    match objects.content(head.map.as_ref(), head.size_bytes) {
        Ok(pool) if numbers(&pool) == content[..usize::try_from(size / 512).expect("small")] => {}
        Ok(_) if run.world.state.lock().hurt => {}
        Ok(_) => oracle.fail("detached: the pool has something else than was read".into()),
        Err(error) => oracle.fail(format!("detached: {error}")),
    }
    let left = run.world.epoch_files();
    if head.owner.is_some() || (attached.orphans == 0 && !left.is_empty()) {
        oracle.fail(format!("detached, and still there: {left:?}"));
    }
    true
}

fn run_world(seed: u64, show: bool) -> Outcome {
    let mut run = Run::new(seed, show);
    let stats = Arc::new(Mutex::new(Stats::default()));
    let lives = 2 + run.world.pick(4);
    let mut before = Before::Nothing;
    for life in 0..=lives {
        let last = life == lives;
        run.incarnations.push(Incarnation([u8::try_from(100 + life).expect("few lives"); 16]));
        stats.lock().lives += 1;
        let until = run.world.pick(900);
        if last {
            let mut state = run.world.state.lock();
            state.profile.no_space = 0;
            state.profile.bad_store = 0;
            state.profile.bad_disk = false;
        } else {
            let mut state = run.world.state.lock();
            state.kill_at = state.steps + 5 + until;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let serving = runtime.block_on(async {
            let life =
                tokio::time::timeout(Duration::from_secs(3600), live(&run, before, stats.clone(), last));
            tokio::select! {
                biased;
                () = run.world.kill.notified() => true,
                served = life => match served {
                    Ok(served) => served,
                    Err(_) => {
                        run.oracle.lock().fail("it hangs: an hour of simulated time, and not done".into());
                        false
                    }
                },
            }
        });
        drop(runtime);
        if run.violation().is_some() || !serving {
            break;
        }
        run.oracle.lock().process_ended();
        // What a life that ended before it was looked at had to recover from, the next one has to recover from too.
        let seen = run.oracle.lock().take_seen();
        let worst = if seen { Before::Kill } else { before };
        before = if run.world.chance(50) {
            run.world.lose_power();
            run.oracle.lock().blind = true;
            worst.max(Before::PowerLoss)
        } else {
            run.world.end_process();
            worst.max(Before::Kill)
        };
        if run.thief && run.world.chance(25) {
            run.store.land_some(100);
            steal(&run, None);
            before = Before::Foreign;
            run.oracle.lock().blind = true;
        }
        run.world.note(&format!("{before:?}"));
    }
    run.world.end();
    let stats = stats.lock().clone();
    let trace = run.world.state.lock().trace;
    Outcome { violation: run.violation(), trace, stats }
}

fn seeds(default: u64) -> u64 {
    std::env::var("BLOCKHOUSE_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs worlds on all cores until one breaks; the first violation.
fn sweep(count: u64, mutant: Option<Mutant>) -> (u64, Option<(u64, String)>, Stats) {
    let (next, found) = (AtomicU64::new(0), Mutex::new(None::<(u64, String)>));
    let total = Mutex::new(Stats::default());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                set_mutant(mutant);
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count || found.lock().is_some() {
                        return;
                    }
                    // A panic is a violation like any other.
                    let world = std::panic::catch_unwind(|| run_world(seed, false));
                    let outcome = world.unwrap_or_else(|_| Outcome {
                        violation: Some("it panics".into()),
                        trace: 0,
                        stats: Stats::default(),
                    });
                    if let Some(violation) = outcome.violation {
                        found.lock().get_or_insert((seed, violation));
                    }
                    let (mut total, one) = (total.lock(), outcome.stats);
                    total.lives += one.lives;
                    total.reads += one.reads;
                    total.commits += one.commits;
                    total.flushes += one.flushes;
                    total.snapshots += one.snapshots;
                    total.resizes += one.resizes;
                    total.stopped += one.stopped;
                }
            });
        }
    });
    let tried = next.load(Ordering::Relaxed).min(count);
    (tried, found.into_inner(), total.into_inner())
}

#[cfg(feature = "mutants")]
fn set_mutant(mutant: Option<Mutant>) {
    blockhouse::mutant::set(mutant);
}

#[cfg(not(feature = "mutants"))]
fn set_mutant(mutant: Option<Mutant>) {
    assert!(mutant.is_none(), "bugs can be put in only with --features mutants");
}

#[test]
fn no_world_breaks_a_promise() {
    if let Some(seed) = std::env::var("BLOCKHOUSE_SIM_SEED").ok().and_then(|text| text.parse().ok()) {
        let mutant = std::env::var("BLOCKHOUSE_SIM_MUTANT").ok();
        let mutant = mutant.and_then(|name| Mutant::ALL.iter().find(|m| format!("{m:?}") == name).copied());
        set_mutant(mutant);
        let outcome = run_world(seed, std::env::var_os("BLOCKHOUSE_SIM_QUIET").is_none());
        println!("trace {:x}", outcome.trace);
        println!("{:?}", outcome.stats);
        assert_eq!(outcome.violation, None, "seed {seed}");
        return;
    }
    let (tried, found, stats) = sweep(seeds(2_000), None);
    println!("{tried} worlds: {stats:?}");
    if let Some((seed, violation)) = found {
        panic!("seed {seed}: {violation}\nBLOCKHOUSE_SIM_SEED={seed} shows what happened");
    }
}

#[test]
fn the_same_seed_is_the_same_world() {
    for seed in 0..30 {
        assert_eq!(run_world(seed, false).trace, run_world(seed, false).trace, "seed {seed}");
    }
}

/// Bugs that this suite is here for; the others on the list need real threads (the model checker's tests).
#[cfg(feature = "mutants")]
#[test]
fn every_bug_put_in_on_purpose_is_caught() {
    let mut missed = Vec::new();
    let only = std::env::var("BLOCKHOUSE_SIM_MUTANT").ok();
    let wanted = |mutant: Mutant| only.as_ref().is_none_or(|only| *only == format!("{mutant:?}"));
    for &mutant in Mutant::ALL.iter().filter(|&&mutant| mutant != Mutant::NoSecondLook && wanted(mutant)) {
        let (tried, found, _) = sweep(seeds(2_000) * 10, Some(mutant));
        match found {
            Some((seed, violation)) => println!("{mutant:?}: caught in world {seed} of {tried}: {violation}"),
            None => missed.push((mutant, tried)),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
