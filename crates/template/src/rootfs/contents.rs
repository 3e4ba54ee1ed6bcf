//! What has been installed into a root image: for people who look at a template.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where dpkg keeps what is installed.
const STATUS_FILE: &str = "var/lib/dpkg/status";

/// What has been installed into a root image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Debian packages, what others need included, with their versions.
    pub debian: BTreeMap<String, String>,
    /// Packages of the Python Package Index.
    pub pip: Vec<Wheel>,
    /// Files that the recipe added.
    pub files: Vec<PathBuf>,
}

/// A package of the Python Package Index, as it was downloaded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Wheel {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The file.
    pub file: String,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
}

/// The Debian packages of a tree, with their versions (deb-control(5)).
pub fn debian_packages(tree: &Path) -> io::Result<BTreeMap<String, String>> {
    let status = fs::read(tree.join(STATUS_FILE))?;
    Ok(installed(&String::from_utf8_lossy(&status)))
}

fn installed(status: &str) -> BTreeMap<String, String> {
    let paragraphs = status.split("\n\n");
    let field = |paragraph: &str, name: &str| {
        let line = paragraph.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned())
    };
    let is_installed = |paragraph: &&str| paragraph.contains("\nStatus: install ok installed");
    let pairs = paragraphs.filter(is_installed).filter_map(|paragraph| {
        Some((field(paragraph, "Package:")?, field(paragraph, "Version:")?))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dpkg_has_installed_is_read_and_what_it_has_removed_is_not() {
        let status = "Package: a\nStatus: install ok installed\nVersion: 1:2-3\n\
                      Description: x\n Package: no\n\n\
                      Package: b\nStatus: deinstall ok config-files\nVersion: 1\n\n\
                      Package: c\nStatus: install ok installed\nVersion: 4\n";
        let found = installed(status);
        let found: Vec<(&str, &str)> = found.iter().map(|(n, v)| (&**n, &**v)).collect();
        assert_eq!(found, [("a", "1:2-3"), ("c", "4")]);
    }
}
