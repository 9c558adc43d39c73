//! A network between store and server that fails, or a server that lies.
//!
//! Owns: what happens to each request, by a script or by a seed.
//! Does not own: what has to come of it.

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What happens to one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Pass,
    Delay,
    /// The connection ends before the server sees it.
    LoseRequest,
    /// The server does it, and its answer is lost.
    LoseAnswer,
    /// The answer ends in its middle.
    CutAnswer,
    /// The connection ends, and the server does it later.
    DoLater,
    /// Something on the way sends it twice, and answers with the second outcome.
    DoTwice,
    /// 500, and nothing was done.
    FailBefore,
    /// 500, and it was done.
    FailAfter,
    /// 503 SlowDown.
    SlowDown,
    /// No answer for longer than anybody waits, and it was done.
    Hang,
}

pub const FATES: [Fate; 10] = [
    Fate::Delay,
    Fate::LoseRequest,
    Fate::LoseAnswer,
    Fate::CutAnswer,
    Fate::DoLater,
    Fate::DoTwice,
    Fate::FailBefore,
    Fate::FailAfter,
    Fate::SlowDown,
    Fate::Hang,
];

/// Which requests a script is about.
pub type Chooser = fn(&str) -> bool;

/// Answers a request itself; gets its head and body.
pub type Liar =
    Arc<dyn Fn(String, Vec<u8>) -> futures::future::BoxFuture<'static, Option<String>> + Send + Sync>;

#[derive(Default)]
struct Plan {
    /// Of each request, in the order in which they come; first of all.
    script: VecDeque<Fate>,
    chooser: Option<Chooser>,
    /// Of a thousand requests so many fail.
    per_mille: u32,
    away: bool,
    liar: Option<Liar>,
}

pub struct Proxy {
    pub url: String,
    plan: Arc<Mutex<Plan>>,
    requests: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    /// A proxy before `server`, which passes all until it is told otherwise.
    pub async fn start(server: &str, seed: u64) -> Self {
        let server = server.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (plan, requests) = (Arc::new(Mutex::new(Plan::default())), Arc::new(AtomicU64::new(0)));
        let (theirs, counter) = (Arc::clone(&plan), Arc::clone(&requests));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                while connections.try_join_next().is_some() {}
                let (plan, server, counter) = (Arc::clone(&theirs), server.clone(), Arc::clone(&counter));
                connections.spawn(async move {
                    // A connection that ends early is what this is for.
                    serve(client, &server, &plan, &counter, seed).await.ok();
                });
            }
        });
        Self { url, plan, requests, task }
    }

    /// From here on these are the fates of the requests that `chooser` takes; then all pass.
    pub fn script(&self, chooser: Chooser, fates: &[Fate]) {
        let mut plan = self.plan.lock();
        plan.script = fates.iter().copied().collect();
        plan.chooser = Some(chooser);
    }

    /// Whether the whole script was used.
    pub fn script_is_over(&self) -> bool {
        self.plan.lock().script.is_empty()
    }

    pub fn fail(&self, per_mille: u32) {
        self.plan.lock().per_mille = per_mille;
    }

    /// Nothing gets through.
    pub fn set_away(&self, away: bool) {
        self.plan.lock().away = away;
    }

    pub fn lie(&self, liar: Liar) {
        self.plan.lock().liar = Some(liar);
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

/// Reads one request, all of it.
async fn read_request(client: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    assert!(header("transfer-encoding").is_none(), "a request of unknown length: {head}");
    let len: usize = header("content-length").map_or(0, |len| len.parse().unwrap());
    if header("expect").is_some() {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let mut body = bytes.split_off(head_end);
    while body.len() < len {
        if client.read_buf(&mut body).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    // One request a connection: the answer ends with it.
    let head = head
        .lines()
        .filter(|line| !line.to_ascii_lowercase().starts_with("expect:") && !line.is_empty())
        .map(|line| format!("{line}\r\n"))
        .collect::<String>();
    Ok((format!("{head}connection: close\r\n\r\n"), body))
}

async fn forward(server: &str, head: &str, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut upstream = TcpStream::connect(server).await?;
    upstream.write_all(head.as_bytes()).await?;
    upstream.write_all(body).await?;
    let mut answer = Vec::new();
    upstream.read_to_end(&mut answer).await?;
    Ok(answer)
}

fn error(status: &str, code: &str) -> Vec<u8> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>made up</Message></Error>");
    let len = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/xml\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n{body}")
        .into_bytes()
}

async fn serve(
    mut client: TcpStream,
    server: &str,
    plan: &Mutex<Plan>,
    counter: &AtomicU64,
    seed: u64,
) -> std::io::Result<()> {
    if plan.lock().away {
        return Ok(());
    }
    let (head, body) = read_request(&mut client).await?;
    let number = counter.fetch_add(1, Ordering::Relaxed);
    let mut rng = StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (fate, liar) = {
        let mut plan = plan.lock();
        let fate =
            if plan.chooser.is_some_and(|chooser| chooser(&head)) { plan.script.pop_front() } else { None };
        let by_chance = rng.random_range(0..1000) < plan.per_mille;
        // A hang takes seconds: seldom.
        let count = if rng.random_range(0..20) == 0 { FATES.len() } else { FATES.len() - 1 };
        let drawn = FATES[rng.random_range(0..count)];
        (fate.unwrap_or(if by_chance { drawn } else { Fate::Pass }), plan.liar.clone())
    };
    if let Some(liar) = liar
        && let Some(answer) = liar(head.clone(), body.clone()).await
    {
        return client.write_all(answer.as_bytes()).await;
    }
    let pause = Duration::from_millis(rng.random_range(1..120));
    let answer = match fate {
        Fate::Pass => forward(server, &head, &body).await?,
        Fate::Delay => {
            tokio::time::sleep(pause).await;
            forward(server, &head, &body).await?
        }
        Fate::LoseRequest => Vec::new(),
        Fate::LoseAnswer => {
            forward(server, &head, &body).await?;
            Vec::new()
        }
        Fate::CutAnswer => {
            let mut answer = forward(server, &head, &body).await?;
            answer.truncate(rng.random_range(0..answer.len().max(1)));
            answer
        }
        Fate::DoLater => {
            drop(client);
            tokio::time::sleep(pause).await;
            forward(server, &head, &body).await?;
            return Ok(());
        }
        Fate::DoTwice => {
            forward(server, &head, &body).await?;
            forward(server, &head, &body).await?
        }
        Fate::FailBefore => error("500 Internal Server Error", "InternalError"),
        Fate::FailAfter => {
            forward(server, &head, &body).await?;
            error("500 Internal Server Error", "InternalError")
        }
        Fate::SlowDown => error("503 Slow Down", "SlowDown"),
        Fate::Hang => {
            forward(server, &head, &body).await?;
            // Ends when the client gives up.
            let mut rest = [0; 1];
            client.read_exact(&mut rest).await?;
            Vec::new()
        }
    };
    client.write_all(&answer).await
}
