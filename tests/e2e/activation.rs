//! Sockets that a service manager passes to the daemon.

use crate::daemon::{Daemon, Place};
use crate::tools::{MIB, have, run};
use std::fs::File;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Command, Stdio};

/// Starts a daemon with these as its descriptors 3 and 4, said to be meant for `pid`.
fn spawn<'a>(place: &'a Place, first: OwnedFd, second: Option<OwnedFd>, pid: &str) -> Daemon<'a> {
    std::fs::write(place.path("blockhouse.toml"), place.settings()).unwrap();
    let count = 1 + usize::from(second.is_some());
    // The process keeps its number when it becomes the daemon.
    let script =
        format!("LISTEN_PID={pid} LISTEN_FDS={count} exec \"$0\" \"$@\" 3<&0 4<&1 </dev/null >/dev/null");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_blockhouse"), "serve", "--config"]);
    command.arg(place.path("blockhouse.toml")).stdin(Stdio::from(first));
    command.stdout(second.map_or_else(Stdio::null, Stdio::from));
    place.spawn_command(&mut command)
}

#[test]
fn passed_sockets_are_served_instead_of_those_in_the_settings_and_stay() {
    if !have("nbdinfo") {
        return;
    }
    let place = Place::new();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let path = place.path("passed.sock");
    let unix = UnixListener::bind(&path).unwrap();
    // Who comes before the daemon waits for it.
    let early = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut daemon =
        spawn(&place, tcp.try_clone().unwrap().into(), Some(unix.try_clone().unwrap().into()), "$$");
    daemon.wait_ready();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut &early, &mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    drop(early);
    daemon.cli("volume create vm --size 16M").ok();
    let uris = daemon.attach("vm");
    assert_eq!(uris.tcp, format!("nbd://127.0.0.1:{port}/vm"));
    assert!(uris.unix.ends_with(&format!("socket={}", path.display())), "{}", uris.unix);
    for uri in [&uris.tcp, &uris.unix] {
        assert_eq!(run("nbdinfo", &["--size", uri]).trim(), (16 * MIB).to_string());
    }
    assert!(!place.path("nbd.sock").exists(), "the socket of the settings is not made");
    daemon.stop();
    assert!(path.exists(), "it is not ours to remove");

    // One of them: the other kind comes from the settings.
    let mut daemon = spawn(&place, tcp.into(), None, "$$");
    daemon.wait_ready();
    let uris = daemon.attach("vm");
    assert_eq!(uris.tcp, format!("nbd://127.0.0.1:{port}/vm"));
    assert_eq!(run("nbdinfo", &["--size", &uris.unix]).trim(), (16 * MIB).to_string());
    assert!(place.path("nbd.sock").exists());
    daemon.stop();
}

#[test]
fn passed_descriptors_of_the_wrong_kind_are_refused_by_their_number() {
    let place = Place::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let wrong: [(OwnedFd, &str); 4] = [
        (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "neither a TCP nor a Unix stream socket"),
        (UnixDatagram::unbound().unwrap().into(), "neither a TCP nor a Unix stream socket"),
        (File::open("/dev/null").unwrap().into(), "neither a TCP nor a Unix stream socket"),
        (connection.into(), "not a socket that listens"),
    ];
    for (descriptor, says) in wrong {
        let (_, said) = spawn(&place, listener.try_clone().unwrap().into(), Some(descriptor), "$$").refused();
        assert!(said.contains("descriptor 4") && said.contains(says), "{said}");
    }
}

#[test]
fn descriptors_that_are_meant_for_another_process_are_left_alone() {
    let place = Place::new();
    let mut daemon = spawn(&place, File::open("/dev/null").unwrap().into(), None, "1");
    daemon.wait_ready();
    assert!(place.path("nbd.sock").exists());
    daemon.stop();
}
