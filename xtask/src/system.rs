//! The system tests: built here, run where machines can run: on this host, else in labs, one for each
//! group of tests, all at once.

use crate::steps::{run, step};
use anyhow::{Context, bail};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const STATE: &str = "target/system/state";
const PROGRAM: &str = "target/release/zygote";
/// Recipes whose templates the tests fork.
const RECIPES: [&str; 2] = ["python", "tests/recipes/threads.toml"];

/// Builds the templates and the tests, and runs them.
pub fn test() -> anyhow::Result<()> {
    fs::create_dir_all(STATE).context("cannot make the state directory of the tests")?;
    for recipe in RECIPES {
        step(&format!("template {recipe}"), || {
            run(zygote()?.args(["template", "build", recipe]))
        })?;
    }
    let groups = build()?;
    let place = place()?;
    step(&format!("system tests ({place})"), || {
        run_groups(&groups, &place)
    })
}

fn zygote() -> anyhow::Result<Command> {
    let state = Path::new(STATE)
        .canonicalize()
        .context("cannot find the tests' state")?;
    let mut command = Command::new(PROGRAM);
    command.arg("--state-dir").arg(state);
    Ok(command)
}

/// Where machines run on this host, as `zygote doctor` judges: `kvm` or `lab`.
fn place() -> anyhow::Result<String> {
    let output = zygote()?
        .args(["doctor", "--json"])
        .output()
        .context("cannot start zygote")?;
    let verdict: Value =
        serde_json::from_slice(&output.stdout).context("doctor printed no JSON")?;
    match verdict["host"].as_str() {
        Some(place) => Ok(place.to_owned()),
        None => bail!("machines cannot run here; see: {PROGRAM} doctor"),
    }
}

/// `(name, program)` of each group of tests.
fn build() -> anyhow::Result<Vec<(String, PathBuf)>> {
    let output = Command::new("cargo")
        .args([
            "test",
            "-p",
            "zygote-tests",
            "--no-run",
            "--message-format=json",
        ])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the system tests cannot be built");
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut groups = Vec::new();
    for message in messages {
        let target = &message["target"];
        let is_test = target["kind"]
            .as_array()
            .is_some_and(|kinds| kinds.contains(&"test".into()));
        if let (true, Some(name), Some(path)) = (
            is_test,
            target["name"].as_str(),
            message["executable"].as_str(),
        ) {
            groups.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    if groups.is_empty() {
        bail!("there are no system tests");
    }
    Ok(groups)
}

struct Running {
    name: String,
    log: PathBuf,
    child: Child,
}

fn run_groups(groups: &[(String, PathBuf)], place: &str) -> anyhow::Result<()> {
    let mut running = Vec::new();
    for (name, program) in groups {
        running.push(start(name, program, place)?);
        if place == "kvm" {
            // On a real host the groups change the clock and count processes: one at a time.
            finish(&mut running)?;
        }
    }
    finish(&mut running)
}

fn start(name: &str, program: &Path, place: &str) -> anyhow::Result<Running> {
    let log = PathBuf::from(format!("target/system/{name}.log"));
    let output = File::create(&log).context("cannot create a log")?;
    let again = output.try_clone().context("cannot create a log")?;
    let state = Path::new(STATE)
        .canonicalize()
        .context("cannot find the tests' state")?;
    let zygote = Path::new(PROGRAM)
        .canonicalize()
        .context("cannot find zygote")?;
    let mut command = if place == "kvm" {
        Command::new(program)
    } else {
        // The templates are there to read; what the tests change is thrown away.
        let mut command = Command::new(&zygote);
        command.args(["lab", "--throw-away", "--", "env"]);
        command.arg(format!("ZYGOTE_PROGRAM={}", zygote.display()));
        command.arg(program);
        command
    };
    command
        .arg("--test-threads=1")
        .env("ZYGOTE_STATE_DIR", &state)
        .env("ZYGOTE_PROGRAM", &zygote)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(again);
    let child = command.spawn().context("cannot start the system tests")?;
    Ok(Running {
        name: name.to_owned(),
        log,
        child,
    })
}

/// Waits for all, prints what each has said, and fails if one has.
fn finish(running: &mut Vec<Running>) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for Running {
        name,
        log,
        mut child,
    } in running.drain(..)
    {
        let status = child.wait().context("cannot wait for the system tests")?;
        println!("{name}:");
        print!("{}", fs::read_to_string(&log).unwrap_or_default());
        if !status.success() {
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("system tests failed: {}", failed.join(", "));
    }
    Ok(())
}
