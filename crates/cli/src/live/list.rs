//! `zygote ps` and `zygote inspect`.

use super::{all, called, engine_there, engine_with, line, now_s, short, span};
use crate::args::{Global, NamedArgs, PsArgs};
use crate::out::say;
use serde_json::json;
use zygote_api::{ProcessInfo, SandboxInfo, SandboxList, SandboxState};
use zygote_template::format_size;

/// Lists sandboxes, or the processes of one; gives back the exit code.
pub fn ps(global: &Global, args: &PsArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        match &args.sandbox {
            Some(sandbox) => processes(global, sandbox, args).await,
            None => sandboxes(global, args).await,
        }
    })
}

async fn sandboxes(global: &Global, args: &PsArgs) -> anyhow::Result<u8> {
    let state = args.all.then_some("all");
    let sandboxes = match engine_there(global).await? {
        Some(client) => all(&client, state).await?,
        None => Vec::new(),
    };
    if args.json {
        let next = None;
        say!("{}", json!(SandboxList { sandboxes, next }));
    } else if args.quiet {
        sandboxes.iter().for_each(|info| say!("{}", info.id));
    } else if sandboxes.is_empty() {
        say!("no sandboxes; make one with: zygote create");
    } else {
        say!(
            "{:<12}  {:<16} {:<16} {:<8} {:>8} {:>10} {:>9}",
            "ID",
            "NAME",
            "TEMPLATE",
            "STATE",
            "AGE",
            "ENDS IN",
            "PROCESSES"
        );
        sandboxes.iter().for_each(show);
    }
    Ok(0)
}

fn show(info: &SandboxInfo) {
    let now = now_s();
    let ends = match (info.state, info.expires_unix_s) {
        (SandboxState::Ended, _) | (_, None) => "-".to_owned(),
        (_, Some(at)) => span(at.saturating_sub(now)),
    };
    say!(
        "{:<12}  {:<16} {:<16} {:<8} {:>8} {:>10} {:>9}",
        short(&info.id),
        info.name.as_deref().unwrap_or("-"),
        info.template,
        info.state.name(),
        span(now.saturating_sub(info.created_unix_s)),
        ends,
        info.processes
    );
}

async fn processes(global: &Global, sandbox: &str, args: &PsArgs) -> anyhow::Result<u8> {
    let client = engine_with(global, sandbox).await?;
    let mut list = client.processes(sandbox).await?;
    if !args.all && !args.json {
        list.processes.retain(|process| process.result.is_none());
    }
    if args.json {
        say!("{}", json!(list));
    } else if args.quiet {
        list.processes
            .iter()
            .for_each(|info| say!("{}", info.process));
    } else if list.processes.is_empty() {
        say!(
            "no processes run that somebody asked for; those that have ended: zygote ps --all {sandbox}"
        );
    } else {
        head();
        list.processes.iter().for_each(show_process);
    }
    Ok(0)
}

fn head() {
    say!(
        "{:>7} {:>7} {:<12} {:<10} {:>8} {:>10}  COMMAND",
        "PROCESS",
        "PID",
        "STATE",
        "USER",
        "AGE",
        "OUTPUT"
    );
}

fn show_process(info: &ProcessInfo) {
    let state = match &info.result {
        Some(result) => format!("exit {}", result.exit_code),
        None => info.state.clone(),
    };
    let bytes = info
        .output_kept_bytes
        .map(|kept| kept + info.output_dropped_bytes.unwrap_or(0));
    say!(
        "{:>7} {:>7} {:<12} {:<10} {:>8} {:>10}  {}",
        info.process,
        info.pid.map_or("-".to_owned(), |pid| pid.to_string()),
        state,
        if info.user.is_empty() {
            "root"
        } else {
            &info.user
        },
        span(now_s().saturating_sub(info.started_unix_s)),
        bytes.map_or("-".to_owned(), format_size),
        line(&info.command)
    );
}

/// Shows one; gives back the exit code.
pub fn inspect(global: &Global, args: &NamedArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        let info = client.sandbox(&args.sandbox).await?;
        let list = client.processes(&args.sandbox).await?;
        if args.json {
            let mut object = json!(info);
            object["process_list"] = json!(list.processes);
            say!("{object}");
            return Ok(0);
        }
        detailed(&info);
        if !list.processes.is_empty() {
            say!("");
            head();
            list.processes.iter().for_each(show_process);
        }
        Ok(0)
    })
}

fn detailed(info: &SandboxInfo) {
    say!("{} ({})", called(info), info.id);
    say!("  template    {} (build {})", info.template, info.build);
    if let Some(parent) = &info.parent {
        say!("  branch of   {}", short(parent));
    }
    say!("  state       {}", info.state.name());
    if let Some(end) = &info.end {
        say!("  ended       {}, at {}", end.message, end.at);
    }
    say!("  created     {}", info.created);
    if let Some(bytes) = info.disk_bytes {
        say!("  on disk     {}", format_size(bytes));
    }
    if let Some(ms) = info.fork_time_ms {
        say!("  forked in   {ms} ms");
    }
    if info.state != SandboxState::Ended {
        match info.expires_unix_s {
            Some(at) => say!("  ends        in {}", span(at.saturating_sub(now_s()))),
            None => say!("  ends        when it is removed"),
        }
        if let Some(idle) = info.idle_seconds {
            say!(
                "              or when nobody has used it for {}",
                span(idle as u64)
            );
        }
    }
    for key in info.env.keys() {
        say!("  variable    {key}");
    }
}
