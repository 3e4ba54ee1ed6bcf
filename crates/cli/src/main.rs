//! `zygote`: one binary, thin; the work is in the crates below.

mod args;
mod bench;
mod complete;
mod copy;
mod demo;
mod disk;
mod doctor;
mod engine;
mod failure;
mod get;
mod host;
mod interrupt;
mod key;
mod lab;
mod live;
mod load;
mod many;
mod one;
mod out;
mod probed;
mod program;
mod progress;
mod report;
mod run;
mod running;
mod serve;
mod settings;
mod status;
mod template;
mod version;
mod words;

use args::{Cli, Verb};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Whoever has started us may ignore them, and have us inherit that.
    zygote_jail::see_children();
    // Hidden verbs: this program is also what runs in other places.
    match std::env::args_os().nth(1) {
        Some(verb) if verb == zygote_lab::INIT_VERB => zygote_lab::init_main(),
        Some(verb) if verb == settings::ZYGOTE_VERB => {
            return ExitCode::from(zygote_runner::zygote_main());
        }
        Some(verb) if verb == settings::BUILD_VERB => {
            let words: Vec<_> = std::env::args_os().skip(2).collect();
            return zygote_daemon::build_main(&words);
        }
        Some(verb) if verb == settings::HOLDER_VERB => {
            let words: Vec<_> = std::env::args_os().skip(2).collect();
            return ExitCode::from(settings::hold(&words));
        }
        Some(verb) if verb == doctor::JAIL_VERB => return doctor::show_jail(),
        _ => {}
    }
    complete::answer();
    let line = Cli::read(std::env::args_os().collect());
    let ended = match line.cli {
        Ok(cli) => dispatch(&cli),
        Err(error) => return ExitCode::from(failure::tell_usage(&error, line.wants_json)),
    };
    ExitCode::from(ended.unwrap_or_else(|error| {
        let failure = failure::of(&error);
        failure::tell(&failure, line.wants_json)
    }))
}

fn dispatch(cli: &Cli) -> anyhow::Result<u8> {
    let global = &cli.global;
    match &cli.verb {
        Verb::Run(args) => run::run(global, args),
        Verb::Create(args) => live::create(global, args),
        Verb::Branch(args) => live::branch(global, args),
        Verb::Snapshot(args) => live::snapshot(global, args),
        Verb::Diff(args) => live::diff(global, args),
        Verb::Rollback(args) => live::rollback(global, args),
        Verb::Pause(args) => live::pause(global, args),
        Verb::Resume(args) => live::resume(global, args),
        Verb::Moments(args) => live::moments(global, args),
        Verb::Tree(args) => live::tree(global, args),
        Verb::Exec(args) => live::exec(global, args),
        Verb::Python(args) => live::python(global, args),
        Verb::Attach(args) => live::attach(global, args),
        Verb::Logs(args) => live::logs(global, args),
        Verb::Cp(args) => live::cp(global, args),
        Verb::Ps(args) => live::ps(global, args),
        Verb::Inspect(args) => live::inspect(global, args),
        Verb::Stats(args) => live::stats(global, args),
        Verb::Top => live::top(global),
        Verb::Kill(args) => live::kill(global, args),
        Verb::Rm(args) => live::rm(global, args),
        Verb::Wait(args) => live::wait(global, args),
        Verb::Events(args) => live::events(global, args),
        Verb::Template(verb) => template::run(global, verb),
        Verb::Key(verb) => key::run(global, verb),
        Verb::Serve(args) => serve::run(global, args),
        Verb::Status { json } => status::status(global, *json),
        Verb::Start { json } => status::start(global, *json),
        Verb::Stop { now, json } => status::stop(global, *now, *json),
        Verb::Doctor { json } => doctor::run(global, *json),
        Verb::Df { json } => disk::df(global, *json),
        Verb::Prune(args) => disk::prune(global, args),
        Verb::Demo { json } => demo::run(global, *json),
        Verb::Version { json } => Ok(version::show(*json)),
        Verb::Bench(args) => bench::run(global, args),
        Verb::Lab(args) => lab::run(global, args),
        Verb::Completions { shell } => complete::script(*shell),
        Verb::Manual { folder } => complete::manual(folder),
    }
}
