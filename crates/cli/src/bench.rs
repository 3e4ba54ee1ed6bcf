//! `zygote bench`: what forks cost, measured on this host, or in the lab.

use crate::args::{BenchVerb, Global, PagesArgs};
use crate::host::{self, Place};
use crate::lab;
use crate::out::say;
use std::os::unix::ffi::OsStrExt;
use zygote_bench::{Census, Course, Phase, Share};
use zygote_protocol::Program;
use zygote_template::{Store, format_size, rehearsal};

const PAGE_BYTES: u64 = 4096;

/// Measures; gives back the exit code.
pub fn run(global: &Global, verb: &BenchVerb) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    if host::choose(global, &store)? == Place::Lab {
        return lab::again(global, &store);
    }
    match verb {
        BenchVerb::Pages(args) => pages(&store, args),
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
    for (name, counter) in [
        ("faults that KVM resolved", "pf_taken"),
        ("exits of the vCPU", "exits"),
    ] {
        let count = |course: &Course| course.kvm.get(counter).copied().unwrap_or_default();
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
