//! `zygote branch`.

use super::engine_with;
use crate::args::{BranchArgs, Global, Timeout};
use crate::interrupt::Interrupts;
use crate::out::{complain, say};
use crate::report::die_of;
use serde_json::json;
use zygote_api::BranchRequest;

/// Makes children; gives back the exit code.
pub fn branch(global: &Global, args: &BranchArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let client = engine_with(global, &args.sandbox).await?;
        let request = request(args);
        // What was begun ends with the connection.
        let branched = tokio::select! {
            branched = client.branch(&args.sandbox, &request) => branched?,
            signal = interrupts.after(1) => return Ok(die_of(signal)),
        };
        if !branched.all_frozen {
            complain!("zygote: warning: not all processes of the sandbox had stopped");
        }
        if args.json {
            say!("{}", json!(branched));
        } else {
            branched
                .sandboxes
                .iter()
                .for_each(|info| say!("{}", info.id));
        }
        Ok(0)
    })
}

fn request(args: &BranchArgs) -> BranchRequest {
    let seconds = |limit: Timeout| limit.0.map_or(0.0, |limit| limit.as_secs_f64());
    BranchRequest {
        count: args.count,
        at: args.at.clone(),
        name: args.name.clone(),
        ttl_seconds: args.ttl.map(seconds),
        idle_seconds: args.idle.map(seconds),
        reseed: args.reseed,
        freeze_seconds: seconds(args.freeze_timeout),
        force: args.force,
    }
}
