//! The simulated machine: a disk with a page cache that forgets, fails, and lets killed writes land late; live maps that
//! only a power loss takes; a random source that decides everything.
//!
//! Each 512-byte sector of an unsynced write is old or new after a power loss, in any order.

use blockhouse::disk::{Create, Disk, DiskFile, DiskPath, Lock, MAP_PAGE_WORDS, Place, SharedMap};
use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::sync::Notify;

const SECTOR: u64 = 512;

/// What may go wrong in one world.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Percent chance of an `ENOSPC` on a write or an allocation.
    pub no_space: u32,
    /// Write-back and syncs fail now and then.
    pub bad_disk: bool,
    /// Pages whose write-back failed are dropped from the cache.
    pub evict: bool,
    /// Chance in 1000 that any step writes one dirty sector back.
    pub write_back: u32,
    /// Percent chance that the store refuses, or loses its answer.
    pub bad_store: u32,
}

#[derive(Default)]
struct Inode {
    len: u64,
    cache: BTreeMap<u64, [u8; 512]>,
    disk: BTreeMap<u64, [u8; 512]>,
    dirty: BTreeSet<u64>,
    /// Write-back failed: the cache is newer than the disk, and clean.
    lost: BTreeSet<u64>,
    /// An error that the next sync reports, once.
    error: bool,
    ever_synced: bool,
}

/// A write that had not returned when its process was killed.
struct InFlight {
    inode: usize,
    first_sector: u64,
    data: Bytes,
}

/// What all parts of a world share.
pub struct State {
    pub rng: StdRng,
    pub profile: Profile,
    /// Calls into disk and store so far.
    pub steps: u64,
    /// At this step the process is killed.
    pub kill_at: u64,
    pub killed: bool,
    pub boot: u8,
    /// A page that was never on disk was dropped: reads before the next sync may be wrong.
    pub hurt: bool,
    inodes: Vec<Inode>,
    names: BTreeMap<DiskPath, usize>,
    durable_names: BTreeMap<DiskPath, usize>,
    small: BTreeMap<DiskPath, Bytes>,
    maps: BTreeMap<DiskPath, Arc<SimMap>>,
    in_flight: BTreeMap<u64, InFlight>,
    syncs_in_flight: BTreeMap<u64, (usize, BTreeSet<u64>)>,
    next_op: u64,
    /// Hash of everything that happened, to compare two runs.
    pub trace: u64,
    pub show: bool,
}

/// The machine. Cloning it gives another handle.
#[derive(Clone)]
pub struct World {
    pub state: Arc<Mutex<State>>,
    pub kill: Arc<Notify>,
}

impl World {
    pub fn new(seed: u64, profile: Profile, show: bool) -> Self {
        let state = State {
            rng: StdRng::seed_from_u64(seed),
            profile,
            steps: 0,
            kill_at: u64::MAX,
            killed: false,
            boot: 1,
            hurt: false,
            inodes: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            small: BTreeMap::new(),
            maps: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            syncs_in_flight: BTreeMap::new(),
            next_op: 0,
            trace: 0,
            show,
        };
        Self { state: Arc::new(Mutex::new(state)), kill: Arc::new(Notify::new()) }
    }

    /// A number below `below`.
    pub fn pick(&self, below: u64) -> u64 {
        self.state.lock().rng.random_range(0..below)
    }

    /// Whether something with that chance happens.
    pub fn chance(&self, percent: u32) -> bool {
        self.state.lock().rng.random_range(0..100) < percent
    }

