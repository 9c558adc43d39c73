//! The words of the command line.
//!
//! Owns: commands, options and their help.
//! Does not own: what they do.

use crate::control::size::Size;
use crate::node::service::ForkSource;
use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use std::path::PathBuf;
use std::str::FromStr;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  something went wrong
  2  the request is wrong
  3  there is no such thing
  4  it is there already, in use, or changed meanwhile
  5  no space, on the node or in the pool
  6  the pool or the daemon does not answer; later may work
  7  it is not known whether it was done; the same command again settles it
  8  data in the pool or on the disk fails its checks";

/// Turns an object store into fast block volumes.
#[derive(Parser, Debug)]
#[command(name = "blockhouse", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Args, Debug, Clone, Default)]
pub struct Global {
    /// Print the API's JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Unix socket of the daemon [default: $BLOCKHOUSE_SOCKET, that of the settings, or /run/blockhouse/control.sock]
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath, conflicts_with = "url")]
    pub socket: Option<PathBuf>,
    /// Address of a daemon instead of a socket, like http://127.0.0.1:8420
    #[arg(long, global = true, value_name = "URL", value_hint = ValueHint::Url)]
    pub url: Option<String>,
    /// Settings file [default: blockhouse.toml in the data directory, if there]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Data directory: pool, state and settings of a node, unless settings say otherwise [default: ./blockhouse-data]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub data: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the daemon
    Serve {
        /// Log level: error, warn, info, debug or trace [default: $BLOCKHOUSE_LOG, or info]
        #[arg(long, value_name = "LEVEL")]
        log: Option<log::LevelFilter>,
        #[command(flatten)]
        pool: PoolArgs,
    },
    /// Volumes: writable disks
    #[command(subcommand)]
    Volume(Volume),
    /// Images: read-only disks that volumes are made from
    #[command(subcommand)]
    Image(Image),
    /// Snapshots: past states of volumes
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Say what a name is, and where to reach it
    Resolve {
        #[arg(value_parser = named)]
        name: String,
    },
    /// Show space on the node and in the pool
    Df,
    /// Look for what is wrong, and say what to do about it
    Doctor,
    /// List what was deleted and can still be had back
    Trash,
    /// Settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a completion script for a shell
    Completions { shell: Shell },
}

