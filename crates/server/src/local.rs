//! The engine of this process, asked in the API's words.

use crate::backend::Input;
use crate::live::{attached, freeze_limit, live_failure, moment_policy, sandbox_info};
use crate::request::{check, check_env, program, time_limit};
use crate::template::template_failure;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{Instrument, debug_span};
use zygote_access::Caller;
use zygote_api::{
    AttachRequest, Built, CreateEvent, ErrorCode, ExecEvent, ExecInput, ExecRequest, ExecResult,
    Failure, GetPiece, Octets, PlaceKind, PoolStatus, ProcessEvent, ProcessInput, PublishRequest,
    RunsStatus, SandboxInfo, SandboxRequest, SignalRequest,
};
use zygote_engine::live::{PublishSpec, SandboxSpec};
use zygote_engine::{
    Allowance, Buffering, Engine, EngineError, Event, ExitStatus, ForkError, Got, NoTurn, Note,
    Order, Outcome, Put, Quota, RunRequest, RunResult, STREAM_CHUNK_MAX_BYTES, StartFailure, Stdin,
    ZygoteError,
};

/// Events, puts and input that wait to be taken.
const WAITING_MAX: usize = 16;
/// After how long a busy engine is worth another try, in seconds.
const RETRY_AFTER_S: u32 = 1;

/// An engine.
pub struct Local {
    engine: Arc<Engine>,
    place: PlaceKind,
    signals: Mutex<HashMap<String, Signals>>,
}

/// The way for signals to a run, and whose it is.
type Signals = (Option<String>, mpsc::Sender<u8>);

