//! The system tests: built here, run where machines can run: on this host, else in labs, one for each
//! group of tests, two at a time; those that are named run in the one that the engine keeps, which is
//! up when the next ones come.
//!
//! nextest runs them where it is installed, in the lab too: one that hangs is ended and named. And
//! each group has a deadline of its own.

use crate::command::{ask, finish, run, start};
use crate::steps::{has_nextest, step};
use anyhow::{Context, anyhow, bail};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

pub const STATE: &str = "target/system/state";
const PROGRAM: &str = "target/release/zygote";
/// Recipes whose templates the tests fork.
const RECIPES: [&str; 2] = ["python", "tests/recipes/threads.toml"];
/// A group takes two to ten minutes; then its lab says what its console says, and ends.
const GROUP_MAX: Duration = Duration::from_secs(25 * 60);
/// Groups that begin first, so that none is waited for alone at the end.
const LONGEST: [&str; 2] = ["forks", "leaks"];
/// Runs on this host in any case: it is about the lab that an engine keeps.
const ON_HOST: &str = "kept";
/// Labs at once.
const LABS_MAX: usize = 2;
/// Lines of a failed group that are printed again.
const END_LINES: usize = 80;
/// A lab that does not even do that.
const LAB_MAX: Duration = Duration::from_secs(28 * 60);

/// Builds the templates and the tests, and runs them: all, or those in whose names there is a word, or that are in
/// the file of that name.
pub fn test(names: &[String]) -> anyhow::Result<()> {
    fs::create_dir_all(STATE).context("cannot make the state directory of the tests")?;
    for recipe in RECIPES {
        step(&format!("template {recipe}"), || {
            run(zygote()?.args(["template", "build", recipe]))
        })?;
    }
    let built = Built::new()?;
    let place = place()?;
    if place == "kvm" || names.is_empty() {
        // It has built the templates. Its processes would be counted, and its lab takes memory.
        run(zygote()?.arg("stop"))?;
    }
    step(&format!("system tests ({place})"), || {
        if !names.is_empty() {
            return report(vec![wait_for(built.start_named(names, &place)?)]);
        }
        // On a real host the groups change the clock and count processes: one at a time. A lab
        // takes a processor.
        let at_once = if place == "kvm" { 1 } else { LABS_MAX };
        let groups = Mutex::new(built.groups.iter());
        let next = || groups.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            let mut ended = Vec::new();
            while let Some(group) = next() {
                ended.push(
                    built
                        .start_group(group, &place)
                        .map_or_else(|error| (group.name.clone(), Err(error)), wait_for),
                );
            }
            ended
        };
        let ended = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            let ended = workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(lost));
            ended.flatten().collect()
        });
        run(zygote()?.args(["stop", "--now"]))?;
        report(ended)
    })
}

pub fn zygote() -> anyhow::Result<Command> {
    let state = Path::new(STATE)
        .canonicalize()
        .context("cannot find the tests' state")?;
    let mut command = Command::new(PROGRAM);
    command.arg("--state-dir").arg(state);
    Ok(command)
}

/// Where machines run on this host, as `zygote doctor` judges: `kvm` or `lab`.
fn place() -> anyhow::Result<String> {
    let output = ask(zygote()?.args(["doctor", "--json"]))?;
    let verdict: Value =
        serde_json::from_slice(&output.stdout).context("doctor printed no JSON")?;
    match verdict["host"].as_str() {
        Some(place) => Ok(place.to_owned()),
        None => bail!("machines cannot run here; see: {PROGRAM} doctor"),
    }
}

/// A file with one test program's tests.
struct Group {
    name: String,
    program: PathBuf,
}

struct Built {
    groups: Vec<Group>,
    /// What nextest wants to know where there is no cargo.
    nextest: Option<Described>,
}

struct Described {
    binaries: PathBuf,
    workspace: PathBuf,
}

