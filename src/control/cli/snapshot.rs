//! `blockhouse snapshot …`

use super::args::Snapshot;
use super::client::{Outcome, encode};
use super::{Asker, confirm};
use crate::clock::{Clock, UnixMillis};
use crate::control::text::{Align, Paint, age, plain, size, table};
use crate::node::service::SnapshotInfo;
use serde_json::json;

pub(super) async fn run(asker: &Asker, command: Snapshot) -> Outcome<()> {
    let client = &asker.client;
    match command {
        Snapshot::Create { volume, description } => {
            let path = format!("/volumes/{}/snapshots", encode(&volume));
            let reply = client.post(&path, &json!({ "description": description })).await?;
            asker.show(&reply, |snapshot: SnapshotInfo| {
                let name = snapshot.name;
                plain(&format!(
                    "Snapshot {name}.\nMake a volume of it with: blockhouse volume create NAME --from snapshot:{name}\n"
                ))
            })
        }
        Snapshot::List { volume } => {
            let filter = volume.map(|volume| format!("?volume={}", encode(&volume))).unwrap_or_default();
            let reply = client.get(&format!("/snapshots{filter}")).await?;
            asker.show(&reply, |snapshots: Vec<SnapshotInfo>| {
                if snapshots.is_empty() {
                    return "There are no snapshots. Take one with: blockhouse snapshot create VOLUME\n"
                        .to_owned();
                }
                list(&snapshots, Clock::System.wall(), asker.paint)
            })
        }
        Snapshot::Delete { snapshot, confirm: yes } => {
            let name = format!("{}@{}", snapshot.volume, snapshot.number);
            confirm("snapshot", &name, &yes)?;
            let path = format!("/volumes/{}/snapshots/{}", encode(&snapshot.volume), snapshot.number);
            client.delete(&path).await?;
            asker.say(&format!("Snapshot {name} is deleted."));
            Ok(())
        }
    }
}

pub(super) fn list(snapshots: &[SnapshotInfo], now: UnixMillis, paint: Paint) -> String {
    let header = [
        ("SNAPSHOT", Align::Left),
        ("SIZE", Align::Right),
        ("CREATED", Align::Left),
        ("DESCRIPTION", Align::Left),
    ];
    let row = |snapshot: &SnapshotInfo| {
        vec![
            snapshot.name.clone(),
            size(snapshot.size_bytes),
            age(snapshot.created, now),
            snapshot.description.clone().unwrap_or_default(),
        ]
    };
    table(&header, &snapshots.iter().map(row).collect::<Vec<_>>(), paint)
}