impl Local {
    /// Of an engine whose machines run in `place`.
    pub fn new(engine: Arc<Engine>, place: PlaceKind) -> Self {
        Self {
            engine,
            place,
            signals: Mutex::default(),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    fn signals(&self) -> MutexGuard<'_, HashMap<String, Signals>> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`crate::Backend::exec`]; `ended` is told of the result first.
    ///
    /// # Errors
    /// If there is no sandbox for it.
    pub async fn exec(
        &self,
        caller: &Caller,
        request: ExecRequest,
        input: Input,
        events: mpsc::Sender<ExecEvent>,
        ended: &(dyn Fn(&ExecResult) + Sync),
    ) -> Result<(), Failure> {
        let limit = time_limit(request.timeout_seconds)?;
        let template = request.template.clone();
        check_walls(caller, request.allow_missing_walls)?;
        let (order, mut feeder, signals) = order(caller, request, limit)?;
        let (sender, mut happening) = mpsc::channel(WAITING_MAX);
        let notes = |note| {
            // Who does not keep up misses it.
            let _ = events.try_send(match note {
                Note::Doing(message) => ExecEvent::Progress { message },
                Note::Warning(message) => ExecEvent::Warning { message },
            });
        };
        let mut registered = Registered {
            local: self,
            tenant: caller.tenant.clone(),
            id: None,
        };
        let passing = async {
            while let Some(event) = happening.recv().await {
                if let Event::Activated { id } = &event {
                    registered.enter(id.to_string(), signals.clone());
                }
                // The program runs on though nobody listens; whoever asked for it ends it.
                let _ = events.send(told(event)).await;
            }
        };
        let running = async {
            let running = self.engine.run(order, sender, &notes);
            let (result, ()) = tokio::join!(running, passing);
            result
        };
        tokio::pin!(running);
        let ran = tokio::select! {
            ran = &mut running => ran,
            fed = feeder.feed(input) => match fed {
                Ok(()) => running.await,
                // Dropped, the run is killed.
                Err(failure) => return Err(failure),
            },
        };
        let result = ran.map_err(|error| failure(&error))?;
        let result = self.result(&template, limit, &result);
        ended(&result);
        let _ = events.send(ExecEvent::Result(Box::new(result))).await;
        Ok(())
    }

    /// See [`crate::Backend::signal`].
    ///
    /// # Errors
    /// If there is no such program, or no such signal.
    pub fn signal(&self, caller: &Caller, id: &str, request: SignalRequest) -> Result<(), Failure> {
        if !(1..=64).contains(&request.signal) {
            return Err(Failure::bad_request("signal: a number from 1 to 64"));
        }
        let known = self.signals();
        let known = known.get(id);
        let its = known.filter(|(tenant, _)| caller.owns(tenant.as_deref()));
        let sent = its.map(|(_, sender)| sender.try_send(request.signal));
        match sent {
            Some(Ok(())) => Ok(()),
            Some(Err(mpsc::error::TrySendError::Full(_))) => Err(Failure::new(
                ErrorCode::Busy,
                "signals come faster than the sandbox takes them",
            )
            .retry_after(RETRY_AFTER_S)),
            _ => Err(Failure::new(
                ErrorCode::SandboxNotFound,
                format!("there is no sandbox {id}, or it has ended"),
            )),
        }
    }

    /// See [`crate::Backend::create`].
    ///
    /// # Errors
    /// If it cannot be made.
    pub async fn create(
        &self,
        caller: &Caller,
        request: SandboxRequest,
        key: Option<&str>,
        events: &mpsc::Sender<CreateEvent>,
    ) -> Result<SandboxInfo, Failure> {
        check_env(&request.env)?;
        check_walls(caller, request.allow_missing_walls)?;
        let spec = SandboxSpec {
            template: request.template,
            build: request.build,
            name: request.name,
            tenant: caller.tenant.clone(),
            env: request.env.into_iter().collect(),
            ttl: time_limit(request.ttl_seconds)?,
            idle: time_limit(request.idle_seconds)?,
            allow_missing_walls: request.allow_missing_walls,
            moments: request.moments.map(moment_policy).transpose()?,
        };
        let notes = |note| {
            // Who does not keep up misses it.
            let _ = events.try_send(match note {
                Note::Doing(message) => CreateEvent::Progress { message },
                Note::Warning(message) => CreateEvent::Warning { message },
            });
        };
        let created = self
            .engine
            .create(spec, key, allowance(caller), &notes)
            .instrument(debug_span!("create"))
            .await;
        let sandbox = created.map_err(|error| live_failure(&error))?;
        Ok(sandbox_info(&sandbox))
    }

    /// See [`crate::Backend::publish`]. The caller holds the lock of builds.
    ///
    /// # Errors
    /// If there is no such sandbox, or no template can be made of it.
    pub async fn publish(
        &self,
        caller: &Caller,
        id: &str,
        request: PublishRequest,
    ) -> Result<Built, Failure> {
        let sandbox = self.engine.live().find(id, caller.tenant.as_deref());
        let sandbox = sandbox.map_err(|error| live_failure(&error))?;
        let spec = PublishSpec {
            name: request.template,
            moment: request.at,
            limit: freeze_limit(request.freeze_seconds)?,
            anyway: request.force,
        };
        let published = self.engine.publish(&sandbox, &spec).await;
        let template = published.map_err(|error| live_failure(&error))?;
        let build = self.engine.settings().store.current(&template.name);
        let build = build.map_err(|error| crate::template_failure(&error))?;
        Ok(Built {
            is_new: true,
            info: crate::template_info(build, template),
        })
    }

    /// See [`crate::Backend::attach`].
    ///
    /// # Errors
    /// If there is no such process.
    pub async fn attach(
        &self,
        caller: &Caller,
        id: &str,
        process: u32,
        request: AttachRequest,
        input: mpsc::Receiver<ProcessInput>,
        events: mpsc::Sender<ProcessEvent>,
    ) -> Result<(), Failure> {
        let found = self.engine.live().find(id, caller.tenant.as_deref());
        let sandbox = found.map_err(|error| live_failure(&error))?;
        attached(sandbox, process, request, input, events).await
    }

    /// What is loaded.
    pub async fn pools(&self) -> Vec<PoolStatus> {
        let loaded = self.engine.status().await;
        let told = loaded.into_iter().map(|loaded| PoolStatus {
            template: loaded.template,
            build: loaded.build,
            replica: loaded.replica,
            idle: loaded.pool.idle,
            hits: loaded.pool.hits,
            misses: loaded.pool.misses,
            refills: loaded.pool.made,
            refills_us: u64::try_from(loaded.pool.making.as_micros()).unwrap_or(u64::MAX),
            lost: loaded.pool.lost,
        });
        told.collect()
    }

    /// Who runs, and what has come of the others.
    pub fn runs(&self) -> RunsStatus {
        let (stats, limits) = (self.engine.runs(), self.engine.settings().queue);
        RunsStatus {
            running: stats.running,
            running_max: limits.running_max as u64,
            waiting: stats.waiting,
            waiting_max: limits.waiting_max as u64,
            ended: stats.ended,
            refused: stats.refused,
            cancelled: stats.cancelled,
        }
    }

    fn result(&self, template: &str, limit: Option<Duration>, result: &RunResult) -> ExecResult {
        let (signal, out_of_memory) = match result.outcome {
            Outcome::Exited(ExitStatus::Signal {
                signal,
                out_of_memory,
            }) => (Some(signal), out_of_memory),
            _ => (None, false),
        };
        ExecResult {
            id: result.id.to_string(),
            template: template.to_owned(),
            host: self.place.name().to_owned(),
            exit_code: exit_code(&result.outcome),
            signal,
            timed_out: result.outcome == Outcome::TimedOut,
            out_of_memory,
            fork_time_ms: result.fork_time.map(milliseconds),
            first_output_time_ms: result.first_output_time.map(milliseconds),
            exec_time_ms: result.exec_time.map(milliseconds),
            total_time_ms: milliseconds(result.total_time),
            memory_private_kib: result.usage.map(|usage| usage.private_kib),
            error: told_beside(template, &result.outcome, limit),
            ..ExecResult::default()
        }
    }
}

/// A run that can be sent signals, until it is dropped.
struct Registered<'a> {
    local: &'a Local,
    tenant: Option<String>,
    id: Option<String>,
}

impl Registered<'_> {
    fn enter(&mut self, id: String, signals: mpsc::Sender<u8>) {
        let signals = (self.tenant.clone(), signals);
        self.local.signals().insert(id.clone(), signals);
        self.id = Some(id);
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.local.signals().remove(id);
        }
    }
}

