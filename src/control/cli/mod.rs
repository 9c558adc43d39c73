//! The command line.
//!
//! Owns: what is printed, exit codes, and questions before something is deleted.
//! Does not own: the work; it speaks the API like anybody else.

mod args;
mod client;
mod image;
mod node;
mod snapshot;
mod volume;

pub use args::Cli;

use crate::control::config::{DATA_DIR, Loaded, PoolConfig};
use crate::control::text::{Paint, plain};
use crate::control::{logging, serve};
use crate::node::service::{Refusal, ServiceError};
use args::{Command, ConfigCommand, Global};
use clap::{CommandFactory as _, Parser as _};
use client::{Client, Outcome, Reply};
use std::ffi::OsString;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Exit code that a refusal ends a command with; they are listed in `--help`.
pub fn exit_code(refusal: Refusal) -> u8 {
    match refusal {
        Refusal::Internal => 1,
        Refusal::Invalid => 2,
        Refusal::NotFound => 3,
        Refusal::Conflict => 4,
        Refusal::NoSpace => 5,
        Refusal::Unavailable => 6,
        Refusal::Unclear => 7,
        Refusal::Corrupt => 8,
    }
}

/// Runs a command line to its end.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Cli { global, command } = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output and are no error.
            error.print().ok();
            return if error.use_stderr() { exit_code(Refusal::Invalid).into() } else { ExitCode::SUCCESS };
        }
    };
    match dispatch(&global, command) {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            exit_code(error.refusal).into()
        }
    }
}

fn report(error: &ServiceError) {
    let paint = Paint::of(&io::stderr());
    let mut stderr = io::stderr().lock();
    // Nowhere to say that standard error is gone.
    writeln!(stderr, "{} {}", paint.red("error:"), plain(&error.message)).ok();
    if let Some(hint) = &error.hint {
        writeln!(stderr, "{} {}", paint.cyan("hint:"), plain(hint)).ok();
    }
}

fn dispatch(global: &Global, command: Command) -> Outcome<ExitCode> {
    let done = |outcome: Outcome<()>| outcome.map(|()| ExitCode::SUCCESS);
    match command {
        Command::Serve { log, pool } => done(run_daemon(global, log, pool)),
        Command::Config(ConfigCommand::Show) => {
            print(&load(global)?.show());
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "blockhouse", &mut script);
            print(&String::from_utf8_lossy(&script));
            Ok(ExitCode::SUCCESS)
        }
        Command::Volume(command) => done(ask(global, async |asker| volume::run(&asker, command).await)),
        Command::Image(command) => done(ask(global, async |asker| image::run(&asker, command).await)),
        Command::Snapshot(command) => done(ask(global, async |asker| snapshot::run(&asker, command).await)),
        Command::Resolve { name } => done(ask(global, async |asker| node::resolve(&asker, &name).await)),
        Command::Df => done(ask(global, async |asker| node::df(&asker).await)),
        Command::Trash => done(ask(global, async |asker| node::trash(&asker).await)),
        Command::Doctor => ask(global, async |asker| node::doctor(&asker).await),
    }
}

fn load(global: &Global) -> Outcome<Loaded> {
    Loaded::load(global.config.as_deref(), global.data.as_deref())
        .map_err(|error| ServiceError::new(Refusal::Invalid, error.to_string()))
}

fn run_daemon(global: &Global, level: Option<log::LevelFilter>, pool: args::PoolArgs) -> Outcome<()> {
    let level = match (level, std::env::var("BLOCKHOUSE_LOG")) {
        (Some(level), _) => level,
        (None, Ok(text)) if !text.is_empty() => text.parse().map_err(|_| {
            let message = format!("BLOCKHOUSE_LOG is \"{text}\"; use error, warn, info, debug or trace");
            ServiceError::new(Refusal::Invalid, message)
        })?,
        (None, _) => log::LevelFilter::Info,
    };
    logging::start(level);
    let mut loaded = load(global)?;
    place_pool(&mut loaded, pool)?;
    serve::run(loaded).map_err(|error| match error.downcast_ref::<ServiceError>() {
        Some(refused) => refused.clone(),
        None => {
            let hint = serve::hint(&error);
            ServiceError { hint, ..ServiceError::new(Refusal::Internal, format!("{error:#}")) }
        }
    })
}

