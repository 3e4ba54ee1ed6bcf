//! One run: a fork, an identity, a program, its end.
//!
//! Fails closed: unless the fork's first word is that it has become somebody, with a sample of its
//! generator that no other fork has shown, nothing that it says counts.

use crate::conversation::{Broken, Listener, Speech, speak};
use crate::fork::{Fork, ForkError};
use crate::socket::ControlSocket;
use crate::usage::{Meter, Usage};
use crate::zygote::{Runner, Zygote};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;
use zygote_protocol::{
    AgentMessage, Buffering, ExitStatus, Got, HostMessage, ProcessId, Program, Put, Start,
    StartFailure, encode,
};
use zygote_runner::control::{FromRunner, decode};
use zygote_snapshot::RunKind;

/// How long to wait for the last words of a runner whose stream has ended.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);
/// How long putting files may take: hundreds of megabytes into an emulated guest.
const PUT_MAX: Duration = Duration::from_secs(1200);
/// How long a file or folder may take to come, likewise.
const GET_MAX: Duration = Duration::from_secs(1200);
/// Most of one.
const GET_MAX_BYTES: u64 = 1 << 30;
/// Most files and folders in one.
const GET_MAX_ENTRIES: usize = 100_000;
/// How long a killed program's end is waited for before its files are taken.
const KILLED_MAX: Duration = Duration::from_secs(10);
/// How long measuring may take: the kernel walks the page tables.
const MEASURE_MAX: Duration = Duration::from_secs(10);
/// The run's only process.
/// Its process; a template that was made of a sandbox has others, of smaller numbers.
const PROCESS: ProcessId = ProcessId::MAX;

/// What to run.
#[derive(Debug)]
pub struct RunRequest {
    /// The program.
    pub program: Program,
    /// Variables for its environment.
    pub env: Vec<(String, String)>,
    /// Directory in the guest; empty: `/root`.
    pub cwd: String,
    /// Standard input.
    pub stdin: Stdin,
    /// When Python's output is passed on.
    pub buffering: Buffering,
    /// What is put into the guest before it starts, in this order.
    pub puts: Option<mpsc::Receiver<Put>>,
    /// Signals for it and for what it has started.
    pub signals: Option<mpsc::Receiver<u8>>,
    /// Files and folders that are wanted once it has ended, or was killed at its time limit.
    pub gets: Vec<Vec<u8>>,
    /// How long the program may run, from its start; `None`: as long as it likes.
    pub timeout: Option<Duration>,
    /// Whether to measure at its end what the sandbox has cost.
    pub measure: bool,
}

impl RunRequest {
    /// What it will touch: Python's own variables are read only at its start, so who sets one gets an
    /// interpreter that is started like any program.
    #[must_use]
    pub fn kind(&self) -> RunKind {
        let is_python = matches!(self.program, Program::Python { .. });
        if is_python && !self.env.iter().any(|(key, _)| key.starts_with("PYTHON")) {
            RunKind::Python
        } else {
            RunKind::Command
        }
    }
}

/// A program's standard input.
#[derive(Debug)]
pub enum Stdin {
    /// At its end from the start.
    Empty,
    /// Chunks, until the sender is dropped.
    Stream(mpsc::Receiver<Vec<u8>>),
}

/// What happens while a program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The fork is somebody, and the program can begin.
    Activated {
        /// The sandbox's id.
        id: Uuid,
    },
    /// Bytes of standard output.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// A piece of what was wanted.
    Got {
        /// Which of those that were asked for.
        index: usize,
        /// The piece.
        got: Got,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The program ended.
    Exited(ExitStatus),
    /// It was killed at its time limit.
    TimedOut,
    /// It could not be started in the guest.
    StartFailed {
        /// Why, as a shell tells it apart.
        reason: StartFailure,
        /// The sentence for the user.
        message: String,
    },
    /// The sandbox could not be made, or died under the program.
    Failed(String),
}

/// A run, ended.
#[derive(Clone, Debug)]
pub struct RunResult {
    /// The sandbox's id.
    pub id: Uuid,
    /// How it ended.
    pub outcome: Outcome,
    /// Request to activation, if it came to that.
    pub fork_time: Option<Duration>,
    /// Request to the program's first output, if it had any.
    pub first_output_time: Option<Duration>,
    /// Activation to the program's end.
    pub exec_time: Option<Duration>,
    /// Request to end.
    pub total_time: Duration,
    /// What the sandbox cost at its end.
    pub usage: Option<Usage>,
}

