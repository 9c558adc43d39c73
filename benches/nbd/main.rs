//! Our NBD server beside other people's: same machine, same file system, same clients, one table.
//!
//! `cargo bench --bench nbd` prints all of it (half an hour); `-- --rows 4k --net unix --client batch --ours-only` a
//! part. All servers run from the start; inside a row they take turns, in another order each round. What is shown is the
//! median of the rounds, with the least and the most beside it: where these lie far apart, the median says little.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a benchmark")]
#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "figures to print")]
#![expect(dead_code, reason = "the daemon is shared with the tests")]

mod client;
#[path = "../../tests/e2e/daemon.rs"]
mod daemon;
mod fio;
mod memory;
#[path = "../../tests/e2e/nbd.rs"]
mod nbd;
mod server;

use anyhow::{Context as _, Result};
use clap::Parser;
use client::{Client, Kind, Load, Order, Replies, Seen};
use serde_json::json;
use server::{Ours, PEERS, Server, State, Who};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Arguments {
    /// Parts of the names of rows: those that have one of them are run
    #[arg(long, value_delimiter = ',', default_value = "")]
    rows: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "unix,tcp")]
    net: Vec<Net>,
    #[arg(long, value_delimiter = ',', default_value = "batch,fio")]
    client: Vec<With>,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Of each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Without other people's servers
    #[arg(long)]
    ours_only: bool,
    /// A frozen volume's commit is tried again every second, which costs CPU: counted there, and missed by the others
    #[arg(long, value_delimiter = ',', default_value = "active,cache")]
    states: Vec<State>,
    /// Of each volume, and of the file that the others serve
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
    /// The batching client takes simple replies
    #[arg(long)]
    simple: bool,
    /// Every measurement as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// List the rows
    #[arg(long)]
    list: bool,
    /// This process is to be the server that answers from memory
    #[arg(long, hide = true, value_name = "SIZE")]
    memory_server: Option<u64>,
    #[arg(hide = true)]
    socket: Option<PathBuf>,
    /// Said by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Net {
    Unix,
    Tcp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum With {
    Batch,
    Fio,
}

fn rows() -> Vec<(String, Load)> {
    let mut rows = Vec::new();
    for kind in [Kind::Read, Kind::Write] {
        for depth in [1, 32] {
            for connections in [1, 4] {
                let name = if kind == Kind::Read { "randread" } else { "randwrite" };
                let load = Load { kind, order: Order::Random, request_bytes: 4096, depth, connections };
                rows.push((format!("{name}-4k-qd{depth}x{connections}"), load));
            }
        }
        for (size, request_bytes) in [("128k", 128 << 10), ("1m", 1 << 20)] {
            let name = if kind == Kind::Read { "read" } else { "write" };
            let load = Load { kind, order: Order::Sequential, request_bytes, depth: 8, connections: 1 };
            rows.push((format!("{name}-{size}-qd8x1"), load));
        }
    }
    rows
}

/// One measurement.
struct Sample {
    /// IOPS, or MB/s of large requests.
    rate: f64,
    p50_us: f64,
    p99_us: f64,
    cpu_us: f64,
}

fn sample(load: &Load, seen: &Seen, cpu: Duration) -> Sample {
    let rate = seen.requests as f64 / seen.seconds;
    let unit = if load.request_bytes > 4096 { load.request_bytes as f64 / 1e6 } else { 1.0 };
    let latency = |quantile| seen.latency.value_at_quantile(quantile) as f64 / 1e3;
    Sample {
        rate: rate * unit,
        p50_us: latency(0.5),
        p99_us: latency(0.99),
        cpu_us: cpu.as_secs_f64() * 1e6 / seen.requests as f64,
    }
}

