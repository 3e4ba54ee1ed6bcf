//! A plain command in the lab in which this process runs.

use rustix::process::{Pid, Signal, kill_process_group};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use zygote_api::{CommandRequest, ErrorCode, ExecEvent, ExecInput, ExecResult, Failure, Octets};
use zygote_server::Input;

const PIECE_BYTES: usize = 64 * 1024;
/// What a command's children may still write after its end is waited for until they are silent for
/// this long.
const LAST_SILENCE_MAX: Duration = Duration::from_secs(1);

/// The command's process group. Dropped, it is killed.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // It may have ended.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Runs it to its end.
pub async fn run(
    request: CommandRequest,
    input: Input,
    signals: mpsc::Receiver<u8>,
    id: String,
    events: mpsc::Sender<ExecEvent>,
) -> Result<(), Failure> {
    let mut child = match command(&request)?.spawn() {
        Ok(child) => child,
        Err(error) => return tell_not_started(&request, &error, &events).await,
    };
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // Whoever asked may have gone; then this future is dropped.
    let _ = events.send(ExecEvent::Ready { id }).await;
    let out = pump(stdout, &events, |data| ExecEvent::Stdout { data });
    let err = pump(stderr, &events, |data| ExecEvent::Stderr { data });
    let ended = tokio::select! {
        ended = to_end(&mut child, out, err) => ended,
        never = forward(&group, signals) => match never {},
        failure = feed(stdin, input) => return Err(failure),
    };
    let status = ended.map_err(|error| Failure::internal(error.to_string()))?;
    // What it has left behind in the background may stay.
    group.0 = None;
    let signal = status.signal().and_then(|signal| u8::try_from(signal).ok());
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let result = ExecResult {
        exit_code: code.unwrap_or(128_u8.saturating_add(signal.unwrap_or(0))),
        signal,
        host: "lab".to_owned(),
        ..ExecResult::default()
    };
    let _ = events.send(ExecEvent::Result(Box::new(result))).await;
    Ok(())
}

fn command(request: &CommandRequest) -> Result<Command, Failure> {
    let word = |word: &Octets| OsStr::from_bytes(&word.0).to_owned();
    let [program, arguments @ ..] = &request.command[..] else {
        return Err(Failure::bad_request("command: it has no program"));
    };
    let directory = Path::new(OsStr::from_bytes(&request.cwd.0)).to_owned();
    let directory = if directory.is_dir() {
        directory
    } else {
        "/".into()
    };
    let mut command = Command::new(word(program));
    command
        .args(arguments.iter().map(word))
        .env_clear()
        .envs(
            request
                .env
                .iter()
                .map(|(key, value)| (word(key), word(value))),
        )
        .current_dir(directory)
        .stdin(if request.stdin_stream {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    for (key, value) in std::env::vars_os() {
        if key == zygote_lab::IN_LAB || key == crate::BUILDS_LOCK_HINT || key == "ZYGOTE_STATE_DIR"
        {
            command.env(key, value);
        }
    }
    Ok(command)
}

/// As a shell tells it.
async fn tell_not_started(
    request: &CommandRequest,
    error: &io::Error,
    events: &mpsc::Sender<ExecEvent>,
) -> Result<(), Failure> {
    let name = String::from_utf8_lossy(&request.command[0].0).into_owned();
    let (exit_code, code) = match error.kind() {
        io::ErrorKind::NotFound => (127, ErrorCode::ProgramNotFound),
        io::ErrorKind::PermissionDenied => (126, ErrorCode::ProgramNotExecutable),
        _ => (125, ErrorCode::ProgramNotStarted),
    };
    let failure = Failure::new(code, format!("cannot run {name}")).cause(error.to_string());
    let result = ExecResult {
        exit_code,
        host: "lab".to_owned(),
        error: Some(failure),
        ..ExecResult::default()
    };
    let _ = events.send(ExecEvent::Result(Box::new(result))).await;
    Ok(())
}

/// Waits for the command and for the end of its output.
async fn to_end(
    child: &mut Child,
    out: impl Future<Output = ()>,
    err: impl Future<Output = ()>,
) -> io::Result<ExitStatus> {
    let output = async { tokio::join!(out, err) };
    tokio::pin!(output);
    let mut is_over = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            _ = &mut output, if !is_over => is_over = true,
        }
    };
    if !is_over {
        // The pipes may be held by what it has left in the background.
        let _ = timeout(LAST_SILENCE_MAX, output).await;
    }
    Ok(status)
}

async fn pump(
    stream: Option<impl AsyncRead + Unpin>,
    events: &mpsc::Sender<ExecEvent>,
    wrap: fn(Octets) -> ExecEvent,
) {
    let Some(mut stream) = stream else { return };
    loop {
        let mut data = Vec::with_capacity(PIECE_BYTES);
        match stream.read_buf(&mut data).await {
            Ok(0) | Err(_) => return,
            Ok(_) => drop(events.send(wrap(data.into())).await),
        }
    }
}

/// Passes input on for as long as there is some; its end, and that of its reader, are waited out.
async fn feed(mut stdin: Option<ChildStdin>, mut input: Input) -> Failure {
    while let Some(line) = input.recv().await {
        match line {
            Ok(ExecInput::Stdin { data }) => {
                if let Some(open) = &mut stdin
                    && open.write_all(&data.0).await.is_err()
                {
                    stdin = None;
                }
            }
            Ok(ExecInput::StdinEnd) => stdin = None,
            Ok(_) => return Failure::bad_request("a command takes standard input alone"),
            Err(failure) => return failure,
        }
    }
    drop(stdin);
    std::future::pending().await
}

async fn forward(group: &Group, mut signals: mpsc::Receiver<u8>) -> std::convert::Infallible {
    while let Some(number) = signals.recv().await {
        if let Some(signal) = Signal::from_named_raw(number.into()) {
            group.signal(signal);
        }
    }
    std::future::pending().await
}
