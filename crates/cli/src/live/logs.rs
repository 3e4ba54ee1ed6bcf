//! `zygote logs` and `zygote events`.

use super::streams::{End, Sink, follow};
use super::{engine_there, engine_with, line, short};
use crate::args::{EventsArgs, Global, LogsArgs};
use crate::interrupt::Interrupts;
use crate::out::say;
use crate::report::die_of;
use serde_json::json;
use std::io::{self, Write};
use tokio::sync::Notify;
use zygote_api::{ErrorCode, Failure, ProcessEvent, SandboxEvent, SandboxHappening};
use zygote_daemon::{Client, Events};

/// Shows what a process has said; gives back the exit code.
pub fn logs(global: &Global, args: &LogsArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let client = engine_with(global, &args.sandbox).await?;
        let process = match args.process {
            Some(process) => process,
            None => last(&client, &args.sandbox).await?,
        };
        if args.json {
            let output = client.output(&args.sandbox, process, args.from).await?;
            say!("{}", json!(output));
            return Ok(0);
        }
        let reading = client.read_output(&args.sandbox, process, args.from, args.follow);
        let events = reading.await?;
        tokio::select! {
            code = show(events, args.follow) => code,
            signal = interrupts.after(1) => Ok(die_of(signal)),
        }
    })
}

async fn last(client: &Client, sandbox: &str) -> anyhow::Result<u32> {
    let list = client.processes(sandbox).await?.processes;
    let last = list.last().map(|info| info.process);
    last.ok_or_else(|| {
        let message = format!("nothing has been started in the sandbox {sandbox} yet");
        Failure::new(ErrorCode::ProcessNotFound, message).into()
    })
}

async fn show(mut events: Events<ProcessEvent>, to_its_end: bool) -> anyhow::Result<u8> {
    if to_its_end {
        return Ok(
            match follow(events, Sink::Ours, &Notify::new(), |_| {}).await? {
                End::ReaderGone(code) => code,
                End::Result(_) | End::Left => 0,
            },
        );
    }
    while let Some(event) = events.next().await? {
        let written = match event {
            ProcessEvent::Stdout { data, .. } => io::stdout().write_all(&data.0),
            ProcessEvent::Stderr { data, .. } => io::stderr().write_all(&data.0),
            ProcessEvent::Skipped { from, to } => {
                super::streams::skipped(to - from);
                Ok(())
            }
            ProcessEvent::Error { error } => return Err(error.into()),
            ProcessEvent::Started { .. } | ProcessEvent::Result(_) => Ok(()),
        };
        if let Err(error) = written.and_then(|()| io::stdout().flush()) {
            return Ok(crate::out::code(&error));
        }
    }
    Ok(0)
}

/// Shows what has happened; gives back the exit code.
pub fn events(global: &Global, args: &EventsArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let Some(client) = engine_there(global).await? else {
            return Ok(0);
        };
        let showing = async {
            let mut events = client.sandbox_events(0, args.follow).await?;
            while let Some(event) = events.next().await? {
                let is_wanted = args.sandbox.as_ref().is_none_or(|wanted| {
                    event.name.as_ref() == Some(wanted)
                        || event.sandbox.starts_with(wanted)
                        || event.sandbox.ends_with(wanted)
                });
                if is_wanted && args.json {
                    say!("{}", json!(event));
                } else if is_wanted {
                    tell(&event);
                }
            }
            anyhow::Ok(0)
        };
        tokio::select! {
            code = showing => code,
            signal = interrupts.after(1) => Ok(die_of(signal)),
        }
    })
}

fn tell(event: &SandboxEvent) {
    let sandbox = event.name.clone().unwrap_or_else(|| short(&event.sandbox));
    let what = match &event.what {
        SandboxHappening::Made => "made".to_owned(),
        SandboxHappening::Branched { into } => format!("branched into {}", {
            let into: Vec<_> = into.iter().map(|id| super::short(id)).collect();
            into.join(", ")
        }),
        SandboxHappening::MomentKept { moment, .. } => format!("moment {moment} is kept"),
        SandboxHappening::RolledBack { to } => format!("rolled back to the moment @{to}"),
        SandboxHappening::Paused => "paused: it is on disk".to_owned(),
        SandboxHappening::Resumed => "runs again".to_owned(),
        SandboxHappening::Adopted => {
            "runs on; its engine was killed, and another one is there".to_owned()
        }
        SandboxHappening::Ended { message, .. } => format!("ended: {message}"),
        SandboxHappening::ProcessStarted { process, command } => {
            format!("process {process} started: {}", line(command))
        }
        SandboxHappening::ProcessEnded {
            process, exit_code, ..
        } => format!("process {process} ended: exit {exit_code}"),
        SandboxHappening::LimitHit { limit } => format!("refused at a limit: {limit}"),
    };
    say!("{}  {sandbox:<16} {what}", event.at);
}
