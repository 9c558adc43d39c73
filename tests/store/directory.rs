//! What only a directory pool can get wrong: processes that race, die and sleep, odd files, file systems.

use super::suite::{self, Store, WHOLE, body, increment, key, keys_in, text_of};
use blockhouse::store::dir::{DirConfig, DirStore, IfMissing};
use blockhouse::store::{Expect, GetRange, StoreError};
use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

pub async fn open(root: &Path) -> Store {
    Arc::new(open_dir(root).await)
}

async fn open_dir(root: &Path) -> DirStore {
    let config = DirConfig { if_missing: IfMissing::Create, ..DirConfig::default() };
    DirStore::open(root.to_owned(), config).await.unwrap()
}

fn version(number: u64) -> String {
    format!("{number:020}")
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn a_missing_directory_is_made_only_when_asked_for() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    let config = DirConfig { if_missing: IfMissing::Fail, ..DirConfig::default() };
    let failed = DirStore::open(root.clone(), config.clone()).await.err().unwrap();
    assert_eq!(failed.kind(), std::io::ErrorKind::NotFound);
    open_dir(&root).await;
    DirStore::open(root, config).await.unwrap();
}

#[tokio::test]
async fn nobody_else_may_read_a_pool() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    let store = open(&root).await;
    store.put_new(&key("packs/a"), body("x")).await.unwrap();
    store.swap(&key("volumes/a"), Expect::Absent, body("x")).await.unwrap();
    let mut left = vec![root];
    while let Some(path) = left.pop() {
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        if path.is_dir() {
            assert_eq!(mode, 0o700, "{path:?}");
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            assert_eq!(mode, 0o600, "{path:?}");
        }
    }
}

#[tokio::test]
async fn the_layout_is_the_documented_one() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    let store = open(&root).await;
    store.put_new(&key("packs/a"), body("plain")).await.unwrap();
    let mut etag = store.swap(&key("volumes/vm-7"), Expect::Absent, body("v1")).await.unwrap();
    let folder = root.join("volumes/vm-7~");
    assert_eq!(names_in(&folder), BTreeSet::from([version(0), version(1)]));
    for n in 2..6 {
        etag = store.swap(&key("volumes/vm-7"), Expect::State(etag), body(&format!("v{n}"))).await.unwrap();
        assert_eq!(names_in(&folder), BTreeSet::from([version(n - 1), version(n)]), "tidying leaves two");
    }
    assert_eq!(fs::read(root.join("packs/a")).unwrap(), b"plain");
    let five = fs::read(folder.join(version(5))).unwrap();
    let four = fs::read(folder.join(version(4))).unwrap();
    assert_eq!((&five[..8], &five[40..]), (&b"bhswap01"[..], &b"v5"[..]));
    assert_eq!(five[24..40], four[8..24], "each names the nonce of the one below");
    assert!(names_in(&root.join(".tmp")).is_empty());
    let reserve = fs::metadata(root.join(".reserve")).unwrap();
    assert_eq!(reserve.len(), 4 << 20);
    assert!(reserve.blocks() * 512 >= 4 << 20, "the reserve holds space");
}

#[tokio::test]
async fn leftovers_of_dead_processes_go_after_a_day() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    drop(open(&root).await);
    let temp = root.join(".tmp");
    let old = SystemTime::now() - Duration::from_secs(25 * 3600);
    for name in ["old", "new"] {
        fs::write(temp.join(name), "x").unwrap();
        fs::create_dir(temp.join(format!("{name}-folder"))).unwrap();
        fs::write(temp.join(format!("{name}-folder")).join(version(0)), "").unwrap();
    }
    for name in ["old", "old-folder"] {
        fs::File::open(temp.join(name)).unwrap().set_modified(old).unwrap();
    }
    drop(open(&root).await);
    assert_eq!(names_in(&temp), BTreeSet::from(["new".to_owned(), "new-folder".to_owned()]));
}

