//! System tests: the real program, the real kernel, the real Python. They need a KVM that can run a
//! kernel and the templates `python` and `threads`; `cargo xtask test` sees to both, in the lab
//! where the host has no such KVM. This library is what they share.

use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The program under test.
pub fn program() -> PathBuf {
    variable("ZYGOTE_PROGRAM")
}

/// The state directory with the templates; what a test changes in it is thrown away after the run.
pub fn state() -> PathBuf {
    variable("ZYGOTE_STATE_DIR")
}

fn variable(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(value) => value.into(),
        None => panic!("{name} is not set: run these tests with `cargo xtask test`"),
    }
}

/// What a run of the program gave.
#[derive(Debug)]
pub struct Ran {
    /// Exit status; 128+n for a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Ran {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn error(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Panics with everything unless the program ended well.
    pub fn good(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// The JSON objects that it printed.
    pub fn json(&self) -> Vec<Value> {
        let lines = self.stdout.split(|byte| *byte == b'\n');
        let lines = lines.filter(|line| !line.is_empty());
        let parse = |line| match serde_json::from_slice(line) {
            Ok(value) => value,
            Err(error) => panic!("{error}: {self:?}"),
        };
        lines.map(parse).collect()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let signal = output.status.signal().map(|signal| 128 + signal);
        Self {
            code: output.status.code().or(signal).unwrap_or(-1),
            stdout: output.stdout,
            stderr: output.stderr,
        }
    }
}

/// Runs `zygote` with these arguments and no input.
pub fn zygote(arguments: &[&str]) -> Ran {
    zygote_with_input(arguments, b"")
}

/// Runs `zygote` with these arguments and this input.
pub fn zygote_with_input(arguments: &[&str], input: &[u8]) -> Ran {
    let mut command = Command::new(program());
    command.args(arguments);
    feed(command, input)
}

/// Runs a command with this input.
pub fn feed(mut command: Command, input: &[u8]) -> Ran {
    command
        // What is built goes into stores of these tests' own.
        .env("ZYGOTE_BUILDS_LOCK", "own")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("cannot start {command:?}: {error}"),
    };
    let stdin = child.stdin.take();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        if let Some(mut stdin) = stdin {
            // A program that ends without reading all of it is no error here.
            let _ = stdin.write_all(&input);
        }
    });
    let output = child.wait_with_output();
    let _ = feeder.join();
    match output {
        Ok(output) => output.into(),
        Err(error) => panic!("{command:?}: {error}"),
    }
}

/// Runs Python code in a fresh fork of `python`.
pub fn python(code: &str) -> Ran {
    zygote(&["run", "-c", code])
}

/// Runs Python code in a fresh fork of `threads`.
pub fn threads(code: &str) -> Ran {
    zygote(&["run", "-t", "threads", "-c", code])
}

/// A sandbox of a test's own, until it is dropped.
pub struct Live {
    /// Its name.
    pub name: String,
}

impl Live {
    /// Of the template `python`.
    pub fn new(name: &str) -> Self {
        Self::with(name, &[])
    }

    /// With further words for `zygote create`.
    pub fn with(name: &str, options: &[&str]) -> Self {
        let create = [&["create", "--name", name][..], options].concat();
        let id = zygote(&create).good().text();
        assert_eq!(id.trim().len(), 36, "{id}");
        let name = name.to_owned();
        Self { name }
    }

    /// One that was made elsewhere.
    pub fn named(name: &str) -> Self {
        let name = name.to_owned();
        Self { name }
    }

    /// Runs a program in it.
    pub fn exec(&self, command: &[&str]) -> Ran {
        zygote(&[&["exec", &self.name, "--"], command].concat())
    }

    /// Runs a shell's script in it.
    pub fn sh(&self, script: &str) -> Ran {
        self.exec(&["sh", "-c", script])
    }

    /// Runs a cell of Python in it.
    pub fn python(&self, code: &str) -> Ran {
        zygote(&["python", &self.name, "-c", code])
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        zygote(&["rm", &self.name]);
    }
}

/// Kills the engine (SIGKILL), and waits for its end.
pub fn kill_engine() {
    let pid = zygote(&["status", "--json"]).json().remove(0)["pid"].clone();
    let Some(pid) = pid.as_i64() else {
        panic!("no engine runs");
    };
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(killed.is_ok_and(|killed| killed.success()));
    let begun = std::time::Instant::now();
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        assert!(begun.elapsed().as_secs() < 60, "the engine is still there");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