/// Milliseconds to the microsecond.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// What the engine is to run, and what goes into it while it does.
fn order(
    caller: &Caller,
    request: ExecRequest,
    timeout: Option<Duration>,
) -> Result<(Order, Feeder, mpsc::Sender<u8>), Failure> {
    check(&request)?;
    let program = program(&request)?;
    let has_files = request.files_stream || !request.files.is_empty();
    let (puts, taken_puts) = mpsc::channel(WAITING_MAX);
    let is_stream = request.stdin_stream || request.stdin.is_some();
    let (stdin, taken_stdin) = mpsc::channel(WAITING_MAX);
    let (signals, taken_signals) = mpsc::channel(WAITING_MAX);
    let gets = wanted(&request.cwd, request.get);
    let files = request.files.into_iter();
    let files = files.flat_map(|file| whole_file(file.path, file.mode, file.content));
    let feeder = Feeder {
        files: files.collect(),
        more_files: request.files_stream,
        input: request.stdin.map(|octets| octets.0),
        more_input: request.stdin_stream,
        puts: has_files.then_some(puts),
        stdin: is_stream.then_some(stdin),
    };
    let order = Order {
        template: request.template,
        build: request.build,
        allow_missing_walls: request.allow_missing_walls,
        tenant: caller.tenant.clone(),
        whose: caller.key.clone().unwrap_or_default(),
        quota: allowance(caller).quota,
        request: RunRequest {
            program,
            env: request.env.into_iter().collect(),
            cwd: request.cwd,
            stdin: if is_stream {
                Stdin::Stream(taken_stdin)
            } else {
                Stdin::Empty
            },
            buffering: match (request.unbuffered, request.line_buffered) {
                (true, _) => Buffering::None,
                (false, true) => Buffering::Line,
                (false, false) => Buffering::Full,
            },
            gets,
            puts: has_files.then_some(taken_puts),
            signals: Some(taken_signals),
            timeout,
            measure: request.measure,
        },
    };
    Ok((order, feeder, signals))
}