#[tokio::test]
async fn g19_odd_files_in_a_pool_do_no_harm() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    let store = open(&root).await;
    let at = key("volumes/vm-7");
    let first = store.swap(&at, Expect::Absent, body("good")).await.unwrap();
    store.put_new(&key("packs/good"), body("good")).await.unwrap();
    let secret = above.path().join("secret");
    fs::write(&secret, "secret").unwrap();

    let folder = root.join("volumes/vm-7~");
    for junk in
        ["junk", "99", "-0000000000000000009", "0000000000000000009x", &"9".repeat(21), &"9".repeat(20)]
    {
        fs::write(folder.join(junk), "junk").unwrap();
    }
    fs::create_dir(folder.join("sub")).unwrap();
    let packs = root.join("packs");
    symlink(&secret, packs.join("link")).unwrap();
    symlink(above.path(), root.join("outside")).unwrap();
    symlink(above.path(), root.join("volumes/other~")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, packs.join("pipe"), rustix::fs::Mode::RWXU).unwrap();
    fs::write(packs.join(".hidden"), "x").unwrap();
    fs::write(packs.join("tilde~"), "x").unwrap();
    fs::write(packs.join("sp ace"), "x").unwrap();
    fs::File::create(packs.join("huge")).unwrap().set_len(1 << 40).unwrap();

    assert_eq!(text_of(&store, &at).await, "good");
    store.swap(&at, Expect::State(first), body("better")).await.unwrap();
    assert_eq!(text_of(&store, &at).await, "better");
    assert_eq!(keys_in(&store, "packs", 100).await, ["packs/good", "packs/huge"]);
    assert_eq!(keys_in(&store, "volumes", 100).await, ["volumes/vm-7"]);
    for bad in ["packs/link", "packs/pipe", "outside/secret", "volumes/other"] {
        let refused = store.get(&key(bad), WHOLE).await;
        assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{bad}: {refused:?}");
    }
    assert!(matches!(store.list("outside", None, 10).await, Err(StoreError::Invalid { .. })));
    let refused = store.put_new(&key("outside/new"), body("x")).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
    let refused = store.swap(&key("volumes/other"), Expect::Absent, body("x")).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
    let huge = key("packs/huge");
    let refused = store.get(&huge, GetRange::Whole { max_bytes: 1 << 20 }).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })));
    assert_eq!(
        store.get(&huge, GetRange::Suffix { len: 8 }).await.unwrap().bytes,
        Bytes::from_static(&[0; 8])
    );
    let long = key(&format!("packs/{}", "x".repeat(300)));
    assert!(matches!(store.put_new(&long, body("x")).await, Err(StoreError::Invalid { .. })));
    assert!(matches!(
        store.put_new(&key("packs/good/below"), body("x")).await,
        Err(StoreError::Invalid { .. })
    ));
}

#[tokio::test]
async fn g19_odd_versions_are_an_error_and_stay_listed() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    let store = open(&root).await;
    let plant = |name: &str, number: u64, content: &[u8]| {
        let folder = root.join(format!("volumes/{name}~"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(version(number)), content).unwrap();
    };
    let header = [b"bhswap01".as_slice(), &[7; 16], &[0; 16]].concat();
    plant("short", 0, b"");
    plant("short", 1, b"bhswap01");
    plant("magic", 0, b"");
    plant("magic", 1, &[9; 100]);
    plant("huge", 0, b"");
    plant("huge", 1, &header);
    let huge = fs::OpenOptions::new().write(true).open(root.join("volumes/huge~").join(version(1))).unwrap();
    huge.set_len(1 << 40).unwrap();
    plant("alone", 5, &[header.as_slice(), b"x"].concat());
    plant("last", u64::MAX - 1, &[b"bhswap01".as_slice(), &[8; 16], &[0; 16], b"x"].concat());
    plant("last", u64::MAX, &[b"bhswap01".as_slice(), &[7; 16], &[8; 16], b"x"].concat());
    fs::create_dir(root.join("volumes/empty~")).unwrap();
    for bad in ["short", "magic", "huge", "alone", "empty"] {
        let read = store.get(&key(&format!("volumes/{bad}")), WHOLE).await;
        assert!(matches!(read, Err(StoreError::Invalid { .. })), "{bad}: {read:?}");
    }
    let last = store.get(&key("volumes/last"), WHOLE).await.unwrap();
    let swapped = store.swap(&key("volumes/last"), Expect::State(last.etag), body("y")).await;
    assert!(matches!(swapped, Err(StoreError::Conflict(_) | StoreError::Invalid { .. })), "{swapped:?}");
    let listed = keys_in(&store, "volumes", 100).await;
    assert_eq!(listed.len(), 6, "what cannot be read must not look deleted: {listed:?}");
}

