//! What people do with it, from a file system to a volume on another node.

use crate::daemon::{Daemon, Place};
use crate::tools::{MIB, hash, have, http_server, noise, patch, run, run_into, text, tree, try_run};
use std::path::Path;
use std::time::{Duration, Instant};

const FORKS: usize = 100;

fn fsck(file: &Path) {
    run("e2fsck", &["-fn", text(file)]);
}

#[test]
fn a_file_system_goes_through_images_forks_snapshots_and_another_node() {
    let tools = [
        "mke2fs", "e2fsck", "debugfs", "nbdcopy", "nbdinfo", "nbdsh", "qemu-img", "qemu-io", "gzip", "xz",
        "zstd", "fio",
    ];
    if !tools.iter().all(|program| have(program)) {
        return;
    }
    let place = Place::new();
    let raw = place.path("root.raw");
    let (files, bytes) = tree(&place.path("tree"), 2500, 110 * MIB);
    println!("{files} files, {} MiB", bytes / MIB);
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(&place.path("tree")), text(&raw), "320M"]);
    std::fs::remove_dir_all(place.path("tree")).unwrap();
    let base = hash(&raw);

    let mut daemon = place.start();
    import_in_all_forms(&daemon, &raw);
    fork_many(&daemon);

    // The same content over both transports, and clean.
    let copy = place.path("copy.raw");
    for (fork, over_tcp) in [("fork-0", true), ("fork-1", false)] {
        let uris = daemon.attach(fork);
        let uri = if over_tcp { &uris.tcp } else { &uris.unix };
        assert!(run("nbdinfo", &["--size", uri]).trim() == (320 * MIB).to_string());
        run("nbdcopy", &[uri, text(&copy)]);
        assert_eq!(hash(&copy), base, "{fork}");
        fsck(&copy);
    }
    let (same, said) = try_run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", text(&raw), &daemon.attach("fork-0").unix],
    );
    assert!(same, "{said}");

    let changed = write_with_all_clients(&daemon, &raw);
    snapshots_and_forks_of_local_writes(&daemon, base, &changed);
    resize(&daemon, &changed);
    roll_back_delete_undelete(&daemon, base, &changed);

    // Stop and start: what is attached is served again, with the same content.
    let log = daemon.stop();
    assert!(!log.contains("ERROR"), "{log}");
    daemon = place.start();
    let uri = daemon.attach("fork-2").unix;
    run("nbdcopy", &[&uri, text(&copy)]);
    assert_eq!(hash(&copy), hash(&changed));
    daemon.stop();

    on_an_empty_node(&place, base, &changed);
}

fn import_in_all_forms(daemon: &Daemon<'_>, raw: &Path) {
    let place = daemon.place;
    let base = hash(raw);
    let named = |end: &str| place.path(&format!("root.{end}"));
    run("qemu-img", &["convert", "-O", "qcow2", "-c", text(raw), text(&named("qcow2"))]);
    run_into("gzip", &["-1", "-c", text(raw)], &named("raw.gz"));
    run_into("xz", &["-0", "-T2", "-c", text(raw)], &named("raw.xz"));
    run_into("zstd", &["-q", "-1", "-c", text(raw)], &named("raw.zst"));
    daemon.cli(&format!("image import base {} --description real", text(raw))).ok();
    for end in ["qcow2", "raw.gz", "raw.xz", "raw.zst"] {
        daemon.cli(&format!("image import {end} {}", text(&named(end)))).ok();
    }
    daemon.with_input("image import piped -", raw).ok();
    daemon.with_input("image import piped.xz -", &named("raw.xz")).ok();
    let url = http_server(&named("qcow2"));
    daemon.cli(&format!("image import url {url}")).ok();
    for image in ["base", "qcow2", "raw.gz", "raw.xz", "raw.zst", "piped", "piped.xz", "url"] {
        let info = daemon.json(&format!("image show {image}"));
        assert_eq!(info["size_bytes"], 320 * MIB, "{info}");
        assert_eq!(info["state"], "ready", "{info}");
        assert!(!info["source"].as_str().unwrap().contains("secret"), "{info}");
        assert_eq!(daemon.export_hash(image), base, "{image}");
    }
    for end in ["qcow2", "raw.gz", "raw.xz", "raw.zst"] {
        std::fs::remove_file(named(end)).unwrap();
    }
    // To a file: sparse, and nothing is overwritten unasked.
    let out = place.path("export.raw");
    daemon.cli(&format!("image export base {}", text(&out))).ok();
    assert_eq!(hash(&out), base);
    daemon.cli(&format!("image export base {}", text(&out))).refused(4, "there already");
    std::fs::remove_file(out).unwrap();
    for image in ["raw.gz", "raw.xz", "raw.zst", "piped", "piped.xz", "url"] {
        daemon.cli(&format!("image delete {image} --yes")).ok();
    }
}

