//! Images on their way in: a stream of bytes in one of several formats becomes the content of a disk, in order.
//!
//! Owns: telling formats apart, decompression, spooling and reading qcow2, the limits on all of it.
//! Does not own: where the stream comes from, or what becomes of the pieces.
//!
//! Decoding computes and reads files, so one thread for blocking work does it for as long as the source lives; it
//! stops when the [`RawSource`] is dropped. Between it and the reader lie a few pieces.

mod qcow2;

use crate::geometry::{BLOCK_LEN, ByteRange, SECTOR_BYTES, VOLUME_BYTES_MAX};
use async_compression::tokio::bufread::{GzipDecoder, XzDecoder, ZstdDecoder};
use bytes::Bytes;
use futures::{Stream, stream::BoxStream};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio_util::io::StreamReader;

/// Largest [`Piece::Data`], and what is read at a time.
pub const PIECE_LEN_MAX: usize = 1 << 20;
/// Pieces that wait for their reader.
const PIECES_WAITING_MAX: usize = 4;
/// Memory that an xz stream may ask for; presets of the command line tool need up to 65 MiB.
const XZ_MEMORY_BYTES_MAX: u64 = 256 << 20;
/// Bytes that tell the formats apart.
const SNIFF_LEN: usize = 8;

/// What a source may cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceLimits {
    /// Size of the disk in the image; beyond it the source is refused.
    pub raw_bytes_max: u64,
    /// Size of a file that has to be spooled; beyond it the source is refused.
    pub spool_bytes_max: u64,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self { raw_bytes_max: VOLUME_BYTES_MAX, spool_bytes_max: VOLUME_BYTES_MAX }
    }
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The stream itself failed.
    #[error("failed to read the image at byte {at_bytes}: {source}")]
    Read { at_bytes: u64, source: io::Error },
    /// There should be more.
    #[error("the {what} ends too early, at byte {at_bytes}")]
    Truncated { what: &'static str, at_bytes: u64 },
    /// Not what it begins as.
    #[error("the {what} is damaged near byte {at_bytes}: {reason}")]
    Malformed { what: &'static str, at_bytes: u64, reason: String },
    /// Well formed, but of a kind that is not read; says what to do.
    #[error("{0}")]
    Unsupported(String),
    /// Beyond a limit.
    #[error("the {what} is larger than {limit_bytes} bytes")]
    TooLarge { what: &'static str, limit_bytes: u64 },
    /// The disk with the spool directory is full.
    #[error("no space left in {} for a temporary copy of the image, at byte {at_bytes}", dir.display())]
    NoSpace { dir: PathBuf, at_bytes: u64 },
    /// The temporary copy cannot be written or read.
    #[error("temporary copy of the image in {}: {source}", dir.display())]
    Spool { dir: PathBuf, source: io::Error },
}

/// A stretch of the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// Bytes from this offset on, at most [`PIECE_LEN_MAX`].
    Data(u64, Bytes),
    Zeros(ByteRange),
}

/// A disk image as the content of a disk.
#[derive(Debug)]
pub struct RawSource {
    /// Size of the disk, a multiple of 512, where it is known before all of it was read.
    pub size_bytes: Option<u64>,
    pieces: mpsc::Receiver<Result<Event, SourceError>>,
    ended: bool,
}

impl RawSource {
    /// The next piece: ascending, without gaps, from byte 0 to the end of the disk, which is `None`.
    ///
    /// # Errors
    /// [`SourceError`], once; what came before it is then worth nothing.
    ///
    /// # Cancellation
    /// Safe: no piece is lost.
    pub async fn next(&mut self) -> Result<Option<Piece>, SourceError> {
        if self.ended {
            return Ok(None);
        }
        let event = self.pieces.recv().await.unwrap_or_else(|| Err(decoder_failed()));
        match event {
            Ok(Event::Piece(piece)) => Ok(Some(piece)),
            Ok(Event::Opened { .. } | Event::End) => {
                self.ended = true;
                Ok(None)
            }
            Err(error) => {
                self.ended = true;
                Err(error)
            }
        }
    }
}

/// Finds out what `bytes` are, of which there are `total_bytes` if that is known, and begins to decode them: raw, or
/// qcow2, either of them perhaps in gzip, xz or zstd. A qcow2 is first copied to an unnamed file in `spool_dir`.
///
/// # Errors
/// [`SourceError`].
///
/// # Panics
/// Outside of a tokio runtime.
pub async fn open_source(
    bytes: BoxStream<'static, io::Result<Bytes>>,
    total_bytes: Option<u64>,
    spool_dir: PathBuf,
    limits: SourceLimits,
) -> Result<RawSource, SourceError> {
    let (sender, mut pieces) = mpsc::channel(PIECES_WAITING_MAX);
    let runtime = tokio::runtime::Handle::current();
    let decoder = Decoder { emitter: Emitter::new(sender.clone(), limits), total_bytes, spool_dir, limits };
    // Nobody joins the thread: it ends with the receiver, and if it panics the channel ends without a last word.
    drop(tokio::task::spawn_blocking(move || {
        runtime.block_on(async {
            let result = tokio::select! {
                result = decoder.run(bytes) => result,
                () = sender.closed() => return,
            };
            let last = match result {
                Ok(()) => Ok(Event::End),
                Err(Halt::Failed(error)) => Err(error),
                Err(Halt::Dropped) => return,
            };
            // A reader that is gone does not want to know.
            drop(sender.send(last).await);
        });
    }));
    match pieces.recv().await.unwrap_or_else(|| Err(decoder_failed()))? {
        Event::Opened { size_bytes } => Ok(RawSource { size_bytes, pieces, ended: false }),
        Event::Piece(_) | Event::End => Err(decoder_failed()),
    }
}

#[derive(Debug)]
enum Event {
    Opened { size_bytes: Option<u64> },
    Piece(Piece),
    End,
}

/// Why the decoder stops before the end.
enum Halt {
    Failed(SourceError),
    /// Nobody reads the pieces any more.
    Dropped,
}

impl From<SourceError> for Halt {
    fn from(error: SourceError) -> Self {
        Self::Failed(error)
    }
}

fn decoder_failed() -> SourceError {
    SourceError::Malformed { what: "image", at_bytes: 0, reason: "the decoder gave up".to_owned() }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Gzip,
    Xz,
    Zstd,
    Qcow2,
    /// A format of disk images that is not read, by name.
    Foreign(&'static str),
    Raw,
}

impl Kind {
    fn of(head: &[u8]) -> Self {
        let known: [(&[u8], Self); 9] = [
            (&[0x1f, 0x8b, 0x08], Self::Gzip),
            (b"\xfd7zXZ\0", Self::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd),
            (b"QFI\xfb", Self::Qcow2),
            (b"KDMV", Self::Foreign("VMDK")),
            (b"vhdxfile", Self::Foreign("VHDX")),
            (b"<<< Orac", Self::Foreign("VDI")),
            (b"<<< QEMU", Self::Foreign("VDI")),
            (b"BZh", Self::Foreign("bzip2")),
        ];
        known.iter().find(|(magic, _)| head.starts_with(magic)).map_or(Self::Raw, |(_, kind)| *kind)
    }
}

/// What runs on the thread.
struct Decoder {
    emitter: Emitter,
    total_bytes: Option<u64>,
    spool_dir: PathBuf,
    limits: SourceLimits,
}

impl Decoder {
    async fn run(self, bytes: BoxStream<'static, io::Result<Bytes>>) -> Result<(), Halt> {
        let at_bytes = Arc::new(AtomicU64::new(0));
        let checked = CheckedStream { bytes, at_bytes: at_bytes.clone(), total_bytes: self.total_bytes };
        let mut stream = Input { reader: Box::new(StreamReader::new(checked)), what: "image", at_bytes };
        let head = stream.read_head().await?;
        let kind = Kind::of(&head);
        let whole = io::Cursor::new(head).chain(stream.reader);
        let whole = tokio::io::BufReader::with_capacity(256 << 10, whole);
        let (what, reader): (_, Box<dyn AsyncRead + Unpin>) = match kind {
            Kind::Gzip => ("gzip stream", {
                let mut decoder = GzipDecoder::new(whole);
                decoder.multiple_members(true);
                Box::new(decoder)
            }),
            Kind::Xz => ("xz stream", {
                let mut decoder = XzDecoder::with_mem_limit(whole, XZ_MEMORY_BYTES_MAX);
                decoder.multiple_members(true);
                Box::new(decoder)
            }),
            Kind::Zstd => ("zstd stream", {
                let mut decoder = ZstdDecoder::new(whole);
                decoder.multiple_members(true);
                Box::new(decoder)
            }),
            Kind::Qcow2 | Kind::Foreign(_) | Kind::Raw => {
                let input = Input { reader: Box::new(whole), what: "image", at_bytes: stream.at_bytes };
                let size_bytes = self.total_bytes;
                return self.decode(kind, input, size_bytes).await;
            }
        };
        let mut input = Input { reader, what, at_bytes: stream.at_bytes };
        let head = input.read_head().await?;
        let kind = Kind::of(&head);
        let input = Input { reader: Box::new(io::Cursor::new(head).chain(input.reader)), ..input };
        self.decode(kind, input, None).await
    }

    async fn decode(mut self, kind: Kind, input: Input, size_bytes: Option<u64>) -> Result<(), Halt> {
        match kind {
            Kind::Raw => {
                if size_bytes.is_some_and(|size_bytes| size_bytes > self.limits.raw_bytes_max) {
                    return Err(self.emitter.too_large().into());
                }
                let size_bytes = size_bytes.map(|size_bytes| size_bytes.next_multiple_of(SECTOR_BYTES));
                self.emitter.send(Event::Opened { size_bytes }).await?;
                decode_raw(input, &mut self.emitter).await
            }
            Kind::Qcow2 => {
                let file = spool(input, &self.spool_dir, self.limits.spool_bytes_max).await?;
                qcow2::decode(file, &self.spool_dir, self.limits, &mut self.emitter).await
            }
            Kind::Gzip | Kind::Xz | Kind::Zstd => {
                let reason = "the image is compressed twice: decompress it once before the import";
                Err(SourceError::Unsupported(reason.to_owned()).into())
            }
            Kind::Foreign("bzip2") => {
                let reason = "the image is compressed with bzip2: decompress it, or use gzip, xz or zstd";
                Err(SourceError::Unsupported(reason.to_owned()).into())
            }
            Kind::Foreign(name) => {
                let reason = format!("{name} images are not read: convert it with qemu-img convert -O qcow2");
                Err(SourceError::Unsupported(reason).into())
            }
        }
    }
}

async fn decode_raw(mut input: Input, emitter: &mut Emitter) -> Result<(), Halt> {
    loop {
        let mut bytes = vec![0; PIECE_LEN_MAX];
        let len = input.fill(&mut bytes).await?;
        let padded_len = len.next_multiple_of(512);
        if padded_len != len {
            let added = padded_len - len;
            log::warn!(added; "the image does not end at a sector: added zeros");
        }
        bytes.truncate(padded_len);
        emitter.push(Bytes::from(bytes)).await?;
        if len < PIECE_LEN_MAX {
            return emitter.finish(&input).await;
        }
    }
}

/// Copies all of `input` to a file without a name.
async fn spool(mut input: Input, dir: &Path, bytes_max: u64) -> Result<File, SourceError> {
    let mut file = unnamed_file(dir).map_err(|source| SourceError::Spool { dir: dir.to_owned(), source })?;
    let mut at_bytes = 0;
    let mut bytes = vec![0; PIECE_LEN_MAX];
    loop {
        let len = input.fill(&mut bytes).await?;
        file.write_all(&bytes[..len]).map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                SourceError::NoSpace { dir: dir.to_owned(), at_bytes }
            }
            _ => SourceError::Spool { dir: dir.to_owned(), source },
        })?;
        at_bytes += u64::try_from(len).unwrap_or(u64::MAX);
        if at_bytes > bytes_max {
            return Err(SourceError::TooLarge { what: "qcow2 file", limit_bytes: bytes_max });
        }
        if len < bytes.len() {
            return Ok(file);
        }
    }
}

