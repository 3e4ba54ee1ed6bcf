//! `zygote lab`: a command on an emulated host, the one that is kept or a fresh one.

use crate::args::{Global, HostChoice, LabArgs, LabVerb, Timeout};
use crate::engine::{self, Engine};
use crate::failure;
use crate::get::Received;
use crate::host::{self, LabJob};
use crate::interrupt::Interrupts;
use crate::out::{complain, say};
use crate::program::stdin_input;
use crate::run::End;
use crate::running::{Output, follow};
use crate::{one, report, settings};
use anyhow::{Context, bail};
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;
use zygote_api::{CommandRequest, LabStatus, Octets};
use zygote_daemon::{BuildsLock, Client, Found, find};
use zygote_template::{Store, format_size};

const OUTPUT_MAX: usize = 16;

/// Does what the words say; gives back the exit code.
pub fn run(global: &Global, args: &LabArgs) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    match args.verb {
        Some(LabVerb::Up { json }) => up(global, &store, json),
        Some(LabVerb::Down { json }) => down(global, &store, json),
        Some(LabVerb::Status { json }) => status(global, &store, json),
        None if args.command.is_empty() => Err(failure::usage("nothing to do")
            .remedy("give a command (zygote lab -- uname -a), or up, down or status")
            .into()),
        None => command(global, &store, args),
    }
}

/// Starts one and waits until it is up, by running nothing in it.
fn up(global: &Global, store: &Store, as_json: bool) -> anyhow::Result<u8> {
    if host::in_lab() {
        bail!("this is a lab already, and none is started inside of one");
    }
    let runtime = engine::runtime()?;
    let result = runtime.block_on(async {
        let engine = Engine::shared(global, store).await?;
        let request = CommandRequest {
            command: vec!["true".into()],
            env: environment(),
            ..CommandRequest::default()
        };
        let (sender, _output) = mpsc::channel(OUTPUT_MAX);
        let (_none, signals) = mpsc::channel(1);
        let events = engine.client().lab_exec(&request, None).await?;
        anyhow::Ok(follow(engine.client(), events, signals, sender).await?)
    })?;
    if result.exit_code != 0 {
        bail!("the lab is up, but `true` does not run in it");
    }
    if as_json {
        return status(global, store, true);
    }
    say!("the lab is up; it stays until: zygote lab down, or until the engine ends");
    Ok(0)
}

/// The engine that is there, with its lab's state.
async fn kept(global: &Global, store: &Store) -> anyhow::Result<Option<(Client, LabStatus)>> {
    let socket = settings::socket(global, store)?;
    let Found::Own(client, _) = find(&socket).await? else {
        return Ok(None);
    };
    let lab = client.status().await?.lab;
    Ok(lab.map(|lab| (client, lab)))
}

fn down(global: &Global, store: &Store, as_json: bool) -> anyhow::Result<u8> {
    let was_up = engine::runtime()?.block_on(async {
        let kept = kept(global, store).await?;
        let Some((client, _)) = kept.filter(|(_, lab)| lab.state != "down") else {
            return anyhow::Ok(false);
        };
        client.lab_down().await?;
        Ok(true)
    })?;
    if as_json {
        say!(
            "{}",
            serde_json::json!({ "state": "down", "was_up": was_up })
        );
        return Ok(0);
    }
    say!(
        "{}",
        if was_up {
            "the lab is down"
        } else {
            "no lab is up"
        }
    );
    Ok(0)
}

fn status(global: &Global, store: &Store, as_json: bool) -> anyhow::Result<u8> {
    let kept = engine::runtime()?.block_on(kept(global, store))?;
    let lab = kept.map_or_else(
        || LabStatus {
            state: "down".to_owned(),
            pid: None,
            uptime_seconds: None,
            memory_max_bytes: u64::from(host::LAB_MEMORY_MIB) << 20,
            memory_bytes: None,
            last_failure: None,
        },
        |(_, lab)| lab,
    );
    if as_json {
        say!("{}", serde_json::to_string(&lab)?);
        return Ok(0);
    }
    match lab.pid {
        Some(pid) => say!(
            "the lab is {} (process {pid}, {} of memory, at most {})",
            lab.state,
            format_size(lab.memory_bytes.unwrap_or_default()),
            format_size(lab.memory_max_bytes)
        ),
        None => say!("the lab is {}", lab.state),
    }
    if let Some(why) = &lab.last_failure {
        say!("the last one died: {why}");
    }
    Ok(0)
}

