//! `blockhouse volume …`
//!
//! Owns: what these commands ask of the daemon, what they ask back, and the tables they print.
//! Does not own: the arguments ([`super::args`]), requests ([`super::client`]), or what a volume is.

use super::args::Volume;
use super::client::{Outcome, encode};
use super::{Asker, confirm};
use crate::clock::{Clock, UnixMillis};
use crate::control::connect;
use crate::control::text::{Align, Paint, age, duration, fields, plain, size, table, utc};
use crate::node::service::{
    Attachment, CreateVolume, Durable, OrphanInfo, Resolved, SnapshotInfo, TrashInfo, VolumeInfo,
};
use serde_json::json;
use std::time::Duration;

pub(super) async fn run(asker: &Asker, command: Volume) -> Outcome<()> {
    let (client, paint) = (&asker.client, asker.paint);
    let now = Clock::System.wall();
    match command {
        Volume::Create { name, from, size, last_commit, description } => {
            let request =
                CreateVolume { from, size_bytes: size.map(|size| size.0), last_commit, description };
            let reply = client.put(&path(&name), &request).await?;
            asker.show(&reply, |volume: VolumeInfo| {
                let from = volume.from.map(|from| format!(" from {from}")).unwrap_or_default();
                let made = size_of(volume.size_bytes);
                plain(&format!(
                    "Volume {name}: {made}{from}.\nServe it with: blockhouse volume attach {name}\n"
                ))
            })
        }
        Volume::List => {
            let reply = client.get("/volumes").await?;
            asker.show(&reply, |volumes: Vec<VolumeInfo>| list(&volumes, now, paint))
        }
        Volume::Show { name } => {
            let reply = client.get(&path(&name)).await?;
            asker.show(&reply, |volume: VolumeInfo| show(&volume, now, paint))
        }
        Volume::Attach { name } => {
            let reply = client.post(&format!("{}/attach", path(&name)), &json!({})).await?;
            asker.show(&reply, |attachment: Attachment| attached(&attachment, paint))
        }
        Volume::Detach { name, keep_local } => {
            let body = json!({ "keep_local": keep_local });
            client.post(&format!("{}/detach", path(&name)), &body).await?;
            asker.say(&match keep_local {
                true => format!("Volume {name} is detached; what is not in the pool stays on this node."),
                false => format!("Volume {name} is detached; all of it is in the pool."),
            });
            Ok(())
        }
        Volume::Resize { name, size, force } => {
            let body = json!({ "size_bytes": size.0, "force": force });
            let reply = client.post(&format!("{}/resize", path(&name)), &body).await?;
            asker.show(&reply, |volume: VolumeInfo| {
                format!("Volume {name}: {}.\n", size_of(volume.size_bytes))
            })
        }
        Volume::Rollback { snapshot } => {
            let body = json!({ "snapshot": snapshot.number });
            let reply = client.post(&format!("{}/rollback", path(&snapshot.volume)), &body).await?;
            asker.show(&reply, |kept: SnapshotInfo| {
                let (volume, number) = (&snapshot.volume, snapshot.number);
                plain(&format!(
                    "Volume {volume} is as it was at {volume}@{number}; its state before is {}.\n",
                    kept.name
                ))
            })
        }
        Volume::Delete { name, with_snapshots, confirm: yes } => {
            confirm("volume", &name, &yes)?;
            let reply = client.delete(&format!("{}?with_snapshots={with_snapshots}", path(&name))).await?;
            asker.show(&reply, |trash: TrashInfo| deleted(&trash))
        }
        Volume::Undelete { id, name } => {
            let reply =
                client.post(&format!("/trash/{}/undelete", encode(&id)), &json!({ "name": name })).await?;
            asker.show(&reply, |back: Resolved| plain(&format!("The {} {} is back.\n", back.kind, back.name)))
        }
        Volume::Recover { orphan, name } => {
            let path = format!("/orphans/{}/recover", encode(&orphan));
            let reply = client.post(&path, &json!({ "name": name })).await?;
            asker.show(&reply, |volume: VolumeInfo| show(&volume, now, paint))
        }
        Volume::Orphans => {
            let reply = client.get("/orphans").await?;
            asker.show(&reply, |orphans: Vec<OrphanInfo>| list_orphans(&orphans, paint))
        }
        Volume::WaitDurable { name } => {
            let reply = client.post(&format!("{}/wait-durable", path(&name)), &json!({})).await?;
            asker.show(&reply, |durable: Durable| {
                let when = utc(durable.committed);
                let later = match durable.dirty_bytes {
                    0 => String::new(),
                    bytes => format!(" Written since: {}.", size(bytes)),
                };
                format!("The pool has {name} as of {when} UTC.{later}\n")
            })
        }
    }
}