    pub fn note(&self, what: &str) {
        let mut state = self.state.lock();
        for byte in what.bytes() {
            state.trace = (state.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if state.show {
            println!("{:6} {what}", state.steps);
        }
    }

    /// One step of the world: background write-back, perhaps the end of the process, and a chance for others to run.
    pub async fn step(&self) {
        let (yields, dead) = {
            let mut state = self.state.lock();
            state.steps += 1;
            state.background();
            if state.steps >= state.kill_at {
                state.killed = true;
            }
            (state.rng.random_range(0..4u32), state.killed)
        };
        if dead {
            self.kill.notify_one();
            std::future::pending::<()>().await;
        }
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        if self.state.lock().killed {
            std::future::pending::<()>().await;
        }
    }

    /// The process is gone: what it had in the kernel may yet happen.
    pub fn end_process(&self) {
        let mut state = self.state.lock();
        state.killed = false;
        state.kill_at = u64::MAX;
        let bad = state.profile.bad_disk && !state.profile.evict;
        let syncs = std::mem::take(&mut state.syncs_in_flight);
        for (inode, sectors) in syncs.into_values() {
            if state.rng.random_bool(0.6) {
                // Its result is told to nobody.
                let fails = bad && state.rng.random_bool(0.6);
                state.finish_sync(inode, &sectors, fails);
            }
        }
        if state.show {
            println!("{:6} KILL -9, {} writes in the kernel", state.steps, state.in_flight.len());
        }
    }

    /// The machine is gone, and back.
    pub fn lose_power(&self) {
        self.end_process();
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.in_flight.clear();
        state.maps.clear();
        state.boot = state.boot.wrapping_add(1).max(1);
        let all: BTreeSet<DiskPath> = state.names.keys().chain(state.durable_names.keys()).cloned().collect();
        for path in all {
            let (now, durable) = (state.names.get(&path).copied(), state.durable_names.get(&path).copied());
            if now != durable {
                let keep = if state.rng.random_bool(0.5) { now } else { durable };
                match keep {
                    Some(inode) => state.names.insert(path, inode),
                    None => state.names.remove(&path),
                };
            }
        }
        state.durable_names = state.names.clone();
        for inode in &mut state.inodes {
            for sector in std::mem::take(&mut inode.dirty) {
                if state.rng.random_bool(0.5) {
                    copy_sector(&inode.cache, &mut inode.disk, sector);
                }
            }
            if !inode.ever_synced && state.rng.random_bool(0.5) {
                inode.len = 0;
                inode.disk.clear();
            }
            inode.cache = inode.disk.clone();
            inode.lost.clear();
            inode.error = false;
        }
        if state.show {
            println!("{:6} POWER LOSS", state.steps);
        }
    }

    /// Lets go of what holds on to the world itself.
    pub fn end(&self) {
        let maps = std::mem::take(&mut self.state.lock().maps);
        drop(maps);
    }

    /// Epoch files that are there.
    pub fn epoch_files(&self) -> Vec<String> {
        let state = self.state.lock();
        state.names.keys().filter(|path| path.path.contains("epoch-")).map(|path| path.path.clone()).collect()
    }

    fn begin(&self, inode: usize, first_sector: u64, data: Bytes) -> u64 {
        let mut state = self.state.lock();
        state.next_op += 1;
        let op = state.next_op;
        state.in_flight.insert(op, InFlight { inode, first_sector, data });
        op
    }
}

fn copy_sector(from: &BTreeMap<u64, [u8; 512]>, to: &mut BTreeMap<u64, [u8; 512]>, sector: u64) {
    match from.get(&sector) {
        Some(bytes) => to.insert(sector, *bytes),
        None => to.remove(&sector),
    };
}

fn say(show: bool, steps: u64, what: std::fmt::Arguments<'_>) {
    if show {
        println!("{steps:6}     {what}");
    }
}

impl State {
    fn say(&self, what: std::fmt::Arguments<'_>) {
        say(self.show, self.steps, what);
    }

    fn background(&mut self) {
        if self.rng.random_range(0..1000) >= self.profile.write_back {
            return;
        }
        let dirty: Vec<(usize, u64)> = self
            .inodes
            .iter()
            .enumerate()
            .flat_map(|(at, inode)| inode.dirty.iter().map(move |&sector| (at, sector)))
            .collect();
        if !dirty.is_empty() {
            // A run of neighbours, as a disk would take them.
            let (at, sector) = dirty[self.rng.random_range(0..dirty.len())];
            let run = self.rng.random_range(1..40u64);
            let fails = self.profile.bad_disk
                && self.rng.random_range(0..100) < if self.profile.evict { 10 } else { 1 };
            let sectors: Vec<u64> = self.inodes[at].dirty.range(sector..sector + run).copied().collect();
            for sector in sectors {
                let inode = &mut self.inodes[at];
                inode.dirty.remove(&sector);
                if fails {
                    say(
                        self.show,
                        self.steps,
                        format_args!("write-back of sector {sector} of file {at} fails"),
                    );
                    inode.lost.insert(sector);
                    inode.error = true;
                } else {
                    copy_sector(&inode.cache, &mut inode.disk, sector);
                }
            }
        }
        if self.profile.evict && self.rng.random_bool(0.3) {
            for inode in &mut self.inodes {
                for sector in std::mem::take(&mut inode.lost) {
                    if !inode.dirty.contains(&sector) && inode.cache.get(&sector) != inode.disk.get(&sector) {
                        copy_sector(&inode.disk, &mut inode.cache, sector);
                        say(self.show, self.steps, format_args!("sector {sector} is dropped from the cache"));
                        self.hurt = true;
                    }
                }
            }
        }
    }

    /// Ends a sync of these sectors; `true` if it failed, or reports an older error.
    fn finish_sync(&mut self, at: usize, sectors: &BTreeSet<u64>, fails: bool) -> bool {
        let inode = &mut self.inodes[at];
        let older = std::mem::take(&mut inode.error);
        for &sector in sectors {
            if inode.dirty.remove(&sector) {
                if fails && self.rng.random_bool(0.5) {
                    inode.lost.insert(sector);
                } else {
                    copy_sector(&inode.cache, &mut inode.disk, sector);
                    inode.lost.remove(&sector);
                }
            }
        }
        inode.ever_synced = true;
        fails || older
    }

    fn put(&mut self, at: usize, sector: u64, bytes: &[u8]) {
        let mut whole = [0; 512];
        whole.copy_from_slice(bytes);
        let inode = &mut self.inodes[at];
        inode.cache.insert(sector, whole);
        inode.dirty.insert(sector);
        inode.lost.remove(&sector);
    }

    fn get(&self, at: usize, sector: u64) -> [u8; 512] {
        self.inodes[at].cache.get(&sector).copied().unwrap_or([0; 512])
    }

    /// Writes that killed processes left in the kernel, of that file, happen now or never.
    fn land_late_writes(&mut self, inode: usize) {
        let late: Vec<u64> =
            self.in_flight.iter().filter(|(_, write)| write.inode == inode).map(|(op, _)| *op).collect();
        for op in late {
            if let Some(write) = self.in_flight.remove(&op)
                && self.rng.random_bool(0.5)
            {
                for (sector, bytes) in (write.first_sector..).zip(write.data.chunks_exact(512)) {
                    self.put(inode, sector, bytes);
                }
            }
        }
    }
}

/// The disk of a world.
pub struct SimDisk(pub World);

struct SimFile {
    world: World,
    inode: usize,
}

/// A live map: memory that outlives the process.
pub struct SimMap {
    words: Box<[AtomicU64]>,
    allocated: Mutex<BTreeSet<usize>>,
    world: World,
}

impl SharedMap for SimMap {
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    fn allocate(&self, page: usize) -> io::Result<()> {
        let no_space = self.world.state.lock().profile.no_space;
        if page > 0 && self.world.chance(no_space) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.allocated.lock().insert(page);
        Ok(())
    }

    fn allocated_pages(&self) -> io::Result<Vec<usize>> {
        Ok(self.allocated.lock().iter().copied().collect())
    }
}

fn eio() -> io::Error {
    io::Error::other("input/output error (simulated)")
}

impl DiskFile for SimFile {
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.world.chance(30) || !offset.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let state = self.world.state.lock();
        for (at, chunk) in buf.chunks_mut(512).enumerate() {
            let sector = state.get(self.inode, offset / SECTOR + at as u64);
            chunk.copy_from_slice(&sector[..chunk.len()]);
        }
        Ok(buf.len())
    }

    fn try_write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        if self.world.chance(60) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut state = self.world.state.lock();
        let done = if state.rng.random_bool(0.1) { buf.len() / 1024 * 512 } else { buf.len() };
        for (sector, bytes) in (offset / SECTOR..).zip(buf[..done].chunks_exact(512)) {
            state.put(self.inode, sector, bytes);
        }
        Ok(done)
    }