/// What somebody may have, in the engine's words.
pub(crate) fn allowance(caller: &Caller) -> Allowance {
    let limits = &caller.limits;
    Allowance {
        sandboxes: limits.sandboxes,
        quota: Quota {
            memory_bytes: limits.memory_bytes,
            cpus: limits.cpus,
        },
    }
}

/// What stands between an engine and untrusted code is not for those to say who bring it.
fn check_walls(caller: &Caller, allow_missing: bool) -> Result<(), Failure> {
    if allow_missing && caller.tenant.is_some() {
        let message = "allow_missing_walls: this is for the engine's owner to say";
        return Err(Failure::new(ErrorCode::Forbidden, message));
    }
    Ok(())
}

fn whole_file(path: Octets, mode: u32, content: Octets) -> Vec<Put> {
    let data = chunks(content).map(|data| Put::Data { data });
    let file = Put::File { path: path.0, mode };
    std::iter::once(file).chain(data).collect()
}

/// Gives a run its files and its input, in order.
struct Feeder {
    files: Vec<Put>,
    more_files: bool,
    input: Option<Vec<u8>>,
    more_input: bool,
    puts: Option<mpsc::Sender<Put>>,
    stdin: Option<mpsc::Sender<Vec<u8>>>,
}

impl Feeder {
    /// Ends when all has been taken, or nobody takes any more.
    async fn feed(&mut self, mut input: Input) -> Result<(), Failure> {
        if let Some(puts) = &self.puts {
            for put in self.files.drain(..) {
                if puts.send(put).await.is_err() {
                    return Ok(());
                }
            }
        }
        if !self.more_files {
            self.puts = None;
        }
        if let (Some(stdin), Some(bytes)) = (&self.stdin, self.input.take()) {
            for chunk in chunks(bytes.into()) {
                if stdin.send(chunk).await.is_err() {
                    return Ok(());
                }
            }
        }
        if !self.more_input {
            self.stdin = None;
        }
        while let Some(line) = input.recv().await {
            self.take(line?).await?;
        }
        // The end of the lines is the end of all.
        (self.puts, self.stdin) = (None, None);
        Ok(())
    }

    async fn take(&mut self, line: ExecInput) -> Result<(), Failure> {
        match line {
            ExecInput::Folder { path, mode } => self.put(Put::Folder { path: path.0, mode }).await,
            ExecInput::File { path, mode } => self.put(Put::File { path: path.0, mode }).await,
            ExecInput::Data { data } => {
                for chunk in chunks(data) {
                    self.put(Put::Data { data: chunk }).await?;
                }
                Ok(())
            }
            ExecInput::Link { path, target } => {
                let (path, target) = (path.0, target.0);
                self.put(Put::Link { path, target }).await
            }
            ExecInput::Failed { message } => self.put(Put::Failed { message }).await,
            ExecInput::Start => {
                self.puts = None;
                Ok(())
            }
            ExecInput::Stdin { data } => self.write(data).await,
            ExecInput::StdinEnd => {
                (self.puts, self.stdin) = (None, None);
                Ok(())
            }
        }
    }

