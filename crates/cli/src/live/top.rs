//! `zygote stats` and `zygote top`.

use super::{all, called, engine_there, engine_with};
use crate::args::{Global, StatsArgs};
use crate::interrupt::Interrupts;
use crate::out::say;
use crate::report::die_of;
use serde_json::json;
use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};
use zygote_api::SandboxStats;
use zygote_daemon::Client;
use zygote_template::format_size;

/// How often `top` looks.
const EVERY: Duration = Duration::from_secs(2);
/// Clears the screen, from its first line on (ECMA-48: CUP, ED).
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

/// Shows what sandboxes take; gives back the exit code.
pub fn stats(global: &Global, args: &StatsArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let Some(sandbox) = &args.sandbox else {
            let all = measured(global).await?;
            if args.json {
                say!("{}", json!({ "sandboxes": all }));
            } else {
                table(&all, &HashMap::new());
            }
            return Ok(0);
        };
        let client = engine_with(global, sandbox).await?;
        let stats = client.sandbox_stats(sandbox).await?;
        if args.json {
            say!("{}", json!(stats));
        } else {
            table(&[stats], &HashMap::new());
        }
        Ok(0)
    })
}

async fn measured(global: &Global) -> anyhow::Result<Vec<SandboxStats>> {
    match engine_there(global).await? {
        Some(client) => measure(&client).await,
        None => Ok(Vec::new()),
    }
}

async fn measure(client: &Client) -> anyhow::Result<Vec<SandboxStats>> {
    let mut measured = Vec::new();
    for info in all(client, None).await? {
        // One that has ended meanwhile is left out.
        if let Ok(stats) = client.sandbox_stats(&info.id).await {
            let name = Some(called(&info));
            measured.push(SandboxStats { name, ..stats });
        }
    }
    Ok(measured)
}

fn table(all: &[SandboxStats], loads: &HashMap<String, f64>) {
    say!(
        "{:<16} {:>10} {:>12} {:>9} {:>6} {:>9}",
        "SANDBOX",
        "PRIVATE",
        "PAGE TABLES",
        "CPU TIME",
        "CPU %",
        "PROCESSES"
    );
    for stats in all {
        let load = loads.get(&stats.id).map(|load| format!("{load:.0}"));
        say!(
            "{:<16} {:>10} {:>12} {:>8.1}s {:>6} {:>9}",
            stats.name.as_deref().unwrap_or(&super::short(&stats.id)),
            format_size(stats.memory_private_kib << 10),
            format_size(stats.page_tables_kib << 10),
            stats.cpu_seconds,
            load.as_deref().unwrap_or("-"),
            stats.processes
        );
    }
}

/// Shows it over and over; gives back the exit code. Once, where nobody looks.
pub fn top(global: &Global) -> anyhow::Result<u8> {
    super::block_on(async {
        let interrupts = Interrupts::listen()?;
        let is_seen = io::stdout().is_terminal();
        let showing = async {
            let mut before: HashMap<String, f64> = HashMap::new();
            let mut looked: Option<Instant> = None;
            loop {
                let mut all = measured(global).await?;
                let since = looked.replace(Instant::now());
                let since = since.map_or(EVERY, |at| at.elapsed()).as_secs_f64();
                let load = |stats: &SandboxStats| {
                    let known = before.get(&stats.id)?;
                    Some((stats.cpu_seconds - known) / since * 100.0)
                };
                let loads: HashMap<String, f64> = all
                    .iter()
                    .filter_map(|stats| Some((stats.id.clone(), load(stats)?)))
                    .collect();
                all.sort_by(|a, b| {
                    let of = |stats: &SandboxStats| loads.get(&stats.id).copied().unwrap_or(0.0);
                    of(b)
                        .total_cmp(&of(a))
                        .then(b.memory_private_kib.cmp(&a.memory_private_kib))
                });
                if is_seen {
                    print!("{CLEAR}");
                }
                table(&all, &loads);
                if !is_seen {
                    return anyhow::Ok(0);
                }
                before = all
                    .into_iter()
                    .map(|stats| (stats.id, stats.cpu_seconds))
                    .collect();
                tokio::time::sleep(EVERY).await;
            }
        };
        tokio::select! {
            code = showing => code,
            signal = interrupts.after(1) => Ok(die_of(signal)),
        }
    })
}