/// Runs a program in a fresh fork. `events` gets its output as it comes; a receiver that does not
/// keep up slows the program down, one that is dropped is ignored. Dropping the future kills the
/// fork.
pub async fn run(zygote: &Zygote, request: RunRequest, events: mpsc::Sender<Event>) -> RunResult {
    let fork = Fork::of(zygote, request.kind());
    run_in(zygote, Instant::now(), fork, request, events).await
}

/// Runs a program in a fork of `zygote` that comes from elsewhere; `requested`: when its clock began.
pub(crate) async fn run_in(
    zygote: &Zygote,
    requested: Instant,
    fork: impl Future<Output = Result<Fork, ForkError>>,
    request: RunRequest,
    events: mpsc::Sender<Event>,
) -> RunResult {
    let mut clock = Clock::default();
    let mut id = Uuid::nil();
    let conducted = conduct(zygote, fork, request, events, &mut clock, &mut id).await;
    let (outcome, usage) = match conducted {
        Ok((outcome, usage)) => (outcome, usage),
        Err(error) => (Outcome::Failed(error.to_string()), None),
    };
    let ended = clock.ended.unwrap_or_else(Instant::now);
    RunResult {
        id,
        outcome,
        fork_time: clock.activated.map(|at| at - requested),
        first_output_time: clock.first_output.map(|at| at - requested),
        exec_time: clock.activated.map(|at| ended - at),
        total_time: ended - requested,
        usage,
    }
}

#[derive(Default)]
struct Clock {
    activated: Option<Instant>,
    first_output: Option<Instant>,
    ended: Option<Instant>,
}

/// Our own failures, before the guest has a say.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Fork(#[from] ForkError),
    #[error("the request is too large to send: {0}")]
    TooLarge(String),
}

async fn conduct(
    zygote: &Zygote,
    fork: impl Future<Output = Result<Fork, ForkError>>,
    request: RunRequest,
    events: mpsc::Sender<Event>,
    clock: &mut Clock,
    id: &mut Uuid,
) -> Result<(Outcome, Option<Usage>), Failure> {
    let RunRequest {
        program,
        env,
        cwd,
        stdin,
        buffering,
        puts,
        signals,
        gets,
        timeout: limit,
        measure,
    } = request;
    let start = Start {
        env,
        cwd,
        stdin: matches!(stdin, Stdin::Stream(_)),
        buffering,
        ..Start::new(PROCESS, program)
    };
    let (more, also) = mpsc::channel(1);
    let speech = Speech {
        process: PROCESS,
        puts,
        start: message(&HostMessage::Start(start))?,
        input: match stdin {
            Stdin::Empty => None,
            Stdin::Stream(chunks) => Some(chunks),
        },
        signals,
        more: (!gets.is_empty()).then_some(also),
    };
    let Fork {
        id: own,
        identity,
        stream,
        control,
        mut runner,
        kind: _,
        busy: _busy,
    } = fork.await?;
    *id = own;
    let opening = message(&HostMessage::Activate(identity))?;
    let (read, write) = stream.into_split();
    let mut listener = Listener::new(read);
    let limits = Limits {
        activate: zygote.patience(),
        start: if speech.puts.is_some() {
            PUT_MAX
        } else {
            zygote.patience()
        },
        run: limit,
    };
    let heard = {
        let wanted = Wanted { gets, say: more };
        let listening = listen(zygote, own, &mut listener, &events, clock, &limits, &wanted);
        converse(listening, speak(write, opening, speech)).await
    };
    clock.ended.get_or_insert_with(Instant::now);
    let mut usage = None;
    if measure && heard.is_ok() {
        // What its guest's kernel does from here on is nobody's cost.
        runner.stop();
        usage = timeout(MEASURE_MAX, Meter::of(&runner))
            .await
            .ok()
            .flatten();
    }
    let outcome = match heard {
        Ok(outcome) => outcome,
        Err(Broken::Nonsense(what)) => Outcome::Failed(format!("the guest sent nonsense: {what}")),
        Err(Broken::Ended) => {
            let why = last_words(&control, &mut runner).await;
            Outcome::Failed(format!("the sandbox has died: {why}"))
        }
    };
    // A program that has ended leaves nothing that anybody would wait for; what was stopped is gone
    // before that is said.
    match outcome {
        Outcome::Exited(_) => drop(runner),
        _ => {
            drop((listener, control));
            runner.end().await;
        }
    }
    Ok((outcome, usage))
}

