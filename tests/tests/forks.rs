//! What forks share and what they must not; what they leave behind: nothing.

#![allow(clippy::unwrap_used, reason = "a test")]

use serde_json::Value;
use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use zygote_template::Store;
use zygote_tests::*;

/// Each generator and name that forks must not share, one JSON object.
const GENERATORS: &str = "\
import json, os, random, secrets, socket, ssl, uuid, numpy, tempfile
def read(path): return open(path).read().strip()
print(json.dumps({
    'urandom': os.urandom(16).hex(), 'getrandom': os.getrandom(16).hex(),
    'random': random.random(), 'numpy': numpy.random.rand(3).tolist(),
    'numpy_generator': numpy.random.default_rng().random(), 'openssl': ssl.RAND_bytes(16).hex(),
    'uuid1': str(uuid.uuid1()), 'uuid4': str(uuid.uuid4()), 'secrets': secrets.token_hex(),
    'tempfile': tempfile.mktemp(), 'kernel_uuid': read('/proc/sys/kernel/random/uuid'),
    'boot_id': read('/proc/sys/kernel/random/boot_id'), 'machine_id': read('/etc/machine-id'),
    'hostname': socket.gethostname(), 'hostname_file': read('/etc/hostname'),
}))";

#[test]
fn fifty_forks_share_no_random_number_and_no_name() {
    let ran = zygote(&[
        "run",
        "--count",
        "50",
        "--timeout",
        "0",
        "--json",
        "-c",
        GENERATORS,
    ])
    .good();
    let records = ran.json();
    let values: Vec<Value> = records
        .iter()
        .map(|record| serde_json::from_str(record["stdout"].as_str().unwrap()).unwrap())
        .collect();
    assert_eq!(values.len(), 50);
    for name in values[0].as_object().unwrap().keys() {
        let different: HashSet<String> = values.iter().map(|v| v[name].to_string()).collect();
        assert_eq!(different.len(), 50, "{name}: {different:?}");
    }
    let ids: HashSet<&str> = records.iter().map(|r| r["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 50);
}

const CLOCKS: &str = "\
import time
now, again = time.time_ns(), time.monotonic()
import os, json
times = [time.monotonic() for _ in range(20000)]
t = time.monotonic(); time.sleep(0.05); slept = time.monotonic() - t
started = int(open('/proc/self/stat').read().rsplit(')', 1)[1].split()[19]) / os.sysconf('SC_CLK_TCK')
print(json.dumps({'wall': now, 'sorted': times == sorted(times), 'slept': slept,
                  'monotonic': again, 'started': started}))";

#[test]
fn clocks_are_right_after_the_snapshot_has_aged_for_hours() {
    let restore = set_clock_ahead(5 * 3600);
    let before = now_ns();
    let ran = zygote(&["run", "-c", CLOCKS]);
    let after = now_ns();
    drop(restore);
    let clocks: Value = serde_json::from_str(&ran.good().text()).unwrap();
    let wall = i128::from(clocks["wall"].as_i64().unwrap());
    assert!(before < wall && wall < after, "{before} {wall} {after}");
    assert_eq!(clocks["sorted"], true);
    let slept = clocks["slept"].as_f64().unwrap();
    assert!((0.05..0.5).contains(&slept), "{slept}");
    assert!(clocks["monotonic"].as_f64() >= clocks["started"].as_f64());
}

#[test]
fn the_wall_clock_is_within_50_ms_of_the_hosts() {
    let restore = set_clock_ahead(3 * 3600);
    let code = "import sys, time\nfor line in sys.stdin: print(time.time_ns(), flush=True)";
    let mut command = std::process::Command::new(program());
    command
        .args(["run", "-c", code])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The guest's answer lies between question and reply: the quickest round bounds the error.
    let rounds = (0..30).map(|_| {
        let asked = now_ns();
        writeln!(input).unwrap();
        let guest: i128 = lines.next().unwrap().unwrap().parse().unwrap();
        let answered = now_ns();
        (answered - asked, guest - (asked + answered) / 2)
    });
    let (round, offset) = rounds.min().unwrap();
    drop(input);
    child.wait().unwrap();
    drop(restore);
    assert!(round < 100_000_000, "the quickest round took {round} ns");
    assert!(
        offset.abs() < 50_000_000,
        "off by {offset} ns, round {round} ns"
    );
}

fn now_ns() -> i128 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// Sets this (throwaway) host's clock ahead until the result is dropped.
fn set_clock_ahead(seconds: i64) -> impl Drop {
    struct Back(i64);
    impl Drop for Back {
        fn drop(&mut self) {
            shift_clock(-self.0);
        }
    }
    shift_clock(seconds);
    Back(seconds)
}

fn shift_clock(seconds: i64) {
    let mut now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec += seconds;
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, now).unwrap();
}

#[test]
fn a_file_of_one_fork_is_not_in_another() {
    let code = "import os; print(os.path.exists('/root/mark')); open('/root/mark', 'w')";
    for _ in 0..2 {
        assert_eq!(python(code).good().text(), "False\n");
    }
}

#[test]
fn two_cpus_and_two_threads_of_the_template_go_on_in_a_fork() {
    let code = "import os, time\nbefore = list(COUNTS)\nt = time.monotonic()\n\
        while min(n - b for n, b in zip(COUNTS, before)) < 5 and time.monotonic() < t + 60: time.sleep(0.05)\n\
        print(os.cpu_count(), min(n - b for n, b in zip(COUNTS, before)) >= 5)\n\
        print(open('/proc/cpuinfo').read().count('processor'))\n\
        import concurrent.futures as c\nwith c.ProcessPoolExecutor(2) as e: print(list(e.map(abs, [-1, -2])))";
    assert_eq!(threads(code).good().text(), "2 True\n2\n[1, 2]\n");
}

#[test]
fn numpy_computes_the_same_after_the_fork_and_clocks_went_forward() {
    let code = "import time\nprint(COMPUTE() == COMPUTED, time.monotonic() >= MONOTONIC, time.time() >= WALL)";
    assert_eq!(threads(code).good().text(), "True True True\n");
}

/// Generators that the template's warm-up has made, and what modules have drawn once.
const OWN_GENERATORS: &str = "\
import json, multiprocessing, numpy, tempfile
r, g, s, p = OWN
print(json.dumps({'random': r.random(), 'generator': g.random(),
    'state': s.random_sample(), 'normal': s.standard_normal(), 'pcg': p.standard_normal(),
    'tempfile': tempfile.mktemp(),
    'authkey': bytes(multiprocessing.current_process().authkey).hex()}))";

#[test]
fn generators_that_the_warm_up_made_are_each_forks_own() {
    let arguments = [
        "run",
        "-t",
        "threads",
        "--count",
        "3",
        "--json",
        "-c",
        OWN_GENERATORS,
    ];
    let records = zygote(&arguments).good().json();
    let mut indices: Vec<u64> = records
        .iter()
        .map(|r| r["index"].as_u64().unwrap())
        .collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 2]);
    let values: Vec<Value> = records
        .iter()
        .map(|record| serde_json::from_str(record["stdout"].as_str().unwrap()).unwrap())
        .collect();
    for name in values[0].as_object().unwrap().keys() {
        let different: HashSet<String> = values.iter().map(|v| v[name].to_string()).collect();
        assert_eq!(different.len(), 3, "{name}: {different:?}");
    }
}

