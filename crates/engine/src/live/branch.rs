//! Branching a live sandbox: children that go on where it is now.

use super::contexts::ContextSpec;
use super::create::{Making, activate};
use super::error::LiveError;
use super::journal::Happening;
use super::owner::{Owner, Source, step};
use super::phase::{Phase, Step};
use super::registry::Room;
use super::sandbox::{Birth, Inbox, Sandbox, SandboxSpec, Status};
use crate::engine::Engine;
use crate::fork::Fork;
use crate::share::Allowance;
use crate::zygote::Zygote;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;
use zygote_protocol::ProcessId;
use zygote_runner::control::Pause;
use zygote_snapshot::RunKind;

/// What is wanted of a branch.
#[derive(Clone, Debug)]
pub struct BranchSpec {
    /// How many children; at least one.
    pub count: usize,
    /// A name: of the child, or, of several, what theirs begin with.
    pub name: Option<String>,
    /// How long each lives, from now on; `None`: as long as the source was to live from its making on.
    pub ttl: Option<Option<Duration>>,
    /// How long each lives without being used; `None`: as the source.
    pub idle: Option<Option<Duration>>,
    /// Whether interpreters draw random numbers that are not those that the source will draw.
    pub reseed: bool,
    /// How long the source's processes may take to stop.
    pub limit: Duration,
    /// Whether to go on although some are in the kernel by then: they stop before they come out of it.
    pub anyway: bool,
    /// A moment of the source that is kept; `None`: now.
    pub moment: Option<String>,
    /// How many sandboxes its tenant may have; `None`: as many as the engine.
    pub allowance: Allowance,
}

/// How a guest's processes have stopped.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Held {
    /// How long that took, with the way to the guest.
    pub took: Duration,
    /// Whether all have.
    pub all: bool,
}

/// A sandbox as it was, which can be forked.
pub(super) struct Moment {
    pub zygote: Arc<Zygote>,
    /// Interpreters that stay, with their processes.
    pub contexts: Vec<(ContextSpec, ProcessId)>,
    pub at: SystemTime,
    pub held: Held,
    pub pause: Pause,
}

/// What has come of a branch.
pub struct Branched {
    /// The children, which run.
    pub sandboxes: Vec<Arc<Sandbox>>,
    /// When they parted from their source.
    pub at: SystemTime,
    /// How its processes stopped.
    pub held: Held,
    /// How long the source stood still.
    pub pause: Pause,
    /// Until all children had answered.
    pub took: Duration,
}

/// A child that nobody has heard of yet.
struct Child {
    sandbox: Arc<Sandbox>,
    inbox: Inbox,
    making: Making,
}

impl Engine {
    /// Makes children of a sandbox, all or none. Dropping the future before it is done ends what was begun.
    ///
    /// # Errors
    /// If it has ended or cannot be forked, or a child cannot be made.
    pub async fn branch(
        self: &Arc<Self>,
        source: &Arc<Sandbox>,
        spec: &BranchSpec,
    ) -> Result<Branched, LiveError> {
        let begun = Instant::now();
        source.touch().await;
        let children = self.enter_children(source, spec)?;
        let moment = match &spec.moment {
            Some(words) => source.moment(words).await?,
            None => Arc::new(source.branch(spec.limit, spec.anyway).await?),
        };
        let mut makings = JoinSet::new();
        for child in children {
            let (engine, moment) = (Arc::clone(self), Arc::clone(&moment));
            makings.spawn(engine.fork_moment(moment, child, spec.reseed));
        }
        let mut ready = Vec::new();
        while let Some(made) = makings.join_next().await {
            // Not given up by anybody else.
            let made = made.map_err(|error| LiveError::NotMade(error.to_string()))?;
            ready.push(made?);
        }
        ready.sort_by_key(|(child, _)| child.sandbox.id);
        let mut sandboxes = Vec::new();
        for (child, owner) in ready {
            let Child {
                sandbox,
                inbox,
                making,
            } = child;
            making.finish();
            step(&sandbox, Step::Activated, None);
            self.note(&sandbox, Happening::Made);
            tokio::spawn(owner.live(inbox));
            sandboxes.push(sandbox);
        }
        let into = sandboxes.iter().map(|child| child.id).collect();
        self.note(source, Happening::Branched { into });
        Ok(Branched {
            sandboxes,
            at: moment.at,
            held: moment.held,
            pause: moment.pause,
            took: begun.elapsed(),
        })
    }

