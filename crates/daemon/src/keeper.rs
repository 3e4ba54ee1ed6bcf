//! The lab that a daemon keeps: started when it is first needed, up until the daemon ends or the lab
//! dies; then the next who needs it gets a new one.
//!
//! In it runs an engine as this one, and answers over a port as this one does over its socket.

use crate::config::LabSettings;
use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tokio::time::timeout;
use zygote_api::{ErrorCode, Failure, LabStatus, StopRequest, with_causes};
use zygote_client::{Client, ClientError};
use zygote_lab::{Handle, LabCommand, LabConfig, LabError, Streams, hold, prepare};
use zygote_template::Store;

/// The engine in a lab that is up answers within seconds, more on a busy machine.
const ANSWER_MAX: Duration = Duration::from_secs(180);
/// How long a lab may take to end by itself: it writes back what it has changed.
const END_MAX: Duration = Duration::from_secs(15);
/// How long the reason of a lab's end is waited for, once its connection is gone.
const REASON_MAX: Duration = Duration::from_secs(3);
const CPUS: u8 = 1;
/// What the engine in a lab says first on its port, once it listens.
pub const GREETING: &[u8] = b"zygote\n";

/// Owns the lab's state; whoever wants it watches.
pub struct Keeper {
    settings: LabSettings,
    store: Store,
    states: watch::Sender<State>,
    starts: AtomicU64,
}

#[derive(Clone)]
enum State {
    /// There is none; with the reason, if the last one did not end well.
    Down { why: Option<String> },
    /// It is being started.
    Starting { number: u64, doing: String },
    /// There is one.
    Up(Arc<Lab>),
}

/// A lab that is up.
pub struct Lab {
    number: u64,
    /// To the engine in it.
    pub client: Client,
    handle: Handle,
    since: Instant,
}

impl Keeper {
    /// With no lab yet.
    pub fn new(settings: LabSettings, store: Store) -> Arc<Self> {
        Arc::new(Self {
            settings,
            store,
            states: watch::Sender::new(State::Down { why: None }),
            starts: AtomicU64::new(0),
        })
    }

    /// A lab that is up; starts one if there is none. `progress` gets a word on what is being done.
    pub async fn lab(
        self: &Arc<Self>,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<Arc<Lab>, Failure> {
        let mut states = self.states.subscribe();
        let mut has_waited = false;
        loop {
            let state = states.borrow_and_update().clone();
            match state {
                State::Up(lab) if !lab.client.is_closed() => return Ok(lab),
                // Its thread is about to say so.
                State::Up(lab) => drop(lab),
                State::Starting { doing, .. } => {
                    has_waited = true;
                    progress(&doing);
                }
                State::Down { why: Some(why) } if has_waited => return Err(died(&why)),
                State::Down { .. } => {
                    has_waited = true;
                    self.start();
                    continue;
                }
            }
            // A start has deadlines for each of its steps; the keeper lives as long as we do.
            if states.changed().await.is_err() {
                return Err(died("it is not kept any more"));
            }
        }
    }

    /// Begins to start one, unless there is one or somebody does.
    pub fn start(self: &Arc<Self>) {
        let number = self.starts.fetch_add(1, Ordering::Relaxed);
        let is_ours = self.states.send_if_modified(|state| {
            let is_down = matches!(state, State::Down { .. });
            if is_down {
                let doing = "starting the lab".to_owned();
                *state = State::Starting { number, doing };
            }
            is_down
        });
        if !is_ours {
            return;
        }
        let (keeper, runtime) = (Arc::clone(self), Runtime::current());
        let live = move || {
            let ended = keeper.live(number, &runtime);
            let why = match ended {
                Err(LabError::Ended) | Ok(0) => None,
                Ok(status) => Some(format!("the engine in it has ended with status {status}")),
                Err(error) => Some(with_causes(&error)),
            };
            tracing::info!(
                "the lab has ended{}",
                why.as_ref().map_or(String::new(), |why| format!(": {why}"))
            );
            keeper.states.send_replace(State::Down { why });
        };
        let started = std::thread::Builder::new().name("lab".into()).spawn(live);
        if let Err(error) = started {
            let why = Some(format!("cannot start a thread: {error}"));
            self.states.send_replace(State::Down { why });
        }
    }

    /// The life of a lab, on a thread of its own: QEMU dies with it.
    fn live(self: &Arc<Self>, number: u64, runtime: &Runtime) -> Result<u8, LabError> {
        let own = |operation| move |source| LabError::Own { operation, source };
        std::fs::create_dir_all(self.store.state_dir()).map_err(own("make the state directory"))?;
        let files = prepare(&self.store.cache(), &mut |doing| self.doing(number, doing));
        let files = files.map_err(|error| LabError::Own {
            operation: "prepare the lab",
            source: io::Error::other(with_causes(&error)),
        })?;
        self.doing(number, "starting the lab");
        let config = LabConfig {
            files,
            writable: vec![self.store.state_dir().to_owned()],
            memory_mib: self.settings.memory_mib,
            cpus: CPUS,
            icount: false,
        };
        let command = LabCommand {
            arguments: self.settings.command.clone(),
            environment: self.environment(),
            directory: "/".into(),
            stdin: false,
            timeout: None,
        };
        let streams = Streams {
            input: Box::new(io::empty()),
            output: Box::new(io::stderr()),
            error: Box::new(io::stderr()),
        };
        let (ours, theirs) = StdStream::pair().map_err(own("make a socket"))?;
        ours.set_nonblocking(true).map_err(own("make a socket"))?;
        tracing::info!(
            "starting a lab with {} MiB of memory",
            self.settings.memory_mib
        );
        hold(&config, &command, streams, theirs.into(), |handle| {
            let keeper = Arc::clone(self);
            runtime.spawn(async move {
                if let Err(error) = keeper.greet(number, ours, handle.clone()).await {
                    tracing::warn!("the engine in the lab does not answer: {error}");
                    handle.end();
                }
            });
        })
    }

    /// Waits until the engine in there answers.
    async fn greet(&self, number: u64, port: StdStream, handle: Handle) -> Result<(), ClientError> {
        let mut port = UnixStream::from_std(port).map_err(ClientError::Connect)?;
        let mut greeting = [0; GREETING.len()];
        let heard = timeout(ANSWER_MAX, port.read_exact(&mut greeting)).await;
        let heard = heard.map_err(|_| ClientError::Late(ANSWER_MAX))?;
        heard.map_err(ClientError::Connect)?;
        if greeting != *GREETING {
            return Err(ClientError::Nonsense("another greeting".to_owned()));
        }
        let client = Client::over(port).await?;
        client.health().await?;
        let lab = Arc::new(Lab {
            number,
            client,
            handle,
            since: Instant::now(),
        });
        let is_up = self.states.send_if_modified(|state| {
            let is_ours = matches!(state, State::Starting { number: n, .. } if *n == number);
            if is_ours {
                *state = State::Up(lab);
            }
            is_ours
        });
        if is_up {
            tracing::info!("the lab is up");
        }
        Ok(())
    }

    fn doing(&self, number: u64, what: &str) {
        self.states.send_if_modified(|state| match state {
            State::Starting { number: n, doing } if *n == number => {
                what.clone_into(doing);
                true
            }
            _ => false,
        });
    }

    fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut environment: Vec<(OsString, OsString)> = std::env::vars_os()
            .filter(|(key, _)| {
                !key.to_string_lossy().starts_with("ZYGOTE_") || key == "ZYGOTE_AGENT"
            })
            .collect();
        environment.push(("ZYGOTE_STATE_DIR".into(), self.store.state_dir().into()));
        if let Some(shared) = self.store.shared_dir() {
            environment.push(("ZYGOTE_SHARED_DIR".into(), shared.into()));
        }
        environment.push((crate::BUILDS_LOCK_HINT.into(), "held".into()));
        environment
    }

