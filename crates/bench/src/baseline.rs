//! What the same costs without a machine of its own, on the same host, in the same run.

use crate::samples::Samples;
use serde::Serialize;
use std::io;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The system's own, not what a user's PATH puts before it.
const PYTHON: &str = "/usr/bin/python3";
/// Forks children of a warm interpreter that print and end, and tells their times in nanoseconds.
const WARM_FORKS: &str = "\
import os, sys, time
try: import numpy
except ImportError: pass
null = os.open(os.devnull, os.O_WRONLY)
for _ in range(int(sys.argv[1])):
    begun = time.perf_counter_ns()
    if os.fork() == 0:
        os.dup2(null, 1)
        print(1+1, flush=True)
        os._exit(0)
    os.wait()
    print(time.perf_counter_ns() - begun)
";

/// Times on the host itself.
#[derive(Clone, Debug, Serialize)]
pub struct Baselines {
    /// `python3 -c 'print(1+1)'`, from its start to its end; `None` if there is no such program.
    pub python3: Option<Samples>,
    /// fork(2) of a Python that has loaded what it needs, to the child's end.
    pub warm_fork: Option<Samples>,
}

/// Measures them.
#[must_use]
pub fn measure(count: usize) -> Baselines {
    Baselines {
        python3: python3(count).ok(),
        warm_fork: warm_forks(count).ok(),
    }
}

fn python3(count: usize) -> io::Result<Samples> {
    let mut times = Vec::new();
    // The first reads its files.
    for number in 0..=count {
        let begun = Instant::now();
        let mut command = Command::new(PYTHON);
        command.args(["-c", "print(1+1)"]).stdin(Stdio::null());
        let output = command.output()?;
        if output.stdout != b"2\n" {
            return Err(io::Error::other("python3 does not work here"));
        }
        if number > 0 {
            times.push(begun.elapsed());
        }
    }
    Ok(Samples::of(times))
}

fn warm_forks(count: usize) -> io::Result<Samples> {
    let mut command = Command::new(PYTHON);
    command.args(["-c", WARM_FORKS, &(count + 1).to_string()]);
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let times = text.lines().filter_map(|line| line.parse().ok());
    let times: Vec<Duration> = times.skip(1).map(Duration::from_nanos).collect();
    if times.len() != count {
        return Err(io::Error::other("python3 does not work here"));
    }
    Ok(Samples::of(times))
}
