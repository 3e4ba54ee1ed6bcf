//! `zygote doctor`: what this host can do, measured, and how to fix what it can't.

use crate::args::Global;
use crate::host;
use crate::out::say;
use serde::Serialize;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use zygote_engine::walls_remedy;
use zygote_jail::{MissingWall, Role, cgroup};
use zygote_template::{Store, format_size};
use zygote_vmm::probe::probe;

/// Free space that a template's build needs.
const DISK_MIN_BYTES: u64 = 2 << 30;
/// Memory that the lab takes.
const MEMORY_MIN_BYTES: u64 = 7 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Grade {
    #[serde(rename = "ok")]
    Good,
    #[serde(rename = "note")]
    Warning,
    #[serde(rename = "no")]
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    grade: Grade,
    finding: String,
    remedy: Option<String>,
}

fn check(name: &'static str, grade: Grade, finding: String, remedy: Option<&str>) -> Check {
    Check {
        name,
        grade,
        finding,
        remedy: remedy.map(str::to_owned),
    }
}

/// Shows the checks; 0 if runs are possible somehow.
pub fn run(global: &Global, json: bool) -> anyhow::Result<u8> {
    let store = host::store(global)?;
    let kvm = kvm_checks();
    let here = kvm.iter().all(|check| check.grade != Grade::Bad);
    let lab = tool("lab: QEMU", "qemu-system-x86_64", "qemu-system-x86");
    let possible = here || lab.grade == Grade::Good;
    let place = if here { "kvm" } else { "lab" };
    let mut checks = kvm;
    checks.push(lab);
    checks.push(file("lab: busybox", "/bin/busybox", "busybox-static"));
    checks.push(tool("build: mmdebstrap", "mmdebstrap", "mmdebstrap"));
    checks.push(tool("build: EROFS", "mkfs.erofs", "erofs-utils"));
    checks.push(tool("build: pip", "pip3", "python3-pip"));
    let builds = user_ids();
    let can_build = builds.grade == Grade::Good;
    checks.push(builds);
    checks.push(agent());
    checks.push(memory(here));
    checks.push(overcommit());
    checks.push(disk(&store));
    checks.push(jail(here));
    checks.push(cgroups());
    checks.push(limits());
    checks.push(templates(&store, can_build));
    if json {
        let host = possible.then_some(place);
        say!("{}", serde_json::json!({"host": host, "checks": checks}));
    } else {
        show(&checks, possible, place);
    }
    Ok(u8::from(!possible))
}

fn show(checks: &[Check], possible: bool, place: &str) {
    for check in checks {
        let mark = match check.grade {
            Grade::Good => "ok  ",
            Grade::Warning => "note",
            Grade::Bad => "no  ",
        };
        say!("{mark}  {:<18} {}", check.name, check.finding);
        if let Some(remedy) = &check.remedy {
            say!("      {:<18} -> {remedy}", "");
        }
    }
    say!("");
    match (possible, place) {
        (true, "kvm") => say!("Machines run on this host's KVM."),
        (true, _) => say!(
            "Machines run in the lab, an emulated host: everything works, about a hundred times slower."
        ),
        (false, _) => say!("Machines cannot run here yet: see the lines marked `no`."),
    }
}

fn kvm_checks() -> Vec<Check> {
    let probe = probe();
    let mut checks: Vec<Check> = probe
        .problems
        .iter()
        .map(|problem| {
            check(
                "KVM",
                Grade::Bad,
                problem.cause.clone(),
                Some(&problem.remedy),
            )
        })
        .collect();
    if probe.usable {
        let mips = probe.mips.unwrap_or(0.0);
        let finding = format!("kernel mode runs at {mips:.0} million instructions a second");
        checks.push(check("KVM", Grade::Good, finding, None));
    }
    checks
}

fn tool(name: &'static str, program: &str, package: &str) -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders
        .map(|folder| folder.join(program))
        .find(|path| path.is_file());
    presence(name, found.as_deref(), package)
}

fn file(name: &'static str, path: &str, package: &str) -> Check {
    let path = Path::new(path);
    presence(name, path.is_file().then_some(path), package)
}

fn presence(name: &'static str, found: Option<&Path>, package: &str) -> Check {
    match found {
        Some(path) => check(name, Grade::Good, path.display().to_string(), None),
        None => {
            let remedy = format!("sudo apt-get install {package}");
            check(name, Grade::Warning, "not installed".into(), Some(&remedy))
        }
    }
}

fn user_ids() -> Check {
    let name = "build: user ids";
    if zygote_template::has_user_ids() {
        return check(name, Grade::Good, "files can get any owner".into(), None);
    }
    let remedy = "sudo apt-get install -y uidmap && sudo usermod --add-subuids 100000-165535 \
                  --add-subgids 100000-165535 $USER";
    let finding = "only your own: templates can't be built by you".into();
    check(name, Grade::Warning, finding, Some(remedy))
}

fn memory(here: bool) -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    let finding = format!("{} available", format_size(kib << 10));
    if here || kib << 10 >= MEMORY_MIN_BYTES {
        check("memory", Grade::Good, finding, None)
    } else {
        check(
            "memory",
            Grade::Warning,
            finding,
            Some("the lab takes up to 6 GiB; free some"),
        )
    }
}

/// Strict accounting of memory charges each fork with its whole guest (proc_sys_vm(5)).
fn overcommit() -> Check {
    let mode = fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    if mode.trim() != "2" {
        let finding = "forks are charged with the pages that they change".into();
        return check("overcommit", Grade::Good, finding, None);
    }
    let finding = "strict: each fork is charged with its guest's whole memory, and few will fit";
    let remedy = "sudo sysctl vm.overcommit_memory=0";
    check("overcommit", Grade::Warning, finding.into(), Some(remedy))
}

