//! What is wrong, damaged or somebody else's: a clear error, the right exit code, and nothing lost.

use crate::daemon::{Daemon, Place, wait_until};
use crate::nbd::{Client, EIO};
use crate::tools::{MIB, hash, have, http_server, noise, patch, run, run_into, text};
use std::path::{Path, PathBuf};

#[test]
fn wrong_requests_are_refused_with_the_right_exit_code_and_leave_nothing() {
    let place = Place::new();
    let small = place.path("small.raw");
    std::fs::write(&small, noise(1, 2 * MIB)).unwrap();
    let daemon = place.start();
    daemon.cli(&format!("image import small {}", text(&small))).ok();
    daemon.cli("volume create vm --from image:small").ok();

    let long = "x".repeat(129);
    for name in ["../vm", ".hidden", "_x", "a/b", "a b", "ä", "", "a~", &long] {
        daemon.words(&["volume", "create", name, "--size", "1M"]).refused(2, "name");
        daemon.words(&["image", "import", name, text(&small)]).refused(2, "name");
        daemon.words(&["volume", "undelete", "vm", "--as", name]).refused(2, "name");
    }
    for size in ["0", "1000", "65T", "1025"] {
        daemon.cli(&format!("volume create sized --size {size}")).refused(2, "");
        daemon.cli(&format!("volume resize vm {size} --force")).refused(2, "");
    }
    for size in ["-1M", "18446744073709551616", "1X", "nan"] {
        assert_eq!(daemon.cli(&format!("volume create sized --size={size}")).code, 2, "{size}");
    }
    daemon.cli("volume create sized").refused(2, "size");
    daemon.cli("volume create sized --from image:small --size 1M").refused(2, "does not fit");
    for line in [
        "volume create new --from image:none",
        "volume create new --from volume:none",
        "volume create new --from snapshot:vm@7",
        "volume create new --from snapshot:none@1",
        "volume show none",
        "volume attach none",
        "volume detach none",
        "volume resize none 1G",
        "volume rollback vm@7",
        "volume rollback none@1",
        "volume delete none --yes",
        "volume undelete none",
        "volume recover none new",
        "volume wait-durable none",
        "snapshot create none",
        "snapshot list none",
        "snapshot delete vm@7 --yes",
        "image show none",
        "image export none -",
        "image delete none --yes",
        "resolve none",
        "image import new /does/not/exist",
    ] {
        let ran = daemon.cli(line);
        assert_eq!(ran.code, 3, "{line}: {}{}", ran.text(), ran.err);
        ran.refused(3, "");
    }
    daemon.cli(&format!("image import small {}", text(&small))).refused(4, "small");
    daemon.cli("image import new /").refused(2, "directory");
    daemon.cli("image export vm -").refused(2, "snapshot");
    daemon.cli("volume wait-durable vm").refused(4, "not attached");
    assert_eq!(daemon.json("volume list").as_array().unwrap().len(), 1);
    assert_eq!(daemon.json("image list").as_array().unwrap().len(), 1);
    assert_eq!(daemon.json("trash").as_array().unwrap().len(), 0);
    let socket = place.socket();
    daemon.stop();
    let alone = std::process::Command::new(env!("CARGO_BIN_EXE_blockhouse"))
        .args(["--socket", text(&socket), "volume", "list"])
        .output()
        .unwrap();
    assert_eq!(alone.status.code(), Some(6), "{}", String::from_utf8_lossy(&alone.stderr));
}

