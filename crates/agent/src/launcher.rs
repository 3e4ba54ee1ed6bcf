//! A process that waits to become a fork's first command. What making a process costs it has cost before
//! the snapshot: a process id, a kernel stack, a place in a cgroup, pipes. It shares the agent's memory,
//! as after vfork(2), so that it has no pages of its own and leaves none behind when it becomes the
//! command; so while it lives it makes system calls and nothing else, and the agent waits meanwhile.

#![expect(unsafe_code, reason = "clone, and what the child does until execve")]

use crate::cgroup;
use crate::process::{Spawned, default_signals, environment};
use rustix::pipe::{PipeFlags, pipe_with};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::time::Duration;

/// How long a command may take to be found and begun.
const LAUNCH_MAX: Duration = Duration::from_secs(60);
/// For a few system calls.
const STACK_BYTES: usize = 64 * 1024;
/// Where programs are looked for without PATH (execvp(3)).
const PATH_DEFAULT: &str = "/bin:/usr/bin";

/// A process that waits for its command.
pub struct Launcher {
    child: Child,
    control: UnixStream,
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// The process, and what it shares with the agent. Dropped before it has become a command, it is ended:
/// only then is its stack freed.
struct Child {
    pid: libc::pid_t,
    shares_memory: bool,
    /// What both look at; it does not move.
    pad: Box<Pad>,
    _stack: Vec<u8>,
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.shares_memory {
            // SAFETY: plain system calls; it has not been reaped, so the id is its own.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, ptr::null_mut(), 0);
            }
        }
    }
}

/// Between the agent, which fills it in while the child waits, and the child.
struct Pad {
    /// The child's descriptors: control, cgroup, streams, /dev/null.
    control: RawFd,
    entrance: RawFd,
    streams: [RawFd; 3],
    null: RawFd,
    order: Option<Order>,
    /// Why the command has not begun.
    error: i32,
}

/// A command as execve(2) takes it.
struct Order {
    has_input: bool,
    directory: CString,
    /// Where the program may be.
    candidates: Vec<CString>,
    _words: Vec<CString>,
    arguments: Vec<*const libc::c_char>,
    variables: Vec<*const libc::c_char>,
}

impl Launcher {
    /// Makes one, in a cgroup of its own.
    pub fn prepare() -> io::Result<Self> {
        let launcher = Self::make(None)?;
        // Until it waits: our end of its descriptors is closed after that.
        match launcher.hear() {
            Ok(1) => Ok(launcher),
            heard => Err(launcher.why_not(heard)),
        }
    }

    /// A process that becomes a command at once.
    pub fn launch_now(
        arguments: &[Vec<u8>],
        additions: &[(String, String)],
        cwd: &str,
        stdin: bool,
    ) -> io::Result<Spawned> {
        let order = Order::new(arguments, additions, cwd, stdin)?;
        Self::make(Some(order))?.launched(stdin)
    }

    fn make(order: Option<Order>) -> io::Result<Self> {
        let entrance = cgroup::launchers_entrance()?;
        let (control, theirs) = UnixStream::pair()?;
        let pipe = || pipe_with(PipeFlags::CLOEXEC);
        let (in_read, stdin) = pipe()?;
        let (stdout, out_write) = pipe()?;
        let (stderr, err_write) = pipe()?;
        let null = File::open("/dev/null")?;
        let mut pad = Box::new(Pad {
            control: theirs.as_raw_fd(),
            entrance: entrance.as_raw_fd(),
            streams: [&in_read, &out_write, &err_write].map(AsRawFd::as_raw_fd),
            null: null.as_raw_fd(),
            order,
            error: 0,
        });
        let mut stack = vec![0; STACK_BYTES];
        // SAFETY: the stack is the child's alone, aligned down to 16 bytes (System V ABI §3.2.2), and lives
        // as long as this; so does the pad, which the child reads only when it is told to, or at once if
        // its order is there.
        let pid = unsafe {
            let top = stack.as_mut_ptr().add(STACK_BYTES);
            let top = top.sub(top as usize % 16);
            libc::clone(
                child,
                top.cast(),
                libc::CLONE_VM | libc::SIGCHLD,
                ptr::from_mut(&mut *pad).cast(),
            )
        };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        drop(theirs);
        let launcher = Self {
            child: Child {
                pid,
                shares_memory: true,
                pad,
                _stack: stack,
            },
            control,
            stdin,
            stdout,
            stderr,
        };
        launcher.control.set_read_timeout(Some(LAUNCH_MAX))?;
        Ok(launcher)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.pid as u32
    }

