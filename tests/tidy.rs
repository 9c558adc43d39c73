//! The style of this house as a test.
//!
//! Owns: what can be told from the text of the tree: its top level, headers, lengths, words, and which room names which.
//! Does not own: what the compiler and its lints see.
#![expect(clippy::disallowed_methods, reason = "a test reads the source tree, on its own thread")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Lines of a file without its tests.
const LINES_MAX: usize = 900;
/// Up to here a header of one line says enough.
const SHORT_LINES_MAX: usize = 150;

/// A file of the tree.
struct Source {
    /// Below the top, with `/` between.
    path: String,
    text: String,
}

impl Source {
    /// The file without the module of tests at its end.
    fn code(&self) -> &str {
        let end = ["\n#[cfg(test)]\nmod ", "\n#[cfg(test)]\n#[expect"]
            .iter()
            .filter_map(|mark| self.text.find(mark))
            .min()
            // Only a module with a body ends the code; `mod tests;` does not.
            .filter(|&at| {
                self.text[at..].lines().take(4).any(|line| line.starts_with("mod ") && line.ends_with('{'))
            });
        &self.text[..end.unwrap_or(self.text.len())]
    }

    fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.ends_with("tests.rs")
    }

    /// Lines of code with their numbers, comments left out.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code()
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line.trim()))
            .filter(|(_, line)| !line.starts_with("//"))
    }
}

fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, extension: &str, into: &mut Vec<Source>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the tree") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files(&path, extension, into);
        } else if path.extension().is_some_and(|found| found == extension) {
            let below = path.strip_prefix(top()).expect("below the top").to_string_lossy().replace('\\', "/");
            into.push(Source { path: below, text: std::fs::read_to_string(&path).expect("text") });
        }
    }
}

/// All Rust files below these folders, sorted.
fn sources(folders: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    for folder in folders.iter().map(|folder| top().join(folder)).filter(|folder| folder.is_dir()) {
        files(&folder, "rs", &mut found);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no sources in {folders:?}");
    found
}

fn fail_with(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn nothing_unexpected_lies_at_the_top() {
    let known = [
        ".ci",
        ".git",
        ".gitattributes",
        ".gitignore",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "benches",
        "clippy.toml",
        "deny.toml",
        "image",
        "mkosi.conf",
        "rust-toolchain.toml",
        "rustfmt.toml",
        "src",
        "target",
        "tests",
        "udev",
        "web",
    ];
    let mut unknown = Vec::new();
    for entry in std::fs::read_dir(top()).expect("the top") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        // What git does not see is a matter of the machine.
        let ignored = std::fs::read_to_string(top().join(".gitignore"))
            .is_ok_and(|text| text.lines().any(|line| line.trim_matches('/') == name));
        if !known.contains(&name.as_str()) && !ignored {
            unknown.push(name);
        }
    }
    fail_with("unknown at the top of the tree", &unknown);
}

#[test]
fn no_file_has_grown_too_long() {
    let long = sources(&["src", "tests", "benches"])
        .iter()
        .map(|source| (source.path.clone(), source.code().lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect::<Vec<_>>();
    fail_with("a file this long has two jobs", &long);
}

#[test]
fn every_file_says_what_it_owns_and_what_not() {
    let mut found = Vec::new();
    for source in sources(&["src"]) {
        if !source.text.starts_with("//! ") {
            found.push(format!("{}: does not begin with a header", source.path));
        } else if source.code().lines().count() > SHORT_LINES_MAX && !source.is_test() {
            let header =
                source.text.lines().take_while(|line| line.starts_with("//!")).collect::<Vec<_>>().join("\n");
            // Someone else's rules are cited by name; the list of what a file does not own ends with a full stop there.
            for part in ["Owns:", "Does not own:"] {
                if !header.contains(part) {
                    found.push(format!("{}: its header lacks \"{part}\"", source.path));
                }
            }
        }
    }
    fail_with("headers", &found);
}

#[test]
fn lints_are_expected_with_a_reason_and_never_allowed() {
    let mut found = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        for (number, line) in source.text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
            let attribute = line.starts_with("#[") || line.starts_with("#![");
            if attribute && line.contains(concat!("allow", "(")) {
                found.push(format!("{}:{number}: {line}", source.path));
            }
        }
        for (at, _) in source.text.match_indices(concat!("[expect(", "clippy")) {
            let end = source.text[at..].find(")]").map_or(source.text.len(), |length| at + length);
            if !source.text[at..end].contains("reason = ") {
                found.push(format!("{}: an expectation without a reason", source.path));
            }
        }
    }
    fail_with("attributes", &found);
}

#[test]
fn imports_name_what_they_import() {
    let mut found = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        for (number, line) in source.text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
            let import = line.starts_with("use ")
                || line.starts_with("pub use ")
                || line.starts_with("pub(crate) use ");
            let glob =
                line.ends_with("*;") && !line.starts_with("use super::") && !line.contains("::prelude::");
            if import && glob {
                found.push(format!("{}:{number}: {line}", source.path));
            }
        }
    }
    fail_with("glob imports", &found);
}

#[test]
fn unsafe_code_stays_in_the_disk_room() {
    let mut found = Vec::new();
    for source in sources(&["src"]) {
        if source.path.starts_with("src/disk/") {
            continue;
        }
        for (number, line) in source.lines() {
            let code = line.split(" //").next().unwrap_or(line);
            if code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe") {
                found.push(format!("{}:{number}: {line}", source.path));
            }
        }
    }
    fail_with("unsafe outside src/disk", &found);
}

