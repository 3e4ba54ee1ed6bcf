//! Recipes: what a template is made of, as TOML. docs/recipes.md has every field.

mod files;
mod starter;

pub use files::AddedFile;
pub use starter::starter;

use crate::near::nearest;
use crate::size::parse_size;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The recipes that come with the program, by name.
pub const BUILT_IN: [(&str, &str); 1] = [("python", include_str!("../../../recipes/python.toml"))];

/// Longest name of a template.
pub const NAME_MAX_BYTES: usize = 64;
/// Longest warm-up code.
const WARM_MAX_BYTES: usize = 256 * 1024;
/// Longest command.
const RUN_MAX_BYTES: usize = 64 * 1024;
/// What a derived template has from the one that it is derived from.
const OF_THE_BASE: [&str; 5] = ["base", "packages", "memory", "vcpus", "interpreter"];
/// Longest requirement of pip's.
const PIP_MAX_BYTES: usize = 1024;
/// Debian releases whose Python the agent's driver is tested with.
const BASES: [&str; 1] = ["bookworm"];
const INTERPRETERS: [&str; 1] = ["python"];
/// The package without which there is no interpreter.
const PYTHON: &str = "python3";

/// What a template is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The template's name: `[a-z0-9][a-z0-9_.-]*`.
    pub name: String,
    /// The template that it is derived from: what that one is made of is not said again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Debian release.
    #[serde(default = "default_base")]
    pub base: String,
    /// Debian packages beside the base system; the interpreter's is one of them in any case.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Packages of the Python Package Index, as pip's requirement specifiers (PEP 508).
    #[serde(default)]
    pub pip: Vec<String>,
    /// A file of such, relative to the recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requirements: Option<PathBuf>,
    /// Files and folders to add.
    #[serde(default)]
    pub files: Vec<AddedFile>,
    /// Commands for a shell in the guest, run in this order before the warm-up.
    #[serde(default)]
    pub run: Vec<String>,
    /// Guest memory, such as `512M`.
    #[serde(default = "default_memory")]
    pub memory: String,
    /// Number of vCPUs.
    #[serde(default = "default_vcpus")]
    pub vcpus: i64,
    /// The warm interpreter.
    #[serde(default = "default_interpreter")]
    pub interpreter: String,
    /// Code that is run in it before the snapshot.
    #[serde(default)]
    pub warm: String,
    /// Where it comes from.
    #[serde(skip)]
    pub origin: RecipeOrigin,
}

/// Where a recipe comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecipeOrigin {
    /// Its file; none for a built-in one.
    pub path: Option<PathBuf>,
    /// Its text.
    pub text: String,
}

fn default_base() -> String {
    BASES[0].to_owned()
}

fn default_memory() -> String {
    "512M".to_owned()
}

fn default_vcpus() -> i64 {
    1
}

fn default_interpreter() -> String {
    INTERPRETERS[0].to_owned()
}

/// Why a recipe is not usable.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// A file that it adds cannot be read.
    #[error("cannot read {}, which the recipe adds", path.display())]
    Added {
        /// Which file.
        path: PathBuf,
        /// The kernel's word, or ours.
        #[source]
        source: io::Error,
    },
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
    /// A template that has none.
    #[error("the template {name} was made of a sandbox: there is no recipe to build it from")]
    OfASandbox {
        /// Which template.
        name: String,
    },
    /// No such recipe.
    #[error(
        "there is no recipe {name}, and no template of that name to build again; built-in recipes: {known}"
    )]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

