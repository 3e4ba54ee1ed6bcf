//! `zygote snapshot`, `zygote rollback` and `zygote moments`.

use super::{engine_with, now_s, span};
use crate::args::{Global, MomentsArgs, RollbackArgs, SnapshotArgs};
use crate::out::say;
use serde_json::json;
use zygote_api::{MomentInfo, MomentRequest, PublishRequest, RollbackRequest};
use zygote_template::format_size;

/// Keeps a moment, or makes a template of it; gives back the exit code.
pub fn snapshot(global: &Global, args: &SnapshotArgs) -> anyhow::Result<u8> {
    let limit = args.freeze_timeout.0;
    let freeze_seconds = limit.map_or(0.0, |limit| limit.as_secs_f64());
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        if let (true, Some(template)) = (args.template, args.name.clone()) {
            let request = PublishRequest {
                template,
                at: args.at.clone(),
                freeze_seconds,
                force: args.force,
            };
            let built = client.publish(&args.sandbox, &request).await?;
            if args.json {
                say!("{}", json!(built));
            } else {
                let size = format_size(built.info.disk_bytes);
                say!("{}: a template ({size} on disk)", built.info.template);
            }
            return Ok(0);
        }
        let request = MomentRequest {
            name: args.name.clone(),
            freeze_seconds,
            force: args.force,
        };
        let kept = client.keep_moment(&args.sandbox, &request).await?;
        if args.json {
            say!("{}", json!(kept));
        } else {
            say!("{}", called(&kept));
        }
        Ok(0)
    })
}

/// Goes back to one; gives back the exit code.
pub fn rollback(global: &Global, args: &RollbackArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        let request = RollbackRequest {
            to: args.moment.clone(),
            reseed: args.reseed,
        };
        let info = client.roll_back(&args.sandbox, &request).await?;
        if args.json {
            say!("{}", json!(info));
        }
        Ok(0)
    })
}

/// Shows them, or lets one go; gives back the exit code.
pub fn moments(global: &Global, args: &MomentsArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = engine_with(global, &args.sandbox).await?;
        let list = match &args.forget {
            Some(moment) => client.forget_moment(&args.sandbox, moment).await?,
            None => client.moments(&args.sandbox).await?,
        };
        if args.json {
            say!("{}", json!(list));
        } else if args.forget.is_some() {
        } else if list.moments.is_empty() {
            let sandbox = &args.sandbox;
            say!("no moments are kept; keep one with: zygote snapshot {sandbox}");
        } else {
            say!(
                "{:<6} {:<16} {:>8} {:>10} {:>10}",
                "MOMENT",
                "NAME",
                "AGE",
                "PAUSE",
                "OWN"
            );
            list.moments.iter().for_each(show);
        }
        Ok(0)
    })
}

fn called(moment: &MomentInfo) -> String {
    let number = || format!("@{}", moment.number);
    moment.name.clone().unwrap_or_else(number)
}

fn show(moment: &MomentInfo) {
    say!(
        "{:<6} {:<16} {:>8} {:>10} {:>10}",
        format!("@{}", moment.number),
        moment.name.as_deref().unwrap_or("-"),
        span(now_s().saturating_sub(moment.at_unix_s)),
        format!("{:.1} ms", f64::from(moment.pause_us) / 1000.0),
        moment
            .memory_private_kib
            .map_or("-".to_owned(), |kib| format_size(kib << 10)),
    );
}
