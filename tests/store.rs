//! One suite for every object store, and what only a directory can get wrong.
#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests")]

#[path = "store/directory.rs"]
mod directory;
#[path = "store/suite.rs"]
mod suite;

use blockhouse::clock::Clock;
use blockhouse::store::memory::MemoryStore;
use blockhouse::store::{Expect, Key, ObjectStore};
use std::sync::Arc;
use suite::{Store, WHOLE, body, key};

async fn memory() -> (Store, ()) {
    (Arc::new(MemoryStore::new(Clock::System)), ())
}

async fn directory_pool() -> (Store, tempfile::TempDir) {
    let above = tempfile::tempdir().unwrap();
    (directory::open(&above.path().join("pool")).await, above)
}

suite!(memory_store, crate::memory());
suite!(directory_store, crate::directory_pool());

#[test]
fn g19_keys_are_segments_of_harmless_characters() {
    for good in ["a", "a/b", "A-1._/0", "a..b", "-", &"x".repeat(512)] {
        assert!(Key::new(good).is_some(), "{good}");
    }
    for bad in [
        "", "/", "a/", "/a", "a//b", ".", "..", "a/..", "../x", ".tmp", "a/.b", "a~", "a b", "ä", "a\0",
        "a\n",
    ] {
        assert!(Key::new(bad).is_none(), "{bad}");
    }
    assert!(Key::new("x".repeat(513)).is_none());
}

#[tokio::test]
async fn a_memory_store_counts_what_it_was_asked() {
    let store = MemoryStore::new(Clock::simulated());
    store.put_new(&key("packs/a"), body("12345")).await.unwrap();
    assert!(store.put_new(&key("packs/a"), body("12345")).await.is_err());
    let etag = store.swap(&key("volumes/a"), Expect::Absent, body("123")).await.unwrap();
    store.get(&key("packs/a"), blockhouse::store::GetRange::Suffix { len: 2 }).await.unwrap();
    store.swap_delete(&key("volumes/a"), etag).await.unwrap();
    assert!(store.get(&key("volumes/a"), WHOLE).await.is_err());
    store.list("packs", None, 1).await.unwrap();
    store.delete(&key("packs/a")).await.unwrap();
    let counts = store.counts();
    assert_eq!((counts.put_news, counts.put_new_bytes, counts.swaps, counts.swap_bytes), (2, 5, 1, 3));
    assert_eq!((counts.gets, counts.get_bytes, counts.lists), (2, 2, 1));
    assert_eq!((counts.deletes, counts.swap_deletes), (1, 1));
}
