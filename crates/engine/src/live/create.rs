//! Making a live sandbox.

use super::error::LiveError;
use super::journal::Happening;
use super::owner::{Guest, Owner, Source, step};
use super::phase::{End, EndReason, Phase, Step};
use super::record::key;
use super::registry::Room;
use super::sandbox::{Birth, Sandbox, SandboxSpec, Status};
use crate::conversation::{Broken, Listener};
use crate::engine::{Engine, EngineError, Note};
use crate::fork::Fork;
use crate::sandbox::{hear_activation, last_words};
use crate::share::Allowance;
use crate::zygote::Zygote;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use uuid::Uuid;
use zygote_protocol::{HostMessage, encode};
use zygote_snapshot::RunKind;

impl Engine {
    /// Makes a sandbox that lives until it is ended, unless its tenant has as much as it is allowed. With an idempotency key
    /// that was used for the same before, gives back that one. Dropping the future before it is done ends what was
    /// begun.
    ///
    /// # Errors
    /// If it cannot be made, or its name is taken.
    pub async fn create(
        self: &Arc<Self>,
        spec: SandboxSpec,
        key: Option<&str>,
        allowance: Allowance,
        notes: &(dyn Fn(Note) + Sync),
    ) -> Result<Arc<Sandbox>, LiveError> {
        let loaded = self.find(&spec.template, spec.build.clone(), spec.tenant.as_deref())?;
        let status = Status {
            phase: Phase::Making,
            end: None,
            expires: spec.ttl.map(|ttl| SystemTime::now() + ttl),
            idle: spec.idle,
            fork_time: None,
            disk_bytes: None,
        };
        let birth = Birth {
            id: Uuid::now_v7(),
            spec,
            build: loaded.build.clone(),
            created: SystemTime::now(),
            parent: None,
            key: key.map(str::to_owned),
        };
        let (sandbox, inbox) = Sandbox::new(birth, self.live().limits, status);
        let tenant = sandbox.spec.tenant.as_deref();
        let build = (&*sandbox.spec.template, &*sandbox.build);
        let room = Room {
            sandboxes: allowance.sandboxes,
            quota: self.check_quota(tenant, build, 1, allowance.quota),
        };
        if let Some(known) = self.live().enter(&sandbox, key, room)? {
            return self.made_before(known).await;
        }
        let making = Making::begin(self, &sandbox);
        let begun = Instant::now();
        let kind = RunKind::Sandbox;
        let turn = self.turn(sandbox.whose()).await?;
        let allowed = sandbox.spec.allow_missing_walls;
        let (pool, fork) = self.fork(&loaded, kind, allowed, notes).await?;
        let made = activate(&sandbox, pool.zygote(), fork).await;
        let guest = made.map_err(LiveError::NotMade)?;
        let expires = sandbox.spec.ttl.map(|ttl| begun + ttl);
        let journal = Arc::clone(&self.live().journal);
        let patience = pool.zygote().patience();
        let source = Source::Pool(pool, Arc::clone(&loaded));
        let (own, holder) = (Arc::clone(&sandbox), Arc::clone(self.holder()));
        let mut owner = Owner::new(own, Arc::clone(&journal), guest, expires, source, holder);
        if let Some(contexts) = &loaded.held {
            let taken = owner.take_over(contexts, patience).await;
            taken.map_err(|why| LiveError::NotMade(why.to_string()))?;
        }
        drop(turn);
        sandbox
            .status
            .send_modify(|status| status.fork_time = Some(begun.elapsed()));
        // Before anybody hears of it.
        owner.write_down().await;
        making.finish();
        step(&sandbox, Step::Activated, None);
        journal.note(&sandbox, Happening::Made);
        tokio::spawn(owner.live(inbox));
        Ok(Arc::clone(&sandbox))
    }

    /// The one that another request with the same key makes, or has made.
    async fn made_before(&self, known: Arc<Sandbox>) -> Result<Arc<Sandbox>, LiveError> {
        let mut status = known.status.subscribe();
        // The making has deadlines of its own.
        let _ = status
            .wait_for(|status| status.phase != Phase::Making)
            .await;
        match known.status.borrow().phase {
            Phase::Ended => Err(known.gone()),
            _ => Ok(Arc::clone(&known)),
        }
    }
}

/// Has a fork become somebody; why not, otherwise. It no longer counts among its pool's that run.
pub(super) async fn activate(
    sandbox: &Sandbox,
    zygote: &Zygote,
    fork: Fork,
) -> Result<Guest, String> {
    let Fork {
        mut identity,
        stream,
        control,
        mut runner,
        ..
    } = fork;
    let tail = sandbox.id.simple().to_string().split_off(20);
    let own = || format!("zygote-{tail}");
    identity.hostname = hostname(sandbox.spec.name.as_deref()).unwrap_or_else(own);
    let opening = encode(&HostMessage::Activate(identity)).map_err(|e| e.to_string())?;
    let (read, mut writer) = stream.into_split();
    let mut listener = Listener::new(read);
    // One that has died does not answer either.
    let _ = writer.write_all(&opening).await;
    match hear_activation(zygote, &mut listener, zygote.patience()).await {
        Ok(None) => Ok(Guest {
            listener,
            writer,
            control,
            runner,
        }),
        Ok(Some(why)) => Err(format!("the fork is not used: {why}")),
        Err(Broken::Nonsense(what)) => Err(format!("the guest sent nonsense: {what}")),
        Err(Broken::Ended) => Err(last_words(&control, &mut runner).await),
    }
}

/// A name as a host name, where it can be one (hostname(7)).
fn hostname(name: Option<&str>) -> Option<String> {
    let name = name?.to_ascii_lowercase();
    let is_good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (name.bytes().all(is_good) && !name.ends_with('-')).then_some(name)
}

/// What was begun is undone unless it comes to its end.
pub(super) struct Making {
    engine: Arc<Engine>,
    sandbox: Arc<Sandbox>,
    is_made: bool,
}

impl Making {
    /// Of a sandbox that has been entered.
    pub fn begin(engine: &Arc<Engine>, sandbox: &Arc<Sandbox>) -> Self {
        Self {
            engine: Arc::clone(engine),
            sandbox: Arc::clone(sandbox),
            is_made: false,
        }
    }

    /// It is there.
    pub fn finish(mut self) {
        self.is_made = true;
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if !self.is_made {
            let end = End {
                reason: EndReason::NotMade("it could not be made".to_owned()),
                at: SystemTime::now(),
            };
            step(&self.sandbox, Step::End, Some(&end));
            step(&self.sandbox, Step::Gone, None);
            self.engine.live().leave(self.sandbox.id);
            // It may have been written down just now.
            let (holder, key) = (Arc::clone(self.engine.holder()), key(self.sandbox.id));
            tokio::spawn(async move { holder.remove(&key).await });
        }
    }
}

impl From<crate::queue::NoTurn> for LiveError {
    fn from(error: crate::queue::NoTurn) -> Self {
        Self::Engine(EngineError::NoTurn(error))
    }
}

impl From<zygote_template::StoreError> for LiveError {
    fn from(error: zygote_template::StoreError) -> Self {
        Self::Engine(EngineError::Template(error))
    }
}
