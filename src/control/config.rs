//! Settings: plain data in one TOML file.
//!
//! Owns: the composed settings of all rooms, their defaults, the one sample file, and where the file is looked for.
//! Does not own: what the settings do.

use super::size::Size;
use crate::store::s3::{Address, S3Config};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where everything of a node lies unless settings say otherwise, relative to the working directory.
pub const DATA_DIR: &str = "./blockhouse-data";
/// Name of the settings file in the data directory.
pub const CONFIG_FILE: &str = "blockhouse.toml";
/// A settings file larger than this is none.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// All settings of a node. Relative paths in it are relative to the data directory.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub pool: PoolConfig,
    pub state: StateConfig,
    pub nbd: NbdConfig,
    pub http: HttpConfig,
    pub cache: CacheConfig,
    pub commit: CommitConfig,
    pub limits: LimitsConfig,
}

/// Where the pool is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    pub dir: PathBuf,
    /// In a bucket instead of the directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_style: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    pub wait_seconds: u64,
}

/// Where this node keeps what it acknowledged.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateConfig {
    pub dir: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_dir: Option<PathBuf>,
}

/// Where NBD clients connect.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NbdConfig {
    pub listen: Vec<String>,
    pub socket: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_client_ca: Option<PathBuf>,
    pub tls_required: bool,
}

/// Where operators connect.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    pub listen: String,
    pub socket: PathBuf,
    pub allowed_hosts: Vec<String>,
}

/// Blocks of the pool that are kept on this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    pub size: Size,
}

/// When acknowledged data goes to the pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CommitConfig {
    pub dirty_bytes: Size,
    pub age_seconds: u64,
}

/// What is refused beyond.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    pub http_connections: u32,
    pub nbd_connections: u32,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            dir: "pool".into(),
            url: None,
            endpoint: None,
            region: None,
            path_style: None,
            ca_file: None,
            wait_seconds: 60,
        }
    }
}

impl Default for StateConfig {
    fn default() -> Self {
        Self { dir: "state".into(), runtime_dir: None }
    }
}

impl Default for NbdConfig {
    fn default() -> Self {
        Self {
            listen: vec!["127.0.0.1:10809".to_owned()],
            socket: "state/nbd.sock".into(),
            tls_certificate: None,
            tls_key: None,
            tls_client_ca: None,
            tls_required: false,
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8420".to_owned(),
            socket: "state/control.sock".into(),
            allowed_hosts: Vec::new(),
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { size: Size(1 << 30) }
    }
}

impl Default for CommitConfig {
    fn default() -> Self {
        Self { dirty_bytes: Size(256 << 20), age_seconds: 10 }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { http_connections: 256, nbd_connections: 1024 }
    }
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to read settings from {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("settings in {} are wrong: {message}", path.display())]
    Wrong { path: PathBuf, message: String },
}

/// Settings as they stand in the file, with the directory that their paths are relative to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// Paths in it as written.
    pub written: Config,
    pub data_dir: PathBuf,
    /// The file, if one was read.
    pub file: Option<PathBuf>,
}

impl Loaded {
    /// Reads `file`, or else `blockhouse.toml` in the data directory if there is one.
    ///
    /// # Errors
    /// A named file that cannot be read, or any file with wrong settings in it.
    pub fn load(file: Option<&Path>, data_dir: Option<&Path>) -> Result<Self, ConfigError> {
        let data_dir = data_dir.unwrap_or(Path::new(DATA_DIR)).to_owned();
        let path = file.map_or_else(|| data_dir.join(CONFIG_FILE), Path::to_owned);
        match read_limited(&path) {
            Ok(text) => Ok(Self { written: parse(&text, &path)?, data_dir, file: Some(path) }),
            Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self { written: Config::default(), data_dir, file: None })
            }
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// The settings with all paths resolved.
    pub fn resolved(&self) -> Config {
        let mut config = self.written.clone();
        let nbd = &mut config.nbd;
        let paths = [&mut config.pool.dir, &mut config.state.dir, &mut nbd.socket, &mut config.http.socket];
        let maybe = [&mut nbd.tls_certificate, &mut nbd.tls_key, &mut nbd.tls_client_ca];
        let maybe =
            maybe.into_iter().flatten().chain(&mut config.state.runtime_dir).chain(&mut config.pool.ca_file);
        for path in paths.into_iter().chain(maybe) {
            *path = self.data_dir.join(&path);
        }
        config
    }

