//! What the routes call.

use crate::metrics::Metrics;
use axum::response::Response;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_access::Caller;
use zygote_api::{
    AttachRequest, BuildEvent, BuildRequest, Built, CommandRequest, CreateEvent, ExecEvent,
    ExecInput, ExecRequest, Failure, Health, ProcessEvent, ProcessInput, PublishRequest, Removed,
    SandboxInfo, SandboxRequest, SignalRequest, Status, StopRequest, Stopped, TemplateDetail,
    TemplateHealth, TemplateList,
};
use zygote_engine::Engine;

/// Input of a run, in order; its sender is dropped at its end. An error ends the run.
pub type Input = mpsc::Receiver<Result<ExecInput, Failure>>;

/// A request as it came, and an answer as it goes.
pub type Forwarded = axum::extract::Request;

/// Somebody who runs programs. All futures may be dropped: what they do is then undone or given up.
pub trait Backend: Send + Sync + 'static {
    /// Who answers.
    fn health(&self) -> Health;

    /// What can be forked by somebody; asked for often. `None`: by anybody.
    fn templates_ready(&self, caller: Option<&Caller>) -> BTreeMap<String, TemplateHealth>;

    /// What it holds.
    fn status(&self) -> impl Future<Output = Status> + Send;

    /// Where it is counted what happens.
    fn counts(&self) -> &Metrics;

    /// What a monitor reads: see [`Metrics`].
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// Begins to stop.
    fn stop(&self, request: StopRequest) -> impl Future<Output = Result<Stopped, Failure>> + Send;

    /// Runs a program to its end. Nothing comes out of `events` after `result`; a failure that is
    /// given back was not sent as an event. A receiver that does not keep up slows the program
    /// down.
    fn exec(
        &self,
        caller: &Caller,
        request: ExecRequest,
        input: Input,
        events: mpsc::Sender<ExecEvent>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Sends a signal to a program that runs.
    fn signal(
        &self,
        caller: &Caller,
        id: &str,
        request: SignalRequest,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Runs any command on the emulated host, which is started if it is not up.
    fn lab_exec(
        &self,
        request: CommandRequest,
        input: Input,
        events: mpsc::Sender<ExecEvent>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Ends the emulated host.
    fn lab_down(&self) -> impl Future<Output = Result<(), Failure>> + Send;

    /// The engine that has the live sandboxes; `None` if that is another one, which is asked by
    /// [`Backend::forward`].
    fn live(&self) -> Option<&Arc<Engine>>;

    /// Makes a sandbox that lives until it is ended; with a key that was used for the same before, gives
    /// back that one. `events` gets progress and warnings only.
    fn create(
        &self,
        caller: &Caller,
        request: SandboxRequest,
        key: Option<String>,
        events: mpsc::Sender<CreateEvent>,
    ) -> impl Future<Output = Result<SandboxInfo, Failure>> + Send;

    /// Reads on what a process of a live sandbox says, to its end, and gives it input.
    fn attach(
        &self,
        caller: &Caller,
        id: &str,
        process: u32,
        request: AttachRequest,
        input: mpsc::Receiver<ProcessInput>,
        events: mpsc::Sender<ProcessEvent>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Passes a request on to the engine that has the live sandboxes.
    fn forward(
        &self,
        caller: &Caller,
        request: Forwarded,
    ) -> impl Future<Output = Result<Response, Failure>> + Send;

    /// All templates.
    fn templates(
        &self,
        caller: &Caller,
    ) -> impl Future<Output = Result<TemplateList, Failure>> + Send;

    /// One of them.
    fn template(
        &self,
        caller: &Caller,
        name: &str,
    ) -> impl Future<Output = Result<TemplateDetail, Failure>> + Send;

    /// Removes one, and with `derived` those that are derived from it.
    fn remove(
        &self,
        caller: &Caller,
        name: &str,
        derived: bool,
    ) -> impl Future<Output = Result<Removed, Failure>> + Send;

    /// Makes one of a sandbox.
    fn publish(
        &self,
        caller: &Caller,
        id: &str,
        request: PublishRequest,
    ) -> impl Future<Output = Result<Built, Failure>> + Send;

    /// Builds one. `events` gets progress only.
    fn build(
        &self,
        request: BuildRequest,
        events: mpsc::Sender<BuildEvent>,
    ) -> impl Future<Output = Result<Built, Failure>> + Send;
}