    fn read_at(&self, offset: u64, len: usize) -> BoxFuture<'static, io::Result<Bytes>> {
        let (world, inode) = (self.world.clone(), self.inode);
        Box::pin(async move {
            world.step().await;
            let state = world.state.lock();
            if offset + len as u64 > state.inodes[inode].len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let first = offset / SECTOR;
            let mut bytes = Vec::with_capacity(len + 1024);
            for sector in first..(offset + len as u64).div_ceil(SECTOR) {
                bytes.extend_from_slice(&state.get(inode, sector));
            }
            let skip = usize::try_from(offset - first * SECTOR).expect("small");
            Ok(Bytes::from(bytes).slice(skip..skip + len))
        })
    }

    fn write_at(&self, data: Bytes, offset: u64) -> BoxFuture<'static, io::Result<()>> {
        let (world, inode) = (self.world.clone(), self.inode);
        Box::pin(async move {
            // Whole sectors from here on; only the cache's index writes less.
            let data = if offset.is_multiple_of(SECTOR) && data.len().is_multiple_of(512) {
                data
            } else {
                pad(&world, inode, &data, offset)
            };
            let first = offset / SECTOR;
            let op = world.begin(inode, first, data.clone());
            world
                .state
                .lock()
                .say(format_args!("put {} sectors from {first} of file {inode}", data.len() / 512));
            world.step().await;
            let no_space = world.state.lock().profile.no_space;
            let fails = world.chance(no_space);
            let total = data.len() / 512;
            let stop_at =
                if fails { usize::try_from(world.pick(total as u64 + 1)).expect("small") } else { total };
            for (at, bytes) in data.chunks_exact(512).enumerate().take(stop_at) {
                world.state.lock().put(inode, first + at as u64, bytes);
                if at % 64 == 63 {
                    world.step().await;
                }
            }
            world.step().await;
            world.state.lock().in_flight.remove(&op);
            if fails { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })
    }

    fn sync_data(&self) -> BoxFuture<'static, io::Result<()>> {
        let (world, inode) = (self.world.clone(), self.inode);
        Box::pin(async move {
            world.step().await;
            let op = {
                let mut state = world.state.lock();
                state.next_op += 1;
                let (op, sectors) = (state.next_op, state.inodes[inode].dirty.clone());
                state.syncs_in_flight.insert(op, (inode, sectors));
                state.say(format_args!("sync {op} of file {inode} begins"));
                op
            };
            for _ in 0..1 + world.pick(3) {
                world.step().await;
            }
            let bad = world.state.lock().profile.bad_disk;
            let fails = bad && world.chance(4);
            let failed = {
                let mut state = world.state.lock();
                let Some((_, sectors)) = state.syncs_in_flight.remove(&op) else { return Ok(()) };
                let failed = state.finish_sync(inode, &sectors, fails);
                state.say(format_args!(
                    "sync {op} of file {inode}: {}",
                    if failed { "fails" } else { "done" }
                ));
                failed
            };
            world.step().await;
            if failed { Err(eio()) } else { Ok(()) }
        })
    }

    fn check_write_back(&self) -> BoxFuture<'static, io::Result<()>> {
        let (world, inode) = (self.world.clone(), self.inode);
        Box::pin(async move {
            world.step().await;
            let failed = std::mem::take(&mut world.state.lock().inodes[inode].error);
            if failed { Err(eio()) } else { Ok(()) }
        })
    }

    fn data_stretches(&self, from: u64, max: usize) -> BoxFuture<'static, io::Result<Vec<(u64, u64)>>> {
        let (world, inode) = (self.world.clone(), self.inode);
        Box::pin(async move {
            world.step().await;
            let state = world.state.lock();
            let mut stretches: Vec<(u64, u64)> = Vec::new();
            for &sector in state.inodes[inode].cache.keys() {
                let (start, end) = (sector * SECTOR / 4096 * 4096, (sector * SECTOR / 4096 + 1) * 4096);
                let start = start.max(from);
                if start >= end {
                    continue;
                }
                match stretches.last_mut() {
                    Some(last) if last.1 >= start => last.1 = end,
                    _ => stretches.push((start, end)),
                }
            }
            stretches.truncate(max);
            Ok(stretches)
        })
    }

    fn inode(&self) -> u64 {
        self.inode as u64
    }

    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

