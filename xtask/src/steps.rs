//! The steps of a build and of a test run: one line when a step starts, its time when it ends.

use crate::command::{ask, run};
use crate::layers;
use anyhow::{Context, bail};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Has the corpus of the fuzz targets run as tests.
const FUZZING: &str = "--features=zygote-vmm/fuzzing";
const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";

pub fn step(name: &str, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    eprintln!("xtask: {name} ...");
    let start = Instant::now();
    work().with_context(|| format!("step `{name}` failed"))?;
    eprintln!(
        "xtask: {name}: done in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    run(Command::new("cargo").args(arguments))
}

/// The release build.
pub fn build() -> anyhow::Result<()> {
    step("build", || {
        cargo(&[
            "build",
            "--release",
            "--workspace",
            "--exclude",
            "zygote-agent",
        ])
    })?;
    step("build the agent", build_agent)
}

fn build_agent() -> anyhow::Result<()> {
    let arguments = [
        "build",
        "--release",
        "-p",
        "zygote-agent",
        "--target",
        AGENT_TARGET,
    ];
    run(Command::new("cargo")
        .args(arguments)
        .env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    let built = format!("target/{AGENT_TARGET}/release/zygote-agent");
    let ldd = ask(Command::new("ldd").arg(&built).stderr(Stdio::piped()))?;
    let words = [ldd.stdout, ldd.stderr].concat();
    let words = String::from_utf8_lossy(&words);
    if !words.contains("statically linked") && !words.contains("not a dynamic executable") {
        bail!("{built} is not static, so it cannot run as PID 1 of a guest: {words}");
    }
    std::fs::copy(&built, "target/release/zygote-agent").context("cannot place the agent")?;
    Ok(())
}

/// Two forks of one template, from nothing.
pub fn demo() -> anyhow::Result<()> {
    step("packages", crate::setup::install)?;
    build()?;
    run(Command::new("target/release/zygote").arg("demo"))
}

/// Everything that CI checks.
pub fn test() -> anyhow::Result<()> {
    step("packages", crate::setup::install)?;
    build()?;
    check()?;
    step("tests", || unit("default"))?;
    if crate::sdk::has_node() {
        crate::sdk::check()?;
        let whole = crate::sdk::check_whole_wheel;
        step("sdk: the wheel with the program", whole)?;
    } else {
        eprintln!("xtask: NOT RUN: the SDKs' tests need Node, see: cargo xtask sdk");
    }
    crate::system::test(&[])
}

/// What is fit for after each change: nothing that boots.
pub fn quick() -> anyhow::Result<()> {
    check()?;
    step("tests", || unit("quick"))
}

/// Format, layers, licences, lints.
fn check() -> anyhow::Result<()> {
    step("format", || cargo(&["fmt", "--all", "--check"]))?;
    step("layers", layers::check)?;
    step("licences", layers::check_licences)?;
    let lints = ["clippy", "--workspace", "--all-targets", FUZZING, "--"];
    step("lints", || {
        cargo(&[&lints[..], &["-D", "warnings"]].concat())
    })
}

/// Unit tests and tiny guests: by nextest, which ends what hangs and names it, where that is
/// installed; a profile of .config/nextest.toml.
fn unit(profile: &str) -> anyhow::Result<()> {
    let packages = ["--workspace", "--exclude", "zygote-tests", FUZZING];
    if has_nextest() {
        let nextest = ["nextest", "run", "--profile", profile];
        return cargo(&[&nextest[..], &packages].concat());
    }
    eprintln!("xtask: cargo-nextest is not installed: a test that hangs will not be named");
    let boots: &[&str] = match profile {
        "quick" => &["--exclude", "zygote-lab"],
        _ => &[],
    };
    cargo(&[&["test"][..], &packages, boots].concat())
}

/// Whether tests can be run by nextest.
pub fn has_nextest() -> bool {
    let asked = ask(Command::new("cargo")
        .args(["nextest", "--version"])
        .stderr(Stdio::null()));
    asked.is_ok_and(|output| output.status.success())
}
