//! What comes of changes when the network fails: nothing lost, one winner, nothing wrong served.
//!
//! Owns: the suite through random faults, and each fault by itself.
//! Does not own: the faults ([`crate::proxy`]).

use crate::bucket;
use crate::proxy::{FATES, Fate, Proxy};
use crate::suite::{self, Store, WHOLE, body, key, text_of};
use blockhouse::store::s3::{S3Config, S3Store};
use blockhouse::store::{Expect, GetRange, ObjectStore, StoreError};
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An empty pool behind a proxy that passes all; answers are waited for only a little.
async fn pool(seed: u64) -> (S3Store, Proxy, S3Config) {
    let direct = bucket::config().await;
    let proxy = Proxy::start(&bucket::endpoint(), seed).await;
    let answer_time = Duration::from_secs(2);
    let config = S3Config { endpoint: Some(proxy.url.clone()), answer_time, ..direct };
    let store = S3Store::new(&config).await.unwrap();
    store.prove().await.unwrap();
    (store, proxy, config)
}

fn seed() -> u64 {
    let seed = match std::env::var("BLOCKHOUSE_S3_SEED") {
        Ok(seed) => seed.parse().expect("BLOCKHOUSE_S3_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("BLOCKHOUSE_S3_SEED={seed}");
    seed
}

macro_rules! through_faults {
    ($($case:ident,)*) => {
        mod through_faults {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $case() {
                let (store, proxy, _) = super::pool(super::seed()).await;
                let before = proxy.requests();
                proxy.fail(200);
                $crate::suite::$case(std::sync::Arc::new(store)).await;
                assert!(proxy.requests() > before);
            })*
        }
    };
}

// Not those where a change is refused that has no chance, or makes again what was deleted: after a fault it is
// `Unclear`.
through_faults!(
    a_fixed_object_is_made_once,
    an_empty_fixed_object_is_one,
    deleting_a_fixed_object_again_is_fine,
    reads_give_the_range_and_respect_the_cap,
    g1_of_racing_swaps_one_wins_each_round,
    a_counter_loses_no_increment,
    of_racing_creations_one_wins,
    a_listing_has_only_its_folder,
    g6_a_listing_misses_nothing_that_is_swapped_meanwhile,
);

fn is_put(head: &str) -> bool {
    head.starts_with("PUT ")
}

fn is_any(_: &str) -> bool {
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g9_no_fault_of_one_change_makes_it_twice_or_loses_it_or_turns_it_into_a_loss() {
    let (store, proxy, _) = pool(seed()).await;
    let store: Store = Arc::new(store);
    for (number, fate) in FATES.into_iter().enumerate() {
        for fates in [&[fate][..], &[fate, fate], &[fate, Fate::DoTwice], &[Fate::LoseAnswer, fate]] {
            let long_hang = fates.iter().filter(|fate| **fate == Fate::Hang).count() > 1;
            if long_hang {
                continue;
            }
            let name = format!("{number}-{:08x}", rand::random::<u32>());
            let (head, pack) = (key(&format!("volumes/{name}")), key(&format!("packs/{name}")));
            proxy.script(is_put, fates);
            let first = store.swap(&head, Expect::Absent, body("1")).await;
            let first = first.unwrap_or_else(|error| panic!("{fates:?}: {error}"));
            proxy.script(is_put, fates);
            let second = store.swap(&head, Expect::State(first.clone()), body("2")).await;
            let second = second.unwrap_or_else(|error| panic!("{fates:?}: {error}"));
            let there = store.get(&head, WHOLE).await.unwrap();
            assert_eq!((&there.bytes[..], &there.etag), (&b"2"[..], &second), "{fates:?}");
            // What is left of the script: a refused change after a fault is `Unclear`.
            proxy.script(is_put, &[]);
            let stale = store.swap(&head, Expect::State(first), body("x")).await;
            assert!(matches!(stale, Err(StoreError::Conflict(_))), "{fates:?}: {stale:?}");
            proxy.script(is_put, fates);
            store.swap_delete(&head, second).await.unwrap_or_else(|error| panic!("{fates:?}: {error}"));
            assert!(matches!(store.get(&head, WHOLE).await, Err(StoreError::NotFound(_))), "{fates:?}");
            proxy.script(is_put, fates);
            // What an earlier try had made may be what is deleted now: then nobody can tell, and it is asked for again.
            let mut made = store.swap(&head, Expect::Absent, body("3")).await;
            for _ in fates {
                if matches!(made, Err(StoreError::Unclear { .. })) {
                    made = store.swap(&head, Expect::Absent, body("3")).await;
                }
            }
            match made {
                Ok(_) => {}
                // An earlier try of it made it.
                Err(StoreError::Conflict(_)) => assert_eq!(text_of(&store, &head).await, "3", "{fates:?}"),
                Err(error) => panic!("{fates:?}: {error}"),
            }
            assert_eq!(text_of(&store, &head).await, "3", "{fates:?}");

            proxy.script(is_put, fates);
            store.put_new(&pack, body("fixed")).await.unwrap_or_else(|error| panic!("{fates:?}: {error}"));
            proxy.script(is_put, fates);
            let again = store.put_new(&pack, body("other")).await;
            assert!(matches!(again, Err(StoreError::Conflict(_))), "{fates:?}: {again:?}");
            assert_eq!(text_of(&store, &pack).await, "fixed", "{fates:?}");
            proxy.script(is_any, fates);
            store.delete(&pack).await.unwrap_or_else(|error| panic!("{fates:?}: {error}"));
            assert!(matches!(store.get(&pack, WHOLE).await, Err(StoreError::NotFound(_))), "{fates:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_of_a_read_brings_other_bytes() {
    let (store, proxy, _) = pool(seed()).await;
    let at = key("packs/one");
    let content =
        Bytes::from((0..3_000_000u32).map(|n| n.to_le_bytes()[usize::from(n % 3 == 0)]).collect::<Vec<_>>());
    store.put_new(&at, content.clone()).await.unwrap();
    for fate in FATES {
        for (range, wanted) in [
            (WHOLE, &content[..]),
            (GetRange::Span { start: 12_345, len: 1_000_000 }, &content[12_345..1_012_345]),
            (GetRange::Suffix { len: 70_000 }, &content[2_930_000..]),
        ] {
            proxy.script(is_any, &[fate, fate]);
            let object = store.get(&at, range).await.unwrap();
            assert!(object.bytes == wanted, "{fate:?} {range:?}");
            assert!(
                proxy.script_is_over()
                    || fate == Fate::Delay
                    || fate == Fate::DoTwice
                    || fate == Fate::CutAnswer
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g9_an_answer_lost_and_the_object_changed_since_is_unclear_and_no_loss() {
    let (store, proxy, config) = pool(seed()).await;
    let other = S3Store::new(&S3Config { endpoint: Some(bucket::endpoint()), ..config }).await.unwrap();
    other.prove().await.unwrap();
    let at = key("volumes/vm-7");
    let first = store.swap(&at, Expect::Absent, body("1")).await.unwrap();
    // It is done, its answer hangs, and meanwhile another one builds on it.
    proxy.script(is_put, &[Fate::Hang]);
    let (mine, theirs) = tokio::join!(store.swap(&at, Expect::State(first), body("mine")), async {
        let object = loop {
            let object = other.get(&at, WHOLE).await.unwrap();
            if object.bytes == "mine" {
                break object;
            }
        };
        other.swap(&at, Expect::State(object.etag), body("theirs")).await
    });
    theirs.unwrap();
    assert!(matches!(mine, Err(StoreError::Unclear { .. })), "{mine:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g9_a_change_that_was_certainly_not_made_says_so() {
    let (store, proxy, config) = pool(seed()).await;
    drop(proxy);
    let at = key("volumes/vm-7");
    let refused = store.swap(&at, Expect::Absent, body("1")).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "nobody listens there: {refused:?}");
    let direct = S3Store::new(&S3Config { endpoint: Some(bucket::endpoint()), ..config }).await.unwrap();
    assert!(matches!(direct.get(&at, WHOLE).await, Err(StoreError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_is_left_alone_and_found_again() {
    let (store, proxy, _) = pool(seed()).await;
    let at = key("volumes/vm-7");
    store.swap(&at, Expect::Absent, body("1")).await.unwrap();
    proxy.set_away(true);
    assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::Unavailable { .. })));
    // Known to be away: no answer takes long any more, whoever asks.
    let started = Instant::now();
    let mut quick = 0;
    for _ in 0..50 {
        let asked = Instant::now();
        assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::Unavailable { .. })));
        quick += u32::from(asked.elapsed() < Duration::from_millis(5));
    }
    assert!(quick >= 40 && started.elapsed() < Duration::from_secs(30), "{quick} of 50");
    proxy.set_away(false);
    let back = Instant::now();
    while store.get(&at, WHOLE).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(back.elapsed() < Duration::from_secs(8), "found after {:?}", back.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_large_object_goes_in_parts_through_faults_and_leaves_none() {
    let (store, proxy, config) = pool(seed()).await;
    let at = key("packs/large");
    let content = Bytes::from(
        (0..(65 << 20)).map(|n: u32| n.to_le_bytes()[0] ^ n.to_le_bytes()[2]).collect::<Vec<_>>(),
    );
    proxy.fail(150);
    store.put_new(&at, content.clone()).await.unwrap();
    let again = store.put_new(&at, content.clone()).await;
    assert!(matches!(again, Err(StoreError::Conflict(_))), "{again:?}");
    let object = store.get(&at, WHOLE).await.unwrap();
    assert!(object.bytes == content && object.object_bytes == 65 << 20);
    proxy.fail(0);
    // Whoever asks goes away in the middle of it.
    let gone = key("packs/gone");
    let task = tokio::spawn({
        let store = store.clone();
        async move { store.put_new(&gone, content).await }
    });
    let before = proxy.requests();
    while proxy.requests() < before + 2 {
        tokio::task::yield_now().await;
    }
    task.abort();
    let left = async {
        while bucket::names("pools", &config.address.prefix).await.iter().any(|name| name.ends_with("gone")) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), left).await.expect("parts are removed");
    // One whose beginning was not answered holds nothing, and goes with the sweep of a later start.
    let uploads = bucket::uploads("pools", &config.address.prefix).await;
    assert!(uploads.iter().all(|(name, parts)| name.ends_with("large") && *parts == 0), "{uploads:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_deletes_share_requests() {
    let (store, proxy, _) = pool(seed()).await;
    let keys: Vec<_> = (0..200).map(|n| key(&format!("packs/{n:03}"))).collect();
    for at in &keys {
        store.put_new(at, Bytes::new()).await.unwrap();
    }
    let before = proxy.requests();
    futures::future::join_all(keys.iter().map(|at| store.delete(at)))
        .await
        .into_iter()
        .for_each(|done| done.unwrap());
    let requests = proxy.requests() - before;
    assert!(requests <= 20, "{requests} requests for 200 objects");
    assert!(suite::keys_in(&(Arc::new(store) as Store), "packs", 1000).await.is_empty());
}
