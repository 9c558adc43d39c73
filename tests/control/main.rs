//! The control room from outside: real sockets, real HTTP, the real binary; only the service behind it is in memory.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod api;
mod cli;
mod fake;

use blockhouse::control::api::Endpoint;
use blockhouse::control::config::Loaded;
use blockhouse::control::serve::{RunningNode, serve};
use fake::Fake;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A daemon around a [`Fake`], on a Unix socket and TCP, started and stopped the way the real one is.
struct Daemon {
    fake: Arc<Fake>,
    dir: tempfile::TempDir,
    http: String,
    welcome: String,
    stop: CancellationToken,
    ended: JoinHandle<anyhow::Result<()>>,
}

impl Daemon {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = "[http]\nlisten = \"127.0.0.1:0\"\nallowed_hosts = [\"store.example\"]";
        std::fs::write(dir.path().join("blockhouse.toml"), config).unwrap();
        let loaded = Loaded::load(None, Some(dir.path())).unwrap();
        let fake = Arc::new(Fake::default());
        let service = fake.clone();
        let stop = CancellationToken::new();
        let (tell, told) = oneshot::channel();
        let start =
            async move |_| Ok(RunningNode { service, shutdown: Box::new(|| Box::pin(async { Ok(()) })) });
        let welcome = move |text: &str| tell.send(text.to_owned()).unwrap();
        let ended = tokio::spawn(serve(loaded, start, stop.clone(), welcome));
        let welcome = told.await.unwrap();
        let http = welcome.lines().find_map(|line| line.trim().strip_prefix("web and API")).unwrap();
        let http = http.trim().trim_end_matches('/').to_owned();
        Self { fake, dir, http, welcome, stop, ended }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("state/control.sock")
    }

    /// Runs the binary against this daemon, off the runtime's threads.
    async fn run(&self, arguments: &[&str]) -> cli::Ran {
        self.run_with(arguments, b"").await
    }

    async fn run_with(&self, arguments: &[&str], input: &[u8]) -> cli::Ran {
        let (socket, input) = (self.socket(), input.to_vec());
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        tokio::task::spawn_blocking(move || cli::run(Some(&socket), &arguments, &input)).await.unwrap()
    }

    fn unix_client(&self) -> reqwest::Client {
        reqwest::Client::builder().no_proxy().unix_socket(self.socket()).build().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_is_told_everything_at_the_start() {
    let daemon = Daemon::start().await;
    for told in
        ["pool", "state", "127.0.0.1:10809", "control.sock", "http://127.0.0.1:", "image import debian"]
    {
        assert!(daemon.welcome.contains(told), "{told} is not in {}", daemon.welcome);
    }
    let dir = daemon.dir.path().to_owned();
    daemon.stop.cancel();
    daemon.ended.await.unwrap().unwrap();
    assert!(!dir.join("state/control.sock").exists(), "an orderly end leaves no socket");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_is_taken_over_only_if_nobody_listens_on_it() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/control.sock");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a killed daemon leaves its socket");
    let first = Endpoint::unix(&path).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = Endpoint::unix(&path).await.err().unwrap().to_string();
    assert!(error.contains("another daemon is listening"), "{error}");
    drop(first);
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(Endpoint::unix(&file).await.is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
