//! `zygote serve`: the engine itself.

use crate::args::{Global, ServeArgs};
use crate::host;
use crate::out::{complain, say};
use crate::{run, settings};
use std::io::Write;
use zygote_api::{ErrorCode, Failure};
use zygote_daemon::{READY, Ready, SocketError, serve};

/// How long an engine stays in the background without work.
const IDLE_EXIT: &str = "15m";

/// Serves until it is told to end.
pub fn run(global: &Global, args: &ServeArgs) -> anyhow::Result<u8> {
    if args.background {
        // No terminal's signals, and no session's end.
        let _ = rustix::process::setsid();
    }
    let background = args.background;
    match conduct(global, args) {
        Ok(()) => Ok(0),
        // Whoever started us finds that one.
        Err(error) if background && is_taken(&error) => {
            word(READY);
            Ok(0)
        }
        Err(error) => {
            if background {
                let failure = Failure::new(ErrorCode::Internal, format!("{error:#}"));
                word(&serde_json::to_string(&failure).unwrap_or_default());
            }
            Err(error)
        }
    }
}

fn is_taken(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SocketError::Taken(_)))
}

fn conduct(global: &Global, args: &ServeArgs) -> anyhow::Result<()> {
    let said = args.settings.clone().over(settings::of_environment()?);
    let mut given = said.clone();
    if let Some(path) = &args.config {
        given = given.over(settings::read(path)?);
    }
    if args.print_config {
        say!("{}", settings::print(&given)?.trim_end());
        return Ok(());
    }
    if args.background {
        given.idle_exit.get_or_insert_with(|| IDLE_EXIT.to_owned());
    }
    let store = host::store(global)?;
    let place = host::choose(global, &store)?;
    let mut config = settings::config(global, &store, place, &given)?;
    config.engine.allow_missing_walls = args.allow_missing_walls;
    config.lab_port = args.lab_port;
    config.door = settings::door(&store, &given, said, args.config.clone())?;
    config.log = args.background.then(|| settings::log(&store));
    run::raise_descriptors();
    let background = args.background;
    serve(config, |ready| {
        if background {
            word(READY);
        } else {
            tell(ready);
        }
    })
}

fn tell(ready: &Ready) {
    complain!("zygote: the engine listens at {}", ready.socket.display());
    if let Some(address) = ready.address {
        let scheme = if ready.is_tls { "https" } else { "http" };
        complain!("zygote: and at {scheme}://{address}");
    }
    if let Some(warning) = &ready.warning {
        complain!("zygote: {warning}");
    }
}

/// To whoever has started us in the background, who waits for the end of our output.
fn word(word: &str) {
    let mut stdout = std::io::stdout().lock();
    // Who has gone wants to know nothing.
    let _ = writeln!(stdout, "{word}").and_then(|()| stdout.flush());
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}
