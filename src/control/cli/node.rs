//! Commands about the node and the pool as a whole.

use super::Asker;
use super::client::{Outcome, encode};
use crate::clock::Clock;
use crate::control::text::{Align, age, fields, plain, size, table};
use crate::node::service::{Finding, Resolved, Space, TrashInfo};
use std::process::ExitCode;

pub(super) async fn resolve(asker: &Asker, name: &str) -> Outcome<()> {
    let reply = asker.client.get(&format!("/resolve/{}", encode(name))).await?;
    asker.show(&reply, |resolved: Resolved| {
        let rows = [
            ("name", resolved.name),
            ("kind", resolved.kind),
            ("uid", resolved.uid),
            ("size", size(resolved.size_bytes)),
            ("uri", resolved.uri.unwrap_or_else(|| "not served here".to_owned())),
        ];
        fields(&rows, asker.paint)
    })
}

pub(super) async fn df(asker: &Asker) -> Outcome<()> {
    let reply = asker.client.get("/space").await?;
    asker.show(&reply, |space: Space| {
        let header =
            [("WHAT", Align::Left), ("USED", Align::Right), ("FREE", Align::Right), ("TOTAL", Align::Right)];
        let of = |what: &str, used: u64, total: u64| {
            vec![what.to_owned(), size(used), size(total.saturating_sub(used)), size(total)]
        };
        let alone = |what: String, used: u64| vec![what, size(used), "-".to_owned(), "-".to_owned()];
        let state_used = space.state_total_bytes.saturating_sub(space.state_free_bytes);
        let mut rows = vec![
            of("disk of the state", state_used, space.state_total_bytes),
            of("cache", space.cache_used_bytes, space.cache_total_bytes),
            alone("not yet in the pool".to_owned(), space.dirty_bytes),
            alone(format!("pool ({} objects)", space.pool_objects), space.pool_bytes),
        ];
        let kinds = space.pool_bytes_by_kind;
        rows.extend(kinds.into_iter().map(|(kind, bytes)| alone(format!("  {kind}"), bytes)));
        table(&header, &rows, asker.paint)
    })
}

/// Exits with 1 if there is a problem.
pub(super) async fn doctor(asker: &Asker) -> Outcome<ExitCode> {
    let reply = asker.client.get("/doctor").await?;
    let paint = asker.paint;
    asker.show(&reply, |findings: Vec<Finding>| {
        let line = |finding: Finding| {
            let level = match finding.level.as_str() {
                "ok" => paint.green("ok     "),
                "warning" => paint.yellow("warning"),
                "problem" => paint.red("problem"),
                other => plain(other),
            };
            format!("{level}  {}: {}\n", plain(&finding.what), plain(&finding.detail))
        };
        findings.into_iter().map(line).collect()
    })?;
    let problem = reply.parse::<Vec<Finding>>()?.iter().any(|finding| finding.level == "problem");
    Ok(if problem { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub(super) async fn trash(asker: &Asker) -> Outcome<()> {
    let reply = asker.client.get("/trash").await?;
    asker.show(&reply, |trash: Vec<TrashInfo>| {
        if trash.is_empty() {
            return "The trash is empty.\n".to_owned();
        }
        let header = [
            ("ID", Align::Left),
            ("KIND", Align::Left),
            ("NAME", Align::Left),
            ("SIZE", Align::Right),
            ("DELETED", Align::Left),
        ];
        let now = Clock::System.wall();
        let row = |entry: &TrashInfo| {
            vec![
                entry.id.clone(),
                entry.kind.clone(),
                entry.name.clone(),
                size(entry.size_bytes),
                age(entry.deleted, now),
            ]
        };
        let rows: Vec<_> = trash.iter().map(row).collect();
        format!("{}\nHave one back with: blockhouse volume undelete ID\n", table(&header, &rows, asker.paint))
    })
}
