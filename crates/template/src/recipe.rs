//! Recipes: what a template is made of, as TOML.

use crate::size::parse_size;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The recipes that come with the program, by name.
pub const BUILT_IN: [(&str, &str); 1] = [("python", include_str!("../../../recipes/python.toml"))];

/// Longest name of a template.
pub const NAME_MAX_BYTES: usize = 64;
/// Longest warm-up code.
const WARM_MAX_BYTES: usize = 256 * 1024;
/// Largest file that a recipe adds.
const FILE_MAX_BYTES: u64 = 256 << 20;
/// Debian releases whose Python the agent's driver is tested with.
const BASES: [&str; 1] = ["bookworm"];
const INTERPRETERS: [&str; 1] = ["python"];

/// What a template is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The template's name: `[a-z0-9][a-z0-9_.-]*`.
    pub name: String,
    /// Debian release.
    pub base: String,
    /// Debian packages beside the base system.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Files to add.
    #[serde(default)]
    pub files: Vec<AddedFile>,
    /// Guest memory, such as `512M`.
    pub memory: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// The warm interpreter.
    pub interpreter: String,
    /// Code that is run in it before the snapshot.
    #[serde(default)]
    pub warm: String,
    /// Folder that `source` paths are relative to: the recipe file's.
    #[serde(skip)]
    pub folder: PathBuf,
}

/// A file that a recipe adds to the root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedFile {
    /// On this machine, relative to the recipe.
    pub source: PathBuf,
    /// Absolute path in the guest.
    pub dest: PathBuf,
    /// Permissions in octal, such as `0644`.
    #[serde(default = "plain_mode")]
    pub mode: String,
}

fn plain_mode() -> String {
    "0644".to_owned()
}

/// Why a recipe is not usable.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// It cannot be read.
    #[error("cannot read the recipe {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// It is no recipe; the message tells line and column.
    #[error("{name} is no recipe: {message}")]
    Parse {
        /// Which one.
        name: String,
        /// What the parser says.
        message: String,
    },
    /// A field has a value that it cannot have.
    #[error("{name}: {field} {problem}")]
    Field {
        /// Which recipe.
        name: String,
        /// Which field.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// No such recipe.
    #[error(
        "there is no recipe {name}; built-in ones: {known}; a recipe of your own is named by its \
         path, such as ./mine.toml"
    )]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

impl Recipe {
    /// The recipe that a user names: a built-in one, or a path that ends in `.toml`.
    ///
    /// # Errors
    /// See [`RecipeError`].
    pub fn find(name: &str) -> Result<Self, RecipeError> {
        if name.ends_with(".toml") {
            let path = Path::new(name);
            let text = fs::read_to_string(path).map_err(|source| RecipeError::Read {
                path: path.to_owned(),
                source,
            })?;
            let folder = path.parent().unwrap_or(Path::new("."));
            return Self::parse(name, &text, folder);
        }
        let built_in = BUILT_IN.iter().find(|(known, _)| *known == name);
        let (_, text) = built_in.ok_or_else(|| RecipeError::Unknown {
            name: name.to_owned(),
            known: BUILT_IN.map(|(known, _)| known).join(", "),
        })?;
        Self::parse(name, text, Path::new("."))
    }

    /// Parses and checks a recipe's text; `origin` names it in errors.
    ///
    /// # Errors
    /// See [`RecipeError`].
    pub fn parse(origin: &str, text: &str, folder: &Path) -> Result<Self, RecipeError> {
        let mut recipe: Self = toml::from_str(text).map_err(|error| RecipeError::Parse {
            name: origin.to_owned(),
            message: error.to_string(),
        })?;
        recipe.folder = folder.to_owned();
        match recipe.problem() {
            None => Ok(recipe),
            Some((field, problem)) => Err(RecipeError::Field {
                name: origin.to_owned(),
                field,
                problem,
            }),
        }
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        parse_size(&self.memory).unwrap_or(0)
    }

    fn problem(&self) -> Option<(&'static str, String)> {
        if !is_name(&self.name) {
            return Some((
                "name",
                format!(
                    "{:?} must match [a-z0-9][a-z0-9_.-]* and be at most {NAME_MAX_BYTES} long",
                    self.name
                ),
            ));
        }
        if !BASES.contains(&self.base.as_str()) {
            return Some((
                "base",
                format!("{:?} is not known; known: {}", self.base, BASES.join(", ")),
            ));
        }
        if !INTERPRETERS.contains(&self.interpreter.as_str()) {
            return Some((
                "interpreter",
                format!(
                    "{:?} is not known; known: {}",
                    self.interpreter,
                    INTERPRETERS.join(", ")
                ),
            ));
        }
        if let Some(package) = self.packages.iter().find(|package| !is_package(package)) {
            return Some((
                "packages",
                format!("{package:?} is no name of a Debian package"),
            ));
        }
        if self.warm.len() > WARM_MAX_BYTES {
            return Some(("warm", format!("is longer than {WARM_MAX_BYTES} bytes")));
        }
        if let Some(problem) = memory_problem(&self.memory) {
            return Some(("memory", problem));
        }
        if !(1..=zygote_vmm::VCPUS_MAX).contains(&self.vcpus) {
            return Some(("vcpus", format!("must be 1 to {}", zygote_vmm::VCPUS_MAX)));
        }
        self.files
            .iter()
            .find_map(file_problem)
            .map(|problem| ("files", problem))
    }