/// This program again, with the same arguments, in the lab that is up, or in a fresh one, where it has to
/// write to a folder.
pub fn again(global: &Global, store: &Store, folder: Option<&Path>) -> anyhow::Result<u8> {
    let share = folder.map(std::path::absolute).transpose()?;
    if let Some(folder) = &share {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }

    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command: Vec<OsString> = vec!["env".into()];
    let mut state = OsString::from("ZYGOTE_STATE_DIR=");
    state.push(store.state_dir());
    command.extend([state, program.into()]);
    command.extend(std::env::args_os().skip(1));
    let args = LabArgs {
        verb: None,
        fresh: false,
        icount: false,
        share: share.into_iter().collect(),
        throw_away: false,
        timeout: Timeout(None),
        command,
    };
    self::command(global, store, &args)
}

/// In the lab that is up, unless something is asked for that it cannot have any more.
fn command(global: &Global, store: &Store, args: &LabArgs) -> anyhow::Result<u8> {
    let is_plain = args.share.is_empty() && !args.icount && !args.throw_away;
    if is_plain && !args.fresh && !host::in_lab() && global.host != HostChoice::Kvm {
        let runtime = engine::runtime()?;
        let ended = runtime.block_on(async {
            let kept = kept(global, store).await?;
            match kept.filter(|(_, lab)| lab.state == "up") {
                Some((client, _)) => in_kept(&client, args).await.map(Some),
                None => anyhow::Ok(None),
            }
        })?;
        // A thread may still wait for standard input that nobody wants any more.
        runtime.shutdown_background();
        match ended {
            Some(End::Code(code)) => return Ok(code),
            Some(End::Signal(signal)) => return Ok(report::die_of(signal)),
            None => {}
        }
    }
    in_fresh(store, args)
}

async fn in_kept(client: &Client, args: &LabArgs) -> anyhow::Result<End> {
    let interrupts = Interrupts::listen()?;
    let words = args.command.iter().map(|word| octets(word)).collect();
    let directory = std::env::current_dir().unwrap_or_else(|_| "/".into());
    let request = CommandRequest {
        command: words,
        env: environment(),
        cwd: octets(directory.as_os_str()),
        stdin_stream: true,
    };
    let (sender, output) = mpsc::channel::<Output>(OUTPUT_MAX);
    let mut printing =
        tokio::task::spawn_blocking(move || one::print_output(output, Received::new(&[], None)));
    let running = async {
        let events = client.lab_exec(&request, Some(stdin_input())).await?;
        follow(client, events, interrupts.for_program(), sender).await
    };
    let limited = async {
        match args.timeout.0 {
            Some(limit) => tokio::time::timeout(limit, running)
                .await
                .map_err(|_| limit),
            None => Ok(running.await),
        }
    };
    let result = tokio::select! {
        result = limited => result,
        printed = &mut printing => return one::reader_gone(printed?),
        signal = interrupts.after(2) => return Ok(End::Signal(signal)),
    };
    let result = match result {
        Ok(result) => result?,
        Err(limit) => return Ok(timed_out(limit)),
    };
    if let Err(error) = printing.await? {
        return one::reader_gone(Err(error));
    }
    if let Some(sentence) = &result.error {
        complain!("zygote: {sentence}");
    }
    Ok(one::end(&result, interrupts.last()))
}

fn timed_out(limit: Duration) -> End {
    complain!("zygote: the command did not end within {limit:?}, and was killed");
    End::Code(report::TIMED_OUT)
}

fn octets(word: &OsStr) -> Octets {
    word.as_bytes().to_vec().into()
}

/// All of ours but what is about this host.
fn environment() -> Vec<(Octets, Octets)> {
    let ours = std::env::vars_os();
    let theirs = ours.filter(|(key, _)| {
        !["ZYGOTE_HOST", "ZYGOTE_STATE_DIR", "ZYGOTE_SOCKET"].contains(&&*key.to_string_lossy())
    });
    let terminal = std::io::stdout().is_terminal();
    let hint = terminal.then(|| (host::TERMINAL_HINT.into(), "1".into()));
    theirs
        .map(|(key, value)| (octets(&key), octets(&value)))
        .chain(hint)
        .collect()
}

fn in_fresh(store: &Store, args: &LabArgs) -> anyhow::Result<u8> {
    let shares = args.share.iter().map(std::path::absolute);
    let mut shares: Vec<_> = shares.collect::<Result<_, _>>()?;
    if !args.throw_away {
        shares.insert(0, store.state_dir().to_owned());
    }
    let job = LabJob {
        arguments: args.command.clone(),
        shares,
        builds_lock: if args.throw_away {
            BuildsLock::OursToTake
        } else {
            BuildsLock::OutOfReach
        },
        icount: args.icount,
        stdin: true,
        timeout: args.timeout.0,
    };
    match host::run_in_lab(store, job) {
        Err(error) if host::is_lab_timeout(&error) => {
            complain!("zygote: {error}");
            Ok(report::TIMED_OUT)
        }
        other => other,
    }
}
