//! Sources made by the tools that people make images with, whole, cut and damaged.
#![expect(clippy::disallowed_methods, reason = "tests")]

use super::*;
use crate::geometry::BLOCK_BYTES;
use futures::StreamExt;
use std::process::Command;
use tempfile::TempDir;

const KIB: usize = 1024;

fn limits() -> SourceLimits {
    SourceLimits { raw_bytes_max: 1 << 40, spool_bytes_max: 1 << 30 }
}

fn stream_of(bytes: &[u8], chunk_len: usize) -> BoxStream<'static, io::Result<Bytes>> {
    let chunks: Vec<_> = bytes.chunks(chunk_len).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
    futures::stream::iter(chunks).boxed()
}

async fn open(bytes: &[u8], total_bytes: Option<u64>) -> Result<RawSource, SourceError> {
    let dir = std::env::temp_dir();
    open_source(stream_of(bytes, 10_007), total_bytes, dir, limits()).await
}

/// The whole disk, checked to come in order and without gaps.
async fn collect(mut source: RawSource) -> Result<Vec<u8>, SourceError> {
    let mut disk = Vec::new();
    while let Some(piece) = source.next().await? {
        match piece {
            Piece::Data(offset, bytes) => {
                assert_eq!(offset, u64::try_from(disk.len()).unwrap());
                assert!(!bytes.is_empty() && bytes.len() <= PIECE_LEN_MAX);
                disk.extend_from_slice(&bytes);
            }
            Piece::Zeros(range) => {
                assert_eq!(range.start(), u64::try_from(disk.len()).unwrap());
                assert!(!range.is_empty());
                disk.resize(usize::try_from(range.end()).unwrap(), 0);
            }
        }
    }
    assert!(source.next().await.unwrap().is_none(), "the end stays the end");
    if let Some(size_bytes) = source.size_bytes {
        assert_eq!(size_bytes, u64::try_from(disk.len()).unwrap());
    }
    Ok(disk)
}

async fn read(bytes: &[u8]) -> Result<Vec<u8>, SourceError> {
    collect(open(bytes, None).await?).await
}

fn noise(len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut out);
    out
}

/// Noise, text, and holes of several sizes.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; 5 * 1024 * KIB + 512];
    disk[..300 * KIB].copy_from_slice(&noise(300 * KIB));
    disk[1000 * KIB..1100 * KIB].fill(7);
    disk[3000 * KIB..3001 * KIB].fill(8);
    disk.last_mut().unwrap().clone_from(&9);
    disk
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn run(&self, command: &str) {
        let status = Command::new("sh").args(["-ec", command]).current_dir(self.0.path()).status().unwrap();
        assert!(status.success(), "{command}");
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.0.path().join(name), bytes).unwrap();
    }

    /// What `command` writes to the file `out`, given `input` in the file `in`.
    fn make(&self, input: &[u8], command: &str) -> Vec<u8> {
        self.write("in", input);
        self.run(command);
        std::fs::read(self.0.path().join("out")).unwrap()
    }
}

#[tokio::test]
async fn a_raw_image_comes_back_in_pieces_with_its_holes() {
    let disk = disk();
    let total = u64::try_from(disk.len()).unwrap();
    let source = open(&disk, Some(total)).await.unwrap();
    assert_eq!(source.size_bytes, Some(total));
    assert_eq!(collect(source).await.unwrap(), disk);

    let mut source = open(&disk, None).await.unwrap();
    assert_eq!(source.size_bytes, None);
    assert!(matches!(source.next().await.unwrap(), Some(Piece::Data(0, bytes)) if bytes.len() == 384 * KIB));
    let hole = ByteRange::new(3 * BLOCK_BYTES, 4 * BLOCK_BYTES);
    assert_eq!(source.next().await.unwrap(), Some(Piece::Zeros(hole)));
}

#[tokio::test]
async fn a_raw_image_of_an_odd_size_is_padded_to_a_sector() {
    for len in [1, 511, 513, PIECE_LEN_MAX - 1, PIECE_LEN_MAX, PIECE_LEN_MAX + 1] {
        let mut disk = noise(len);
        let source = open(&disk, Some(u64::try_from(len).unwrap())).await.unwrap();
        disk.resize(len.next_multiple_of(512), 0);
        assert_eq!(source.size_bytes, Some(u64::try_from(disk.len()).unwrap()));
        assert_eq!(collect(source).await.unwrap(), disk);
    }
}

#[tokio::test]
async fn nothing_is_not_an_image() {
    assert!(matches!(read(&[]).await, Err(SourceError::Truncated { .. })));
}

#[tokio::test]
async fn compressed_images_come_back_with_one_or_many_members() {
    let files = Files::new();
    let disk = disk();
    for command in [
        "gzip -c in > out",
        "xz -c -T2 --block-size=1MiB in > out",
        "zstd -q -c in > out",
        "zstd -q -c --no-content-size --long=27 < in > out",
        "head -c 700000 in | gzip -c > out; tail -c +700001 in | gzip -c >> out",
        "head -c 700000 in | xz -c > out; tail -c +700001 in | xz -c >> out",
        "head -c 700000 in | zstd -q -c > out; tail -c +700001 in | zstd -q -c >> out",
    ] {
        let bytes = files.make(&disk, command);
        assert!(read(&bytes).await.unwrap() == disk, "{command}");
    }
}