fn message(message: &HostMessage) -> Result<Vec<u8>, Failure> {
    encode(message).map_err(|e| Failure::TooLarge(e.to_string()))
}

/// Speaks while listening; ends with what was heard. The speaker's half of the stream stays open
/// until then: its end would be the stream's end for the agent.
async fn converse<H, S>(
    listening: impl Future<Output = H>,
    speaking: impl Future<Output = S>,
) -> H {
    tokio::pin!(listening, speaking);
    let mut said = None;
    loop {
        tokio::select! {
            heard = &mut listening => return heard,
            half = &mut speaking, if said.is_none() => said = Some(half),
        }
    }
}

/// How long each step of a run may take.
struct Limits {
    activate: Duration,
    start: Duration,
    run: Option<Duration>,
}

/// Listens to the fork from its first word to the program's end.
async fn listen(
    zygote: &Zygote,
    id: Uuid,
    listener: &mut Listener,
    events: &mpsc::Sender<Event>,
    clock: &mut Clock,
    limits: &Limits,
    wanted: &Wanted,
) -> Result<Outcome, Broken> {
    let refused = |why: &str| Ok(Outcome::Failed(format!("the fork is not used: {why}")));
    if let Some(why) = hear_activation(zygote, listener, limits.activate).await? {
        return refused(&why);
    }
    clock.activated = Some(Instant::now());
    // Whoever listens may have gone; the program runs on all the same.
    let _ = events.send(Event::Activated { id }).await;
    let Ok(first) = timeout(limits.start, listener.next()).await else {
        return refused("it did not start the program in time");
    };
    let end = follow(first?, listener, events, &mut clock.first_output);
    let outcome = match limits.run {
        None => end.await,
        Some(limit) => timeout(limit, end).await.unwrap_or(Ok(Outcome::TimedOut)),
    }?;
    if !wanted.gets.is_empty() {
        clock.ended = Some(Instant::now());
        wanted.fetch(&outcome, listener, events).await;
    }
    Ok(outcome)
}

/// The fork's first word: that it has become somebody, with a sample of its generator that no other has
/// shown. Otherwise gives back why it is not used.
pub(crate) async fn hear_activation(
    zygote: &Zygote,
    listener: &mut Listener,
    limit: Duration,
) -> Result<Option<String>, Broken> {
    let why = match timeout(limit, listener.next()).await {
        Err(_) => "it did not take its identity in time".to_owned(),
        Ok(Err(broken)) => return Err(broken),
        Ok(Ok(AgentMessage::Activated { random_sample })) => {
            if zygote.is_new_sample(&random_sample) {
                return Ok(None);
            }
            "its random numbers repeat those of another fork".to_owned()
        }
        Ok(Ok(AgentMessage::ActivateFailed { message })) => {
            format!("it could not take its identity: {message}")
        }
        Ok(Ok(_)) => "it spoke before it took its identity".to_owned(),
    };
    Ok(Some(why))
}

/// What is wanted of a program's files once it has ended.
struct Wanted {
    gets: Vec<Vec<u8>>,
    /// To who speaks to the agent.
    say: mpsc::Sender<HostMessage>,
}

impl Wanted {
    /// Has the files sent; one that cannot be had is told as an event.
    async fn fetch(
        &self,
        outcome: &Outcome,
        listener: &mut Listener,
        events: &mpsc::Sender<Event>,
    ) {
        if *outcome == Outcome::TimedOut {
            let kill = HostMessage::Signal {
                process: PROCESS,
                signal: 9,
                group: true,
            };
            let _ = self.say.send(kill).await;
            // What it has written last goes the usual way. One that does not end is left alone.
            let end = follow_to_end(listener, events);
            let _ = timeout(KILLED_MAX, end).await;
        }
        for (index, path) in self.gets.iter().enumerate() {
            let fetching = self.fetch_one(index, path, listener, events);
            let why = match timeout(GET_MAX, fetching).await {
                Ok(Ok(())) => continue,
                Ok(Err(Broken::Ended)) => "the sandbox has died".to_owned(),
                Ok(Err(Broken::Nonsense(what))) => format!("the guest sent nonsense: {what}"),
                Err(_) => format!("it has not come within {} s", GET_MAX.as_secs()),
            };
            let got = Got::Failed { message: why };
            let _ = events.send(Event::Got { index, got }).await;
        }
    }

