//! TLS with real clients, and what no well-behaved client sends before it.

use crate::client::{Ask, Client, Mode, go, hello, option, set_contexts};
use crate::world::{DISK_BYTES, MIB, World, tool, try_tool};
use blockhouse::frontend::nbd::tls::{TlsConfig, TlsDemand, TlsError, TlsFiles};
use blockhouse::frontend::nbd::wire::{
    CMD_DISC, CMD_FLUSH, CMD_READ, CMD_WRITE, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY,
    REP_ACK, REP_ERR_INVALID, REP_ERR_TLS_REQD,
};
use blockhouse::frontend::nbd::{Config, Server};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::path::Path;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Certificate and key, signed by `by`.
fn signed(by: &Authority, name: &str) -> (String, String) {
    let mut params = CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, by).unwrap().pem(), key.serialize_pem())
}

/// A folder with the files of both sides, named as libnbd and QEMU want them.
struct Files {
    dir: tempfile::TempDir,
    ours: Authority,
    theirs: Authority,
}

impl Files {
    fn new() -> Self {
        let files = Self {
            dir: tempfile::tempdir().unwrap(),
            ours: authority("servers"),
            theirs: authority("clients"),
        };
        // QEMU wants to know the authority of its own certificate too.
        files.put("ca-cert.pem", &[files.ours.pem(), files.theirs.pem()].concat());
        files.put("clients-ca.pem", &files.theirs.pem());
        files.put_server("localhost");
        let (certificate, key) = signed(&files.theirs, "client");
        files.put("client-cert.pem", &certificate);
        files.put("client-key.pem", &key);
        files
    }

