//! What a sandbox's guest says: an allegation, each word of which is checked.

use super::{Asked, Owner};
use crate::live::attachment::Attachment;
use crate::live::error::LiveError;
use crate::live::journal::Happening;
use crate::live::limits::INPUT_WINDOW_BYTES;
use crate::live::process::{Piece, Process, ProcessState};
use crate::live::sandbox::{Attach, RingState};
use tokio::time::Instant;
use zygote_protocol::{AgentMessage, Described, HostMessage, ProcessId, ReaderId, StartFailure};

impl Owner {
    pub(super) fn hear(&mut self, message: AgentMessage) -> Result<(), String> {
        match message {
            AgentMessage::Started { process, pid } => {
                let known = self.known(process)?;
                check(known, &ProcessState::Starting)?;
                known.info.pid = Some(pid);
                known.set(ProcessState::Running);
                let (info, is_task) = (known.info.clone(), known.is_task);
                if let Some(starting) = known.starting.take() {
                    let _ = starting.send(Ok(info.clone()));
                }
                self.show_change(process);
                if !is_task {
                    let command = info.command;
                    self.note(Happening::ProcessStarted { process, command });
                }
            }
            AgentMessage::StartFailed {
                process,
                reason,
                message,
            } => self.start_failed(process, reason, message)?,
            AgentMessage::Output {
                process,
                reader,
                offset,
                stream,
                data,
            } => {
                let end = offset.checked_add(data.len() as u64);
                let end = end.ok_or("output behind all offsets")?;
                let piece = Piece::Output {
                    offset,
                    stream,
                    data,
                };
                self.pass(process, reader, offset, end, piece)?;
            }
            AgentMessage::Skipped {
                process,
                reader,
                from,
                to,
            } => self.pass(process, reader, from, to, Piece::Skipped { from, to })?,
            AgentMessage::InputTaken { process, total } => self.input_taken(process, total)?,
            AgentMessage::Ended {
                process,
                status,
                output_end,
            } => {
                let known = self.known(process)?;
                check(known, &ProcessState::Running)?;
                let timed_out = known.timed_out;
                known.output_end = Some(output_end);
                known.set(ProcessState::Ended { status, timed_out });
                let (state, is_task) = (known.info.state.clone(), known.is_task);
                self.end_readers(process);
                self.context_ended(process, &state, "");
                self.last_used = Instant::now();
                self.show_change(process);
                if is_task {
                    self.end_abandoned(process);
                } else {
                    self.note(Happening::ProcessEnded {
                        process,
                        status,
                        timed_out,
                    });
                }
            }
            AgentMessage::CellPiece {
                process,
                offset,
                last,
                data,
            } => self.take_part(process, offset, last, &data)?,
            AgentMessage::Described { processes } => self.described(&processes)?,
            AgentMessage::Held { all } => self.held(all),
            AgentMessage::NotHeld { message } => self.not_held(message),
            AgentMessage::Refused { message } => return Err(format!("it refuses: {message}")),
            _ => return Err("a message that does not belong here".to_owned()),
        }
        Ok(())
    }

    fn known(&mut self, process: ProcessId) -> Result<&mut Process, String> {
        let known = self.processes.get_mut(&process);
        known.ok_or_else(|| format!("it tells of a process {process}, which nobody asked for"))
    }

    fn start_failed(
        &mut self,
        process: ProcessId,
        reason: StartFailure,
        message: String,
    ) -> Result<(), String> {
        let known = self.known(process)?;
        check(known, &ProcessState::Starting)?;
        known.set(ProcessState::Lost);
        for reader in known.readers.values() {
            let _ = reader.pieces.send(Piece::End);
        }
        if let Some(starting) = known.starting.take() {
            let message = message.clone();
            let _ = starting.send(Err(LiveError::StartFailed { reason, message }));
        }
        self.context_ended(process, &ProcessState::Lost, &message);
        // It never was.
        self.processes.remove(&process);
        self.sandbox.table().remove(&process);
        Ok(())
    }

