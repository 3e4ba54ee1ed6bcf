//! The SDKs: checked, packed, installed as their users install them, and tried against an engine.

use crate::command::{ask, run};
use crate::install;
use crate::steps::step;
use anyhow::{Context, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PYTHON: &str = "sdk/python";
const TYPESCRIPT: &str = "sdk/typescript";
const DIST: &str = "target/dist";
/// Where they are installed, as in an environment of their users.
const TRIED: &str = "target/sdk";
/// The oldest Node that the SDK is for.
const NODE_MIN: u32 = 20;
/// What a wheel may have that brings the program along: most of it is that.
const WHEEL_MAX_BYTES: u64 = 16 << 20;

/// Formats, lints, types, packages, and their tests against a daemon whose guests are the real agent.
pub fn check() -> anyhow::Result<()> {
    if !has_node() {
        bail!("the SDKs' tests need Node {NODE_MIN} or newer, with npm");
    }
    step("sdk: tools", tools)?;
    step("sdk: the API's types", types)?;
    step("sdk: python", check_python)?;
    step("sdk: packages", || {
        let wheel = wheel(None)?;
        let tarball = tarball()?;
        install_both(&wheel, &tarball)
    })?;
    step("sdk: tests", tests)
}

/// Whether there is a Node that is new enough.
pub fn has_node() -> bool {
    let asked = ask(Command::new("node").arg("--version").stderr(Stdio::null()));
    let version = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let major = version.ok().and_then(|version| {
        let major = version.trim().strip_prefix('v')?.split('.').next()?;
        major.parse::<u32>().ok()
    });
    major.is_some_and(|major| major >= NODE_MIN)
}

/// The wheel that brings the program along, and the npm package, in `target/dist`. All must be built.
pub fn dist() -> anyhow::Result<()> {
    tools()?;
    types()?;
    whole_wheel()?;
    eprintln!("xtask: {}", tarball()?.display());
    Ok(())
}

/// Packs the wheel that brings the program along, and has that program answer where the wheel is all that is
/// installed. All must be built, and [`check`] done.
pub fn check_whole_wheel() -> anyhow::Result<()> {
    let wheel = whole_wheel()?;
    let user = Path::new(TRIED).join("whole");
    environment(&user)?;
    install_into(&user, &[&wheel])?;
    let packed = ask(Command::new(user.join("bin/zygote")).arg("--version"))?;
    let built = ask(Command::new("target/release/zygote").arg("--version"))?;
    if packed.stdout != built.stdout {
        bail!(
            "the program in {} is not the one that was built",
            wheel.display()
        );
    }
    Ok(())
}

fn whole_wheel() -> anyhow::Result<PathBuf> {
    let tree = Path::new("target/dist/wheel");
    let _ = fs::remove_dir_all(tree);
    install::install(Path::new("/"), Some(tree))?;
    for program in ["bin/zygote", "lib/zygote/zygote-agent"] {
        run(Command::new("strip").arg(tree.join(program)))?;
    }
    let wheel = wheel(Some(tree))?;
    let bytes = fs::metadata(&wheel).context("cannot see the wheel")?.len();
    if bytes > WHEEL_MAX_BYTES {
        bail!(
            "{} has {bytes} bytes, and {WHEEL_MAX_BYTES} is the most",
            wheel.display()
        );
    }
    eprintln!(
        "xtask: {}: {:.1} MiB",
        wheel.display(),
        bytes as f64 / 1048576.0
    );
    Ok(wheel)
}

fn tool(name: &str) -> PathBuf {
    Path::new(TRIED).join("tools/bin").join(name)
}

/// What checks and packs, in a virtual environment; made anew when it changes.
fn tools() -> anyhow::Result<()> {
    let wanted = fs::read(Path::new(PYTHON).join("requirements-dev.txt"))
        .context("cannot read the SDK's requirements")?;
    let stamp = Path::new(TRIED).join("tools/requirements.txt");
    if fs::read(&stamp).is_ok_and(|had| had == wanted) {
        return Ok(());
    }
    environment(&Path::new(TRIED).join("tools"))?;
    let mut pip = Command::new(tool("pip"));
    pip.args(["install", "-q", "--disable-pip-version-check", "-r"]);
    run(pip.arg(Path::new(PYTHON).join("requirements-dev.txt")))?;
    fs::write(stamp, wanted).context("cannot remember the SDK's tools")
}

/// Has both SDKs' types of what is asked and answered made from the API's description, by which their own words are
/// checked.
fn types() -> anyhow::Result<()> {
    let described =
        ask(Command::new("cargo").args(["run", "-q", "-p", "zygote-server", "--example", "api"]))?;
    let path = Path::new(TRIED).join("openapi.json");
    fs::write(&path, described.stdout).context("cannot write the API's description")?;
    let mut python = Command::new(tool("datamodel-codegen"));
    python.args(["--input-file-type", "openapi", "--input"]);
    python.arg(&path).arg("--output");
    python.arg(Path::new(PYTHON).join("src/zygote_vm/_api.py"));
    python.args(["--output-model-type", "typing.TypedDict"]);
    python.args(["--target-python-version", "3.10", "--disable-warnings"]);
    python.args(["--use-standard-collections", "--use-union-operator"]);
    run(&mut python)?;
    npm(&["ci"])?;
    npm(&["run", "api"])
}

fn npm(arguments: &[&str]) -> anyhow::Result<()> {
    let quiet = ["--no-fund", "--no-audit", "--loglevel=error"];
    let mut npm = Command::new("npm");
    npm.args(arguments).args(quiet).current_dir(TYPESCRIPT);
    run(npm.stdout(Stdio::null()))
}

fn check_python() -> anyhow::Result<()> {
    let python = fs::canonicalize(TRIED).context("cannot find the tools")?;
    let within = |name: &str, arguments: &[&str]| {
        let mut command = Command::new(python.join("tools/bin").join(name));
        run(command.args(arguments).current_dir(PYTHON))
    };
    within("ruff", &["format", "--check", "-q", "."])?;
    within("ruff", &["check", "-q", "."])?;
    within("mypy", &["--no-error-summary"])?;
    within("python", &["tools/make_sync.py", "--check"])
}

/// Packs the Python SDK, with what was installed into a folder if there is one.
fn wheel(tree: Option<&Path>) -> anyhow::Result<PathBuf> {
    let out = Path::new(DIST).join(if tree.is_some() {
        "python"
    } else {
        "python-pure"
    });
    let _ = fs::remove_dir_all(&out);
    let mut build = Command::new(tool("python"));
    build.args(["-m", "build", "--wheel", "--no-isolation", "--outdir"]);
    build.arg(&out).arg(PYTHON).stdout(Stdio::null());
    match tree {
        Some(tree) => build.env("ZYGOTE_WHEEL_TREE", fs::canonicalize(tree)?),
        None => build.env_remove("ZYGOTE_WHEEL_TREE"),
    };
    run(&mut build)?;
    only_file(&out)
}

fn only_file(folder: &Path) -> anyhow::Result<PathBuf> {
    let mut entries = fs::read_dir(folder).context("cannot see what was packed")?;
    let entry = entries.next().context("nothing was packed")??;
    Ok(entry.path())
}

/// Packs the TypeScript SDK.
fn tarball() -> anyhow::Result<PathBuf> {
    npm(&["run", "build"])?;
    let out = Path::new(DIST).join("npm");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out).context("cannot make a folder for the package")?;
    let out = fs::canonicalize(out)?;
    npm(&["pack", "--pack-destination", &out.display().to_string()])?;
    only_file(&out)
}