fn disk(store: &Store) -> Check {
    let state = store.state_dir();
    let existing = state
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let free = rustix::fs::statvfs(existing).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    let finding = format!("{} free for {}", format_size(free), state.display());
    if free >= DISK_MIN_BYTES {
        check("disk", Grade::Good, finding, None)
    } else {
        let remedy = "a template takes up to 2 GiB while it is built; choose another --state-dir";
        check("disk", Grade::Warning, finding, Some(remedy))
    }
}

/// Entering the jail takes milliseconds.
const JAIL_PROBE_MAX_S: &str = "20";
/// Hidden verb by which this program tries the jail, which is for good, in a process of its own.
pub const JAIL_VERB: &str = "jail-probe";

/// Enters the jail; prints the walls that are missing as one JSON array.
pub fn show_jail() -> ExitCode {
    let mut missing = match zygote_jail::enter(1 << 40) {
        Ok(report) => report.missing,
        Err(error) => {
            say!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let filter = |role| zygote_jail::Filter::new(role).install();
    if let Err(error) = filter(Role::Zygote).and_then(|()| filter(Role::Runner)) {
        let why = error.source().map_or(String::new(), ToString::to_string);
        missing.push(MissingWall::new(zygote_jail::FILTER, &why));
    }
    let told = missing.iter().map(|MissingWall { wall, why, is_main }| {
        serde_json::json!({"wall": wall, "why": why, "is_main": is_main})
    });
    say!("{}", serde_json::Value::from_iter(told));
    ExitCode::SUCCESS
}

/// What this program, started again, could not put between itself and the host.
fn missing_walls() -> Result<Vec<zygote_engine::MissingWall>, String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("timeout")
        .arg(JAIL_PROBE_MAX_S)
        .args([own.as_os_str(), JAIL_VERB.as_ref()])
        .output();
    let output = output.map_err(|error| error.to_string())?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// `here`: whether it is this host that machines run on.
fn jail(here: bool) -> Check {
    let bad = if here { Grade::Bad } else { Grade::Warning };
    let walls = match missing_walls() {
        Ok(walls) => walls,
        Err(error) => {
            let finding = format!("cannot be entered: {error}");
            return check("jail", bad, finding, Some("run as root"));
        }
    };
    if walls.is_empty() {
        let finding = "own user, namespaces, empty root, no capabilities, seccomp".into();
        return check("jail", Grade::Good, finding, None);
    }
    let names: Vec<String> = walls
        .iter()
        .map(|wall| format!("{} ({})", wall.wall, wall.why))
        .collect();
    let is_refused = walls.iter().any(|wall| wall.is_main);
    let grade = if is_refused { bad } else { Grade::Warning };
    let remedy = is_refused.then(|| walls_remedy(&walls));
    let finding = format!("missing: {}", names.join("; "));
    check("jail", grade, finding, remedy)
}

/// KVM_CREATE_VM waits for the cgroup's read-copy-update unless the hierarchy favours changes.
fn cgroups() -> Check {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let line = mounts.lines().find(|line| line.contains(" cgroup2 "));
    match line {
        None => check(
            "cgroups",
            Grade::Warning,
            "no cgroup v2 hierarchy".into(),
            None,
        ),
        Some(line) if line.contains("favordynmods") => {
            check("cgroups", Grade::Good, "v2, favordynmods".into(), None)
        }
        Some(_) => {
            let finding = "v2 without favordynmods: making a VM can take tens of milliseconds";
            let remedy = "sudo mount -o remount,favordynmods /sys/fs/cgroup";
            check("cgroups", Grade::Warning, finding.into(), Some(remedy))
        }
    }
}

/// Whether what sandboxes take together can be limited.
fn limits() -> Check {
    let few = cgroup::Limits {
        memory_max_bytes: 1 << 30,
        processes_max: 1,
        cpu_weight: 1,
    };
    match cgroup::Group::create(&few) {
        Ok(_) => {
            let finding = "memory, processes and processor share of sandboxes, by cgroup".into();
            check("limits", Grade::Good, finding, None)
        }
        Err(error) => {
            let finding = format!("memory of sandboxes is not limited by cgroup: {error}");
            let remedy = "run as root on a host with cgroup v2 (systemd.unified_cgroup_hierarchy=1), or \
                          in a group of your own: systemd-run --user --scope -p Delegate=yes zygote …";
            check("limits", Grade::Warning, finding, Some(remedy))
        }
    }
}

fn agent() -> Check {
    let name = "build: agent";
    match zygote_template::agent_path() {
        Ok(path) => check(name, Grade::Good, path.display().to_string(), None),
        Err(error) => check(name, Grade::Warning, error.to_string(), None),
    }
}

fn templates(store: &Store, can_build: bool) -> Check {
    let names = store.known();
    if names.is_empty() {
        let remedy = if can_build {
            "zygote template build python"
        } else {
            "see `build: user ids`; or build one as root: sudo zygote template build python"
        };
        check("templates", Grade::Warning, "none yet".into(), Some(remedy))
    } else {
        check("templates", Grade::Good, names.join(", "), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_its_remedy() {
        let check = tool("x", "no-such-program", "some-package");
        assert_eq!(check.grade, Grade::Warning);
        assert!(check.remedy.unwrap().contains("some-package"));
        assert_eq!(tool("sh", "sh", "dash").grade, Grade::Good);
    }
}