fn measure(server: &Server, with: With, load: &Load, arguments: &Arguments) -> Result<Sample> {
    let time = Duration::from_secs_f64(arguments.seconds);
    let replies = if arguments.simple { Replies::Simple } else { Replies::Structured };
    match with {
        With::Batch => {
            let mut client = Client::connect(&server.address, &server.export, replies, load.connections)?;
            // Before the connections end, and with them what some servers start for each.
            let before = server.cpu();
            let seen = client.run(load, time)?;
            Ok(sample(load, &seen, server.cpu() - before))
        }
        With::Fio => {
            let before = server.cpu();
            let seen = fio::run(server, load, arguments.size_mib << 20, time)?;
            Ok(sample(load, &seen, server.cpu().saturating_sub(before)))
        }
    }
}

/// Waits until the servers have nothing left to do, so that it is not counted as somebody's request.
fn settle(servers: &[Server]) {
    let cpu = || servers.iter().map(Server::cpu).sum::<Duration>();
    let end = Instant::now() + Duration::from_secs(20);
    let mut before = cpu();
    while Instant::now() < end && !STOP.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        let now = cpu();
        if now == before {
            return;
        }
        before = now;
    }
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// The lines of one row of the table: each server with what it did in all rounds.
fn print(title: &str, load: &Load, servers: &[Server], samples: &[Vec<Sample>], rounds: usize) {
    let rates: Vec<f64> = samples.iter().map(|samples| median(samples, |sample| sample.rate)).collect();
    let peers = servers.iter().zip(&rates).filter(|(server, _)| server.who == Who::Peer);
    let best = peers.map(|(_, rate)| *rate).filter(|rate| rate.is_finite()).reduce(f64::max);
    let unit = if load.request_bytes > 4096 { "MB/s" } else { "IOPS" };
    for ((server, samples), rate) in servers.iter().zip(samples).zip(rates) {
        let times = best.map_or("-".to_owned(), |best| format!("{:.2}", rate / best));
        let failed = match rounds - samples.len() {
            0 => String::new(),
            failed => format!(" FAIL {failed}/{rounds}"),
        };
        if samples.is_empty() {
            if failed.is_empty() || !measures(server, load) {
                continue;
            }
            println!("| {title} | {} | FAIL | | | | | |", server.name);
            continue;
        }
        let least = samples.iter().map(|sample| sample.rate).fold(f64::INFINITY, f64::min);
        let most = samples.iter().map(|sample| sample.rate).fold(0.0, f64::max);
        println!(
            "| {title} | {} | {rate:.0} {unit}{failed} | {least:.0}..{most:.0} | {times} | {:.0} | {:.0} | {:.1} |",
            server.name,
            median(samples, |sample| sample.p50_us),
            median(samples, |sample| sample.p99_us),
            median(samples, |sample| sample.cpu_us),
        );
    }
}

/// What is frozen cannot be written: that would be the active state again.
fn measures(server: &Server, load: &Load) -> bool {
    !(server.who == Who::Ours && server.export == State::Frozen.name() && load.kind == Kind::Write)
}