fn pad(world: &World, inode: usize, data: &[u8], offset: u64) -> Bytes {
    let state = world.state.lock();
    let first = offset / SECTOR;
    let end = (offset + data.len() as u64).div_ceil(SECTOR);
    let mut whole: Vec<u8> = (first..end).flat_map(|sector| state.get(inode, sector)).collect();
    let skip = usize::try_from(offset - first * SECTOR).expect("small");
    whole[skip..skip + data.len()].copy_from_slice(data);
    Bytes::from(whole)
}

impl SimDisk {
    fn file(&self, inode: usize) -> Arc<dyn DiskFile> {
        Arc::new(SimFile { world: self.0.clone(), inode })
    }
}

impl Disk for SimDisk {
    fn create(&self, path: DiskPath, len: u64, _: Lock) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>> {
        let disk = Self(self.0.clone());
        Box::pin(async move {
            disk.0.step().await;
            let no_space = disk.0.state.lock().profile.no_space;
            if disk.0.chance(no_space) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let inode = {
                let mut state = disk.0.state.lock();
                if state.names.contains_key(&path) {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                state.inodes.push(Inode { len, ..Inode::default() });
                let inode = state.inodes.len() - 1;
                state.names.insert(path, inode);
                inode
            };
            disk.0.step().await;
            Ok(disk.file(inode))
        })
    }

    fn open(&self, path: DiskPath, lock: Lock) -> BoxFuture<'static, io::Result<Arc<dyn DiskFile>>> {
        let disk = Self(self.0.clone());
        Box::pin(async move {
            disk.0.step().await;
            let inode = disk.0.state.lock().names.get(&path).copied().ok_or(io::ErrorKind::NotFound)?;
            if lock == Lock::Exclusive {
                disk.0.state.lock().land_late_writes(inode);
            }
            Ok(disk.file(inode))
        })
    }

