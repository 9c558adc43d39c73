//! fio's NBD engine as the client. Its own cost bounds fast servers; it is what others measure with.

use crate::client::{Kind, Load, Order, Seen, histogram};
use crate::server::Server;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Beyond its run time: to start, connect and end.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(server: &Server, load: &Load, size_bytes: u64, time: Duration) -> Result<Seen> {
    let kind = match (load.order, load.kind) {
        (Order::Random, Kind::Read) => "randread",
        (Order::Random, Kind::Write) => "randwrite",
        (Order::Sequential, Kind::Read) => "read",
        (Order::Sequential, Kind::Write) => "write",
    };
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--ioengine=nbd", "--thread", "--group_reporting", "--time_based"]);
    command.args(["--randrepeat=0", "--norandommap", "--output-format=json"]);
    command.arg(format!("--uri={}", server.uri())).arg(format!("--rw={kind}"));
    command.arg(format!("--bs={}", load.request_bytes)).arg(format!("--iodepth={}", load.depth));
    command.arg(format!("--size={size_bytes}")).arg(format!("--numjobs={}", load.connections));
    // A fractional number of seconds would be taken for none.
    command.arg(format!("--runtime={}ms", time.as_millis()));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("no output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let end = Instant::now() + time * 2 + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            bail!("hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let mut said = String::new();
    child.stderr.take().context("no errors")?.read_to_string(&mut said)?;
    ensure!(status.success(), "fio ended with {status}: {}", said.trim());
    parse(&text, load).with_context(|| format!("fio printed {}", text.chars().take(300).collect::<String>()))
}

fn parse(text: &str, load: &Load) -> Result<Seen> {
    let from = text.find('{').context("no JSON")?;
    let all: Value = serde_json::from_str(&text[from..])?;
    let job = &all["jobs"][0];
    ensure!(job["error"] == 0, "error {}", job["error"]);
    let done = &job[if load.kind == Kind::Read { "read" } else { "write" }];
    let requests = done["total_ios"].as_u64().context("no count")?;
    ensure!(requests > 0, "nothing was done");
    let seconds = requests as f64 / done["iops"].as_f64().context("no rate")?;
    // Rebuilt from percentiles, which is all that is taken from it.
    let mut latency = histogram();
    let mut counted = 0;
    for (percentile, nanoseconds) in done["clat_ns"]["percentile"].as_object().context("no percentiles")? {
        let upto = percentile.parse::<f64>()? / 100.0;
        let count = ((requests as f64 * upto).round() as u64).saturating_sub(counted);
        latency.record_n(nanoseconds.as_u64().context("no number")?, count)?;
        counted += count;
    }
    Ok(Seen { requests, seconds, latency })
}
