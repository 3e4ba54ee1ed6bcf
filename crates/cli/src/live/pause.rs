//! `zygote pause` and `zygote resume`.

use super::engine_with;
use crate::args::{Global, NamedArgs, PauseArgs};
use crate::out::say;
use serde_json::json;
use zygote_api::{PauseRequest, SandboxInfo};
use zygote_template::format_size;

/// Puts one on disk; gives back the exit code.
pub fn pause(global: &Global, args: &PauseArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        let request = PauseRequest {
            freeze_seconds: args
                .freeze_timeout
                .0
                .map_or(0.0, |limit| limit.as_secs_f64()),
            force: args.force,
        };
        let info = client.pause(&args.sandbox, request).await?;
        if args.json {
            say!("{}", json!(info));
        } else {
            let size = info.disk_bytes.map_or(String::new(), format_size);
            say!("{size} on disk");
        }
        Ok(0)
    })
}

/// Has one go on; gives back the exit code.
pub fn resume(global: &Global, args: &NamedArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        let info: SandboxInfo = client.resume(&args.sandbox).await?;
        if args.json {
            say!("{}", json!(info));
        }
        Ok(0)
    })
}
