//! A server that keeps nothing and answers from memory: what the protocol, the sockets and the client leave to win.

use crate::client::{u32_at, u64_at};
use crate::server::announce;
use anyhow::{Result, bail, ensure};
use std::io::{IoSlice, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;

const BUFFER_BYTES: usize = 1 << 20;
const PAYLOAD_BYTES_MAX: usize = 32 << 20;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_ABORT: u32 = 2;
const REP_UNSUPPORTED: u32 = 0x8000_0001;

/// Serves until it is killed, or who started it is gone.
pub fn serve(size_bytes: u64, socket: Option<&Path>) -> Result<()> {
    std::thread::spawn(|| {
        // Ends when the other end of the pipe does.
        std::io::stdin().read_exact(&mut [0]).ok();
        std::process::exit(0);
    });
    let start = |stream: Box<dyn Stream>| {
        // A client that goes away is none of our business.
        std::thread::spawn(move || connection(stream, size_bytes).ok());
    };
    match socket {
        Some(path) => {
            let listener = UnixListener::bind(path)?;
            announce(0)?;
            for stream in listener.incoming() {
                start(Box::new(stream?));
            }
        }
        None => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            announce(listener.local_addr()?.port())?;
            for stream in listener.incoming() {
                let stream = stream?;
                stream.set_nodelay(true)?;
                start(Box::new(stream));
            }
        }
    }
    Ok(())
}

trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

fn connection(mut stream: Box<dyn Stream>, size_bytes: u64) -> Result<()> {
    let structured = handshake(&mut stream, size_bytes)?;
    let zeros = vec![0; PAYLOAD_BYTES_MAX];
    let (mut buffer, mut filled) = (vec![0; BUFFER_BYTES], 0);
    let mut skip = 0;
    let mut replies: Vec<([u8; 28], usize, usize)> = Vec::new();
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        ensure!(count > 0, "gone");
        filled += count;
        let mut at = 0;
        loop {
            let take = skip.min(filled - at);
            at += take;
            skip -= take;
            let bytes = &buffer[at..filled];
            // What is written is acknowledged when all of it is here.
            if skip > 0 || bytes.len() < 28 {
                break;
            }
            let length = usize::try_from(u32_at(bytes, 24))?;
            ensure!(length <= PAYLOAD_BYTES_MAX, "too long");
            let (kind, cookie, offset) = (u32_at(bytes, 4) & 0xffff, &bytes[8..16], &bytes[16..24]);
            let mut reply = [0; 28];
            let mut head = 16;
            reply[8..16].copy_from_slice(cookie);
            if structured && kind == 0 {
                reply[..4].copy_from_slice(&0x668e_33ef_u32.to_be_bytes());
                reply[4..8].copy_from_slice(&[0, 1, 0, 1]);
                reply[16..20].copy_from_slice(&u32::try_from(length + 8)?.to_be_bytes());
                reply[20..].copy_from_slice(offset);
                head = 28;
            } else {
                reply[..4].copy_from_slice(&0x6744_6698_u32.to_be_bytes());
            }
            at += 28;
            match kind {
                0 => replies.push((reply, head, length)),
                1 => {
                    replies.push((reply, head, 0));
                    skip = length;
                }
                2 => bail!("bye"),
                _ => replies.push((reply, head, 0)),
            }
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
        // The last write is answered when the rest of it came.
        let kept = usize::from(skip > 0);
        let ready = replies.len() - kept;
        let mut pieces = Vec::with_capacity(ready * 2);
        for (reply, head, length) in &replies[..ready] {
            pieces.push(IoSlice::new(&reply[..*head]));
            if *length > 0 {
                pieces.push(IoSlice::new(&zeros[..*length]));
            }
        }
        let mut pieces = pieces.as_mut_slice();
        while !pieces.is_empty() {
            let count = stream.write_vectored(&pieces[..pieces.len().min(1024)])?;
            ensure!(count > 0, "gone");
            IoSlice::advance_slices(&mut pieces, count);
        }
        replies.drain(..ready);
    }
}

/// Whether replies are to be structured.
fn handshake(stream: &mut Box<dyn Stream>, size_bytes: u64) -> Result<bool> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    let mut structured = false;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let (option, length) = (u32_at(&header, 8), usize::try_from(u32_at(&header, 12))?);
        ensure!(u64_at(&header, 0) == 0x4948_4156_454f_5054 && length <= 4096, "not an option");
        let mut data = vec![0; length];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| -> Result<()> {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len())?.to_be_bytes());
            bytes.extend(data);
            Ok(stream.write_all(&bytes)?)
        };
        match option {
            OPT_GO => {
                let mut info = vec![0, 0];
                info.extend(size_bytes.to_be_bytes());
                // Flush, FUA, trim, zeroes, several connections.
                info.extend(0b1_0110_1101_u16.to_be_bytes());
                reply(3, &info)?;
                reply(1, &[])?;
                return Ok(structured);
            }
            OPT_STRUCTURED_REPLY => {
                structured = true;
                reply(1, &[])?;
            }
            OPT_ABORT => {
                reply(1, &[])?;
                bail!("bye");
            }
            _ => reply(REP_UNSUPPORTED, &[])?,
        }
    }
}
