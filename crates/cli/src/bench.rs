//! `zygote bench`: what forks cost, measured on this host, or in the lab.

use crate::args::{BenchArgs, BenchVerb, Global, PagesArgs};
use crate::host::{self, Place};
use crate::out::{complain, say};
use crate::{engine, lab, load, settings};
use anyhow::{Context, anyhow};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use zygote_bench::{Census, Cost, Course, Phase, Plan, Report, RunTimes, Samples, Share};
use zygote_engine::{PATIENCE, PATIENCE_EMULATED};
use zygote_protocol::Program;
use zygote_template::{Store, format_size, rehearsal};

const PAGE_BYTES: u64 = 4096;
/// Runs of each kind, and sandboxes that are held, unless the user says how many.
const RUNS: u32 = 200;
const RUNS_EMULATED: u32 = 15;
const HELD: u32 = 100;
const HELD_EMULATED: u32 = 20;

/// Measures; gives back the exit code.
pub fn run(global: &Global, args: &BenchArgs) -> anyhow::Result<u8> {
    if let Some(url) = &args.url {
        return load::run(url, args);
    }
    let store = host::store(global)?;
    if host::choose(global, &store)? == Place::Lab {
        let plots = args.plots.as_deref();
        return lab::again(global, &store, plots);
    }
    match &args.verb {
        Some(BenchVerb::Pages(args)) => pages(&store, args),
        None => times(&store, args),
    }
}

fn times(store: &Store, args: &BenchArgs) -> anyhow::Result<u8> {
    let is_emulated = host::in_lab();
    let or = |given: Option<u32>, here, emulated| {
        given.unwrap_or(if is_emulated { emulated } else { here }) as usize
    };
    let program = std::env::current_exe().context("cannot find this program")?;
    let plan = Plan {
        zygote_command: vec![program.into(), settings::ZYGOTE_VERB.into()],
        template: args.template.clone(),
        runs: or(args.runs, RUNS, RUNS_EMULATED),
        held: or(args.held, HELD, HELD_EMULATED),
        patience: if is_emulated {
            PATIENCE_EMULATED
        } else {
            PATIENCE
        },
        is_emulated,
    };
    let tells = std::io::stderr().is_terminal() || is_emulated;
    let tell = |what: &str| {
        if tells && !args.json {
            complain!("zygote: measuring {what}");
        }
    };
    let runtime = engine::runtime()?;
    let report = runtime.block_on(zygote_bench::measure(store, &plan, &tell))?;
    if let Some(folder) = &args.plots {
        let census = zygote_bench::take(store, &args.template, &rehearsal::python("print(1+1)"));
        draw(folder, &report, census.ok().as_ref())?;
    }
    if args.json {
        say!("{}", serde_json::to_string(&report)?);
    } else {
        show_times(&report);
    }
    Ok(0)
}

fn draw(folder: &Path, report: &Report, census: Option<&Census>) -> anyhow::Result<()> {
    zygote_bench::draw(folder, report, census).map_err(|error| {
        anyhow!(
            "cannot draw into {}: {error}; name another folder with --plots",
            folder.display()
        )
    })
}

/// One unit for all: milliseconds, or in a lab multiples of what python3 takes there.
struct Unit {
    is_emulated: bool,
    python3_ms: Option<f64>,
}

impl Unit {
    fn cell(&self, ms: f64) -> String {
        match (self.is_emulated, self.python3_ms) {
            (false, _) => format!("{ms:>12.3}"),
            (true, Some(python3)) => format!("{:>12.2}", ms / python3),
            (true, None) => format!("{:>12}", "-"),
        }
    }
}

