//! What a client has to ask for: extended headers, TLS, and block status since a snapshot.

use crate::clients::{Clients, text};
use crate::daemon::{Daemon, Place};
use crate::tester::Tester;
use std::path::Path;

fn script(daemon: &Daemon<'_>, clients: &Clients, function: &str, name: &str, more: &[&str]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance/libnbd.py");
    let socket = daemon.place.path("nbd.sock");
    clients.run("python3", &[&[text(&path), function, text(&socket), name], more].concat());
}

#[test]
fn extended_headers_carry_requests_and_status_beyond_32_bits() {
    let Some(clients) = Clients::newer() else { return };
    let place = Place::new();
    let daemon = place.start();
    daemon.cli("volume create disk-0 --size 1T").ok();
    let uri = daemon.attach("disk-0").unix;
    script(&daemon, &clients, "extended", "disk-0", &[]);
    let said = clients.run("nbdinfo", &[&uri]);
    assert!(said.contains("extended packets"), "{said}");
    clients.run("nbdinfo", &["--can", "extended-headers", &uri]);
    clients.run("nbdinfo", &["--map", "--totals", &uri]);
    // QEMU asks for them too.
    clients.run("qemu-io", &["-f", "raw", "-c", "write -z -u -n 0 5G", "-c", "read -P 0 4G 1M", &uri]);
    clients.run("qemu-img", &["map", "-f", "raw", &uri]);
}

#[test]
fn block_status_tells_what_changed_since_a_snapshot() {
    for clients in Clients::all() {
        let place = Place::new();
        let daemon = place.start();
        daemon.cli("volume create disk-0 --size 64M").ok();
        let uri = daemon.attach("disk-0").unix;
        let io = |commands: &[&str]| {
            let words = commands.iter().flat_map(|command| ["-c", command]);
            clients.run("qemu-io", &words.chain(["-f", "raw", &uri]).collect::<Vec<_>>());
        };
        io(&["write -P 1 0 64k", "write -P 1 3M 1M", "write -P 1 20M 1M", "flush"]);
        daemon.cli("snapshot create disk-0").ok();
        io(&["write -P 2 10M 64k", "discard 20M 1M", "flush"]);
        script(&daemon, &clients, "changed_since", "disk-0", &[]);
    }
}

#[test]
fn tls_serves_who_has_a_certificate_and_nobody_else() {
    let Some(tester) = Tester::get() else { return };
    let place = Place::new();
    // The certificates that come with the tester.
    let certificate = |name: &str| tester.beside("certs").join(name);
    let settings = place.settings().replace(
        "[nbd]\n",
        &format!(
            "[nbd]\ntls_certificate = {:?}\ntls_key = {:?}\ntls_client_ca = {:?}\ntls_required = true\n",
            certificate("server-cert.pem"),
            certificate("server-key.pem"),
            certificate("ca-cert.pem")
        ),
    );
    std::fs::write(place.path("blockhouse.toml"), settings).unwrap();
    let mut daemon = place.spawn_with(&[]);
    daemon.wait_ready();
    for name in ["disk-0", "disk-1"] {
        daemon.cli(&format!("volume create {name} --size 64M")).ok();
    }
    let port = crate::tester::tcp(&daemon, "disk-0");
    let folder = tester.beside("certs");
    for (number, clients) in Clients::all().iter().enumerate() {
        let name = format!("disk-{number}");
        daemon.attach(&name);
        script(&daemon, clients, "tls", &name, &[&port, text(&folder)]);
    }
    daemon.cli("volume create integrity --size 50M").ok();
    daemon.attach("integrity");
    let files = |of: &str| (certificate(&format!("{of}-cert.pem")), certificate(&format!("{of}-key.pem")));
    let (ca, log) = (certificate("ca-cert.pem"), tester.beside("integrity-test.tr"));
    for (of, good) in [("client", true), ("selfsigned", false)] {
        let (chain, key) = files(of);
        let (code, said) = tester.run(
            &["localhost", &port],
            &[
                &["-N", "integrity", "-i", "-t", text(&log), "-C", text(&chain), "-K", text(&key)][..],
                &["-A", text(&ca), "-H", "localhost"],
            ]
            .concat(),
        );
        assert_eq!(code == 0, good, "{of}: {said}");
    }
    let (code, said) = tester.run(&["localhost", &port], &["-N", "integrity"]);
    assert_ne!(code, 0, "served without TLS: {said}");
}
