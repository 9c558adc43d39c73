//! Where a node's directories are.
//!
//! Owns: the choice of the runtime directory, its name, and that this user alone can use it.
//! Does not own: what is in it. All calls block.

use super::{TEMPORARY_PREFIX, at, open_options};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// `f_type` of tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Holds the random id that tells this state directory's runtime directory from others'.
const ID_FILE: &str = "runtime-id";
/// Holds the boot id and the runtime directory that was used in it.
const LAST_FILE: &str = "runtime-last";
/// Before the boot id in the name of a runtime directory inside the state directory.
const FALLBACK_PREFIX: &str = "runtime-";

/// Makes a directory for this user only, with those above it, durably.
pub(super) fn make_dirs(path: &Path) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    make_dirs(parent)?;
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(at("make directory", path)(error)),
        _ => sync_directory(parent),
    }
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(at("sync directory", path))
}

pub(super) fn is_tmpfs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|found| u64::try_from(found.f_type) == Ok(TMPFS_MAGIC))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn read_boot_id() -> io::Result<[u8; 16]> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(at("read", path))?;
    let digits: Vec<u32> = text.trim().chars().filter(|&c| c != '-').filter_map(|c| c.to_digit(16)).collect();
    let mut id = [0; 16];
    if digits.len() != 32 {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("{} is no boot id", text.trim())));
    }
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(pair[0] * 16 + pair[1]).unwrap_or_default();
    }
    Ok(id)
}

/// Removes the live maps that earlier boots left in the state directory. Nobody believes them any more.
pub(super) fn remove_old_fallbacks(state_dir: &Path, boot_id: [u8; 16]) {
    let current = format!("{FALLBACK_PREFIX}{}", hex(&boot_id));
    let names = fs::read_dir(state_dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    for name in names.filter_map(|name| name.into_string().ok()) {
        let of_a_boot = name
            .strip_prefix(FALLBACK_PREFIX)
            .is_some_and(|id| id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit()));
        if of_a_boot && name != current {
            let path = state_dir.join(name);
            if let Err(error) = fs::remove_dir_all(&path) {
                log::warn!("failed to remove live maps of an earlier boot, {}: {error}", path.display());
            }
        }
    }
}

/// The id that this state directory's runtime directory goes by.
fn runtime_id(state_dir: &Path) -> io::Result<String> {
    let path = state_dir.join(ID_FILE);
    if let Some(id) = read_id(&path)? {
        return Ok(id);
    }
    // By a link, which never replaces: another process that starts just now may have made one, and uses it.
    let id = hex(&rand::random::<[u8; 16]>());
    let own = state_dir.join(format!("{TEMPORARY_PREFIX}{id}"));
    replace_file(&own, &state_dir.join(format!("{TEMPORARY_PREFIX}{id}-new")), id.as_bytes())?;
    let linked = fs::hard_link(&own, &path);
    fs::remove_file(&own).map_err(at("remove", &own))?;
    match linked {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(at("make", &path)(error)),
        _ => sync_directory(state_dir)?,
    }
    read_id(&path)?.ok_or_else(|| at("read", &path)(ErrorKind::NotFound.into()))
}

fn read_id(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(id) if id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit()) => Ok(Some(id)),
        Ok(_) => Err(io::Error::new(ErrorKind::InvalidData, format!("{} holds no id", path.display()))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("read", path)(error)),
    }
}

/// The runtime directory, and whether it is on tmpfs.
pub(super) fn choose_runtime_dir(
    state_dir: &Path,
    given: Option<PathBuf>,
    boot_id: [u8; 16],
) -> io::Result<(PathBuf, bool)> {
    let id = runtime_id(state_dir)?;
    let is_root = rustix::process::geteuid().is_root();
    let wanted = match given {
        Some(base) => {
            make_dirs(&base)?;
            let base = fs::canonicalize(&base).map_err(at("resolve", &base))?;
            is_tmpfs(&base).then(|| base.join(&id))
        }
        None if is_root && is_tmpfs(Path::new("/run")) => Some(Path::new("/run/blockhouse").join(&id)),
        // A plain user's files there may be removed when the user logs out.
        None if is_root && is_tmpfs(Path::new("/dev/shm")) => {
            Some(PathBuf::from(format!("/dev/shm/blockhouse-{id}")))
        }
        None => None,
    };
    let wanted = wanted.unwrap_or_else(|| state_dir.join(format!("{FALLBACK_PREFIX}{}", hex(&boot_id))));
    let chosen = match last_runtime_dir(state_dir, boot_id)? {
        Some(last) if last != wanted => {
            log::warn!(
                "live maps of this boot are in {}: it stays the runtime directory until the next one, instead of {}",
                last.display(),
                wanted.display()
            );
            last
        }
        _ => wanted,
    };
    make_private(&chosen)?;
    let text = format!("{}\n{}", hex(&boot_id), chosen.display());
    if fs::read_to_string(state_dir.join(LAST_FILE)).ok().as_ref() != Some(&text) {
        let temporary = state_dir.join(format!("{TEMPORARY_PREFIX}{LAST_FILE}"));
        replace_file(&state_dir.join(LAST_FILE), &temporary, text.as_bytes())?;
    }
    let on_tmpfs = is_tmpfs(&chosen);
    Ok((chosen, on_tmpfs))
}

/// The runtime directory that was used in this boot, if there is anything in it: another choice would leave what
/// survived a kill behind.
fn last_runtime_dir(state_dir: &Path, boot_id: [u8; 16]) -> io::Result<Option<PathBuf>> {
    let path = state_dir.join(LAST_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at("read", &path)(error)),
    };
    let Some((boot, dir)) = text.split_once('\n') else { return Ok(None) };
    if boot != hex(&boot_id) {
        return Ok(None);
    }
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_some().then(|| PathBuf::from(dir))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("look for live maps in", Path::new(dir))(error)),
    }
}

/// Makes a directory that nobody else can use, or sees to it that it is one.
fn make_private(path: &Path) -> io::Result<()> {
    make_dirs(path)?;
    let found = fs::symlink_metadata(path).map_err(at("look at", path))?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        let text = format!("{} is not a directory of this user", path.display());
        return Err(io::Error::new(ErrorKind::PermissionDenied, text));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(at("make private", path))?;
    }
    Ok(())
}

/// Puts `data` in place of `path` as a whole and durably, by way of `temporary`, which nobody else writes.
pub(super) fn replace_file(path: &Path, temporary: &Path, data: &[u8]) -> io::Result<()> {
    let written = open_options()
        .create(true)
        .truncate(true)
        .open(temporary)
        .and_then(|mut file| file.write_all(data).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(temporary, path));
    if let Err(error) = written {
        // The first error is the one to tell; the leftover is not listed.
        drop(fs::remove_file(temporary));
        return Err(at("write", path)(error));
    }
    sync_directory(path.parent().unwrap_or(Path::new("/")))
}
