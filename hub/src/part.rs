//! A part of a file, read at its place, while other threads read at others.

use std::fs::File;
use std::io::{self, Read};

pub(crate) struct Part<'a> {
    file: &'a File,
    from: u64,
    to: u64,
}

impl<'a> Part<'a> {
    /// The bytes from one place to before another.
    pub fn new(file: &'a File, from: u64, to: u64) -> Self {
        Self { file, from, to }
    }
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.to - self.from).unwrap_or(usize::MAX).min(buffer.len());
        #[cfg(unix)]
        let count = std::os::unix::fs::FileExt::read_at(self.file, &mut buffer[..most], self.from)?;
        #[cfg(windows)]
        let count = std::os::windows::fs::FileExt::seek_read(self.file, &mut buffer[..most], self.from)?;
        self.from += count as u64;
        Ok(count)
    }
}
