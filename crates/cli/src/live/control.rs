//! `zygote kill`, `zygote rm` and `zygote wait`.

use super::tree::family;
use super::{all, called, engine_there, engine_with};
use crate::args::{Global, KillArgs, RmArgs, WaitArgs};
use crate::failure;
use crate::interrupt::Interrupts;
use crate::out::{complain, say};
use crate::report::{FAILED, die_of};
use serde_json::{Value, json};
use zygote_api::{Failure, ProcessSignal, SandboxState};
use zygote_daemon::Client;

/// Sends a signal; gives back the exit code.
pub fn kill(global: &Global, args: &KillArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        let targets = match args.process {
            Some(process) => vec![process],
            None => running(&client, &args.sandbox).await?,
        };
        let signal = ProcessSignal {
            signal: args.signal,
            only_process: args.only_process,
        };
        let mut sent = Vec::new();
        for process in targets {
            let done = client.signal_process(&args.sandbox, process, signal).await;
            // One of several may have ended meanwhile.
            if args.process.is_some() {
                done?;
            } else if done.is_err() {
                continue;
            }
            sent.push(process);
        }
        if args.json {
            say!("{}", json!({"signal": args.signal, "processes": sent}));
        }
        Ok(0)
    })
}

async fn running(client: &Client, sandbox: &str) -> anyhow::Result<Vec<u32>> {
    let list = client.processes(sandbox).await?.processes;
    let running = list.iter().filter(|info| info.state == "running");
    Ok(running.map(|info| info.process).collect())
}

/// Ends sandboxes; gives back the exit code: what cannot be ended does not keep the others.
pub fn rm(global: &Global, args: &RmArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let Some(client) = engine_there(global).await? else {
            return match args.sandboxes.first() {
                Some(sandbox) => engine_with(global, sandbox).await.map(|_| 0),
                None => Ok(told(&[], &[], args.json)),
            };
        };
        let named = if args.all {
            let all = all(&client, None).await?;
            all.into_iter().map(|info| info.id).collect()
        } else if args.tree {
            let mut families = Vec::new();
            for sandbox in &args.sandboxes {
                families.extend(family(&client, sandbox).await?);
            }
            families
        } else {
            args.sandboxes.clone()
        };
        let (mut removed, mut failed) = (Vec::new(), Vec::new());
        for sandbox in named {
            match client.end_sandbox(&sandbox).await {
                Ok(info) => removed.push(info),
                Err(error) => failed.push((sandbox, error.to_failure())),
            }
        }
        // One that cannot be ended is the whole answer.
        if let ([], [(_, failure)]) = (&removed[..], &failed[..]) {
            return Err(failure.clone().into());
        }
        let names: Vec<String> = removed.iter().map(called).collect();
        Ok(told(&names, &failed, args.json))
    })
}

fn told(removed: &[String], failed: &[(String, Failure)], as_json: bool) -> u8 {
    if as_json {
        let failed: Vec<Value> = failed
            .iter()
            .map(|(sandbox, error)| json!({"sandbox": sandbox, "error": error}))
            .collect();
        say!("{}", json!({"removed": removed, "failed": failed}));
    } else {
        removed.iter().for_each(|name| say!("{name}"));
    }
    for (sandbox, failure) in failed {
        complain!("zygote: {sandbox}: {failure}");
    }
    if failed.is_empty() { 0 } else { FAILED }
}

/// Waits for an end; gives back the exit code.
pub fn wait(global: &Global, args: &WaitArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let client = engine_with(global, &args.sandbox).await?;
        tokio::select! {
            code = waited(&client, args) => code,
            signal = interrupts.after(1) => Ok(die_of(signal)),
        }
    })
}

async fn waited(client: &Client, args: &WaitArgs) -> anyhow::Result<u8> {
    let Some(process) = args.process else {
        let info = client.wait_sandbox(&args.sandbox).await?;
        if args.json {
            say!("{}", json!(info));
        } else if let Some(end) = &info.end {
            say!("{}", end.reason);
        }
        return Ok(0);
    };
    let info = client.wait_process(&args.sandbox, process).await?;
    let Some(result) = &info.result else {
        let sandbox = client.sandbox(&args.sandbox).await?;
        debug_assert_eq!(sandbox.state, SandboxState::Ended);
        let why = sandbox.end.map(|end| end.message).unwrap_or_default();
        return Err(failure::ended(&why).into());
    };
    if args.json {
        say!("{}", json!(info));
    }
    if let Some(error) = &result.error {
        complain!("zygote: {error}");
    }
    Ok(result.exit_code)
}