fn servers(
    arguments: &Arguments,
    ours: &[&Ours<'_>],
    net: Net,
    file: &Path,
    dir: &Path,
) -> Result<Vec<Server>> {
    let tcp = net == Net::Tcp;
    let mut servers: Vec<Server> = ours.iter().flat_map(|ours| ours.servers(tcp)).collect();
    if !arguments.ours_only {
        for name in PEERS {
            match server::peer(name, file, dir, tcp) {
                Ok(Some(server)) => servers.push(server),
                Ok(None) => println!("!!! NOT MEASURED: {name} is not in PATH"),
                Err(error) => println!("!!! NOT MEASURED: {error:#}"),
            }
        }
    }
    servers.push(server::ceiling(dir, arguments.size_mib << 20, tcp)?);
    for server in &servers {
        server.check(arguments.size_mib << 20).with_context(|| format!("{} over {net:?}", server.name))?;
    }
    Ok(servers)
}

/// Somebody wants this to end: what was started is to end with it.
static STOP: AtomicBool = AtomicBool::new(false);

pub fn go_on() -> Result<()> {
    anyhow::ensure!(!STOP.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

fn stop_on_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let (Ok(mut int), Ok(mut term)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            STOP.store(true, Ordering::Relaxed);
            // Keeps the signals from their default.
            std::future::pending::<()>().await;
        });
    });
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(size_bytes) = arguments.memory_server {
        return memory::serve(size_bytes, arguments.socket.as_deref());
    }
    let rows: Vec<_> = rows()
        .into_iter()
        .filter(|(name, _)| arguments.rows.iter().any(|part| name.contains(part)))
        .collect();
    if arguments.list {
        rows.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(());
    }
    if cfg!(debug_assertions) {
        println!("Built with assertions: our figures are lower than a release's.\n");
    }
    stop_on_signals()?;
    let size_bytes = arguments.size_mib << 20;
    let dir = tempfile::Builder::new().prefix("bh-bench-nbd-").tempdir()?;
    let file = dir.path().join("peers").join("file");
    let places = [Ours::place(size_bytes), Ours::place(size_bytes)];
    let (frozen, others): (Vec<_>, Vec<_>) =
        arguments.states.iter().partition(|state| **state == State::Frozen);
    // The frozen one is beside the others, for it ruins their pool.
    let mut ours = Vec::new();
    for (place, states) in places.iter().zip([others, frozen]) {
        if !states.is_empty() {
            ours.push(Ours::start(place, &states, size_bytes)?);
        }
    }
    let ours: Vec<&Ours<'_>> = ours.iter().collect();
    let mut warm: Vec<PathBuf> = ours.iter().map(|ours| ours.daemon.place.state.clone()).collect();
    if !arguments.ours_only {
        std::fs::create_dir(dir.path().join("peers"))?;
        server::write_file(&file, size_bytes)?;
        warm.push(dir.path().join("peers"));
    }
    let mut nets = Vec::new();
    for net in &arguments.net {
        nets.push((*net, servers(&arguments, &ours, *net, &file, dir.path())?));
    }
    println!(
        "| net, client, row | server | median | min..max | × best peer | p50 µs | p99 µs | CPU µs a request |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut all = Vec::new();
    // Reads first: they find the states as they were made.
    for kind in [Kind::Read, Kind::Write] {
        for (net, servers) in &nets {
            for with in &arguments.client {
                for (name, load) in rows.iter().filter(|(_, load)| load.kind == kind) {
                    let title = format!("{net:?}, {with:?}, {name}").to_lowercase();
                    let mut samples: Vec<Vec<Sample>> = servers.iter().map(|_| Vec::new()).collect();
                    for round in 0..arguments.rounds {
                        prepare_round(&ours, servers, kind, &warm)?;
                        for turn in 0..servers.len() {
                            let index = (turn + round) % servers.len();
                            let server = &servers[index];
                            go_on()?;
                            if !measures(server, load) {
                                continue;
                            }
                            match measure(server, *with, load, &arguments) {
                                Ok(sample) => {
                                    all.push(json!({
                                        "net": format!("{net:?}").to_lowercase(),
                                        "client": format!("{with:?}").to_lowercase(),
                                        "row": name, "server": server.name, "round": round,
                                        "rate": sample.rate, "p50_us": sample.p50_us, "p99_us": sample.p99_us,
                                        "cpu_us": sample.cpu_us,
                                    }));
                                    samples[index].push(sample);
                                }
                                Err(error) => println!("FAIL: {title}, {}: {error:#}", server.name),
                            }
                        }
                    }
                    print(&title, load, servers, &samples, arguments.rounds);
                }
            }
        }
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&all)?)?;
    }
    Ok(())
}

/// Brings each server into its state again, and all they need into the page cache.
fn prepare_round(ours: &[&Ours<'_>], servers: &[Server], kind: Kind, warm: &[PathBuf]) -> Result<()> {
    if kind == Kind::Write {
        for ours in ours {
            ours.commit();
        }
    }
    server::warm(warm)?;
    settle(servers);
    Ok(())
}
