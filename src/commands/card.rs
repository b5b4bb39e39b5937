//! `gptq card`

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use gptq_hub::{ModelRef, RepoId, Wanted};
use gptq_quantizer::artifact::is_licence;
use gptq_quantizer::card::{CARD_FILE, model_name};
use gptq_quantizer::publish::{Base, Publication, Published};
use gptq_quantizer::report::PICTURES;
use gptq_text::chat::{ChatTemplate, Conversation, message};

use super::{fetch, push, report};
use crate::args::CardArgs;
use crate::output;

pub fn run(args: &CardArgs) -> Result<()> {
    let repo = RepoId::model(&args.repo)?;
    let folders = push::branches(&args.dir, args.branch.as_deref())?;
    let branches = report::published(&args.dir, args.branch.as_deref())?;
    let publication = publication(args, repo.id(), &folders, branches)?;
    if args.print {
        let first = publication.branches.first().map_or("main", |published| published.row.branch.as_str());
        return Ok(output::text(format_args!("{}", publication.card(first)))?);
    }
    for path in write(args, &folders, &publication)? {
        say!("{}", path.display())?;
    }
    Ok(())
}

/// Writes the cards of these branches in a folder, for the repository that they are pushed to.
pub fn for_push(dir: &Path, names: &[&str], repo: &RepoId) -> Result<()> {
    let args = CardArgs {
        dir: dir.to_owned(),
        repo: repo.id().to_owned(),
        branch: None,
        base_model: None,
        print: false,
    };
    let mut folders = push::branches(dir, None)?;
    folders.retain(|(name, _)| names.contains(&name.as_str()));
    let mut branches = report::published(dir, None)?;
    branches.retain(|published| names.contains(&published.row.branch.as_str()));
    let publication = publication(&args, repo.id(), &folders, branches)?;
    write(&args, &folders, &publication).map(|_| ())
}

/// Returns the files written.
fn write(args: &CardArgs, folders: &[(String, PathBuf)], publication: &Publication) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    for (name, folder) in folders {
        for (file, _) in publication.pictures.iter().filter(|_| *folder != args.dir) {
            fs::copy(args.dir.join(file), folder.join(file))
                .with_context(|| folder.join(file).display().to_string())?;
        }
        let (path, beside) = (folder.join(CARD_FILE), folder.join(format!(".{CARD_FILE}.new")));
        fs::write(&beside, publication.card(name)).with_context(|| beside.display().to_string())?;
        fs::rename(&beside, &path).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    Ok(written)
}

fn publication(
    args: &CardArgs,
    repo: &str,
    folders: &[(String, PathBuf)],
    branches: Vec<Published>,
) -> Result<Publication> {
    let (_, first) = folders.last().context("expected a branch")?;
    let source = branches.iter().find_map(|published| Some(published.log.as_ref()?.model.clone()));
    let base = args.base_model.clone().or(source);
    let (base, name) = match &base {
        Some(base) => (read_base(base)?, model_name(base)),
        None => (Base::default(), model_name(repo)),
    };
    let pictures = PICTURES.iter().filter(|(file, _)| args.dir.join(file).is_file());
    Ok(Publication {
        repo: repo.to_owned(),
        name: name.to_owned(),
        base,
        branches,
        prompt: prompt(first)?,
        licences: licences(first)?,
        pictures: pictures.map(|(file, what)| (file.to_string(), what.to_string())).collect(),
    })
}

/// The card of the base model: in its folder, or on the hub. Without one there is nothing to take over, and that is told.
fn read_base(model: &str) -> Result<Base> {
    let (id, folder) = match ModelRef::parse(model) {
        Ok(ModelRef::Folder(folder)) => (None, folder),
        Ok(ModelRef::Hub { repo, .. }) => {
            let wanted = Wanted::Files(vec![CARD_FILE.into()]);
            match fetch::model(model, wanted) {
                Ok(folder) => (Some(repo.id().to_owned()), folder),
                Err(error) => {
                    note!("the base model's card is left out: {}", output::chain(&error));
                    return Ok(Base { id: Some(repo.id().to_owned()), ..Base::default() });
                }
            }
        }
        // A name that is neither, as an artifact's log may have one from another machine.
        Err(_) => {
            note!("{model} is no folder here and no hub id: --base-model names the base model");
            return Ok(Base::default());
        }
    };
    const MOST_BYTES: u64 = 1 << 20;
    match gptq_input::read(&folder.join(CARD_FILE), MOST_BYTES) {
        Ok(card) => Ok(Base::read(id, &String::from_utf8_lossy(&card))),
        Err(_) => Ok(Base { id, ..Base::default() }),
    }
}

/// A system message and a prompt as the model's template writes them; without the first where it takes none.
fn prompt(folder: &Path) -> Result<Option<String>> {
    let template = match ChatTemplate::load(folder) {
        Ok(template) => template,
        Err(gptq_text::Error::NoChatTemplate { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let user = message("user", "{prompt}");
    let both = [message("system", "{system_message}"), user.clone()];
    let render = |messages: &[serde_json::Value]| template.render(&Conversation::new(messages));
    Ok(Some(render(&both).or_else(|_| render(&[user]))?))
}

fn licences(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if is_licence(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