    /// It has ended, and been reaped: somebody has killed it.
    pub fn has_ended(mut self) {
        self.child.shares_memory = false;
    }

    /// Has it become a command. `BrokenPipe` if somebody has killed it; any other error tells why the
    /// program does not run.
    pub fn launch(
        mut self,
        arguments: &[Vec<u8>],
        additions: &[(String, String)],
        cwd: &str,
        stdin: bool,
    ) -> io::Result<Spawned> {
        self.child.pad.order = Some(Order::new(arguments, additions, cwd, stdin)?);
        (&self.control).write_all(&[1])?;
        self.launched(stdin)
    }

    fn launched(mut self, stdin: bool) -> io::Result<Spawned> {
        match self.hear() {
            // Closed by execve: it runs, on memory of its own.
            Ok(0) => {
                self.child.shares_memory = false;
                Ok(Spawned {
                    pid: self.pid(),
                    stdin: stdin.then_some(self.stdin),
                    stdout: self.stdout,
                    stderr: Some(self.stderr),
                })
            }
            heard => Err(self.why_not(heard)),
        }
    }

    fn why_not(&self, heard: io::Result<usize>) -> io::Error {
        let error = self.child.pad.error;
        match heard {
            Ok(_) if error != 0 => io::Error::from_raw_os_error(error),
            Ok(_) => io::Error::other("the process for the first command has ended at once"),
            Err(error) => error,
        }
    }

    /// Waits for a word of the child's, or for its end of the connection to be closed.
    fn hear(&self) -> io::Result<usize> {
        (&self.control).read(&mut [0])
    }
}

impl Order {
    fn new(
        arguments: &[Vec<u8>],
        additions: &[(String, String)],
        cwd: &str,
        has_input: bool,
    ) -> io::Result<Self> {
        let text = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::from);
        let program = arguments.first().filter(|program| !program.is_empty());
        let program = program.ok_or(io::ErrorKind::NotFound)?;
        let environment = environment(additions);
        let path = environment.iter().find(|(key, _)| key == "PATH");
        let path = path.map_or(PATH_DEFAULT, |(_, value)| value);
        let words: io::Result<Vec<CString>> = arguments.iter().map(|word| text(word)).collect();
        let mut words = words?;
        let count = words.len();
        for (key, value) in &environment {
            words.push(text(format!("{key}={value}").as_bytes())?);
        }
        let pointers = |words: &[CString]| {
            let words = words.iter().map(|word| word.as_ptr());
            words.chain([ptr::null()]).collect()
        };
        let candidates: io::Result<Vec<CString>> = candidates(program, path)
            .iter()
            .map(|path| text(path))
            .collect();
        Ok(Self {
            has_input,
            directory: text(cwd.as_bytes())?,
            candidates: candidates?,
            arguments: pointers(&words[..count]),
            variables: pointers(&words[count..]),
            _words: words,
        })
    }
}

/// Where execvp(3) looks for a program.
fn candidates(program: &[u8], path: &str) -> Vec<Vec<u8>> {
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    let place = |folder: &str| {
        let folder = if folder.is_empty() { "." } else { folder };
        [folder.as_bytes(), b"/", program].concat()
    };
    path.split(':').map(place).collect()
}