    fn note(&self, sandbox: &Sandbox, what: Happening) {
        self.live().journal.note(sandbox, what);
    }

    /// Names are taken, and there is room, before the source stands still.
    fn enter_children(
        self: &Arc<Self>,
        source: &Sandbox,
        spec: &BranchSpec,
    ) -> Result<Vec<Child>, LiveError> {
        let tenant = source.spec.tenant.as_deref();
        let build = (&*source.spec.template, &*source.build);
        self.check_quota(tenant, build, spec.count, spec.allowance.quota)?;
        let mut children = Vec::new();
        for number in 1..=spec.count {
            let name = spec.name.as_ref().map(|name| match spec.count {
                1 => name.clone(),
                _ => format!("{name}-{number}"),
            });
            let own = SandboxSpec {
                name,
                ttl: spec.ttl.unwrap_or(source.spec.ttl),
                idle: spec.idle.unwrap_or(source.status().idle),
                ..source.spec.clone()
            };
            let status = Status {
                phase: Phase::Making,
                end: None,
                expires: own.ttl.map(|ttl| SystemTime::now() + ttl),
                idle: own.idle,
                fork_time: None,
                disk_bytes: None,
            };
            let birth = Birth {
                id: Uuid::now_v7(),
                spec: own,
                build: source.build.clone(),
                created: SystemTime::now(),
                parent: Some(source.id),
                key: None,
            };
            let (sandbox, inbox) = Sandbox::new(birth, self.live().limits, status);
            let room = Room {
                sandboxes: spec.allowance.sandboxes,
                quota: Ok(()),
            };
            self.live().enter(&sandbox, None, room)?;
            let making = Making::begin(self, &sandbox);
            children.push(Child {
                sandbox,
                inbox,
                making,
            });
        }
        Ok(children)
    }

    /// Makes one child, up to its first word.
    async fn fork_moment(
        self: Arc<Self>,
        moment: Arc<Moment>,
        child: Child,
        reseed: bool,
    ) -> Result<(Child, Owner), LiveError> {
        let sandbox = Arc::clone(&child.sandbox);
        let begun = Instant::now();
        let turn = self.turn(sandbox.whose()).await?;
        let failed = |error: crate::ForkError| LiveError::NotMade(error.to_string());
        let mut fork = Fork::of(&moment.zygote, RunKind::Sandbox)
            .await
            .map_err(failed)?;
        fork.identity.reseed = reseed;
        let made = activate(&sandbox, &moment.zygote, fork).await;
        let guest = made.map_err(LiveError::NotMade)?;
        let expires = sandbox.spec.ttl.map(|ttl| begun + ttl);
        let (own, holder) = (Arc::clone(&sandbox), Arc::clone(self.holder()));
        let journal = Arc::clone(&self.live().journal);
        let source = Source::Zygote(Arc::clone(&moment.zygote));
        let mut owner = Owner::new(own, journal, guest, expires, source, holder);
        let patience = moment.zygote.patience();
        let taken = owner.take_over(&moment.contexts, patience).await;
        taken.map_err(|why| LiveError::NotMade(why.to_string()))?;
        drop(turn);
        sandbox
            .status
            .send_modify(|status| status.fork_time = Some(begun.elapsed()));
        // Before anybody hears of it.
        owner.write_down().await;
        Ok((child, owner))
    }
}