fn unnamed_file(dir: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        // File systems that cannot make a file without a name.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = dir.join(format!("import-{:032x}", rand::random::<u128>()));
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?;
            rustix::fs::unlink(&path)?;
            Ok(File::from(fd))
        }
        Err(error) => Err(error.into()),
    }
}

/// Puts pieces together and sends them.
struct Emitter {
    sender: mpsc::Sender<Result<Event, SourceError>>,
    limits: SourceLimits,
    at_bytes: u64,
    /// Zeros before `at_bytes` that were not sent yet.
    zero_bytes: u64,
}

impl Emitter {
    /// Zeros are sent by then, so that progress is seen.
    const ZERO_BYTES_MAX: u64 = 1 << 30;

    fn new(sender: mpsc::Sender<Result<Event, SourceError>>, limits: SourceLimits) -> Self {
        Self { sender, limits, at_bytes: 0, zero_bytes: 0 }
    }

    async fn send(&self, event: Event) -> Result<(), Halt> {
        self.sender.send(Ok(event)).await.map_err(|_| Halt::Dropped)
    }

    fn too_large(&self) -> SourceError {
        SourceError::TooLarge { what: "disk in the image", limit_bytes: self.limits.raw_bytes_max }
    }

    /// The bytes that follow. Blocks of zeros become zeros.
    async fn push(&mut self, bytes: Bytes) -> Result<(), Halt> {
        let is_zero = |at: usize| is_zero(&bytes[at..bytes.len().min(at + BLOCK_LEN)]);
        let mut at = 0;
        while at < bytes.len() {
            let zero = is_zero(at);
            let mut end = at + BLOCK_LEN;
            while end < bytes.len() && is_zero(end) == zero {
                end += BLOCK_LEN;
            }
            let end = end.min(bytes.len());
            let len = u64::try_from(end - at).unwrap_or(u64::MAX);
            if zero {
                self.push_zeros(len).await?;
            } else {
                self.flush_zeros().await?;
                let start = self.at_bytes;
                self.advance(len)?;
                self.send(Event::Piece(Piece::Data(start, bytes.slice(at..end)))).await?;
            }
            at = end;
        }
        Ok(())
    }