    fn pass(
        &mut self,
        process: ProcessId,
        reader: ReaderId,
        from: u64,
        to: u64,
        piece: Piece,
    ) -> Result<(), String> {
        let Some(known) = self.processes.get_mut(&process) else {
            // Forgotten, while this was on its way.
            return Ok(());
        };
        let Some(entry) = known.readers.get_mut(&reader) else {
            return Ok(());
        };
        let is_gap = matches!(piece, Piece::Skipped { .. });
        if from != entry.at || to < from || (to > entry.limit && !is_gap) {
            return Err(format!(
                "output from {from} to {to} for a reader at {} who may have up to {}",
                entry.at, entry.limit
            ));
        }
        entry.pass(piece, to);
        self.end_readers(process);
        Ok(())
    }

    /// Readers that have had all are ended, here and in the guest, where one could hold the process.
    pub(in crate::live) fn end_readers(&mut self, process: ProcessId) {
        let known = self.processes.get_mut(&process);
        let done = known.map(Process::end_readers).unwrap_or_default();
        for reader in done {
            self.say_small(&HostMessage::Unfollow { process, reader });
        }
    }

    fn input_taken(&mut self, process: ProcessId, total: u64) -> Result<(), String> {
        let Some(known) = self.processes.get_mut(&process) else {
            return Ok(());
        };
        if total < known.input_taken || total > known.input_sent.saturating_add(1) {
            return Err(format!("input taken: {total} of {}", known.input_sent));
        }
        let more = total.min(known.input_sent) - known.input_taken;
        known.input_taken += more;
        let more = usize::try_from(more).unwrap_or(0).min(INPUT_WINDOW_BYTES);
        known.input.add_permits(more);
        Ok(())
    }

    fn described(&mut self, all: &[Described]) -> Result<(), String> {
        let asked = self.asked.pop_front();
        match asked.ok_or("a description that nobody asked for")? {
            Asked::Rings(reply) => {
                let states = all.iter().map(|one| RingState {
                    process: one.process,
                    dropped_bytes: one.kept_from,
                    kept_bytes: one.kept_to.saturating_sub(one.kept_from),
                });
                let _ = reply.send(states.collect());
            }
            Asked::Reader(attach, reply) => {
                let found = all.iter().find(|one| one.process == attach.process);
                let attachment = match found {
                    Some(found) => self.attach(attach, found),
                    None => Err(LiveError::NoProcess(attach.process)),
                };
                let _ = reply.send(attachment);
            }
        }
        Ok(())
    }

    fn attach(&mut self, attach: Attach, found: &Described) -> Result<Attachment, LiveError> {
        let id = attach.process;
        let readers_max = self.sandbox.limits.readers_max;
        let at = attach.from.unwrap_or(found.kept_from).min(found.kept_to);
        let until = (!attach.follow).then_some(found.kept_to);
        let Some(process) = self.processes.get(&id) else {
            return Err(LiveError::NoProcess(id));
        };
        if process.readers.len() >= readers_max {
            self.note(Happening::LimitHit { limit: "streams" });
            return Err(LiveError::TooMany {
                what: "streams of this process are open",
                count: readers_max,
            });
        }
        let number = process.next_reader;
        let (attachment, reader) = self.reader(id, number, at, until);
        let limit = reader.limit;
        if let Some(process) = self.processes.get_mut(&id) {
            process.next_reader += 1;
            process.readers.insert(number, reader);
        }
        self.say_small(&HostMessage::Follow {
            process: id,
            reader: number,
            from: at,
            limit,
            holds: attach.holds,
        });
        self.end_readers(id);
        Ok(attachment)
    }
}

/// What a guest tells of a process must follow from what it has told before.
fn check(process: &Process, expected: &ProcessState) -> Result<(), String> {
    if process.info.state == *expected {
        return Ok(());
    }
    let (id, state) = (process.info.id, &process.info.state);
    Err(format!("a word about process {id}, which is {state:?}"))
}
