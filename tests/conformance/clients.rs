//! Where the clients are, and how to run them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A client that takes longer hangs.
const SECONDS_MAX: &str = "300";

/// Whose programs.
#[derive(Debug)]
pub enum Clients {
    /// This machine's.
    System,
    /// Those of a newer suite, unpacked here; they run with their own loader and libraries.
    Newer(PathBuf),
}

impl Clients {
    /// Both, or what there is.
    pub fn all() -> Vec<Self> {
        [Some(Self::System), Self::newer()].into_iter().flatten().collect()
    }

    pub fn newer() -> Option<Self> {
        let packages = ["unpack", "trixie", "clients", "python3-libnbd", "libnbd-bin", "qemu-utils"];
        support("tests/debian.py", &packages).map(|dir| Self::Newer(dir.into()))
    }

    /// A program to be started after these words.
    fn command(&self, before: &[&str], program: &str) -> Command {
        let mut command = Command::new(before[0]);
        command.args(&before[1..]).stdin(Stdio::null());
        match self {
            Self::System if program == "python3" => command.arg("/usr/bin/python3"),
            Self::System => command.arg(program),
            Self::Newer(dir) => command
                .arg(dir.join("usr/lib64/ld-linux-x86-64.so.2"))
                .arg("--library-path")
                .arg(dir.join("usr/lib/x86_64-linux-gnu"))
                .arg(dir.join("usr/bin").join(program))
                .env("PYTHONHOME", dir.join("usr"))
                .env("PYTHONPATH", dir.join("usr/lib/python3/dist-packages"))
                .env("QEMU_MODULE_DIR", dir.join("usr/lib/x86_64-linux-gnu/qemu")),
        };
        command
    }

    /// A program that goes on until the answer is dropped.
    pub fn start(&self, program: &str, arguments: &[&str]) -> Running {
        // `env` becomes the program, which so can be killed.
        Running(self.command(&["env"], program).args(arguments).spawn().unwrap())
    }

    /// Exit code, and what it printed.
    #[track_caller]
    pub fn try_run(&self, program: &str, arguments: &[&str]) -> (i32, String) {
        finish(self.command(&["timeout", "--kill-after=5", SECONDS_MAX], program).args(arguments))
    }

    /// What it printed. It has to succeed.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let (code, text) = self.try_run(program, arguments);
        assert_eq!(code, 0, "{self:?}: {program} {arguments:?}: {text}");
        text
    }
}

pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[track_caller]
pub fn finish(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap_or_else(|error| panic!("failed to run {command:?}: {error}"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Runs a script of this tree that fetches something and prints where it is. Where it cannot: `None`, and says so.
pub fn support(script: &str, arguments: &[&str]) -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let output = Command::new(&path).args(arguments).stdin(Stdio::null()).output().unwrap();
    if output.status.success() {
        return Some(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    println!("{}", String::from_utf8_lossy(&output.stderr));
    println!("skipped: {script} cannot fetch {}", arguments.join(" "));
    None
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; length_bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