    /// The effective settings as a file that means the same.
    pub fn show(&self) -> String {
        let from = match &self.file {
            Some(file) => format!("# Read from {}.\n", file.display()),
            None => {
                let file = self.data_dir.join(CONFIG_FILE);
                format!("# Defaults: there is no {}.\n", file.display())
            }
        };
        format!("{from}# Relative paths start at {}.\n{}", self.data_dir.display(), sample(&self.written))
    }
}

#[expect(clippy::disallowed_methods, reason = "before anything is served")]
fn read_limited(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
    if u64::try_from(read).is_ok_and(|bytes| bytes > CONFIG_BYTES_MAX) {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "the file is larger than 1 MiB"));
    }
    Ok(text)
}

impl PoolConfig {
    /// Where the pool is, for people.
    pub fn place(&self) -> String {
        self.url.clone().unwrap_or_else(|| self.dir.display().to_string())
    }

    /// The bucket, if the pool is in one.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn s3(&self) -> Result<Option<S3Config>, String> {
        let Some(url) = &self.url else {
            let Self { dir: _, url: _, endpoint, region, path_style, ca_file, wait_seconds: _ } = self;
            if endpoint.is_some() || region.is_some() || path_style.is_some() || ca_file.is_some() {
                return Err(
                    "[pool]: endpoint, region, path_style and ca_file are for a pool with a url".to_owned()
                );
            }
            return Ok(None);
        };
        let address = Address::parse(url).map_err(|reason| format!("[pool] url: \"{url}\": {reason}"))?;
        if let Some(endpoint) = &self.endpoint {
            let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
            let is_good = |host: &str| {
                let host = host.strip_suffix('/').unwrap_or(host);
                !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b))
            };
            if !host.is_some_and(is_good) {
                return Err(format!(
                    "[pool] endpoint: \"{endpoint}\" is no server; write it like https://s3.example.org:9000"
                ));
            }
        }
        Ok(Some(S3Config {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            path_style: self.path_style,
            ca_file: self.ca_file.clone(),
            ..S3Config::new(address)
        }))
    }
}

fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let wrong = |message: String| ConfigError::Wrong { path: path.to_owned(), message };
    let config: Config =
        toml::from_str(text).map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
    config.check().map_err(wrong)?;
    Ok(config)
}

