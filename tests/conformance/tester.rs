//! The nbd project's own tester in all its modes.

use crate::clients::{finish, support, text};
use crate::daemon::{Daemon, Place};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The transaction logs that come with the tester stay below this.
const VOLUME: &str = "50M";

pub struct Tester {
    program: PathBuf,
}

impl Tester {
    pub fn get() -> Option<Self> {
        support("tests/conformance/nbd-tester", &[]).map(|program| Self { program: program.into() })
    }

    /// What lies beside it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.program.with_file_name(name)
    }

    pub fn run(&self, to: &[&str], arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new("timeout");
        finish(command.arg("300").arg(&self.program).args(arguments).args(to).stdin(Stdio::null()))
    }

    /// Over both transports.
    #[track_caller]
    fn passes(&self, daemon: &Daemon<'_>, volume: &str, arguments: &[&str]) {
        let socket = daemon.place.path("nbd.sock");
        let address = tcp(daemon, volume);
        for to in [vec!["127.0.0.1", address.as_str()], vec!["-u", text(&socket)]] {
            let (code, said) = self.run(&to, &[&["-N", volume][..], arguments].concat());
            assert_eq!(code, 0, "{to:?} {arguments:?}: {said}");
        }
    }
}

/// The port that the daemon listens on.
pub fn tcp(daemon: &Daemon<'_>, volume: &str) -> String {
    let uri = daemon.attach(volume).tcp;
    let (_, address) = uri.split_once("://127.0.0.1:").unwrap();
    address.split('/').next().unwrap().to_owned()
}

fn volume(daemon: &Daemon<'_>, name: &str) {
    daemon.cli(&format!("volume create {name} --size {VOLUME}")).ok();
    daemon.attach(name);
}

#[test]
fn throughput_with_and_without_writes_and_flushes_passes() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    let daemon = place.start();
    volume(&daemon, "disk");
    for arguments in [&[][..], &["-w"], &["-w", "-f"]] {
        tester.passes(&daemon, "disk", arguments);
    }
}

#[test]
fn the_handshake_and_oversized_requests_pass() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    let daemon = place.start();
    volume(&daemon, "disk");
    tester.passes(&daemon, "disk", &["-h"]);
    tester.passes(&daemon, "disk", &["-o"]);
}

/// Replays a log on new volumes, over both transports.
#[track_caller]
fn replay(tester: &Tester, daemon: &Daemon<'_>, log: &Path, verdict: impl Fn(i32, &str)) {
    let socket = daemon.place.path("nbd.sock");
    for over_tcp in [true, false] {
        // It takes what it has not written for zeros.
        let name = format!("{}-{over_tcp}", log.file_stem().unwrap().to_str().unwrap());
        volume(daemon, &name);
        let address = tcp(daemon, &name);
        let to = if over_tcp { ["127.0.0.1", &address] } else { ["-u", text(&socket)] };
        let (code, said) = tester.run(&to, &["-N", &name, "-i", "-t", text(log)]);
        verdict(code, &said);
    }
}

#[test]
fn the_transaction_log_replays_without_a_wrong_byte() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    let daemon = place.start();
    replay(&tester, &daemon, &tester.beside("integrity-test.tr"), |code, said| assert_eq!(code, 0, "{said}"));
}

/// Its requests go up to 50 MB, and the tester asks for no block size: no client may rely on more than 32 MiB then.
#[test]
fn the_log_of_huge_requests_replays_up_to_the_largest_payload_and_is_refused_beyond() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    let daemon = place.start();
    let (huge, cut) = (tester.beside("integrityhuge-test.tr"), place.path("cut.tr"));
    std::fs::write(&cut, cut_requests(std::fs::read(&huge).unwrap())).unwrap();
    replay(&tester, &daemon, &cut, |code, said| assert_eq!(code, 0, "{said}"));
    replay(&tester, &daemon, &huge, |code, said| {
        assert!(code == 1 && said.contains("Server errored a transaction"), "{code} {said}");
    });
}

/// A log is requests and replies as they were on the wire, without payload.
fn cut_requests(mut log: Vec<u8>) -> Vec<u8> {
    const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
    let mut at = 0;
    while at < log.len() {
        if log[at..at + 4] == 0x6744_6698u32.to_be_bytes() {
            at += 16;
            continue;
        }
        assert_eq!(log[at..at + 4], 0x2560_9513u32.to_be_bytes());
        let length = &mut log[at + 24..at + 28];
        let cut = u32::from_be_bytes((&*length).try_into().unwrap()).min(PAYLOAD_BYTES_MAX);
        length.copy_from_slice(&cut.to_be_bytes());
        at += 28;
    }
    log
}

#[test]
fn writes_to_an_image_are_refused_and_reads_pass() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    let daemon = place.start();
    volume(&daemon, "disk");
    let raw = place.path("raw");
    std::fs::write(&raw, crate::clients::noise(1, 4 << 20)).unwrap();
    daemon.cli(&format!("image import fixed {}", text(&raw))).ok();
    let port = tcp(&daemon, "disk");
    for (arguments, name) in [(&["-w", "-F"][..], "image:fixed"), (&[], "image:fixed")] {
        let (code, said) = tester.run(&["127.0.0.1", &port], &[&["-N", name][..], arguments].concat());
        assert_eq!(code, 0, "{arguments:?}: {said}");
    }
}

#[test]
fn a_disk_that_is_not_there_is_refused() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    let daemon = place.start();
    volume(&daemon, "disk");
    let (code, said) = tester.run(&["127.0.0.1", &tcp(&daemon, "disk")], &["-N", "nothing"]);
    assert_ne!(code, 0, "{said}");
    tester.passes(&daemon, "disk", &[]);
}

#[test]
fn nbd_client_lists_what_is_served() {
    let place = Place::new();
    let daemon = place.start();
    volume(&daemon, "disk-a");
    volume(&daemon, "disk-b");
    let program = Path::new("/usr/sbin/nbd-client");
    if !program.exists() {
        println!("skipped: nbd-client is not installed");
        return;
    }
    let port = tcp(&daemon, "disk-a");
    let (code, said) = finish(Command::new(program).args(["-l", "127.0.0.1", &port]).stdin(Stdio::null()));
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("disk-a") && said.contains("disk-b"), "{said}");
}
