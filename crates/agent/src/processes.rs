//! The processes that the host asked for: their input, their output, their ends.

#![expect(unsafe_code, reason = "waitpid, kill")]

use crate::cgroup;
use crate::channel::Channel;
use crate::context::{Context, Part};
use crate::process::{Kept, Output, Process, read_output};
use crate::ring::{Piece, Ring};
use crate::signals::{Signal, Signals};
use rustix::event::{PollFd, PollFlags};
use std::io;
use zygote_protocol::{
    AgentMessage, Described, ExitStatus, ProcessId, Resumed, STREAM_CHUNK_MAX_BYTES, Stream,
};

/// Above this, the host is not listened to until programs have taken their input.
const INPUT_HIGH_BYTES: usize = 1024 * 1024;
/// What is read of one process before others have their turn.
const TURN_BYTES: usize = 256 * 1024;
/// Most output that is kept of all processes: it is the agent's memory, which is not the user's.
const KEPT_MAX_BYTES: usize = 16 << 20;
/// So much input taken is told at once; less, when a process has taken all.
const INPUT_TOLD_BYTES: u64 = 64 * 1024;

/// All of them.
pub struct Processes {
    all: Vec<Process>,
    /// Those that have told their end, and only keep memory.
    remains: Vec<u32>,
    /// Out-of-memory kills of the kernel's that are known.
    kills: u64,
    /// Those of our own that have not been told.
    own_kills: u64,
    /// Whose output is sent first.
    turn: usize,
    /// The largest number that one has had.
    last: ProcessId,
    /// What programs write passes through here.
    pub scratch: Vec<u8>,
}

impl Processes {
    /// None yet.
    pub fn new() -> Self {
        Self {
            all: Vec::new(),
            remains: Vec::new(),
            kills: 0,
            own_kills: 0,
            turn: 0,
            last: 0,
            scratch: vec![0; STREAM_CHUNK_MAX_BYTES],
        }
    }

    /// One more.
    pub fn add(&mut self, process: Process) {
        self.last = self.last.max(process.id);
        self.all.push(process);
    }

    /// One that the host knows by this number.
    pub fn find(&mut self, id: ProcessId) -> Option<&mut Process> {
        let is_known = |p: &&mut Process| {
            let is_forgotten = p.kept.as_ref().is_some_and(|kept| kept.is_forgotten);
            p.id == id && !is_forgotten
        };
        self.all.iter_mut().find(is_known)
    }

    /// Whether there are processes that only keep memory.
    pub fn has_remains(&self) -> bool {
        !self.remains.is_empty()
    }

    /// Whether some have so much input that the host should wait.
    pub fn input_is_full(&self) -> bool {
        let is_full = |process: &Process| process.input.len() > INPUT_HIGH_BYTES;
        self.all.iter().any(is_full)
    }

    /// Whether there is something to send once the host takes it.
    pub fn is_pending(&self) -> bool {
        let is_pending = |process: &Process| {
            let kept = process.kept.as_ref();
            process.is_sending() || kept.is_some_and(|kept| kept.ring.is_pending())
        };
        self.all.iter().any(is_pending)
    }

