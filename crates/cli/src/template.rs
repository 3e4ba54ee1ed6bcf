//! `zygote template …`.

mod derive;
mod show;

use crate::args::{BuildArgs, Global, Settings, TemplateVerb};
use crate::engine::{self, Engine};
use crate::host::{self, Place};
use crate::out::{complain, say};
use crate::progress::Reporter;
use crate::report::FAILED;
use crate::settings;
use anyhow::{Context, bail};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::time::Duration;
use zygote_api::{BuildEvent, BuildRequest, Built, Removed};
use zygote_daemon::{Client, Found, find, template_detail, template_failure};
use zygote_protocol::PROTOCOL_VERSION;
use zygote_template::{
    BUILT_IN, BuildOptions, Gathered, Progress, Recipe, Store, StoreError, format_size, gather,
    is_name, starter, up_to_date,
};

/// How long one replica may take in a lab: longer than the sum of what its guest may take for each
/// of its steps.
const LAB_REPLICA_MAX: Duration = Duration::from_secs(3600);

/// Runs a verb; gives back the exit code.
pub fn run(global: &Global, verb: &TemplateVerb) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    match verb {
        TemplateVerb::Init { name, json } => init(name, *json),
        TemplateVerb::Build(args) => build_verb(global, &store, args),
        TemplateVerb::Ls { json } => show::list(&store, *json),
        TemplateVerb::Inspect { name, json } => show::inspect(&store, name, *json),
        TemplateVerb::Derive(args) => derive::run(global, &store, args),
        TemplateVerb::Rm {
            name,
            derived,
            json,
        } => {
            let removed = remove(global, &store, name, *derived)?;
            print(*json, json!(removed), || show::removed(&removed));
            Ok(0)
        }
        TemplateVerb::Verify { name, json } => verify(&store, name, *json),
    }
}

fn print(as_json: bool, value: serde_json::Value, for_people: impl FnOnce()) {
    if as_json {
        say!("{value}");
    } else {
        for_people();
    }
}

/// Writes a recipe to begin with; what is there stays.
fn init(name: &str, as_json: bool) -> anyhow::Result<u8> {
    if !is_name(name) {
        let name = name.to_owned();
        return Err(StoreError::Name { name }.into());
    }
    let path = std::path::absolute(format!("{name}.toml"))?;
    let created = File::options().write(true).create_new(true).open(&path);
    created
        .and_then(|mut file| file.write_all(starter(name).as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))?;
    print(
        as_json,
        json!({"template": name, "recipe_path": path}),
        || {
            say!("wrote {name}.toml; build it with: zygote template build {name}.toml");
        },
    );
    Ok(0)
}