impl Built {
    fn new() -> anyhow::Result<Self> {
        let mut build = Command::new("cargo");
        build.args(["test", "-p", "zygote-tests", "--no-run"]);
        let output = ask(build.arg("--message-format=json"))?;
        if !output.status.success() {
            bail!("the system tests cannot be built");
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut groups: Vec<Group> = text.lines().filter_map(group).collect();
        groups.sort_by_key(|group| !LONGEST.contains(&group.name.as_str()));
        if groups.is_empty() {
            bail!("there are no system tests");
        }
        let nextest = has_nextest().then(describe).transpose()?;
        Ok(Self { groups, nextest })
    }

    fn start_group(&self, group: &Group, place: &str) -> anyhow::Result<Running> {
        let place = if group.name == ON_HOST { "kvm" } else { place };
        let filter = format!("binary({})", group.name);
        let command = match &self.nextest {
            Some(described) => described.command(&filter),
            None => libtest(&group.program),
        };
        begin(&group.name, command, place)
    }

    fn start_named(&self, names: &[String], place: &str) -> anyhow::Result<Running> {
        let Some(described) = &self.nextest else {
            bail!(
                "tests are picked by name with cargo-nextest; install it: cargo install cargo-nextest"
            );
        };
        let filter = |name: &String| match self.groups.iter().any(|group| group.name == *name) {
            true => format!("binary({name})"),
            false => format!("test({name})"),
        };
        let filters: Vec<String> = names.iter().map(filter).collect();
        let filter = format!("({}) - binary({ON_HOST})", filters.join(" + "));
        let words = described.command(&filter);
        match place {
            "kvm" => begin("named", words, place),
            _ => spawn("named", in_kept_lab()?, words),
        }
    }
}

/// A line of cargo's that tells of a test program.
fn group(line: &str) -> Option<Group> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = &message["target"];
    let kinds = target["kind"].as_array()?;
    if !kinds.contains(&"test".into()) {
        return None;
    }
    Some(Group {
        name: target["name"].as_str()?.to_owned(),
        program: message["executable"].as_str()?.into(),
    })
}

fn describe() -> anyhow::Result<Described> {
    let folder = Path::new("target/system");
    let written = |name: &str, command: &mut Command| -> anyhow::Result<PathBuf> {
        let output = ask(command)?;
        if !output.status.success() {
            bail!("{command:?}: {}", output.status);
        }
        let path = folder.join(name);
        fs::write(&path, output.stdout)
            .with_context(|| format!("cannot write {}", path.display()))?;
        path.canonicalize().context("cannot find what was written")
    };
    let mut list = Command::new("cargo");
    list.args(["nextest", "list", "-p", "zygote-tests"]).args([
        "--list-type",
        "binaries-only",
        "--message-format",
        "json",
    ]);
    let mut metadata = Command::new("cargo");
    metadata.args(["metadata", "--format-version", "1"]);
    Ok(Described {
        binaries: written("binaries.json", &mut list)?,
        workspace: written("workspace.json", &mut metadata)?,
    })
}

impl Described {
    fn command(&self, filter: &str) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let words = [
            "cargo-nextest",
            "nextest",
            "run",
            "--profile",
            "system",
            "--binaries-metadata",
            &path(&self.binaries),
            "--cargo-metadata",
            &path(&self.workspace),
            "-E",
            filter,
        ];
        words.map(str::to_owned).to_vec()
    }
}

fn libtest(program: &Path) -> Vec<String> {
    vec![program.display().to_string(), "--test-threads=1".into()]
}

struct Running {
    name: String,
    command: Command,
    child: Child,
}

fn begin(name: &str, words: Vec<String>, place: &str) -> anyhow::Result<Running> {
    let (state, zygote) = (canonical(STATE)?, canonical(PROGRAM)?);
    let mut command = if place == "kvm" {
        Command::new(&words[0])
    } else {
        // The templates are there to read; what the tests change is thrown away.
        let mut command = Command::new(&zygote);
        command
            .args(["lab", "--throw-away", "--timeout"])
            .arg(format!("{}s", GROUP_MAX.as_secs()))
            .args(["--", "env"])
            .arg(format!("ZYGOTE_PROGRAM={}", zygote.display()))
            .arg(&words[0]);
        command
    };
    command
        .env("ZYGOTE_STATE_DIR", &state)
        .env("ZYGOTE_PROGRAM", &zygote);
    spawn(name, command, words[1..].to_vec())
}

