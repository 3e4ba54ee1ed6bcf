//! The gate that noise cannot touch: instructions, pages and faults of a run, counted on an emulated host
//! whose clock counts instructions, against those of the last accepted state.

use crate::command::{finish, start};
use crate::system::{STATE, zygote};
use anyhow::{Context, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// What has been accepted.
const ACCEPTED: &str = "tests/gate.json";
/// What the lab has counted last.
const COUNTED: &str = "target/system/gate.json";
/// Builds of the template: where its pages lie differs from one to the next, so the least counts.
const BUILDS: usize = 3;
/// So much worse is an error.
const WORSE_MAX: f64 = 0.03;
/// Below this it is not shares that count, but how many more there are.
const SMALL: u64 = 100;
const MORE_MAX: u64 = 30;
/// A lab and three builds, on the slowest machine seen.
const GATE_MAX: Duration = Duration::from_secs(15 * 60);

/// Counts by name.
type Counts = BTreeMap<String, u64>;

/// Counts, and compares with what has been accepted; or accepts what is counted.
pub fn run(accept: bool) -> anyhow::Result<()> {
    fs::create_dir_all(STATE).context("cannot make the state directory of the tests")?;
    let mut counted = count().or_else(|error| {
        // The emulator's bad days are not what is counted.
        eprintln!("xtask: {error:#}; counting again");
        count()
    })?;
    if accept {
        counted.retain(|name, _| is_judged(name));
    }
    let text = serde_json::to_string_pretty(&counted)? + "\n";
    fs::write(COUNTED, &text).with_context(|| format!("cannot write {COUNTED}"))?;
    if accept {
        fs::write(ACCEPTED, text).with_context(|| format!("cannot write {ACCEPTED}"))?;
        eprintln!("xtask: accepted; commit {ACCEPTED} with why");
        return Ok(());
    }
    let accepted = fs::read(ACCEPTED).with_context(|| format!("cannot read {ACCEPTED}"))?;
    let accepted: Counts =
        serde_json::from_slice(&accepted).with_context(|| format!("{ACCEPTED} makes no sense"))?;
    let mut worse = judge(&accepted, &counted);
    if !worse.is_empty() {
        eprintln!("xtask: {}; counting once more", worse.join("; "));
        merge(&mut counted, count()?);
        worse = judge(&accepted, &counted);
    }
    for (name, count) in &counted {
        let was = accepted.get(name).map_or("-".to_owned(), u64::to_string);
        eprintln!("xtask: {name:<44}{count:>14}  accepted {was:>14}");
    }
    if !worse.is_empty() {
        bail!(
            "over {:.0} % worse than {ACCEPTED}:\n{}\nmend it, or accept it: cargo xtask bench --gate \
             --accept",
            WORSE_MAX * 100.0,
            worse.join("\n")
        );
    }
    Ok(())
}

/// Whether more of it fails. Not what a pooled run takes in instructions: a million, a tenth of which
/// depends on whom the scheduler lets go first.
fn is_judged(name: &str) -> bool {
    !name.starts_with("instructions, pooled")
}

/// The least of each.
fn merge(counts: &mut Counts, others: impl IntoIterator<Item = (String, u64)>) {
    for (name, count) in others {
        let slot = counts.entry(name).or_insert(count);
        *slot = count.min(*slot);
    }
}

/// What is over the bound, or was not counted.
fn judge(accepted: &Counts, counted: &Counts) -> Vec<String> {
    let verdict = |(name, was): (&String, &u64)| {
        let Some(now) = counted.get(name) else {
            return Some(format!("{name}: not counted"));
        };
        let bound = if *was < SMALL {
            (was + MORE_MAX) as f64
        } else {
            *was as f64 * (1.0 + WORSE_MAX)
        };
        (*now as f64 > bound).then(|| format!("{name}: {now}, accepted {was}"))
    };
    accepted.iter().filter_map(verdict).collect()
}

/// In one lab: builds the template and measures it, several times; the least of each count.
fn count() -> anyhow::Result<Counts> {
    let program = Path::new("target/release/zygote").canonicalize();
    let program = program.context("build first: cargo xtask build")?;
    let program = program.display();
    let once = format!(
        "{program} template build python --force --no-daemon >&2 && \
         {program} bench --runs 7 --held 0 --json && {program} bench pages --json && \
         {program} bench pages --json -- true"
    );
    let all = vec![once; BUILDS].join(" && ");
    let log = Path::new("target/system/gate.log");
    fs::create_dir_all("target/system")?;
    let mut command = zygote()?;
    command
        .args([
            "lab",
            "--fresh",
            "--icount",
            "--throw-away",
            "--",
            "sh",
            "-c",
            &all,
        ])
        .env("ZYGOTE_NO_DAEMON", "1")
        .stdout(Stdio::from(
            File::create(log).context("cannot write the gate's log")?,
        ));
    let child = start(&mut command)?;
    let status = finish(child, &command, GATE_MAX)?;
    if !status.success() {
        bail!("counting failed ({status}); its output: {}", log.display());
    }
    let text = fs::read_to_string(log)?;
    let values: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
    let values = values.context("the benches printed no JSON")?;
    let mut least = Counts::default();
    for three in values.chunks_exact(3) {
        merge(&mut least, counts(&three[0], &three[1], &three[2]));
    }
    Ok(least)
}

/// From the reports of `bench`, and of `bench pages` for Python and for a command.
fn counts(times: &Value, python: &Value, command: &Value) -> Vec<(String, u64)> {
    let mut counts = Vec::new();
    for source in ["pooled", "unpooled"] {
        for what in ["ready", "first_output", "run"] {
            // One nanosecond of that clock is one instruction.
            let ms = times[source][what]["min_ms"].as_f64().unwrap_or_default();
            let name = format!("instructions, {source}: {what}");
            counts.push((name, (ms * 1e6) as u64));
        }
    }
    for (name, census) in [("print(1+1)", python), ("true", command)] {
        let phases = census["phases"].as_object().into_iter().flatten();
        let (mut private, mut faults) = (0, 0);
        for (_, course) in phases {
            let owners = course["owners"].as_object().into_iter().flatten();
            private += owners
                .filter_map(|(_, share)| share["private_pages"].as_u64())
                .sum::<u64>();
            faults += course["kvm_ahead"]["pf_taken"].as_u64().unwrap_or_default();
        }
        counts.push((format!("private pages, {name}"), private));
        counts.push((format!("faults with pages ahead, {name}"), faults));
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(pairs: &[(&str, u64)]) -> Counts {
        let pairs = pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        pairs.collect()
    }

    #[test]
    fn three_of_a_hundred_are_let_through_and_no_more() {
        let accepted = of(&[
            ("pages", 100),
            ("gone", 1),
            ("better", 100),
            ("few", 3),
            ("some", 3),
        ]);
        let counted = of(&[
            ("pages", 104),
            ("better", 50),
            ("new", 7),
            ("few", 33),
            ("some", 34),
        ]);
        let worse = judge(&accepted, &counted);
        let expected = [
            "gone: not counted",
            "pages: 104, accepted 100",
            "some: 34, accepted 3",
        ];
        assert_eq!(worse, expected);
        assert!(judge(&of(&[("pages", 100)]), &of(&[("pages", 103)])).is_empty());
    }

    #[test]
    fn the_least_of_each_counts_and_chance_is_not_judged() {
        let mut counts = of(&[("a", 3), ("b", 1)]);
        merge(&mut counts, of(&[("a", 2), ("b", 5), ("c", 4)]));
        assert_eq!(counts, of(&[("a", 2), ("b", 1), ("c", 4)]));
        assert!(is_judged("instructions, unpooled: run") && is_judged("private pages, true"));
        assert!(!is_judged("instructions, pooled: run"));
    }

    #[test]
    fn counts_are_taken_from_the_reports() {
        let samples = json!({"ready": {"min_ms": 0.5}, "first_output": {"min_ms": 1.0}, "run": {"min_ms": 2.0}});
        let times = json!({"pooled": samples, "unpooled": samples});
        let census = json!({"phases": {
            "start": {"owners": {"slab": {"private_pages": 3}, "agent": {"private_pages": 4}}, "kvm_ahead": {"pf_taken": 9}},
            "end": {"owners": {}, "kvm_ahead": {}},
        }});
        let counts: Counts = counts(&times, &census, &census).into_iter().collect();
        assert_eq!(counts["instructions, pooled: run"], 2_000_000);
        assert_eq!(counts["private pages, true"], 7);
        assert_eq!(counts["faults with pages ahead, print(1+1)"], 9);
    }
}