#[test]
fn g20_a_bad_image_is_refused_its_name_is_free_and_the_retry_works() {
    if !["qemu-img", "gzip", "xz", "zstd"].into_iter().all(have) {
        return;
    }
    let place = Place::new();
    let file = |name: &str| place.path(name);
    std::fs::write(file("good"), noise(2, 3 * MIB)).unwrap();
    let good = file("good");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&good), text(&file("backing"))]);
    run("qemu-img", &["convert", "-O", "qcow2", text(&good), text(&file("qcow2"))]);
    run_into("gzip", &["-c", text(&good)], &file("gz"));
    run_into("xz", &["-c", text(&good)], &file("xz"));
    run_into("zstd", &["-q", "-c", text(&good)], &file("zst"));
    for end in ["qcow2", "gz", "xz", "zst"] {
        let bytes = std::fs::read(file(end)).unwrap();
        std::fs::write(file(&format!("cut.{end}")), &bytes[..bytes.len() * 2 / 3]).unwrap();
    }
    for end in ["gz", "xz", "zst"] {
        std::fs::copy(file(end), file(&format!("flipped.{end}"))).unwrap();
        patch(&file(&format!("flipped.{end}")), 1 << 20, &[0x5a; 64]);
    }
    std::fs::write(file("encrypted"), luks_qcow2(&std::fs::read(file("qcow2")).unwrap())).unwrap();
    let daemon = place.start();
    let files = [
        "backing",
        "cut.qcow2",
        "cut.gz",
        "cut.xz",
        "cut.zst",
        "flipped.gz",
        "flipped.xz",
        "flipped.zst",
        "encrypted",
    ];
    for name in files {
        let ran = daemon.cli(&format!("image import disk {}", text(&file(name))));
        assert_eq!(ran.code, 2, "{name}: {}{}", ran.text(), ran.err);
        println!("{name}: {}", ran.err.trim_end());
        let url = http_server(&file(name));
        let ran = daemon.cli(&format!("image import disk {url}"));
        assert!(ran.code != 0 && ran.err.contains("failed to import"), "{name}: {}{}", ran.text(), ran.err);
        daemon.cli("image show disk").refused(3, "disk");
    }
    let ran = daemon.cli("image import disk http://127.0.0.1:1/x");
    assert!(ran.code != 0 && !ran.err.is_empty(), "{}", ran.err);
    for url in ["ftp://x/y", "file:///etc/passwd"] {
        assert_ne!(daemon.cli(&format!("image import disk {url}")).code, 0);
    }
    assert_eq!(daemon.json("image list").as_array().unwrap().len(), 0);
    daemon.cli(&format!("image import disk {}", text(&good))).ok();
    assert_eq!(daemon.export_hash("disk"), hash(&good));
    // Nothing is left of what was unpacked beside.
    let spool = std::fs::read_dir(place.state.join("spool")).map_or(0, Iterator::count);
    assert_eq!(spool, 0);
    daemon.stop();
}

/// The same qcow2 image, saying that it is encrypted with LUKS.
fn luks_qcow2(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[32..36].copy_from_slice(&2u32.to_be_bytes());
    bytes
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { all.extend(files(&path)) } else { all.push(path) }
    }
    all.sort();
    all
}

/// The only file of `folder` whose path holds `uid`.
fn object_of(folder: &Path, uid: &str) -> PathBuf {
    let mut found = files(folder);
    found.retain(|path| text(path).contains(uid));
    assert!(!found.is_empty(), "nothing of {uid} in {:?}", files(folder));
    found.remove(0)
}

fn flip(path: &Path, at: u64) {
    let byte = std::fs::read(path).unwrap()[usize::try_from(at).unwrap()];
    patch(path, at, &[!byte]);
}

fn read_all(mut client: Client) -> Result<Vec<u8>, Option<u32>> {
    let length = usize::try_from(client.size_bytes).unwrap();
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let step = (length - bytes.len()).min(1 << 20);
        let at = u64::try_from(bytes.len()).unwrap();
        bytes.extend(client.read(at, step).map_err(|failure| failure.code())?);
    }
    Ok(bytes)
}

type Damage = fn(&Path);

