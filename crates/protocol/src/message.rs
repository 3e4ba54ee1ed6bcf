//! The messages. Every length is bounded by the frame; what else is bounded says so.

use serde::{Deserialize, Serialize};

/// Names a process that the host asked for; chosen by the host, unique within a sandbox.
pub type ProcessId = u32;

impl crate::Message for HostMessage {
    /// Room for a program's arguments: Linux takes 2 MiB of them (execve(2)).
    const PAYLOAD_MAX_BYTES: usize = 4 << 20;
}

impl crate::Message for AgentMessage {
    const PAYLOAD_MAX_BYTES: usize = 1 << 20;
}

/// From the host to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// First message of every fork: become somebody, then let the user's processes run. A fork of a branch
    /// answers on a connection of its own, with all that `Resume` asks for as well.
    Activate(Identity),
    /// Put something into the file system. Not answered: what fails is why the next process does
    /// not start.
    Put(Put),
    /// Start a process. Answered by `Started` or `StartFailed`.
    Start(Start),
    /// Bytes for a process's standard input.
    Stdin {
        /// Which process.
        process: ProcessId,
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// End of a process's standard input.
    StdinClose {
        /// Which process.
        process: ProcessId,
    },
    /// Send a signal to a process.
    Signal {
        /// Which process.
        process: ProcessId,
        /// Linux signal number, 1 to 64.
        signal: u8,
        /// To all of its group, and so to what it started, rather than to itself alone.
        group: bool,
    },
    /// Send a file or folder. Answered by `Got`, the last of which is `End` or `Failed`; several are
    /// answered one after the other.
    Get {
        /// Where; a relative path starts at `/root`.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// While a template is built, or derived from another one: start the warm interpreter, in place of the one
    /// that there is, and run this code in it.
    Warm {
        /// Source text; must not be secret, every fork inherits it.
        code: String,
    },
    /// Freeze the user's processes, flush, and fall silent: a template's snapshot follows. What was started
    /// is forgotten.
    Freeze,
    /// Freeze the user's processes: a branch follows. Answered by `Held` or `NotHeld`. Until `Release`, no
    /// process can be started.
    Hold {
        /// How long that may take, in milliseconds.
        limit_ms: u32,
        /// Whether to go on although some have not stopped by then: those are in the kernel, and stop before
        /// they come out of it.
        anyway: bool,
    },
    /// There is a branch, or none: the user's processes go on.
    Release,
    /// Send a kept process's output to a reader: a new one, or one that may have more.
    Follow {
        /// Which process.
        process: ProcessId,
        /// Names the reader; chosen by the host, unique within the process.
        reader: ReaderId,
        /// Where a new reader begins; what is no longer kept there is told as `Skipped`.
        from: u64,
        /// The offset up to which output may be sent.
        limit: u64,
        /// Whether the process waits for this reader when its ring is full.
        holds: bool,
    },
    /// A reader wants no more.
    Unfollow {
        /// Which process.
        process: ProcessId,
        /// Which reader.
        reader: ReaderId,
    },
    /// A process's terminal has another size.
    Resize {
        /// Which process.
        process: ProcessId,
        /// The new one.
        size: TerminalSize,
    },
    /// Nobody will ask for this kept process any more: its output and its end are let go.
    Forget {
        /// Which process.
        process: ProcessId,
    },
    /// Tell of all processes. Answered by `Described`.
    Describe,
    /// From a host that goes on where another was: tell all that it has to know of each process. Answered
    /// by a `Resumed` for each, in the order of their starts, and a `ResumedEnd`.
    Resume,
    /// Code for a context, which runs one cell after the other; `CellPiece` tells what comes of it.
    Cell {
        /// Which process.
        process: ProcessId,
        /// Source text.
        #[serde(with = "serde_bytes")]
        code: Vec<u8>,
        /// A new reader, which holds the process and ends with the cell.
        reader: ReaderId,
        /// Where it begins.
        from: u64,
        /// The offset up to which output may be sent.
        limit: u64,
        /// The host's own, for `Resumed` while the cell runs; at most [`NOTE_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        note: Vec<u8>,
    },
    /// What a context has displayed has been passed on: it goes on.
    CellTaken {
        /// Which process.
        process: ProcessId,
    },
}

/// Names who reads a process's output; chosen by the host.
pub type ReaderId = u32;

/// Most of what a host has the guest remember of one process, or of one cell.
pub const NOTE_MAX_BYTES: usize = 16 * 1024;

/// A terminal's size, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Who a fork is. Everything in here is new for each fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name, also written to /etc/hostname and /etc/hosts; at most 63 bytes of `[a-z0-9-]`.
    pub hostname: String,
    /// /etc/machine-id.
    pub machine_id: [u8; 16],
    /// /proc/sys/kernel/random/boot_id.
    pub boot_id: [u8; 16],
    /// Entropy for the kernel's generator.
    #[serde(with = "serde_bytes")]
    pub kernel_seed: Vec<u8>,
    /// Entropy for the generators of the warm interpreter, unless that has become somebody's.
    #[serde(with = "serde_bytes")]
    pub interpreter_seed: Option<Vec<u8>>,
    /// Whether contexts draw anew, too. Without that, those of a branch go on with the random numbers that
    /// their source would have had; not with the keys of its TLS.
    pub reseed: bool,
    /// Whether it is only to be looked at: the user's processes stay frozen, what names the machine stays as it
    /// is, and nothing can be started but tasks with files.
    pub stays: bool,
}

