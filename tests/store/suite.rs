//! What every store promises. A store passes by handing a maker of empty pools to [`run_all`].

use blockhouse::store::{ETag, Expect, GetRange, Key, ObjectStore, Page, StoreError};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub type Store = Arc<dyn ObjectStore>;

pub const WHOLE: GetRange = GetRange::Whole { max_bytes: 1 << 30 };

pub fn key(text: &str) -> Key {
    Key::new(text).expect("a good key")
}

pub fn body(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub async fn text_of(store: &Store, at: &Key) -> String {
    let object = store.get(at, WHOLE).await.expect("it is there");
    String::from_utf8(object.bytes.to_vec()).expect("text")
}

/// Generates a test of each promise for a store. `$make` makes an empty pool, and what keeps it alive.
#[macro_export]
macro_rules! suite {
    ($name:ident, $make:expr) => {
        mod $name {
            use $crate::suite;
            suite!(@ $make,
                a_fixed_object_is_made_once,
                an_empty_fixed_object_is_one,
                deleting_a_fixed_object_again_is_fine,
                g8_a_swap_needs_the_state_it_expects,
                g8_a_state_made_again_byte_for_byte_is_another_state,
                an_empty_swap_is_refused,
                reads_give_the_range_and_respect_the_cap,
                g1_of_racing_swaps_one_wins_each_round,
                a_counter_loses_no_increment,
                of_racing_creations_one_wins,
                a_listing_is_in_key_order_and_paged,
                a_listing_has_only_its_folder,
                dates_do_not_run_ahead_of_the_clock,
                g6_a_listing_misses_nothing_that_is_swapped_meanwhile,
            );
        }
    };
    (@ $make:expr, $($case:ident,)*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        async fn $case() {
            let (store, _keep) = $make.await;
            suite::$case(store).await;
        })*
    };
}

pub async fn a_fixed_object_is_made_once(store: Store) {
    let at = key("packs/one");
    assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::NotFound(missing)) if missing == at));
    store.put_new(&at, body("first")).await.expect("made");
    for again in ["second", "first"] {
        assert!(matches!(store.put_new(&at, body(again)).await, Err(StoreError::Conflict(_))));
    }
    assert_eq!(text_of(&store, &at).await, "first");
}

pub async fn an_empty_fixed_object_is_one(store: Store) {
    let at = key("packs/empty");
    store.put_new(&at, Bytes::new()).await.expect("made");
    assert_eq!(store.get(&at, WHOLE).await.expect("there").object_bytes, 0);
    assert!(matches!(store.put_new(&at, body("x")).await, Err(StoreError::Conflict(_))));
    assert_eq!(store.list("packs", None, 10).await.expect("listed").objects.len(), 1);
}

pub async fn deleting_a_fixed_object_again_is_fine(store: Store) {
    let at = key("packs/one");
    store.delete(&at).await.expect("nothing there, not even the folder");
    store.put_new(&at, body("x")).await.expect("made");
    for _ in 0..2 {
        store.delete(&at).await.expect("deleted");
        assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::NotFound(_))));
    }
    assert!(store.list("packs", None, 10).await.expect("listed").objects.is_empty());
}

pub async fn g8_a_swap_needs_the_state_it_expects(store: Store) {
    let at = key("volumes/vm-7");
    let bogus = [ETag("".into()), ETag("1".into()), ETag("0-0".into()), ETag("\u{0}../x".into())];
    for etag in &bogus {
        let refused = store.swap(&at, Expect::State(etag.clone()), body("x")).await;
        assert!(matches!(refused, Err(StoreError::Conflict(_))), "nothing is there: {refused:?}");
        assert!(matches!(store.swap_delete(&at, etag.clone()).await, Err(StoreError::Conflict(_))));
    }
    assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::NotFound(_))));

    let first = store.swap(&at, Expect::Absent, body("1")).await.expect("made");
    assert!(matches!(store.swap(&at, Expect::Absent, body("x")).await, Err(StoreError::Conflict(_))));
    let read = store.get(&at, WHOLE).await.expect("there");
    assert_eq!((read.etag.clone(), &read.bytes[..], read.object_bytes), (first.clone(), &b"1"[..], 1));

    let second = store.swap(&at, Expect::State(first.clone()), body("2")).await.expect("swapped");
    for stale in bogus.iter().chain([&first]) {
        let refused = store.swap(&at, Expect::State(stale.clone()), body("x")).await;
        assert!(matches!(refused, Err(StoreError::Conflict(_))), "{stale:?} is not current: {refused:?}");
        assert!(matches!(store.swap_delete(&at, stale.clone()).await, Err(StoreError::Conflict(_))));
    }
    assert_eq!(text_of(&store, &at).await, "2");

    store.swap_delete(&at, second.clone()).await.expect("deleted");
    assert!(matches!(store.get(&at, WHOLE).await, Err(StoreError::NotFound(_))));
    assert!(store.list("volumes", None, 10).await.expect("listed").objects.is_empty());
    assert!(matches!(store.swap_delete(&at, second.clone()).await, Err(StoreError::Conflict(_))));
    assert!(matches!(store.swap(&at, Expect::State(second), body("x")).await, Err(StoreError::Conflict(_))));
    store.swap(&at, Expect::Absent, body("3")).await.expect("made again");
    assert_eq!(text_of(&store, &at).await, "3");
}