fn store() -> Store {
    Store::open(state())
}

#[test]
fn a_machine_that_is_restored_and_saved_again_is_the_same() {
    use zygote_vmm::{Disk, GuestMemory, Host, Machine};
    let host = Host::open().unwrap();
    for template in ["python", "threads"] {
        let directory = store().replicas(template).unwrap().remove(0);
        let snapshot = zygote_snapshot::Snapshot::open(&directory, &store().pieces()).unwrap();
        let mut saved = snapshot.machine().unwrap();
        let bytes = snapshot.manifest().memory.bytes;
        let memory = GuestMemory::private(snapshot.memory_file(), bytes).unwrap();
        let disks = snapshot
            .disks()
            .map(|(file, digest)| Disk::new(file.try_clone().unwrap(), digest.to_owned()).unwrap());
        let (agent, _host) = std::os::unix::net::UnixStream::pair().unwrap();
        let sink = Box::new(std::io::sink());
        let machine =
            Machine::restore(&host, &saved, memory, disks.collect(), agent.into(), sink).unwrap();
        let mut again = machine.save().unwrap();
        assert!(again.clock.clock_ns >= saved.clock.clock_ns);
        // Time has gone on: these fields, and no others.
        again.clock = saved.clock;
        for (new, old) in again.vcpus.iter_mut().zip(&mut saved.vcpus) {
            equal_clocks(new, old);
        }
        assert!(again == saved, "{template}: {}", difference(&again, &saved));
    }
}

const TSC: u32 = 0x10;
/// When the timer is due; once it has expired it is saved as the TSC, so that it expires at once.
const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_SYSENTER_ESP and EIP: AMD's have 32 bits, and KVM restores no more.
const SYSENTER: [u32; 2] = [0x175, 0x176];

