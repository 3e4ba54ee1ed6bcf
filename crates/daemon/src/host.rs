//! What the daemon answers: from its own engine, or from the one in its lab.

use crate::activity::Activity;
use crate::build::{Builder, Step};
use crate::build_process::{BuildsLock, Mode, builds_lock};
use crate::config::{Config, Machines};
use crate::keeper::{Keeper, Lab};
use crate::{command, program};
use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use zygote_access::Caller;
use zygote_api::{
    AttachRequest, BuildEvent, BuildRequest, Built, CommandRequest, CreateEvent, ErrorCode,
    ExecEvent, ExecInput, ExecRequest, ExecResult, Failure, Health, ProcessEvent, ProcessInput,
    PublishRequest, Removed, SandboxEvents, SandboxInfo, SandboxList, SandboxRequest,
    SignalRequest, Status, StopRequest, Stopped, TemplateDetail, TemplateHealth, TemplateList,
    rfc3339,
};
use zygote_client::{ClientError, Events};
use zygote_engine::Engine;
use zygote_server::{
    Backend, Forwarded, Input, Local, Measured, Metrics, merged, recipe_failure, template_detail,
    template_failure, template_for, template_list, templates_ready,
};
use zygote_template::Store;

/// How long the engine in a lab may take to say how it is; its lab may be dying.
const STATUS_MAX: Duration = Duration::from_secs(5);
/// Input that waits for the lab.
const INPUT_MAX: usize = 4;

/// How far its end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// Not at all.
    Not,
    /// What runs may end, and nothing begins.
    Drain,
    /// What runs is killed.
    Now,
}

/// When names were given, what they stand for, and whose that is.
type Ready = (
    Vec<Option<SystemTime>>,
    BTreeMap<String, (Option<String>, TemplateHealth)>,
);

/// A daemon's insides.
pub struct Host {
    pub config: Config,
    pub local: Local,
    pub keeper: Arc<Keeper>,
    pub activity: Activity,
    pub ending: watch::Sender<Ending>,
    /// Signals for plain commands in this lab.
    commands: Mutex<HashMap<String, mpsc::Sender<u8>>>,
    metrics: Metrics,
    /// What can be forked, as it was when names were last given.
    ready: Mutex<Ready>,
    started: Instant,
    started_unix_s: u64,
}

