//! The warm interpreter: started and warmed while a template is built, used up by the first
//! Python program of a fork, which it becomes.

#![expect(unsafe_code, reason = "kill, waitpid")]

use crate::cgroup;
use crate::context::Context;
use crate::process::{HOME, Plan, Spawned, spawn};
use crate::users::User;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use zygote_protocol::{Buffering, PythonSource, Start};

const DRIVER: &str = "/usr/lib/zygote/driver.py";
/// One file for Python: its parts share their names.
const DRIVER_SOURCE: &str = concat!(
    include_str!("python/driver.py"),
    "\n\n",
    include_str!("python/generators.py"),
    "\n\n",
    include_str!("python/program.py"),
    "\n\n",
    include_str!("python/ending.py"),
    "\n\n",
    include_str!("python/context.py"),
    "\n\n_main()\n",
);
/// The driver's answers when the warm-up has gone well.
const WAITS: &[u8] = b"waits";
const GOES_ON: &[u8] = b"goes on";
/// Longest traceback of a failed warm-up.
const ANSWER_MAX_BYTES: usize = 64 * 1024;

/// A warm interpreter that nobody has used yet.
pub struct Interpreter {
    process: Spawned,
    control: UnixStream,
    seed: Vec<u8>,
    only_waits: bool,
}

impl Interpreter {
    /// Starts Python and warms it up. Blocks: a template is being built, nothing else goes on.
    /// The inner error is the warm-up code's own, with its traceback.
    pub fn warm(code: &str) -> io::Result<Result<Self, String>> {
        write_driver(Path::new(DRIVER))?;
        let (mut control, theirs) = UnixStream::pair()?;
        let number = theirs.as_raw_fd().to_string();
        let arguments = ["python3", DRIVER, &number].map(|word| word.as_bytes().to_vec());
        let plan = Plan {
            arguments: &arguments,
            env: &[],
            cwd: HOME,
            stdin: true,
            user: None,
            terminal: None,
            inherited: Some(theirs.into()),
        };
        let process = spawn(&plan, &cgroup::interpreters_entrance()?)?;
        drop(plan);
        send(&mut control, &[b"warm", code.as_bytes()])?;
        let mut length = [0; 4];
        if control.read_exact(&mut length).is_err() {
            return Ok(Err("the interpreter ended during warm-up".into()));
        }
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        control.read_exact(&mut answer)?;
        if [WAITS, GOES_ON].contains(&&answer[..]) {
            return Ok(Ok(Self {
                process,
                control,
                seed: Vec::new(),
                only_waits: answer == WAITS && cgroup::has_only(true, false),
            }));
        }
        answer.truncate(ANSWER_MAX_BYTES);
        Ok(Err(String::from_utf8_lossy(&answer).into_owned()))
    }

    /// Whether it does nothing but wait for a request: it has one thread, no children and no timers.
    pub fn only_waits(&self) -> bool {
        self.only_waits
    }

    /// Ends it unused, and waits until it is gone.
    pub fn end(self) {
        let pid = self.process.pid as libc::pid_t;
        // SAFETY: plain system calls; nobody else has waited for it, unless it was killed before.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), 0);
        }
    }

    /// The seed for its generators, which it takes before any user code.
    pub fn set_seed(&mut self, seed: Option<&[u8]>) {
        self.seed = seed.unwrap_or_default().to_vec();
    }

    /// Gives it its seed now: nobody knows yet whether it will ever become a program, but what the
    /// warm-up has started in it goes on.
    pub fn reseed(&mut self) -> io::Result<()> {
        let seed = std::mem::take(&mut self.seed);
        if seed.is_empty() {
            return Ok(());
        }
        send(&mut self.control, &[b"reseed", &seed])
    }

    /// Whether it can become this program: Python's own environment variables are read only at its
    /// start, so a program that sets one gets an interpreter of its own.
    pub fn can_become(&self, start: &Start) -> bool {
        !start.env.iter().any(|(key, _)| key.starts_with("PYTHON"))
    }

    /// Becomes an interpreter that stays.
    pub fn become_context(self, start: &Start) -> io::Result<(Spawned, Context)> {
        let cwd: &[u8] = if start.cwd == HOME {
            b""
        } else {
            start.cwd.as_bytes()
        };
        let mut items: Vec<&[u8]> = vec![b"context", &self.seed, cwd];
        for (key, value) in &start.env {
            items.push(key.as_bytes());
            items.push(value.as_bytes());
        }
        let mut context = Context::new(self.control)?;
        context.ask(&items);
        Ok((self.process, context))
    }

    /// Becomes the program.
    pub fn become_program(
        mut self,
        start: &Start,
        source: &PythonSource,
        arguments: &[Vec<u8>],
    ) -> io::Result<Spawned> {
        let (kind, name, content): (&[u8], &[u8], &[u8]) = match source {
            PythonSource::Code(code) => (b"code", b"", code),
            PythonSource::File { argv0, path } => (b"file", argv0, path),
            PythonSource::Stdin => (b"stdin", b"", b""),
        };
        let lines: &[u8] = match start.buffering {
            Buffering::Full => b"0",
            Buffering::Line => b"1",
            Buffering::None => b"2",
        };
        let count = arguments.len().to_string();
        // Where it is already.
        let cwd: &[u8] = if start.cwd == HOME {
            b""
        } else {
            start.cwd.as_bytes()
        };
        let mut items: Vec<&[u8]> = vec![
            b"run",
            &self.seed,
            kind,
            name,
            content,
            cwd,
            lines,
            count.as_bytes(),
        ];
        items.extend(arguments.iter().map(Vec::as_slice));
        for (key, value) in &start.env {
            items.push(key.as_bytes());
            items.push(value.as_bytes());
        }
        send(&mut self.control, &items)?;
        Ok(self.process)
    }
}

fn write_driver(path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, DRIVER_SOURCE)
}

/// An interpreter that is started like any program, and stays.
pub fn cold_context(
    start: &Start,
    user: Option<&User>,
    entrance: &fs::File,
    is_guest: bool,
) -> io::Result<(Spawned, Context)> {
    // Where it is no guest, whose file it would be.
    let driver = if is_guest {
        PathBuf::from(DRIVER)
    } else {
        let path = std::env::temp_dir().join(format!("zygote-driver-{}.py", std::process::id()));
        write_driver(&path)?;
        path
    };
    let (control, theirs) = UnixStream::pair()?;
    let number = theirs.as_raw_fd().to_string();
    let words = [b"python3", driver.as_os_str().as_bytes(), number.as_bytes()];
    let plan = Plan {
        arguments: &words.map(<[u8]>::to_vec),
        env: &start.env,
        cwd: &start.cwd,
        stdin: false,
        user,
        terminal: None,
        inherited: Some(theirs.into()),
    };
    let spawned = spawn(&plan, entrance)?;
    let mut context = Context::new(control)?;
    context.ask(&[b"context", b"", b""]);
    Ok((spawned, context))
}

fn send(control: &mut UnixStream, items: &[&[u8]]) -> io::Result<()> {
    control.write_all(&framed(items))
}

/// The driver's framing: a total, then items, each with its length.
pub fn framed(items: &[&[u8]]) -> Vec<u8> {
    let total: usize = items.iter().map(|item| item.len() + 4).sum();
    let mut bytes = Vec::with_capacity(total + 4);
    bytes.extend_from_slice(&(total as u32).to_le_bytes());
    for item in items {
        bytes.extend_from_slice(&(item.len() as u32).to_le_bytes());
        bytes.extend_from_slice(item);
    }
    bytes
}
