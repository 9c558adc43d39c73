//! Against the file systems that the machine has: temporary directories, `/dev/shm`, and small mounts when run as root.

use super::places::{hex, is_tmpfs};
use super::*;
use std::process::{Command, Stdio};

struct Dirs {
    disk: RealDisk,
    state: tempfile::TempDir,
    /// On tmpfs.
    _runtime: tempfile::TempDir,
}

fn disk() -> Dirs {
    let state = tempfile::tempdir().unwrap();
    let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = open(state.path(), Some(runtime.path())).unwrap();
    Dirs { disk, state, _runtime: runtime }
}

fn open(state: &Path, runtime: Option<&Path>) -> io::Result<RealDisk> {
    RealDisk::open(RealDiskConfig {
        state_dir: state.to_owned(),
        runtime_dir: runtime.map(Path::to_path_buf),
    })
}

fn error_of<T>(result: io::Result<T>) -> ErrorKind {
    result.err().map(|error| error.kind()).unwrap()
}

#[tokio::test]
async fn written_bytes_are_read_back_with_and_without_waiting() {
    let dirs = disk();
    let file = dirs.disk.create(DiskPath::state("a/b/file"), 1 << 20, Lock::Exclusive).await.unwrap();
    file.write_at(Bytes::from(vec![7; 8192]), 4096).await.unwrap();
    file.sync_data().await.unwrap();
    file.check_write_back().await.unwrap();
    assert_eq!(file.read_at(4096, 8192).await.unwrap(), vec![7; 8192]);
    let mut buf = [0; 8192];
    match file.try_read_at(&mut buf, 4096) {
        Ok(count) => assert!(buf[..count].iter().all(|&byte| byte == 7) && count > 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    match file.try_write_at(&[9; 512], 0) {
        Ok(count) => assert_eq!(file.read_at(0, count).await.unwrap(), vec![9; count]),
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    assert_eq!(error_of(file.read_at(1 << 20, 1).await), ErrorKind::UnexpectedEof);
    let (len, inode) = dirs.disk.stat(DiskPath::state("a/b/file")).await.unwrap();
    assert_eq!((len, inode), (1 << 20, file.inode()));
    let stretches = file.data_stretches(0, 10).await.unwrap();
    assert!(stretches.iter().any(|&(start, end)| start <= 4096 && end >= 12288), "{stretches:?}");
    assert!(stretches.iter().all(|&(_, end)| end <= 1 << 19), "{stretches:?}");
}

#[tokio::test]
async fn a_file_system_without_nowait_says_would_block_and_is_not_asked_again() {
    let dirs = disk();
    let file = dirs.disk.create_file_for_test("file").await;
    for _ in 0..3 {
        // Memory files refuse such reads, even of what is there.
        assert_eq!(error_of(file.try_read_at(&mut [0; 512], 0)), ErrorKind::WouldBlock);
    }
    assert!(file.inner.never_reads.load(Ordering::Relaxed));
    assert_eq!(file.read_at(0, 512).await.unwrap(), vec![0; 512]);
}

impl RealDisk {
    async fn create_file_for_test(&self, name: &str) -> RealFile {
        let path = DiskPath::runtime(name);
        drop(self.create(path.clone(), 4096, Lock::None).await.unwrap());
        let file = self.shared.open_file(&path, Lock::None).unwrap();
        let inner = OpenFile {
            file: Some(file),
            never_reads: AtomicBool::new(false),
            never_writes: AtomicBool::new(false),
            write_refusals: Refusals::default(),
        };
        RealFile { inner: Arc::new(inner), inode: 0 }
    }
}

#[test]
fn writes_that_are_always_refused_are_tried_only_now_and_then() {
    let refusals = Refusals::default();
    let mut asked = 0;
    for _ in 0..10 * REFUSED_ASK_EVERY {
        if refusals.is_worth_asking() {
            asked += 1;
            refusals.note_refusal();
        }
    }
    assert!((REFUSALS_MAX + 5..REFUSALS_MAX + 11).contains(&asked), "{asked}");
    refusals.note_success();
    assert!(refusals.is_worth_asking());
}

#[tokio::test]
async fn l9_a_lock_is_taken_once_the_other_process_let_go() {
    let dirs = disk();
    let path = DiskPath::state("epoch");
    drop(dirs.disk.create(path.clone(), 4096, Lock::None).await.unwrap());
    let full = dirs.state.path().join("epoch");
    // Holds the lock until its standard input ends.
    let mut holder = Command::new("flock")
        .arg(&full)
        .args(["sh", "-c", "echo locked; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 7];
    holder.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    let file = open_options().open(&full).unwrap();
    let refused = lock_exclusive(&file, &full, Duration::from_millis(20)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::TimedOut);
    assert!(refused.to_string().contains("epoch"), "{refused}");
    let waiting = tokio::spawn(dirs.disk.open(path.clone(), Lock::Exclusive));
    drop(holder.stdin.take());
    let locked = waiting.await.unwrap().unwrap();
    holder.wait().unwrap();
    assert_eq!(error_of(lock_exclusive(&file, &full, Duration::ZERO)), ErrorKind::TimedOut);
    drop(locked);
    drop(dirs.disk.open(path, Lock::Exclusive).await.unwrap());
}

#[tokio::test]
async fn l26_looking_for_the_pages_of_a_sparse_map_allocates_none() {
    let dirs = disk();
    let path = DiskPath::runtime("maps/live");
    let words = 64 << 20;
    let map = dirs.disk.map(path.clone(), words, Create::New).await.unwrap();
    let blocks = || fs::metadata(dirs.disk.shared.runtime_dir.join("maps/live")).unwrap().blocks();
    assert_eq!((map.allocated_pages().unwrap(), blocks()), (vec![], 0));
    for page in [3, 70_000] {
        map.allocate(page).unwrap();
        map.words()[page * MAP_PAGE_WORDS].store(page as u64, Ordering::Relaxed);
    }
    assert_eq!(blocks(), 16);
    drop(map);
    let map = dirs.disk.map(path.clone(), words, Create::Existing).await.unwrap();
    assert_eq!((map.allocated_pages().unwrap(), blocks()), (vec![3, 70_000], 16));
    assert_eq!(map.words()[70_000 * MAP_PAGE_WORDS].load(Ordering::Relaxed), 70_000);
    assert_eq!(error_of(map.allocate(words / MAP_PAGE_WORDS)), ErrorKind::InvalidInput);
    assert_eq!(
        error_of(dirs.disk.map(path.clone(), words - 1, Create::Existing).await),
        ErrorKind::InvalidData
    );
    assert_eq!(error_of(dirs.disk.map(path, words, Create::New).await), ErrorKind::AlreadyExists);
    assert_eq!(
        error_of(dirs.disk.map(DiskPath::runtime("none"), 0, Create::New).await),
        ErrorKind::InvalidInput
    );
}

/// A small tmpfs, unmounted at the end. `None` where it cannot be had.
struct Mount(tempfile::TempDir);

impl Mount {
    fn small() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(dir))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(self.0.path()).status().unwrap();
    }
}

#[tokio::test]
async fn l26_a_full_tmpfs_is_an_error_of_allocate_and_no_signal() {
    let Some(mount) = Mount::small() else {
        eprintln!("skipped: mounting needs root");
        return;
    };
    let state = tempfile::tempdir().unwrap();
    let disk = open(state.path(), Some(mount.0.path())).unwrap();
    assert!(disk.runtime_is_tmpfs());
    let map = disk.map(DiskPath::runtime("live"), 1000 * MAP_PAGE_WORDS, Create::New).await.unwrap();
    let full = (0..1000).find_map(|page| map.allocate(page).err().map(|error| (page, error.kind())));
    let (page, kind) = full.unwrap();
    assert_eq!(kind, ErrorKind::StorageFull);
    assert!(page > 4, "{page}");
    for page in 0..page {
        map.words()[page * MAP_PAGE_WORDS].store(1, Ordering::Relaxed);
    }
    assert_eq!(map.allocated_pages().unwrap(), (0..page).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_small_file_is_replaced_as_a_whole_and_leaves_nothing_beside_it() {
    let dirs = disk();
    let path = DiskPath::state("volumes/vm-7/meta");
    for round in 0..4u8 {
        let writers = (0..4).map(|_| dirs.disk.write_small(path.clone(), vec![round; 9000].into()));
        let reader = dirs.disk.read_small(path.clone(), 9000);
        let (written, read) = futures::join!(futures::future::join_all(writers), reader);
        written.into_iter().for_each(|result| result.unwrap());
        match read {
            Ok(data) => assert!(data.len() == 9000 && data.iter().all(|&byte| byte == data[0])),
            Err(error) => assert!(round == 0 && error.kind() == ErrorKind::NotFound),
        }
    }
    assert_eq!(dirs.disk.read_small(path.clone(), 9000).await.unwrap(), vec![3; 9000]);
    assert_eq!(error_of(dirs.disk.read_small(path.clone(), 8999).await), ErrorKind::InvalidData);
    let names = fs::read_dir(dirs.state.path().join("volumes/vm-7")).unwrap().count();
    assert_eq!(names, 1);
    // A write that cannot replace its target leaves no temporary file.
    fs::create_dir(dirs.state.path().join("volumes/vm-7/dir")).unwrap();
    dirs.disk.write_small(DiskPath::state("volumes/vm-7/dir"), Bytes::new()).await.unwrap_err();
    assert_eq!(fs::read_dir(dirs.state.path().join("volumes/vm-7")).unwrap().count(), 2);
}

#[tokio::test]
async fn files_are_listed_renamed_and_removed() {
    let dirs = disk();
    let disk = &dirs.disk;
    let dir = DiskPath::state("d");
    assert_eq!(disk.list(dir.clone()).await.unwrap(), Vec::<String>::new());
    for name in ["d/b", "d/a"] {
        disk.create(DiskPath::state(name), 0, Lock::None).await.unwrap();
    }
    let again = disk.create(DiskPath::state("d/a"), 0, Lock::None).await;
    assert_eq!(error_of(again), ErrorKind::AlreadyExists);
    fs::write(dirs.state.path().join("d/.tmp-left-by-a-killed-process"), "").unwrap();
    assert_eq!(disk.list(dir.clone()).await.unwrap(), ["a", "b"]);
    disk.rename(DiskPath::state("d/a"), DiskPath::state("d/c")).await.unwrap();
    let elsewhere = disk.rename(DiskPath::state("d/c"), DiskPath::runtime("d/c")).await;
    assert_eq!(error_of(elsewhere), ErrorKind::InvalidInput);
    disk.sync_dir(dir.clone()).await.unwrap();
    assert_eq!(disk.list(dir.clone()).await.unwrap(), ["b", "c"]);
    disk.remove_dir(dir.clone()).await.unwrap_err();
    for name in ["d/b", "d/c", "d/gone"] {
        disk.remove(DiskPath::state(name)).await.unwrap();
    }
    disk.remove_dir(dir.clone()).await.unwrap();
    disk.remove_dir(dir.clone()).await.unwrap();
    disk.create(DiskPath::state("d/a"), 0, Lock::None).await.unwrap();
    fs::remove_dir_all(dirs.state.path().join("d")).unwrap();
    disk.create(DiskPath::state("d/a"), 0, Lock::None).await.unwrap();
    let (free, all) = disk.space().await.unwrap();
    assert!(free > 0 && free <= all);
}

#[tokio::test]
async fn paths_that_could_leave_the_directory_are_refused() {
    let dirs = disk();
    for path in ["/etc/passwd", "..", "a/../b", "../b", "a//b", "a/", "./a", "a/.", "", "a\0b"] {
        let result = dirs.disk.create(DiskPath::state(path), 0, Lock::None).await;
        assert_eq!(error_of(result), ErrorKind::InvalidInput, "{path:?}");
        assert_eq!(error_of(dirs.disk.remove(DiskPath::runtime(path)).await), ErrorKind::InvalidInput);
    }
    assert_eq!(dirs.disk.list(DiskPath::state("")).await.unwrap(), ["runtime-id", "runtime-last"]);
}

#[tokio::test]
async fn a_failed_create_leaves_no_file() {
    let dirs = disk();
    let result = dirs.disk.create(DiskPath::state("huge"), u64::MAX, Lock::None).await;
    assert!(result.is_err());
    assert_eq!(error_of(dirs.disk.stat(DiskPath::state("huge")).await), ErrorKind::NotFound);
}

#[test]
fn two_state_directories_never_share_a_runtime_directory() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
    let of = |state: &Path| {
        let disk = open(state, Some(runtime.path())).unwrap();
        assert!(disk.runtime_is_tmpfs());
        disk.shared.runtime_dir.clone()
    };
    assert_ne!(of(a.path()), of(b.path()));
    assert_eq!(of(a.path()), of(a.path()));
    assert_eq!(fs::metadata(of(a.path())).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn without_tmpfs_live_maps_are_in_the_state_directory_under_the_boot_id() {
    let state = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    if is_tmpfs(elsewhere.path()) {
        eprintln!("skipped: temporary files are on tmpfs");
        return;
    }
    let old = state.path().join(format!("runtime-{}", "0".repeat(32)));
    let other = state.path().join("runtime-of-something-else");
    for dir in [&old, &other] {
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("live"), "").unwrap();
    }
    let disk = open(state.path(), Some(elsewhere.path())).unwrap();
    assert!(!disk.runtime_is_tmpfs());
    let expected = fs::canonicalize(state.path()).unwrap().join(format!("runtime-{}", hex(&disk.boot_id())));
    assert_eq!(disk.shared.runtime_dir, expected);
    assert!(!fs::exists(old).unwrap() && fs::exists(other).unwrap());
}

#[test]
fn another_runtime_directory_counts_only_once_the_one_of_this_boot_is_empty() {
    let state = tempfile::tempdir().unwrap();
    let (first, second) =
        (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let used = |runtime: &tempfile::TempDir| {
        open(state.path(), Some(runtime.path())).unwrap().shared.runtime_dir.clone()
    };
    let kept = used(&first);
    fs::write(kept.join("live"), "").unwrap();
    assert_eq!(used(&second), kept);
    fs::remove_file(kept.join("live")).unwrap();
    assert!(used(&second).starts_with(second.path()));
}

#[test]
fn the_limit_of_open_files_is_raised() {
    let raised = raise_file_limit().unwrap();
    assert_eq!(rustix::process::getrlimit(Resource::Nofile).maximum, raised);
}
