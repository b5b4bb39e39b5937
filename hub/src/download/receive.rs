//! What arrives of a file: written to its place, hashed as far as there is no gap, and in the end given its name.

use std::io::{self, Read};
use std::time::Duration;

use ureq::Body;

use super::worker::{Fetch, Hashing, lock};
use crate::error::{Cause, Result};
use crate::progress::Event;
use crate::transfer::Work;
use crate::transfer::partial::discard;
use crate::tree::Entry;

/// What a body came to.
pub(super) enum Taken {
    All,
    /// It ended or broke before; with whether anything arrived.
    Part(Cause, bool),
    /// The file was begun anew by others.
    Superseded,
}

impl Fetch<'_> {
    /// Writes a body to its place. `skip` bytes of it are there already.
    pub(super) fn take(&self, body: &mut Body, work: &mut Work, mut skip: u64, host: &str) -> Result<Taken> {
        let broken = |cause: String| Cause::Broken { host: host.to_owned(), cause };
        let (file, entry) = (self.file, self.file.entry());
        let at = self.subject().io(&file.partial.path);
        let mut reader = body.as_reader();
        let mut buffer = vec![0; 256 << 10];
        let mut progress = false;
        loop {
            if self.shared.is_stopped() {
                return Err(self.subject().fails(Cause::GivenUp));
            }
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(Taken::Part(broken("it ended early".into()), progress)),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Taken::Part(broken(error.to_string()), progress)),
            };
            let skipped = skip.min(count as u64);
            skip -= skipped;
            let bytes = &buffer[skipped as usize..count];
            let most = bytes.len().min(usize::try_from(work.to - work.from).unwrap_or(usize::MAX));
            if most == 0 {
                continue;
            }
            file.partial.write_at(&bytes[..most], work.from).map_err(&at)?;
            {
                let mut transfer = lock(&file.transfer);
                let Some(whole) = transfer.arrived(work, most as u64) else { return Ok(Taken::Superseded) };
                whole.into_iter().try_for_each(|index| file.partial.mark(index)).map_err(&at)?;
            }
            progress = true;
            (self.shared.watch)(Event::Bytes { file: &entry.path, count: most as i64 });
            if work.is_empty() {
                // The end of a body that was read to it leaves the connection for the next piece.
                let _ = reader.read(&mut buffer[..1]);
                return Ok(Taken::All);
            }
        }
    }

    /// Takes the hash as far as there is no gap.
    pub(super) fn hash(&self, hashing: &mut Hashing) -> io::Result<()> {
        loop {
            let upto = lock(&self.file.transfer).contiguous();
            if hashing.finished || upto <= hashing.upto {
                return Ok(());
            }
            let read = hashing.hasher.update_from(self.file.partial.read(hashing.upto, upto))?;
            if read != upto - hashing.upto {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            hashing.upto = upto;
        }
    }

    /// Where all of the file is there: verifies it and gives it its name, or begins it anew.
    pub fn conclude(&self) -> Result<()> {
        let (file, entry, subject) = (self.file, self.file.entry(), self.subject());
        if !lock(&file.transfer).is_complete() {
            return Ok(());
        }
        let mut hashing = lock(&file.hashing);
        // Another worker may have seen it first, and may have begun it anew.
        if hashing.finished || !lock(&file.transfer).is_complete() {
            return Ok(());
        }
        self.hash(&mut hashing).map_err(subject.io(&file.partial.path))?;
        let got = hashing.hasher.clone().finish();
        if got != entry.oid {
            return self.begin_anew(&mut hashing, got.to_string());
        }
        let settle = |entry: &Entry| self.shared.store.settle(entry, &self.shared.plan.commit);
        let finished = file.partial.finish(&file.job.place.target);
        finished
            .and_then(|()| file.job.entries.iter().try_for_each(settle))
            .map_err(subject.io(&file.job.place.target))?;
        hashing.finished = true;
        (self.shared.watch)(Event::Done { file: &entry.path, size: entry.size });
        Ok(())
    }

    fn begin_anew(&self, hashing: &mut Hashing, got: String) -> Result<()> {
        let (file, entry, subject) = (self.file, self.file.entry(), self.subject());
        let mut transfer = lock(&file.transfer);
        let again = transfer.begin_anew();
        let cause = Cause::Damaged { times: transfer.times_damaged(), expected: entry.oid.to_string(), got };
        if !again {
            discard(&file.partial.path);
            hashing.finished = true;
            return Err(subject.fails(cause));
        }
        file.partial
            .begin_anew(entry.size, self.shared.client.settings.piece)
            .map_err(subject.io(&file.partial.path))?;
        (hashing.hasher, hashing.upto) = (entry.oid.hasher(entry.size), 0);
        // The next address may lead to a sound copy.
        *lock(&file.storage) = None;
        let (attempt, pause) = (transfer.times_damaged() + 1, Duration::ZERO);
        (self.shared.watch)(Event::Retry { subject: &subject, cause: &cause, attempt, of: 3, pause });
        (self.shared.watch)(Event::Bytes { file: &entry.path, count: -(entry.size as i64) });
        Ok(())
    }
}
