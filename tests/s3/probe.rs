//! What is found out about a server before anything is changed there.
//!
//! Owns: real and lying servers, and what an operator is told.
//! Does not own: serving.

use crate::bucket;
use crate::proxy::Proxy;
use crate::suite::{WHOLE, body, key};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};
use blockhouse::store::s3::{Address, S3Config, S3OpenError, S3Store, Standing};
use blockhouse::store::{Expect, ObjectStore, StoreError};
use futures::FutureExt;
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_server_is_proven_without_a_trace() {
    let config = bucket::config().await;
    let store = S3Store::new(&config).await.unwrap();
    assert_eq!(store.standing(), Standing::Unproven);
    store.prove().await.unwrap();
    assert_eq!(store.standing(), Standing::Proven { warnings: Vec::new() });
    assert_eq!(bucket::names("pools", &config.address.prefix).await, Vec::<String>::new());
}

/// A server that does PUTs whatever their condition is, if it is the one named.
async fn overwriting(condition: &'static str) -> (S3Store, Proxy, S3Config) {
    let config = bucket::config().await;
    let proxy = Proxy::start(&bucket::endpoint(), 1).await;
    let client = bucket::client().await;
    proxy.lie(Arc::new(move |head, body| {
        let client = client.clone();
        async move {
            if !head.starts_with("PUT ") || !head.to_ascii_lowercase().contains(&format!("\r\n{condition}:"))
            {
                return None;
            }
            let path = head.split([' ', '?']).nth(1)?.strip_prefix("/pools/")?.to_owned();
            let put = client.put_object().bucket("pools").key(path).body(ByteStream::from(body));
            let etag = put.send().await.unwrap().e_tag.unwrap();
            Some(format!("HTTP/1.1 200 OK\r\netag: {etag}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"))
        }
        .boxed()
    }));
    let config = S3Config { endpoint: Some(proxy.url.clone()), ..config };
    (S3Store::new(&config).await.unwrap(), proxy, config)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ignores_conditions_is_refused_and_nothing_is_changed_there() {
    for (condition, named) in [("if-none-match", "If-None-Match"), ("if-match", "If-Match")] {
        let (store, _proxy, config) = overwriting(condition).await;
        match store.prove().await {
            Err(S3OpenError::Refused(reason)) => {
                assert!(reason.contains("overwrites") && reason.contains(named), "{reason}");
            }
            other => panic!("{condition}: {other:?}"),
        }
        assert!(matches!(store.standing(), Standing::Refused(_)));
        let refused = store.swap(&key("volumes/a"), Expect::Absent, body("x")).await;
        assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
        assert!(matches!(store.put_new(&key("packs/a"), body("x")).await, Err(StoreError::Invalid { .. })));
        assert!(matches!(store.delete(&key("packs/a")).await, Err(StoreError::Invalid { .. })));
        assert_eq!(bucket::names("pools", &config.address.prefix).await, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g19_a_bucket_that_keeps_versions_is_told() {
    let client = bucket::client().await;
    bucket::make("versioned").await;
    let versioning = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    client
        .put_bucket_versioning()
        .bucket("versioned")
        .versioning_configuration(versioning)
        .send()
        .await
        .unwrap();
    let address = Address::parse("s3://versioned/p").unwrap();
    let store = S3Store::new(&S3Config { endpoint: Some(bucket::endpoint()), ..S3Config::new(address) })
        .await
        .unwrap();
    // Where conditions hold with versions it is a warning; this server lets several writers win a race there.
    match store.prove().await {
        Ok(()) => {
            let Standing::Proven { warnings } = store.standing() else { panic!("{:?}", store.standing()) };
            assert!(warnings.iter().any(|warning| warning.contains("versions")), "{warnings:?}");
        }
        Err(S3OpenError::Refused(reason)) => assert!(reason.contains("does not keep versions"), "{reason}"),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_bucket_is_no_empty_pool() {
    let address = Address::parse("s3://no-such-bucket/p").unwrap();
    let store = S3Store::new(&S3Config { endpoint: Some(bucket::endpoint()), ..S3Config::new(address) })
        .await
        .unwrap();
    match store.prove().await {
        Err(S3OpenError::Unavailable(reason)) => assert!(reason.contains("NoSuchBucket"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(store.get(&key("pool"), WHOLE).await, Err(StoreError::Unavailable { .. })));
    assert!(matches!(store.list("packs", None, 10).await, Err(StoreError::Unavailable { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_own_authority_is_trusted_if_its_certificate_is_given_and_only_then() {
    let endpoint = std::env::var("BLOCKHOUSE_TEST_S3_TLS").expect("tests/s3/server env");
    let ca_file = std::env::var("BLOCKHOUSE_TEST_S3_CA").expect("tests/s3/server env");
    let with_ca =
        S3Config { endpoint: Some(endpoint), ca_file: Some(ca_file.into()), ..bucket::config().await };
    S3Store::new(&with_ca).await.unwrap().prove().await.unwrap();
    // Another authority than the server's.
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other.pem");
    std::fs::write(&other, OTHER_CA).unwrap();
    let store = S3Store::new(&S3Config { ca_file: Some(other), ..with_ca }).await.unwrap();
    match store.prove().await {
        Err(S3OpenError::Unavailable(reason)) => assert!(reason.contains("certificate"), "{reason}"),
        unexpected => panic!("{unexpected:?}"),
    }
}

/// A certificate that nothing is signed with.
const OTHER_CA: &str = include_str!("other-ca.pem");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g19_objects_that_no_store_made_are_refused_and_not_listed() {
    let config = bucket::config().await;
    let store = S3Store::new(&config).await.unwrap();
    store.prove().await.unwrap();
    let client = bucket::client().await;
    let prefix = &config.address.prefix;
    let put = async |name: &str, body: &[u8]| {
        let put = client.put_object().bucket("pools").key(format!("{prefix}{name}"));
        put.body(ByteStream::from(body.to_vec())).send().await.unwrap();
    };
    put("packs/empty", b"").await;
    put("packs/short", b"short").await;
    put("packs/forged", &[7; 100]).await;
    put("packs/../up", b"x").await;
    put("packs/a b\u{1}<&>", b"x").await;
    store.put_new(&key("packs/good"), body("good")).await.unwrap();
    for name in ["empty", "short", "forged"] {
        let found = store.get(&key(&format!("packs/{name}")), WHOLE).await;
        assert!(matches!(found, Err(StoreError::Invalid { .. })), "{name}: {found:?}");
    }
    let page = store.list("packs", None, 100).await.unwrap();
    let keys: Vec<_> = page.objects.iter().map(|listed| listed.key.as_str()).collect();
    assert_eq!(keys, ["packs/forged", "packs/good"], "the forged one has the size of an object");
    let swapped = store.swap(&key("packs/forged"), Expect::Absent, body("x")).await;
    assert!(matches!(swapped, Err(StoreError::Invalid { .. })), "{swapped:?}");
}