    async fn put(&mut self, put: Put) -> Result<(), Failure> {
        let Some(puts) = &self.puts else {
            return Err(unexpected("a file", "files_stream"));
        };
        // The sandbox has gone: its run tells.
        let _ = puts.send(put).await;
        Ok(())
    }

    async fn write(&mut self, data: Octets) -> Result<(), Failure> {
        self.puts = None;
        let Some(stdin) = &self.stdin else {
            return Err(unexpected("stdin", "stdin_stream"));
        };
        for chunk in chunks(data) {
            // A program that reads no more, or has ended.
            let _ = stdin.send(chunk).await;
        }
        Ok(())
    }
}

fn unexpected(what: &str, field: &str) -> Failure {
    Failure::bad_request(format!(
        "a line with {what}, though {field} is not set or its end has come"
    ))
}

/// As the agent takes them.
fn chunks(data: Octets) -> impl Iterator<Item = Vec<u8>> {
    let mut rest = data.0;
    std::iter::from_fn(move || {
        let after = rest.split_off(rest.len().min(STREAM_CHUNK_MAX_BYTES));
        let chunk = std::mem::replace(&mut rest, after);
        (!chunk.is_empty()).then_some(chunk)
    })
}

fn told(event: Event) -> ExecEvent {
    match event {
        Event::Activated { id } => ExecEvent::Ready { id: id.to_string() },
        Event::Stdout(data) => ExecEvent::Stdout { data: data.into() },
        Event::Stderr(data) => ExecEvent::Stderr { data: data.into() },
        Event::Got { index, got } => ExecEvent::Get {
            index,
            piece: piece(got),
        },
    }
}

fn piece(got: Got) -> GetPiece {
    match got {
        Got::Folder { path, mode } => GetPiece::Folder {
            path: path.into(),
            mode,
        },
        Got::File { path, mode, bytes } => GetPiece::File {
            path: path.into(),
            mode,
            bytes,
        },
        Got::Data { data } => GetPiece::Data { data: data.into() },
        Got::Link { path, target } => GetPiece::Link {
            path: path.into(),
            target: target.into(),
        },
        Got::End => GetPiece::End,
        Got::Failed { message } => GetPiece::Failed {
            error: Failure::new(ErrorCode::GetFailed, printable(&message)),
        },
    }
}

/// Paths that are wanted, from where the program runs.
fn wanted(cwd: &str, paths: Vec<Octets>) -> Vec<Vec<u8>> {
    let within = |path: Octets| match path.0.first() {
        Some(b'/') => path.0,
        _ => [cwd.as_bytes(), b"/", &path.0[..]].concat(),
    };
    let is_home = cwd.is_empty();
    let paths = paths.into_iter();
    paths
        .map(|path| if is_home { path.0 } else { within(path) })
        .collect()
}

/// The exit code that tells a shell how a run ended.
fn exit_code(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Exited(ExitStatus::Code(code)) => *code,
        Outcome::Exited(ExitStatus::Signal { signal, .. }) => 128_u8.saturating_add(*signal),
        // timeout(1)'s.
        Outcome::TimedOut => 124,
        Outcome::StartFailed { reason, .. } => start_code(*reason),
        Outcome::Failed(_) => 125,
    }
}

/// The exit code of what did not start.
pub(crate) fn start_code(reason: StartFailure) -> u8 {
    match reason {
        StartFailure::NotFound => 127,
        StartFailure::NotExecutable => 126,
        StartFailure::Other => 125,
    }
}