/// A version without the one that it names below it was made by somebody who slept, and never counts.
#[tokio::test]
async fn g27_a_late_version_is_not_read_and_not_built_upon() {
    let above = tempfile::tempdir().unwrap();
    let root = above.path().join("pool");
    let store = open(&root).await;
    let at = key("volumes/vm-7");
    let mut etag = store.swap(&at, Expect::Absent, body("v1")).await.unwrap();
    let folder = root.join("volumes/vm-7~");
    let kept = above.path().join("kept");
    fs::create_dir(&kept).unwrap();
    for n in 2..8 {
        fs::hard_link(folder.join(version(n - 1)), kept.join(version(n - 1))).unwrap();
        etag = store.swap(&at, Expect::State(etag), body(&format!("v{n}"))).await.unwrap();
    }
    // Two late writers: 2 and 3 are back, from others than once made them.
    for number in [2, 3] {
        let mut late = fs::read(kept.join(version(number))).unwrap();
        late[8..24].fill(0xee);
        fs::write(folder.join(version(number)), late).unwrap();
    }
    assert_eq!(text_of(&store, &at).await, "v7");
    etag = store.swap(&at, Expect::State(etag), body("v8")).await.unwrap();
    assert_eq!(names_in(&folder), BTreeSet::from([version(7), version(8)]), "late ones are tidied too");
    // The highest number without the one below is no state at all.
    fs::hard_link(folder.join(version(7)), folder.join(version(20))).unwrap();
    assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::Invalid { .. })));
    fs::remove_file(folder.join(version(20))).unwrap();
    assert_eq!(store.get(&at, WHOLE).await.unwrap().etag, etag);
}

const CHILD_POOL: &str = "BLOCKHOUSE_TEST_POOL";
const CHILD_NAME: &str = "BLOCKHOUSE_TEST_NAME";

/// Not a test of its own: what the processes of the next test run.
#[tokio::test]
async fn child_that_increments_until_it_is_killed() {
    let (Ok(pool), Ok(name)) = (std::env::var(CHILD_POOL), std::env::var(CHILD_NAME)) else { return };
    let store = open(Path::new(&pool)).await;
    let log = PathBuf::from(&pool).with_extension(format!("log-{name}"));
    let mut log = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    for n in 0.. {
        let count = increment(&store, &key("nodes/counter"), &format!("{name}.{n}")).await;
        // One write: a line is there or not, whenever the process is killed.
        std::io::Write::write_all(&mut log, format!("{count}\n").as_bytes()).unwrap();
    }
}

struct Child(std::process::Child);

impl Child {
    fn start(pool: &Path, name: String) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "directory::child_that_increments_until_it_is_killed", "--nocapture"])
            .env(CHILD_POOL, pool)
            .env(CHILD_NAME, name)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Counts that processes logged as theirs, while they are stopped, woken and killed at any point.