fn fork_many(daemon: &Daemon<'_>) {
    let pool_bytes = || daemon.json("df")["pool_bytes"].as_u64().unwrap();
    let before = pool_bytes();
    let mut took: Vec<Duration> = (0..FORKS)
        .map(|number| {
            let started = Instant::now();
            daemon.cli(&format!("volume create fork-{number} --from image:base")).ok();
            started.elapsed()
        })
        .collect();
    println!("forks, in ms: {:?}", took.iter().map(Duration::as_millis).collect::<Vec<_>>());
    took.sort();
    println!("fork: median {:?}, longest {:?}", took[FORKS / 2], took[FORKS - 1]);
    let each = (pool_bytes() - before) / u64::try_from(FORKS).unwrap();
    assert!(each < 16 << 10, "a fork takes {each} bytes of the pool");
    // The same request again finds what it made; another one does not.
    daemon.cli("volume create fork-0 --from image:base").ok();
    daemon.cli("volume create fork-0").refused(4, "fork-0");
    daemon.cli("volume create fork-0 --size 1G").refused(4, "fork-0");
}

/// Writes with every client, each to a fork of its own, and gives the file that `fork-2` is then equal to.
fn write_with_all_clients(daemon: &Daemon<'_>, raw: &Path) -> std::path::PathBuf {
    let place = daemon.place;
    let copy = place.path("copy.raw");
    let content_of = |fork: &str| {
        run("nbdcopy", &[&daemon.attach(fork).unix, text(&copy)]);
        hash(&copy)
    };

    // A file system that was changed, put there as a whole.
    let changed = place.path("changed.raw");
    std::fs::copy(raw, &changed).unwrap();
    let file = place.path("file");
    std::fs::write(&file, noise(1, 5 * MIB)).unwrap();
    run("debugfs", &["-w", "-R", &format!("write {} new-file", text(&file)), text(&changed)]);
    run("nbdcopy", &["--flush", text(&changed), &daemon.attach("fork-2").tcp]);
    assert_eq!(content_of("fork-2"), hash(&changed));
    fsck(&copy);

    let model = place.path("model.raw");
    let uri = daemon.attach("fork-3").unix;
    let qemu_io = [
        "write -P 0xab 1M 3M",
        "write -P 0x17 5000k 512",
        "write -z 64M 1M",
        "discard 128M 1M",
        "flush",
        "read -P 0xab 1M 3M",
        "read -P 0x17 5000k 512",
        "read -P 0 64M 1M",
        "read -P 0 128M 1M",
    ];
    let mut words = vec!["-f", "raw"];
    words.extend(qemu_io.iter().flat_map(|command| ["-c", command]));
    words.push(&uri);
    let said = run("qemu-io", &words);
    assert!(!said.contains("failed"), "{said}");
    std::fs::copy(raw, &model).unwrap();
    patch(&model, MIB, &vec![0xab; 3 << 20]);
    patch(&model, 5000 << 10, &[0x17; 512]);
    patch(&model, 64 * MIB, &vec![0; 1 << 20]);
    patch(&model, 128 * MIB, &vec![0; 1 << 20]);
    assert_eq!(content_of("fork-3"), hash(&model));

    let uri = daemon.attach("fork-4").tcp;
    let script = "
h.pwrite(b'x' * 1536, 4096 + 512)
h.pwrite(b'y' * 131072, 10 * 131072 - 4096, nbd.CMD_FLAG_FUA)
h.zero(131072, 20 * 131072)
h.trim(262144, 300 * 131072)
h.flush()
assert h.pread(1536, 4608) == b'x' * 1536
assert h.pread(262144, 300 * 131072) == bytes(262144)
";
    run("nbdsh", &["-u", &uri, "-c", script]);
    std::fs::copy(raw, &model).unwrap();
    patch(&model, 4608, &[b'x'; 1536]);
    patch(&model, (10 << 17) - 4096, &vec![b'y'; 1 << 17]);
    patch(&model, 20 << 17, &vec![0; 1 << 17]);
    patch(&model, 300 << 17, &vec![0; 1 << 18]);
    assert_eq!(content_of("fork-4"), hash(&model));

    let uri = daemon.attach("fork-5").unix;
    if try_run("fio", &["--enghelp=nbd"]).0 {
        let job = [
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--size=48M",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ];
        run("fio", &job);
    } else {
        crate::tools::skip("fio has no nbd engine");
    }
    // What nobody wrote to is as it was.
    assert_eq!(content_of("fork-6"), hash(raw));
    changed
}

fn snapshots_and_forks_of_local_writes(daemon: &Daemon<'_>, base: blake3::Hash, changed: &Path) {
    // G12: nothing of fork-2 is in the pool yet.
    assert!(daemon.json("volume show fork-2")["dirty_bytes"].as_u64().unwrap() > 0);
    daemon.cli("volume create clone --from volume:fork-2").ok();
    assert!(daemon.cli("snapshot create fork-2 --description x").ok().contains("fork-2@1"));
    let mut client = daemon.client("fork-2");
    client.write(200 * MIB, &[9; 4096]).unwrap();
    assert_eq!(daemon.export_hash("fork-2@1"), hash(changed));
    daemon.cli("volume create of-snapshot --from snapshot:fork-2@1").ok();
    daemon.cli("volume create of-volume --from volume:fork-2").ok();
    patch(changed, 200 * MIB, &[9; 4096]);
    let copy = daemon.place.path("copy.raw");
    for (name, is_newer) in [("clone", false), ("of-snapshot", false), ("of-volume", true), ("fork-2", true)]
    {
        run("nbdcopy", &[&daemon.attach(name).unix, text(&copy)]);
        assert_eq!(hash(&copy) == hash(changed), is_newer, "{name}");
        assert_ne!(hash(&copy), base);
        if name != "fork-2" {
            daemon.cli(&format!("volume detach {name}")).ok();
        }
    }
    let durable = daemon.json("volume wait-durable fork-2");
    assert_eq!(durable["dirty_bytes"], 0, "{durable}");
}

fn resize(daemon: &Daemon<'_>, changed: &Path) {
    let uri = daemon.attach("fork-2").unix;
    let size = || run("nbdinfo", &["--size", &uri]).trim().parse::<u64>().unwrap();
    daemon.cli("volume resize fork-2 1G").ok();
    assert_eq!(size(), 1024 * MIB);
    daemon.client("fork-2").write(1023 * MIB, &[3; 512]).unwrap();
    daemon.cli("volume resize fork-2 320M").refused(2, "--force");
    assert_eq!(daemon.client("fork-2").read(1023 * MIB, 512).unwrap(), [3; 512]);
    daemon.cli("volume resize fork-2 320M --force").ok();
    assert_eq!(size(), 320 * MIB);
    let copy = daemon.place.path("copy.raw");
    run("nbdcopy", &[&uri, text(&copy)]);
    assert_eq!(hash(&copy), hash(changed));
    // L16: what was cut off does not come back.
    daemon.cli("volume resize fork-2 1G").ok();
    assert_eq!(daemon.client("fork-2").read(1023 * MIB, 1 << 20).unwrap(), vec![0; 1 << 20]);
    daemon.cli("volume resize fork-2 320M --force").ok();
    daemon.cli("volume detach fork-2").ok();
    daemon.cli("volume resize fork-2 400M").ok();
    daemon.cli("volume resize fork-2 320M").refused(2, "--force");
    daemon.cli("volume resize fork-2 320M --force").ok();
    daemon.attach("fork-2");
}

fn roll_back_delete_undelete(daemon: &Daemon<'_>, base: blake3::Hash, changed: &Path) {
    let copy = daemon.place.path("copy.raw");
    let content_of = |name: &str| {
        run("nbdcopy", &[&daemon.attach(name).unix, text(&copy)]);
        hash(&copy)
    };
    daemon.cli("volume rollback fork-2@1").refused(4, "attached");
    daemon.cli("volume delete fork-2 --yes").refused(4, "attached");
    daemon.cli("volume detach fork-2").ok();
    let kept = daemon.json("volume rollback fork-2@1");
    let kept = kept["name"].as_str().unwrap().to_owned();
    assert_ne!(content_of("fork-2"), hash(changed));
    assert_eq!(daemon.export_hash(&kept), hash(changed));
    daemon.cli("volume detach fork-2").ok();
    daemon.cli(&format!("volume rollback {kept}")).ok();
    assert_eq!(content_of("fork-2"), hash(changed));

    daemon.cli("volume delete fork-99").refused(2, "confirmed");
    daemon.cli("volume delete fork-99 --yes").ok();
    daemon.cli("volume show fork-99").refused(3, "fork-99");
    daemon.cli("volume create fork-99 --size 1M").ok();
    daemon.cli("volume undelete fork-99 --as back").ok();
    assert_eq!(content_of("back"), base);
    daemon.cli("volume delete clone --yes").ok();
    daemon.cli("volume undelete clone").ok();
    daemon.cli("image delete base --yes").ok();
    // Forks do not need their image.
    assert_eq!(content_of("fork-50"), base);
    daemon.cli("volume undelete base").ok();
    assert_eq!(daemon.export_hash("base"), base);
    daemon.cli("doctor").ok();
}

fn on_an_empty_node(place: &Place, base: blake3::Hash, changed: &Path) {
    let other = place.other_node();
    let daemon = other.start();
    let names: Vec<String> = daemon
        .json("volume list")
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| volume["name"].as_str().unwrap().to_owned())
        .collect();
    for name in ["back", "clone", "of-snapshot", "of-volume"] {
        assert!(names.iter().any(|found| found == name), "{name} is not in {names:?}");
    }
    assert_eq!(names.iter().filter(|name| name.starts_with("fork-")).count(), FORKS);
    assert_eq!(daemon.export_hash("base"), base);

    // Attached there, and nobody gave it up.
    daemon.cli("volume attach fork-2").refused(4, "fork-2");
    daemon.cli("volume delete fork-2 --yes").refused(4, "attached on node");
    daemon.cli("volume create taken --from volume:fork-2").refused(4, "--last-commit");
    daemon.cli("volume create taken --from volume:fork-2 --last-commit").ok();
    let copy = other.path("copy.raw");
    let expected = [("taken", hash(changed)), ("fork-60", base), ("of-volume", hash(changed))];
    for (name, content) in expected {
        let uri = daemon.attach(name).unix;
        run("nbdcopy", &[&uri, text(&copy)]);
        assert_eq!(hash(&copy), content, "{name}");
        if content == base {
            fsck(&copy);
        }
    }
    daemon.stop();
}