    /// The files that it adds: path in the guest, permissions and content.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn added_files(&self) -> Result<BTreeMap<PathBuf, (u32, Vec<u8>)>, RecipeError> {
        let mut files = BTreeMap::new();
        for file in &self.files {
            let path = self.folder.join(&file.source);
            let content = fs::metadata(&path).and_then(|meta| {
                if meta.len() > FILE_MAX_BYTES {
                    return Err(io::Error::other(format!(
                        "larger than {FILE_MAX_BYTES} bytes"
                    )));
                }
                fs::read(&path)
            });
            let content = content.map_err(|source| RecipeError::Read { path, source })?;
            let mode = u32::from_str_radix(&file.mode, 8).unwrap_or(0o644);
            files.insert(file.dest.clone(), (mode, content));
        }
        Ok(files)
    }
}

/// What is wrong with a memory size, if anything.
pub fn memory_problem(text: &str) -> Option<String> {
    use zygote_vmm::memory::{MEMORY_MAX_BYTES, MEMORY_MIN_BYTES};
    match parse_size(text) {
        Err(error) => Some(error.to_string()),
        Ok(bytes) if !(MEMORY_MIN_BYTES..=MEMORY_MAX_BYTES).contains(&bytes) => {
            Some(format!("{text} must be 128M to 16G"))
        }
        Ok(bytes) if bytes % (2 << 20) != 0 => Some(format!("{text} must be a multiple of 2M")),
        Ok(_) => None,
    }
}

fn file_problem(file: &AddedFile) -> Option<String> {
    let dest = file.dest.display();
    if !file.dest.is_absolute() || file.dest.components().any(|part| part.as_os_str() == "..") {
        return Some(format!("dest {dest} must be an absolute path without .."));
    }
    match u32::from_str_radix(&file.mode, 8) {
        Ok(mode) if mode <= 0o7777 => None,
        _ => Some(format!(
            "mode {:?} of {dest} must be octal, such as 0644",
            file.mode
        )),
    }
}

/// Whether a text can name a template.
pub fn is_name(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= NAME_MAX_BYTES
        && text.bytes().next().is_some_and(letter)
        && text
            .bytes()
            .all(|byte| letter(byte) || b"_.-".contains(&byte))
}

fn is_package(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() > 1
        && text.bytes().next().is_some_and(letter)
        && text
            .bytes()
            .all(|byte| letter(byte) || b"+.-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl Fn(&str) -> String) -> Result<Recipe, RecipeError> {
        Recipe::parse("r.toml", &change(BUILT_IN[0].1), Path::new("."))
    }

    #[test]
    fn built_in_recipes_are_good() {
        for (name, _) in BUILT_IN {
            assert_eq!(Recipe::find(name).unwrap().name, name);
        }
    }

    #[test]
    fn a_bad_field_is_named() {
        let cases = [
            ("name = \"python\"", "name = \"../x\"", "name"),
            ("memory = \"512M\"", "memory = \"1M\"", "128M"),
            ("memory = \"512M\"", "memory = \"lots\"", "lots"),
            ("memory = \"512M\"", "memory = \"129M\"", "multiple"),
            ("vcpus = 1", "vcpus = 33", "vcpus"),
            ("vcpus = 1", "vcpus = 1\nvolume = 2", "volume"),
            ("\"python3\",", "\"--evil\",", "--evil"),
            ("bookworm", "sarge", "sarge"),
        ];
        for (from, to, word) in cases {
            let error = parse(|text| text.replacen(from, to, 1)).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn files_cannot_leave_the_root_they_are_put_into() {
        let file = "[[files]]\nsource = \"x\"\ndest = \"/a/../../etc\"\n";
        let error = parse(|text| format!("{text}\n{file}")).unwrap_err();
        assert!(error.to_string().contains("without .."));
    }

    #[test]
    fn an_unknown_recipe_is_answered_with_the_known_ones() {
        let error = Recipe::find("ruby").unwrap_err();
        assert!(error.to_string().contains("python"));
    }
}