impl Host {
    /// With nothing loaded, and no lab.
    pub fn new(config: Config) -> Arc<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Arc::new(Self {
            local: Local::new(Engine::new(config.engine.clone()), config.place),
            keeper: Keeper::new(config.lab.clone(), config.store().clone()),
            config,
            activity: Activity::new(),
            ending: watch::Sender::new(Ending::Not),
            commands: Mutex::default(),
            metrics: Metrics::default(),
            ready: Mutex::default(),
            started: Instant::now(),
            started_unix_s: now.unwrap_or_default().as_secs(),
        })
    }

    /// Sandboxes that live until they are ended, here or in the lab. One that does not say is dying.
    pub async fn live_count(&self) -> u64 {
        let own = self.local.engine().live().count() as u64;
        let lab = self.keeper.is_up();
        let Some(lab) = lab.filter(|_| self.config.machines == Machines::InLab) else {
            return own;
        };
        match timeout(STATUS_MAX, lab.client.status()).await {
            Ok(Ok(inner)) => own + inner.sandboxes,
            Ok(Err(_)) | Err(_) => own,
        }
    }

    /// Enters the paused sandboxes, where it has the machines.
    pub fn find_asleep(&self) -> usize {
        match self.config.machines {
            Machines::Here => self.local.engine().find_asleep(),
            Machines::InLab => 0,
        }
    }

    /// The lab; one that is not up is started if there is a paused sandbox, which it alone knows.
    async fn lab_with_sandboxes(&self) -> Result<Option<Arc<Lab>>, Failure> {
        if let Some(lab) = self.keeper.is_up() {
            return Ok(Some(lab));
        }
        if self.store().has_sandboxes() {
            return Ok(Some(self.keeper.lab(&|_: &str| ()).await?));
        }
        Ok(None)
    }

    async fn create_in_lab(
        &self,
        caller: &Caller,
        mut request: SandboxRequest,
        key: Option<&str>,
        events: &mpsc::Sender<CreateEvent>,
    ) -> Result<SandboxInfo, Failure> {
        if request.build.is_none() {
            request.build = Some(self.build_for(caller, &request.template)?);
        }
        let say = |message: &str| {
            let message = message.to_owned();
            let _ = events.try_send(CreateEvent::Progress { message });
        };
        let lab = self.keeper.lab(&say).await?;
        let creating = async {
            let behalf = caller.on_behalf();
            let client = lab.client.on_behalf(behalf.as_ref());
            let mut happening = client.create(&request, key).await?;
            while let Some(event) = happening.next().await? {
                match event {
                    CreateEvent::Created(created) => return Ok(*created),
                    CreateEvent::Error { error } => {
                        return Err(ClientError::Refused(Box::new(error)));
                    }
                    progress => drop(events.try_send(progress)),
                }
            }
            Err(ClientError::Broken("it ended without a result".to_owned()))
        };
        match creating.await {
            Ok(created) => Ok(created),
            Err(error) => Err(self.keeper.reason(&lab, error).await),
        }
    }

    fn store(&self) -> &Store {
        self.config.store()
    }

    fn commands(&self) -> MutexGuard<'_, HashMap<String, mpsc::Sender<u8>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to end, or hurries.
    pub fn end(&self, ending: Ending) {
        self.local.engine().close();
        self.ending.send_if_modified(|now| {
            let is_more = ending > *now;
            *now = ending.max(*now);
            is_more
        });
    }

    fn is_ending(&self) -> bool {
        *self.ending.borrow() != Ending::Not
    }

    fn check_open(&self) -> Result<(), Failure> {
        if self.is_ending() {
            let failure = Failure::new(ErrorCode::Stopping, "the engine is stopping");
            return Err(failure.retry_after(1));
        }
        Ok(())
    }

    /// Asks the engine in the lab, and passes on what it says.
    async fn pass<F>(
        &self,
        lab: &Arc<Lab>,
        asked: F,
        input: Input,
        lines: mpsc::Sender<ExecInput>,
        events: mpsc::Sender<ExecEvent>,
        ended: &(dyn Fn(&ExecEvent) + Sync),
    ) -> Result<(), Failure>
    where
        F: Future<Output = Result<Events<ExecEvent>, ClientError>>,
    {
        let passing = async {
            let mut happening = asked.await?;
            while let Some(event) = happening.next().await? {
                let is_last = matches!(event, ExecEvent::Result(_) | ExecEvent::Error { .. });
                ended(&event);
                // Whoever listens may have gone; then this is dropped.
                let _ = events.send(event).await;
                if is_last {
                    return Ok(());
                }
            }
            Err(ClientError::Broken("it ended without a result".to_owned()))
        };
        tokio::pin!(passing);
        let passed = tokio::select! {
            passed = &mut passing => passed,
            fed = feed(input, lines) => match fed {
                Ok(()) => passing.await,
                Err(failure) => return Err(failure),
            },
        };
        match passed {
            Ok(()) => Ok(()),
            Err(error) => Err(self.keeper.reason(lab, error).await),
        }
    }

    /// Names are this host's: the lab may remember an old one.
    fn build_for(&self, caller: &Caller, template: &str) -> Result<String, Failure> {
        let current = || self.store().current(template);
        let build = match &caller.tenant {
            Some(tenant) => {
                template_for(self.store(), template, Some(tenant)).and_then(|_| current())
            }
            None => current(),
        };
        build.map_err(|error| template_failure(&error))
    }

    async fn exec_in_lab(
        &self,
        caller: &Caller,
        mut request: ExecRequest,
        input: Input,
        events: mpsc::Sender<ExecEvent>,
    ) -> Result<(), Failure> {
        if request.build.is_none() {
            request.build = Some(self.build_for(caller, &request.template)?);
        }
        let lab = self.keeper.lab(&progress(&events)).await?;
        let (sender, lines) = mpsc::channel(INPUT_MAX);
        let behalf = caller.on_behalf();
        let client = lab.client.on_behalf(behalf.as_ref());
        let asked = client.exec(&request, Some(lines));
        let ended = |event: &ExecEvent| {
            if let ExecEvent::Result(result) = event {
                self.metrics.run_ended(result);
            }
        };
        self.pass(&lab, asked, input, sender, events, &ended).await
    }

    /// A recipe by its text, so that a lab needs no file of the host's.
    /// With the recipe's text: what is built is what was there when it was asked for.
    fn with_text(&self, request: BuildRequest) -> Result<BuildRequest, Failure> {
        if request.recipe_toml.is_some() {
            return Ok(request);
        }
        let name = &request.recipe;
        if name.ends_with(".toml") && !std::path::Path::new(name).is_absolute() {
            return Err(Failure::bad_request("recipe: the path must be absolute"));
        }
        let recipe = self.store().recipe(name);
        let origin = recipe.map_err(|error| recipe_failure(&error))?.origin;
        let path = origin.path.map(|path| path.to_string_lossy().into_owned());
        Ok(BuildRequest {
            recipe: path.unwrap_or_else(|| name.clone()),
            recipe_toml: Some(origin.text),
            ..request
        })
    }

    /// What is everybody's is not a tenant's to remove.
    fn check_removable(&self, caller: &Caller, name: &str) -> Result<(), Failure> {
        let Some(tenant) = &caller.tenant else {
            return Ok(());
        };
        let template = template_for(self.store(), name, Some(tenant));
        let template = template.map_err(|error| template_failure(&error))?;
        if caller.owns(template.tenant.as_deref()) {
            return Ok(());
        }
        let message =
            format!("the template {name} is everybody's, and not this tenant's to remove");
        Err(Failure::new(ErrorCode::Forbidden, message))
    }

    async fn builder(&self, mode: Mode, request: &BuildRequest) -> Result<Builder, Failure> {
        Builder::start(&self.config.builder, mode, self.store(), request).await
    }

    /// Keeps builds from going on at the same time, unless this program's other half does that already.
    async fn lock_builds(&self) -> Result<Option<File>, Failure> {
        match builds_lock() {
            BuildsLock::HeldOutside => return Ok(None),
            BuildsLock::OutOfReach => return Err(out_of_reach()),
            BuildsLock::OursToTake => {}
        }
        let store = self.store().clone();
        let locking = tokio::task::spawn_blocking(move || store.lock_builds(&mut |_| {}));
        let locked = locking
            .await
            .map_err(|error| Failure::internal(error.to_string()))?;
        locked.map(Some).map_err(|error| template_failure(&error))
    }

    async fn build_here(
        &self,
        request: &BuildRequest,
        events: &mpsc::Sender<BuildEvent>,
    ) -> Result<Built, Failure> {
        let mode = match builds_lock() {
            BuildsLock::OursToTake => Mode::Whole,
            BuildsLock::HeldOutside => Mode::Machine,
            BuildsLock::OutOfReach => return Err(out_of_reach()),
        };
        match self.builder(mode, request).await?.step(events).await? {
            Step::Built(built) => Ok(*built),
            Step::Gathered => Err(Failure::internal(
                "the process that builds stopped half-way",
            )),
        }
    }

    async fn build_in_lab(
        &self,
        request: &BuildRequest,
        events: &mpsc::Sender<BuildEvent>,
    ) -> Result<Built, Failure> {
        let mut gatherer = self.builder(Mode::Gather, request).await?;
        if let Step::Built(built) = gatherer.step(events).await? {
            return Ok(*built);
        }
        let say = |message: &str| {
            let message = message.to_owned();
            let _ = events.try_send(BuildEvent::Progress {
                message,
                done: None,
                total: None,
            });
        };
        let lab = self.keeper.lab(&say).await?;
        let building = async {
            let mut happening = lab.client.build(request).await?;
            while let Some(event) = happening.next().await? {
                match event {
                    BuildEvent::Built(built) => return Ok(*built),
                    BuildEvent::Error { error } => {
                        return Err(ClientError::Refused(Box::new(error)));
                    }
                    progress @ BuildEvent::Progress { .. } => drop(events.try_send(progress)),
                }
            }
            Err(ClientError::Broken("it ended without a result".to_owned()))
        };
        match building.await {
            Ok(built) => Ok(built),
            Err(error) => Err(self.keeper.reason(&lab, error).await),
        }
    }
}

