//! libnbd: nbdinfo, nbdcopy, and scripts for every command, flag and option.

use crate::clients::{Clients, noise, text};
use crate::daemon::{Daemon, Place};
use std::path::Path;

const MIB: usize = 1 << 20;

fn volume(daemon: &Daemon<'_>, name: &str, size: &str) -> [String; 2] {
    daemon.cli(&format!("volume create {name} --size {size}")).ok();
    let uris = daemon.attach(name);
    [uris.tcp, uris.unix]
}

/// Runs one function of the script beside this file, with every libnbd.
fn script(function: &str) {
    let place = Place::new();
    let daemon = place.start();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance/libnbd.py");
    for (number, clients) in Clients::all().iter().enumerate() {
        let name = format!("disk-{number}");
        volume(&daemon, &name, "64M");
        volume(&daemon, &format!("other-{number}"), "1M");
        let socket = place.path("nbd.sock");
        print!("{}", clients.run("python3", &[text(&path), function, text(&socket), &name]));
    }
}

#[test]
fn every_command_and_flag_does_what_the_protocol_says() {
    script("requests");
}

#[test]
fn bad_requests_get_the_errors_of_the_protocol_and_the_connection_goes_on() {
    script("bad_requests");
}

#[test]
fn replies_come_in_the_pieces_that_were_asked_for() {
    script("structured");
}

#[test]
fn block_status_covers_what_was_asked_and_tells_data_from_holes() {
    script("block_status");
}

#[test]
fn options_list_describe_and_select() {
    script("options");
}

#[test]
fn many_requests_in_flight_on_several_connections_match_a_copy_in_memory() {
    script("many");
}

#[test]
fn nbdinfo_answers_all_its_questions() {
    let place = Place::new();
    let daemon = place.start();
    let raw = place.path("raw");
    std::fs::write(&raw, noise(1, 3 * MIB)).unwrap();
    daemon.cli(&format!("image import fixed {}", text(&raw))).ok();
    for (number, clients) in Clients::all().iter().enumerate() {
        let name = format!("disk-{number}");
        for uri in volume(&daemon, &name, "10M") {
            let ask = |arguments: &[&str]| clients.run("nbdinfo", &[arguments, &[uri.as_str()]].concat());
            assert_eq!(ask(&["--size"]).trim(), (10 * MIB).to_string());
            for can in
                ["connect", "cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero"]
            {
                ask(&["--can", can]);
            }
            ask(&["--can", "structured-reply"]);
            let (code, said) = clients.try_run("nbdinfo", &["--is", "read-only", &uri]);
            assert_eq!(code, 2, "{said}");
            let (code, said) = clients.try_run("nbdinfo", &["--is", "rotational", &uri]);
            assert_eq!(code, 2, "{said}");
            let (code, said) = clients.try_run("nbdinfo", &["--is", "tls", &uri]);
            assert_eq!(code, 2, "{said}");
            let list = ask(&["--list"]);
            assert!(list.contains(&name) && list.contains("fixed"), "{list}");
            let map = ask(&["--map"]);
            assert!(map.contains("hole,zero"), "{map}");
            let totals = ask(&["--map", "--totals"]);
            assert!(totals.contains("100.0%"), "{totals}");
            let json: serde_json::Value = serde_json::from_str(&ask(&["--json"])).unwrap();
            assert_eq!(json["exports"][0]["export-name"], name.as_str(), "{json}");
            let fixed = uri.replace(&name, "image:fixed");
            clients.run("nbdinfo", &["--is", "read-only", &fixed]);
            let (code, _) = clients.try_run("nbdinfo", &["--can", "write", &fixed]);
            assert_eq!(code, 2);
        }
    }
}

#[test]
fn nbdcopy_brings_sparse_and_full_disks_both_ways_over_several_connections() {
    let place = Place::new();
    let daemon = place.start();
    let (source, back) = (place.path("source"), place.path("back"));
    let mut content = vec![0; 48 * MIB];
    for (index, chunk) in content.chunks_mut(700_001).enumerate() {
        if index % 3 == 0 {
            chunk.copy_from_slice(&noise(u64::try_from(index).unwrap(), chunk.len()));
        }
    }
    std::fs::write(&source, &content).unwrap();
    for (number, clients) in Clients::all().iter().enumerate() {
        let ways: [&[&str]; 5] = [
            &["--flush"],
            &["--connections=4", "--requests=16", "--flush"],
            &["--synchronous", "--flush"],
            &["--connections=4", "--sparse=512", "--flush"],
            &["--allocated", "--request-size=32768", "--flush"],
        ];
        for (way, arguments) in ways.into_iter().enumerate() {
            let name = format!("disk-{number}-{way}");
            let uris = volume(&daemon, &name, "48M");
            let fresh: &[&str] = if way % 2 == 0 { &[] } else { &["--destination-is-zero"] };
            for uri in &uris {
                clients.run("nbdcopy", &[arguments, fresh, &[text(&source), uri]].concat());
                clients.run("nbdcopy", &["--connections=4", uri, text(&back)]);
                assert!(std::fs::read(&back).unwrap() == content, "{clients:?} {arguments:?} {uri}");
                std::fs::remove_file(&back).unwrap();
            }
            // From one volume to another, without a file between.
            let to = volume(&daemon, &format!("{name}-copy"), "48M");
            clients.run("nbdcopy", &["--connections=2", &uris[0], &to[1]]);
            clients.run("nbdcopy", &[&to[0], text(&back)]);
            assert!(std::fs::read(&back).unwrap() == content, "{clients:?} {arguments:?}");
            std::fs::remove_file(&back).unwrap();
        }
    }
}