#[tokio::test(flavor = "multi_thread")]
async fn g27_g7_processes_that_are_killed_and_stopped_lose_no_increment() {
    let above = tempfile::tempdir().unwrap();
    let pool = above.path().join("pool");
    let store = open(&pool).await;
    let at = key("nodes/counter");
    let mut children: Vec<Child> = (0..3).map(|n| Child::start(&pool, format!("c{n}"))).collect();
    let mut started = children.len();
    let progress = async |from: u64| {
        // The event waited for is in another process: its work is what shows it.
        for _ in 0..20_000 {
            let now = match store.get(&at, WHOLE).await {
                Ok(object) => {
                    let text = String::from_utf8(object.bytes.to_vec()).unwrap();
                    text.split_once(' ').unwrap().0.parse().unwrap()
                }
                Err(StoreError::NotFound(_)) => 0u64,
                Err(other) => panic!("{other}"),
            };
            if now > from {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("nobody goes on after {from}");
    };
    let mut at_least = progress(0).await;
    for round in 0..120u64 {
        let victim = usize::try_from(rand::random_range(0..3u64)).unwrap();
        let pause = Duration::from_micros(rand::random_range(0..4000));
        tokio::time::sleep(pause).await;
        if round % 4 == 3 {
            children[victim].signal(Signal::KILL);
            children[victim] = Child::start(&pool, format!("c{started}"));
            started += 1;
        } else {
            children[victim].signal(Signal::STOP);
            // The others pass it by a few versions.
            at_least = progress(at_least + rand::random_range(0..6)).await;
            children[victim].signal(Signal::CONT);
        }
        at_least = progress(at_least).await;
    }
    drop(children);
    let mut counts = Vec::new();
    for name in 0..started {
        let log = pool.with_extension(format!("log-c{name}"));
        let text = fs::read_to_string(log).unwrap_or_default();
        counts.extend(text.lines().map(|line| line.parse::<u64>().unwrap()));
    }
    let distinct: BTreeSet<u64> = counts.iter().copied().collect();
    assert_eq!(distinct.len(), counts.len(), "a count was given twice: an increment was lost");
    let last = progress(0).await;
    assert!(distinct.last().is_some_and(|highest| *highest <= last), "{last} is below what was given");
    println!("{} increments reported, {last} made, {started} processes", counts.len());
    let left = names_in(&pool.join("nodes/counter~")).len();
    assert!(left <= 2 + started, "{left} versions left");
}

/// A file system made for a test, unmounted after it.
struct Mounted(PathBuf, #[expect(dead_code, reason = "removed after the mount")] tempfile::TempDir);

impl Mounted {
    fn new(file_system: &str, options: &str) -> Option<Self> {
        // In memory, where syncs are fast: more swaps to a listing.
        let shm = Path::new("/dev/shm");
        let above = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
        let point = above.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let done = if file_system == "tmpfs" {
            run("mount", &["-t", "tmpfs", "-o", options, "none", point.to_str().unwrap()])
        } else {
            let image = above.path().join("image");
            fs::File::create(&image).unwrap().set_len(600 << 20).unwrap();
            let image = image.to_str().unwrap();
            run(&format!("mkfs.{file_system}"), &["-q", image])
                && run("mount", &["-o", &format!("loop{options}"), image, point.to_str().unwrap()])
        };
        if done {
            return Some(Self(point, above));
        }
        assert!(std::env::var_os("CI").is_none(), "cannot mount {file_system} here");
        println!("\n*** SKIPPED: this machine cannot make and mount {file_system} ***\n");
        None
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let paths = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new("env")
        .arg(format!("PATH={paths}"))
        .arg(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

async fn heads_on(file_system: &str, heads: usize) {
    let options = if file_system == "tmpfs" { "size=256m" } else { "" };
    let Some(mounted) = Mounted::new(file_system, options) else { return };
    let store = open(&mounted.0.join("pool")).await;
    let begun = Instant::now();
    suite::listing_while_swapped(store.clone(), heads, 6).await;
    println!("{file_system}: {heads} heads, {:?}", begun.elapsed());
    drop(store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g6_3000_heads_swapped_during_a_listing_on_tmpfs() {
    heads_on("tmpfs", 3000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g6_3000_heads_swapped_during_a_listing_on_ext4() {
    heads_on("ext4", 3000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g6_3000_heads_swapped_during_a_listing_on_xfs() {
    heads_on("xfs", 3000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g6_3000_heads_swapped_during_a_listing_on_btrfs() {
    heads_on("btrfs", 3000).await;
}

/// A pool on a disk that is full but for the reserve, and how many packs fill it.
async fn full_pool() -> Option<(Mounted, Store, usize)> {
    let mounted = Mounted::new("tmpfs", "size=16m")?;
    let store = open(&mounted.0.join("pool")).await;
    // The folders stand, as in any pool that has been in use.
    for folder in ["trash", "volumes"] {
        store.put_new(&key(&format!("{folder}/first")), body("x")).await.unwrap();
    }
    let mut packs = 0;
    for size in [1 << 20, 4096] {
        loop {
            match store.put_new(&key(&format!("packs/{packs}")), Bytes::from(vec![1; size])).await {
                Ok(()) => packs += 1,
                Err(StoreError::NoSpace(_)) => break,
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert!(mounted.0.join("pool/.reserve").exists(), "packs do not get the reserve");
    Some((mounted, store, packs))
}

#[tokio::test]
async fn l11_on_a_full_disk_heads_still_swap_and_deletes_make_room() {
    let Some((mounted, store, packs)) = full_pool().await else { return };
    let pool = mounted.0.join("pool");
    let at = key("volumes/vm-7");
    let mut etag = store.swap(&at, Expect::Absent, body("v0")).await.unwrap();
    assert!(!pool.join(".reserve").exists(), "there was no other space");
    for n in 0..200 {
        etag = store.swap(&at, Expect::State(etag), Bytes::from(vec![b'x'; 4096 + n])).await.unwrap();
    }
    let refused = store.put_new(&key("packs/more"), Bytes::from(vec![1; 4 << 20])).await;
    assert!(matches!(refused, Err(StoreError::NoSpace(_))));
    assert!(names_in(&pool.join(".tmp")).is_empty(), "what failed leaves nothing behind");
    store.swap_delete(&at, etag).await.unwrap();
    for n in 0..packs {
        store.delete(&key(&format!("packs/{n}"))).await.unwrap();
    }
    assert!(pool.join(".reserve").exists(), "it is made again once there is room");
    drop(store);
}

#[tokio::test]
async fn l11_on_a_full_disk_what_a_delete_needs_first_can_be_written() {
    let Some((mounted, store, _)) = full_pool().await else { return };
    store.put_new(&key("trash/vm-7"), body("what is deleted")).await.unwrap();
    assert!(!mounted.0.join("pool/.reserve").exists(), "there was no other space");
    drop(store);
}

/// What a fork, a commit's pack and a commit's head cost here. Prints; the bound is only against gross mistakes.
#[tokio::test]
async fn small_changes_take_milliseconds() {
    let above = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = open(&above.path().join("pool")).await;
    let mut took: [Vec<Duration>; 5] = Default::default();
    let content = Bytes::from(vec![7; 1000]);
    for n in 0..200 {
        let (volume, pack) = (key(&format!("volumes/v{n}")), key(&format!("maps/m{n}")));
        let begun = Instant::now();
        let etag = store.swap(&volume, Expect::Absent, content.clone()).await.unwrap();
        took[0].push(begun.elapsed());
        let begun = Instant::now();
        store.swap(&volume, Expect::State(etag), content.clone()).await.unwrap();
        took[1].push(begun.elapsed());
        let begun = Instant::now();
        store.put_new(&pack, content.clone()).await.unwrap();
        took[2].push(begun.elapsed());
        let begun = Instant::now();
        store.get(&volume, WHOLE).await.unwrap();
        took[3].push(begun.elapsed());
    }
    let again = open(&above.path().join("pool")).await;
    for n in 0..200 {
        let begun = Instant::now();
        again.get(&key(&format!("volumes/v{n}")), WHOLE).await.unwrap();
        took[4].push(begun.elapsed());
    }
    let what = ["swap, new key", "swap", "put_new", "get, known durable", "get, first time"];
    for (what, took) in what.iter().zip(&mut took) {
        took.sort();
        println!(
            "{what}: median {:?}, 99th {:?} of {}",
            took[took.len() / 2],
            took[took.len() * 99 / 100],
            took.len()
        );
        assert!(took[took.len() / 2] < Duration::from_millis(500), "{what}");
    }
}