fn out_of_reach() -> Failure {
    let failure = Failure::new(
        ErrorCode::BuildFailed,
        "in a lab that was started by hand nobody can tell whether another build goes on",
    );
    failure.remedy("build on the host, which starts a lab by itself")
}

/// Where there is no lab there are no sandboxes.
fn without_lab(request: &Forwarded) -> Result<Response, Failure> {
    let path = request.uri().path();
    match path.trim_start_matches("/v1/") {
        "sandboxes" => Ok(Json(SandboxList::default()).into_response()),
        "events" => Ok(Json(SandboxEvents::default()).into_response()),
        _ => Err(no_sandbox(path.split('/').nth(3).unwrap_or_default())),
    }
}

fn no_sandbox(id: &str) -> Failure {
    let message = format!("there is no sandbox {id}");
    let failure = Failure::new(ErrorCode::SandboxNotFound, message);
    failure.remedy("see which there are: zygote ps")
}

/// Tells of what takes its time; who does not keep up misses some.
fn progress(events: &mpsc::Sender<ExecEvent>) -> impl Fn(&str) + Sync + use<> {
    let events = events.clone();
    move |message: &str| {
        let message = message.to_owned();
        let _ = events.try_send(ExecEvent::Progress { message });
    }
}

async fn feed(mut input: Input, lines: mpsc::Sender<ExecInput>) -> Result<(), Failure> {
    while let Some(line) = input.recv().await {
        // The lab's engine has gone, or wants no more: it tells.
        if lines.send(line?).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// A command that can be sent signals, until it is dropped.
struct Registered<'a> {
    host: &'a Host,
    id: String,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.host.commands().remove(&self.id);
    }
}

