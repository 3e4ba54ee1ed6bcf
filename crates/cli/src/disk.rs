//! `zygote df` and `zygote prune`: what is on disk, and getting back what nothing needs.

use crate::args::{Global, PruneArgs};
use crate::host;
use crate::out::say;
use serde_json::json;
use zygote_template::{DiskPart, Prune, format_size};

/// Shows what is on disk; gives back the exit code.
pub fn df(global: &Global, as_json: bool) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let parts = store.usage();
    let sum = |of: fn(&DiskPart) -> u64| parts.iter().map(of).sum::<u64>();
    let (bytes, reclaimable) = (sum(|part| part.bytes), sum(|part| part.reclaimable_bytes));
    if as_json {
        let parts: Vec<_> = parts
            .iter()
            .map(|part| {
                json!({"what": part.what, "bytes": part.bytes,
                       "reclaimable_bytes": part.reclaimable_bytes})
            })
            .collect();
        say!(
            "{}",
            json!({"state_dir": store.state_dir(), "parts": parts, "bytes": bytes,
                   "reclaimable_bytes": reclaimable})
        );
        return Ok(0);
    }
    say!("{:<24} {:>10} {:>12}", "WHAT", "SIZE", "RECLAIMABLE");
    let row = |what: &str, bytes, reclaimable| {
        say!(
            "{what:<24} {:>10} {:>12}",
            format_size(bytes),
            format_size(reclaimable)
        );
    };
    for part in &parts {
        row(&part.what, part.bytes, part.reclaimable_bytes);
    }
    row("all", bytes, reclaimable);
    say!(
        "in {}; to get back what is reclaimable: zygote prune",
        store.state_dir().display()
    );
    Ok(0)
}

/// Removes what nothing needs; gives back the exit code.
pub fn prune(global: &Global, args: &PruneArgs) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let pruned = store.prune(Prune {
        all: args.all,
        dry_run: args.dry_run,
    })?;
    if args.json {
        say!(
            "{}",
            json!({"removed": !args.dry_run, "paths": pruned.paths, "freed_bytes": pruned.bytes})
        );
        return Ok(0);
    }
    for path in &pruned.paths {
        say!("{}", path.display());
    }
    let size = format_size(pruned.bytes);
    match (pruned.paths.is_empty(), args.dry_run) {
        (true, _) => say!("there is nothing to remove"),
        (false, true) => say!(
            "{size} would be freed; to free it: zygote prune{}",
            if args.all { " --all" } else { "" }
        ),
        (false, false) => say!("{size} freed"),
    }
    Ok(0)
}
