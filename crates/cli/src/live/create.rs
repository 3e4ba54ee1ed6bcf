//! `zygote create`.

use super::cp::put_file;
use crate::args::{CreateArgs, Global};
use crate::engine::Engine;
use crate::interrupt::Interrupts;
use crate::out::{complain, say};
use crate::progress::Reporter;
use crate::report::die_of;
use crate::{host, template};
use serde_json::json;
use std::io::IsTerminal;
use std::path::Path;
use zygote_api::{CreateEvent, MomentPolicy, SandboxInfo, SandboxRequest};
use zygote_daemon::{Client, ClientError};

/// Makes one; gives back the exit code.
pub fn create(global: &Global, args: &CreateArgs) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let missing = template::is_missing(&store, &args.template)?;
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let making = async {
            let engine = Engine::shared(global, &store).await?;
            if missing {
                template::build_missing(engine.client(), &args.template).await?;
            }
            let info = made(engine.client(), args).await?;
            if let Err(error) = fill(engine.client(), &info.id, args).await {
                // One without its files is of no use.
                let _ = engine.client().end_sandbox(&info.id).await;
                return Err(error);
            }
            anyhow::Ok(info)
        };
        // What was begun ends with the connection.
        let info = tokio::select! {
            made = making => made?,
            signal = interrupts.after(1) => return Ok(die_of(signal)),
        };
        if args.json {
            say!("{}", json!(info));
        } else {
            say!("{}", info.id);
        }
        Ok(0)
    })
}

/// Copies files into it.
async fn fill(client: &Client, id: &str, args: &CreateArgs) -> anyhow::Result<()> {
    for copy in &args.copy {
        let target = copy.target.as_deref().unwrap_or(Path::new("."));
        put_file(client, id, &copy.source, target).await?;
    }
    Ok(())
}

fn request(args: &CreateArgs) -> SandboxRequest {
    let seconds = |limit: crate::args::Timeout| limit.0.map_or(0.0, |limit| limit.as_secs_f64());
    SandboxRequest {
        template: args.template.clone(),
        name: args.name.clone(),
        env: args.env.iter().cloned().collect(),
        ttl_seconds: seconds(args.ttl),
        idle_seconds: seconds(args.idle),
        allow_missing_walls: args.allow_missing_walls,
        moments: policy(args),
        ..SandboxRequest::default()
    }
}

/// When moments are kept without being asked for.
fn policy(args: &CreateArgs) -> Option<MomentPolicy> {
    let every = args.moment_every.and_then(|every| every.0);
    if every.is_none() && !args.moment_on_exec {
        return None;
    }
    Some(MomentPolicy {
        keep: args.moments,
        every_seconds: every.map_or(0.0, |every| every.as_secs_f64()),
        on_exec: args.moment_on_exec,
    })
}

async fn made(client: &Client, args: &CreateArgs) -> anyhow::Result<SandboxInfo> {
    let mut events = client.create(&request(args), None).await?;
    let mut reporter = None;
    loop {
        let broken = || ClientError::Broken("it ended without a result".to_owned());
        match events.next().await?.ok_or_else(broken)? {
            CreateEvent::Progress { message } if std::io::stderr().is_terminal() => {
                reporter.get_or_insert_with(Reporter::new).say(&message);
            }
            CreateEvent::Progress { .. } => {}
            CreateEvent::Warning { message } => complain!("zygote: warning: {message}"),
            CreateEvent::Created(info) => return Ok(*info),
            CreateEvent::Error { error } => return Err(error.into()),
        }
    }
}