    async fn push_zeros(&mut self, len: u64) -> Result<(), Halt> {
        self.advance(len)?;
        self.zero_bytes += len;
        if self.zero_bytes >= Self::ZERO_BYTES_MAX { self.flush_zeros().await } else { Ok(()) }
    }

    fn advance(&mut self, len: u64) -> Result<(), SourceError> {
        let end = self.at_bytes.checked_add(len).filter(|end| *end <= self.limits.raw_bytes_max);
        self.at_bytes = end.ok_or_else(|| self.too_large())?;
        Ok(())
    }

    async fn flush_zeros(&mut self) -> Result<(), Halt> {
        let len = std::mem::take(&mut self.zero_bytes);
        if len == 0 {
            return Ok(());
        }
        self.send(Event::Piece(Piece::Zeros(ByteRange::new(self.at_bytes - len, len)))).await
    }

    async fn finish(&mut self, input: &Input) -> Result<(), Halt> {
        if self.at_bytes == 0 {
            return Err(SourceError::Truncated { what: input.what, at_bytes: input.at_bytes() }.into());
        }
        self.flush_zeros().await
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: &[u8] = &[0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// A reader whose errors say what was read, and where in the stream.
struct Input {
    reader: Box<dyn AsyncRead + Unpin>,
    what: &'static str,
    /// Of the stream, before decompression.
    at_bytes: Arc<AtomicU64>,
}

impl Input {
    fn at_bytes(&self) -> u64 {
        self.at_bytes.load(Ordering::Relaxed)
    }

    /// Fills `bytes`, less only at the end.
    async fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, SourceError> {
        let mut len = 0;
        while len < bytes.len() {
            match self.reader.read(&mut bytes[len..]).await {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error(error)),
            }
        }
        Ok(len)
    }

    async fn read_head(&mut self) -> Result<Vec<u8>, SourceError> {
        let mut head = vec![0; SNIFF_LEN];
        let len = self.fill(&mut head).await?;
        head.truncate(len);
        Ok(head)
    }

    fn error(&self, error: io::Error) -> SourceError {
        let (what, at_bytes) = (self.what, self.at_bytes());
        match error.downcast::<SourceError>() {
            Ok(error) => error,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                SourceError::Truncated { what, at_bytes }
            }
            Err(error) => SourceError::Malformed { what, at_bytes, reason: error.to_string() },
        }
    }
}

/// Counts what comes, and holds it against what was announced.
struct CheckedStream {
    bytes: BoxStream<'static, io::Result<Bytes>>,
    at_bytes: Arc<AtomicU64>,
    total_bytes: Option<u64>,
}

impl Stream for CheckedStream {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = std::task::ready!(self.bytes.as_mut().poll_next(context));
        let before = self.at_bytes.load(Ordering::Relaxed);
        let failed = |error| Poll::Ready(Some(Err(io::Error::other(error))));
        match (next, self.total_bytes) {
            (Some(Err(source)), _) => failed(SourceError::Read { at_bytes: before, source }),
            (None, Some(total)) if before < total => {
                failed(SourceError::Truncated { what: "image", at_bytes: before })
            }
            (None, _) => Poll::Ready(None),
            (Some(Ok(bytes)), total) => {
                let at_bytes = before.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                self.at_bytes.store(at_bytes, Ordering::Relaxed);
                match total {
                    Some(total) if at_bytes > total => {
                        failed(SourceError::TooLarge { what: "image", limit_bytes: total })
                    }
                    _ => Poll::Ready(Some(Ok(bytes))),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
