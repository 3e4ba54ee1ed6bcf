//! `zygote template derive`: a recipe, written from the command line.

use super::build_recipe;
use crate::args::{DeriveArgs, Global};
use crate::copy::Pair;
use anyhow::Context;
use std::path::{Path, PathBuf};
use toml::{Table, Value};
use zygote_api::BuildRequest;
use zygote_template::{BuildOptions, Recipe, Store};

/// Where programs start.
const HOME: &str = "/root";

/// Derives one; gives back the exit code.
pub fn run(global: &Global, store: &Store, args: &DeriveArgs) -> anyhow::Result<u8> {
    store.may_derive(&args.name, args.force, None)?;
    let text = toml::to_string(&recipe(args)?)?;
    let recipe = Recipe::parse(&args.name, &text, None)?;
    let request = BuildRequest {
        recipe: args.name.clone(),
        recipe_toml: Some(text),
        force: args.force,
        ..BuildRequest::default()
    };
    let options = BuildOptions {
        memory_bytes: recipe.memory_bytes(),
        vcpus: recipe.vcpus(),
        replicas: 1,
        force: args.force,
    };
    build_recipe(
        global,
        store,
        &recipe,
        &request,
        &options,
        args.no_daemon,
        args.json,
    )
}

fn recipe(args: &DeriveArgs) -> anyhow::Result<Table> {
    let mut recipe = Table::new();
    let mut say = |key: &str, value: Value| recipe.insert(key.to_owned(), value);
    let list = |words: &[String]| Value::Array(words.iter().cloned().map(Value::from).collect());
    say("name", args.name.clone().into());
    say("from", args.base.clone().into());
    if !args.copy.is_empty() {
        let files: anyhow::Result<Vec<Value>> = args.copy.iter().map(file).collect();
        say("files", Value::Array(files?));
    }
    if !args.pip.is_empty() {
        say("pip", list(&args.pip));
    }
    if let Some(file) = &args.requirements {
        say("requirements", text(&absolute(file)?)?.into());
    }
    if !args.run.is_empty() {
        say("run", list(&args.run));
    }
    if let Some(code) = &args.warm {
        say("warm", code.clone().into());
    }
    Ok(recipe)
}

fn file(pair: &Pair) -> anyhow::Result<Value> {
    let mut table = Table::new();
    let source = absolute(&pair.source)?;
    table.insert("source".to_owned(), text(&source)?.into());
    if let Some(target) = &pair.target {
        let dest = Path::new(HOME).join(target);
        table.insert("dest".to_owned(), text(&dest)?.into());
    }
    Ok(table.into())
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))
}

/// Recipes are text.
fn text(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_in_words_is_a_recipe() {
        let args = DeriveArgs {
            base: "python".to_owned(),
            name: "mine".to_owned(),
            copy: ["a", "b:c", "d:/e/"]
                .map(|pair| Pair::parse(pair.as_ref()).unwrap())
                .to_vec(),
            pip: vec!["rich>=13".to_owned()],
            requirements: Some("r.txt".into()),
            run: vec!["echo \"1\"\necho '2'".to_owned()],
            warm: Some("import rich".to_owned()),
            force: false,
            no_daemon: false,
            json: false,
        };
        let text = toml::to_string(&recipe(&args).unwrap()).unwrap();
        let recipe = Recipe::parse("mine", &text, None).unwrap();
        assert_eq!(recipe.from.as_deref(), Some("python"));
        let dests: Vec<_> = recipe.files.iter().map(|file| file.dest.to_str()).collect();
        assert_eq!(dests, ["/root/a", "/root/c", "/e/d"].map(Some));
        assert!(recipe.files.iter().all(|file| file.source.is_absolute()));
        assert_eq!((&recipe.run, &*recipe.warm), (&args.run, "import rich"));
        assert!(recipe.requirements.unwrap().is_absolute());
    }
}
