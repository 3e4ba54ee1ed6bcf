//! `zygote template …`.

use crate::args::{BuildArgs, Global, Settings, TemplateVerb};
use crate::engine::{self, Engine};
use crate::host::{self, Place};
use crate::out::{complain, say};
use crate::progress::Reporter;
use crate::settings;
use anyhow::{Context, anyhow, bail};
use serde_json::json;
use std::fs::File;
use std::time::Duration;
use zygote_api::{BuildEvent, BuildRequest, Built};
use zygote_daemon::{Client, Found, find};
use zygote_template::{
    BUILT_IN, BuildOptions, Ingredients, Progress, Recipe, Store, StoreError, Template,
    format_size, gather, up_to_date,
};

/// How long one replica may take in a lab: longer than the sum of what its guest may take for each
/// of its steps.
const LAB_REPLICA_MAX: Duration = Duration::from_secs(3600);

/// Runs a verb; gives back the exit code.
pub fn run(global: &Global, verb: &TemplateVerb) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    match verb {
        TemplateVerb::Build(args) => build_verb(global, &store, args),
        TemplateVerb::Ls { json } => list(&store, *json),
        TemplateVerb::Inspect { name, json } => inspect(&store, name, *json),
        TemplateVerb::Rm { name, json } => {
            remove(global, &store, name)?;
            print(*json, json!({"removed": name}), || say!("removed {name}"));
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

/// Whether a template must be built first; an error if nobody could build it.
pub fn is_missing(store: &Store, name: &str) -> anyhow::Result<bool> {
    match store.inspect(name) {
        Ok(_) => Ok(false),
        Err(StoreError::NotFound { .. }) => {
            if BUILT_IN.iter().any(|(known, _)| *known == name) {
                Ok(true)
            } else {
                let known = BUILT_IN.map(|(known, _)| known).join(", ");
                Err(anyhow!(
                    "there is no template {name}, and no built-in recipe of that name ({known}); \
                     build it from a recipe of yours: zygote template build ./{name}.toml"
                ))
            }
        }
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
    gather_ingredients(store, &Recipe::find(recipe)?, false).map(|(lock, _)| lock)
}

fn gather_ingredients(
    store: &Store,
    recipe: &Recipe,
    check: bool,
) -> anyhow::Result<(File, Ingredients)> {
    let mut reporter = Reporter::new();
    let lock = store.lock_builds(&mut |progress| tell(&mut reporter, &progress))?;
    let gathered = gather(store, recipe, check, &mut |progress| {
        tell(&mut reporter, &progress)
    });
    let ingredients =
        gathered.with_context(|| format!("cannot build the template {}", recipe.name))?;
    Ok((lock, ingredients))
}

/// Says that a template must be built first.
pub fn say_missing(name: &str) {
    complain!("zygote: there is no template {name} yet; building it first");
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
            BuildEvent::Built(built) => return Ok(built),
            BuildEvent::Error { error } => return Err(error.into()),
        }
    }
    bail!("the build has ended without a result")
}

fn build_verb(global: &Global, store: &Store, args: &BuildArgs) -> anyhow::Result<u8> {
    // What is wrong with it is told before anything is started.
    let recipe = Recipe::find(&args.recipe)?;
    if args.no_daemon && host::choose(global, store)? == Place::Lab {
        let (_lock, ingredients) = gather_ingredients(store, &recipe, args.force)?;
        return match up_to_date(store, &recipe, &options(&recipe, args), &ingredients) {
            Some(template) => {
                show_built(args, false, &template);
                Ok(0)
            }
            None => {
                let limit = LAB_REPLICA_MAX * args.replicas;
                host::again_in_lab(store, false, Some(limit))
            }
        };
    }
    let built = engine::runtime()?.block_on(async {
        let engine = if args.no_daemon {
            Engine::own(global, store, &Settings::default()).await?
        } else {
            Engine::shared(global, store).await?
        };
        let built = follow_build(engine.client(), &request(args)?).await;
        engine.leave().await;
        built
    })?;
    show_built(args, built.is_new, &store.inspect(&built.template.name)?);
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
        vcpus: args.vcpus,
        replicas: Some(args.replicas),
        force: args.force,
    })
}