    /// What to wait for.
    pub fn watch<'a>(&'a self, fds: &mut Vec<PollFd<'a>>, channel_is_full: bool) {
        for process in &self.all {
            let is_read = match &process.kept {
                None => !channel_is_full,
                Some(kept) => kept.ring.room() > 0 && !process.is_sending(),
            };
            if is_read {
                let outputs = process.stdout.iter().chain(&process.stderr);
                fds.extend(outputs.map(|stream| PollFd::new(stream, PollFlags::IN)));
            }
            if let Some(stdin) = process.stdin.as_ref().filter(|_| !process.input.is_empty()) {
                fds.push(PollFd::new(stdin, PollFlags::OUT));
            }
            if let Some((control, flags)) = process.control() {
                fds.push(PollFd::from_borrowed_fd(control, flags));
            }
        }
    }

    /// Notes which have ended: those that say so, children that have, and the orphans that PID 1
    /// inherits. Gives back whether `is_ours` ended, which is no process of the host's.
    pub fn take_signals(&mut self, signals: &Signals, is_ours: Option<u32>) -> bool {
        let mut has_children = false;
        while let Some(signal) = signals.next() {
            match signal {
                Signal::Child => has_children = true,
                Signal::Told { pid, status } => {
                    let told = |p: &&mut Process| p.pid == pid && p.tells && p.ended.is_none();
                    if let Some(process) = self.all.iter_mut().find(told) {
                        process.ended = Some((i32::from(status)) << 8);
                        self.remains.push(pid);
                    }
                }
            }
        }
        has_children && self.reap(is_ours)
    }

    fn reap(&mut self, is_ours: Option<u32>) -> bool {
        let mut ours_ended = false;
        loop {
            let mut status = 0;
            // SAFETY: writes one integer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return ours_ended;
            }
            self.remains.retain(|remains| *remains != pid as u32);
            ours_ended |= is_ours == Some(pid as u32);
            let ended = |p: &&mut Process| p.pid == pid as u32 && p.ended.is_none();
            if let Some(process) = self.all.iter_mut().find(ended) {
                process.ended = Some(status);
            }
        }
    }

    /// Ends those that have told their end. Nobody has waited for their memory to be given back.
    pub fn clear_remains(&mut self) {
        for pid in self.remains.drain(..) {
            // SAFETY: a plain system call; the process has not been reaped, so the id is its own.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        }
    }

    /// Moves all that can be moved: input to the processes, their output and their ends to the host.
    pub fn turn(&mut self, channel: &mut Channel) -> io::Result<()> {
        for index in 0..self.all.len() {
            self.all[index].feed();
            if self.all[index].kept.is_some() {
                self.all[index].turn_context();
                self.collect(index);
                if channel.is_mute() {
                    // What is displayed meanwhile is for nobody.
                    self.all[index].lose_host();
                }
                self.send_event(index, channel)?;
            } else {
                self.pump(index, channel)?;
            }
        }
        self.send_kept(channel)?;
        self.make_room();
        self.finish(channel)
    }

    /// Where all of them together have kept too much, the one that has most of it gives half away.
    fn make_room(&mut self) {
        loop {
            let kept = self
                .all
                .iter_mut()
                .filter_map(|process| process.kept.as_mut());
            let mut rings: Vec<&mut Ring> = kept.map(|kept| &mut kept.ring).collect();
            let total: usize = rings.iter().map(|ring| ring.kept()).sum();
            if total <= KEPT_MAX_BYTES {
                return;
            }
            rings.sort_by_key(|ring| std::cmp::Reverse(ring.kept()));
            if !rings.into_iter().any(|ring| ring.halve() > 0) {
                // All of it is for readers who have yet to have it.
                return;
            }
        }
    }

    /// None of them is anybody's any more; numbers begin anew.
    pub fn forget_all(&mut self) {
        self.clear_remains();
        (self.all, self.turn, self.last) = (Vec::new(), 0, 0);
    }

    /// Sends what a process has written, while the host keeps up.
    fn pump(&mut self, index: usize, channel: &mut Channel) -> io::Result<()> {
        for stream in [Stream::Stdout, Stream::Stderr] {
            while !channel.is_full() {
                let process = &mut self.all[index];
                let id = process.id;
                let slot = process.slot(stream);
                let Some(descriptor) = slot else { break };
                match read_output(descriptor, &mut self.scratch) {
                    Output::Data(count) => {
                        let data = self.scratch[..count].to_vec();
                        channel.send(&match stream {
                            Stream::Stdout => AgentMessage::Stdout { process: id, data },
                            Stream::Stderr => AgentMessage::Stderr { process: id, data },
                        })?;
                    }
                    Output::Later => {
                        // The program has ended: what is in the pipe now was all of its own; what
                        // its children may still write is not waited for.
                        if process.ended.is_some() {
                            *process.slot(stream) = None;
                        }
                        break;
                    }
                    Output::End => *slot = None,
                }
            }
        }
        Ok(())
    }

    /// Keeps what a process has written, as far as its readers keep up.
    fn collect(&mut self, index: usize) {
        let process = &mut self.all[index];
        if process.is_sending() {
            return;
        }
        let Some(mut kept) = process.kept.take() else {
            return;
        };
        // Seen once the process had ended, an empty pipe has had all of its own output.
        let had_ended = process.ended.is_some();
        let (mut is_drained, mut is_read) = (true, true);
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut left = TURN_BYTES;
            while let Some(descriptor) = process.slot(stream) {
                let most = kept.ring.room().min(self.scratch.len()).min(left);
                if most == 0 {
                    is_drained = false;
                    // No pipe holds more: what was in it at the beginning has been read.
                    is_read &= left == 0;
                    break;
                }
                match read_output(descriptor, &mut self.scratch[..most]) {
                    Output::Data(count) => {
                        kept.ring.push(stream, &self.scratch[..count]);
                        left -= count;
                    }
                    Output::Later => break,
                    Output::End => *process.slot(stream) = None,
                }
            }
        }
        kept.is_drained = had_ended && is_drained;
        if let Some(context) = process.context.as_mut().filter(|_| is_read) {
            context.output_is_read(kept.ring.end());
        }
        process.kept = Some(kept);
    }

    /// Sends what a context tells of its cell, once all that it has printed before is kept.
    fn send_event(&mut self, index: usize, channel: &mut Channel) -> io::Result<()> {
        let process = self.all[index].id;
        while !channel.is_full()
            && let Some(part) = self.all[index].context.as_mut().and_then(Context::part)
        {
            let Part { offset, last, data } = part;
            self.all[index].end_cell(offset, last);
            channel.send(&AgentMessage::CellPiece {
                process,
                offset,
                last,
                data,
            })?;
        }
        Ok(())
    }

    /// Sends kept output to its readers, a piece for each process in turn.
    fn send_kept(&mut self, channel: &mut Channel) -> io::Result<()> {
        let count = self.all.len();
        let mut idle = 0;
        while idle < count && !channel.is_full() {
            self.turn = (self.turn + 1) % count;
            let process = &mut self.all[self.turn];
            let id = process.id;
            let piece = process.kept.as_mut().and_then(|kept| kept.ring.next());
            idle = if piece.is_some() { 0 } else { idle + 1 };
            let Some((reader, piece)) = piece else {
                continue;
            };
            channel.send(&match piece {
                Piece::Bytes {
                    offset,
                    stream,
                    data,
                } => AgentMessage::Output {
                    process: id,
                    reader,
                    offset,
                    stream,
                    data,
                },
                Piece::Skipped { from, to } => AgentMessage::Skipped {
                    process: id,
                    reader,
                    from,
                    to,
                },
            })?;
        }
        Ok(())
    }

    /// Reports processes that have ended and whose output has been sent, or is kept.
    fn finish(&mut self, channel: &mut Channel) -> io::Result<()> {
        for index in 0..self.all.len() {
            self.tell_input(index, channel)?;
            self.tell_end(index, channel)?;
        }
        while let Some(index) = self.all.iter().position(Process::is_over) {
            let process = self.all.remove(index);
            if process.kept.is_none() {
                let status = self.exit_status(process.ended.unwrap_or_default());
                channel.send(&AgentMessage::Exited {
                    process: process.id,
                    status,
                })?;
            }
        }
        Ok(())
    }

    fn tell_input(&mut self, index: usize, channel: &mut Channel) -> io::Result<()> {
        let process = &mut self.all[index];
        let total = process.input_taken;
        let has_taken_all = process.input.is_empty();
        let Some(kept) = process.kept.as_mut().filter(|kept| !kept.is_forgotten) else {
            return Ok(());
        };
        let untold = total - kept.input_told;
        if untold == 0 || (untold < INPUT_TOLD_BYTES && !has_taken_all) {
            return Ok(());
        }
        kept.input_told = total;
        channel.send(&AgentMessage::InputTaken {
            process: process.id,
            total,
        })
    }

    fn tell_end(&mut self, index: usize, channel: &mut Channel) -> io::Result<()> {
        let process = &self.all[index];
        let is_news = |kept: &Kept| kept.is_drained && kept.status.is_none();
        if !process.kept.as_ref().is_some_and(is_news) {
            return Ok(());
        }
        let (id, ended) = (process.id, process.ended.unwrap_or_default());
        let status = self.exit_status(ended);
        let Some(kept) = &mut self.all[index].kept else {
            return Ok(());
        };
        kept.status = Some(status);
        kept.ran = Some(kept.started.elapsed());
        kept.ring.close();
        if kept.is_forgotten {
            return Ok(());
        }
        channel.send(&AgentMessage::Ended {
            process: id,
            status,
            output_end: kept.ring.end(),
        })
    }

    fn exit_status(&mut self, status: i32) -> ExitStatus {
        exit_status(status, || {
            let known = std::mem::replace(&mut self.kills, cgroup::out_of_memory_kills());
            let own = std::mem::take(&mut self.own_kills);
            self.kills > known || own > 0
        })
    }

    /// A process was killed because memory is used up.
    pub fn has_killed_for_memory(&mut self) {
        self.own_kills += 1;
    }

    /// Has contexts of a branch draw keys that are not their source's; with `all`, any random numbers.
    pub fn reseed(&self, all: bool) {
        let contexts = self.all.iter().filter(|process| process.context.is_some());
        contexts.for_each(|process| crate::context::reseed(process.pid, all));
    }

    /// Nobody will ask for this one any more. What still writes to its streams is read, for nobody.
    pub fn forget(&mut self, id: ProcessId) {
        if let Some(kept) = self.find(id).and_then(|process| process.kept.as_mut()) {
            kept.ring.discard();
            kept.is_forgotten = true;
        }
    }

    /// What there is.
    pub fn describe(&self) -> Vec<Described> {
        self.known().map(described).collect()
    }

    fn known(&self) -> impl Iterator<Item = (&Process, &Kept)> {
        self.all.iter().filter_map(|process| {
            let kept = process.kept.as_ref().filter(|kept| !kept.is_forgotten)?;
            Some((process, kept))
        })
    }

    /// The host has gone.
    pub fn lose_host(&mut self) {
        self.all.iter_mut().for_each(Process::lose_host);
    }

    /// Tells another host all that it has to know.
    pub fn resume(&self, channel: &mut Channel) -> io::Result<()> {
        channel.unmute();
        for (process, kept) in self.known() {
            channel.send(&AgentMessage::Resumed(resumed(process, kept)))?;
        }
        channel.send(&AgentMessage::ResumedEnd { last: self.last })
    }
}

