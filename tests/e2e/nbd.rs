//! A small NBD client that says exactly which of its requests were answered.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const FUA: u16 = 1;

pub const EIO: u32 = 5;
pub const ENOSPC: u32 = 28;

/// An answer that takes longer means that the request hangs.
const ANSWER_TIME: Duration = Duration::from_secs(180);

pub struct Client {
    stream: UnixStream,
    pub size_bytes: u64,
    cookie: u64,
}

/// Why a request was not done.
#[derive(Debug)]
pub enum Failure {
    /// The server said so.
    Refused(u32),
    /// It went away. What was said is for people.
    Gone(#[expect(dead_code, reason = "shown by Debug")] io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        assert!(
            !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            "a request hangs: {error}"
        );
        Self::Gone(error)
    }
}

impl Failure {
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Refused(code) => Some(*code),
            Self::Gone(_) => None,
        }
    }
}

impl Client {
    pub fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        stream.set_write_timeout(Some(ANSWER_TIME))?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        stream.write_all(&3u32.to_be_bytes())?;
        let name = export.as_bytes();
        let mut option = Vec::new();
        option.extend(OPTION_MAGIC.to_be_bytes());
        option.extend(OPT_GO.to_be_bytes());
        option.extend((u32::try_from(name.len()).unwrap() + 6).to_be_bytes());
        option.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
        option.extend(name);
        option.extend([0, 0]);
        stream.write_all(&option)?;
        let mut size_bytes = 0;
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header)?;
            assert_eq!(u64_at(&header, 0), OPTION_REPLY_MAGIC);
            let (kind, length) = (u32_at(&header, 12), u32_at(&header, 16));
            let mut data = vec![0; usize::try_from(length).unwrap()];
            stream.read_exact(&mut data)?;
            match kind {
                REP_ACK => return Ok(Self { stream, size_bytes, cookie: 0 }),
                REP_INFO if data[..2] == [0, 0] => size_bytes = u64_at(&data, 2),
                REP_INFO => {}
                _ => return Err(io::Error::other(String::from_utf8_lossy(&data).into_owned())),
            }
        }
    }

    /// Sends a request without waiting for its answer; its cookie.
    pub fn send(
        &mut self,
        kind: u16,
        flags: u16,
        at: u64,
        length_bytes: usize,
        payload: &[u8],
    ) -> Result<u64, Failure> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(at.to_be_bytes());
        request.extend(u32::try_from(length_bytes).unwrap().to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request)?;
        Ok(self.cookie)
    }

    /// The next answer: cookie and error. Not for reads.
    pub fn answer(&mut self) -> Result<(u64, u32), Failure> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(u32_at(&reply, 0), REPLY_MAGIC);
        Ok((u64_at(&reply, 8), u32_at(&reply, 4)))
    }

    fn done(&mut self) -> Result<(), Failure> {
        match self.answer()? {
            (_, 0) => Ok(()),
            (_, code) => Err(Failure::Refused(code)),
        }
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.send(WRITE, 0, at, bytes.len(), bytes)?;
        self.done()
    }

    pub fn flush(&mut self) -> Result<(), Failure> {
        self.send(FLUSH, 0, 0, 0, &[])?;
        self.done()
    }

    pub fn read(&mut self, at: u64, length_bytes: usize) -> Result<Vec<u8>, Failure> {
        self.send(READ, 0, at, length_bytes, &[])?;
        self.read_answer(length_bytes)
    }

    /// The next answer, to a read.
    pub fn read_answer(&mut self, length_bytes: usize) -> Result<Vec<u8>, Failure> {
        self.done()?;
        let mut bytes = vec![0; length_bytes];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}