    async fn fetch_one(
        &self,
        index: usize,
        path: &[u8],
        listener: &mut Listener,
        events: &mpsc::Sender<Event>,
    ) -> Result<(), Broken> {
        let path = path.to_vec();
        let said = self.say.send(HostMessage::Get { path }).await;
        said.map_err(|_| Broken::Ended)?;
        let (mut bytes, mut entries) = (0, 0);
        loop {
            let AgentMessage::Got(got) = listener.next().await? else {
                continue;
            };
            let is_last = matches!(got, Got::End | Got::Failed { .. });
            match &got {
                Got::Data { data } => bytes += data.len() as u64,
                _ => entries += 1,
            }
            if entries > GET_MAX_ENTRIES {
                let words = format!("over {GET_MAX_ENTRIES} files and folders");
                return Err(Broken::Nonsense(words));
            }
            if bytes > GET_MAX_BYTES {
                let most = GET_MAX_BYTES >> 20;
                return Err(Broken::Nonsense(format!(
                    "over {most} MiB of one file or folder"
                )));
            }
            // Who wanted it may have gone.
            let _ = events.send(Event::Got { index, got }).await;
            if is_last {
                return Ok(());
            }
        }
    }
}

/// Passes output on until a killed program has ended.
async fn follow_to_end(
    listener: &mut Listener,
    events: &mpsc::Sender<Event>,
) -> Result<(), Broken> {
    let first = listener.next().await?;
    follow(first, listener, events, &mut None).await.map(drop)
}

/// Passes output on until the program ends.
async fn follow(
    mut message: AgentMessage,
    listener: &mut Listener,
    events: &mpsc::Sender<Event>,
    first_output: &mut Option<Instant>,
) -> Result<Outcome, Broken> {
    loop {
        if let AgentMessage::Stdout { .. } | AgentMessage::Stderr { .. } = message {
            first_output.get_or_insert_with(Instant::now);
        }
        match message {
            AgentMessage::Stdout { data, .. } => drop(events.send(Event::Stdout(data)).await),
            AgentMessage::Stderr { data, .. } => drop(events.send(Event::Stderr(data)).await),
            AgentMessage::Exited { status, .. } => return Ok(Outcome::Exited(status)),
            AgentMessage::StartFailed {
                reason, message, ..
            } => return Ok(Outcome::StartFailed { reason, message }),
            AgentMessage::Refused { message } => {
                return Ok(Outcome::Failed(format!("the guest refused: {message}")));
            }
            _ => {}
        }
        message = listener.next().await?;
    }
}

/// Why a runner's stream has ended.
pub(crate) async fn last_words(control: &ControlSocket, runner: &mut Runner) -> String {
    let heard = async {
        loop {
            match control.receive().await {
                // From its beginning, or for an engine before this one.
                Ok(Some(bytes)) if !is_last(&bytes) => {}
                other => return other,
            }
        }
    };
    match timeout(LAST_WORDS_MAX, heard).await {
        Ok(Ok(Some(bytes))) => match decode(&bytes) {
            Ok(FromRunner::Stopped { reason, console }) => told(&reason, &console),
            _ => "its process sent nonsense".to_owned(),
        },
        Ok(_) => match timeout(LAST_WORDS_MAX, runner.ended()).await {
            Ok(Some(status)) => format!("its process has ended ({})", describe_status(status)),
            _ => "its process has ended".to_owned(),
        },
        Err(_) => "the guest's agent has hung up".to_owned(),
    }
}

fn is_last(bytes: &[u8]) -> bool {
    !matches!(
        decode(bytes),
        Ok(FromRunner::Parked | FromRunner::Branched { .. } | FromRunner::BranchFailed { .. })
    )
}

/// Why a machine has stopped, in a sentence.
pub(crate) fn told(reason: &str, console: &str) -> String {
    let console = console.trim();
    if console.is_empty() {
        reason.to_owned()
    } else {
        format!("{reason}\nthe guest's console said last:\n{console}")
    }
}

/// A wait status in words (wait(2)).
fn describe_status(status: i32) -> String {
    let signal = status & 0x7f;
    match signal {
        0 => format!("exit status {}", (status >> 8) & 0xff),
        9 => "killed by signal 9; was the host out of memory?".to_owned(),
        _ => format!("killed by signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_process_is_told_from_one_that_exited() {
        assert_eq!(describe_status(1 << 8), "exit status 1");
        assert_eq!(describe_status(11), "killed by signal 11");
        assert!(describe_status(9).contains("out of memory"));
    }
}