    fn stat(&self, path: DiskPath) -> BoxFuture<'static, io::Result<(u64, u64)>> {
        let world = self.0.clone();
        Box::pin(async move {
            let state = world.state.lock();
            let inode = *state.names.get(&path).ok_or(io::ErrorKind::NotFound)?;
            Ok((state.inodes[inode].len, inode as u64))
        })
    }

    fn read_small(&self, path: DiskPath, max: u64) -> BoxFuture<'static, io::Result<Bytes>> {
        let world = self.0.clone();
        Box::pin(async move {
            let bytes = world.state.lock().small.get(&path).cloned().ok_or(io::ErrorKind::NotFound)?;
            if bytes.len() as u64 > max { Err(io::ErrorKind::InvalidData.into()) } else { Ok(bytes) }
        })
    }

    fn write_small(&self, path: DiskPath, data: Bytes) -> BoxFuture<'static, io::Result<()>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.step().await;
            world.state.lock().small.insert(path, data);
            world.step().await;
            Ok(())
        })
    }

    fn rename(&self, from: DiskPath, to: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.step().await;
            {
                let mut state = world.state.lock();
                if from.place == Place::Runtime {
                    let map = state.maps.remove(&from).ok_or(io::ErrorKind::NotFound)?;
                    state.maps.insert(to, map);
                } else {
                    let inode = state.names.remove(&from).ok_or(io::ErrorKind::NotFound)?;
                    state.names.insert(to, inode);
                }
            }
            world.step().await;
            Ok(())
        })
    }

    fn remove(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.step().await;
            world.note(&format!("unlink {}", path.path));
            {
                let mut state = world.state.lock();
                if path.place == Place::Runtime {
                    state.maps.remove(&path);
                }
                state.names.remove(&path);
                state.small.remove(&path);
                if state.rng.random_bool(0.3) {
                    state.durable_names.remove(&path);
                }
            }
            world.step().await;
            Ok(())
        })
    }

    fn remove_dir(&self, _: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn list(&self, path: DiskPath) -> BoxFuture<'static, io::Result<Vec<String>>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.step().await;
            let state = world.state.lock();
            let all = state.names.keys().chain(state.maps.keys()).chain(state.small.keys());
            let prefix = format!("{}/", path.path);
            let names: BTreeSet<String> = all
                .filter(|name| name.place == path.place)
                .filter_map(|name| name.path.strip_prefix(&prefix))
                .filter(|rest| !rest.contains('/'))
                .map(str::to_owned)
                .collect();
            Ok(names.into_iter().collect())
        })
    }

    fn sync_dir(&self, path: DiskPath) -> BoxFuture<'static, io::Result<()>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.step().await;
            let mut guard = world.state.lock();
            let state = &mut *guard;
            state.durable_names.retain(|name, _| name.parent() != path);
            let here = state.names.iter().filter(|(name, _)| name.parent() == path);
            state.durable_names.extend(here.map(|(name, inode)| (name.clone(), *inode)));
            Ok(())
        })
    }

    fn map(
        &self,
        path: DiskPath,
        words: usize,
        create: Create,
    ) -> BoxFuture<'static, io::Result<Arc<dyn SharedMap>>> {
        let world = self.0.clone();
        Box::pin(async move {
            world.step().await;
            let mut state = world.state.lock();
            match (state.maps.get(&path), create) {
                (Some(_), Create::New) => Err(io::ErrorKind::AlreadyExists.into()),
                (None, Create::Existing) => Err(io::ErrorKind::NotFound.into()),
                (Some(map), Create::Existing) if map.words.len() != words => {
                    Err(io::ErrorKind::InvalidData.into())
                }
                (Some(map), Create::Existing) => Ok(map.clone() as Arc<dyn SharedMap>),
                (None, Create::New) => {
                    assert!(words.is_multiple_of(MAP_PAGE_WORDS), "whole pages");
                    let map = Arc::new(SimMap {
                        words: (0..words).map(|_| AtomicU64::new(0)).collect(),
                        allocated: Mutex::new(BTreeSet::new()),
                        world: world.clone(),
                    });
                    state.maps.insert(path, map.clone());
                    Ok(map as Arc<dyn SharedMap>)
                }
            }
        })
    }

    fn space(&self) -> BoxFuture<'static, io::Result<(u64, u64)>> {
        Box::pin(async { Ok((1 << 40, 1 << 41)) })
    }

    fn boot_id(&self) -> [u8; 16] {
        [self.0.state.lock().boot; 16]
    }
}
