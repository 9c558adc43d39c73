//! Empty pools on the real server.
//!
//! Owns: where it is, one bucket for all tests, and a prefix for each.
//! Does not own: starting it.

use crate::suite::Store;
use aws_sdk_s3::config::{BehaviorVersion, Region};
use blockhouse::store::s3::{Address, S3Config, S3Store};
use std::sync::Arc;

/// Where the server is, or why nothing is tried.
pub fn endpoint() -> String {
    std::env::var("BLOCKHOUSE_TEST_S3")
        .expect("no S3 server: tests/s3/server start, then eval \"$(tests/s3/server env)\"")
}

/// A plain client of the same server.
pub async fn client() -> aws_sdk_s3::Client {
    let shared = aws_config::defaults(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .load()
        .await;
    aws_sdk_s3::Client::from_conf(aws_sdk_s3::config::Builder::from(&shared).force_path_style(true).build())
}

/// Makes a bucket that may be there already.
pub async fn make(bucket: &str) {
    let made = client().await.create_bucket().bucket(bucket).send().await;
    if let Err(error) = made {
        let error = error.into_service_error();
        assert!(error.is_bucket_already_owned_by_you() || error.is_bucket_already_exists(), "{error:?}");
    }
}

/// A place in the bucket that nobody used.
pub async fn config() -> S3Config {
    make("pools").await;
    let address = Address::parse(&format!("s3://pools/t/{:016x}", rand::random::<u64>())).unwrap();
    S3Config { endpoint: Some(endpoint()), ..S3Config::new(address) }
}

/// An empty pool.
pub async fn pool() -> (Store, ()) {
    let store = S3Store::new(&config().await).await.unwrap();
    store.prove().await.unwrap();
    (Arc::new(store), ())
}

/// All names below a prefix, parts of unfinished uploads too.
pub async fn names(bucket: &str, prefix: &str) -> Vec<String> {
    let client = client().await;
    let mut names = Vec::new();
    let mut pages = client.list_objects_v2().bucket(bucket).prefix(prefix).into_paginator().send();
    while let Some(page) = pages.next().await {
        names.extend(page.unwrap().contents.unwrap_or_default().into_iter().filter_map(|object| object.key));
    }
    names.extend(uploads(bucket, prefix).await.into_iter().map(|(name, _)| name));
    names
}

/// Uploads that nobody finished: their names, and how many parts each holds.
pub async fn uploads(bucket: &str, prefix: &str) -> Vec<(String, usize)> {
    let client = client().await;
    let mut found = Vec::new();
    let uploads = client.list_multipart_uploads().bucket(bucket).prefix(prefix).send().await.unwrap();
    for upload in uploads.uploads.unwrap_or_default() {
        let (name, id) = (upload.key.unwrap(), upload.upload_id.unwrap());
        // It may have ended since.
        if let Ok(parts) = client.list_parts().bucket(bucket).key(&name).upload_id(id).send().await {
            found.push((name, parts.parts.unwrap_or_default().len()));
        }
    }
    found
}