impl Config {
    /// What no type says.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn check(&self) -> Result<(), String> {
        self.pool.s3()?;
        if self.pool.wait_seconds == 0 {
            return Err("[pool] wait_seconds: must be at least 1".to_owned());
        }
        let addresses = self.nbd.listen.iter().map(|text| ("nbd", text));
        for (room, text) in addresses.chain([("http", &self.http.listen)]) {
            if text.parse::<std::net::SocketAddr>().is_err() {
                return Err(format!(
                    "[{room}] listen: \"{text}\" is no address and port; write it like 127.0.0.1:10809 or [::1]:10809"
                ));
            }
        }
        let nbd = &self.nbd;
        match (&nbd.tls_certificate, &nbd.tls_key) {
            (Some(_), None) => return Err("[nbd] tls_certificate: there is no tls_key to it".to_owned()),
            (None, Some(_)) => return Err("[nbd] tls_key: there is no tls_certificate to it".to_owned()),
            (None, None) if nbd.tls_client_ca.is_some() || nbd.tls_required => {
                let setting = if nbd.tls_required { "tls_required" } else { "tls_client_ca" };
                return Err(format!("[nbd] {setting}: needs tls_certificate and tls_key"));
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        if self.commit.age_seconds == 0 {
            return Err("[commit] age_seconds: must be at least 1".to_owned());
        }
        if self.limits.http_connections == 0 || self.limits.nbd_connections == 0 {
            return Err("[limits]: a limit of 0 connections would lock everybody out".to_owned());
        }
        Ok(())
    }
}

/// The sample file: `config` with a comment on each setting. The only place where they are described.
pub fn sample(config: &Config) -> String {
    let text = |value: &str| toml::Value::from(value).to_string();
    let path = |path: &Path| text(&path.to_string_lossy());
    let list = |values: &[String]| toml::Value::from(values.to_vec()).to_string();
    let maybe = |name: &str, value: &Option<PathBuf>, example: &str| match value {
        Some(value) => format!("{name} = {}", path(value)),
        None => format!("# {name} = \"{example}\""),
    };
    let runtime_dir = maybe("runtime_dir", &config.state.runtime_dir, "/run/blockhouse");
    let tls_certificate = maybe("tls_certificate", &config.nbd.tls_certificate, "tls/server.pem");
    let tls_key = maybe("tls_key", &config.nbd.tls_key, "tls/server.key");
    let tls_client_ca = maybe("tls_client_ca", &config.nbd.tls_client_ca, "tls/clients.pem");
    let optional = |name: &str, value: Option<String>, example: &str| match value {
        Some(value) => format!("{name} = {value}"),
        None => format!("# {name} = {example}"),
    };
    let Config { pool, state, nbd, http, cache, commit, limits } = config;
    format!(
        "\
# Sizes: K, M, G, T are powers of 1024; KB, MB, GB, TB powers of 1000; or a number of bytes.

[pool]
# The object store: a directory, on any file system with hard links,
dir = {pool_dir}
# or, instead of it, a bucket. Credentials are found as by all AWS tools: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
# ~/.aws, or the role of the machine.
{pool_url}
# A server that is not Amazon's.
{pool_endpoint}
{pool_region}
# Whether the bucket is in the path instead of the host's name; by default with an endpoint.
{pool_path_style}
# Certificates (PEM) of the only authorities to trust, instead of the machine's.
{pool_ca_file}
# How long reads wait for a pool that is away before their clients get an error.
wait_seconds = {pool_wait_seconds}

[state]
# What is acknowledged and not yet in the pool, the clean cache, and the identity of this node. Local disk.
dir = {state_dir}
# Small maps of what was written. On tmpfs, so that no write waits for a disk; must be the same after a restart of the
# daemon. By default a directory in /run for root, one in the state directory for others.
{runtime_dir}

[nbd]
# Addresses that NBD clients connect to. There is no access control but `tls_client_ca`: keep it to networks that you
# trust.
listen = {nbd_listen}
# Unix socket for NBD clients on this host.
socket = {nbd_socket}
# TLS for clients that want it: the certificate of this server, with those that lead to its authority, and its key, all
# PEM. Files that are replaced are used for new connections at once.
{tls_certificate}
{tls_key}
# With this, clients that use TLS must have a certificate signed by one of these authorities.
{tls_client_ca}
# Whether clients by TCP must use TLS. Those by the Unix socket never must.
tls_required = {tls_required}

[http]
# Address of the API and the web page. There is no access control: keep it to this host.
listen = {http_listen}
# Unix socket of the API, for the command line. Only its owner may use it.
socket = {http_socket}
# Names besides localhost, this host's name and IP addresses under which browsers and clients may reach `listen`.
allowed_hosts = {allowed_hosts}

[cache]
# Blocks of the pool kept on local disk, allocated at once.
size = {cache_size}

[commit]
# A volume's data goes to the pool when this much is waiting,
dirty_bytes = {dirty_bytes}
# or when the oldest of it is this old.
age_seconds = {age_seconds}

[limits]
# HTTP connections beyond this wait until another one ends, NBD clients are turned away.
http_connections = {http_connections}
nbd_connections = {nbd_connections}
",
        pool_dir = path(&pool.dir),
        pool_url = optional("url", pool.url.as_deref().map(text), "\"s3://bucket/prefix\""),
        pool_endpoint =
            optional("endpoint", pool.endpoint.as_deref().map(text), "\"https://s3.example.org:9000\""),
        pool_region = optional("region", pool.region.as_deref().map(text), "\"eu-central-1\""),
        pool_path_style = optional("path_style", pool.path_style.map(|is| is.to_string()), "true"),
        pool_ca_file = optional("ca_file", pool.ca_file.as_deref().map(path), "\"ca.pem\""),
        pool_wait_seconds = pool.wait_seconds,
        state_dir = path(&state.dir),
        nbd_listen = list(&nbd.listen),
        nbd_socket = path(&nbd.socket),
        tls_required = nbd.tls_required,
        http_listen = text(&http.listen),
        http_socket = path(&http.socket),
        allowed_hosts = list(&http.allowed_hosts),
        cache_size = text(&cache.size.to_string()),
        dirty_bytes = text(&commit.dirty_bytes.to_string()),
        age_seconds = commit.age_seconds,
        http_connections = limits.http_connections,
        nbd_connections = limits.nbd_connections,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed() -> Config {
        Config {
            pool: PoolConfig {
                dir: "/srv/a \"pool\"".into(),
                url: Some("s3://bucket/a/b".into()),
                endpoint: Some("https://[::1]:9000".into()),
                region: Some("r\"1".into()),
                path_style: Some(false),
                ca_file: Some("ca.pem".into()),
                wait_seconds: 7,
            },
            state: StateConfig { dir: "s".into(), runtime_dir: Some("/run/blockhouse".into()) },
            nbd: NbdConfig {
                listen: vec!["[::1]:1".into(), "0.0.0.0:2".into()],
                socket: "n".into(),
                tls_certificate: Some("c".into()),
                tls_key: Some("/k".into()),
                tls_client_ca: Some("a".into()),
                tls_required: true,
            },
            http: HttpConfig {
                listen: "[::]:3".into(),
                socket: "h".into(),
                allowed_hosts: vec!["a.b".into()],
            },
            cache: CacheConfig { size: Size(513) },
            commit: CommitConfig { dirty_bytes: Size(1 << 40), age_seconds: 11 },
            limits: LimitsConfig { http_connections: 1, nbd_connections: 2 },
        }
    }

    #[test]
    fn the_sample_parses_back_to_what_it_was_made_from() {
        for config in [Config::default(), changed()] {
            assert_eq!(parse(&sample(&config), Path::new("sample")).unwrap(), config);
        }
    }

    #[test]
    fn the_sample_names_every_setting() {
        // Serialised by serde, so that a setting that is added and not described fails here.
        let all = toml::Table::try_from(changed()).unwrap();
        let shown: toml::Table = toml::from_str(&sample(&changed())).unwrap();
        assert_eq!(all, shown);
    }

    #[test]
    fn what_is_not_written_is_the_default_and_unknown_settings_are_refused() {
        let path = Path::new("f");
        assert_eq!(parse("", path).unwrap(), Config::default());
        assert_eq!(parse("[cache]\nsize = 4096", path).unwrap().cache.size, Size(4096));
        for (wrong, named) in [
            ("[pool]\nurl = \"http://x\"", "s3://bucket/prefix"),
            ("[pool]\nurl = \"s3://../x\"", "bucket"),
            ("[pool]\nendpoint = \"https://x\"", "url"),
            ("[pool]\nurl = \"s3://bucket\"\nendpoint = \"s3.example.org\"", "https://"),
            ("[pool]\nurl = \"s3://bucket\"\nendpoint = \"https://u:p@x/\"", "no server"),
            ("[pool]\nwait_seconds = 0", "wait_seconds"),
            ("[cash]", "cash"),
            ("[cache]\nsise = 1", "sise"),
            ("[cache]\nsize = \"1X\"", "\"X\" is no unit"),
            ("[cache]\nsize = -1", "negative"),
            ("[nbd]\nlisten = [\"localhost\"]", "localhost"),
            ("[http]\nlisten = \"8420\"", "8420"),
            ("[nbd]\ntls_certificate = \"c\"", "no tls_key"),
            ("[nbd]\ntls_key = \"k\"", "no tls_certificate"),
            ("[nbd]\ntls_client_ca = \"a\"", "tls_client_ca: needs"),
            ("[nbd]\ntls_required = true", "tls_required: needs"),
            ("[commit]\nage_seconds = 0", "age_seconds"),
            ("[limits]\nnbd_connections = 0", "limits"),
        ] {
            let message = parse(wrong, path).unwrap_err().to_string();
            assert!(message.contains(named), "{wrong}: {message}");
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "tests")]
    fn relative_paths_start_at_the_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let loaded = Loaded::load(None, Some(dir.path())).unwrap();
        assert_eq!(loaded.file, None);
        assert_eq!(loaded.resolved().pool.dir, dir.path().join("pool"));
        assert_eq!(loaded.resolved().http.socket, dir.path().join("state/control.sock"));
        std::fs::write(dir.path().join(CONFIG_FILE), "[pool]\ndir = \"/srv/pool\"").unwrap();
        let loaded = Loaded::load(None, Some(dir.path())).unwrap();
        assert_eq!(loaded.resolved().pool.dir, Path::new("/srv/pool"));
        let resolved = Loaded { written: changed(), ..loaded.clone() }.resolved();
        assert_eq!(resolved.nbd.tls_certificate, Some(dir.path().join("c")));
        assert_eq!(resolved.nbd.tls_key, Some("/k".into()));
        assert_eq!(parse(&loaded.show(), Path::new("shown")).unwrap(), loaded.written);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "tests")]
    fn a_named_file_must_be_there_and_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.toml");
        assert!(matches!(Loaded::load(Some(&path), None), Err(ConfigError::Read { .. })));
        std::fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
        assert!(matches!(Loaded::load(Some(&path), None), Err(ConfigError::Read { .. })));
    }
}
