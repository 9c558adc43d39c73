//! Buffers that a thread lends to the connection that it polls.
//!
//! Owns: what has come from a client and was not looked at yet, while that client is polled.
//! Does not own: what a connection keeps for itself between two polls ([`super::transmission`]).

use bytes::BytesMut;

/// Buffers that connections share, each while it is polled.
#[derive(Default)]
pub struct Scratch {
    /// What has come and was not looked at yet is from `at` to `end`.
    pub input: Vec<u8>,
    pub at: usize,
    pub end: usize,
    pub output: BytesMut,
    /// For the payload of a long write.
    pub payload: Vec<u8>,
}

impl Scratch {
    /// What has come and was not looked at.
    pub fn unread(&self) -> &[u8] {
        &self.input[self.at..self.end]
    }

    /// Room for `bytes` behind what has come.
    pub fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.at > 0 {
            self.input.copy_within(self.at..self.end, 0);
            self.end -= self.at;
            self.at = 0;
        }
        if self.input.len() < self.end + bytes {
            self.input.resize(self.end + bytes, 0);
        }
        &mut self.input[self.end..self.end + bytes]
    }

    /// Puts `bytes` behind what has come.
    pub fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.end += bytes.len();
    }
}