fn path(name: &str) -> String {
    format!("/volumes/{}", encode(name))
}

/// `40 GiB`, and the exact number where that is rounded.
fn size_of(bytes: u64) -> String {
    let short = size(bytes);
    match short.replace(' ', "").parse::<crate::control::size::Size>() {
        Ok(exact) if exact.0 == bytes => short,
        _ => format!("{short} ({bytes} bytes)"),
    }
}

fn dirty(volume: &VolumeInfo) -> String {
    match (volume.dirty_bytes, volume.oldest_dirty_ms) {
        (None, _) => "-".to_owned(),
        (Some(0), _) => "none".to_owned(),
        (Some(bytes), Some(ms)) => format!("{}, {}", size(bytes), duration(Duration::from_millis(ms))),
        (Some(bytes), None) => size(bytes),
    }
}

fn list(volumes: &[VolumeInfo], now: UnixMillis, paint: Paint) -> String {
    if volumes.is_empty() {
        return "There are no volumes. Make one with: blockhouse volume create NAME --size 40G\n".to_owned();
    }
    let header = [
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("STATE", Align::Left),
        ("FROM", Align::Left),
        ("DIRTY", Align::Left),
        ("LAST COMMIT", Align::Left),
        ("SNAPSHOTS", Align::Right),
    ];
    let row = |volume: &VolumeInfo| {
        vec![
            volume.name.clone(),
            size(volume.size_bytes),
            volume.state.clone(),
            volume.from.clone().unwrap_or_else(|| "-".to_owned()),
            dirty(volume),
            volume.last_commit.map_or_else(|| "never".to_owned(), |time| age(time, now)),
            volume.snapshots.len().to_string(),
        ]
    };
    table(&header, &volumes.iter().map(row).collect::<Vec<_>>(), paint)
}

fn show(volume: &VolumeInfo, now: UnixMillis, paint: Paint) -> String {
    let moment = |time: UnixMillis| format!("{} ({} UTC)", age(time, now), utc(time));
    let mut rows = vec![
        ("name", volume.name.clone()),
        ("uid", volume.uid.clone()),
        ("size", size_of(volume.size_bytes)),
        ("state", volume.state.clone()),
    ];
    let optional = [
        ("owner node", volume.owner_node.clone()),
        ("stopped", volume.stopped.clone()),
        ("from", volume.from.clone()),
        ("description", volume.description.clone()),
        ("created", Some(moment(volume.created))),
        ("last commit", Some(volume.last_commit.map_or_else(|| "never".to_owned(), moment))),
        ("dirty", volume.dirty_bytes.map(|_| dirty(volume))),
    ];
    rows.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let mut text = fields(&rows, paint);
    if !volume.snapshots.is_empty() {
        text.push('\n');
        text.push_str(&super::snapshot::list(&volume.snapshots, now, paint));
    }
    text
}

fn attached(attachment: &Attachment, paint: Paint) -> String {
    let mode = if attachment.read_only { ", read-only" } else { "" };
    let name = plain(&attachment.volume);
    let mut text = format!("Volume {name} is attached ({}{mode}).\n\n", size(attachment.size_bytes));
    for uri in &attachment.uris {
        text.push_str(&format!("  {}\n", paint.bold(&plain(uri))));
    }
    text.push_str("\nUse it with one of:\n\n");
    for (what, command) in connect::commands(attachment) {
        text.push_str(&format!("  {:<70}  # {what}\n", plain(&command)));
    }
    text.push_str(&format!("\nGive it up with: blockhouse volume detach {name}\n"));
    text
}

pub(super) fn deleted(trash: &TrashInfo) -> String {
    plain(&format!(
        "The {} {} is deleted. To have it back: blockhouse volume undelete {}\n",
        trash.kind, trash.name, trash.id
    ))
}

fn list_orphans(orphans: &[OrphanInfo], paint: Paint) -> String {
    if orphans.is_empty() {
        return "There is no local data without a history.\n".to_owned();
    }
    let header = [
        ("ID", Align::Left),
        ("VOLUME", Align::Left),
        ("DIRTY", Align::Right),
        ("TERM", Align::Right),
        ("REASON", Align::Left),
    ];
    let row = |orphan: &OrphanInfo| {
        vec![
            orphan.id.clone(),
            orphan.volume.clone(),
            size(orphan.dirty_bytes),
            orphan.term.to_string(),
            orphan.reason.clone(),
        ]
    };
    let rows: Vec<_> = orphans.iter().map(row).collect();
    format!("{}\nMake one a volume with: blockhouse volume recover ID NAME\n", table(&header, &rows, paint))
}
