//! Whole nodes on a directory pool and the machine's own disk.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

mod node_place;

use blockhouse::clock::Clock;
use blockhouse::node::Node;
use blockhouse::node::service::{Done, Refusal, Service};
use blockhouse::store::dir::{DirConfig, DirStore};
use blockhouse::store::memory::MemoryStore;
use blockhouse::store::{Expect, GetRange, ObjectStore};
use blockhouse::volume::head::{Head, SmallObject, TermEnd, keys};
use blockhouse::volume::ids::Nonce;
use futures::StreamExt;
use node_place::{
    Failing, Failure, MIB, Place, create_attached, empty, fork, holds, import, kill, open, read, stop, write,
};
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_written_snapshotted_forked_and_read_back() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(64 * MIB)).await;
    write(&node, "vm-1", 4096, 7, 100_000).await;
    let snapshot = node.create_snapshot("vm-1", Some("first".into())).await.unwrap();
    assert_eq!((snapshot.number, snapshot.name.as_str()), (1, "vm-1@1"));
    write(&node, "vm-1", 4096, 8, 512).await;
    create_attached(&node, "vm-2", fork("snapshot:vm-1@1")).await;
    assert!(holds(&node, "vm-2", 4096, 7, 100_000).await);
    assert!(holds(&node, "vm-1", 4096, 8, 512).await);
    assert!(holds(&node, "vm-1@1", 4096, 7, 100_000).await);
    assert!(holds(&node, "vm-1", 0, 0, 4096).await);
    let info = node.volume("vm-1").await.unwrap();
    assert_eq!((info.state.as_str(), info.snapshots.len()), ("attached", 1));
    assert_eq!(node.volume("vm-2").await.unwrap().from.as_deref(), Some("snapshot:vm-1@1"));
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_after_a_kill_and_what_was_attached_is_served() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 7, 4096).await;
    kill(node).await;
    let node = place.start("a").await;
    assert!(holds(&node, "vm-1", 0, 7, 4096).await);
    node.wait_durable("vm-1").await.unwrap();
    node.detach("vm-1", false).await.unwrap();
    stop(node).await;
    let node = place.start("a").await;
    assert!(node.attachments().await.unwrap().is_empty());
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_state_directory_finds_everything_by_its_name() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 7, 4096).await;
    node.create_snapshot("vm-1", None).await.unwrap();
    import(&node, "debian", vec![3; 300_000]).await.unwrap();
    node.detach("vm-1", false).await.unwrap();
    stop(node).await;
    let other = place.start("b").await;
    let names: Vec<String> = other.volumes().await.unwrap().into_iter().map(|volume| volume.name).collect();
    assert_eq!(names, ["vm-1"]);
    other.attach("vm-1").await.unwrap();
    assert!(holds(&other, "vm-1", 0, 7, 4096).await);
    assert!(holds(&other, "vm-1@1", 0, 7, 4096).await);
    assert!(holds(&other, "debian", 0, 3, 300_000).await);
    stop(other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g8_a_volume_made_anew_has_nothing_of_the_one_before() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 7, 4096).await;
    node.create_snapshot("vm-1", None).await.unwrap();
    node.detach("vm-1", false).await.unwrap();
    assert_eq!(node.delete_volume("vm-1", false).await.unwrap_err().refusal, Refusal::Conflict);
    node.delete_volume("vm-1", true).await.unwrap();
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    assert!(holds(&node, "vm-1", 0, 0, 4096).await);
    assert!(node.exports().open("vm-1@1").await.is_err());
    assert_eq!(node.volume("vm-1").await.unwrap().snapshots.len(), 0);
    // Its local writes of another uid are not replayed either.
    write(&node, "vm-1", 0, 9, 4096).await;
    node.detach("vm-1", true).await.unwrap();
    node.attach("vm-1").await.unwrap();
    assert!(holds(&node, "vm-1", 0, 9, 4096).await);
    node.detach("vm-1", false).await.unwrap();
    node.delete_volume("vm-1", false).await.unwrap();
    let back = node.undelete("vm-1", Some("vm-old")).await.unwrap();
    node.attach("vm-old").await.unwrap();
    assert!(holds(&node, "vm-old", 0, 9, 4096).await);
    assert_eq!(
        node.undelete(&node.trash().await.unwrap()[0].id, Some("twice")).await.unwrap_err().refusal,
        Refusal::Conflict
    );
    assert_eq!(back.name, "vm-old");
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g11_detach_with_local_writes_kept_gives_nothing_away() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 7, 4096).await;
    node.detach("vm-1", true).await.unwrap();
    assert!(node.exports().open("vm-1").await.is_err());
    for refused in [
        node.delete_volume("vm-1", true).await.map(drop),
        node.rollback("vm-1", 1).await.map(drop),
        node.create_volume("vm-2", fork("volume:vm-1")).await.map(drop),
        node.create_snapshot("vm-1", None).await.map(drop),
        node.resize_volume("vm-1", 32 * MIB, false).await.map(drop),
    ] {
        assert_eq!(refused.unwrap_err().refusal, Refusal::Conflict);
    }
    let other = place.start("b").await;
    assert_eq!(other.attach("vm-1").await.unwrap_err().refusal, Refusal::Conflict);
    assert_eq!(other.volume("vm-1").await.unwrap().state, "elsewhere");
    stop(other).await;
    node.attach("vm-1").await.unwrap();
    assert!(holds(&node, "vm-1", 0, 7, 4096).await);
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g12_a_fork_of_an_attached_volume_has_its_newest_writes() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 8192, 7, 4096).await;
    create_attached(&node, "vm-2", fork("volume:vm-1")).await;
    write(&node, "vm-1", 8192, 8, 4096).await;
    assert!(holds(&node, "vm-2", 8192, 7, 4096).await);
    let again = node.create_volume("vm-2", fork("volume:vm-1")).await.unwrap();
    assert!(matches!(again, Done::Already(_)));
    node.detach("vm-1", false).await.unwrap();
    create_attached(&node, "vm-3", fork("volume:vm-1")).await;
    assert!(holds(&node, "vm-3", 8192, 8, 4096).await);
    assert!(node.trash().await.unwrap().is_empty());
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g26_what_was_written_before_a_rollback_is_not_replayed_on_it() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 1, 4096).await;
    node.create_snapshot("vm-1", None).await.unwrap();
    write(&node, "vm-1", 0, 2, 4096).await;
    node.detach("vm-1", false).await.unwrap();
    let kept = node.rollback("vm-1", 1).await.unwrap();
    assert_eq!(kept.number, 2);
    kill(node).await;
    let node = place.start("a").await;
    node.attach("vm-1").await.unwrap();
    assert!(holds(&node, "vm-1", 0, 1, 4096).await);
    assert!(holds(&node, "vm-1@2", 0, 2, 4096).await);
    assert_eq!(node.rollback("vm-1", 2).await.unwrap_err().refusal, Refusal::Conflict);
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_and_another_pool_are_refused() {
    let place = Place::new();
    let node = place.start("a").await;
    let second = Node::start(place.config("a")).await.err().unwrap();
    assert!(second.to_string().contains(&std::process::id().to_string()), "{second}");
    stop(node).await;
    let other = Node::start(place.config_on("other", "b")).await.unwrap();
    let (own, id) = (place.config("a"), other.node().await.unwrap().pool_id);
    stop(other).await;
    let wrong = Node::start(place.config_on("other", "a")).await.err().unwrap().to_string();
    assert!(wrong.contains(&id), "{wrong}");
    let node = Node::start(own).await.unwrap();
    assert!(wrong.contains(&node.node().await.unwrap().pool_id), "{wrong}");
    stop(node).await;
    let gone = Node::start(place.config_on("not-mounted", "a")).await;
    assert!(gone.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_sizes_and_names_are_refused_with_the_reason() {
    let place = Place::new();
    let node = place.start("a").await;
    import(&node, "debian", vec![3; 300_000]).await.unwrap();
    let mut small = fork("image:debian");
    small.size_bytes = Some(299_008);
    let refused = node.create_volume("vm-1", small).await.unwrap_err();
    assert_eq!(refused.refusal, Refusal::Invalid);
    assert!(refused.message.contains("does not fit"), "{refused}");
    for (name, size) in [("-vm", 512), ("a/b", 512), ("vm", 0), ("vm", 513), ("vm", u64::MAX - 511)] {
        let refused = node.create_volume(name, empty(size)).await.unwrap_err();
        assert_eq!(refused.refusal, Refusal::Invalid, "{name} {size}");
    }
    for missing in ["image:none", "volume:none", "snapshot:none@1"] {
        assert_eq!(node.create_volume("vm", fork(missing)).await.unwrap_err().refusal, Refusal::NotFound);
    }
    assert!(node.volumes().await.unwrap().is_empty());
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_out_as_it_went_in_and_can_be_forked_larger() {
    let place = Place::new();
    let node = place.start("a").await;
    let mut content = vec![0; 5_000_000];
    content.iter_mut().enumerate().filter(|(at, _)| at / 200_000 % 3 == 1).for_each(|(at, byte)| {
        *byte = u8::try_from(at * 31 % 251).unwrap();
    });
    import(&node, "debian", content.clone()).await.unwrap();
    assert_eq!(import(&node, "debian", content.clone()).await.unwrap_err().refusal, Refusal::Conflict);
    let export = node.export_image("debian").await.unwrap();
    let parts: Vec<_> = export.bytes.map(|part| part.unwrap()).collect().await;
    let mut out = parts.concat();
    assert_eq!(export.size_bytes, 5_000_192);
    out.truncate(content.len());
    assert!(out == content);
    let mut larger = fork("image:debian");
    larger.size_bytes = Some(8 * MIB);
    create_attached(&node, "vm-1", larger).await;
    let vm = open(&node, "vm-1").await;
    assert!(read(&*vm.handler, 0, 5_000_000).await == content);
    assert!(holds(&node, "vm-1", 5_000_000, 0, 8 * MIB - 5_000_000).await);
    drop(vm);
    node.delete_image("debian").await.unwrap();
    assert_eq!(
        node.create_volume("vm-2", fork("image:debian")).await.unwrap_err().refusal,
        Refusal::NotFound
    );
    node.undelete("debian", None).await.unwrap();
    node.create_volume("vm-2", fork("image:debian")).await.unwrap();
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_and_shrinks_attached_and_detached() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(4 * MIB)).await;
    node.resize_volume("vm-1", 8 * MIB, false).await.unwrap();
    write(&node, "vm-1", 6 * MIB, 5, 4096).await;
    assert_eq!(node.resize_volume("vm-1", 5 * MIB, false).await.unwrap_err().refusal, Refusal::Invalid);
    node.detach("vm-1", false).await.unwrap();
    node.resize_volume("vm-1", 5 * MIB, true).await.unwrap();
    assert_eq!(node.volume("vm-1").await.unwrap().state, "detached");
    let info = node.resize_volume("vm-1", 8 * MIB, false).await.unwrap();
    assert_eq!(info.size_bytes, 8 * MIB);
    node.attach("vm-1").await.unwrap();
    assert!(holds(&node, "vm-1", 4 * MIB, 0, 4 * MIB).await);
    stop(node).await;
}

async fn on_failing_store(place: &Place) -> (Arc<Node>, Arc<Failing<MemoryStore>>) {
    let store = Failing::new(MemoryStore::new(Clock::System));
    let opened: Arc<dyn ObjectStore> = store.clone();
    let mut config = place.config("a");
    config.engine.pool_wait = std::time::Duration::from_millis(60);
    let node = Node::start_with(config, |_| async move { Ok(opened) }).await.unwrap();
    (node, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn g20_a_create_that_fails_at_any_step_leaves_the_name_free_and_the_retry_creates() {
    let place = Place::new();
    let (node, store) = on_failing_store(&place).await;
    import(&node, "debian", vec![3; 300_000]).await.unwrap();
    node.create_volume("base", empty(MIB)).await.unwrap();
    node.create_snapshot("base", None).await.unwrap();
    let sources = [None, Some("image:debian"), Some("snapshot:base@1"), Some("volume:base")];
    for (at, source) in sources.into_iter().enumerate() {
        for failure in [Failure::Before, Failure::After] {
            for nth in 0.. {
                let name = format!("vm-{at}-{nth}-{failure:?}");
                let request = source.map_or_else(|| empty(MIB), fork);
                store.fail(nth, failure);
                let answer = node.create_volume(&name, request.clone()).await;
                let calls = store.heal();
                match answer {
                    Ok(_) => {
                        assert!(calls <= nth, "it succeeded though call {nth} failed");
                        break;
                    }
                    Err(error) if error.refusal == Refusal::Unavailable => {
                        assert_eq!(
                            node.volume(&name).await.unwrap_err().refusal,
                            Refusal::NotFound,
                            "{error}"
                        );
                        let again = node.create_volume(&name, request).await.unwrap();
                        assert!(matches!(again, Done::Now(_)));
                    }
                    Err(error) => {
                        assert_eq!(error.refusal, Refusal::Unclear, "{error}");
                        node.create_volume(&name, request).await.unwrap();
                    }
                }
            }
        }
    }
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g20_an_import_whose_source_breaks_off_leaves_the_name_free() {
    let place = Place::new();
    let node = place.start("a").await;
    let parts = vec![
        Ok(bytes::Bytes::from(vec![5; 300_000])),
        Err(std::io::Error::new(std::io::ErrorKind::ConnectionReset, "the client left")),
    ];
    let bytes = futures::stream::iter(parts).boxed();
    let source = blockhouse::node::service::ImageSource::Stream { bytes, total_bytes: None };
    node.import_image("debian", source, None).await.unwrap_err();
    assert_eq!(node.image("debian").await.unwrap_err().refusal, Refusal::NotFound);
    assert_eq!(node.jobs().await.unwrap()[0].state, "failed");
    import(&node, "debian", vec![5; 300_000]).await.unwrap();
    assert!(holds(&node, "debian", 0, 5, 300_000).await);
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_go_on_through_single_failures_of_the_pool() {
    let place = Place::new();
    let (node, store) = on_failing_store(&place).await;
    for failure in [Failure::Before, Failure::After] {
        for nth in 0..40 {
            let name = format!("vm-{failure:?}-{nth}");
            store.fail_once(nth, failure);
            create_attached(&node, &name, empty(MIB)).await;
            write(&node, &name, 0, 7, 4096).await;
            node.create_snapshot(&name, None).await.unwrap();
            node.detach(&name, false).await.unwrap();
            node.rollback(&name, 1).await.unwrap();
            node.delete_volume(&name, true).await.unwrap();
            let calls = store.heal();
            assert_eq!(node.volume(&name).await.unwrap_err().refusal, Refusal::NotFound);
            if calls <= nth {
                break;
            }
        }
    }
    assert!(node.volumes().await.unwrap().is_empty());
    stop(node).await;
}

/// Changes a head in the pool, as a node that takes the volume over and gives it back does.
async fn take_over(place: &Place, name: &str) {
    let store = DirStore::open(place.config("a").pool_dir, DirConfig::default()).await.unwrap();
    let key = keys::volume(name);
    let found = store.get(&key, GetRange::Whole { max_bytes: 65_536 }).await.unwrap();
    let mut head = Head::decode(&found.bytes).unwrap();
    head.nonce = Nonce([9; 16]);
    head.begin_term(None, TermEnd::Taken);
    store.swap(&key, Expect::State(found.etag), head.encode()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn g1_writes_of_a_lost_volume_are_listed_and_become_a_volume_of_their_own() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 1, 300_000).await;
    node.wait_durable("vm-1").await.unwrap();
    write(&node, "vm-1", 4096, 2, 4096).await;
    assert!(node.orphans().await.unwrap().is_empty());
    kill(node).await;
    take_over(&place, "vm-1").await;
    let node = place.start("a").await;
    // Served again, as the history has it, beside the writes that it does not have.
    assert!(holds(&node, "vm-1", 0, 1, 300_000).await);
    write(&node, "vm-1", 0, 3, 4096).await;
    node.wait_durable("vm-1").await.unwrap();
    let orphans = node.orphans().await.unwrap();
    assert_eq!((orphans.len(), orphans[0].volume.as_str(), orphans[0].dirty_bytes), (1, "vm-1", 4096));
    node.detach("vm-1", false).await.unwrap();
    assert_eq!(node.orphans().await.unwrap()[0].id, orphans[0].id);
    assert_eq!(node.recover(&orphans[0].id, "vm-1").await.unwrap_err().refusal, Refusal::Conflict);
    node.recover(&orphans[0].id, "vm-1-lost").await.unwrap();
    node.attach("vm-1-lost").await.unwrap();
    assert!(holds(&node, "vm-1-lost", 0, 1, 4096).await);
    assert!(holds(&node, "vm-1-lost", 4096, 2, 4096).await);
    assert!(holds(&node, "vm-1-lost", 8192, 1, 290_000).await);
    assert!(node.orphans().await.unwrap().is_empty());
    stop(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_recovered_stays_in_the_table_and_is_told() {
    let place = Place::new();
    let node = place.start("a").await;
    create_attached(&node, "vm-1", empty(16 * MIB)).await;
    create_attached(&node, "vm-2", empty(16 * MIB)).await;
    write(&node, "vm-1", 0, 1, 4096).await;
    kill(node).await;
    let epochs = place.config("a").state_dir.join("volumes");
    let uid = {
        let node = place.start("a").await;
        let uid = node.volume("vm-1").await.unwrap().uid;
        kill(node).await;
        uid
    };
    for file in std::fs::read_dir(epochs.join(uid)).unwrap().map(|file| file.unwrap().path()) {
        if file.file_name().unwrap().to_string_lossy().starts_with("epoch-") {
            let damaged = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
            std::os::unix::fs::FileExt::write_at(&damaged, b"damage", 20).unwrap();
        }
    }
    let node = place.start("a").await;
    assert_eq!(node.volume("vm-1").await.unwrap().state, "stopped");
    assert_eq!(node.volume("vm-2").await.unwrap().state, "attached");
    assert!(node.exports().open("vm-1").await.is_err());
    assert!(node.doctor().await.unwrap().iter().any(|finding| finding.what == "volume vm-1"));
    assert_eq!(node.attach("vm-1").await.unwrap_err().refusal, Refusal::Corrupt);
    kill(node).await;
    let node = place.start("a").await;
    assert_eq!(node.volume("vm-1").await.unwrap().state, "stopped");
    stop(node).await;
}
