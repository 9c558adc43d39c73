//! Where log lines go.
//!
//! Owns: the choice between journal and standard error, and the look of a line there.
//! Does not own: what is logged.

use super::text::{Paint, utc};
use crate::clock::Clock;
use log::kv::{Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::fmt::Write as _;
use std::io::Write as _;

/// Sends log lines of `level` and above to the systemd journal when standard error is connected to it, else to standard
/// error. Only the first call in a process has an effect.
pub fn start(level: LevelFilter) {
    let journal = systemd_journal_logger::connected_to_journal()
        .then(systemd_journal_logger::JournalLog::new)
        .and_then(Result::ok)
        .is_some_and(|journal| journal.install().is_ok());
    if !journal {
        let paint = Paint::of(&std::io::stderr());
        // Fails where a logger stands already, which then goes on.
        log::set_boxed_logger(Box::new(StderrLog { paint })).ok();
    }
    log::set_max_level(level);
}

/// One line each: time, level, message, then key=value.
struct StderrLog {
    paint: Paint,
}

impl Log for StderrLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What the HTTP libraries say below warnings is of no use to an operator.
        metadata.level() <= Level::Warn || metadata.target().starts_with("blockhouse")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = line(record, &utc(Clock::System.wall()), self.paint);
            // Nowhere to say that standard error is gone.
            std::io::stderr().lock().write_all(line.as_bytes()).ok();
        }
    }

    fn flush(&self) {}
}

fn line(record: &Record<'_>, time: &str, paint: Paint) -> String {
    let level = match record.level() {
        Level::Error => paint.red("error"),
        Level::Warn => paint.yellow("warn "),
        Level::Info => paint.green("info "),
        Level::Debug => paint.cyan("debug"),
        Level::Trace => paint.cyan("trace"),
    };
    // A message of several lines must not pass for several messages.
    let message = super::text::plain(&record.args().to_string()).replace('\n', "\n    ");
    let mut line = format!("{time} {level} {message}");
    // Collecting into a String cannot fail.
    record.key_values().visit(&mut Pairs(&mut line)).ok();
    line.push('\n');
    line
}

struct Pairs<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        let value = value.to_string();
        let quoted =
            value.is_empty() || value.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"');
        if quoted { write!(self.0, " {key}={value:?}") } else { write!(self.0, " {key}={value}") }
            .map_err(|_| log::kv::Error::msg("failed to write"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_time_level_message_and_pairs() {
        let pairs = [("volume", Value::from("vm-7")), ("error", Value::from("not found"))];
        let record = Record::builder()
            .level(Level::Warn)
            .args(format_args!("failed\nto attach"))
            .key_values(&pairs)
            .build();
        assert_eq!(
            line(&record, "2026-01-01 00:00:00", Paint::Plain),
            "2026-01-01 00:00:00 warn  failed\n    to attach volume=vm-7 error=\"not found\"\n"
        );
    }
}
