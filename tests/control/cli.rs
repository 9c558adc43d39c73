//! The binary against a daemon.

use super::Daemon;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// What a command did.
pub struct Ran {
    pub code: i32,
    pub out: Vec<u8>,
    pub err: String,
}

impl Ran {
    fn text(&self) -> String {
        String::from_utf8(self.out.clone()).unwrap()
    }

    #[track_caller]
    fn ok(&self) -> String {
        assert_eq!(self.code, 0, "{}", self.err);
        self.text()
    }
}

pub fn run(socket: Option<&Path>, arguments: &[String], input: &[u8]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockhouse"));
    command.args(arguments).env_remove("BLOCKHOUSE_SOCKET");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(socket) = socket {
        command.env("BLOCKHOUSE_SOCKET", socket);
    }
    let mut child = command.spawn().unwrap();
    // A command that reads nothing of it may be gone already.
    child.stdin.take().unwrap().write_all(input).ok();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    Ran { code: output.status.code().unwrap(), out: output.stdout, err }
}

fn alone(arguments: &[&str]) -> Ran {
    let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
    run(None, &arguments, b"")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_promised_commands_work_one_after_the_other() {
    let daemon = Daemon::start().await;
    let file = daemon.dir.path().join("rootfs.raw");
    let mut content = vec![0; 4 << 20];
    content[2 << 20] = 7;
    std::fs::write(&file, &content).unwrap();
    let file = file.to_str().unwrap();
    assert!(daemon.run(&["image", "import", "debian", file]).await.ok().contains("4 MiB"));
    assert_eq!(daemon.fake.images.lock().unwrap()["debian"], content);
    daemon.run_with(&["image", "import", "piped", "-", "--description", "a b"], &content).await.ok();
    assert_eq!(daemon.fake.images.lock().unwrap()["piped"], content);
    daemon.run(&["image", "import", "far", "http://example.org/a.qcow2"]).await.ok();

    let made =
        daemon.run(&["volume", "create", "vm-7", "--from", "image:debian", "--size", "40G"]).await.ok();
    assert!(made.contains("40 GiB from image:debian"), "{made}");
    let attached = daemon.run(&["volume", "attach", "vm-7"]).await.ok();
    for part in [
        "nbd://127.0.0.1:10809/vm-7",
        "nbdinfo nbd://",
        "nbdcopy nbd://",
        "qemu-img info nbd://",
        "-drive file=nbd://127.0.0.1:10809/vm-7,format=raw",
        "nbd-client 127.0.0.1 10809 /dev/nbd0 -name vm-7",
    ] {
        assert!(attached.contains(part), "{part} is not in {attached}");
    }
    assert!(daemon.run(&["snapshot", "create", "vm-7"]).await.ok().starts_with("Snapshot vm-7@1."));
    daemon.run(&["volume", "create", "vm-8", "--from", "snapshot:vm-7@1"]).await.ok();
    daemon.run(&["volume", "create", "vm-9", "--from", "volume:vm-7", "--last-commit"]).await.ok();
    let list = daemon.run(&["volume", "list"]).await.ok();
    assert!(
        list.starts_with("NAME ") && list.contains("snapshot:vm-7@1") && !list.contains('\x1b'),
        "{list}"
    );

    for words in [
        "volume show vm-7",
        "volume resize vm-7 80G",
        "volume detach vm-7",
        "volume rollback vm-7@1",
        "snapshot list vm-7",
        "snapshot delete vm-7@1 --yes",
        "volume orphans",
        "volume recover o back",
        "volume undelete vm-8 --as vm-8",
        "volume delete vm-9 --yes",
        "image list",
        "image show debian",
        "image delete piped --yes",
        "resolve vm-7",
        "df",
        "doctor",
        "trash",
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        assert!(!daemon.run(&words).await.ok().is_empty(), "{words:?}");
    }
    daemon.fake.go_on.notify_one();
    assert!(daemon.run(&["volume", "wait-durable", "vm-7"]).await.ok().contains("2023-11-14 22:13:20 UTC"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_whole_and_sparse_or_not_there() {
    let daemon = Daemon::start().await;
    let mut content = vec![0; (8 << 20) + 512];
    content[5_000_000..5_000_100].fill(9);
    for name in ["debian", "torn"] {
        daemon.fake.images.lock().unwrap().insert(name.to_owned(), content.clone());
    }
    let path = daemon.dir.path().join("out.raw");
    let to = path.to_str().unwrap();
    daemon.run(&["image", "export", "debian", to]).await.ok();
    assert_eq!(std::fs::read(&path).unwrap(), content);
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "zeros take no space");
    assert_eq!(daemon.run(&["image", "export", "debian", to]).await.code, 4, "what is there is kept");
    daemon.run(&["image", "export", "debian", to, "--force"]).await.ok();
    assert_eq!(daemon.run(&["image", "export", "debian", "-"]).await.out, content);

    let torn = daemon.dir.path().join("torn.raw");
    let failed = daemon.run(&["image", "export", "torn", torn.to_str().unwrap()]).await;
    assert_eq!(failed.code, 6, "{}", failed.err);
    assert!(!torn.exists() && !daemon.dir.path().join("torn.raw.partial").exists());
    assert_eq!(daemon.run(&["image", "export", "torn", "-"]).await.code, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_that_of_the_api() {
    let daemon = Daemon::start().await;
    daemon.run(&["volume", "create", "vm-7"]).await.ok();
    let api = daemon.unix_client().get("http://localhost/api/v1/volumes").send().await.unwrap();
    let printed = daemon.run(&["--json", "volume", "list"]).await.ok();
    assert_eq!(printed.trim_end(), api.text().await.unwrap());
    assert_eq!(daemon.run(&["volume", "detach", "vm-7", "--json"]).await.ok(), "");
    let over_tcp = daemon.run(&["volume", "list", "--json", "--url", &daemon.http]).await.ok();
    assert_eq!(over_tcp, printed);
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_refusals_apart() {
    let daemon = Daemon::start().await;
    for (refusal, code) in [
        ("internal", 1),
        ("invalid", 2),
        ("not-found", 3),
        ("conflict", 4),
        ("no-space", 5),
        ("unavailable", 6),
        ("unclear", 7),
        ("corrupt", 8),
    ] {
        let ran = daemon.run(&["volume", "create", &format!("refuse-{refusal}")]).await;
        assert_eq!(ran.code, code);
        assert_eq!(ran.err, format!("error: refused as {refusal}\nhint: try another name\n"));
    }
    let refused = daemon.run_with(&["image", "import", "refuse-conflict", "-"], &vec![1; 20_000_000]).await;
    assert_eq!(refused.code, 4, "{}", refused.err);
    let ran = daemon.run(&["volume", "delete", "vm-7"]).await;
    assert!(ran.code == 2 && ran.err.contains("--yes"), "{}", ran.err);
    daemon.fake.not_ready.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(daemon.run(&["doctor"]).await.code, 1);
}

#[test]
fn without_a_daemon_it_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let ran = alone(&["--data", dir.path().to_str().unwrap(), "volume", "list"]);
    assert_eq!(ran.code, 6);
    assert!(ran.err.starts_with("error: the daemon is not running"), "{}", ran.err);
    assert!(ran.err.contains("hint: start it with: blockhouse serve"), "{}", ran.err);
}

#[test]
fn usage_errors_and_missing_files_have_their_codes() {
    assert_eq!(alone(&["volume", "create"]).code, 2);
    let ran = alone(&["volume", "create", "vm", "--size", "40X"]);
    assert!(ran.code == 2 && ran.err.contains("\"X\" is no unit"), "{}", ran.err);
    assert_eq!(alone(&["image", "import", "x", "/nonexistent/file"]).code, 3);
    assert_eq!(alone(&["--config", "/nonexistent/file", "config", "show"]).code, 2);
    assert!(alone(&["--help"]).ok().contains("Exit codes:"));
}

#[test]
fn the_settings_that_are_shown_are_a_settings_file() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    let shown = alone(&["--data", data, "config", "show"]).ok();
    let file = dir.path().join("copy.toml");
    std::fs::write(&file, &shown).unwrap();
    let again = alone(&["--data", data, "--config", file.to_str().unwrap(), "config", "show"]).ok();
    let settings =
        |text: &str| text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    assert_eq!(settings(&shown), settings(&again));
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = alone(&["completions", shell]).ok();
        assert!(script.contains("blockhouse") && script.contains("wait-durable"), "{shell}");
    }
}
