//! Files that a recipe adds to the root file system.

use super::{Recipe, RecipeError};
use serde::de::{self, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// All that a recipe adds, in memory while the image is made.
const ADDED_MAX_BYTES: u64 = 1 << 30;
/// Most files that it adds.
const ADDED_MAX_FILES: usize = 100_000;
/// Where programs start in the guest, and import from.
const HOME: &str = "/root";

/// A file or folder that a recipe adds, and where to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AddedFile {
    /// On this machine, relative to the recipe.
    pub source: PathBuf,
    /// Absolute path in the guest.
    pub dest: PathBuf,
    /// Permissions in octal, such as `0644`; without, those of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

/// As a table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    #[serde(alias = "from", alias = "src")]
    source: PathBuf,
    #[serde(default, alias = "to", alias = "dst", alias = "target")]
    dest: Option<PathBuf>,
    #[serde(default)]
    mode: Option<String>,
}

impl AddedFile {
    fn new(source: PathBuf, dest: Option<PathBuf>, mode: Option<String>) -> Self {
        let name = source.components().next_back();
        let name = name.filter(|part| matches!(part, Component::Normal(_)));
        let within = |folder: &Path| match name {
            Some(name) => folder.join(name),
            None => folder.to_owned(),
        };
        let dest = match dest {
            None => within(Path::new(HOME)),
            Some(dest) if dest.as_os_str().as_encoded_bytes().ends_with(b"/") => within(&dest),
            Some(dest) => dest,
        };
        Self { source, dest, mode }
    }

    /// What is wrong with it, if anything.
    pub(super) fn problem(&self) -> Option<String> {
        let dest = self.dest.display();
        if !self.dest.is_absolute() || self.dest.components().any(|part| part.as_os_str() == "..") {
            return Some(format!("dest {dest} must be an absolute path without .."));
        }
        let mode = self.mode.as_ref()?;
        match u32::from_str_radix(mode, 8) {
            Ok(mode) if mode <= 0o7777 => None,
            _ => Some(format!(
                "mode {mode:?} of {dest} must be octal, such as \"0644\""
            )),
        }
    }

    fn mode(&self) -> Option<u32> {
        u32::from_str_radix(self.mode.as_ref()?, 8).ok()
    }
}

impl<'de> Deserialize<'de> for AddedFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Either)
    }
}

/// `"SOURCE"`, `"SOURCE:DEST"`, or a table.
struct Either;

impl<'de> Visitor<'de> for Either {
    type Value = AddedFile;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "\"SOURCE\", \"SOURCE:DEST\", or { source = \"…\", dest = \"…\", mode = \"0644\" }",
        )
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<AddedFile, E> {
        let (source, dest) = match text.rsplit_once(':') {
            Some((source, dest)) => (source, Some(dest)),
            None => (text, None),
        };
        if source.is_empty() || dest.is_some_and(str::is_empty) {
            return Err(E::custom(format!(
                "{text:?}: write it as \"SOURCE\" or \"SOURCE:DEST\""
            )));
        }
        Ok(AddedFile::new(source.into(), dest.map(Into::into), None))
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<AddedFile, M::Error> {
        let table = Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(AddedFile::new(table.source, table.dest, table.mode))
    }
}

/// By path in the guest: permissions and content.
type Added = BTreeMap<PathBuf, (u32, Vec<u8>)>;

impl Recipe {
    /// The files that it adds, those in folders as well: by path in the guest, permissions and content.
    ///
    /// # Errors
    /// If one cannot be read, or they are too many.
    pub fn added_files(&self) -> Result<Added, RecipeError> {
        let mut added = Collected::default();
        for file in &self.files {
            let source = self.folder().join(&file.source);
            added.add(&source, &file.dest, file.mode())?;
        }
        Ok(added.files)
    }
}

#[derive(Default)]
struct Collected {
    files: Added,
    bytes: u64,
}

impl Collected {
    fn add(&mut self, source: &Path, dest: &Path, mode: Option<u32>) -> Result<(), RecipeError> {
        let cannot = |error| RecipeError::Added {
            path: source.to_owned(),
            source: error,
        };
        let meta = fs::metadata(source).map_err(cannot)?;
        if meta.is_dir() {
            let mut names = Vec::new();
            for entry in fs::read_dir(source).map_err(cannot)? {
                names.push(entry.map_err(cannot)?.file_name());
            }
            names.sort();
            return names
                .iter()
                .try_for_each(|name| self.add(&source.join(name), &dest.join(name), mode));
        }
        self.bytes = self.bytes.saturating_add(meta.len());
        if self.bytes > ADDED_MAX_BYTES || self.files.len() >= ADDED_MAX_FILES {
            let most = ADDED_MAX_BYTES >> 20;
            let words = format!("with it there are over {most} MiB, or {ADDED_MAX_FILES} files");
            return Err(cannot(io::Error::other(words)));
        }
        let mode = mode.unwrap_or(meta.permissions().mode() & 0o777);
        let content = fs::read(source).map_err(cannot)?;
        self.files.insert(dest.to_owned(), (mode, content));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(folder: &Path, files: &str) -> Result<Recipe, RecipeError> {
        let text = format!("name = \"x\"\nfiles = {files}\n");
        Recipe::parse("x.toml", &text, Some(&folder.join("x.toml")))
    }

    #[test]
    fn a_file_is_written_in_whichever_form_one_guesses() {
        let folder = tempfile::tempdir().unwrap();
        let forms = [
            ("[\"a.py\"]", "/root/a.py"),
            ("[\"a.py:/opt/b.py\"]", "/opt/b.py"),
            ("[\"a.py:/opt/\"]", "/opt/a.py"),
            ("[{ source = \"a.py\", dest = \"/x\" }]", "/x"),
            ("[{ from = \"a.py\", to = \"/x\" }]", "/x"),
            ("[{ src = \"a.py\" }]", "/root/a.py"),
        ];
        for (form, dest) in forms {
            let recipe = recipe(folder.path(), form).unwrap_or_else(|e| panic!("{form}: {e}"));
            assert_eq!(recipe.files[0].dest, Path::new(dest), "{form}");
            assert_eq!(recipe.files[0].source, Path::new("a.py"), "{form}");
        }
        let wrong = [
            ("[3]", "SOURCE"),
            ("\"a.py\"", "a list"),
            ("[{ sauce = \"a\" }]", "sauce"),
            ("[\":x\"]", "SOURCE"),
            ("[{ source = \"a\", mode = \"rw\" }]", "octal"),
        ];
        for (form, word) in wrong {
            let error = recipe(folder.path(), form).unwrap_err().to_string();
            assert!(error.contains(word), "{form}: {error}");
            assert!(
                !error.contains("struct") && !error.contains("sequence"),
                "{error}"
            );
        }
    }

    #[test]
    fn folders_are_added_whole_with_their_permissions() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("pack/sub")).unwrap();
        fs::write(folder.path().join("pack/sub/a.py"), "1").unwrap();
        let script = folder.path().join("pack/run.sh");
        fs::write(&script, "2").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let added = recipe(folder.path(), "[\"pack:/opt/pack\"]").unwrap();
        let added = added.added_files().unwrap();
        assert_eq!(added[Path::new("/opt/pack/sub/a.py")].1, b"1");
        assert_eq!(added[Path::new("/opt/pack/run.sh")].0, 0o755);
        let missing = recipe(folder.path(), "[\"nope.py\"]").unwrap();
        let error = missing.added_files().unwrap_err().to_string();
        assert!(
            error.contains("nope.py") && error.contains("adds"),
            "{error}"
        );
    }
}
