//! QEMU: qemu-img, qemu-io, and qemu-storage-daemon as a client that serves the volume on.

use crate::clients::{Clients, noise, text};
use crate::daemon::{Daemon, Place, wait_until};

const MIB: usize = 1 << 20;

fn volume(daemon: &Daemon<'_>, name: &str, size: &str) -> [String; 2] {
    daemon.cli(&format!("volume create {name} --size {size}")).ok();
    let uris = daemon.attach(name);
    [uris.tcp, uris.unix]
}

fn image(place: &Place) -> (std::path::PathBuf, Vec<u8>) {
    let mut content = vec![0; 32 * MIB];
    for (index, chunk) in content.chunks_mut(333_333).enumerate() {
        if index % 4 == 1 {
            chunk.copy_from_slice(&noise(u64::try_from(index).unwrap(), chunk.len()));
        }
    }
    let path = place.path("source.raw");
    std::fs::write(&path, &content).unwrap();
    (path, content)
}

#[test]
fn qemu_img_converts_compares_maps_and_measures() {
    let place = Place::new();
    let daemon = place.start();
    let (source, content) = image(&place);
    let (source, back, qcow2) = (text(&source).to_owned(), place.path("back"), place.path("disk.qcow2"));
    for (number, clients) in Clients::all().iter().enumerate() {
        for (way, uri) in volume(&daemon, &format!("disk-{number}"), "32M").iter().enumerate() {
            let img = |arguments: &[&str]| clients.run("qemu-img", arguments);
            let ways: [&[&str]; 4] = [&[], &["-W", "-m", "16"], &["--target-is-zero"], &["-S", "0"]];
            // A target that is zero has to be.
            clients.run("qemu-io", &["-f", "raw", "-c", "write -z -u 0 32M", uri]);
            for arguments in [ways[way], ways[way + 2]] {
                img(&[&["convert", "-n", "-f", "raw", "-O", "raw"][..], arguments, &[&source, uri]].concat());
                img(&["compare", "-f", "raw", "-F", "raw", &source, uri]);
            }
            img(&["convert", "-f", "raw", "-O", "qcow2", "-c", uri, text(&qcow2)]);
            img(&["compare", "-f", "qcow2", "-F", "raw", text(&qcow2), uri]);
            img(&["convert", "-m", "16", "-W", "-f", "raw", "-O", "raw", uri, text(&back)]);
            assert!(std::fs::read(&back).unwrap() == content, "{clients:?} {uri}");
            let map: serde_json::Value =
                serde_json::from_str(&img(&["map", "--output=json", "-f", "raw", uri])).unwrap();
            let extents = map.as_array().unwrap();
            assert!(extents.iter().any(|extent| extent["data"] == true), "{map}");
            let total: u64 = extents.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
            assert_eq!(total, u64::try_from(content.len()).unwrap());
            let info: serde_json::Value =
                serde_json::from_str(&img(&["info", "--output=json", "-f", "raw", uri])).unwrap();
            assert_eq!(info["virtual-size"].as_u64(), Some(total));
            for arguments in [
                &["-c", "2000", "-d", "32", "-s", "4k"][..],
                &["-c", "500", "-d", "8", "-s", "128k", "-w", "--flush-interval", "100"],
            ] {
                img(&[&["bench", "-f", "raw"], arguments, &[uri]].concat());
            }
        }
    }
}

#[test]
fn qemu_io_does_every_command() {
    let place = Place::new();
    let daemon = place.start();
    for (number, clients) in Clients::all().iter().enumerate() {
        for uri in volume(&daemon, &format!("disk-{number}"), "64M") {
            let commands = [
                "write -P 0x5a 0 1M",
                "write -P 0x33 4097 5001",
                "read -P 0x5a 0 4097",
                "read -P 0x33 4097 5001",
                "writev -P 7 1M 512 1k 4k",
                "readv -P 7 1M 512 1k 4k",
                "aio_write -P 8 2M 1M",
                "aio_write -P 9 3M 1M",
                "aio_write -z -u 4M 1M",
                "aio_flush",
                "read -P 8 2M 1M",
                "read -P 9 3M 1M",
                "write -f -P 1 63M 1M",
                "write -z -f 62M 64k",
                "write -z -u 8192 1000",
                "read -P 0 8192 1000",
                "discard 256k 256k",
                "read -P 0 256k 256k",
                "map",
                "flush",
                "write -P 9 16M 32M",
                "read -P 9 16M 32M",
            ];
            let mut arguments = vec!["-f", "raw", "-t", "none"];
            commands.iter().for_each(|command| arguments.extend(["-c", command]));
            arguments.push(&uri);
            let said = clients.run("qemu-io", &arguments);
            let bad = ["failed", "error", "mismatch", "Invalid"];
            assert!(!bad.iter().any(|word| said.contains(word)), "{clients:?}: {said}");
            // And beyond the end there is nothing.
            let (_, said) = clients.try_run("qemu-io", &["-f", "raw", "-c", "write 64M 512", &uri]);
            assert!(said.contains("error") || said.contains("failed"), "{said}");
        }
    }
}

#[test]
fn a_volume_served_on_by_qemu_storage_daemon_is_the_same_disk() {
    let place = Place::new();
    let daemon = place.start();
    let (source, content) = image(&place);
    let back = place.path("back");
    for (number, clients) in Clients::all().iter().enumerate() {
        if matches!(clients, Clients::System)
            && !std::path::Path::new("/usr/bin/qemu-storage-daemon").exists()
        {
            println!("skipped: qemu-storage-daemon is not installed");
            continue;
        }
        let name = format!("disk-{number}");
        let [_, direct] = volume(&daemon, &name, "32M");
        let socket = place.path(&format!("again-{number}.sock"));
        let blockdev = format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={},export={name},reconnect-delay=10",
            text(&place.path("nbd.sock"))
        );
        let server = format!("addr.type=unix,addr.path={}", text(&socket));
        let export = "type=nbd,id=again,node-name=disk,name=again,writable=on";
        let mut running = clients.start(
            "qemu-storage-daemon",
            &["--blockdev", &blockdev, "--nbd-server", &server, "--export", export],
        );
        wait_until("the socket of qemu-storage-daemon", || {
            assert!(running.0.try_wait().unwrap().is_none(), "qemu-storage-daemon ended");
            socket.exists()
        });
        let again = format!("nbd+unix:///again?socket={}", text(&socket));
        clients.run("nbdcopy", &["--connections=1", "--flush", text(&source), &again]);
        clients.run("nbdcopy", &[&direct, text(&back)]);
        assert!(std::fs::read(&back).unwrap() == content, "{clients:?}");
        clients.run(
            "qemu-io",
            &["-f", "raw", "-c", "discard 0 4M", "-c", "write -P 3 5M 1M", "-c", "flush", &again],
        );
        clients.run("qemu-io", &["-f", "raw", "-c", "read -P 3 5M 1M", &direct]);
        clients.run("nbdinfo", &["--map", &again]);
        clients.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &again, &direct]);
    }
}
