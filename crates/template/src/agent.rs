//! Finding the guest's agent: a static program that lies beside this one.

use std::fs;
use std::path::PathBuf;

const NAME: &str = "zygote-agent";
/// Names another one.
const VARIABLE: &str = "ZYGOTE_AGENT";

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Not found.
    #[error(
        "there is no {NAME} beside this program ({looked}); install both (make install), or name it in {VARIABLE}"
    )]
    Missing {
        /// Where it was looked for.
        looked: String,
    },
    /// It needs a loader and libraries that a guest's initramfs has not.
    #[error("{} is not a static program; make it with: make build", path.display())]
    NotStatic {
        /// Which file.
        path: PathBuf,
    },
}

/// Where the agent lies.
///
/// # Errors
/// If there is none, or none that a guest can run.
pub fn agent_path() -> Result<PathBuf, AgentError> {
    find().map(|(path, _)| path)
}

/// The agent, and where it lies.
pub fn find() -> Result<(PathBuf, Vec<u8>), AgentError> {
    let candidates = candidates();
    for path in &candidates {
        if let Ok(bytes) = fs::read(path) {
            let path = path.clone();
            return if is_static(&bytes) {
                Ok((path, bytes))
            } else {
                Err(AgentError::NotStatic { path })
            };
        }
    }
    let looked: Vec<String> = candidates
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    Err(AgentError::Missing {
        looked: looked.join(", "),
    })
}

fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return vec![path.into()];
    }
    let Some(folder) = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.to_owned()))
    else {
        return Vec::new();
    };
    vec![folder.join(NAME), folder.join("../lib/zygote").join(NAME)]
}

/// An x86-64 ELF file without PT_INTERP (System V ABI, chapter 5).
fn is_static(bytes: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let word = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let headers = || {
        let start = u64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?) as usize;
        let (size, count) = (usize::from(word(54)?), usize::from(word(56)?));
        let kind = |index: usize| {
            let at = start.checked_add(index * size)?;
            let field = bytes.get(at..at.checked_add(4)?)?;
            Some(u32::from_le_bytes(field.try_into().ok()?))
        };
        (0..count).map(kind).collect::<Option<Vec<u32>>>()
    };
    bytes.starts_with(b"\x7fELF\x02")
        && word(18) == Some(62)
        && headers().is_some_and(|kinds| !kinds.contains(&PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_and_a_text_are_no_agents() {
        assert!(!is_static(&fs::read("/bin/sh").unwrap()));
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(b"\x7fELF\x02"));
    }
}