/// What people are told beside the program's own words; usually nothing.
fn told_beside(template: &str, outcome: &Outcome, limit: Option<Duration>) -> Option<Failure> {
    match outcome {
        Outcome::Exited(ExitStatus::Code(_)) => None,
        Outcome::Exited(ExitStatus::Signal { out_of_memory, .. }) => out_of_memory.then(|| {
            let message = "the program was killed because the guest ran out of memory";
            Failure::new(ErrorCode::OutOfMemory, message).remedy(format!(
                "build the template with more, such as: zygote template build {template} --memory 2G"
            ))
        }),
        Outcome::TimedOut => {
            let limit = limit.unwrap_or_default();
            let message = format!("the program was killed at its time limit of {limit:?}");
            let remedy = "give it more with --timeout (timeout_seconds), or 0 for no limit";
            Some(Failure::new(ErrorCode::TimedOut, message).remedy(remedy))
        }
        Outcome::StartFailed { message, reason } => {
            let code = match reason {
                StartFailure::NotFound => ErrorCode::ProgramNotFound,
                StartFailure::NotExecutable => ErrorCode::ProgramNotExecutable,
                StartFailure::Other => ErrorCode::ProgramNotStarted,
            };
            Some(Failure::new(code, printable(message)))
        }
        Outcome::Failed(message) => {
            Some(Failure::new(ErrorCode::SandboxDied, printable(message)))
        }
    }
}

/// A sentence in which a guest may have had its word, for a terminal: no control characters but the
/// ends of lines.
pub(crate) fn printable(text: &str) -> String {
    let shown = |letter: char| match letter {
        '\n' => letter,
        '\t' => ' ',
        letter if letter.is_control() => '\u{fffd}',
        letter => letter,
    };
    text.chars().map(shown).collect()
}

/// A failure of the engine in the API's words.
pub(crate) fn failure(error: &EngineError) -> Failure {
    let with = |code| Failure::of(code, error);
    match error {
        EngineError::NoTurn(NoTurn::Closed) => with(ErrorCode::Stopping).retry_after(RETRY_AFTER_S),
        EngineError::NoTurn(_) => with(ErrorCode::Busy)
            .remedy("try again later, or raise the engine's limits")
            .retry_after(RETRY_AFTER_S),
        EngineError::OverQuota(_) => with(ErrorCode::LimitReached)
            .remedy("wait for some to end, or have the key's limit raised")
            .retry_after(RETRY_AFTER_S),
        EngineError::Template(error) => template_failure(error),
        EngineError::MissingWalls(walls) => {
            with(ErrorCode::MissingWalls).remedy(EngineError::walls_remedy(walls))
        }
        EngineError::Fork {
            source: ForkError::Zygote(ZygoteError::NoRoom(_)),
            ..
        } => with(ErrorCode::NoRoom).retry_after(RETRY_AFTER_S),
        EngineError::Fork {
            source: ForkError::Zygote(ZygoteError::Refused(_)),
            template,
        } => with(ErrorCode::TemplateUnusable).remedy(format!(
            "build it again: zygote template build {template} --force"
        )),
        EngineError::Fork { .. } => with(ErrorCode::Internal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_the_code_that_shells_know() {
        let signal = |signal| {
            Outcome::Exited(ExitStatus::Signal {
                signal,
                out_of_memory: false,
            })
        };
        let start = |reason| Outcome::StartFailed {
            reason,
            message: String::new(),
        };
        let cases = [
            (Outcome::Exited(ExitStatus::Code(7)), 7),
            (signal(9), 137),
            (signal(64), 192),
            (Outcome::TimedOut, 124),
            (start(StartFailure::NotFound), 127),
            (start(StartFailure::NotExecutable), 126),
            (start(StartFailure::Other), 125),
            (Outcome::Failed(String::new()), 125),
        ];
        for (outcome, code) in cases {
            assert_eq!(exit_code(&outcome), code, "{outcome:?}");
        }
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal_by_way_of_our_sentences() {
        let message = "died\u{1b}]0;owned\u{7}\r\nlast words\u{9b}2J".to_owned();
        let told = told_beside("python", &Outcome::Failed(message), None)
            .unwrap()
            .message;
        assert!(told.contains("died") && told.contains("\nlast words"));
        assert!(
            !told
                .chars()
                .any(|letter| letter.is_control() && letter != '\n')
        );
    }
}