pub async fn g8_a_state_made_again_byte_for_byte_is_another_state(store: Store) {
    let at = key("volumes/vm-7");
    let mut seen = BTreeSet::new();
    for _ in 0..5 {
        let made = store.swap(&at, Expect::Absent, body("same")).await.expect("made");
        assert!(seen.insert(made.0.clone()), "the state of an earlier life: {made:?}");
        let swapped = store.swap(&at, Expect::State(made), body("same")).await.expect("swapped");
        assert!(seen.insert(swapped.0.clone()), "the state before: {swapped:?}");
        store.swap_delete(&at, swapped).await.expect("deleted");
    }
}

pub async fn an_empty_swap_is_refused(store: Store) {
    let at = key("volumes/vm-7");
    assert!(matches!(store.swap(&at, Expect::Absent, Bytes::new()).await, Err(StoreError::Invalid { .. })));
    let etag = store.swap(&at, Expect::Absent, body("x")).await.expect("made");
    let refused = store.swap(&at, Expect::State(etag), Bytes::new()).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })));
    assert_eq!(text_of(&store, &at).await, "x");
}

pub async fn reads_give_the_range_and_respect_the_cap(store: Store) {
    let (fixed, swapped) = (key("packs/one"), key("volumes/one"));
    store.put_new(&fixed, body("0123456789")).await.expect("made");
    store.swap(&swapped, Expect::Absent, body("0123456789")).await.expect("made");
    for at in [fixed, swapped] {
        let read = async |range| {
            store.get(&at, range).await.map(|object| {
                assert_eq!(object.object_bytes, 10, "size of the whole object");
                object.bytes
            })
        };
        let span = |start, len| GetRange::Span { start, len };
        assert_eq!(read(GetRange::Whole { max_bytes: 10 }).await.expect("fits"), "0123456789");
        assert_eq!(read(span(3, 4)).await.expect("inside"), "3456");
        assert_eq!(read(span(0, 10)).await.expect("all"), "0123456789");
        assert_eq!(read(span(10, 0)).await.expect("nothing"), "");
        assert_eq!(read(GetRange::Suffix { len: 3 }).await.expect("the end"), "789");
        assert_eq!(read(GetRange::Suffix { len: 0 }).await.expect("nothing"), "");
        assert_eq!(read(GetRange::Suffix { len: u64::MAX }).await.expect("all"), "0123456789");
        let bad =
            [GetRange::Whole { max_bytes: 9 }, span(7, 4), span(11, 0), span(1, u64::MAX), span(u64::MAX, 1)];
        for range in bad {
            assert!(matches!(read(range).await, Err(StoreError::Invalid { .. })), "{at} {range:?}");
        }
    }
}

pub async fn g1_of_racing_swaps_one_wins_each_round(store: Store) {
    let at = key("volumes/vm-7");
    let mut etag = store.swap(&at, Expect::Absent, body("start")).await.expect("made");
    for round in 0..25 {
        let mut racers = tokio::task::JoinSet::new();
        for racer in 0..8 {
            let (store, at, etag) = (store.clone(), at.clone(), etag.clone());
            racers.spawn(async move {
                let content = format!("{round}.{racer}");
                (content.clone(), store.swap(&at, Expect::State(etag), body(&content)).await)
            });
        }
        let results = racers.join_all().await;
        let object = store.get(&at, WHOLE).await.expect("there");
        for (content, result) in results {
            let is_current = object.bytes == content;
            match result {
                Ok(won) => assert!(is_current && won == object.etag, "{content} won and is not there"),
                Err(StoreError::Conflict(_)) => assert!(!is_current, "{content} lost and is there"),
                Err(StoreError::Unclear { .. }) => {}
                Err(other) => panic!("{content}: {other}"),
            }
        }
        assert_ne!(object.etag, etag, "round {round}: somebody wins");
        etag = object.etag;
    }
}