/// Where the pool is, over what the settings say.
#[derive(Args, Debug, Clone, Default)]
pub struct PoolArgs {
    /// The pool: a directory, or s3://bucket/prefix
    #[arg(long, value_name = "ADDRESS", value_hint = ValueHint::DirPath)]
    pub pool: Option<String>,
    /// URL of an S3 server that is not Amazon's
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub endpoint: Option<String>,
    /// Region of the bucket
    #[arg(long)]
    pub region: Option<String>,
    /// Whether the bucket is in the path instead of the host's name [default: with an endpoint]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub path_style: Option<bool>,
    /// Certificates (PEM) of the only authorities that an S3 server is trusted by
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ca_file: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
pub enum Volume {
    /// Make a volume: empty, or from an image, a snapshot or another volume
    Create {
        #[arg(value_parser = named)]
        name: String,
        /// What it is made from: image:NAME, snapshot:VOLUME@NUMBER or volume:NAME
        #[arg(long, value_name = "SOURCE")]
        from: Option<ForkSource>,
        /// Size, like 40G, 1.5TiB (1024) or 40GB (1000) [default: that of the source]
        #[arg(long)]
        size: Option<Size>,
        /// Take the last commit of a volume that another node has attached, however old it is
        #[arg(long, requires = "from")]
        last_commit: bool,
        /// A note for people
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// List all volumes
    List,
    /// Show a volume
    Show {
        #[arg(value_parser = named)]
        name: String,
    },
    /// Serve a volume on this node, and say how to use it
    Attach {
        #[arg(value_parser = named)]
        name: String,
    },
    /// Put what is left into the pool and give a volume up
    Detach {
        #[arg(value_parser = named)]
        name: String,
        /// Without the pool: what is not in it yet stays on this node
        #[arg(long)]
        keep_local: bool,
    },
    /// Change the size of a volume
    Resize {
        #[arg(value_parser = named)]
        name: String,
        size: Size,
        /// Allow a smaller size, which cuts off what lies beyond
        #[arg(long)]
        force: bool,
    },
    /// Set a detached volume back to a snapshot; its present state becomes a new snapshot
    Rollback { snapshot: SnapshotName },
    /// Delete a detached volume; for a while it can be had back
    Delete {
        #[arg(value_parser = named)]
        name: String,
        /// Delete its snapshots too
        #[arg(long)]
        with_snapshots: bool,
        #[command(flatten)]
        confirm: Confirm,
    },
    /// Bring back a deleted volume or image
    Undelete {
        /// Its id in the trash, or its name
        #[arg(value_parser = named)]
        id: String,
        /// New name [default: the one that it had]
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
    },
    /// Make a new volume of local data that is in no history
    Recover {
        /// Id, from `blockhouse volume orphans`
        #[arg(value_parser = named)]
        orphan: String,
        /// Name of the new volume
        #[arg(value_parser = named)]
        name: String,
    },
    /// List local data that is in no history
    Orphans,
    /// Put what is acknowledged now into the pool, and wait until it is there
    WaitDurable {
        #[arg(value_parser = named)]
        name: String,
    },
}

#[derive(Subcommand, Debug)]
pub enum Image {
    /// Make an image of a disk: raw, raw.gz, raw.xz, raw.zst or qcow2
    Import {
        #[arg(value_parser = named)]
        name: String,
        /// A file, an http(s):// URL that the node reads itself, or - for standard input
        #[arg(value_hint = ValueHint::FilePath)]
        source: String,
        /// A note for people
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// List all images
    List,
    /// Show an image
    Show {
        #[arg(value_parser = named)]
        name: String,
    },
    /// Write an image out as a raw disk
    Export {
        #[arg(value_parser = named)]
        name: String,
        /// A file, sparse where the image has zeros, or - for standard output
        #[arg(value_hint = ValueHint::FilePath)]
        to: String,
        /// Overwrite what is there
        #[arg(long)]
        force: bool,
    },
    /// Delete an image; for a while it can be had back, and volumes made from it stay
    Delete {
        #[arg(value_parser = named)]
        name: String,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Subcommand, Debug)]
pub enum Snapshot {
    /// Keep the present state of a volume
    Create {
        #[arg(value_parser = named)]
        volume: String,
        /// A note for people
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// List snapshots
    List {
        /// Of this volume only
        volume: Option<String>,
    },
    /// Delete a snapshot
    Delete {
        snapshot: SnapshotName,
        #[command(flatten)]
        confirm: Confirm,
    },
}

#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Print the settings in effect, as a settings file with comments
    Show,
}

#[derive(Args, Debug)]
pub struct Confirm {
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

/// A name or an id. What else is wrong with it the daemon says; without any it would be asked something else.
fn named(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("a name has 1 to 128 characters".to_owned()) } else { Ok(text.to_owned()) }
}

/// `VOLUME@NUMBER`
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotName {
    pub volume: String,
    pub number: u64,
}

impl FromStr for SnapshotName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.rsplit_once('@')
            .filter(|(volume, _)| !volume.is_empty())
            .and_then(|(volume, number)| {
                Some(Self { volume: volume.to_owned(), number: number.parse().ok()? })
            })
            .ok_or_else(|| format!("\"{text}\" names no snapshot; write VOLUME@NUMBER, like vm-7@1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_promised_forms_parse() {
        for line in [
            "image import debian rootfs.raw",
            "image import debian -",
            "image import debian https://example.org/a.qcow2 --description x",
            "volume create vm-7 --from image:debian --size 40G",
            "volume create vm-8 --from snapshot:vm-7@1",
            "volume create vm-8 --from volume:vm-7 --last-commit",
            "volume attach vm-7 --json",
            "volume rollback vm-7@1",
            "volume delete vm-7 --yes --with-snapshots",
            "volume undelete vm-7 --as vm-9",
            "snapshot create vm-7",
            "snapshot delete vm-7@1 -y",
            "image export debian -",
            "--url http://x volume wait-durable vm-7",
            "serve --data /srv/b --log debug",
            "config show",
            "completions bash",
        ] {
            let words = ["blockhouse"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "volume create vm-7 --size 40X",
            "volume create vm-7 --from debian",
            "volume create vm-7 --last-commit",
            "volume rollback vm-7",
            "volume attach",
            "volume attach ",
            "snapshot delete @1",
            "serve --log loud",
            "df --url http://x --socket y",
        ] {
            let words = ["blockhouse"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
