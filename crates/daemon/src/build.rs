//! Building a template, from the daemon's side: processes that are started, listened to, and killed
//! when nobody wants them any more.

use crate::build_process::{Mode, Told};
use rustix::process::{Pid, Signal, kill_process_group};
use std::ffi::OsString;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use zygote_api::{BuildEvent, BuildRequest, Built, Failure};
use zygote_template::Store;

/// A process that builds. Dropped, it is killed, and what it has started too.
pub struct Builder {
    child: Child,
    /// Its input: it holds the lock of builds until that ends.
    _input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// How far it has come.
pub enum Step {
    /// The ingredients are there, and the lock is held until the builder is dropped.
    Gathered,
    /// The template is there.
    Built(Box<Built>),
}

impl Builder {
    /// Starts it.
    pub async fn start(
        command: &[OsString],
        mode: Mode,
        store: &Store,
        request: &BuildRequest,
    ) -> Result<Self, Failure> {
        let cannot = |error: std::io::Error| {
            Failure::internal("cannot start the process that builds").cause(error.to_string())
        };
        let [program, arguments @ ..] = command else {
            return Err(Failure::internal("there is no program that builds"));
        };
        let mut child = Command::new(program)
            .args(arguments)
            .arg(mode.word())
            .arg(store.state_dir())
            .args(store.shared_dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(cannot)?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::internal("the process that builds has no streams"));
        };
        let mut line = serde_json::to_vec(request).unwrap_or_default();
        line.push(b'\n');
        input.write_all(&line).await.map_err(cannot)?;
        Ok(Self {
            child,
            _input: input,
            output: BufReader::new(output).lines(),
        })
    }

    /// Passes progress on until it has come to a step's end. It keeps its own deadlines.
    pub async fn step(&mut self, events: &mpsc::Sender<BuildEvent>) -> Result<Step, Failure> {
        loop {
            let line = self.output.next_line().await.ok().flatten();
            let Some(line) = line else {
                let status = self.child.wait().await;
                let cause = status.map_or_else(|e| e.to_string(), |status| status.to_string());
                return Err(Failure::internal("the process that builds has died").cause(cause));
            };
            let told = serde_json::from_str(&line)
                .map_err(|_| Failure::internal("the process that builds talks nonsense"))?;
            match told {
                Told::Progress {
                    message,
                    done,
                    total,
                } => {
                    // Who does not keep up misses some.
                    let _ = events.try_send(BuildEvent::Progress {
                        message,
                        done,
                        total,
                    });
                }
                Told::Gathered => return Ok(Step::Gathered),
                Told::Built(built) => return Ok(Step::Built(built)),
                Told::Error { error } => return Err(error),
            }
        }
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        // What it has started is in its group; it may have ended already.
        let id = self
            .child
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(group) = id {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}
