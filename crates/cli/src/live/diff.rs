//! `zygote diff`.

use super::engine_with;
use crate::args::{DiffArgs, Global};
use crate::out::say;
use serde_json::json;
use zygote_api::{Diff, DiffChange, DiffRequest, DiffSide, FileDiff, FileType};
use zygote_template::format_size;

const PAGE_BYTES: u64 = 4096;

/// Shows what differs; gives back the exit code.
pub fn diff(global: &Global, args: &DiffArgs) -> anyhow::Result<u8> {
    let first = side(&args.first);
    let (from, to) = match &args.second {
        Some(second) => (Some(first), side(second)),
        None => (None, first),
    };
    let limit = args.freeze_timeout.0;
    let request = DiffRequest {
        at: to.at,
        from,
        freeze_seconds: limit.map_or(0.0, |limit| limit.as_secs_f64()),
        force: args.force,
    };
    super::block_on(async {
        let client = engine_with(global, &to.sandbox).await?;
        let found = client.diff(&to.sandbox, &request).await?;
        if args.json {
            say!("{}", json!(found));
        } else {
            show(&found);
        }
        Ok(0)
    })
}

/// `box`, `box@before`, `box@7` or `box@-1`.
fn side(words: &str) -> DiffSide {
    let Some((sandbox, moment)) = words.split_once('@') else {
        return DiffSide {
            sandbox: words.to_owned(),
            at: None,
        };
    };
    let number = moment.strip_prefix('-').unwrap_or(moment);
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let at = if is_number {
        format!("@{moment}")
    } else {
        moment.to_owned()
    };
    DiffSide {
        sandbox: sandbox.to_owned(),
        at: Some(at),
    }
}

fn show(found: &Diff) {
    found.files.iter().for_each(show_file);
    if found.more_files > 0 {
        say!("… and {} more", found.more_files);
    }
    match found.pages {
        Some(pages) => say!(
            "{} files; {pages} pages of memory ({})",
            found.files.len() as u64 + found.more_files,
            format_size(pages * PAGE_BYTES)
        ),
        None => say!(
            "{} files; memory: not from the same boot",
            found.files.len() as u64 + found.more_files
        ),
    }
}

fn show_file(file: &FileDiff) {
    let letter = match file.change {
        DiffChange::Added => 'A',
        DiffChange::Changed => 'C',
        DiffChange::Removed => 'D',
    };
    let path = String::from_utf8_lossy(&file.path.0);
    let is_folder = [&file.before, &file.after]
        .into_iter()
        .flatten()
        .any(|info| info.kind == FileType::Folder);
    let slash = if is_folder { "/" } else { "" };
    let size = |info: &Option<_>| {
        let info: Option<&zygote_api::FileInfo> = info.as_ref();
        info.filter(|info| info.kind == FileType::File)
            .map(|info| format_size(info.bytes))
    };
    let sizes = match (size(&file.before), size(&file.after)) {
        (Some(before), Some(after)) if before != after => format!("  {before} → {after}"),
        (_, Some(after)) => format!("  {after}"),
        _ => String::new(),
    };
    say!("{letter} {}{slash}{sizes}", path.escape_debug());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_named_behind_the_sandbox() {
        for (words, sandbox, at) in [
            ("box", "box", None),
            ("box@before", "box", Some("before")),
            ("box@7", "box", Some("@7")),
            ("box@-1", "box", Some("@-1")),
            ("box@-", "box", Some("-")),
            ("box@", "box", Some("")),
        ] {
            let found = side(words);
            assert_eq!((found.sandbox.as_str(), found.at.as_deref()), (sandbox, at));
        }
    }
}