/// Adds one and returns the count that is certainly this call's. The content is `count who.try`. An unclear swap that
/// others built upon before it is read here leaves a count that is nobody's: none is lost, and none is given twice.
pub async fn increment(store: &Store, at: &Key, who: &str) -> u64 {
    let mut unclear = Vec::new();
    for attempt in 0.. {
        let (count, expect) = match store.get(at, WHOLE).await {
            Ok(object) => {
                let text = String::from_utf8(object.bytes.to_vec()).expect("text");
                let (count, by) = text.split_once(' ').expect("count and name");
                if unclear.iter().any(|mine| mine == by) {
                    return count.parse().expect("a count");
                }
                (count.parse::<u64>().expect("a count"), Expect::State(object.etag))
            }
            Err(StoreError::NotFound(_)) => (0, Expect::Absent),
            Err(other) => panic!("{other}"),
        };
        let mine = format!("{who}.{attempt}");
        match store.swap(at, expect, body(&format!("{} {mine}", count + 1))).await {
            Ok(_) => return count + 1,
            Err(StoreError::Conflict(_)) => {}
            Err(StoreError::Unclear { .. }) => unclear.push(mine),
            Err(other) => panic!("{other}"),
        }
    }
    unreachable!()
}

pub async fn a_counter_loses_no_increment(store: Store) {
    let at = key("nodes/counter");
    let mut tasks = tokio::task::JoinSet::new();
    for who in 0..8 {
        let (store, at) = (store.clone(), at.clone());
        tasks.spawn(async move {
            let mut counts = Vec::new();
            for n in 0..25 {
                counts.push(increment(&store, &at, &format!("{who}.{n}")).await);
            }
            counts
        });
    }
    let counts: Vec<u64> = tasks.join_all().await.into_iter().flatten().collect();
    let distinct: BTreeSet<u64> = counts.iter().copied().collect();
    assert_eq!(distinct.len(), counts.len(), "a count was given twice: an increment was lost");
    let last: u64 =
        text_of(&store, &at).await.split_once(' ').expect("count and name").0.parse().expect("a count");
    assert!(last >= 200 && distinct.last() <= Some(&last), "{last}");
}

