//! Templates, for people and for machines.

use crate::out::{complain, say};
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};
use zygote_api::{Removed, TemplateDetail, TemplateInfo};
use zygote_daemon::{template_detail, template_list};
use zygote_template::{Store, format_size};

/// Names in one line of a text.
const LINE_CHARACTERS: usize = 76;

/// What it is, in a line.
pub fn summary(template: &TemplateInfo) -> String {
    let plural = |n: u32| if n == 1 { "" } else { "s" };
    format!(
        "Debian {} with {}; {} of memory, {} vCPU{}, {} replica{}, {} on disk",
        template.base,
        template.packages.join(", "),
        format_size(template.memory_bytes),
        template.vcpus,
        plural(template.vcpus.into()),
        template.replicas,
        plural(template.replicas),
        format_size(template.disk_bytes)
    )
}

/// Lists them; gives back the exit code.
pub fn list(store: &Store, as_json: bool) -> anyhow::Result<u8> {
    let list = template_list(store, None);
    for unusable in &list.unusable {
        complain!("zygote: {}: {}", unusable.template, unusable.error);
    }
    if as_json {
        say!("{}", json!(list));
        return Ok(0);
    }
    if list.templates.is_empty() && list.unusable.is_empty() {
        let folder = store.state_dir().display();
        say!("no templates in {folder} yet; make one with: zygote template build python");
        return Ok(0);
    }
    say!(
        "{:<16} {:>9} {:>5} {:>8} {:>10} {:>10}  {:<16}  KERNEL",
        "NAME",
        "MEMORY",
        "VCPUS",
        "REPLICAS",
        "DISK",
        "BUILT",
        "FROM"
    );
    for template in &list.templates {
        say!(
            "{:<16} {:>9} {:>5} {:>8} {:>10} {:>10}  {:<16}  {}",
            template.template,
            format_size(template.memory_bytes),
            template.vcpus,
            template.replicas,
            format_size(template.disk_bytes),
            ago(template.created_unix_s),
            template.from.as_deref().unwrap_or("-"),
            template.kernel_release
        );
    }
    Ok(0)
}

/// Shows one; gives back the exit code.
pub fn inspect(store: &Store, name: &str, as_json: bool) -> anyhow::Result<u8> {
    let detail = template_detail(store, name, None)?;
    if as_json {
        say!("{}", json!(detail));
    } else {
        detailed(&detail);
    }
    Ok(0)
}

fn detailed(detail: &TemplateDetail) {
    let info = &detail.info;
    say!("{}: {}", info.template, summary(info));
    let recipe = detail.recipe_path.as_deref();
    let recipe = recipe.unwrap_or(match detail.recipe_toml {
        Some(_) if info.from.is_some() => "from the command line",
        Some(_) => "built in",
        None => "not known: built by an earlier version",
    });
    say!(
        "  built       {} ({})",
        info.created,
        ago(info.created_unix_s)
    );
    say!("  recipe      {recipe}");
    if let Some(from) = &info.from {
        say!("  derived     from {from}");
    }
    say!("  kernel      {}", info.kernel_release);
    say!("  interpreter {}", info.interpreter);
    say!("  digest      {}", info.digest);
    detail
        .snapshots
        .iter()
        .for_each(|folder| say!("  snapshot    {folder}"));
    let pip = detail.pip_packages.iter();
    let pip = pip.map(|package| format!("{} {}", package.name, package.version));
    names("Python packages", pip.collect());
    names("files", detail.files.clone());
    let debian = detail.debian_packages.iter();
    let debian = debian.map(|(name, version)| format!("{name} {version}"));
    names("Debian packages", debian.collect());
    if !detail.run.is_empty() {
        lines("commands", &detail.run.join("\n"));
    }
    if !detail.warm.trim().is_empty() {
        lines("run before the snapshot", &detail.warm);
    }
}

fn lines(what: &str, text: &str) {
    say!("  {what}:");
    for line in text.trim().lines() {
        say!("    {line}");
    }
}

/// A list of names, as many in a line as fit.
fn names(what: &str, names: Vec<String>) {
    if names.is_empty() {
        return;
    }
    say!("  {what} ({}):", names.len());
    let mut line = String::new();
    for name in names {
        if !line.is_empty() && line.len() + name.len() > LINE_CHARACTERS {
            say!("    {line}");
            line.clear();
        }
        let comma = if line.is_empty() { "" } else { ", " };
        line.push_str(comma);
        line.push_str(&name);
    }
    say!("    {line}");
}

/// Says what removing one has brought.
pub fn removed(removed: &Removed) {
    let freed = format_size(removed.freed_bytes);
    say!("removed {}: {freed} freed", removed.template);
    if removed.kept_bytes > 0 {
        say!(
            "its root image ({}) stays for other templates or the next build; if none uses it: zygote prune",
            format_size(removed.kept_bytes)
        );
    }
}

fn ago(unix_s: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = now.unwrap_or_default().as_secs().saturating_sub(unix_s);
    match seconds {
        0..120 => "just now".to_owned(),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_the_unit_that_fits() {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert_eq!(ago(now), "just now");
        assert_eq!(ago(now - 600), "10 min ago");
        assert_eq!(ago(now - 3 * 3600), "3 h ago");
        assert_eq!(ago(now - 5 * 86_400), "5 d ago");
        assert_eq!(ago(now + 100), "just now");
    }
}