fn show_times(report: &Report) {
    let python3 = report.baselines.python3.as_ref();
    let unit = Unit {
        is_emulated: report.host.kind == "lab",
        python3_ms: python3.map(|samples| samples.p50_ms),
    };
    let host = &report.host;
    say!(
        "{}, {} processors, {} MiB, Linux {}; template {}",
        host.processor,
        host.processors,
        host.memory_mib,
        host.kernel,
        report.template
    );
    if unit.is_emulated {
        say!(
            "An emulated host: its times say nothing about any other. What is shown are ratios: 1 is what\n\
             python3 -c 'print(1+1)' takes on that host itself."
        );
    }
    let name = if unit.is_emulated { "ratio" } else { "ms" };
    say!("\n{:<34}{:>12}{:>12}{:>12}", name, "p50", "p99", "max");
    let line = |name: &str, samples: &Samples| {
        let cells = [samples.p50_ms, samples.p99_ms, samples.max_ms].map(|ms| unit.cell(ms));
        say!("{name:<34}{}", cells.concat());
    };
    let lines = |name: &str, times: &RunTimes| {
        line(&format!("{name}: ready"), &times.ready);
        line(&format!("{name}: first output"), &times.first_output);
        line(&format!("{name}: exit status"), &times.run);
    };
    lines("from the pool", &report.pooled);
    lines("without it", &report.unpooled);
    lines(&format!("{} at once", report.clients), &report.under_load);
    if let Some(samples) = python3 {
        line("python3 -c 'print(1+1)'", samples);
    }
    if let Some(samples) = &report.baselines.warm_fork {
        line("fork(2) of a warm Python", samples);
    }
    let branches = &report.branches;
    line("a sandbox: made", &branches.create);
    line("a branch of one: its source's pause", &branches.pause);
    line("a branch of one: ready", &branches.branch);
    line("back to a moment", &branches.rollback);
    line("to disk", &branches.to_disk);
    line("from disk", &branches.from_disk);
    if !unit.is_emulated {
        say!(
            "{:<34}{:>12.0}",
            format!("runs a second, {} at once", report.clients),
            report.runs_per_second
        );
    }
    if let Some(held) = &report.held {
        say!(
            "\n{:<34}{:>12}{:>12}",
            format!("KiB a sandbox, {} held at once", held.count),
            "its pages",
            "kernel's"
        );
        let line = |name: &str, cost: &Cost| {
            say!("{name:<34}{:>12.0}{:>12.0}", cost.user_kib, cost.kernel_kib);
        };
        line("parked (what is copied ahead too)", &held.parked);
        line("after print(1+1)", &held.after_print);
        if let Some(cost) = &held.after_numpy {
            line("after a numpy product", cost);
        }
        say!("{:<34}{}", "teardown", unit.cell(held.teardown_ms));
    }
}

fn pages(store: &Store, args: &PagesArgs) -> anyhow::Result<u8> {
    let program = if args.command.is_empty() {
        rehearsal::python(&args.code)
    } else {
        let words = args.command.iter().map(|word| word.as_bytes().to_vec());
        Program::Command(words.collect())
    };
    let census = zygote_bench::take(store, &args.template, &program)?;
    if args.json {
        say!("{}", serde_json::to_string(&census)?);
    } else {
        show(&census);
    }
    Ok(0)
}

/// A line an owner, a column a phase.
fn show(census: &Census) {
    let columns = [
        (Phase::Activation, "activation"),
        (Phase::Start, "start"),
        (Phase::Output, "output"),
        (Phase::End, "end"),
    ];
    let line = |name: &str, cells: Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>12}")).collect();
        say!("{name:<32}{}", cells.concat());
    };
    let heads = columns.iter().map(|(_, name)| (*name).to_owned());
    let heads: Vec<String> = heads.chain(["all".to_owned()]).collect();
    line("pages: private of touched", heads);
    for (owner, all) in census.by_owner() {
        let of = |phase| census.phases.get(phase)?.owners.get(&owner);
        let cells = columns.iter().map(|(phase, _)| cell(of(phase)));
        line(&owner, cells.chain([cell(Some(&all))]).collect());
    }
    let courses = columns.iter().map(|(phase, _)| census.phases.get(phase));
    let courses: Vec<&Course> = courses.flatten().collect();
    let mut sum = Share::default();
    for course in &courses {
        sum.private_pages += course.all().private_pages;
        sum.touched_pages += course.all().touched_pages;
    }
    let cells = columns.iter().map(|(phase, _)| {
        let all = census.phases.get(phase).map(Course::all);
        cell(all.as_ref())
    });
    line("all", cells.chain([cell(Some(&sum))]).collect());
    for (name, counter, is_ahead) in [
        ("faults that KVM resolved", "pf_taken", false),
        ("… with pages ahead, as runs have", "pf_taken", true),
        ("exits of the vCPU", "exits", false),
        ("… with pages ahead", "exits", true),
    ] {
        let count = |course: &Course| {
            let counters = if is_ahead {
                &course.kvm_ahead
            } else {
                &course.kvm
            };
            counters.get(counter).copied().unwrap_or_default()
        };
        let of = |phase| census.phases.get(phase).map_or(0, count);
        let counts: Vec<u64> = columns.iter().map(|(phase, _)| of(phase)).collect();
        let sum: u64 = counts.iter().sum();
        let cells = counts.iter().chain([&sum]).map(u64::to_string);
        line(name, cells.collect());
    }
    say!(
        "\n{} private at its end",
        format_size(sum.private_pages * PAGE_BYTES)
    );
}

fn cell(share: Option<&Share>) -> String {
    match share {
        Some(share) if share.touched_pages + share.private_pages > 0 => {
            format!("{}/{}", share.private_pages, share.touched_pages)
        }
        _ => String::new(),
    }
}
