//! The API over real sockets.

use super::Daemon;
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

async fn body(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let bytes = response.bytes().await.unwrap();
    (status, if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() })
}

async fn ask(client: &Client, base: &str, method: Method, path: &str, json: Option<Value>) -> (u16, Value) {
    let request = client.request(method, format!("{base}/api/v1{path}"));
    let request = match json {
        Some(json) => request.json(&json),
        None => request,
    };
    body(request.send().await.unwrap()).await
}

/// The answer is a problem document, and nothing but.
async fn problem(response: Response) -> Value {
    let status = response.status().as_u16();
    assert!(status >= 400, "{status}");
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let document: Value = response.json().await.unwrap();
    assert_eq!(document["status"], status);
    for field in ["type", "title", "detail", "refusal"] {
        assert!(document[field].as_str().is_some_and(|text| !text.is_empty()), "{field} in {document}");
    }
    document
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_goes_round_over_both_listeners() {
    let daemon = Daemon::start().await;
    let (unix, tcp) = (daemon.unix_client(), Client::builder().no_proxy().build().unwrap());
    for (client, base, vm) in [(&unix, "http://localhost", "vm-u"), (&tcp, daemon.http.as_str(), "vm-t")] {
        let (put, get, post, delete) = (Method::PUT, Method::GET, Method::POST, Method::DELETE);
        let path = |rest: &str| format!("/volumes/{vm}{rest}");
        let ask = async |method: &Method, path: &str, json: Option<Value>| {
            ask(client, base, method.clone(), path, json).await
        };
        let made = ask(&put, &path(""), Some(json!({"size_bytes": 4096, "from": "image:debian"}))).await;
        assert_eq!(
            (made.0, &made.1["size_bytes"], &made.1["from"]),
            (201, &json!(4096), &json!("image:debian"))
        );
        assert_eq!(ask(&put, &path(""), Some(json!({}))).await.0, 200, "the same again is no error");
        assert_eq!(ask(&get, &path(""), None).await.1["name"], vm);
        assert!(ask(&get, "/volumes", None).await.1.as_array().is_some_and(|all| !all.is_empty()));
        assert_eq!(ask(&post, &path("/attach"), None).await.0, 201);
        assert_eq!(ask(&post, &path("/attach"), None).await.0, 200);
        assert_eq!(ask(&get, "/attachments", None).await.0, 200);
        assert_eq!(ask(&post, &path("/detach"), Some(json!({"keep_local": true}))).await, (204, Value::Null));
        assert_eq!(ask(&post, &path("/resize"), Some(json!({"size_bytes": 512}))).await.0, 400);
        let resized = ask(&post, &path("/resize"), Some(json!({"size_bytes": 512, "force": true}))).await;
        assert_eq!((resized.0, &resized.1["size_bytes"]), (200, &json!(512)));
        let snapshot = ask(&post, &path("/snapshots"), Some(json!({"description": "d"}))).await;
        assert_eq!(
            (snapshot.0, &snapshot.1["number"], &snapshot.1["description"]),
            (201, &json!(1), &json!("d"))
        );
        assert_eq!(ask(&post, &path("/rollback"), Some(json!({"snapshot": 1}))).await.1["number"], 2);
        assert_eq!(ask(&get, &format!("/snapshots?volume={vm}"), None).await.1.as_array().unwrap().len(), 2);
        assert_eq!(ask(&delete, &path("/snapshots/1"), None).await.0, 204);
        assert_eq!(ask(&get, &path("/snapshots"), None).await.1.as_array().unwrap().len(), 1);
        assert_eq!(ask(&get, &format!("/resolve/{vm}"), None).await.1["kind"], "volume");
        assert_eq!(ask(&get, &format!("/trash/{vm}/undelete"), None).await.0, 405);
        assert_eq!(ask(&post, &format!("/trash/{vm}/undelete"), None).await.1["name"], vm);
        assert_eq!(ask(&post, "/orphans/o/recover", Some(json!({"name": "back"}))).await.1["name"], "back");
        daemon.fake.go_on.notify_one();
        assert_eq!(ask(&post, &path("/wait-durable"), None).await.1["dirty_bytes"], 0);
        assert_eq!(ask(&delete, &path("?with_snapshots=true"), None).await.1["kind"], "volume");
        for list in ["trash", "orphans", "jobs", "images", "doctor", "snapshots"] {
            assert!(ask(&get, &format!("/{list}"), None).await.1.is_array(), "{list}");
        }
        assert_eq!(ask(&get, "/space", None).await.1["pool_objects"], 7);
        assert_eq!(ask(&get, "/node", None).await.1["version"], "0.1.0");
        let url = ask(&put, "/images/u", Some(json!({"url": "http://example.org/a"}))).await;
        assert_eq!(url.0, 202);
        assert_eq!(ask(&get, &format!("/jobs/{}", url.1["id"]), None).await.1["what"], "import image u");
        assert_eq!(ask(&get, "/images/u", None).await.1["state"], "ready");
        assert_eq!(ask(&delete, "/images/u", None).await.1["kind"], "image");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_stream_in_and_out_whole() {
    let daemon = Daemon::start().await;
    let client = daemon.unix_client();
    let content: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let url = "http://localhost/api/v1/images/big";
    let put = client.put(format!("{url}?description=x")).body(content.clone()).send().await.unwrap();
    assert_eq!(body(put).await.0, 201);
    let raw = client.get(format!("{url}/raw")).send().await.unwrap();
    assert_eq!(raw.content_length(), Some(3_000_000));
    assert_eq!(raw.bytes().await.unwrap(), content);

    // What a client did not finish to send is no image.
    let mut raw = UnixStream::connect(daemon.socket()).await.unwrap();
    raw.write_all(b"PUT /api/v1/images/half HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        .await
        .unwrap();
    raw.shutdown().await.unwrap();
    let mut answer = Vec::new();
    raw.read_to_end(&mut answer).await.unwrap();
    assert!(!daemon.fake.images.lock().unwrap().contains_key("half"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_refused_while_it_is_sent_gets_its_answer() {
    let daemon = Daemon::start().await;
    let put = daemon.unix_client().put("http://localhost/api/v1/images/refuse-conflict");
    let document = problem(put.body(vec![0; 20_000_000]).send().await.unwrap()).await;
    assert_eq!(document["status"], 409);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_a_problem_document_with_its_status() {
    let daemon = Daemon::start().await;
    let client = daemon.unix_client();
    for (refusal, status) in [
        ("invalid", 400),
        ("not-found", 404),
        ("conflict", 409),
        ("no-space", 507),
        ("unavailable", 503),
        ("unclear", 504),
        ("corrupt", 500),
        ("internal", 500),
    ] {
        let url = format!("http://localhost/api/v1/volumes/refuse-{refusal}");
        for request in [client.get(&url), client.put(&url)] {
            let document = problem(request.send().await.unwrap()).await;
            assert_eq!(document["status"], status);
            assert_eq!(document["refusal"], refusal);
            assert_eq!(document["type"], format!("urn:blockhouse:refusal:{refusal}"));
            assert_eq!(document["hint"], "try another name");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_wrong_with_a_request_is_a_problem_document_too() {
    let daemon = Daemon::start().await;
    let client = daemon.unix_client();
    let volume = "http://localhost/api/v1/volumes/vm";
    let json =
        |text: &str| client.put(volume).header("content-type", "application/json").body(text.to_owned());
    let large = format!("\"{}\"", "x".repeat(70_000));
    for (request, status, says) in [
        (client.get("http://localhost/nothing"), 404, "/nothing"),
        (client.get("http://localhost/api/v1/nothing"), 404, "/api/v1/nothing"),
        (client.get("http://localhost/static/nothing"), 404, "nothing"),
        (client.patch(volume), 405, "PATCH"),
        (client.post("http://localhost/healthz"), 405, "POST"),
        (json("{"), 400, "JSON"),
        (json("{\"sise\": 1}"), 400, "sise"),
        (json("{\"from\": \"debian\"}"), 400, "image:NAME"),
        (json(&large), 413, "64 KiB"),
        (client.put(volume).body("{}"), 415, "JSON"),
        (
            client
                .put("http://localhost/api/v1/images/i")
                .header("content-type", "application/json")
                .body(large.clone()),
            413,
            "64 KiB",
        ),
        (client.put("http://localhost/api/v1/images/i").json(&json!({"uri": "x"})), 400, "uri"),
        (client.post(format!("{volume}/resize")), 400, "size_bytes"),
        (client.delete(format!("{volume}?with_snapshot=1")), 400, "with_snapshot"),
        (client.delete(format!("{volume}/snapshots/one")), 400, "one"),
        (client.get("http://localhost/api/v1/volumes/%ff"), 400, "utf-8"),
        (client.get("http://localhost/api/v1/volumes/refuse-panic"), 500, "log"),
        (client.put("http://localhost/api/v1/volumes/refuse-panic"), 500, "log"),
    ] {
        let document = problem(request.send().await.unwrap()).await;
        assert_eq!(document["status"], status, "{document}");
        assert!(document["detail"].as_str().unwrap().contains(says), "{document}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_refuses_foreign_names_and_pages() {
    let daemon = Daemon::start().await;
    let client = Client::builder().no_proxy().build().unwrap();
    let (list, volume) =
        (format!("{}/api/v1/volumes", daemon.http), format!("{}/api/v1/volumes/vm", daemon.http));
    let named = async |name: &str| client.get(&list).header("host", name).send().await.unwrap();
    assert_eq!(named("store.example").await.status(), 200);
    let document = problem(named("evil.example").await).await;
    assert!(
        document["status"] == 403 && document["hint"].as_str().unwrap().contains("allowed_hosts"),
        "{document}"
    );
    let foreign = client.put(&volume).header("origin", "http://evil.example").send().await.unwrap();
    assert_eq!(problem(foreign).await["status"], 403);
    assert_eq!(client.get(&volume).send().await.unwrap().status(), 404, "nothing was made");
    let own = client.put(&volume).header("origin", &daemon.http).send().await.unwrap();
    assert_eq!(own.status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_goes_on_when_its_client_goes_away() {
    let daemon = Daemon::start().await;
    let mut raw = UnixStream::connect(daemon.socket()).await.unwrap();
    raw.write_all(b"POST /api/v1/volumes/vm/wait-durable HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    daemon.fake.began.notified().await;
    drop(raw);
    // A request on another connection is answered, and so the server had its chance to see that the first is gone.
    assert_eq!(daemon.unix_client().get("http://localhost/healthz").send().await.unwrap().status(), 200);
    daemon.fake.go_on.notify_one();
    daemon.fake.ended.notified().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_waits_for_requests_under_way() {
    let daemon = Daemon::start().await;
    let client = daemon.unix_client();
    let request = tokio::spawn(client.post("http://localhost/api/v1/volumes/vm/wait-durable").send());
    daemon.fake.began.notified().await;
    daemon.stop.cancel();
    daemon.fake.go_on.notify_one();
    assert_eq!(request.await.unwrap().unwrap().status(), 200);
    daemon.ended.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn health_readiness_and_metrics_answer() {
    let daemon = Daemon::start().await;
    let client = daemon.unix_client();
    let get = async |path: &str| client.get(format!("http://localhost{path}")).send().await.unwrap();
    assert_eq!(get("/healthz").await.status(), 200);
    assert_eq!(get("/readyz").await.status(), 200);
    let metrics = get("/metrics").await;
    assert!(metrics.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = metrics.text().await.unwrap();
    assert!(text.contains("blockhouse_volume_write_bytes_total{volume=\"vm-7\"} 4096"), "{text}");
    daemon.fake.not_ready.store(true, Ordering::SeqCst);
    let document = problem(get("/readyz").await).await;
    assert_eq!((&document["status"], &document["detail"]), (&json!(503), &json!("recovering")));
    assert_eq!(get("/healthz").await.status(), 200, "alive all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_teaches_escapes_and_runs_nothing() {
    let daemon = Daemon::start().await;
    let client = Client::builder().no_proxy().build().unwrap();
    let page = async || client.get(&daemon.http).send().await.unwrap();
    let empty = page().await;
    let policy = empty.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    let text = empty.text().await.unwrap();
    assert!(
        text.contains("blockhouse image import debian") && text.contains("blockhouse volume attach"),
        "{text}"
    );
    assert!(!text.contains("<script") && !text.contains("style="), "{text}");
    daemon.fake.images.lock().unwrap().insert("debian".to_owned(), vec![0; 4096]);
    assert_eq!(
        client.put(format!("{}/api/v1/volumes/vm-7", daemon.http)).send().await.unwrap().status(),
        201
    );
    client.post(format!("{}/api/v1/volumes/vm-7/attach", daemon.http)).send().await.unwrap();
    let text = page().await.text().await.unwrap();
    assert!(text.contains("nbdinfo nbd://127.0.0.1:10809/vm-7"), "{text}");
    assert!(text.contains("&#60;script&#62;") && !text.contains("<script>"), "{text}");
    let style = client.get(format!("{}/static/style.css", daemon.http)).send().await.unwrap();
    assert_eq!(style.headers()["content-type"], "text/css; charset=utf-8");
}
