//! The arrows between crates go downwards only, and the licences of what we build on are known.

use crate::command::ask;
use anyhow::{Context, bail};
use serde_json::Value;
use std::process::Command;

/// From the top to the bottom: a crate may depend on those after it.
const ORDER: [&str; 15] = [
    "zygote-cli",
    "zygote-bench",
    "zygote-daemon",
    "zygote-server",
    "zygote-access",
    "zygote-client",
    "zygote-api",
    "zygote-engine",
    "zygote-template",
    "zygote-runner",
    "zygote-vmm",
    "zygote-snapshot",
    "zygote-protocol",
    "zygote-debian",
    "zygote-jail",
];

/// Crates beside the order, with all that they may see of ours.
const BESIDE: [(&str, &[&str]); 3] = [
    ("zygote-agent", &["zygote-protocol"]),
    ("zygote-lab", &["zygote-debian"]),
    ("xtask", &["zygote-lab"]),
];

/// `(crate, what it must never see, why)`.
const FORBIDDEN: [(&str, &str, &str); 9] = [
    ("zygote-api", "tokio", "types do no I/O"),
    ("zygote-engine", "axum", "the engine never sees HTTP"),
    ("zygote-vmm", "tokio", "a machine's threads are its own"),
    ("zygote-vmm", "axum", "a machine never sees HTTP"),
    (
        "zygote-runner",
        "tokio",
        "a process that forks has one thread",
    ),
    (
        "zygote-snapshot",
        "kvm-ioctls",
        "the format outlives the hypervisor",
    ),
    (
        "zygote-snapshot",
        "kvm-bindings",
        "persisted types are nobody's runtime types",
    ),
    (
        "zygote-engine",
        "kvm-ioctls",
        "the engine has no access to KVM",
    ),
    ("zygote-protocol", "rustix", "the protocol does no I/O"),
];

const LICENCES: [&str; 14] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    "0BSD",
];

/// Checks the arrows of the real workspace.
pub fn check() -> anyhow::Result<()> {
    let metadata = metadata(&["--no-deps"])?;
    let broken = broken_arrows(&arrows(&metadata));
    if !broken.is_empty() {
        bail!("arrows that must not be:\n{}", broken.join("\n"));
    }
    Ok(())
}

fn metadata(extra: &[&str]) -> anyhow::Result<Value> {
    let mut command = Command::new("cargo");
    command.args(["metadata", "--format-version", "1"]);
    let output = ask(command.args(extra))?;
    if !output.status.success() {
        bail!("cargo metadata: {}", output.status);
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")
}

/// `(from, to)` for each normal or build dependency of a crate of ours.
fn arrows(metadata: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut arrows = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if dependency["kind"] != "dev" {
                arrows.push((text(&package["name"]), text(&dependency["name"])));
            }
        }
    }
    arrows
}

fn broken_arrows(arrows: &[(String, String)]) -> Vec<String> {
    let position = |name: &str| ORDER.iter().position(|crate_name| *crate_name == name);
    let ours = |name: &str| name.starts_with("zygote-");
    let mut broken = Vec::new();
    for (from, to) in arrows {
        for (_, _, why) in FORBIDDEN.iter().filter(|(f, t, _)| f == from && t == to) {
            broken.push(format!("{from} -> {to}: {why}"));
        }
        // The system tests may see whatever they test; nobody may see them.
        if !ours(to) || from == "zygote-tests" {
            continue;
        }
        let beside = BESIDE.iter().find(|(name, _)| name == from);
        let allowed = match (beside, position(from), position(to)) {
            (Some((_, sees)), _, _) => sees.contains(&to.as_str()),
            (None, Some(above), Some(below)) => above < below,
            // The command line, and the daemon, which keeps one.
            (None, Some(0 | 2), None) => to == "zygote-lab",
            _ => false,
        };
        if !allowed {
            broken.push(format!("{from} -> {to}: arrows go only downwards"));
        }
    }
    broken
}

/// Checks that every dependency offers a licence that we accept.
pub fn check_licences() -> anyhow::Result<()> {
    let metadata = metadata(&[])?;
    let mut refused = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let licence = package["license"].as_str().unwrap_or_default();
        if !acceptable(licence) {
            refused.push(format!(
                "{} {}: {licence:?}",
                package["name"], package["version"]
            ));
        }
    }
    if !refused.is_empty() {
        bail!("licences that are not on the list:\n{}", refused.join("\n"));
    }
    Ok(())
}

/// An SPDX expression: one alternative of every conjunct must be known.
fn acceptable(expression: &str) -> bool {
    let flat = expression.replace(['(', ')'], "").replace('/', " OR ");
    !flat.trim().is_empty()
        && flat.split(" AND ").all(|part| {
            part.split(" OR ")
                .any(|licence| LICENCES.contains(&licence.trim()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(from: &str, to: &str) -> bool {
        broken_arrows(&[(from.to_owned(), to.to_owned())]).is_empty()
    }

    #[test]
    fn an_arrow_upwards_is_found() {
        assert!(judge("zygote-engine", "zygote-runner"));
        assert!(!judge("zygote-runner", "zygote-engine"));
        assert!(!judge("zygote-vmm", "zygote-lab"));
    }

    #[test]
    fn the_agent_sees_only_the_protocol() {
        assert!(judge("zygote-agent", "zygote-protocol"));
        assert!(!judge("zygote-agent", "zygote-snapshot"));
    }

    #[test]
    fn the_machine_never_sees_an_async_runtime() {
        assert!(!judge("zygote-vmm", "tokio"));
        assert!(judge("zygote-engine", "tokio"));
    }

    #[test]
    fn a_licence_counts_only_if_each_part_is_known() {
        assert!(acceptable("MIT OR Apache-2.0"));
        assert!(acceptable("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(acceptable("GPL-3.0 OR MIT"));
        assert!(!acceptable("MIT AND GPL-3.0"));
        assert!(!acceptable(""));
    }
}