/// Something for the guest's file system. Paths are bytes; relative ones start at `/root`. Folders
/// that are missing on the way are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Put {
    /// A folder; if it is there, its permissions are set.
    Folder {
        /// Where.
        path: Vec<u8>,
        /// Permissions.
        mode: u32,
    },
    /// An empty file in place of what is there; `Data` follows.
    File {
        /// Where.
        path: Vec<u8>,
        /// Permissions.
        mode: u32,
    },
    /// More bytes of the file that was put last.
    Data {
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// The host could not read what was to be put.
    Failed {
        /// The sentence for the user.
        message: String,
    },
    /// A symbolic link in place of what is there.
    Link {
        /// Where.
        path: Vec<u8>,
        /// Where it leads to.
        target: Vec<u8>,
    },
}

/// A piece of a file or folder that the host has asked for. Paths are relative to that; its own is
/// empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Got {
    /// A folder; what is in it follows.
    Folder {
        /// Where.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Permissions.
        mode: u32,
    },
    /// A file; its bytes follow as `Data`.
    File {
        /// Where.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Permissions.
        mode: u32,
        /// How long it was when it was opened.
        bytes: u64,
    },
    /// More bytes of the file before it.
    Data {
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// A symbolic link.
    Link {
        /// Where.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Where it leads to.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// That was all.
    End,
    /// It cannot be sent, or not all of it.
    Failed {
        /// Why.
        message: String,
    },
}

/// A process to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Names the process in later messages.
    pub process: ProcessId,
    /// What to run.
    pub program: Program,
    /// Variables added to (or replacing those of) the guest's default environment.
    pub env: Vec<(String, String)>,
    /// Working directory in the guest; `/root` when empty.
    pub cwd: String,
    /// Whether standard input will come; otherwise it is at its end from the start.
    pub stdin: bool,
    /// When Python's standard output is passed on.
    pub buffering: Buffering,
    /// Who it runs as: `USER`, `USER:GROUP`, by name or number; root when empty.
    pub user: String,
    /// A terminal of this size in place of the three streams.
    pub terminal: Option<TerminalSize>,
    /// How its output is kept for readers; `None`: it is sent as it comes, as `Stdout` and `Stderr`.
    pub keep: Option<Keep>,
    /// The host's own, for `Resumed`; at most [`NOTE_MAX_BYTES`].
    #[serde(with = "serde_bytes")]
    pub note: Vec<u8>,
}

impl Start {
    /// With the guest's defaults, without input, as root.
    #[must_use]
    pub fn new(process: ProcessId, program: Program) -> Self {
        Self {
            process,
            program,
            env: Vec::new(),
            cwd: String::new(),
            stdin: false,
            buffering: Buffering::Full,
            user: String::new(),
            terminal: None,
            keep: None,
            note: Vec::new(),
        }
    }
}