/// Whether a template must be built first; an error if nobody could build it.
pub fn is_missing(store: &Store, name: &str) -> anyhow::Result<bool> {
    let is_built_in = BUILT_IN.iter().any(|(known, _)| *known == name);
    match store.inspect(name) {
        // After an upgrade; others are refused, with the command that builds them again.
        Ok(template) => Ok(is_built_in && template.protocol_version != PROTOCOL_VERSION),
        Err(StoreError::NotFound { .. }) if is_built_in => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn tell(reporter: &mut Reporter, progress: &Progress) {
    match progress.part {
        Some((done, total)) => reporter.part(&progress.message, done, total),
        None => reporter.say(&progress.message),
    }
}

/// Gathers a template's ingredients on this host, for a build in the lab. The build is over when
/// the lock is dropped.
pub fn gather_for(store: &Store, recipe: &str) -> anyhow::Result<File> {
    gather_ingredients(store, &store.recipe(recipe)?, false).map(|(lock, _)| lock)
}

fn gather_ingredients(
    store: &Store,
    recipe: &Recipe,
    check: bool,
) -> anyhow::Result<(File, Gathered)> {
    let mut reporter = Reporter::new();
    let lock = store.lock_builds(&mut |progress| tell(&mut reporter, &progress))?;
    let gathered = gather(store, recipe, check, &mut |progress| {
        tell(&mut reporter, &progress)
    });
    let gathered =
        gathered.with_context(|| format!("cannot build the template {}", recipe.name))?;
    Ok((lock, gathered))
}

/// Says that a template must be built first.
pub fn say_missing(name: &str) {
    complain!("zygote: there is no template {name} of this version yet; building it first");
}

/// Has an engine build a template that a run needs, and says so.
pub async fn build_missing(client: &Client, name: &str) -> anyhow::Result<()> {
    say_missing(name);
    let request = BuildRequest {
        recipe: name.to_owned(),
        ..BuildRequest::default()
    };
    follow_build(client, &request).await.map(drop)
}

async fn follow_build(client: &Client, request: &BuildRequest) -> anyhow::Result<Built> {
    let mut reporter = Reporter::new();
    let mut events = client.build(request).await?;
    while let Some(event) = events.next().await? {
        match event {
            BuildEvent::Progress {
                message,
                done: Some(done),
                total: Some(total),
            } => reporter.part(&message, done, total),
            BuildEvent::Progress { message, .. } => reporter.say(&message),
            BuildEvent::Built(built) => return Ok(*built),
            BuildEvent::Error { error } => return Err(error.into()),
        }
    }
    bail!("the build has ended without a result")
}

fn build_verb(global: &Global, store: &Store, args: &BuildArgs) -> anyhow::Result<u8> {
    // What is wrong with it is told before anything is started.
    let recipe = store.recipe(&args.recipe)?;
    let options = options(&recipe, args);
    build_recipe(
        global,
        store,
        &recipe,
        &request(args)?,
        &options,
        args.no_daemon,
        args.json,
    )
}

/// Has a recipe built, its base before it if nobody has built that yet.
fn build_recipe(
    global: &Global,
    store: &Store,
    recipe: &Recipe,
    request: &BuildRequest,
    options: &BuildOptions,
    no_daemon: bool,
    as_json: bool,
) -> anyhow::Result<u8> {
    let base = recipe.from.as_deref();
    let missing = match base {
        Some(base) => is_missing(store, base)?.then_some(base),
        None => None,
    };
    if no_daemon && host::choose(global, store)? == Place::Lab {
        if let Some(base) = missing {
            anyhow::bail!(
                "there is no template {base} of this version yet; build it first: zygote template build {base}"
            );
        }
        let (_lock, gathered) = gather_ingredients(store, recipe, options.force)?;
        return match up_to_date(store, recipe, options, &gathered) {
            Some(template) => {
                show_built(store, as_json, false, &template.name)?;
                Ok(0)
            }
            None => {
                let limit = LAB_REPLICA_MAX * options.replicas;
                host::again_in_lab(store, false, Some(limit), &[])
            }
        };
    }
    let built = engine::runtime()?.block_on(async {
        let engine = if no_daemon {
            Engine::own(global, store, &Settings::default()).await?
        } else {
            Engine::shared(global, store).await?
        };
        let built = async {
            if let Some(base) = missing {
                build_missing(engine.client(), base).await?;
            }
            follow_build(engine.client(), request).await
        }
        .await;
        engine.leave().await;
        built
    })?;
    show_built(store, as_json, built.is_new, &built.info.template)?;
    Ok(0)
}

fn request(args: &BuildArgs) -> anyhow::Result<BuildRequest> {
    let recipe = if args.recipe.ends_with(".toml") {
        let path = std::path::absolute(&args.recipe).context("cannot resolve the recipe's path")?;
        path.to_string_lossy().into_owned()
    } else {
        args.recipe.clone()
    };
    Ok(BuildRequest {
        recipe,
        recipe_toml: None,
        memory_bytes: args.memory,
        vcpus: vcpus(args),
        replicas: Some(args.replicas),
        force: args.force,
    })
}

fn show_built(store: &Store, as_json: bool, is_new: bool, name: &str) -> anyhow::Result<()> {
    let info = template_detail(store, name, None)?.info;
    let what = if is_new { "built" } else { "up to date" };
    let words = format!("{name}: {what} ({})", show::summary(&info));
    print(as_json, json!(Built { is_new, info }), || say!("{words}"));
    Ok(())
}

fn vcpus(args: &BuildArgs) -> Option<u8> {
    args.vcpus.and_then(|vcpus| u8::try_from(vcpus).ok())
}

fn options(recipe: &Recipe, args: &BuildArgs) -> BuildOptions {
    BuildOptions {
        memory_bytes: args.memory.unwrap_or_else(|| recipe.memory_bytes()),
        vcpus: vcpus(args).unwrap_or(recipe.vcpus()),
        replicas: args.replicas,
        force: args.force,
    }
}

/// Removes one; an engine that is there forgets it, none is started for that.
fn remove(global: &Global, store: &Store, name: &str, derived: bool) -> anyhow::Result<Removed> {
    let socket = settings::socket(global, store)?;
    engine::runtime()?.block_on(async {
        match find(&socket).await {
            Ok(Found::Own(client, _)) => Ok(client.remove_template(name, derived).await?),
            // The files are ours all the same.
            Ok(Found::Other(..) | Found::Nobody) | Err(_) => {
                let removal = store.remove(name, derived)?;
                Ok(Removed {
                    template: name.to_owned(),
                    freed_bytes: removal.freed_bytes,
                    kept_bytes: removal.kept_bytes,
                })
            }
        }
    })
}

fn verify(store: &Store, name: &str, as_json: bool) -> anyhow::Result<u8> {
    let mut reporter = Reporter::new();
    let verified = store.verify(name, &mut |done, total| {
        reporter.part(&format!("verifying {name}"), done, total);
    });
    drop(reporter);
    match verified {
        Ok(read) => {
            let value = json!({"template": name, "intact": true, "read_bytes": read});
            print(as_json, value, || {
                let size = format_size(read);
                say!("{name}: intact ({size} compared with their digests)");
            });
            Ok(0)
        }
        Err(error) if as_json => {
            let failure = template_failure(&error);
            say!(
                "{}",
                json!({"template": name, "intact": false, "error": failure})
            );
            complain!("zygote: {failure}");
            Ok(FAILED)
        }
        Err(error) => Err(error.into()),
    }
}