    /// Why a request to this lab broke off.
    pub async fn reason(&self, lab: &Lab, error: ClientError) -> Failure {
        if let ClientError::Refused(failure) = error {
            return *failure;
        }
        let mut states = self.states.subscribe();
        let is_other = |state: &State| match state {
            State::Up(now) => now.number != lab.number,
            State::Down { .. } | State::Starting { .. } => true,
        };
        let state = timeout(REASON_MAX, states.wait_for(is_other)).await;
        match state.as_ref().map(|state| state.as_deref()) {
            Ok(Ok(State::Down { why: Some(why) })) => died(why),
            _ => died(&error.to_string()),
        }
    }

    /// Ends it, if there is one: asks the engine in there, and waits for a while.
    pub async fn end(&self, now: bool) {
        let state = self.states.borrow().clone();
        let State::Up(lab) = state else {
            return self.end_start().await;
        };
        let request = StopRequest {
            now,
            if_idle: false,
        };
        // One that does not answer is killed.
        let asked = timeout(REASON_MAX, lab.client.stop(request)).await;
        let patience = if asked.is_ok() {
            END_MAX
        } else {
            Duration::ZERO
        };
        if !self.is_down_within(patience).await {
            lab.handle.end();
            self.is_down_within(END_MAX).await;
        }
    }

    /// One that is only being started comes up first, or fails.
    async fn end_start(&self) {
        if let Some(lab) = self.settled().await {
            lab.handle.end();
            self.is_down_within(END_MAX).await;
        }
    }

    async fn settled(&self) -> Option<Arc<Lab>> {
        let mut states = self.states.subscribe();
        let is_settled = |state: &State| !matches!(state, State::Starting { .. });
        let settled = timeout(ANSWER_MAX, states.wait_for(is_settled)).await;
        match settled.ok()?.ok().as_deref() {
            Some(State::Up(lab)) => Some(Arc::clone(lab)),
            _ => None,
        }
    }

    async fn is_down_within(&self, limit: Duration) -> bool {
        let mut states = self.states.subscribe();
        let is_down = |state: &State| matches!(state, State::Down { .. });
        timeout(limit, states.wait_for(is_down)).await.is_ok()
    }

    /// What is to be said of it.
    pub fn status(&self) -> LabStatus {
        let memory_max_bytes = u64::from(self.settings.memory_mib) << 20;
        let status = |state: &str| LabStatus {
            state: state.to_owned(),
            pid: None,
            uptime_seconds: None,
            memory_max_bytes,
            memory_bytes: None,
            last_failure: None,
        };
        match &*self.states.borrow() {
            State::Down { why } => LabStatus {
                last_failure: why.clone(),
                ..status("down")
            },
            State::Starting { .. } => status("starting"),
            State::Up(lab) => LabStatus {
                pid: Some(lab.handle.pid),
                uptime_seconds: Some(lab.since.elapsed().as_secs()),
                memory_bytes: resident_bytes(lab.handle.pid),
                ..status("up")
            },
        }
    }

    /// The lab, if it is up.
    pub fn is_up(&self) -> Option<Arc<Lab>> {
        match &*self.states.borrow() {
            State::Up(lab) if !lab.client.is_closed() => Some(Arc::clone(lab)),
            _ => None,
        }
    }
}

fn died(why: &str) -> Failure {
    let failure = Failure::new(
        ErrorCode::LabDied,
        "the lab, in which machines run here, has died",
    );
    let failure = failure.cause(why.trim()).retry_after(1);
    failure.remedy("run the command again, and a new one starts")
}

/// What a process has of the real memory (proc_pid_statm(5)).
fn resident_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
