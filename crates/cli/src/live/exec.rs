//! `zygote exec` and `zygote attach`: a process whose streams are this program's.

use super::streams::{self, End, Sink, follow, input};
use super::terminal::{self, Raw};
use crate::args::{AttachArgs, ExecArgs, Global};
use crate::interrupt::Interrupts;
use crate::out::{complain, say};
use crate::report::{FAILED, die_of};
use serde_json::json;
use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use tokio::sync::Notify;
use zygote_api::{
    AttachRequest, COLLECTED_MAX_BYTES, Collected, Octets, OutputBudget, ProcessRequest,
    ProcessResult, ProcessSignal,
};
use zygote_daemon::Client;

/// What a second signal to this program sends to the process.
const KILL: u8 = 9;

fn request(args: &ExecArgs) -> ProcessRequest {
    let words = args.command.iter();
    ProcessRequest {
        command: words
            .map(|word| Octets::from(word.as_bytes().to_vec()))
            .collect(),
        env: args.env.iter().cloned().chain(term(args.tty)).collect(),
        cwd: args.cwd.clone(),
        user: args.user.clone(),
        stdin_stream: args.interactive,
        terminal: args.tty.then(terminal::size),
        timeout_seconds: args.timeout.0.map_or(0.0, |limit| limit.as_secs_f64()),
        detach: args.detach,
        ..ProcessRequest::default()
    }
}

/// What kind of terminal it is.
fn term(has_terminal: bool) -> Option<(String, String)> {
    let term = std::env::var("TERM").ok().filter(|_| has_terminal)?;
    Some(("TERM".to_owned(), term))
}

/// Runs a program in a sandbox; gives back the exit code.
pub fn exec(global: &Global, args: &ExecArgs) -> anyhow::Result<u8> {
    if args.tty && !args.detach {
        terminal::check()?;
    }
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let client = super::engine_with(global, &args.sandbox).await?;
        if args.detach {
            return detached(&client, args).await;
        }
        let work = attached(&client, args, &interrupts);
        tokio::pin!(work);
        tokio::select! {
            code = &mut work => code,
            signal = interrupts.after(3) => Ok(die_of(signal)),
        }
    })
}

async fn detached(client: &Client, args: &ExecArgs) -> anyhow::Result<u8> {
    let info = client.start_in(&args.sandbox, &request(args)).await?;
    if args.json {
        say!("{}", json!(info));
    } else {
        say!("{}", info.process);
    }
    Ok(0)
}

async fn attached(client: &Client, args: &ExecArgs, interrupts: &Interrupts) -> anyhow::Result<u8> {
    let (ours, receiver) = input();
    let events = client
        .exec_in(&args.sandbox, &request(args), Some(receiver))
        .await?;
    let raw = args.tty.then(Raw::begin).transpose()?;
    if args.interactive {
        ours.pass_stdin(args.tty);
    }
    if args.tty {
        terminal::follow_size(ours.sender.clone())?;
    } else {
        streams::pass_signals(interrupts, ours.sender.clone());
    }
    let mut kept = Collected::new(COLLECTED_MAX_BYTES, &OutputBudget::new(usize::MAX));
    let sink = if args.json {
        Sink::Kept(&mut kept)
    } else {
        Sink::Ours
    };
    let number = Cell::new(None);
    let end = {
        let started = |process| number.set(Some(process));
        let following = follow(events, sink, &ours.left, started);
        tokio::pin!(following);
        tokio::select! {
            end = &mut following => end?,
            // The first was the process's.
            _ = interrupts.after(2) => {
                kill(client, &args.sandbox, number.get()).await;
                following.await?
            }
        }
    };
    drop(raw);
    match end {
        End::Result(result) if args.json => Ok(record(*result, kept)),
        End::Result(result) => Ok(code(&result, interrupts.last())),
        End::Left => Ok(left(&args.sandbox, number.get())),
        End::ReaderGone(code) => {
            kill(client, &args.sandbox, number.get()).await;
            Ok(code)
        }
    }
}

/// Ends a process that nobody waits for any more.
async fn kill(client: &Client, sandbox: &str, process: Option<u32>) {
    let Some(process) = process else { return };
    let signal = ProcessSignal {
        signal: KILL,
        only_process: false,
    };
    // It may have ended.
    let _ = client.signal_process(sandbox, process, signal).await;
}

fn record(mut result: ProcessResult, mut kept: Collected) -> u8 {
    let (stdout, stderr) = kept.take();
    result.set_output(stdout, stderr);
    result.truncated |= kept.truncated;
    say!("{}", json!(result));
    tell(&result);
    result.exit_code
}

fn tell(result: &ProcessResult) {
    if let Some(error) = &result.error {
        complain!("zygote: {error}");
    }
}

/// Who was sent a signal, and passed it on to a process that it ended, dies of it too.
fn code(result: &ProcessResult, signal: Option<i32>) -> u8 {
    tell(result);
    match (result.signal, signal) {
        (Some(by), Some(signal)) if i32::from(by) == signal => die_of(signal),
        _ => result.exit_code,
    }
}

fn left(sandbox: &str, process: Option<u32>) -> u8 {
    let Some(process) = process else {
        return FAILED;
    };
    complain!(
        "\r\nzygote: process {process} goes on; back to it: zygote attach {sandbox} {process}"
    );
    0
}

/// Reads on what a process says; gives back the exit code.
pub fn attach(global: &Global, args: &AttachArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let client = super::engine_with(global, &args.sandbox).await?;
        let info = client.process(&args.sandbox, args.process).await?;
        let has_terminal = info.terminal && io::stdin().is_terminal() && !args.no_stdin;
        let attach = AttachRequest {
            from: None,
            hold: true,
        };
        let (ours, receiver) = input();
        let attached = client.attach(&args.sandbox, args.process, attach, Some(receiver));
        let events = attached.await?;
        let raw = has_terminal.then(Raw::begin).transpose()?;
        if !args.no_stdin {
            ours.pass_stdin(has_terminal);
        }
        if has_terminal {
            let zygote_api::TerminalSize { rows, columns } = terminal::size();
            let resize = zygote_api::ProcessInput::Resize { rows, columns };
            // Gone, if the process has ended.
            let _ = ours.sender.send(resize).await;
            terminal::follow_size(ours.sender.clone())?;
        } else {
            streams::pass_signals(&interrupts, ours.sender.clone());
        }
        let left_by_keys: &Notify = &ours.left;
        let following = follow(events, Sink::Ours, left_by_keys, |_| {});
        let end = tokio::select! {
            end = following => end?,
            signal = interrupts.after(2) => {
                drop(raw);
                return Ok(die_of(signal));
            }
        };
        drop(raw);
        Ok(match end {
            End::Result(result) => code(&result, interrupts.last()),
            End::Left => left(&args.sandbox, Some(args.process)),
            End::ReaderGone(code) => code,
        })
    })
}