#[tokio::test]
async fn qcow2_images_come_back_with_their_holes() {
    let files = Files::new();
    let disk = disk();
    for command in [
        "qemu-img convert -O qcow2 in out",
        "qemu-img convert -c -O qcow2 in out",
        "qemu-img convert -O qcow2 -o compat=0.10 in out",
        "qemu-img convert -O qcow2 -o cluster_size=4k in out",
        "qemu-img convert -c -O qcow2 -o cluster_size=2M in out",
        "qemu-img convert -O qcow2 -o preallocation=metadata in out",
        "qemu-img convert -O qcow2 in out; qemu-img snapshot -c one out",
        "qemu-img convert -O qcow2 in q; gzip -c q > out",
        "qemu-img convert -O qcow2 in q; xz -c q > out",
        "qemu-img convert -O qcow2 in q; zstd -q -c q > out",
    ] {
        let bytes = files.make(&disk, command);
        let source = open(&bytes, None).await.unwrap();
        assert_eq!(source.size_bytes, Some(u64::try_from(disk.len()).unwrap()), "{command}");
        assert!(collect(source).await.unwrap() == disk, "{command}");
    }
}

#[tokio::test]
async fn holes_of_a_qcow2_are_not_read_byte_by_byte() {
    let files = Files::new();
    let bytes = files
        .make(&[], "qemu-img create -q -f qcow2 out 1000G; qemu-io -c 'write -P 5 900G 64k' out > /dev/null");
    let mut source = open(&bytes, None).await.unwrap();
    let (mut data, mut at) = (0, 0);
    while let Some(piece) = source.next().await.unwrap() {
        match piece {
            Piece::Data(offset, bytes) => {
                assert_eq!(offset, at);
                data += bytes.len();
                at += u64::try_from(bytes.len()).unwrap();
            }
            Piece::Zeros(range) => {
                assert_eq!(range.start(), at);
                at = range.end();
            }
        }
    }
    assert_eq!((data, at), (128 * KIB, 1000 << 30));
}

#[tokio::test]
async fn a_qcow2_that_needs_other_files_or_keys_is_refused_with_advice() {
    let files = Files::new();
    for (command, word) in [
        (
            "qemu-img create -q -f qcow2 base 1M; qemu-img create -q -f qcow2 -b base -F qcow2 out",
            "backing file",
        ),
        ("qemu-img create -q -f qcow2 -o data_file=data out 1M", "another file"),
        (
            "qemu-img create -q -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s out 1M",
            "encrypted",
        ),
        ("qemu-img create -q -f qcow2 -o compression_type=zstd out 1M", "zstd"),
        ("qemu-img create -q -f qcow2 -o extended_l2=on out 1M", "extended"),
        ("qemu-img convert -q -O vmdk in out", "VMDK"),
        ("qemu-img convert -q -O vhdx in out", "VHDX"),
        ("qemu-img convert -q -O vdi in out", "VDI"),
        ("gzip -c in | xz -c > out", "twice"),
    ] {
        let bytes = files.make(&vec![1; 1 << 20], command);
        let refused = read(&bytes).await.unwrap_err();
        assert!(
            matches!(&refused, SourceError::Unsupported(text) if text.contains(word)),
            "{command}: {refused}"
        );
    }
}

#[tokio::test]
async fn a_stream_that_is_shorter_or_longer_than_announced_is_refused() {
    let disk = disk();
    let total = u64::try_from(disk.len()).unwrap();
    let shorter = collect(open(&disk, Some(total + 1)).await.unwrap()).await;
    assert!(matches!(shorter, Err(SourceError::Truncated { at_bytes, .. }) if at_bytes == total));
    let longer = collect(open(&disk, Some(total - 1)).await.unwrap()).await;
    assert!(matches!(longer, Err(SourceError::TooLarge { .. })));
}

#[tokio::test]
async fn a_failed_stream_says_where_it_failed() {
    let chunks = vec![Ok(Bytes::from(noise(5000))), Err(io::Error::from(io::ErrorKind::ConnectionReset))];
    let stream = futures::stream::iter(chunks).boxed();
    let source = open_source(stream, None, std::env::temp_dir(), limits()).await.unwrap();
    let failed = collect(source).await;
    assert!(matches!(failed, Err(SourceError::Read { at_bytes: 5000, .. })), "{failed:?}");
}