    fn put(&self, name: &str, text: &str) {
        // As a tool that renews certificates does.
        let new = self.dir.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.dir.path().join(name)).unwrap();
    }

    fn put_server(&self, name: &str) {
        let (certificate, key) = signed(&self.ours, name);
        self.put("server-cert.pem", &certificate);
        self.put("server-key.pem", &key);
    }

    fn tls(&self, demand: TlsDemand, clients: bool) -> Option<TlsConfig> {
        let path = |name: &str| self.dir.path().join(name);
        let files = TlsFiles {
            certificate: path("server-cert.pem"),
            key: path("server-key.pem"),
            client_ca: clients.then(|| path("clients-ca.pem")),
        };
        Some(TlsConfig { files, demand })
    }

    async fn world(&self, demand: TlsDemand, clients: bool) -> World {
        World::start_with(Config { tls: self.tls(demand, clients), ..Config::default() }).await
    }

    fn folder(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    fn pem<T: PemObject>(&self, name: &str) -> T {
        T::from_pem_file(self.dir.path().join(name)).unwrap()
    }

    fn connector(&self, with_certificate: bool) -> TlsConnector {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.pem::<CertificateDer<'_>>("ca-cert.pem")).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let config = if with_certificate {
            let key: PrivateKeyDer<'_> = self.pem("client-key.pem");
            builder.with_client_auth_cert(vec![self.pem("client-cert.pem")], key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        TlsConnector::from(Arc::new(config))
    }

    /// A connection within TLS, before any other option.
    async fn secured(
        &self,
        world: &World,
        with_certificate: bool,
    ) -> std::io::Result<Client<TlsStream<TcpStream>>> {
        let mut client = plain(world).await;
        client.send(&[&3u32.to_be_bytes()[..], &option(OPT_STARTTLS, &[])].concat()).await;
        assert_eq!(client.option_reply().await, (OPT_STARTTLS, REP_ACK, vec![]));
        let name = ServerName::try_from("localhost").unwrap();
        let stream = self.connector(with_certificate).connect(name, client.stream).await?;
        Ok(Client { stream, mode: Mode::Simple, size: 0, flags: 0 })
    }
}

async fn plain(world: &World) -> Client<TcpStream> {
    let stream = TcpStream::connect(world.tcp()).await.unwrap();
    let mut client = Client { stream, mode: Mode::Simple, size: 0, flags: 0 };
    client.bytes(18).await;
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_and_qemu_are_served_within_tls_and_not_without() {
    let files = Files::new();
    let world = files.world(TlsDemand::Required, true).await;
    let port = world.tcp().port();
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={}", files.folder());
    let Some(json) = tool("nbdinfo", &["--json", &uri]).await else { return };
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["TLS"], &json["exports"][0]["export-size"]), (&true.into(), &DISK_BYTES.into()));

    let script = format!(
        "import nbd, os
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri('{uri}')
assert h.get_tls_negotiated()
data = os.urandom(5 << 20)
h.pwrite(data, 4097)
h.flush()
assert h.pread(5 << 20, 4097) == data
h.shutdown()
n = nbd.NBD()
try:
    n.connect_uri('nbd://localhost:{port}/disk')
except nbd.Error as e:
    print(e)
else:
    raise SystemExit('served without TLS')
"
    );
    let said = tool("/usr/bin/python3", &["-c", &script]).await.unwrap();
    assert!(said.contains("TLS"), "{said}");

    let source = files.dir.path().join("source.raw");
    let content: Vec<u8> = (0..8 * MIB).map(|at| u8::try_from(at / 777 % 253).unwrap()).collect();
    tokio::fs::write(&source, &content).await.unwrap();
    tool("nbdcopy", &[source.to_str().unwrap(), &uri]).await;
    assert!(world.disk.bytes(0, content.len()).await == content);

    let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", files.folder());
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk,tls-creds=tls0"
    );
    let commands = ["-c", "write -P 7 1M 4M", "-c", "flush", "-c", "read -P 7 1M 4M", "-c", "discard 2M 1M"];
    let arguments = [&["--object", &credentials, "--image-opts"][..], &commands, &[&image]].concat();
    let said = tool("qemu-io", &arguments).await.unwrap();
    assert!(!said.contains("failed"), "{said}");
    let (served, said) =
        try_tool("qemu-img", &["info", "-f", "raw", &format!("nbd://localhost:{port}/disk")]).await.unwrap();
    assert!(!served && said.contains("TLS"), "{said}");

    // By the Unix socket, which the file system guards, TLS may be left out.
    tool("nbdinfo", &["--size", &format!("nbd+unix:///disk?socket={}", world.socket().display())]).await;
    world.all_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_with_no_certificate_or_one_of_a_stranger_are_turned_away() {
    let files = Files::new();
    let world = files.world(TlsDemand::Required, true).await;
    let mut good = files.secured(&world, true).await.unwrap();
    good.send(&go("disk")).await;
    good.haggled().await;
    // A client learns that its certificate is not good enough by the first byte that it wants to read.
    let none = async {
        let mut client = files.secured(&world, false).await?;
        client.send(&go("disk")).await;
        tokio::io::AsyncReadExt::read_u8(&mut client.stream).await
    };
    assert!(none.await.is_err());
    let stranger = authority("clients");
    let (certificate, key) = signed(&stranger, "client");
    files.put("client-cert.pem", &certificate);
    files.put("client-key.pem", &key);
    let strange = async {
        let mut client = files.secured(&world, true).await?;
        client.send(&go("disk")).await;
        tokio::io::AsyncReadExt::read_u8(&mut client.stream).await
    };
    assert!(strange.await.is_err());
    assert_eq!(good.ask(Ask::new(CMD_FLUSH, 0, 0, 0), &[]).await.errno, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_modes_work_within_tls_and_end_with_its_end() {
    let files = Files::new();
    let world = files.world(TlsDemand::Offered, false).await;
    for mode in crate::client::MODES {
        let mut client = files.secured(&world, false).await.unwrap();
        client.mode = mode;
        client.send(&hello("disk", mode)[4..]).await;
        client.haggled().await;
        let payload: Vec<u8> = (0..3 * MIB + 511).map(|at| u8::try_from(at / 500 % 251).unwrap()).collect();
        let write = Ask::new(CMD_WRITE, 0, 513, payload.len() as u64).proper(mode);
        assert_eq!(client.ask(write, &payload).await.errno, 0);
        let answer = client.ask(Ask::new(CMD_READ, 0, 513, payload.len() as u64), &[]).await;
        assert!(answer.data == payload);
        client.send(&Ask::new(CMD_DISC, 0, 0, 0).encode(mode, 0)).await;
        // TLS is closed before the socket: a cut would be an error here.
        let mut rest = Vec::new();
        let end = tokio::io::AsyncReadExt::read_to_end(&mut client.stream, &mut rest).await;
        assert_eq!((end.unwrap(), rest.len()), (0, 0));
    }
    // Offered only: those without are served too.
    let stream = TcpStream::connect(world.tcp()).await.unwrap();
    assert_eq!(Client::shake_hands(stream, "disk", Mode::Extended).await.size, DISK_BYTES);
    world.all_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_tls_nothing_is_told_and_what_was_said_there_counts_for_nothing() {
    let files = Files::new();
    let world = files.world(TlsDemand::Required, false).await;
    let mut client = plain(&world).await;
    client.send(&3u32.to_be_bytes()).await;
    for number in [OPT_LIST, OPT_STRUCTURED_REPLY, 99] {
        client.send(&option(number, &[])).await;
        let (of, kind, _) = client.option_reply().await;
        assert_eq!((of, kind), (number, REP_ERR_TLS_REQD));
    }
    client.send(&option(OPT_ABORT, &[])).await;
    assert_eq!(client.option_reply().await, (OPT_ABORT, REP_ACK, vec![]));
    assert_eq!(client.rest().await, [0; 0]);

    // Chunks and a context, asked for by somebody on the way, must not reach the client within TLS.
    let world = files.world(TlsDemand::Offered, false).await;
    let mut client = plain(&world).await;
    client.send(&3u32.to_be_bytes()).await;
    for before in [option(OPT_STRUCTURED_REPLY, &[]), set_contexts("disk", &["base:allocation"])] {
        client.send(&before).await;
        while client.option_reply().await.1 != REP_ACK {}
    }
    client.send(&option(OPT_STARTTLS, &[])).await;
    assert_eq!(client.option_reply().await.1, REP_ACK);
    let name = ServerName::try_from("localhost").unwrap();
    let stream = files.connector(false).connect(name, client.stream).await.unwrap();
    let mut client = Client { stream, mode: Mode::Simple, size: 0, flags: 0 };
    client.send(&option(OPT_STARTTLS, &[])).await;
    assert_eq!(client.option_reply().await.1, REP_ERR_INVALID, "once is enough");
    client.send(&go("disk")).await;
    client.haggled().await;
    assert_eq!(client.ask(Ask::new(CMD_READ, 0, 0, 512), &[]).await.data, [0; 512], "in a simple reply");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn options_in_the_clear_behind_the_start_of_tls_are_not_honoured() {
    let files = Files::new();
    let world = files.world(TlsDemand::Offered, false).await;
    // In one packet with it, or right behind the answer, where TLS has to begin.
    let mut client = plain(&world).await;
    let injected = [&3u32.to_be_bytes()[..], &option(OPT_STARTTLS, &[]), &option(OPT_LIST, &[])].concat();
    client.send(&injected).await;
    assert_eq!(client.rest().await, [0; 0]);
    let mut client = plain(&world).await;
    client.send(&[&3u32.to_be_bytes()[..], &option(OPT_STARTTLS, &[])].concat()).await;
    assert_eq!(client.option_reply().await.1, REP_ACK);
    client.send(&[option(OPT_LIST, &[]), go("disk")].concat()).await;
    let rest = client.rest().await;
    // An alert of TLS at most.
    assert!(rest.len() < 16 && !rest.windows(4).any(|bytes| bytes == b"disk"), "{rest:?}");
    world.all_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_certificate_is_used_for_new_connections_and_a_broken_one_is_not() {
    let files = Files::new();
    let world = files.world(TlsDemand::Required, false).await;
    let seen = async || {
        let client = files.secured(&world, false).await.unwrap();
        client.stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let mut old = files.secured(&world, false).await.unwrap();
    let first = seen().await;
    assert_eq!(seen().await, first);
    files.put_server("localhost");
    let second = seen().await;
    assert_ne!(second, first);
    files.put("server-key.pem", "nothing");
    assert_eq!(seen().await, second);
    std::fs::remove_file(files.dir.path().join("server-cert.pem")).unwrap();
    assert_eq!(seen().await, second);
    files.put_server("localhost");
    assert_ne!(seen().await, second);
    old.send(&go("disk")).await;
    old.haggled().await;
}

#[tokio::test]
async fn files_that_are_of_no_use_keep_the_server_from_starting_and_are_named() {
    let files = Files::new();
    let start = async |tls: Option<TlsConfig>| {
        let server = Server::start(
            Config { tls, ..Config::default() },
            Arc::new(crate::world::NoExports),
            tokio_util::sync::CancellationToken::new(),
        );
        server.await.err().map(|error| error.to_string())
    };
    let good = files.tls(TlsDemand::Required, true).unwrap();
    assert_eq!(start(Some(good.clone())).await, None);
    let path = |name: &str| files.dir.path().join(name);
    files.put("nothing.pem", "nothing");
    files.put("broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let with = |change: &dyn Fn(&mut TlsFiles)| {
        let mut tls = good.clone();
        change(&mut tls.files);
        Some(tls)
    };
    let table: [(Option<TlsConfig>, &str, &str); 7] = [
        (
            with(&|files| files.certificate = path("none.pem")),
            "failed to read a certificate from",
            "none.pem",
        ),
        (with(&|files| files.key = path("none.pem")), "failed to read a private key from", "none.pem"),
        (with(&|files| files.certificate = path("nothing.pem")), "no certificate in", "nothing.pem"),
        (with(&|files| files.key = path("nothing.pem")), "no private key in", "nothing.pem"),
        (with(&|files| files.client_ca = Some(path("nothing.pem"))), "no certificate in", "nothing.pem"),
        (with(&|files| files.client_ca = Some(path("broken.pem"))), "of no use", "broken.pem"),
        (
            with(&|files| files.key = path("client-key.pem")),
            "is not that of the certificate in",
            "client-key.pem",
        ),
    ];
    for (tls, says, names) in table {
        let said = start(tls).await.expect("it must not start");
        assert!(said.contains("TLS") && said.contains(says) && said.contains(names), "{said}");
    }
    let missing = TlsError::Missing { what: "certificate", path: Path::new("/x").into() };
    assert!(missing.to_string().contains("PEM"));
}
