//! The book: docs/, as mdbook makes pages of it.

use crate::command::run;
use anyhow::bail;
use std::process::{Command, Stdio};

/// Builds it into target/book.
pub fn build() -> anyhow::Result<()> {
    let mut ask = Command::new("mdbook");
    ask.arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if !ask.status().is_ok_and(|status| status.success()) {
        bail!("mdbook is not installed; install it: cargo install mdbook");
    }
    run(Command::new("mdbook").args(["build", "docs"]))?;
    eprintln!("xtask: target/book/index.html");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn docs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
    }

    /// The targets of a page's links.
    fn links(text: &str) -> Vec<&str> {
        let starts = text.split("](").skip(1);
        starts.filter_map(|rest| rest.split(')').next()).collect()
    }

    #[test]
    fn every_page_is_in_the_book() {
        let summary = fs::read_to_string(docs().join("SUMMARY.md")).unwrap();
        let listed: BTreeSet<&str> = links(&summary).into_iter().collect();
        for entry in fs::read_dir(docs()).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_page = name.ends_with(".md") && name != "SUMMARY.md";
            assert!(
                !is_page || listed.contains(&*name),
                "{name} is not in SUMMARY.md"
            );
        }
    }

    #[test]
    fn every_link_to_a_file_leads_to_one() {
        let root = docs().join("..");
        let mut pages = vec![
            root.join("README.md"),
            root.join("ARCHITECTURE.md"),
            root.join("CONTRIBUTING.md"),
        ];
        pages.extend(
            fs::read_dir(docs())
                .unwrap()
                .flatten()
                .map(|entry| entry.path()),
        );
        pages.retain(|page| page.extension().is_some_and(|end| end == "md"));
        for page in pages {
            let text = fs::read_to_string(&page).unwrap();
            for link in links(&text) {
                let is_web = link.contains("://") || link.starts_with('#') || link.contains(' ');
                let file = link.split('#').next().unwrap();
                let target = page.parent().unwrap().join(file);
                assert!(is_web || target.exists(), "{}: {link}", page.display());
            }
        }
    }
}
