//! Automation: everything that the Makefile and CI do, one verb each.

mod command;
mod docs;
mod gate;
mod install;
mod lab;
mod layers;
mod sdk;
mod setup;
mod steps;
mod system;

use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Builds, tests and checks Zygote")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install the Debian packages that are missing (as root; else says what to type).
    Setup,
    /// Build everything in release mode, the guest's agent statically.
    Build,
    /// Check that crates depend only downwards (ARCHITECTURE.md).
    Layers,
    /// Check the licences of all dependencies.
    Licences,
    /// Everything that CI checks: format, lints, layers, licences, tests, end-to-end ones included.
    Test {
        /// Only what is quick: format, lints, layers, unit tests and tiny guests, nothing that boots.
        #[arg(long)]
        quick: bool,
    },
    /// The system tests alone; everything must be built.
    System {
        /// Only tests whose names contain one of these, in the lab that the engine keeps.
        names: Vec<String>,
    },
    /// Count what runs cost, on an emulated host whose clock counts instructions; everything must be built.
    Bench {
        /// Fail if it is over 3 % worse than what has been accepted (tests/gate.json).
        #[arg(long, required = true)]
        gate: bool,
        /// Accept what is counted.
        #[arg(long)]
        accept: bool,
    },
    /// Install what has been built: the program, its agent, completions, manual, systemd unit.
    Install {
        /// Where to.
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
        /// A folder that will be the root of another system.
        #[arg(long)]
        root: Option<PathBuf>,
    },
    /// Remove what `install` has put there, and nothing else.
    Uninstall {
        /// Where from.
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
        /// A folder that will be the root of another system.
        #[arg(long)]
        root: Option<PathBuf>,
    },
    /// Pack what has been built: a Debian package, a wheel with the program, an npm package.
    Dist,
    /// Check, pack, install and try the SDKs.
    Sdk,
    /// Build the book of docs/ with mdbook.
    Docs,
    /// Install what is missing, build, and show two forks of the `python` template.
    Demo,
    /// Run a command on an emulated host with working KVM.
    Lab {
        /// One processor whose clock counts instructions.
        #[arg(long)]
        icount: bool,
        /// The command.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
}

/// The last line is the cause: whoever reads the end of a log has it.
fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|verb| verb == zygote_lab::INIT_VERB)
    {
        zygote_lab::init_main();
    }
    match Arguments::parse().verb {
        Verb::Setup => setup::install(),
        Verb::System { names } => system::test(&names),
        Verb::Bench { gate: _, accept } => gate::run(accept),
        Verb::Install { prefix, root } => install::install(&prefix, root.as_deref()),
        Verb::Uninstall { prefix, root } => install::uninstall(&prefix, root.as_deref()),
        Verb::Dist => {
            steps::build()?;
            install::dist()?;
            sdk::dist()
        }
        Verb::Docs => docs::build(),
        Verb::Sdk => sdk::check(),
        Verb::Demo => steps::demo(),
        Verb::Lab { icount, command } => lab::run(icount, command),
        Verb::Build => steps::build(),
        Verb::Layers => layers::check(),
        Verb::Licences => layers::check_licences(),
        Verb::Test { quick: true } => steps::quick(),
        Verb::Test { quick: false } => steps::test(),
    }
}
