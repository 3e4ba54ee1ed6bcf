//! The words of `zygote key`.

use super::{Timeout, parse_duration, parse_size};
use clap::{Args, Subcommand};
use zygote_daemon::Role;

#[derive(Subcommand)]
pub enum KeyVerb {
    /// Make a key, and show it this once
    #[command(
        after_help = "A key stands for a tenant, whose keys share its sandboxes and templates and see nobody else's. \
            Roles: run (programs and sandboxes), manage (templates made of sandboxes, too), admin (everything, of \
            all tenants). An engine that runs knows a new key at once.\n\nExamples:\n  \
            zygote key create --tenant acme\n  \
            zygote key create --tenant acme --role manage --expires 720h --rate 100 --runs 8\n  \
            zygote key create --role admin --name ops"
    )]
    Create(KeyCreateArgs),
    /// List keys, without their secrets
    #[command(
        after_help = "Examples:\n  zygote key ls\n  zygote key ls --json | jq '.keys[].tenant'"
    )]
    Ls {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take a key away; what its tenant runs goes on
    #[command(after_help = "Example:\n  zygote key revoke 3f9a1c2b7d10")]
    Revoke {
        /// Its id, or the beginning of that
        id: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
pub struct KeyCreateArgs {
    /// Whose it is; not for the role admin
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// What it may ask for: run, manage or admin
    #[arg(long, default_value = "run", value_name = "ROLE")]
    pub role: Role,
    /// A word for people
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// How long it counts, such as 720h; 0: until it is revoked
    #[arg(long, default_value = "0", value_parser = parse_duration, value_name = "TIME")]
    pub expires: Timeout,
    /// Requests a second [default: what the engine says, --key-rate]
    #[arg(long, value_name = "N")]
    pub rate: Option<u32>,
    /// Its runs at once [default: --key-runs-max]
    #[arg(long, value_name = "N")]
    pub runs: Option<u32>,
    /// Sandboxes of its tenant that live at once [default: --key-sandboxes-max]
    #[arg(long, value_name = "N")]
    pub sandboxes: Option<u32>,
    /// Longest time of a run, which those get that ask for more [default: --key-timeout-max]
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Option<Timeout>,
    /// Programs of a batch [default: --key-batch-max]
    #[arg(long, value_name = "N")]
    pub batch: Option<u32>,
    /// Memory that the tenant's machines may have at once, such as 8G; each counts with all that its template
    /// has, whatever it uses [default: --key-memory-max]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub memory: Option<u64>,
    /// Their processors; a machine has one or more by its template [default: --key-cpus-max]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Output of a run; what is more is thrown away, and the result says truncated [default: --key-output-max]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub output: Option<u64>,
    /// Bytes of one request: code, files, input [default: --key-upload-max]
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub upload: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