/// The child: system calls alone, on memory that is the agent's.
extern "C" fn child(pad: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the agent keeps the pad for as long as this process looks at it, and does not look itself
    // between telling the order and hearing the answer.
    unsafe {
        let pad = pad.cast::<Pad>();
        let control = (*pad).control;
        let is_now = (*pad).order.is_some();
        let mut ready = settle(&*pad);
        if ready && !is_now {
            let mut word = 0_u8;
            ready = tell(control) && libc::read(control, (&raw mut word).cast(), 1) == 1;
        }
        if ready {
            (*pad).error = become_command(&*pad);
            tell(control);
        }
    }
    127
}

unsafe fn tell(control: RawFd) -> bool {
    // SAFETY: writes one byte.
    unsafe { libc::write(control, c"!".as_ptr().cast(), 1) == 1 }
}

/// Into its cgroup and session, with its streams and nothing else.
unsafe fn settle(pad: &Pad) -> bool {
    // SAFETY: descriptors of the child's own table.
    unsafe {
        let entered = libc::write(pad.entrance, c"0".as_ptr().cast(), 1) == 1;
        if !entered || libc::setsid() < 0 {
            return false;
        }
        default_signals();
        for (number, stream) in pad.streams.iter().enumerate() {
            if libc::dup2(*stream, number as RawFd) < 0 {
                return false;
            }
        }
        let (low, high) = (
            pad.control.min(pad.null) as u32,
            pad.control.max(pad.null) as u32,
        );
        close_between(3, low);
        close_between(low + 1, high);
        close_between(high + 1, u32::MAX);
    }
    true
}

/// Closes descriptors from one up to, but not including, another.
unsafe fn close_between(first: u32, end: u32) {
    if first < end {
        // SAFETY: the child's own table; the agent keeps what it has open.
        unsafe { libc::close_range(first, end - 1, 0) };
    }
}

/// Gives back why it has not.
unsafe fn become_command(pad: &Pad) -> i32 {
    let Some(order) = &pad.order else {
        return libc::EINVAL;
    };
    let last_error = || {
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    };
    // SAFETY: strings and arrays that end in a zero, which the agent keeps.
    unsafe {
        if !order.has_input && libc::dup2(pad.null, 0) < 0 {
            return last_error();
        }
        if libc::chdir(order.directory.as_ptr()) < 0 {
            return last_error();
        }
        let mut error = libc::ENOENT;
        for candidate in &order.candidates {
            let candidate: &CStr = candidate;
            let (arguments, variables) = (order.arguments.as_ptr(), order.variables.as_ptr());
            libc::execve(candidate.as_ptr(), arguments, variables);
            // As execvp(3): what may not be executed is told only if nothing else is found.
            match last_error() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => error = libc::EACCES,
                other => return other,
            }
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_where_execvp_does() {
        let text = |found: Vec<Vec<u8>>| {
            let found: Vec<String> = found
                .into_iter()
                .map(|path| String::from_utf8(path).unwrap())
                .collect();
            found.join(" ")
        };
        assert_eq!(
            text(candidates(b"ls", "/a:/b::/c")),
            "/a/ls /b/ls ./ls /c/ls"
        );
        assert_eq!(text(candidates(b"./x/ls", "/a")), "./x/ls");
    }

    #[test]
    fn an_order_has_all_words_and_variables() {
        let words = [b"printf".to_vec(), vec![0xff, b'x']];
        let additions = [("A".to_owned(), "b c".to_owned())];
        let order = Order::new(&words, &additions, "/tmp", true).unwrap();
        assert_eq!((order.arguments.len(), order.variables.len()), (3, 6));
        assert!(order.arguments[2].is_null() && order.variables[5].is_null());
        assert_eq!(order._words[1].as_bytes(), b"\xffx");
        assert!(order._words.iter().any(|word| word.as_bytes() == b"A=b c"));
        assert!(Order::new(&[b"a\0b".to_vec()], &[], "/", true).is_err());
        assert!(Order::new(&[], &[], "/", true).is_err());
    }
}
