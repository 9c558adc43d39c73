//! `blockhouse image …`
//!
//! Owns: streaming images to and from the daemon, with progress, and sparse files.
//! Does not own: what an image is made of ([`crate::volume`]) or how a request is sent ([`super::client`]).

use super::args::Image;
use super::client::{Client, Outcome, Reply, encode};
use super::{Asker, confirm};
use crate::clock::Clock;
use crate::control::text::{Align, Paint, age, fields, plain, size, table, utc};
use crate::node::service::{ImageInfo, JobInfo, Refusal, ServiceError, TrashInfo};
use futures::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Method, Response, header};
use serde_json::json;
use std::io::{self, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use tokio_util::io::ReaderStream;

/// What is read at once from a file.
const READ_BYTES: usize = 1 << 20;
/// Zeros are skipped in runs of at least this, aligned: what file systems allocate.
const SPARSE_BYTES: usize = 4096;
const POLL_INTERVAL: Duration = Duration::from_millis(300);

pub(super) async fn run(asker: &Asker, command: Image) -> Outcome<()> {
    let client = &asker.client;
    match command {
        Image::Import { name, source, description } => {
            let reply = import(client, &name, &source, description.as_deref()).await?;
            asker.show(&reply, |job: JobInfo| {
                let (read, stored) = (size(job.done_bytes), size(job.stored_bytes));
                format!(
                    "Image {name}: read {read}, put {stored} into the pool.\n\
                     Make a volume of it with: blockhouse volume create NAME --from image:{name}\n"
                )
            })
        }
        Image::List => {
            let reply = client.get("/images").await?;
            asker.show(&reply, |images: Vec<ImageInfo>| list(&images, asker.paint))
        }
        Image::Show { name } => {
            let reply = client.get(&path(&name)).await?;
            asker.show(&reply, |image: ImageInfo| show(image, asker.paint))
        }
        Image::Export { name, to, force } => export(asker, &name, &to, force).await,
        Image::Delete { name, confirm: yes } => {
            confirm("image", &name, &yes)?;
            let reply = client.delete(&path(&name)).await?;
            asker.show(&reply, |trash: TrashInfo| super::volume::deleted(&trash))
        }
    }
}

fn path(name: &str) -> String {
    format!("/images/{}", encode(name))
}

fn local(what: impl std::fmt::Display, error: &io::Error) -> ServiceError {
    let refusal = match error.kind() {
        io::ErrorKind::NotFound => Refusal::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Refusal::NoSpace,
        io::ErrorKind::AlreadyExists => Refusal::Conflict,
        _ => Refusal::Internal,
    };
    ServiceError::new(refusal, format!("{what}: {error}"))
}

/// On standard error, and only on a terminal.
fn progress(total_bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match total_bytes {
        Some(total) => (
            ProgressBar::new(total),
            "{bar:30} {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
        ),
        None => (ProgressBar::no_length(), "{spinner} {binary_bytes}  {binary_bytes_per_sec}  {elapsed}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

async fn import(client: &Client, name: &str, source: &str, description: Option<&str>) -> Outcome<Reply> {
    if source.starts_with("http://") || source.starts_with("https://") {
        let body = json!({ "url": source, "description": description });
        let reply = client.put(&path(name), &body).await?;
        return follow(client, reply.parse()?, reply).await;
    }
    let (input, total_bytes) = open(source).await?;
    let bar = progress(total_bytes);
    let shown = bar.clone();
    let stream = ReaderStream::with_capacity(input, READ_BYTES).inspect(move |part| {
        if let Ok(part) = part {
            shown.inc(u64::try_from(part.len()).unwrap_or(0));
        }
    });
    let query = description.map(|text| format!("?description={}", encode(text))).unwrap_or_default();
    let mut request = client
        .request(Method::PUT, &format!("{}{query}", path(name)))
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .body(reqwest::Body::wrap_stream(stream));
    if let Some(total) = total_bytes {
        request = request.header(header::CONTENT_LENGTH, total);
    }
    let reply = client.reply(request).await;
    bar.finish_and_clear();
    reply
}

/// The source's bytes, and how many there are where that is known.
async fn open(source: &str) -> Outcome<(Box<dyn AsyncRead + Send + Unpin>, Option<u64>)> {
    if source == "-" {
        let input = standard(&io::stdin()).map_err(|error| local("failed to read standard input", &error))?;
        return Ok((Box::new(input), None));
    }
    let failed = |error| local(format_args!("failed to read {source}"), &error);
    let mut file = fs::File::open(source).await.map_err(failed)?;
    let meta = file.metadata().await.map_err(failed)?;
    if meta.is_dir() {
        return Err(ServiceError::new(Refusal::Invalid, format!("{source} is a directory, not a disk")));
    }
    if !(meta.is_file() || is_block_device(&meta)) {
        return Ok((Box::new(file), None));
    }
    let total = file.seek(SeekFrom::End(0)).await.map_err(failed)?;
    file.rewind().await.map_err(failed)?;
    Ok((Box::new(file.take(total)), Some(total)))
}

/// Standard input or output as a file: unbuffered, and off the thread that speaks to the daemon.
fn standard(stream: &impl AsFd) -> io::Result<fs::File> {
    let owned = stream.as_fd().try_clone_to_owned()?;
    Ok(fs::File::from_std(owned.into()))
}

fn is_block_device(meta: &std::fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_block_device(&meta.file_type())
}

/// Waits for an import that the node does by itself.
async fn follow(client: &Client, mut job: JobInfo, mut reply: Reply) -> Outcome<Reply> {
    let bar = progress(job.total_bytes);
    while job.state == "running" {
        if let Some(total) = job.total_bytes {
            bar.set_length(total);
        }
        bar.set_position(job.done_bytes);
        tokio::time::sleep(POLL_INTERVAL).await;
        reply = client.get(&format!("/jobs/{}", job.id)).await?;
        job = reply.parse()?;
    }
    bar.finish_and_clear();
    match job.error {
        Some(error) => Err(ServiceError::new(Refusal::Internal, format!("failed to {}: {error}", job.what))),
        None if job.state == "failed" => {
            Err(ServiceError::new(Refusal::Internal, format!("failed to {}", job.what)))
        }
        None => Ok(reply),
    }
}

async fn export(asker: &Asker, name: &str, to: &str, force: bool) -> Outcome<()> {
    if to != "-" && !force && fs::symlink_metadata(to).await.is_ok() {
        return Err(
            ServiceError::new(Refusal::Conflict, format!("{to} is there already")).hint("add --force")
        );
    }
    let request = asker.client.request(Method::GET, &format!("{}/raw", path(name)));
    let response = asker.client.send(request).await?;
    let size_bytes = response.content_length();
    let bar = progress(size_bytes);
    let written = if to == "-" {
        to_stdout(response, &bar).await
    } else {
        to_file(response, Path::new(to), &bar).await
    };
    bar.finish_and_clear();
    let bytes = written?;
    if to != "-" {
        asker.say(&format!("Image {name} is in {to} ({}).", size(bytes)));
    }
    Ok(())
}

fn broken(error: &reqwest::Error) -> ServiceError {
    ServiceError::new(Refusal::Unavailable, format!("the image broke off: {error}"))
        .hint("the daemon's log says why")
}

async fn to_stdout(mut response: Response, bar: &ProgressBar) -> Outcome<u64> {
    let failed = |error| local("failed to write to standard output", &error);
    let mut stdout = standard(&io::stdout()).map_err(failed)?;
    let mut at = 0;
    while let Some(part) = response.chunk().await.map_err(|error| broken(&error))? {
        stdout.write_all(&part).await.map_err(failed)?;
        at += u64::try_from(part.len()).unwrap_or(0);
        bar.set_position(at);
    }
    stdout.flush().await.map_err(failed)?;
    Ok(at)
}

async fn to_file(response: Response, to: &Path, bar: &ProgressBar) -> Outcome<u64> {
    let failed = |error| local(format_args!("failed to write {}", to.display()), &error);
    let special = fs::metadata(to).await.is_ok_and(|meta| !meta.is_file());
    if special {
        // A device has no holes: what is skipped would keep its old content.
        let file = fs::OpenOptions::new().write(true).open(to).await.map_err(failed)?;
        return write_out(response, file, Holes::Written, bar).await.map_err(|error| error.on(to));
    }
    // Under another name until it is whole, so that a failed export leaves no half of a disk that looks like one.
    let partial = PathBuf::from(format!("{}.partial", to.display()));
    let file = fs::File::create(&partial).await.map_err(failed)?;
    let written = write_out(response, file, Holes::Skipped, bar).await.map_err(|error| error.on(to));
    match written {
        Ok(bytes) => fs::rename(&partial, to).await.map_err(failed).map(|()| bytes),
        Err(error) => {
            // What is left is named after what it is.
            fs::remove_file(&partial).await.ok();
            Err(error)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Holes {
    Skipped,
    Written,
}

enum ExportError {
    Remote(reqwest::Error),
    Local(io::Error),
}

impl ExportError {
    fn on(self, to: &Path) -> ServiceError {
        match self {
            Self::Remote(error) => broken(&error),
            Self::Local(error) => local(format_args!("failed to write {}", to.display()), &error),
        }
    }
}

async fn write_out(
    mut response: Response,
    mut file: fs::File,
    holes: Holes,
    bar: &ProgressBar,
) -> Result<u64, ExportError> {
    let mut at: u64 = 0;
    while let Some(part) = response.chunk().await.map_err(ExportError::Remote)? {
        for (is_hole, run) in runs(&part, at) {
            let length = u64::try_from(run.len()).unwrap_or(0);
            if is_hole && holes == Holes::Skipped {
                file.seek(SeekFrom::Current(i64::try_from(run.len()).unwrap_or(0)))
                    .await
                    .map_err(ExportError::Local)?;
            } else {
                file.write_all(run).await.map_err(ExportError::Local)?;
            }
            at += length;
        }
        bar.set_position(at);
    }
    if holes == Holes::Skipped {
        file.set_len(at).await.map_err(ExportError::Local)?;
    }
    file.flush().await.map_err(ExportError::Local)?;
    file.sync_all().await.map_err(ExportError::Local)?;
    Ok(at)
}

/// `bytes`, which begin at `at` of the disk, as runs that are zeros or not; cut only where file systems allocate.
fn runs(bytes: &[u8], at: u64) -> Vec<(bool, &[u8])> {
    let mut runs: Vec<(bool, usize, usize)> = Vec::new();
    let mut start = 0;
    let into = usize::try_from(at % 4096).unwrap_or(0);
    let mut end = bytes.len().min(SPARSE_BYTES - into);
    while start < end {
        let is_hole = bytes[start..end].iter().all(|&byte| byte == 0);
        match runs.last_mut() {
            Some((last, _, until)) if *last == is_hole => *until = end,
            _ => runs.push((is_hole, start, end)),
        }
        start = end;
        end = bytes.len().min(end + SPARSE_BYTES);
    }
    runs.into_iter().map(|(is_hole, start, end)| (is_hole, &bytes[start..end])).collect()
}

fn list(images: &[ImageInfo], paint: Paint) -> String {
    if images.is_empty() {
        return "There are no images. Make one with: blockhouse image import NAME FILE\n".to_owned();
    }
    let header = [
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("STORED", Align::Right),
        ("STATE", Align::Left),
        ("CREATED", Align::Left),
        ("SOURCE", Align::Left),
    ];
    let now = Clock::System.wall();
    let row = |image: &ImageInfo| {
        vec![
            image.name.clone(),
            size(image.size_bytes),
            size(image.stored_bytes),
            image.state.clone(),
            age(image.created, now),
            image.source.clone(),
        ]
    };
    table(&header, &images.iter().map(row).collect::<Vec<_>>(), paint)
}

fn show(image: ImageInfo, paint: Paint) -> String {
    let created = format!("{} ({} UTC)", age(image.created, Clock::System.wall()), utc(image.created));
    let mut rows = vec![
        ("name", image.name),
        ("uid", image.uid),
        ("size", size(image.size_bytes)),
        ("stored", size(image.stored_bytes)),
        ("state", image.state),
        ("source", plain(&image.source)),
        ("created", created),
    ];
    rows.extend(image.description.map(|text| ("description", text)));
    fields(&rows, paint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_all_bytes_in_order_and_holes_are_zeros(
            parts in proptest::collection::vec((any::<bool>(), 0usize..9000), 0..6), at in 0u64..10_000,
        ) {
            let bytes: Vec<u8> = parts.iter().flat_map(|(zero, len)| vec![u8::from(!zero); *len]).collect();
            let found = runs(&bytes, at);
            let joined: Vec<u8> = found.iter().flat_map(|(_, run)| run.iter().copied()).collect();
            prop_assert_eq!(&joined, &bytes);
            for (is_hole, run) in &found {
                prop_assert!(!run.is_empty());
                prop_assert!(!is_hole || run.iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn zeros_of_a_whole_allocation_unit_become_a_hole() {
        let mut bytes = vec![0; 3 * 4096];
        bytes[4096] = 1;
        let kinds: Vec<(bool, usize)> =
            runs(&bytes, 0).iter().map(|(hole, run)| (*hole, run.len())).collect();
        assert_eq!(kinds, [(true, 4096), (false, 4096), (true, 4096)]);
    }
}
