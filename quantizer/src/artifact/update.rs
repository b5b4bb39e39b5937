//! New contents for small files of a finished artifact.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::folder::{self, WorkFolder, sync};
use crate::{Error, Result};

/// Replaces files of a finished artifact, one after the other in the given order, each whole. What is half-written is
/// never inside the artifact.
pub fn replace_files(out: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
    let work = WorkFolder::hold(&folder::resolve(out)?)?;
    match replace(&work, files) {
        Ok(()) => work.remove(),
        Err(error) => {
            work.give_up();
            Err(error)
        }
    }
}

fn replace(work: &WorkFolder, files: &[(&str, Vec<u8>)]) -> Result<()> {
    for (name, bytes) in files {
        let (temporary, path) = (work.path.join(name), work.out.join(name));
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(Error::io(&temporary))?;
        fs::rename(&temporary, &path).map_err(Error::io(&path))?;
        sync(&work.out)?;
    }
    Ok(())
}