fn described((process, kept): (&Process, &Kept)) -> Described {
    Described {
        process: process.id,
        pid: process.pid,
        kept_from: kept.ring.start(),
        kept_to: kept.ring.end(),
        status: kept.status,
    }
}

fn resumed(process: &Process, kept: &Kept) -> Resumed {
    let ran = kept.ran.unwrap_or_else(|| kept.started.elapsed());
    Resumed {
        described: described((process, kept)),
        output_end: kept.ring.closed_at(),
        note: kept.note.clone(),
        ran_ms: u64::try_from(ran.as_millis()).unwrap_or(u64::MAX),
        input_received: process.input_taken + process.input.len() as u64,
        input_taken: process.input_taken,
        takes_input: process.stdin.is_some() && !process.input_ends,
        context: process.context.as_ref().map(Context::resumed),
    }
}

/// How a process ended; `was_killed_for_memory` is asked only if that may be.
fn exit_status(status: i32, was_killed_for_memory: impl FnOnce() -> bool) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status) as u8;
        ExitStatus::Signal {
            signal,
            out_of_memory: i32::from(signal) == libc::SIGKILL && was_killed_for_memory(),
        }
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_are_told_apart() {
        let never = || panic!("only a kill may have been for memory");
        assert_eq!(exit_status(7 << 8, never), ExitStatus::Code(7));
        let killed = ExitStatus::Signal {
            signal: 11,
            out_of_memory: false,
        };
        assert_eq!(exit_status(11, never), killed);
        let killed = ExitStatus::Signal {
            signal: 9,
            out_of_memory: true,
        };
        assert_eq!(exit_status(9, || true), killed);
    }
}