impl RecipeError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        let name = match self {
            Self::OfASandbox { name } => {
                return Some(format!(
                    "make it again: zygote snapshot SANDBOX {name} --template"
                ));
            }
            Self::Unknown { name, .. } => name,
            Self::Read { path, source } if source.kind() == io::ErrorKind::NotFound => {
                let name = path.file_stem()?.to_str().filter(|name| is_name(name))?;
                return Some(format!("write one: zygote template init {name}"));
            }
            _ => return None,
        };
        let file = format!("{name}.toml");
        if Path::new(&file).is_file() {
            return Some(format!(
                "a recipe of your own is named by its path: zygote template build {file}"
            ));
        }
        let built_in = BUILT_IN.iter().map(|(known, _)| *known);
        Some(match nearest(name, built_in) {
            Some(near) => format!("do you mean {near}: zygote template build {near}"),
            None if is_name(name) => format!("write one: zygote template init {name}"),
            None => "a recipe of your own is named by its path, which ends in .toml".to_owned(),
        })
    }
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
            return Self::parse(name, &text, Some(path));
        }
        let built_in = BUILT_IN.iter().find(|(known, _)| *known == name);
        let (_, text) = built_in.ok_or_else(|| RecipeError::Unknown {
            name: name.to_owned(),
            known: BUILT_IN.map(|(known, _)| known).join(", "),
        })?;
        Self::parse(name, text, None)
    }

    /// Parses and checks a recipe's text; `name` names it in errors, `path` is its file, if it has one.
    ///
    /// # Errors
    /// See [`RecipeError`].
    pub fn parse(name: &str, text: &str, path: Option<&Path>) -> Result<Self, RecipeError> {
        let mut recipe: Self = toml::from_str(text).map_err(|error| RecipeError::Parse {
            name: name.to_owned(),
            message: for_people(&error.to_string()),
        })?;
        recipe.origin = RecipeOrigin {
            path: path.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned())),
            text: text.to_owned(),
        };
        if !recipe.packages.iter().any(|package| package == PYTHON) {
            recipe.packages.push(PYTHON.to_owned());
        }
        match recipe.problem().or_else(|| recipe.said_again(text)) {
            None => Ok(recipe),
            Some((field, problem)) => Err(RecipeError::Field {
                name: name.to_owned(),
                field,
                problem,
            }),
        }
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        parse_size(&self.memory).unwrap_or(0)
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u8 {
        u8::try_from(self.vcpus).unwrap_or(u8::MAX)
    }

    /// The folder that the paths in it are relative to.
    pub fn folder(&self) -> &Path {
        let file = self.origin.path.as_deref();
        file.and_then(Path::parent).unwrap_or(Path::new("/"))
    }

    /// What pip is asked for: the list, and the text of the file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn requirements(&self) -> Result<(Vec<String>, Option<String>), RecipeError> {
        let Some(file) = &self.requirements else {
            return Ok((self.pip.clone(), None));
        };
        let path = self.folder().join(file);
        let text =
            fs::read_to_string(&path).map_err(|source| RecipeError::Added { path, source })?;
        Ok((self.pip.clone(), Some(text)))
    }

    /// What a derived one says of what is decided already.
    fn said_again(&self, text: &str) -> Option<(&'static str, String)> {
        let from = self.from.as_ref()?;
        let said: toml::Table = text.parse().ok()?;
        let field = OF_THE_BASE
            .iter()
            .find(|field| said.contains_key(**field))?;
        let problem = format!("is that of {from}, from which it is derived: leave it out");
        Some((field, problem))
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
        if let Some(wrong) = self.pip.iter().find(|wanted| !is_requirement(wanted)) {
            let problem = format!("{wrong:?} is no requirement, such as requests>=2.31");
            return Some(("pip", problem));
        }
        if let Some(from) = self.from.as_ref().filter(|from| !is_name(from)) {
            return Some(("from", format!("{from:?} is no name of a template")));
        }
        if let Some(long) = self.run.iter().find(|line| line.len() > RUN_MAX_BYTES) {
            let begin: String = long.chars().take(40).collect();
            let problem = format!("{begin:?}… is longer than {RUN_MAX_BYTES} bytes");
            return Some(("run", problem));
        }
        if self.warm.len() > WARM_MAX_BYTES {
            return Some(("warm", format!("is longer than {WARM_MAX_BYTES} bytes")));
        }
        if let Some(problem) = memory_problem(&self.memory) {
            return Some(("memory", problem));
        }
        if !(1..=i64::from(zygote_vmm::VCPUS_MAX)).contains(&self.vcpus) {
            return Some(("vcpus", format!("must be 1 to {}", zygote_vmm::VCPUS_MAX)));
        }
        let problem = self.files.iter().find_map(AddedFile::problem);
        problem.map(|problem| ("files", problem))
    }
}

/// The parser's words, without those of its language.
fn for_people(message: &str) -> String {
    message
        .replace(
            "expected a sequence",
            "expected a list, such as [\"a\", \"b\"]",
        )
        .replace("invalid type: sequence", "invalid type: a list")
        .replace("invalid type: map", "invalid type: a table")
        .replace("expected i64", "expected a whole number")
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

/// Whether a text can name a template.
pub fn is_name(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= NAME_MAX_BYTES
        && text.bytes().next().is_some_and(letter)
        && text
            .bytes()
            .all(|byte| letter(byte) || b"_.-".contains(&byte))
}

/// Nothing that pip would take for an option, a file or a web address.
fn is_requirement(text: &str) -> bool {
    text.len() <= PIP_MAX_BYTES
        && text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric())
        && !text.contains(['/', '\\', '@', '\n', '\r', '\0'])
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
        Recipe::parse("r.toml", &change(BUILT_IN[0].1), None)
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
    fn a_name_is_enough_and_the_interpreter_comes_along() {
        let recipe = Recipe::parse("x.toml", "name = \"x\"", None).unwrap();
        assert_eq!(recipe.packages, ["python3"]);
        assert_eq!((recipe.memory_bytes(), recipe.vcpus()), (512 << 20, 1));
        assert_eq!(
            (recipe.base.as_str(), recipe.interpreter.as_str()),
            ("bookworm", "python")
        );
    }

    #[test]
    fn what_is_wrong_is_told_without_the_parsers_own_words() {
        let cases = [
            ("packages = \"python3\"", "a list"),
            ("vcpus = 500", "1 to 32"),
            ("vcpus = \"two\"", "a whole number"),
            ("pip = [\"--index-url=x\"]", "requests>=2.31"),
            ("pip = [\"./local\"]", "requests>=2.31"),
            ("package = [\"python3\"]", "packages"),
        ];
        for (line, word) in cases {
            let text = format!("name = \"x\"\n{line}\n");
            let error = Recipe::parse("x.toml", &text, None)
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{line}: {error}");
            assert!(
                !error.contains("i64") && !error.contains("sequence"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_derived_one_does_not_say_again_what_it_is_derived_from() {
        let text = "name = \"x\"\nfrom = \"python\"\npip = [\"rich\"]\nrun = [\"true\"]\n";
        let recipe = Recipe::parse("x.toml", text, None).unwrap();
        assert_eq!(recipe.from.as_deref(), Some("python"));
        for line in ["memory = \"1G\"", "packages = [\"git\"]", "vcpus = 2"] {
            let error = Recipe::parse("x.toml", &format!("{text}{line}\n"), None);
            let error = error.unwrap_err().to_string();
            assert!(error.contains("leave it out"), "{line}: {error}");
        }
        let error = Recipe::parse("x.toml", "name = \"x\"\nfrom = \"../y\"", None);
        assert!(error.unwrap_err().to_string().contains("from"));
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
