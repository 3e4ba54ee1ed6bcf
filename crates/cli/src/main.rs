//! `zygote`: one binary, thin; the work is in the crates below.

mod args;
mod copy;
mod demo;
mod doctor;
mod host;
mod interrupt;
mod many;
mod one;
mod out;
mod probed;
mod program;
mod progress;
mod report;
mod run;
mod template;

use crate::out::{complain, say};
use args::{Cli, LabArgs, Verb};
use clap::CommandFactory;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Whoever has started us may ignore them, and have us inherit that.
    zygote_jail::see_children();
    // Hidden verbs: this program is also what runs in other places.
    match std::env::args_os().nth(1) {
        Some(verb) if verb == zygote_lab::INIT_VERB => zygote_lab::init_main(),
        Some(verb) if verb == run::ZYGOTE_VERB => {
            return ExitCode::from(zygote_runner::zygote_main());
        }
        Some(verb) if verb == doctor::JAIL_VERB => return doctor::show_jail(),
        _ => {}
    }
    let cli = Cli::read(std::env::args_os().collect()).unwrap_or_else(|error| error.exit());
    match dispatch(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain!("zygote: {error:#}");
            ExitCode::from(report::FAILED)
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<u8> {
    let global = &cli.global;
    match &cli.verb {
        Verb::Run(args) => run::run(global, args),
        Verb::Template(verb) => template::run(global, verb),
        Verb::Doctor { json } => doctor::run(global, *json),
        Verb::Demo => demo::run(global),
        Verb::Lab(LabArgs {
            icount,
            share,
            throw_away,
            timeout,
            command,
        }) => {
            let mut shares: Vec<_> = share
                .iter()
                .map(std::path::absolute)
                .collect::<Result<_, _>>()?;
            let store = host::store(global)?;
            if !throw_away {
                shares.insert(0, store.state_dir().to_owned());
            }
            let job = host::LabJob {
                arguments: command.clone(),
                shares,
                builds_lock: if *throw_away {
                    host::BuildsLock::OursToTake
                } else {
                    host::BuildsLock::OutOfReach
                },
                icount: *icount,
                stdin: true,
                timeout: timeout.0,
            };
            match host::run_in_lab(&store, job) {
                Err(error) if host::is_lab_timeout(&error) => {
                    complain!("zygote: {error}");
                    Ok(report::TIMED_OUT)
                }
                other => other,
            }
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "zygote", &mut script);
            say!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(0)
        }
    }
}