/// Puts what the command line says of the pool over the settings.
fn place_pool(loaded: &mut Loaded, args: args::PoolArgs) -> Outcome<()> {
    let args::PoolArgs { pool, endpoint, region, path_style, ca_file } = args;
    let written = &mut loaded.written.pool;
    // Relative to where it was typed, not to the data directory.
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    match pool {
        Some(url) if url.contains("://") => written.url = Some(url),
        Some(dir) => {
            *written = PoolConfig {
                dir: absolute(dir.into()),
                wait_seconds: written.wait_seconds,
                ..PoolConfig::default()
            }
        }
        None => {}
    }
    written.endpoint = endpoint.or(written.endpoint.take());
    written.region = region.or(written.region.take());
    written.path_style = path_style.or(written.path_style.take());
    written.ca_file = ca_file.map(absolute).or(written.ca_file.take());
    loaded.written.check().map_err(|reason| ServiceError::new(Refusal::Invalid, reason))
}

/// Runs `work` with a client of the daemon.
fn ask<T>(global: &Global, work: impl AsyncFnOnce(Asker) -> Outcome<T>) -> Outcome<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        ServiceError::new(Refusal::Internal, format!("failed to start the runtime: {error}"))
    })?;
    let asker = Asker {
        client: Client::new(global)?,
        output: if global.json { Output::Json } else { Output::Text },
        paint: Paint::of(&io::stdout()),
    };
    let outcome = runtime.block_on(work(asker));
    // A read of standard input that never ends must not keep the command from ending.
    runtime.shutdown_background();
    outcome
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    /// The API's JSON, verbatim.
    Json,
    Text,
}

/// A client, and how its answers are shown.
struct Asker {
    client: Client,
    output: Output,
    paint: Paint,
}

impl Asker {
    /// Prints an answer: as it came, or what `text` makes of it.
    fn show<T: serde::de::DeserializeOwned>(
        &self,
        reply: &Reply,
        text: impl FnOnce(T) -> String,
    ) -> Outcome<()> {
        match self.output {
            Output::Json => {
                let body = String::from_utf8_lossy(&reply.0);
                // An answer without a body is a success that says nothing.
                if !body.is_empty() {
                    print(&format!("{}\n", body.trim_end()));
                }
            }
            Output::Text => print(&text(reply.parse()?)),
        }
        Ok(())
    }

    /// Prints `text`, unless JSON is asked for.
    fn say(&self, text: &str) {
        if self.output == Output::Text {
            print(&format!("{text}\n"));
        }
    }
}

/// Prints to standard output. A reader that went away (`| head`) ends the command quietly.
pub fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(i32::from(exit_code(Refusal::Internal)));
    }
}

/// Asks whether to delete `what` called `name`, by having its name typed.
fn confirm(what: &str, name: &str, confirm: &args::Confirm) -> Outcome<()> {
    if confirm.yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        let message = format!("{what} {name} is deleted only when that is confirmed");
        return Err(ServiceError::new(Refusal::Invalid, message).hint("add --yes"));
    }
    let mut stderr = io::stderr().lock();
    let mut typed = String::new();
    let asked = write!(stderr, "This deletes {what} {name}. Type its name to go on: ")
        .and_then(|()| stderr.flush())
        .and_then(|()| io::stdin().lock().read_line(&mut typed));
    if asked.is_ok() && typed.trim() == name {
        return Ok(());
    }
    Err(ServiceError::new(Refusal::Invalid, format!("not confirmed; {what} {name} is as it was")))
}

/// What to put behind `blockhouse` so that it finds the daemon with this socket: nothing, where it does by itself.
pub fn target_flag(data_dir: &Path, socket: &Path) -> String {
    if data_dir == Path::new(DATA_DIR) && socket == data_dir.join("state/control.sock") {
        return String::new();
    }
    format!(" --socket {}", socket.display())
}