fn equal_clocks(
    new: &mut zygote_snapshot::state::VcpuState,
    old: &mut zygote_snapshot::state::VcpuState,
) {
    // The host's own rate, measured anew at its boot; KVM takes 250 millionths for the same.
    assert!(new.tsc_khz.abs_diff(old.tsc_khz) <= old.tsc_khz / 4000);
    new.tsc_khz = old.tsc_khz;
    let tsc = new.msrs.iter().find(|msr| msr.index == TSC).unwrap().value;
    for (new, old) in new.msrs.iter_mut().zip(&mut old.msrs) {
        if new.index != old.index {
            continue;
        }
        if new.index == TSC {
            assert!(new.value >= old.value, "the TSC: {new:?} after {old:?}");
            new.value = old.value;
        } else if new.index == TSC_DEADLINE {
            let kept = new.value == old.value || new.value == tsc;
            assert!(kept, "the deadline: {new:?} after {old:?} at {tsc}");
            new.value = old.value;
        } else if SYSENTER.contains(&old.index) && new.value == old.value & 0xffff_ffff {
            new.value = old.value;
        }
    }
}

fn difference(
    new: &zygote_snapshot::state::MachineState,
    old: &zygote_snapshot::state::MachineState,
) -> String {
    let mut text = format!(
        "devices {} ioapic {} serial {} ",
        new.devices == old.devices,
        new.ioapic == old.ioapic,
        new.serial == old.serial
    );
    for (new, old) in new.vcpus.iter().zip(&old.vcpus) {
        let msrs = new
            .msrs
            .iter()
            .zip(&old.msrs)
            .filter(|(new, old)| new != old);
        text += &format!("msrs {:x?} ", msrs.collect::<Vec<_>>());
        text += &format!("cpuid {} ", new.cpuid == old.cpuid);
        text += &format!("mp_state {} {} ", new.mp_state, old.mp_state);
        text += &format!("tsc_khz {} {} ", new.tsc_khz, old.tsc_khz);
        let groups = [
            ("xcrs", &new.xcrs, &old.xcrs),
            ("debug", &new.debug_regs, &old.debug_regs),
            ("regs", &new.regs, &old.regs),
            ("sregs", &new.sregs, &old.sregs),
            ("xsave", &new.xsave, &old.xsave),
            ("lapic", &new.lapic, &old.lapic),
            ("events", &new.events, &old.events),
        ];
        for (name, new, old) in groups {
            let bytes = new
                .iter()
                .zip(old.iter())
                .enumerate()
                .filter(|(_, (a, b))| a != b);
            text += &format!("{name} {:x?} ", bytes.collect::<Vec<_>>());
        }
    }
    text
}

#[test]
fn a_flipped_byte_is_named_by_verify_and_refused_by_run() {
    zygote(&["template", "verify", "threads"]).good();
    let snapshot = store().replicas("threads").unwrap().remove(0);
    for name in ["memory.bin", "machine.bin", "manifest"] {
        let path = snapshot.join(name);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        let at = damaged
            .iter()
            .rposition(|byte| *byte != 0 && *byte != b'\n')
            .unwrap();
        damaged[at] ^= 1;
        replace(&path, &damaged);
        let verified = zygote(&["template", "verify", "threads"]);
        assert_eq!(verified.code, 125, "{verified:?}");
        assert!(verified.error().contains(name), "{verified:?}");
        let ran = threads("print(1)");
        assert_eq!((ran.code, ran.text()), (125, String::new()));
        assert!(
            ran.error().contains(name) && ran.error().contains("--force"),
            "{ran:?}"
        );
        replace(&path, &whole);
        threads("print(1)").good();
    }
}

fn replace(path: &Path, bytes: &[u8]) {
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, bytes).unwrap();
    fs::rename(&fresh, path).unwrap();
}

#[test]
fn templates_are_listed_inspected_and_removed() {
    let list = zygote(&["template", "ls", "--json"]).good().json();
    let names: Vec<&str> = list[0]["templates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["template"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"python") && names.contains(&"threads"),
        "{names:?}"
    );
    let inspected = zygote(&["template", "inspect", "threads", "--json"])
        .good()
        .json();
    assert_eq!(inspected[0]["vcpus"], 2);
    let missing = zygote(&["template", "inspect", "nope"]);
    assert_eq!(missing.code, 125);
    assert!(missing.error().contains("there are: python, threads"));
    assert!(missing.error().contains("zygote template init nope"));
}

#[test]
fn a_template_whose_warm_up_fails_is_not_built_and_tells_the_traceback() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("broken.toml");
    let text = include_str!("../recipes/threads.toml").replace("\"threads\"", "\"broken\"");
    let (head, _) = text.split_once("warm = ").unwrap();
    fs::write(
        &recipe,
        // More than a socket's buffer takes at once.
        format!(
            "{head}warm = \"\"\"{}\nimport nonexistent_module\"\"\"\n",
            "#".repeat(250 << 10)
        ),
    )
    .unwrap();
    let built = zygote(&["template", "build", recipe.to_str().unwrap()]);
    assert_eq!(built.code, 125, "{built:?}");
    assert!(built.error().contains("ModuleNotFoundError"), "{built:?}");
    assert_eq!(zygote(&["template", "inspect", "broken"]).code, 125);
}