impl Backend for Host {
    fn health(&self) -> Health {
        Health {
            status: if self.is_ending() { "stopping" } else { "ok" }.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            program: program::identity(),
            pid: std::process::id(),
            host: self.config.place,
            state_dir: self.store().state_dir().display().to_string(),
        }
    }

    fn templates_ready(&self, caller: Option<&Caller>) -> BTreeMap<String, TemplateHealth> {
        let mut known = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.store().named_at();
        if known.0 != now {
            *known = (now, templates_ready(self.store()));
        }
        let is_its = |tenant: &Option<String>| match caller {
            Some(caller) => caller.sees(tenant.as_deref()),
            None => tenant.is_none(),
        };
        let its = known.1.iter().filter(|(_, (tenant, _))| is_its(tenant));
        its.map(|(name, (_, health))| (name.clone(), *health))
            .collect()
    }

    async fn status(&self) -> Status {
        let (mut runs, mut templates) = (self.local.runs(), self.local.pools().await);
        let live = self.local.engine().live();
        let (mut sandboxes, mut not_held) = (live.count() as u64, live.why_not_held());
        if let Some(lab) = self
            .keeper
            .is_up()
            .filter(|_| self.config.machines == Machines::InLab)
            && let Ok(Ok(inner)) = timeout(STATUS_MAX, lab.client.status()).await
        {
            (runs, templates, sandboxes) = (inner.runs, inner.templates, inner.sandboxes);
            not_held = inner.sandboxes_not_held;
        }
        Status {
            health: self.health(),
            socket: self.config.socket.display().to_string(),
            log: self
                .config
                .log
                .as_ref()
                .map(|path| path.display().to_string()),
            uptime_seconds: self.started.elapsed().as_secs(),
            started: rfc3339(self.started_unix_s),
            started_unix_s: self.started_unix_s,
            idle_exit_seconds: self.config.idle_exit.map(|limit| limit.as_secs()),
            runs,
            sandboxes,
            sandboxes_not_held: not_held,
            templates,
            lab: (self.config.machines == Machines::InLab || self.keeper.status().state != "down")
                .then(|| self.keeper.status()),
        }
    }

    async fn stop(&self, request: StopRequest) -> Result<Stopped, Failure> {
        let running = self.activity.count();
        if request.if_idle && running > 0 {
            let message = format!("{running} runs or builds go on");
            let failure = Failure::new(ErrorCode::Conflict, message);
            return Err(failure.remedy("wait for them, or: zygote stop --now"));
        }
        let live = self.live_count().await;
        if !request.now && live > 0 {
            let message = format!("{live} sandboxes live, which do not end by themselves");
            let failure = Failure::new(ErrorCode::Conflict, message);
            return Err(failure.remedy("end them: zygote rm SANDBOX, or: zygote stop --now"));
        }
        self.end(if request.now {
            Ending::Now
        } else {
            Ending::Drain
        });
        Ok(Stopped {
            pid: std::process::id(),
            running,
        })
    }