/// Output that is kept in the guest until its readers have it, or newer output takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Most bytes that are kept.
    pub bytes: u32,
    /// Reader 0 follows from the start, holds the process, and may be sent output up to this offset; 0:
    /// nobody reads yet.
    pub limit: u64,
}

/// Which of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// When Python's standard output is passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Buffering {
    /// When a buffer is full, as into a pipe.
    #[default]
    Full,
    /// At each line, as on a terminal.
    Line,
    /// As it is written, as by `python3 -u`.
    None,
}

/// What a process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    /// A program by name or path, with its arguments; the first is the program.
    Command(Vec<Vec<u8>>),
    /// Python in the warm interpreter (or, when that one is used up, in a new one).
    Python {
        /// Where the code comes from.
        source: PythonSource,
        /// `sys.argv[1:]`.
        arguments: Vec<Vec<u8>>,
    },
    /// An interpreter that stays and is given cells of code: the warm one, or, when that one is used up,
    /// a new one.
    Context,
    /// Something to do with files, by a process of the agent's own program.
    Files(crate::FileTask),
}

/// Python code, and what Python should believe about where it came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PythonSource {
    /// `python3 -c CODE`.
    Code(#[serde(with = "serde_bytes")] Vec<u8>),
    /// `python3 FILE`: a program, a zip application or a folder, which has been put into the guest.
    File {
        /// `sys.argv[0]`, as the user typed it.
        #[serde(with = "serde_bytes")]
        argv0: Vec<u8>,
        /// Absolute path in the guest.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
    },
    /// `python3 -`: the program is read from standard input.
    Stdin,
}

/// From the agent to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// The agent has started (once, while the template is built).
    Hello {
        /// [`crate::PROTOCOL_VERSION`] of the agent.
        protocol_version: u32,
        /// `uname -r` of the guest.
        kernel_release: String,
    },
    /// The identity is applied, the kernel's generator reseeded, the user's processes thawed.
    Activated {
        /// 32 bytes of the kernel's generator drawn after the reseed: the proof that the host
        /// compares with what every other fork of the same snapshot has drawn.
        #[serde(with = "serde_bytes")]
        random_sample: Vec<u8>,
    },
    /// The identity could not be applied; nothing was thawed and nothing will run.
    ActivateFailed {
        /// What failed.
        message: String,
    },
    /// The process runs.
    Started {
        /// Which process.
        process: ProcessId,
        /// Its pid in the guest.
        pid: u32,
    },
    /// The process could not be started.
    StartFailed {
        /// Which process.
        process: ProcessId,
        /// Why, as a shell would tell: not found, not executable, other.
        reason: StartFailure,
        /// The sentence for the user.
        message: String,
    },
    /// Bytes of standard output.
    Stdout {
        /// Which process.
        process: ProcessId,
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Bytes of standard error.
    Stderr {
        /// Which process.
        process: ProcessId,
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// The process ended, and all of its output has been sent.
    Exited {
        /// Which process.
        process: ProcessId,
        /// How.
        status: ExitStatus,
    },
    /// A piece of what was asked for.
    Got(Got),
    /// The warm interpreter has run its warm-up code and waits.
    Warmed,
    /// Warming failed; the template cannot be built.
    WarmFailed {
        /// Traceback, or how the interpreter ended.
        message: String,
    },
    /// Everything is frozen. The agent says nothing more until `Activate`.
    Frozen,
    /// The user's processes stand still.
    Held {
        /// Whether all of them; the others are in the kernel.
        all: bool,
    },
    /// They do not, and go on.
    NotHeld {
        /// Why.
        message: String,
    },
    /// The host's message made no sense to the agent.
    Refused {
        /// Why.
        message: String,
    },
    /// Output of a kept process, for one of its readers.
    Output {
        /// Which process.
        process: ProcessId,
        /// Which reader.
        reader: ReaderId,
        /// Where it lies in all of the process's output, both streams counted together.
        offset: u64,
        /// Which stream.
        stream: Stream,
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Output that was no longer kept when a reader came to it.
    Skipped {
        /// Which process.
        process: ProcessId,
        /// Which reader.
        reader: ReaderId,
        /// Where the gap begins.
        from: u64,
        /// Where it ends.
        to: u64,
    },
    /// A kept process has taken input.
    InputTaken {
        /// Which process.
        process: ProcessId,
        /// How much so far, in bytes.
        total: u64,
    },
    /// A kept process has ended. What it has left behind may still write, but the reader that was there from
    /// its start is followed no longer than to `output_end`.
    Ended {
        /// Which process.
        process: ProcessId,
        /// How.
        status: ExitStatus,
        /// Where its own output ends.
        output_end: u64,
    },
    /// A part of a [`CellEvent`], encoded.
    CellPiece {
        /// Which process.
        process: ProcessId,
        /// Where the process's output ended at that moment.
        offset: u64,
        /// Whether it is the last part.
        last: bool,
        /// At most [`crate::STREAM_CHUNK_MAX_BYTES`].
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Every process that is known, in the order of their starts.
    Described {
        /// At most as many as the host has started and not forgotten.
        processes: Vec<Described>,
    },
    /// A process, for a host that goes on where another was.
    Resumed(Resumed),
    /// Those were all.
    ResumedEnd {
        /// The largest number that a process has had; 0: there has been none.
        last: ProcessId,
    },
}

/// What comes of a cell, as its interpreter tells it; encoded on its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CellEvent {
    /// Something is to be shown. The interpreter waits until that has been passed on.
    Display {
        /// Ways of showing it.
        data: Vec<Representation>,
    },
    /// The cell has ended.
    Done {
        /// Its number, from 1.
        count: u32,
        /// The value of its last expression, if it had one.
        result: Option<Vec<Representation>>,
        /// The exception that ended it.
        error: Option<CellError>,
    },
}

/// A way of showing an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Representation {
    /// Its media type, such as `text/html`.
    pub kind: String,
    /// In that type.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// An exception.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellError {
    /// Its class.
    pub name: String,
    /// What it says.
    pub value: String,
    /// Lines, as Python prints them.
    pub traceback: Vec<String>,
}

impl CellEvent {
    /// Largest encoding.
    pub const MAX_BYTES: usize = 17 << 20;
    /// How an encoded [`CellEvent::Display`] begins.
    pub const DISPLAY: u8 = 0;

    /// Decodes one; `None` if it is none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match postcard::take_from_bytes(bytes) {
            Ok((event, [])) => Some(event),
            Ok(_) | Err(_) => None,
        }
    }
}