fn show_built(args: &BuildArgs, is_new: bool, template: &Template) {
    let what = if is_new { "built" } else { "up to date" };
    let value = json!({"result": what, "template": template});
    print(args.json, value, || {
        say!("{}: {what} ({})", template.name, summary(template));
    });
}

fn options(recipe: &Recipe, args: &BuildArgs) -> BuildOptions {
    BuildOptions {
        memory_bytes: args.memory.unwrap_or_else(|| recipe.memory_bytes()),
        vcpus: args.vcpus.unwrap_or(recipe.vcpus),
        replicas: args.replicas,
        force: args.force,
    }
}

/// Removes one; an engine that is there forgets it, none is started for that.
fn remove(global: &Global, store: &Store, name: &str) -> anyhow::Result<()> {
    let socket = settings::socket(global, store)?;
    engine::runtime()?.block_on(async {
        match find(&socket).await {
            Ok(Found::Own(client, _)) => {
                client.remove_template(name).await?;
            }
            // The files are ours all the same.
            Ok(Found::Other(..) | Found::Nobody) | Err(_) => store.remove(name)?,
        }
        Ok(())
    })
}

fn summary(template: &Template) -> String {
    format!(
        "Debian {} with {}; {} of memory, {} vCPU{}, {} replica{}, {} on disk",
        template.base,
        template.packages.join(", "),
        format_size(template.memory_bytes),
        template.vcpus,
        if template.vcpus == 1 { "" } else { "s" },
        template.replicas,
        if template.replicas == 1 { "" } else { "s" },
        format_size(template.disk_bytes)
    )
}

fn list(store: &Store, as_json: bool) -> anyhow::Result<u8> {
    let mut good = Vec::new();
    let mut code = 0;
    for (name, template) in store.list() {
        match template {
            Ok(template) => good.push(template),
            Err(error) => {
                complain!("zygote: {:#}", anyhow::Error::new(error).context(name));
                code = 1;
            }
        }
    }
    print(as_json, json!(good), || {
        if good.is_empty() && code == 0 {
            say!("no templates yet; make one with: zygote template build python");
            return;
        }
        say!(
            "{:<16} {:>9} {:>5} {:>8} {:>10}  KERNEL",
            "NAME",
            "MEMORY",
            "VCPUS",
            "REPLICAS",
            "DISK"
        );
        for template in &good {
            say!(
                "{:<16} {:>9} {:>5} {:>8} {:>10}  {}",
                template.name,
                format_size(template.memory_bytes),
                template.vcpus,
                template.replicas,
                format_size(template.disk_bytes),
                template.kernel_release
            );
        }
    });
    Ok(code)
}

fn inspect(store: &Store, name: &str, as_json: bool) -> anyhow::Result<u8> {
    let template = store.inspect(name)?;
    let replicas = store.replicas(name)?;
    let value = json!({"template": template, "snapshots": replicas});
    print(as_json, value, || {
        say!("{name}: {}", summary(&template));
        say!(
            "  built:       {} (seconds since 1970)",
            template.created_unix_s
        );
        say!("  kernel:      {}", template.kernel_release);
        say!("  interpreter: {}", template.interpreter);
        say!("  digest:      {}", template.digest);
        for replica in &replicas {
            say!("  snapshot:    {}", replica.display());
        }
    });
    Ok(0)
}

fn verify(store: &Store, name: &str, as_json: bool) -> anyhow::Result<u8> {
    let mut reporter = Reporter::new();
    let verified = store.verify(name, &mut |done, total| {
        reporter.part(&format!("verifying {name}"), done, total);
    });
    drop(reporter);
    match verified {
        Ok(read) => {
            print(
                as_json,
                json!({"name": name, "intact": true, "read_bytes": read}),
                || {
                    say!(
                        "{name}: intact ({} compared with their digests)",
                        format_size(read)
                    );
                },
            );
            Ok(0)
        }
        Err(error) => {
            let sentence = format!("{:#}", anyhow::Error::new(error));
            let value = json!({"name": name, "intact": false, "error": sentence});
            print(as_json, value, || complain!("zygote: {sentence}"));
            Ok(1)
        }
    }
}