    async fn exec(
        &self,
        caller: &Caller,
        request: ExecRequest,
        input: Input,
        events: mpsc::Sender<ExecEvent>,
    ) -> Result<(), Failure> {
        self.check_open()?;
        let _work = self.activity.run();
        let ended = |result: &ExecResult| self.metrics.run_ended(result);
        let ran = match self.config.machines {
            Machines::Here => {
                self.local
                    .exec(caller, request, input, events, &ended)
                    .await
            }
            Machines::InLab => self.exec_in_lab(caller, request, input, events).await,
        };
        ran.inspect_err(|failure| self.metrics.run_refused(failure))
    }

    fn counts(&self) -> &Metrics {
        &self.metrics
    }

    async fn metrics(&self) -> String {
        let status = self.status().await;
        if self.config.machines == Machines::Here {
            let engine = self.local.engine();
            let measured = Measured {
                census: engine.census().await,
                ended: engine.ended(),
            };
            return self.metrics.text(&status, Some(&measured));
        }
        let own = self.metrics.text(&status, None);
        let Some(lab) = self.keeper.is_up() else {
            return own;
        };
        // One that does not say is dying.
        match timeout(STATUS_MAX, lab.client.metrics()).await {
            Ok(Ok(other)) => merged(&own, &other),
            _ => own,
        }
    }

