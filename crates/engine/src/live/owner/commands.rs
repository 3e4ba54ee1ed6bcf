//! What clients want of a sandbox.

use super::{Asked, KILL, Owner};
use crate::live::attachment::{Attachment, Notice};
use crate::live::error::LiveError;
use crate::live::journal::Happening;
use crate::live::note::Note;
use crate::live::process::{FIRST_READER, Process, ProcessSpec, Reader};
use crate::live::sandbox::{Command, StartReply};
use crate::usage::Meter;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use zygote_protocol::{HostMessage, Keep, ProcessId, Program, ReaderId, Start};

impl Owner {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Start(spec, reply) => self.start(spec, reply),
            Command::Attach(attach, reply) => self.ask(Asked::Reader(attach, reply)),
            Command::Describe(reply) => self.ask(Asked::Rings(reply)),
            Command::Input(process, data) => self.input(process, data),
            Command::InputEnd(process) => {
                if let Some(known) = self.processes.get(&process) {
                    known.input.close();
                    self.say_small(&HostMessage::StdinClose { process });
                }
            }
            Command::Signal {
                process,
                signal,
                group,
            } => self.say_small(&HostMessage::Signal {
                process,
                signal,
                group,
            }),
            Command::Resize(process, size) => {
                self.say_small(&HostMessage::Resize { process, size });
            }
            Command::Extend { ttl, idle, reply } => {
                self.extend(ttl, idle);
                let _ = reply.send(());
            }
            Command::Measure(reply) => self.measure(reply),
            Command::Branch(request) => self.branch(request),
            Command::Context(command) => self.obey_context(command),
            Command::Keep {
                name,
                moment,
                reply,
            } => {
                let _ = reply.send(self.keep(name, *moment));
            }
            Command::Moments(reply) => self.tell_moments(reply),
            Command::Moment(words, reply) => {
                let found = self.moments.find(&words);
                let _ = reply.send(found.map(|kept| Arc::clone(&kept.moment)));
            }
            Command::ForgetMoment(words, reply) => {
                let _ = reply.send(self.forget_moment(&words));
            }
            Command::Touch => {}
            Command::GoOn => self.stay_no_longer(),
            Command::Wake(reply) => {
                let id = self.sandbox.id_text();
                let _ = reply.send(Err(LiveError::NotAsleep(id)));
            }
            // Taken care of before.
            Command::End(_) | Command::Sleep(_) | Command::Rollback { .. } => {}
        }
    }

    pub(super) fn ask(&mut self, asked: Asked) {
        self.asked.push_back(asked);
        self.say_small(&HostMessage::Describe);
    }

    fn extend(&mut self, ttl: Option<Option<Duration>>, idle: Option<Option<Duration>>) {
        if let Some(idle) = idle {
            self.idle = idle;
        }
        if let Some(ttl) = ttl {
            self.expires = ttl.map(|ttl| Instant::now() + ttl);
        }
        self.is_written = false;
        let own_idle = self.idle;
        self.sandbox.status.send_modify(|status| {
            status.idle = own_idle;
            if let Some(ttl) = ttl {
                status.expires = ttl.map(|ttl| SystemTime::now() + ttl);
            }
        });
    }

    fn measure(&self, reply: oneshot::Sender<Option<crate::Usage>>) {
        let process = self.runner.process.try_clone();
        tokio::task::spawn_blocking(move || {
            let meter = process.and_then(|process| Meter::open(&process));
            let usage = meter.ok().and_then(Meter::measure);
            // Who asked may have gone.
            let _ = reply.send(usage);
        });
    }

    fn start(&mut self, spec: ProcessSpec, reply: oneshot::Sender<StartReply>) {
        let (starting, started) = oneshot::channel();
        let id = self.next_process;
        let checked = match &spec.task {
            Some(_) => self.check_tasks(),
            None => self.check_processes(),
        };
        if let Err(error) = checked {
            let _ = starting.send(Err(error));
            let output = None;
            let _ = reply.send(StartReply { started, output });
            return;
        }
        let mut process = Process::new(id, &spec);
        let (output, limit) = if spec.follow {
            let (attachment, mut reader) = self.reader(id, FIRST_READER, 0, None);
            reader.ends_itself = true;
            let limit = reader.limit;
            process.readers.insert(FIRST_READER, reader);
            (Some(attachment), limit)
        } else {
            (None, 0)
        };
        process.deadline = spec.timeout.map(|limit| Instant::now() + limit);
        process.starting = Some(starting);
        let note = Note::of(&spec).encode();
        let own_env = self.sandbox.spec.env.iter();
        let env = own_env.filter(|(key, _)| !spec.env.iter().any(|(name, _)| name == key));
        let start = Start {
            env: env.chain(&spec.env).cloned().collect(),
            cwd: spec.cwd,
            stdin: spec.stdin,
            user: spec.user,
            terminal: spec.terminal,
            keep: Some(Keep {
                bytes: self.sandbox.limits.ring_bytes,
                limit,
            }),
            note,
            ..Start::new(
                id,
                match spec.task {
                    Some(task) => Program::Files(task),
                    None => Program::Command(spec.command),
                },
            )
        };
        let _ = reply.send(StartReply { started, output });
        // What does not fit has been told to who waits for the start.
        let _ = self.begin(process, start);
    }

    /// Whether one more process may run.
    pub(in crate::live) fn check_processes(&self) -> Result<(), LiveError> {
        let limit = self.sandbox.limits.processes_max;
        let running = self.processes.values();
        let running = running.filter(|process| !process.is_task && !process.info.state.is_over());
        if running.count() < limit {
            return Ok(());
        }
        self.note(Happening::LimitHit { limit: "processes" });
        Err(LiveError::TooMany {
            what: "processes run in this sandbox",
            count: limit,
        })
    }

    fn check_tasks(&self) -> Result<(), LiveError> {
        let limit = self.sandbox.limits.files_max;
        let tasks = self.processes.values().filter(|process| process.is_task);
        if tasks.count() < limit {
            return Ok(());
        }
        self.note(Happening::LimitHit { limit: "files" });
        Err(LiveError::TooMany {
            what: "files are in flight",
            count: limit,
        })
    }

    /// Asks the guest for a process, and enters it.
    pub(in crate::live) fn begin(
        &mut self,
        mut process: Process,
        start: Start,
    ) -> Result<ProcessId, LiveError> {
        let id = process.info.id;
        if let Err(error) = self.say(&HostMessage::Start(start)) {
            return Err(match process.starting.take() {
                Some(starting) => {
                    let _ = starting.send(Err(error));
                    LiveError::NoProcess(id)
                }
                None => error,
            });
        }
        self.next_process += 1;
        self.show(&process);
        self.processes.insert(id, process);
        self.forget_old();
        Ok(id)
    }

    pub(in crate::live) fn reader(
        &self,
        process: ProcessId,
        reader: ReaderId,
        at: u64,
        until: Option<u64>,
    ) -> (Attachment, Reader) {
        let (sender, pieces) = mpsc::unbounded_channel();
        let record = Reader::new(sender, at, until);
        let attachment = Attachment {
            process,
            reader,
            pieces,
            notices: self.sandbox.notices.clone(),
            at,
            limit: record.limit,
        };
        (attachment, record)
    }

    /// The oldest of those that have ended give way.
    fn forget_old(&mut self) {
        let over = self.processes.values().filter(|process| !process.is_task);
        let over =
            over.filter(|process| process.info.state.is_over() && process.readers.is_empty());
        let over: Vec<ProcessId> = over.map(|process| process.info.id).collect();
        let excess = over
            .len()
            .saturating_sub(self.sandbox.limits.ended_processes_max);
        for process in over.into_iter().take(excess) {
            self.forget(process);
        }
    }

    pub(super) fn forget(&mut self, process: ProcessId) {
        self.processes.remove(&process);
        self.sandbox.table().remove(&process);
        self.say_small(&HostMessage::Forget { process });
    }

    /// What is for its reader alone, as tasks with files are, ends with it.
    pub(super) fn end_abandoned(&mut self, process: ProcessId) {
        let known = self.processes.get(&process);
        let Some(known) = known.filter(|known| known.ends_with_reader && known.is_abandoned) else {
            return;
        };
        if known.is_task && known.info.state.is_over() {
            self.forget(process);
        } else if !known.info.state.is_over() {
            self.say_small(&HostMessage::Signal {
                process,
                signal: KILL,
                group: true,
            });
        }
    }

    fn input(&mut self, process: ProcessId, data: Vec<u8>) {
        let Some(known) = self.processes.get_mut(&process) else {
            return;
        };
        known.input_sent += data.len() as u64;
        // At most a chunk, which fits.
        let _ = self.say(&HostMessage::Stdin { process, data });
    }

    pub(super) fn take_notice(&mut self, notice: Notice) {
        match notice {
            Notice::More {
                process,
                reader,
                limit,
            } => {
                let known = self.processes.get_mut(&process);
                let Some(known) = known.and_then(|known| known.readers.get_mut(&reader)) else {
                    return;
                };
                let limit = known.until.map_or(limit, |until| limit.min(until));
                if limit <= known.limit {
                    return;
                }
                known.limit = limit;
                let from = known.at;
                self.say_small(&HostMessage::Follow {
                    process,
                    reader,
                    from,
                    limit,
                    holds: false,
                });
            }
            Notice::Shown { process } => self.shown(process),
            Notice::Gone { process, reader } => {
                let known = self.processes.get_mut(&process);
                if known.is_some_and(|known| known.readers.remove(&reader).is_some()) {
                    self.last_used = Instant::now();
                    self.say_small(&HostMessage::Unfollow { process, reader });
                    // What was displayed for it alone has nobody left to take it.
                    self.shown(process);
                }
                if let Some(known) = self.processes.get_mut(&process) {
                    known.is_abandoned |= reader == FIRST_READER;
                }
                self.end_abandoned(process);
                self.end_cell_of(process, reader);
            }
        }
    }
}