pub async fn of_racing_creations_one_wins(store: Store) {
    for round in 0..10 {
        let (swapped, fixed) = (key(&format!("volumes/v{round}")), key(&format!("packs/p{round}")));
        let mut racers = tokio::task::JoinSet::new();
        for racer in 0..8 {
            let (store, swapped, fixed) = (store.clone(), swapped.clone(), fixed.clone());
            racers.spawn(async move {
                let content = racer.to_string();
                let made = store.swap(&swapped, Expect::Absent, body(&content)).await;
                let put = store.put_new(&fixed, body(&content)).await;
                (content, made, put)
            });
        }
        let results = racers.join_all().await;
        let (is_swapped, is_fixed) = (text_of(&store, &swapped).await, text_of(&store, &fixed).await);
        for (content, made, put) in results {
            match made {
                Ok(_) => assert_eq!(content, is_swapped),
                Err(StoreError::Conflict(_)) => assert_ne!(content, is_swapped),
                Err(StoreError::Unclear { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            match put {
                Ok(()) => assert_eq!(content, is_fixed),
                Err(StoreError::Conflict(_)) => assert_ne!(content, is_fixed),
                Err(other) => panic!("{other}"),
            }
        }
    }
}

/// All keys of a folder, by pages of that size.
pub async fn keys_in(store: &Store, folder: &str, page_max: usize) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    let mut after = None;
    loop {
        let Page { objects, more } = store.list(folder, after.as_ref(), page_max).await.expect("listed");
        assert!(objects.len() <= page_max && (!more || !objects.is_empty()));
        keys.extend(objects.iter().map(|listed| listed.key.to_string()));
        if !more {
            return keys;
        }
        after = objects.last().map(|listed| listed.key.clone());
    }
}

pub async fn a_listing_is_in_key_order_and_paged(store: Store) {
    let fixed = ["f/a-b", "f/a.b", "f/a/x", "f/a/y/z", "f/a/y-z", "f/a0", "f/b", "f/Z", "f/_/q", "f/a/y.z/w"];
    let swapped = ["f/a", "f/a/yy", "f/c", "f/b-", "f/b0", "f/0"];
    let deleted = ["f/a/y0", "f/aa", "f/zz"];
    for name in fixed {
        store.put_new(&key(name), body(name)).await.expect("made");
    }
    for name in swapped {
        store.swap(&key(name), Expect::Absent, body(name)).await.expect("made");
    }
    for name in deleted {
        let etag = store.swap(&key(name), Expect::Absent, body(name)).await.expect("made");
        store.swap_delete(&key(name), etag).await.expect("deleted");
    }
    let expected: Vec<String> = fixed
        .iter()
        .chain(&swapped)
        .map(|name| name.to_string())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    for page_max in [1, 2, 3, 5, 15, 16, 17, 1000, usize::MAX] {
        assert_eq!(keys_in(&store, "f", page_max).await, expected, "pages of {page_max}");
    }
    for after in ["e", "f", "f/", "f/a", "f/a/", "f/a/y", "f/a/y/", "f/a/zzz", "f/b", "f0", "g/a", "f/a/x/no"]
    {
        let Some(after_key) = Key::new(after) else { continue };
        let page = store.list("f", Some(&after_key), 100).await.expect("listed");
        let found: Vec<String> = page.objects.iter().map(|listed| listed.key.to_string()).collect();
        let rest: Vec<String> = expected.iter().filter(|name| name.as_str() > after).cloned().collect();
        assert_eq!(found, rest, "after {after}");
    }
    for listed in store.list("f", None, 100).await.expect("listed").objects {
        assert_eq!(listed.object_bytes, listed.key.as_str().len() as u64, "each holds its own name");
    }
    let none = store.list("f", None, 0).await.expect("listed");
    assert!(none.objects.is_empty() && none.more);
}

pub async fn a_listing_has_only_its_folder(store: Store) {
    for name in ["ab/x", "a/x", "a-/x", "b/a/x", "a.b/x"] {
        store.put_new(&key(name), body("x")).await.expect("made");
    }
    assert_eq!(keys_in(&store, "a", 10).await, ["a/x"]);
    assert_eq!(keys_in(&store, "b/a", 10).await, ["b/a/x"]);
    assert!(keys_in(&store, "nothing", 10).await.is_empty());
    assert!(keys_in(&store, "a/x", 10).await.is_empty(), "an object is no folder");
    for bad in ["", "/", "a/", "/a", "..", "a/../b", ".tmp", "a~", "a*"] {
        let refused = store.list(bad, None, 10).await;
        assert!(
            matches!(refused, Err(StoreError::Invalid { .. })),
            "an empty listing would look like no objects"
        );
    }
}

pub async fn dates_do_not_run_ahead_of_the_clock(store: Store) {
    store.put_new(&key("packs/one"), body("x")).await.expect("made");
    store.swap(&key("packs/two"), Expect::Absent, body("x")).await.expect("made");
    let listed = store.list("packs", None, 10).await.expect("listed").objects;
    let dates: Vec<u64> = listed.iter().map(|listed| listed.modified_unix_ms).collect();
    assert!(dates.len() == 2 && dates.iter().all(|&date| date > 1_600_000_000_000), "{dates:?}");
    assert!(dates[0].abs_diff(dates[1]) < 60_000, "{dates:?}");
}

pub async fn g6_a_listing_misses_nothing_that_is_swapped_meanwhile(store: Store) {
    listing_while_swapped(store, 300, 3).await;
}

/// Lists again and again while every head is being swapped.
pub async fn listing_while_swapped(store: Store, heads: usize, listings: usize) {
    let mut makers = tokio::task::JoinSet::new();
    for part in 0..8 {
        let store = store.clone();
        makers.spawn(async move {
            let mut etags = Vec::new();
            for n in (part..heads).step_by(8) {
                let at = key(&format!("volumes/vm-{n}"));
                etags.push((at.clone(), store.swap(&at, Expect::Absent, body("x")).await.expect("made")));
            }
            etags
        });
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut swappers = tokio::task::JoinSet::new();
    let (swapped, mut has_swapped) = tokio::sync::mpsc::channel(8);
    while let Some(made) = makers.join_next().await {
        let (store, stop, swapped) = (store.clone(), stop.clone(), swapped.clone());
        let mut etags = made.expect("made");
        swappers.spawn(async move {
            let mut swaps = 0;
            while !stop.load(Ordering::Relaxed) {
                for (at, etag) in &mut etags {
                    *etag = store.swap(at, Expect::State(etag.clone()), body("y")).await.expect("swapped");
                    swaps += 1;
                    if swaps == 1 {
                        swapped.send(()).await.expect("somebody waits");
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                tokio::task::yield_now().await;
            }
            swaps
        });
    }
    for _ in 0..swappers.len() {
        has_swapped.recv().await.expect("each swaps");
    }
    let expected: BTreeSet<String> = (0..heads).map(|n| format!("volumes/vm-{n}")).collect();
    for listing in 0..listings {
        let found = keys_in(&store, "volumes", [1000, 97, 1][listing % 3].max(heads / 40)).await;
        let found_count = found.len();
        let found: BTreeSet<String> = found.into_iter().collect();
        let missing: Vec<&String> = expected.difference(&found).collect();
        assert!(missing.is_empty(), "listing {listing} missed {} of {heads}: {missing:?}", missing.len());
        assert_eq!(found_count, found.len(), "a key came twice");
    }
    stop.store(true, Ordering::Relaxed);
    let swaps: usize = swappers.join_all().await.into_iter().sum();
    println!("{swaps} swaps during {listings} listings of {heads} heads");
}