    async fn signal(
        &self,
        caller: &Caller,
        id: &str,
        request: SignalRequest,
    ) -> Result<(), Failure> {
        let command = self.commands().get(id).cloned();
        // Commands on the lab are the owner's.
        let command = command.filter(|_| caller.tenant.is_none());
        if let Some(command) = command {
            // One that takes none any more has ended.
            let _ = command.try_send(request.signal);
            return Ok(());
        }
        let own = self.local.signal(caller, id, request);
        let Some(lab) = self.keeper.is_up().filter(|_| own.is_err()) else {
            return own;
        };
        let client = lab.client.on_behalf(caller.on_behalf().as_ref());
        match client.signal(id, request.signal).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.keeper.reason(&lab, error).await),
        }
    }

    async fn lab_exec(
        &self,
        request: CommandRequest,
        input: Input,
        events: mpsc::Sender<ExecEvent>,
    ) -> Result<(), Failure> {
        self.check_open()?;
        let _work = self.activity.other();
        if self.config.lab_port {
            let (sender, signals) = mpsc::channel(INPUT_MAX);
            let id = uuid::Uuid::now_v7().to_string();
            self.commands().insert(id.clone(), sender);
            let registered = Registered { host: self, id };
            forget_host();
            let id = registered.id.clone();
            return command::run(request, input, signals, id, events).await;
        }
        if std::env::var_os(zygote_lab::IN_LAB).is_some() {
            let message = "this is a lab already, and none is started inside of one";
            return Err(Failure::new(ErrorCode::NoMachines, message));
        }
        let lab = self.keeper.lab(&progress(&events)).await?;
        let (sender, lines) = mpsc::channel(INPUT_MAX);
        let asked = lab.client.lab_exec(&request, Some(lines));
        self.pass(&lab, asked, input, sender, events, &|_| ()).await
    }

    async fn lab_down(&self) -> Result<(), Failure> {
        self.keeper.end(true).await;
        Ok(())
    }

    fn live(&self) -> Option<&Arc<Engine>> {
        (self.config.machines == Machines::Here).then(|| self.local.engine())
    }

    async fn create(
        &self,
        caller: &Caller,
        request: SandboxRequest,
        key: Option<String>,
        events: mpsc::Sender<CreateEvent>,
    ) -> Result<SandboxInfo, Failure> {
        self.check_open()?;
        let _work = self.activity.other();
        match self.config.machines {
            Machines::Here => {
                self.local
                    .create(caller, request, key.as_deref(), &events)
                    .await
            }
            Machines::InLab => {
                self.create_in_lab(caller, request, key.as_deref(), &events)
                    .await
            }
        }
    }

    async fn attach(
        &self,
        caller: &Caller,
        id: &str,
        process: u32,
        request: AttachRequest,
        input: mpsc::Receiver<ProcessInput>,
        events: mpsc::Sender<ProcessEvent>,
    ) -> Result<(), Failure> {
        if self.config.machines == Machines::Here {
            return self
                .local
                .attach(caller, id, process, request, input, events)
                .await;
        }
        let Some(lab) = self.keeper.is_up() else {
            return Err(no_sandbox(id));
        };
        let passing = async {
            let client = lab.client.on_behalf(caller.on_behalf().as_ref());
            let mut happening = client.attach(id, process, request, Some(input)).await?;
            while let Some(event) = happening.next().await? {
                if let ProcessEvent::Error { error } = event {
                    return Err(ClientError::Refused(Box::new(error)));
                }
                // Who does not listen any more drops this.
                let _ = events.send(event).await;
            }
            Ok(())
        };
        match passing.await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.keeper.reason(&lab, error).await),
        }
    }

    async fn forward(&self, caller: &Caller, request: Forwarded) -> Result<Response, Failure> {
        let Some(lab) = self.lab_with_sandboxes().await? else {
            return without_lab(&request);
        };
        let client = lab.client.on_behalf(caller.on_behalf().as_ref());
        match client.forward(request).await {
            Ok(answer) => Ok(answer.map(Body::new)),
            Err(error) => Err(self.keeper.reason(&lab, error).await),
        }
    }

    async fn templates(&self, caller: &Caller) -> Result<TemplateList, Failure> {
        Ok(template_list(self.store(), caller.tenant.as_deref()))
    }

    async fn template(&self, caller: &Caller, name: &str) -> Result<TemplateDetail, Failure> {
        let detail = template_detail(self.store(), name, caller.tenant.as_deref());
        detail.map_err(|error| template_failure(&error))
    }

    async fn remove(&self, caller: &Caller, name: &str, derived: bool) -> Result<Removed, Failure> {
        self.check_removable(caller, name)?;
        if self.config.lab_port {
            // The files are the host's, which has removed them.
            self.local.engine().forget(name);
            return Ok(Removed {
                template: name.to_owned(),
                freed_bytes: 0,
                kept_bytes: 0,
            });
        }
        let (store, removed) = (self.store().clone(), name.to_owned());
        let removing = tokio::task::spawn_blocking(move || store.remove(&removed, derived));
        let done = removing
            .await
            .map_err(|error| Failure::internal(error.to_string()))?;
        let removal = done.map_err(|error| template_failure(&error))?;
        self.local.engine().forget(name);
        if self.config.machines == Machines::InLab
            && let Some(lab) = self.keeper.is_up()
        {
            // One that does not hear it forgets it by and by.
            let _ = lab.client.remove_template(name, derived).await;
        }
        Ok(Removed {
            template: name.to_owned(),
            freed_bytes: removal.freed_bytes,
            kept_bytes: removal.kept_bytes,
        })
    }

    async fn publish(
        &self,
        caller: &Caller,
        id: &str,
        request: PublishRequest,
    ) -> Result<Built, Failure> {
        self.check_open()?;
        let _work = self.activity.other();
        let _lock = self.lock_builds().await?;
        if self.config.machines == Machines::Here {
            return self.local.publish(caller, id, request).await;
        }
        let Some(lab) = self.lab_with_sandboxes().await? else {
            return Err(no_sandbox(id));
        };
        let client = lab.client.on_behalf(caller.on_behalf().as_ref());
        match client.publish(id, &request).await {
            Ok(built) => Ok(built),
            Err(error) => Err(self.keeper.reason(&lab, error).await),
        }
    }

    async fn build(
        &self,
        request: BuildRequest,
        events: mpsc::Sender<BuildEvent>,
    ) -> Result<Built, Failure> {
        self.check_open()?;
        let _work = self.activity.other();
        let request = self.with_text(request)?;
        match self.config.machines {
            Machines::Here => {
                if self.config.lab_port {
                    forget_host();
                }
                self.build_here(&request, &events).await
            }
            Machines::InLab => self.build_in_lab(&request, &events).await,
        }
    }
}

/// In a kept lab: what is known of the host's files may be old. The kernel forgets names and unused
/// content (Documentation/admin-guide/sysctl/vm.rst, drop_caches), and asks the host anew.
fn forget_host() {
    rustix::fs::sync();
    for _ in 0..2 {
        // The first time frees the names that the second needs: a layer lies over the host's root.
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    }
}