fn canonical(path: &str) -> anyhow::Result<PathBuf> {
    let path = Path::new(path).canonicalize();
    path.context("cannot find what was built")
}

/// In the lab that the engine keeps. The templates are there to read; what the tests change is in a
/// layer of their own, and their engine listens elsewhere.
fn in_kept_lab() -> anyhow::Result<Command> {
    let (state, program) = (canonical(STATE)?, canonical(PROGRAM)?);
    run(zygote()?.args(["lab", "up"]))?;
    let script = format!(
        "set -e; layer=$(mktemp -d /run/tests-XXXXXX); mkdir $layer/upper $layer/work; \
         mount -t overlay overlay -o lowerdir='{state}',upperdir=$layer/upper,workdir=$layer/work '{state}'; \
         export ZYGOTE_SOCKET=$layer/zygote.sock ZYGOTE_PROGRAM={program}; \
         status=0; \"$@\" || status=$?; {program} stop --now || true; exit $status",
        state = state.display(),
        program = program.display()
    );
    let mut command = zygote()?;
    command
        .args(["lab", "--timeout"])
        .arg(format!("{}s", GROUP_MAX.as_secs()))
        .args(["--", "unshare", "--mount", "sh", "-c", &script, "sh"]);
    Ok(command)
}

fn spawn(name: &str, mut command: Command, words: Vec<String>) -> anyhow::Result<Running> {
    let output = File::create(log_of(name)).context("cannot create a log")?;
    let again = output.try_clone().context("cannot create a log")?;
    command
        .args(words)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(again);
    let child = start(&mut command)?;
    Ok(Running {
        name: name.to_owned(),
        command,
        child,
    })
}

/// A group's name, and how it ended.
type Ended = (String, anyhow::Result<ExitStatus>);

/// What a thread of ours has not come to its end with.
fn lost(_: Box<dyn std::any::Any + Send>) -> Vec<Ended> {
    vec![("xtask".to_owned(), Err(anyhow!("it panicked")))]
}

/// Waits for a group, and prints what it has said.
fn wait_for(group: Running) -> Ended {
    let ended = finish(group.child, &group.command, LAB_MAX);
    println!("{}:\n{}", group.name, said(&group.name));
    (group.name, ended)
}

fn log_of(group: &str) -> PathBuf {
    PathBuf::from(format!("target/system/{group}.log"))
}

/// All that a group has said.
fn said(group: &str) -> String {
    let said = fs::read(log_of(group)).unwrap_or_default();
    String::from_utf8_lossy(&said).into_owned()
}

/// The end of what has been said, where nextest repeats what has failed.
fn end_of(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(END_LINES)..].join("\n")
}

/// Fails if one has, with what it has said once more: it is looked for at the end of a log.
fn report(ended: Vec<Ended>) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (name, ended) in ended {
        let how = match ended {
            Ok(status) if status.success() => continue,
            Ok(status) => status.to_string(),
            Err(error) => format!("{error:#}"),
        };
        println!("{name} failed ({how}):\n{}", end_of(&said(&name)));
        failed.push(name);
    }
    if !failed.is_empty() {
        bail!("system tests failed: {}", failed.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_its_last_lines() {
        let log: String = (0..100).map(|line| format!("{line}\n")).collect();
        let end = end_of(&log);
        assert!(end.starts_with("20\n") && end.ends_with("\n99"), "{end}");
        assert_eq!(end_of("short"), "short");
    }

    #[test]
    fn only_test_programs_are_groups() {
        let test = r#"{"target":{"kind":["test"],"name":"forks"},"executable":"/t/forks"}"#;
        assert_eq!(group(test).unwrap().name, "forks");
        let library = r#"{"target":{"kind":["lib"],"name":"x"},"executable":null}"#;
        assert!(group(library).is_none() && group("no json").is_none());
    }
}