#[test]
fn damage_in_the_pool_is_an_io_error_that_names_the_object_and_harms_nobody_else() {
    let place = Place::new();
    let content = [noise(3, 4 * MIB), noise(4, 4 * MIB)];
    let daemon = place.start();
    for (name, content) in ["good", "bad"].into_iter().zip(&content) {
        std::fs::write(place.path("disk.raw"), content).unwrap();
        daemon.cli(&format!("image import {name} {}", text(&place.path("disk.raw")))).ok();
    }
    let uid = daemon.json("image show bad")["uid"].as_str().unwrap().to_owned();
    daemon.stop();
    let damages: [(&str, Damage); 7] = [
        ("packs", |path| flip(path, 1 << 20)),
        ("packs", |path| flip(path, std::fs::metadata(path).unwrap().len() - 5)),
        ("packs", |path| cut(path, 2, 3)),
        ("packs", |path| std::fs::remove_file(path).unwrap()),
        ("maps", |path| flip(path, std::fs::metadata(path).unwrap().len() / 2)),
        ("maps", |path| cut(path, 1, 2)),
        ("maps", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (number, (folder, damage)) in damages.into_iter().enumerate() {
        // Each time a node that has nothing cached.
        let node = place.other_node();
        let daemon = node.start();
        for name in ["good", "bad"] {
            daemon.cli(&format!("volume create {name}-{number} --from image:{name}")).ok();
        }
        let object = object_of(&place.pool.join(folder), &uid);
        let intact = std::fs::read(&object).unwrap();
        damage(&object);
        daemon.attach(&format!("good-{number}"));
        let key = format!("{folder}/{}", object.file_name().unwrap().to_str().unwrap());
        let attached = daemon.cli(&format!("volume attach bad-{number}"));
        if attached.code == 0 {
            let failed = read_all(daemon.client(&format!("bad-{number}")));
            assert_eq!(failed.unwrap_err(), Some(EIO), "{key}");
            daemon.wait_log(&key);
        } else {
            attached.refused(8, &key);
        }
        let out = node.path("out.raw");
        let export = daemon.cli(&format!("image export bad {}", text(&out)));
        assert!(export.code != 0 && !out.exists(), "{key}: {}", export.err);
        assert!(
            export.err.contains(&key) || daemon.log().contains("an export broke off"),
            "{key}: {}",
            export.err
        );
        assert_eq!(read_all(daemon.client(&format!("good-{number}"))).unwrap(), content[0], "{key}");
        // Whole again, all is as it was: the damage is remembered nowhere.
        std::fs::write(&object, intact).unwrap();
        daemon.attach(&format!("bad-{number}"));
        assert_eq!(read_all(daemon.client(&format!("bad-{number}"))).unwrap(), content[1], "{key}");
        daemon.stop();
    }
}

fn cut(path: &Path, keep: u64, of: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() * keep / of).unwrap();
}

/// The highest version of a swapped object.
fn version_of(place: &Place, key: &str) -> PathBuf {
    files(&place.pool.join(format!("{key}~"))).pop().unwrap()
}

#[test]
fn a_damaged_head_keeps_one_volume_from_being_served_and_loses_nothing() {
    let place = Place::new();
    let daemon = place.start();
    for name in ["good", "bad"] {
        daemon.cli(&format!("volume create {name} --size 8M")).ok();
        daemon.attach(name);
        daemon.client(name).write(MIB, &noise(5, MIB)).unwrap();
    }
    daemon.kill9();
    let head = version_of(&place, "volumes/bad");
    let intact = std::fs::read(&head).unwrap();
    for (at, bytes) in [(40, &b"no json"[..]), (60, &[0xff; 8][..])] {
        patch(&head, at, bytes);
        let daemon = place.start();
        assert_eq!(daemon.client("good").read(MIB, 1 << 20).unwrap(), noise(5, MIB));
        daemon.cli("volume show bad").refused(8, "bad");
        daemon.cli("volume attach bad").refused(8, "bad");
        assert!(Client::connect(&place.path("nbd.sock"), "bad").is_err());
        assert_eq!(daemon.json("volume list").as_array().unwrap().len(), 2);
        let doctor = daemon.cli("doctor");
        assert!(doctor.code != 0 && doctor.text().contains("bad"), "{}", doctor.text());
        daemon.kill9();
        std::fs::write(&head, &intact).unwrap();
    }
    let daemon = place.start();
    assert_eq!(daemon.client("bad").read(MIB, 1 << 20).unwrap(), noise(5, MIB));
    daemon.stop();
}

#[test]
fn a_damaged_epoch_file_is_named_and_kept() {
    let place = Place::new();
    let daemon = place.start();
    for name in ["good", "bad"] {
        daemon.cli(&format!("volume create {name} --size 8M")).ok();
        daemon.attach(name);
        let mut client = daemon.client(name);
        client.write(MIB, &noise(6, MIB)).unwrap();
        client.flush().unwrap();
    }
    let uid = daemon.json("volume show bad")["uid"].as_str().unwrap().to_owned();
    daemon.kill9();
    let epochs: Vec<PathBuf> =
        files(&place.state).into_iter().filter(|path| text(path).contains(&uid) && path.is_file()).collect();
    assert!(!epochs.is_empty());
    let intact: Vec<Vec<u8>> = epochs.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let damages: [Damage; 3] =
        [|path| patch(path, 0, b"garbage!"), |path| patch(path, 40, &[0xff; 8]), |path| cut(path, 1, 1000)];
    for damage in damages {
        epochs.iter().for_each(|path| damage(path));
        let daemon = place.start();
        assert_eq!(daemon.client("good").read(MIB, 1 << 20).unwrap(), noise(6, MIB));
        let shown = daemon.json("volume show bad");
        assert_eq!(shown["state"], "stopped", "{shown}");
        println!("{}", shown["stopped"]);
        let ran = daemon.cli("volume attach bad");
        assert!(ran.code != 0 && ran.err.contains("epoch"), "{}{}", ran.text(), ran.err);
        daemon.kill9();
        for (path, bytes) in epochs.iter().zip(&intact) {
            assert!(path.exists(), "{} is gone", path.display());
            std::fs::write(path, bytes).unwrap();
        }
    }
    let daemon = place.start();
    assert_eq!(daemon.client("bad").read(MIB, 1 << 20).unwrap(), noise(6, MIB));
    daemon.stop();
}

#[test]
fn a_state_directory_has_one_daemon_and_one_pool() {
    let place = Place::new();
    let daemon = place.start();
    daemon.cli("volume create vm --size 8M").ok();
    daemon.attach("vm");
    daemon.client("vm").write(0, &[5; 512]).unwrap();

    // The same settings, then the same state directory only.
    let (code, said) = place.refused();
    assert!(code == 1 && said.contains("control.sock"), "{code}: {said}");
    let mut second = place.other_node();
    second.state = place.state.clone();
    let (code, said) = second.refused();
    assert!(code == 1 && said.contains("uses the state directory"), "{code}: {said}");
    assert_eq!(daemon.client("vm").read(0, 512).unwrap(), [5; 512]);
    daemon.kill9();

    // Another pool, also an empty one.
    let mut astray = place.other_node();
    astray.pool = astray.path("pool");
    astray.start().stop();
    let wrong = Place { pool: astray.pool.clone(), ..swapped(&place) };
    let (code, said) = wrong.refused();
    assert!(code == 1 && said.contains("belongs to pool"), "{code}: {said}");
    let empty = place.path("empty");
    std::fs::create_dir(&empty).unwrap();
    let wrong = Place { pool: empty.clone(), ..swapped(&place) };
    let (code, said) = wrong.refused();
    assert!(code == 1 && said.contains("mounted"), "{code}: {said}");
    assert!(!files(&empty).iter().any(|path| path.ends_with("pool")), "{:?}", files(&empty));
    let wrong = Place { pool: place.path("none"), ..swapped(&place) };
    let (code, said) = wrong.refused();
    assert!(code == 1 && said.contains("none"), "{code}: {said}");

    let daemon = place.start();
    assert_eq!(daemon.client("vm").read(0, 512).unwrap(), [5; 512]);
    daemon.stop();
}

/// Another set of sockets on the state directory of `place`.
fn swapped(place: &Place) -> Place {
    let mut other = place.other_node();
    other.state = place.state.clone();
    other
}

#[test]
fn a_pool_from_the_future_is_left_alone() {
    let place = Place::new();
    let daemon = place.start();
    daemon.cli("volume create vm --size 8M").ok();
    daemon.attach("vm");
    daemon.client("vm").write(0, &[6; 512]).unwrap();
    daemon.kill9();
    let object = place.pool.join("pool");
    let intact = std::fs::read_to_string(&object).unwrap();
    let replacements = [
        ("\"format\": 1", "\"format\": 2", "format 2"),
        ("\"features\": []", "\"features\": [\"sharding\"]", "sharding"),
        ("{", "[", "pool"),
    ];
    for (from, to, says) in replacements {
        let changed = intact.replacen(from, to, 1);
        assert_ne!(changed, intact, "{intact}");
        std::fs::write(&object, &changed).unwrap();
        for node in [swapped(&place), place.other_node()] {
            let (code, said) = node.refused();
            assert!(code != 0 && said.contains(says), "{code}: {said}");
        }
        assert_eq!(std::fs::read_to_string(&object).unwrap(), changed);
    }
    std::fs::write(&object, intact).unwrap();
    let daemon = place.start();
    assert_eq!(daemon.client("vm").read(0, 512).unwrap(), [6; 512]);
    daemon.stop();
}

#[test]
fn a_daemon_with_wrong_settings_says_which_and_ends() {
    let place = Place::new();
    let good = place.settings();
    let cases = [
        (good.replace("[cache]", "[cash]"), "cash"),
        (good.replace("age_seconds = 3600", "age_seconds = 0"), "age_seconds"),
        (good.replace("age_seconds = 3600", "age_seconds = -1"), "age_seconds"),
        (good.replace("\"64M\"", "\"64 parsecs\""), "parsecs"),
        (good.replace("listen = \"127.0.0.1:0\"", "listen = \"somewhere\""), "somewhere"),
        (good.replace("dir = ", "dir "), "line 2"),
        (format!("{good}\nunknown = 1\n"), "unknown"),
    ];
    let refused = |says: &str| {
        let mut daemon = place.spawn_with(&[]);
        wait_until("its end", || daemon.has_ended().is_some());
        assert_eq!(daemon.has_ended(), Some(2), "{}", daemon.log());
        assert!(daemon.log().contains(says), "not {says:?} but {}", daemon.log());
    };
    refused("blockhouse.toml");
    for (settings, says) in cases {
        assert_ne!(settings, good, "{says}");
        std::fs::write(place.path("blockhouse.toml"), settings).unwrap();
        refused(says);
    }
    assert!(!place.pool.exists() && !place.state.exists());
    let daemon: Daemon<'_> = place.start();
    daemon.stop();
}