#[tokio::test]
async fn compressed_images_that_are_cut_anywhere_but_between_members_are_refused() {
    let files = Files::new();
    let disk = [noise(700), vec![0; 3000]].concat();
    for tool in ["gzip -c", "xz -c", "zstd -q -c"] {
        let command = format!("head -c 2000 in | {tool} > out");
        let border = files.make(&disk, &command).len();
        let command = format!("head -c 2000 in | {tool} > out; tail -c +2001 in | {tool} >> out");
        let bytes = files.make(&disk, &command);
        assert_eq!(read(&bytes).await.unwrap()[..disk.len()], disk);
        // Fewer bytes than the magic are raw.
        for len in (8..bytes.len()).filter(|len| *len != border) {
            let refused = read(&bytes[..len]).await;
            assert!(refused.is_err(), "{tool} cut to {len} of {} bytes", bytes.len());
        }
        let trailing = [bytes.as_slice(), b"garbage!"].concat();
        assert!(read(&trailing).await.is_err(), "{tool} with trailing garbage");
    }
}

#[tokio::test]
async fn damaged_compressed_images_are_refused_or_read_right() {
    let files = Files::new();
    let disk = [noise(700), vec![3; 3000]].concat();
    let mut padded = disk.clone();
    padded.resize(disk.len().next_multiple_of(512), 0);
    for command in ["gzip -c in > out", "xz -c in > out", "zstd -q --check -c < in > out"] {
        let bytes = files.make(&disk, command);
        // The first bytes say what it is; without them it is a raw image.
        for at in 6..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            if let Ok(found) = read(&damaged).await {
                assert!(found == padded, "{command}: byte {at}");
            }
        }
    }
}

#[tokio::test]
async fn a_cut_qcow2_is_refused_and_not_read_as_a_disk_with_holes() {
    let files = Files::new();
    for command in
        ["qemu-img convert -O qcow2 -o cluster_size=4k in out", "qemu-img convert -c -O qcow2 in out"]
    {
        let bytes = files.make(&disk(), command);
        for parts in 0..40 {
            let len = bytes.len() * parts / 40;
            if len >= 8 {
                let refused = read(&bytes[..len]).await;
                assert!(
                    matches!(refused, Err(SourceError::Truncated { .. })),
                    "{command} cut to {len}: {refused:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn g19_a_damaged_qcow2_header_costs_nothing_and_never_panics() {
    let files = Files::new();
    let bytes = files.make(&noise(100 * KIB), "qemu-img convert -O qcow2 -o cluster_size=4k in out");
    for at in (4..112).chain(4096..4112) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            let dir = std::env::temp_dir();
            let limits = SourceLimits { raw_bytes_max: 1 << 24, ..limits() };
            if let Ok(source) = open_source(stream_of(&damaged, 1 << 16), None, dir, limits).await {
                drop(collect(source).await);
            }
        }
    }
}

#[tokio::test]
async fn g19_a_bomb_stops_at_the_limit() {
    let files = Files::new();
    let limits = SourceLimits { raw_bytes_max: 8 << 20, spool_bytes_max: 2 << 20 };
    for command in [
        "head -c 64M /dev/zero | gzip -c > out",
        "head -c 64M /dev/zero | xz -c > out",
        "head -c 64M /dev/zero | zstd -q -c > out",
        "qemu-img create -q -f qcow2 out 64M",
        "head -c 3M /dev/zero > in; qemu-img convert -O qcow2 -S 0 in q; gzip -c q > out",
        "truncate -s 64M out",
    ] {
        let bytes = files.make(&[], command);
        let stream = stream_of(&bytes, 1 << 16);
        let refused = match open_source(stream, None, std::env::temp_dir(), limits).await {
            Ok(source) => collect(source).await.map(|disk| disk.len()),
            Err(error) => Err(error),
        };
        assert!(matches!(refused, Err(SourceError::TooLarge { .. })), "{command}: {refused:?}");
    }
}

#[tokio::test]
async fn a_spool_directory_that_is_not_there_is_named() {
    let files = Files::new();
    let bytes = files.make(&[], "qemu-img create -q -f qcow2 out 1M");
    let refused = open_source(stream_of(&bytes, 4096), None, PathBuf::from("/nowhere"), limits()).await;
    assert!(matches!(refused, Err(SourceError::Spool { dir, .. }) if dir == Path::new("/nowhere")));
}

#[tokio::test]
async fn g9_spooling_leaves_no_file_behind() {
    let (files, spool) = (Files::new(), TempDir::new().unwrap());
    let bytes = files.make(&disk(), "qemu-img convert -O qcow2 in out");
    let source = open_source(stream_of(&bytes, 4096), None, spool.path().to_owned(), limits()).await.unwrap();
    assert_eq!(std::fs::read_dir(spool.path()).unwrap().count(), 0);
    collect(source).await.unwrap();
}

#[tokio::test]
async fn a_source_that_is_dropped_lets_go_of_its_stream() {
    struct Flag(Option<tokio::sync::oneshot::Sender<()>>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.take().unwrap().send(()).unwrap();
        }
    }
    let (sender, dropped) = tokio::sync::oneshot::channel();
    let flag = Flag(Some(sender));
    let begin = futures::stream::iter([Ok(Bytes::from(noise(3 << 20)))]);
    let stream = begin.chain(futures::stream::pending()).map(move |item| {
        let _held = &flag;
        item
    });
    let mut source = open_source(stream.boxed(), None, std::env::temp_dir(), limits()).await.unwrap();
    source.next().await.unwrap();
    drop(source);
    dropped.await.unwrap();
}
