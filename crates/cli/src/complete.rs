//! Completion in shells, where this program itself tells what there is; and the manual's pages.

use crate::args::Cli;
use crate::out::say;
use anyhow::{Context, anyhow};
use clap::CommandFactory;
use clap_complete::CompleteEnv;
use clap_complete::Shell;
use clap_complete::engine::{ArgValueCandidates, ArgValueCompleter, CompletionCandidate};
use clap_complete::env::Shells;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use zygote_template::{BUILT_IN, SYSTEM_STATE_DIR, Store, default_state_dir};

/// How a shell asks (the variable that its script sets).
const VARIABLE: &str = "COMPLETE";

/// Answers a shell that asks, and ends this program; else does nothing.
pub fn answer() {
    if std::env::var_os(VARIABLE).is_some() {
        CompleteEnv::with_factory(Cli::command).complete();
    }
}

/// Templates, by name.
pub fn names() -> ArgValueCandidates {
    ArgValueCandidates::new(|| candidates(known()))
}

/// Sandboxes that live, by name or id.
pub fn sandboxes() -> ArgValueCandidates {
    ArgValueCandidates::new(|| candidates(crate::live::known()))
}

/// What can be built: recipes here, built-in ones, templates.
pub fn recipes() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        let word = word.to_string_lossy();
        let built_in = BUILT_IN.iter().map(|(name, _)| (*name).to_owned());
        let mut all: Vec<String> = built_in.chain(known()).chain(files(&word)).collect();
        all.sort();
        all.dedup();
        all.retain(|name| name.starts_with(&*word));
        candidates(all)
    })
}

fn candidates(names: Vec<String>) -> Vec<CompletionCandidate> {
    names.into_iter().map(CompletionCandidate::new).collect()
}

fn known() -> Vec<String> {
    let given = std::env::var_os("ZYGOTE_STATE_DIR").filter(|path| !path.is_empty());
    let state = given.map_or_else(default_state_dir, PathBuf::from);
    let system = PathBuf::from(SYSTEM_STATE_DIR);
    Store::open(state).with_shared(Some(system)).known()
}

/// Recipes in the folder that the word names.
fn files(word: &str) -> Vec<String> {
    let folder = word.rfind('/').map_or("", |at| &word[..=at]);
    let place = if folder.is_empty() { "." } else { folder };
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.ends_with(".toml"))
        .map(|name| format!("{folder}{name}"))
        .collect()
}

/// Prints the script that has a shell ask; gives back the exit code.
pub fn script(shell: Shell) -> anyhow::Result<u8> {
    let shells = Shells::builtins();
    let completer = shells.completer(&shell.to_string());
    let completer = completer.ok_or_else(|| anyhow!("there is no completion for {shell}"))?;
    let mut script = Vec::new();
    completer.write_registration(VARIABLE, "zygote", "zygote", "zygote", &mut script)?;
    say!("{}", String::from_utf8_lossy(&script).trim_end());
    Ok(0)
}

/// Writes the manual's pages, one a command; gives back the exit code.
pub fn manual(folder: &Path) -> anyhow::Result<u8> {
    let cannot = || format!("cannot write the manual into {}", folder.display());
    std::fs::create_dir_all(folder).with_context(cannot)?;
    clap_mangen::generate_to(Cli::command(), folder).with_context(cannot)?;
    Ok(0)
}