/// A kept process, as the agent knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// Which process.
    pub process: ProcessId,
    /// Its pid in the guest.
    pub pid: u32,
    /// The first byte of its output that is kept: so many have been dropped.
    pub kept_from: u64,
    /// Where its output ends so far.
    pub kept_to: u64,
    /// How it ended, if it has.
    pub status: Option<ExitStatus>,
}

/// A kept process, for a host that knows nothing of it. Nobody follows it any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// As asked for at any time.
    pub described: Described,
    /// Where its own output ended, if it has ended.
    pub output_end: Option<u64>,
    /// What the host gave with its start.
    #[serde(with = "serde_bytes")]
    pub note: Vec<u8>,
    /// How long it has run, in milliseconds.
    pub ran_ms: u64,
    /// Input that has come for it, in bytes.
    pub input_received: u64,
    /// How much of that it has taken.
    pub input_taken: u64,
    /// Whether there may be more.
    pub takes_input: bool,
    /// What there is besides, if it is an interpreter that stays.
    pub context: Option<ResumedContext>,
}

/// An interpreter that stays, likewise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumedContext {
    /// Cells that have ended.
    pub count: u32,
    /// What the host gave with the cell that runs; `None`: none does.
    pub cell: Option<Vec<u8>>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited by itself with this code.
    Code(u8),
    /// A signal ended it.
    Signal {
        /// Linux signal number.
        signal: u8,
        /// Whether the guest's kernel killed it because the guest ran out of memory.
        out_of_memory: bool,
    },
}

/// Why a process could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartFailure {
    /// No such program (a shell's 127).
    NotFound,
    /// It is there but cannot be executed (a shell's 126).
    NotExecutable,
    /// Anything else: working directory, limits, a message that makes no sense.
    Other,
}
