//! The stand-in as a program, for clients that are no Rust: `gptq-hub-stand-in [OWNER/NAME[:BRANCH]=FOLDER ...]` serves the
//! plain files of each folder, prints its endpoint and ends with its input.

use std::io::{Read, Write};
use std::path::Path;

use bytes::Bytes;
use gptq_hub_stand_in::{File, Server};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = Server::start();
    for argument in std::env::args().skip(1) {
        let (name, folder) = argument.split_once('=').ok_or("expected OWNER/NAME[:BRANCH]=FOLDER")?;
        let (id, branch) = name.split_once(':').unwrap_or((name, "main"));
        let mut world = server.world();
        let large = world.large;
        let repo = world.repos.entry(id.to_owned()).or_default();
        let mut files = Vec::new();
        for entry in std::fs::read_dir(Path::new(folder))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let bytes = Bytes::from(std::fs::read(entry.path())?);
                let is_large = bytes.len() >= large;
                files.push((entry.file_name().to_string_lossy().into_owned(), File::new(bytes, is_large)));
            }
        }
        repo.commit(branch, files.into_iter().collect());
    }
    println!("{}", server.url());
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