/// Rooms that a room may not name. Arrows go down: control, node, {frontend, volume, store}, seams.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("src/geometry.rs", &["block", "control", "disk", "frontend", "node", "store", "volume"]),
    ("src/block.rs", &["control", "frontend", "node", "store", "volume"]),
    ("src/clock.rs", &["block", "control", "disk", "frontend", "node", "store", "volume"]),
    ("src/offload.rs", &["block", "control", "disk", "frontend", "node", "store", "volume"]),
    ("src/disk", &["block", "control", "frontend", "node", "store", "volume"]),
    ("src/store", &["block", "control", "frontend", "node", "volume"]),
    ("src/frontend", &["control", "node", "store", "volume"]),
    ("src/volume", &["control", "frontend", "node"]),
    ("src/node", &["control"]),
];

#[test]
fn arrows_between_rooms_go_one_way() {
    let mut found = Vec::new();
    for source in sources(&["src"]) {
        let rooms =
            FORBIDDEN.iter().filter(|(room, _)| source.path.starts_with(room)).flat_map(|(_, rooms)| *rooms);
        for room in rooms {
            for (number, line) in source.lines() {
                let named =
                    [format!("crate::{room}::"), format!("crate::{room};"), format!("blockhouse::{room}::")];
                if named.iter().any(|name| line.contains(name.as_str())) {
                    found.push(format!("{}:{number}: names {room}: {line}", source.path));
                }
            }
        }
    }
    fail_with("a room names one above it", &found);
}

#[test]
fn there_is_no_room_for_leftovers() {
    let found = sources(&["src"])
        .iter()
        .filter(|source| {
            ["util", "utils", "common", "types", "helpers", "misc"].iter().any(|name| {
                source.path.ends_with(&format!("/{name}.rs")) || source.path.contains(&format!("/{name}/"))
            })
        })
        .map(|source| source.path.clone())
        .collect::<Vec<_>>();
    fail_with("files without a job of their own", &found);
}

#[test]
fn every_item_of_the_seam_is_documented() {
    let text = std::fs::read_to_string(top().join("src/block.rs")).expect("the seam");
    let mut found = Vec::new();
    let (mut documented, mut in_trait) = (false, false);
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line)) {
        in_trait = (in_trait || line.starts_with("pub trait ")) && line != "}";
        let code = line.trim();
        let starts = |item: &[&str]| item.iter().any(|start| code.starts_with(start));
        let method = in_trait && starts(&["fn ", "async fn ", "const "]);
        if method
            || starts(&[
                "pub fn ",
                "pub async fn ",
                "pub const ",
                "pub struct ",
                "pub enum ",
                "pub trait ",
                "pub type ",
            ])
        {
            if !documented {
                found.push(format!("src/block.rs:{number}: {code}"));
            }
            documented = false;
        } else if code.starts_with("///") {
            documented = true;
        } else if !code.starts_with("#[") && !code.is_empty() {
            documented = false;
        }
    }
    fail_with("undocumented", &found);
}

/// Where tests are listed: each entry is tried by the simulation.
const LIST_OF_BUGS: &str = "src/mutant.rs";

/// Sequences that broke an implementation once, and of which some test must be named.
fn cases() -> Vec<String> {
    let local =
        (1..=29).filter(|number| ![9, 10, 14, 17].contains(number)).map(|number| format!("l{number}"));
    let pool = [1, 2, 5, 6, 8, 10, 11, 12, 15, 19, 20, 26, 27].iter().map(|number| format!("g{number}"));
    local.chain(pool).collect()
}

/// Cases that no test is named after yet. It only ever gets shorter.
const NOT_YET_NAMED: &[&str] = &[];

#[test]
fn every_case_has_a_test_named_after_it() {
    let mut named = BTreeSet::new();
    for source in sources(&["src", "tests"]).iter().filter(|source| source.path != "tests/tidy.rs") {
        // In the source only the tests count: a rule that names its case proves nothing.
        let text = if source.is_test() || source.path == LIST_OF_BUGS {
            source.text.as_str()
        } else {
            &source.text[source.code().len()..]
        };
        // `l19_…` as the name of a test, `L19` in its documentation.
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words {
            let case = word.split('_').next().filter(|_| word.contains('_')).unwrap_or_default();
            named.insert(case.to_owned());
            if word.starts_with(['L', 'G']) {
                named.insert(word.to_ascii_lowercase());
            }
        }
    }
    let missing = cases()
        .into_iter()
        .filter(|case| !named.contains(case) && !NOT_YET_NAMED.contains(&case.as_str()))
        .collect::<Vec<_>>();
    let stale = NOT_YET_NAMED
        .iter()
        .filter(|case| named.contains(**case))
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    fail_with("named by now: take them off the list", &stale);
    fail_with("cases without a test", &missing);
}

#[test]
fn the_read_me_names_tests_that_exist() {
    let text = std::fs::read_to_string(top().join("README.md")).expect("README.md");
    let all = sources(&["src", "tests"]).iter().map(|source| source.text.clone()).collect::<String>();
    let missing = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.matches('_').count() >= 3)
        .filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'))
        .filter(|name| !all.contains(&format!("fn {name}(")))
        .map(String::from)
        .collect::<Vec<_>>();
    fail_with("tests that the read-me names and that are not there", &missing);
}
