//! `zygote cp`: files and folders into a sandbox, and out of it.

use super::archive::{self, Incoming};
use crate::args::{CpArgs, Global};
use crate::copy::Pair;
use crate::failure;
use crate::get::Received;
use crate::interrupt::Interrupts;
use crate::out;
use crate::report::die_of;
use anyhow::Context;
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use zygote_api::{ErrorCode, FileAction, FileInfo, FileType};
use zygote_daemon::{Client, ClientError};

/// Where a path lies.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    /// `-`: standard input or output, as a tar archive.
    Stream,
    /// On this host.
    Here(PathBuf),
    /// In a sandbox.
    There(String, PathBuf),
}

impl Side {
    /// As docker(1) tells them apart: what is before a colon, and has no slash, is a sandbox.
    fn of(word: &OsStr) -> Self {
        let bytes = word.as_bytes();
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        if bytes == b"-" {
            return Self::Stream;
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        match colon.map(|at| (&bytes[..at], &bytes[at + 1..])) {
            Some((name, rest)) if !name.is_empty() && !name.contains(&b'/') => {
                Self::There(String::from_utf8_lossy(name).into_owned(), path(rest))
            }
            _ => Self::Here(path(bytes)),
        }
    }
}

/// Copies; gives back the exit code.
pub fn cp(global: &Global, args: &CpArgs) -> anyhow::Result<u8> {
    let (from, to) = (Side::of(&args.source), Side::of(&args.target));
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let copying = async {
            match (from, to) {
                (Side::There(id, path), to @ (Side::Here(_) | Side::Stream)) => {
                    let client = super::engine_with(global, &id).await?;
                    get(&client, &id, &path, to, args.json).await
                }
                (from @ (Side::Here(_) | Side::Stream), Side::There(id, path)) => {
                    let client = super::engine_with(global, &id).await?;
                    put(&client, &id, from, &path).await?;
                    if args.json {
                        out::say!("{}", json!({"sandbox": id, "copied": true}));
                    }
                    Ok(0)
                }
                _ => {
                    let failure = failure::usage("one of both must be in a sandbox");
                    Err(failure.remedy("write it as SANDBOX:PATH").into())
                }
            }
        };
        tokio::select! {
            code = copying => code,
            signal = interrupts.after(1) => Ok(die_of(signal)),
        }
    })
}

/// Puts a file or folder into a sandbox, as cp(1) chooses its name.
pub async fn put_file(
    client: &Client,
    id: &str,
    source: &Path,
    target: &Path,
) -> anyhow::Result<()> {
    put(client, id, Side::Here(source.to_owned()), target).await
}

async fn put(client: &Client, id: &str, from: Side, target: &Path) -> anyhow::Result<()> {
    // Relative ones start where programs do.
    let target = if target.as_os_str().is_empty() {
        Path::new(".")
    } else {
        target
    };
    let Side::Here(source) = from else {
        client
            .unpack(id, target.as_os_str().as_bytes(), archive::stdin())
            .await?;
        return Ok(());
    };
    let cannot = || format!("cannot copy {}", source.display());
    let real = std::fs::canonicalize(&source).with_context(cannot)?;
    let own = real.file_name().unwrap_or(OsStr::new("root"));
    let own = source.file_name().unwrap_or(own).to_owned();
    let is_folder =
        target.as_os_str().as_bytes().ends_with(b"/") || is_folder(client, id, target).await?;
    let (folder, name) = match target.file_name() {
        Some(name) if !is_folder => {
            let parent = target
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")), name.to_owned())
        }
        _ => (target, own),
    };
    let pieces = archive::pack(source.clone(), PathBuf::from(name));
    let unpacked = client
        .unpack(id, folder.as_os_str().as_bytes(), pieces)
        .await;
    unpacked.with_context(cannot)
}

async fn is_folder(client: &Client, id: &str, path: &Path) -> anyhow::Result<bool> {
    let action = FileAction::Stat {
        path: path.as_os_str().as_bytes().to_vec().into(),
        no_follow: false,
    };
    match client.files::<FileInfo>(id, &action).await {
        Ok(info) => Ok(info.kind == FileType::Folder),
        Err(ClientError::Refused(failure)) if failure.code == ErrorCode::FileNotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn get(
    client: &Client,
    id: &str,
    source: &Path,
    to: Side,
    as_json: bool,
) -> anyhow::Result<u8> {
    let mut octets = client.pack(id, source.as_os_str().as_bytes()).await?;
    let Side::Here(target) = to else {
        while let Some(piece) = octets.next().await? {
            let written = std::io::stdout().write_all(&piece);
            if let Err(error) = written {
                return Ok(out::code(&error));
            }
        }
        let flushed = std::io::stdout().flush();
        return Ok(flushed.err().map_or(0, |error| out::code(&error)));
    };
    let pair = Pair {
        source: source.to_owned(),
        target: Some(target),
    };
    let (sender, incoming) = Incoming::new();
    let received = Received::new(&[pair], None);
    let unpacking = tokio::task::spawn_blocking(move || archive::unpack(incoming, received));
    while let Some(piece) = octets.next().await? {
        if sender.send(piece).await.is_err() {
            break;
        }
    }
    drop(sender);
    let received = unpacking.await.context("unpacking panicked")??;
    let (files, failures) = received.finish();
    if let Some(first) = failures.into_iter().next() {
        return Err(first.into());
    }
    if as_json {
        out::say!("{}", json!({"sandbox": id, "files": files}));
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_before_a_colon_and_has_no_slash() {
        let there = |id: &str, path: &str| Side::There(id.to_owned(), path.into());
        for (word, side) in [
            ("box:/a", there("box", "/a")),
            ("box:", there("box", "")),
            ("box:a:b", there("box", "a:b")),
            ("./a:b", Side::Here("./a:b".into())),
            ("/a:b", Side::Here("/a:b".into())),
            ("a", Side::Here("a".into())),
            (":a", Side::Here(":a".into())),
            ("-", Side::Stream),
        ] {
            assert_eq!(Side::of(word.as_ref()), side, "{word}");
        }
    }
}
