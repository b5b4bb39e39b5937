//! What a file's content is known by: git's sha1 for small files, sha256 for large ones.

use std::fmt::{self, Display};
use std::io::{self, Read};

use ring::digest::{Context, Digest, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use crate::name::is_hex;

/// A hash in lower-case hexadecimal digits, as it stands in the tree and names the blob in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Oid {
    /// sha1 over `blob LENGTH\0` and the content.
    Git(String),
    Sha256(String),
}

impl Oid {
    /// By its length: 40 digits or 64.
    pub fn parse(text: &str) -> Option<Self> {
        match text.len() {
            40 if is_hex(text) => Some(Self::Git(text.to_owned())),
            64 if is_hex(text) => Some(Self::Sha256(text.to_owned())),
            _ => None,
        }
    }

    pub fn as_str(&self) -> &str {
        match self {
            Self::Git(digits) | Self::Sha256(digits) => digits,
        }
    }

    /// A hash of the same kind over content of this length.
    pub fn hasher(&self, length: u64) -> Hasher {
        match self {
            Self::Git(_) => Hasher::git(length),
            Self::Sha256(_) => Hasher::sha256(),
        }
    }
}

impl Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A hash that is being computed.
#[derive(Clone)]
pub struct Hasher(Context);

impl Hasher {
    pub fn sha256() -> Self {
        Self(Context::new(&SHA256))
    }

    pub fn git(length: u64) -> Self {
        let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
        context.update(format!("blob {length}\0").as_bytes());
        Self(context)
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Oid {
        let digits = hex(&self.0.finish());
        if digits.len() == 40 { Oid::Git(digits) } else { Oid::Sha256(digits) }
    }

    /// Hashes all that a reader gives, and says how many bytes these were.
    pub fn update_from(&mut self, mut reader: impl Read) -> io::Result<u64> {
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(total),
                Ok(count) => {
                    self.update(&buffer[..count]);
                    total += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn hex(digest: &Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_sha256sum() {
        // `printf 'hello\n' | git hash-object --stdin` and `| sha256sum`.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        for oid in [git, sha].map(|text| Oid::parse(text).unwrap()) {
            let mut hasher = oid.hasher(6);
            assert_eq!(hasher.update_from(&b"hello\n"[..]).unwrap(), 6);
            assert_eq!(hasher.finish(), oid);
        }
        assert_eq!(Oid::parse(&git.to_uppercase()), None);
        assert_eq!(Oid::parse("../../etc/passwd"), None);
    }
}
