//! The daemon where it needs a machine of its own: a kernel with block devices, root, and a power switch.
//!
//! Owns: which jobs run on which of two kernels, and what they have to say.
//! Does not own: the machine (vm.py beside this file) and the jobs in it (jobs/).

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

const OUT_OF_REACH: i32 = 126;
const POWER_CUT: i32 = 137;

/// One guest at a time: emulation takes all the CPU there is.
static TURN: Mutex<()> = Mutex::new(());

/// What a job's guest is made of.
struct Vm {
    command: Command,
}

/// Exit code, and what was printed.
struct Ran {
    code: i32,
    text: String,
}

impl Vm {
    fn new(kernel: &str) -> Self {
        let mut command = Command::new("/usr/bin/python3");
        command.arg(here("vm.py")).args(["--kernel", kernel, "--module", "nbd"]);
        command.args(["--program", env!("CARGO_BIN_EXE_blockhouse")]);
        let programs =
            ["blkdiscard", "blockdev", "cmp", "e2fsck", "fio", "fstrim", "mkfs.ext4", "nbd-client"];
        programs.iter().for_each(|program| {
            command.args(["--program", program]);
        });
        Self { command }
    }

    fn with(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// Runs a job; `None` where the guest cannot be had on this machine, which it says.
    fn run(mut self, job: &str, arguments: &[&str]) -> Option<Ran> {
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.command.arg("--").arg(here("jobs").join(job)).args(arguments);
        let mut child = self.command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut text = String::new();
        for line in BufReader::new(child.stdout.take().unwrap()).split(b'\n') {
            let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
            println!("  {line}");
            text += &line;
            text.push('\n');
        }
        let code = child.wait().unwrap().code().unwrap();
        if code == OUT_OF_REACH {
            println!("skipped: the guest's kernel or programs cannot be fetched");
            return None;
        }
        Some(Ran { code, text })
    }
}

impl Ran {
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, 0, "the job failed");
        self.text
    }

    /// The number behind the last line that begins with this word.
    #[track_caller]
    fn last(&self, word: &str) -> u32 {
        let line = self.text.lines().rev().find_map(|line| line.strip_prefix(word));
        line.unwrap_or_else(|| panic!("no line {word:?}")).trim().parse().unwrap()
    }
}

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm").join(name)
}

fn kernel_nbd(kernel: &str, transport: &str, connections: &str) {
    let vm = Vm::new(kernel).with(&["--disk", "state:2G:ext4"]);
    if let Some(ran) = vm.run("nbd.sh", &[transport, connections]) {
        ran.ok();
    }
}

#[test]
fn new_kernel_nbd_over_unix_on_four_connections() {
    kernel_nbd("new", "unix", "4");
}

#[test]
fn old_kernel_nbd_over_tcp_on_four_connections() {
    kernel_nbd("old", "tcp", "4");
}

#[test]
fn old_kernel_nbd_over_unix_on_one_connection() {
    kernel_nbd("old", "unix", "1");
}

#[test]
fn mkfs_and_blkdiscard_of_4_tib_take_little_memory() {
    let vm = Vm::new("new").with(&["--disk", "state:2G:xfs"]);
    if let Some(ran) = vm.run("large.sh", &["128"]) {
        ran.ok();
    }
}

/// Cuts the power when that many files were written, and says of how many, and how many are there afterwards.
fn cut(kernel: &str, fs: &str, sync: &str, after: u32) -> Option<(u32, u32)> {
    let state = tempfile::Builder::new().prefix("bh-vm-power-").tempdir().unwrap();
    let disk = format!("state:1G:{fs}:lossy");
    let place = ["--state", state.path().to_str().unwrap(), "--disk", &disk];
    let when = format!("^done {after}$");
    // At any moment after it: in the middle of a file, of a flush, of what nobody flushes.
    let cut = ["--cut-when", &when, "--cut-within", "4"];
    let ran = Vm::new(kernel).with(&place).with(&cut).run("power.sh", &["write", sync])?;
    assert_eq!(ran.code, POWER_CUT, "the power was not cut");
    let written = ran.last("done");
    let ran = Vm::new(kernel).with(&place).run("power.sh", &["check", &written.to_string()])?;
    let there = ran.last("there:");
    ran.ok();
    Some((written, there))
}

#[test]
fn fsynced_files_survive_power_cuts_new_kernel_xfs() {
    if let Some((written, there)) = cut("new", "xfs", "fsync", 30) {
        assert_eq!(there, written);
    }
}

#[test]
fn fsynced_files_survive_power_cuts_old_kernel_ext4() {
    if let Some((written, there)) = cut("old", "ext4", "fsync", 45) {
        assert_eq!(there, written);
    }
}

/// What makes the tests above mean something.
#[test]
fn files_that_nobody_synced_are_lost_by_a_power_cut() {
    if let Some((written, there)) = cut("new", "xfs", "none", 30) {
        assert!(there < written, "all {written} files are there though nobody synced them");
    }
}

/// The same of the disk alone, with no page cache and none of our code between.
#[test]
fn the_disk_forgets_what_was_not_flushed_and_a_plain_one_does_not() {
    for (disk, forgets) in [("raw:16M:raw:lossy", true), ("raw:16M:raw", false)] {
        let state = tempfile::Builder::new().prefix("bh-vm-disk-").tempdir().unwrap();
        let place = ["--state", state.path().to_str().unwrap(), "--disk", disk];
        let Some(ran) =
            Vm::new("old").with(&place).with(&["--cut-when", "^written"]).run("forgets.sh", &["write"])
        else {
            return;
        };
        assert_eq!(ran.code, POWER_CUT);
        let Some(ran) = Vm::new("old").with(&place).run("forgets.sh", &["count"]) else { return };
        let (old, new) = (ran.last("A:"), ran.last("B:"));
        assert_eq!(old + new, 512, "a page is neither old nor new");
        assert_eq!(old > 100, forgets, "{disk}: {old} pages old, {new} new");
    }
}
