//! What is done in a guest that is to be a template: files are put into it, commands run, its interpreter is
//! warmed up. Each step has a deadline.

use crate::Progress;
use crate::guest::{Guest, GuestError};
use crate::rootfs::{Layer, compiler};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tar::EntryType;
use zygote_protocol::{
    AgentMessage, ExitStatus, HostMessage, ProcessId, Program, Put, STREAM_CHUNK_MAX_BYTES, Start,
};

/// Limits; emulated hosts are a hundred times slower than real ones.
const PUT_MAX: Duration = Duration::from_secs(300);
const RUN_MAX: Duration = Duration::from_secs(3600);
const WARM_MAX: Duration = Duration::from_secs(1200);
const FREEZE_MAX: Duration = Duration::from_secs(120);
const PUT: &str = "take its files";
const RUN: &str = "run the recipe's commands";
/// So much of what a command that fails has said last is repeated.
const TAIL_BYTES: usize = 4096;

/// A guest that is somebody, and what has been done in it.
pub struct Steps<'a> {
    guest: &'a mut Guest,
    progress: &'a mut dyn FnMut(Progress),
    last: ProcessId,
}

impl<'a> Steps<'a> {
    /// None yet.
    pub fn new(guest: &'a mut Guest, progress: &'a mut dyn FnMut(Progress)) -> Self {
        Self {
            guest,
            progress,
            last: 0,
        }
    }

    /// Puts a layer into it, and makes byte code of its Python.
    pub fn put(&mut self, layer: &Layer) -> Result<(), GuestError> {
        let Some(archive) = &layer.archive else {
            return Ok(());
        };
        let file = File::open(archive).map_err(GuestError::Archive)?;
        let mut archive = tar::Archive::new(file);
        for entry in archive.entries().map_err(GuestError::Archive)? {
            let mut entry = entry.map_err(GuestError::Archive)?;
            self.put_entry(&mut entry)?;
            let done = entry.raw_file_position() + entry.size();
            (self.progress)(Progress {
                message: "putting files into the guest".to_owned(),
                part: Some((done.min(layer.bytes), layer.bytes)),
            });
        }
        // What could not be put is told when a program is to start.
        let words = if layer.contents.pip.is_empty() {
            vec!["true".to_owned()]
        } else {
            (self.progress)(Progress::new("compiling Python packages"));
            compiler().to_vec()
        };
        // Some packages bring files for other versions of the language.
        self.start(words).map(drop)
    }

    fn put_entry(&mut self, entry: &mut tar::Entry<'_, File>) -> Result<(), GuestError> {
        let named = entry.path().map_err(GuestError::Archive)?;
        let inside = Path::new("/").join(named);
        let path = inside.as_os_str().as_bytes().to_vec();
        if entry.header().entry_type() == EntryType::Symlink {
            let target = entry.link_name().map_err(GuestError::Archive)?;
            let target = target.unwrap_or_default();
            let target = target.as_os_str().as_bytes().to_vec();
            return self.say_put(Put::Link { path, target });
        }
        let mode = entry.header().mode().map_err(GuestError::Archive)?;
        self.say_put(Put::File { path, mode })?;
        loop {
            let mut data = Vec::new();
            let most = STREAM_CHUNK_MAX_BYTES as u64;
            let read = entry.take(most).read_to_end(&mut data);
            if read.map_err(GuestError::Archive)? == 0 {
                return Ok(());
            }
            self.say_put(Put::Data { data })?;
        }
    }

    fn say_put(&mut self, put: Put) -> Result<(), GuestError> {
        self.guest.send(&HostMessage::Put(put), PUT, PUT_MAX)
    }

    /// Has a shell run a command to its end; it must succeed.
    pub fn run(&mut self, line: &str) -> Result<(), GuestError> {
        (self.progress)(Progress::new(format!("running {line}")));
        let words = ["sh", "-c", line].map(str::to_owned);
        match self.start(words.to_vec())? {
            (ExitStatus::Code(0), _) => Ok(()),
            (status, tail) => Err(GuestError::Command {
                command: line.to_owned(),
                how: match status {
                    // As a shell tells of a program that was killed.
                    ExitStatus::Code(137) => {
                        "exit code 137: killed; if the guest's memory was used up, build its base with more"
                            .to_owned()
                    }
                    ExitStatus::Code(code) => format!("exit code {code}"),
                    ExitStatus::Signal {
                        out_of_memory: true,
                        ..
                    } => "the guest ran out of memory: build its base with more".to_owned(),
                    ExitStatus::Signal { signal, .. } => format!("signal {signal}"),
                },
                output: String::from_utf8_lossy(&tail).trim_end().to_owned(),
            }),
        }
    }

    /// Runs a program; gives back how it ended, and what it said last.
    fn start(&mut self, words: Vec<String>) -> Result<(ExitStatus, Vec<u8>), GuestError> {
        self.last += 1;
        let words = words.into_iter().map(String::into_bytes).collect();
        let start = Start::new(self.last, Program::Command(words));
        let begun = Instant::now();
        self.guest.send(&HostMessage::Start(start), RUN, RUN_MAX)?;
        let mut tail = Vec::new();
        loop {
            let left = RUN_MAX.saturating_sub(begun.elapsed());
            match self.guest.next(RUN, left)? {
                AgentMessage::Stdout { data, .. } | AgentMessage::Stderr { data, .. } => {
                    tail.extend_from_slice(&data);
                    let excess = tail.len().saturating_sub(TAIL_BYTES);
                    tail.drain(..excess);
                }
                AgentMessage::Exited { status, .. } => return Ok((status, tail)),
                AgentMessage::StartFailed { message, .. } => {
                    return Err(GuestError::NotStarted(message));
                }
                AgentMessage::Started { .. } => {}
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Gives it an interpreter in place of the one that there is, warmed up.
    pub fn warm(&mut self, code: &str) -> Result<(), GuestError> {
        (self.progress)(Progress::new("warming the interpreter up"));
        let (code, stage) = (code.to_owned(), "warm its interpreter up");
        self.guest
            .send(&HostMessage::Warm { code }, stage, WARM_MAX)?;
        match self.guest.next(stage, WARM_MAX)? {
            AgentMessage::Warmed => Ok(()),
            AgentMessage::WarmFailed { message } => Err(GuestError::Warm(message)),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes it what is forked; it says nothing from here on.
    pub fn freeze(&mut self) -> Result<(), GuestError> {
        self.guest
            .send(&HostMessage::Freeze, "freeze", FREEZE_MAX)?;
        match self.guest.next("freeze", FREEZE_MAX)? {
            AgentMessage::Frozen => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(message: &AgentMessage) -> GuestError {
    GuestError::Unexpected(format!("{message:?}"))
}