/// A virtual environment of Python's with nothing in it.
fn environment(folder: &Path) -> anyhow::Result<()> {
    let mut python = Command::new("python3");
    run(python.args(["-m", "venv", "--clear"]).arg(folder))
}

fn install_into(environment: &Path, packages: &[&Path]) -> anyhow::Result<()> {
    let mut pip = Command::new(environment.join("bin/pip"));
    pip.args(["install", "-q", "--disable-pip-version-check"]);
    run(pip.args(packages))
}

/// Each into an environment of its own, from its package.
fn install_both(wheel: &Path, tarball: &Path) -> anyhow::Result<()> {
    let user = Path::new(TRIED).join("user");
    let _ = fs::remove_dir_all(&user);
    let python = user.join("python");
    environment(&python)?;
    install_into(&python, &[Path::new("pytest"), wheel])?;
    let node = user.join("node");
    fs::create_dir_all(&node).context("cannot make a folder for Node")?;
    fs::write(node.join("package.json"), "{\"private\": true}\n")?;
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-fund", "--no-audit", "--loglevel=error"]);
    npm.arg(fs::canonicalize(tarball)?).current_dir(&node);
    run(npm.stdout(Stdio::null()))
}

fn tests() -> anyhow::Result<()> {
    let user = fs::canonicalize(Path::new(TRIED).join("user")).context("nothing is installed")?;
    let mut tests = Command::new("cargo");
    tests.args([
        "test",
        "-q",
        "-p",
        "zygote-daemon",
        "--test",
        "live",
        "--",
        "sdks::",
    ]);
    tests.env("ZYGOTE_SDK_PYTHON", user.join("python/bin/python"));
    tests.env("ZYGOTE_SDK_NODE", "node");
    let package = user.join("node/node_modules/zygote-vm/dist/esm");
    tests.env("ZYGOTE_TEST_PACKAGE", package);
    run(&mut tests)
}
