//! Incremental backup: a client copies what changed since a snapshot, and nothing else.

use crate::daemon::Place;
use crate::tools::{MIB, have, run, text};

const SCRIPT: &str = r#"
import nbd, sys
uri, target, since = sys.argv[1:4]
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("blockhouse:changed-since:" + since)
h.connect_uri(uri)
contexts = {"base:allocation": [], "blockhouse:changed-since:" + since: []}
assert all(h.can_meta_context(name) for name in contexts), since
size = h.get_size()
for name, extents in contexts.items():
    at = 0
    while at < size:
        found = []
        def keep(context, offset, entries, error):
            if context == name:
                found.extend(zip(entries[::2], entries[1::2]))
        h.block_status(min(size - at, 1 << 30), at, keep)
        for length, state in found:
            extents.append((at, length, state))
            at += length
copied = 0
with open(target, "r+b") as file:
    file.truncate(size)
    for at, length, state in contexts["blockhouse:changed-since:" + since]:
        while state & 1 and length:
            part = min(length, 32 << 20)
            file.seek(at)
            file.write(h.pread(part, at))
            at += part
            length -= part
            copied += part
h.shutdown()
print(copied)
"#;

#[test]
fn a_backup_of_the_changes_since_a_snapshot_is_the_disk() {
    if !["qemu-io", "qemu-img", "nbdcopy", "nbdinfo", "nbdsh"].iter().all(|program| have(program)) {
        return;
    }
    let place = Place::new();
    let daemon = place.start();
    daemon.cli("volume create vm --size 256M").ok();
    let uri = daemon.attach("vm").unix;
    let write = |commands: &[&str]| {
        let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", *command]).collect();
        run("qemu-io", &[&["-f", "raw"], &commands[..], &[&uri]].concat());
    };
    write(&["write -P 1 0 64M", "write -P 2 100M 1M", "write -P 3 255M 1M"]);
    daemon.cli("snapshot create vm").ok();
    let backup = place.path("backup.raw");
    run("nbdcopy", &[&uri, text(&backup)]);

    let copy_changes = |uri: &str, since: &str| -> u64 {
        run("/usr/bin/python3", &["-c", SCRIPT, uri, text(&backup), since]).trim().parse().unwrap()
    };
    let same = |uri: &str| {
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&backup), uri]);
    };
    assert_eq!(copy_changes(&uri, "1"), 0, "nothing has changed");

    // Of a volume in use: what no commit has seen yet is in it.
    write(&["write -P 9 1M 4k", "discard 100M 1M", "write -z 255M 64k", "write -P 4 200M 1M"]);
    let copied = copy_changes(&uri, "vm@1");
    assert!((MIB..8 * MIB).contains(&copied), "{copied}");
    same(&uri);

    // Between two snapshots, whatever the volume does meanwhile, and over a restart.
    daemon.cli("snapshot create vm").ok();
    write(&["write -P 5 30M 2M"]);
    daemon.cli("snapshot create vm").ok();
    write(&["write -P 6 0 128M"]);
    daemon.stop();
    let daemon = place.start();
    let snapshot = daemon.attach("vm").unix.replace("/vm?", "/snapshot:vm@3?");
    assert_eq!(copy_changes(&snapshot, "2"), 2 * MIB);
    same(&snapshot);

    // What is listed, and what there is not.
    let listed = run("nbdinfo", &["--json", &snapshot]);
    for context in ["\"base:allocation\"", "\"blockhouse:changed-since:1\"", "\"blockhouse:changed-since:3\""]
    {
        assert!(listed.contains(context), "{context}: {listed}");
    }
    let map = run("nbdinfo", &["--map=blockhouse:changed-since:2", &snapshot]);
    assert_eq!(map.lines().count(), 3, "{map}");
    let unknown = crate::tools::try_run("nbdinfo", &["--map=blockhouse:changed-since:9", &snapshot]);
    assert!(!unknown.0 && unknown.1.contains("blockhouse:changed-since:9"), "{unknown:?}");

    // QEMU shows it as it shows a dirty bitmap of its own: what is dirty is no data.
    let path = place.path("nbd.sock");
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=snapshot:vm@3,x-dirty-bitmap=blockhouse:changed-since:2",
        text(&path)
    );
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &image]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let dirty: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["data"] == false)
        .map(|one| one["length"].as_u64().unwrap())
        .sum();
    assert_eq!(dirty, 2 * MIB, "{map}");
    daemon.stop();
}
