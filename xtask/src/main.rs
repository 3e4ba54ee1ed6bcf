//! Automation: everything that the Makefile and CI do, one verb each.

mod layers;
mod steps;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Builds, tests and checks Zygote")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build everything in release mode, the guest's agent statically.
    Build,
    /// Check that crates depend only downwards (ARCHITECTURE.md).
    Layers,
    /// Check the licences of all dependencies.
    Licences,
    /// Format check, lints, layers, licences, tests.
    Test,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().verb {
        Verb::Build => steps::build(),
        Verb::Layers => layers::check(),
        Verb::Licences => layers::check_licences(),
        Verb::Test => steps::test(),
    }
}
