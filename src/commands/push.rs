//! `gptq push`

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use gptq_hub::{
    BranchPlan, Client, LocalFile, MAIN, PushBranch, PushPlan, PushRequest, RepoId, Settings, bytes,
    check_revision,
};
use gptq_runtime::quant_config::QuantConfig;
use serde_json::json;

use crate::args::{PushArgs, SendingArgs};
use crate::output;
use crate::transfers::Transfers;

pub fn run(args: &PushArgs) -> Result<()> {
    let push = Push {
        repo: &args.repo,
        branches: branches(&args.dir, args.branch.as_deref())?,
        create_pr: args.create_pr,
        dry_run: args.dry_run,
        sending: &args.sending,
        json: args.json,
    };
    push.run()
}

/// Fails before work whose result could not be sent because there is no way to confirm it.
pub fn check_answerable(sending: &SendingArgs) -> Result<()> {
    let answerable = sending.yes || std::io::stdin().is_terminal();
    ensure!(answerable, "nothing is sent without a confirmation: expected --yes, or a terminal");
    Ok(())
}

/// What is to be published, and how.
pub struct Push<'a> {
    pub repo: &'a str,
    /// Names, and their folders.
    pub branches: Vec<(String, PathBuf)>,
    pub create_pr: bool,
    pub dry_run: bool,
    pub sending: &'a SendingArgs,
    pub json: bool,
}

impl Push<'_> {
    pub fn run(&self) -> Result<()> {
        let repo = RepoId::model(self.repo)?;
        if !self.dry_run {
            check_answerable(self.sending)?;
        }
        let mut settings = Settings::from_env()?;
        if let Some(token) = &self.sending.token.token {
            settings = settings.with_token(token)?;
        }
        if let Some(switch) = settings.offline {
            bail!("{repo}: the hub is switched off ({switch})");
        }
        let client = Client::new(settings)?;
        let request = self.request(&repo)?;
        let transfers = Transfers::leaving(repo.id());
        let watch = |event: gptq_hub::Event| transfers.show(event);
        let plan = client.push_plan(&request, &watch)?;
        if !self.json {
            show(&repo, &request, &plan)?;
        }
        if self.dry_run {
            return if self.json { Ok(output::json(&report(&repo, &plan, None))?) } else { Ok(()) };
        }
        if !self.sending.yes && !is_confirmed()? {
            bail!("nothing was sent");
        }
        let pushed = client.push(&request, &plan, &watch)?;
        if self.json {
            return Ok(output::json(&report(&repo, &plan, Some(&pushed.commits)))?);
        }
        for (branch, commit) in &pushed.commits {
            say!("{branch}: {commit}, read back and compared")?;
        }
        say!("{}/{repo}", client.settings.endpoint)?;
        Ok(())
    }

    fn request(&self, repo: &RepoId) -> Result<PushRequest> {
        let mut branches = Vec::new();
        for (name, folder) in &self.branches {
            let mut files = Vec::new();
            for path in files_of(folder)? {
                let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                note!("reading {}", path.display());
                files.push(LocalFile::read(&path, &file_name)?);
            }
            branches.push(PushBranch { name: name.clone(), files });
        }
        Ok(PushRequest {
            repo: repo.clone(),
            branches,
            private: self.sending.private,
            create_pr: self.create_pr,
            summary: format!("Made by gptq {}", env!("CARGO_PKG_VERSION")),
            workers: self.sending.max_workers.into(),
        })
    }
}

/// The branches that a folder holds: itself, where it is an artifact, else its folders that are.
pub fn branches(dir: &Path, branch: Option<&str>) -> Result<Vec<(String, PathBuf)>> {
    if is_model(dir) {
        let name = branch.unwrap_or(MAIN);
        check_revision(name)?;
        return Ok(vec![(name.to_owned(), dir.to_owned())]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The base model may lie beside them.
        if !name.starts_with('.') && is_model(&path) && QuantConfig::read(&path)?.is_some() {
            check_revision(&name)?;
            found.push((name, path));
        }
    }
    ensure!(
        !found.is_empty(),
        "{}: expected an artifact, or folders of artifacts, got neither",
        dir.display()
    );
    if let Some(branch) = branch {
        bail!("--branch {branch}: expected one artifact, got {} branches in {}", found.len(), dir.display());
    }
    // As it will be done: main last.
    found.sort_by_key(|(name, _)| (name == MAIN, name.clone()));
    Ok(found)
}

fn is_model(dir: &Path) -> bool {
    dir.join("config.json").is_file()
}

/// The plain files of a folder, by name. What begins with a dot is no part of an artifact.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn show(repo: &RepoId, request: &PushRequest, plan: &PushPlan) -> Result<()> {
    let made = match (plan.creates, request.private) {
        (true, true) => "new, private",
        (true, false) => "new, public",
        (false, _) => "exists",
    };
    say!("{repo}: {made} (as {})", plan.account)?;
    for branch in &plan.branches {
        let made = if branch.creates { " (new)" } else { "" };
        say!("  {}{made}", branch.name)?;
        for (path, size) in &branch.send {
            say!("    send    {:>10}  {path}", bytes(*size))?;
        }
        for path in &branch.delete {
            say!("    delete  {:>10}  {path}", "")?;
        }
        if !branch.unchanged.is_empty() {
            say!("    {} files unchanged", branch.unchanged.len())?;
        }
    }
    let files: usize = plan.branches.iter().map(|branch| branch.send.len()).sum();
    let size: u64 = plan.branches.iter().flat_map(|branch| &branch.send).map(|(_, size)| size).sum();
    let how = if request.create_pr { ", as pull requests" } else { "" };
    say!("{files} files to send, at most {}{how}", bytes(size))?;
    Ok(())
}

fn is_confirmed() -> Result<bool> {
    let mut error = std::io::stderr();
    write!(error, "Send this? [y/N] ")?;
    error.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

fn report(repo: &RepoId, plan: &PushPlan, commits: Option<&[(String, String)]>) -> serde_json::Value {
    let branch = |branch: &BranchPlan| {
        let send: Vec<_> =
            branch.send.iter().map(|(path, size)| json!({"path": path, "size": size})).collect();
        let made = commits.into_iter().flatten().find(|(name, _)| *name == branch.name);
        json!({
            "name": branch.name, "creates": branch.creates, "send": send, "unchanged": branch.unchanged,
            "delete": branch.delete, "commit": made.map(|(_, commit)| commit),
        })
    };
    let branches: Vec<_> = plan.branches.iter().map(branch).collect();
    json!({"repo": repo.id(), "account": plan.account, "creates": plan.creates, "branches": branches})
}
