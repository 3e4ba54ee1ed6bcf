//! All live sandboxes of an engine, by id and by name; those that have ended are remembered for a while.

use super::error::LiveError;
use super::journal::Journal;
use super::limits::LiveLimits;
use super::phase::{EndReason, Phase};
use super::record;
use super::sandbox::{Sandbox, SandboxSpec};
use crate::held::Holder;
use crate::queue::NoTurn;
use crate::share::OverQuota;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// Longest name.
const NAME_MAX_BYTES: usize = 63;
/// Shortest beginning of an id that stands for it.
const PREFIX_MIN: usize = 4;
/// Idempotency keys that are remembered.
const KEYS_MAX: usize = 10_000;

/// See the module.
pub struct Registry {
    /// What they may take.
    pub limits: LiveLimits,
    /// What has happened to them.
    pub journal: Arc<Journal>,
    holder: Arc<Holder>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    all: Vec<Arc<Sandbox>>,
    /// Keys in the order of their use, with what they were used for.
    keys: VecDeque<(String, Used)>,
    is_closed: bool,
}

#[derive(Clone)]
struct Used {
    spec: SandboxSpec,
    id: Uuid,
}

/// What its tenant still has for a sandbox.
pub(super) struct Room {
    /// How many may live at once.
    pub sandboxes: Option<u32>,
    /// Whether there is one more left of what all of its machines may take.
    pub quota: Result<(), OverQuota>,
}

impl Registry {
    /// With nothing in it.
    pub(crate) fn new(limits: LiveLimits, holder: Arc<Holder>) -> Self {
        Self {
            limits,
            journal: Arc::default(),
            holder,
            inner: Mutex::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a sandbox that is being made, unless its tenant has no room. With a key that its
    /// tenant has used for the same before, gives back that one instead.
    ///
    /// # Errors
    /// If its name is taken or none, or there are too many.
    pub(super) fn enter(
        &self,
        sandbox: &Arc<Sandbox>,
        key: Option<&str>,
        room: Room,
    ) -> Result<Option<Arc<Sandbox>>, LiveError> {
        let mut inner = self.inner();
        let tenant = &sandbox.spec.tenant;
        let is_key = |(known, used): &&(String, Used)| {
            Some(known.as_str()) == key && used.spec.tenant == *tenant
        };
        if let Some((_, used)) = inner.keys.iter().find(is_key) {
            if used.spec != sandbox.spec {
                return Err(LiveError::KeyReused);
            }
            let known = inner.all.iter().find(|other| other.id == used.id);
            if let Some(known) = known {
                return Ok(Some(Arc::clone(known)));
            }
        }
        if let Some(name) = &sandbox.spec.name {
            check_name(name)?;
            let is_taken = |other: &&Arc<Sandbox>| {
                let spec = &other.spec;
                is_alive(other) && spec.name.as_ref() == Some(name) && spec.tenant == *tenant
            };
            if let Some(other) = inner.all.iter().find(is_taken) {
                return Err(LiveError::NameTaken(name.clone(), other.id_text()));
            }
        }
        let limit = self.limits.sandboxes_max;
        if inner.is_closed {
            return Err(NoTurn::Closed.into());
        }
        let takes_memory = |other: &&Arc<Sandbox>| is_alive(other) && !is_paused(other);
        if inner.all.iter().filter(takes_memory).count() >= limit {
            return Err(LiveError::TooMany {
                what: "sandboxes live",
                count: limit,
            });
        }
        let of_tenant = |other: &&Arc<Sandbox>| is_alive(other) && other.spec.tenant == *tenant;
        if let Some(quota) = room.sandboxes
            && inner.all.iter().filter(of_tenant).count() >= quota as usize
        {
            return Err(LiveError::TooMany {
                what: "sandboxes of this tenant live",
                count: quota as usize,
            });
        }
        room.quota?;
        if let Some(key) = key {
            // One whose sandbox is remembered no longer.
            let is_other =
                |(known, used): &(String, Used)| known != key || used.spec.tenant != *tenant;
            inner.keys.retain(is_other);
            if inner.keys.len() >= KEYS_MAX {
                inner.keys.pop_front();
            }
            let spec = sandbox.spec.clone();
            let used = Used {
                spec,
                id: sandbox.id,
            };
            inner.keys.push_back((key.to_owned(), used));
        }
        inner.all.push(Arc::clone(sandbox));
        let ended = inner.all.iter().filter(|other| !is_alive(other)).count();
        let mut excess = ended.saturating_sub(self.limits.ended_max);
        let forgotten = inner.all.extract_if(.., |other| {
            let is_kept = is_alive(other) || excess == 0;
            excess -= usize::from(!is_kept);
            !is_kept
        });
        let forgotten: Vec<_> = forgotten.map(|other| record::key(other.id)).collect();
        drop(inner);
        if !forgotten.is_empty() {
            let holder = Arc::clone(&self.holder);
            tokio::spawn(async move {
                for key in forgotten {
                    holder.remove(&key).await;
                }
            });
        }
        Ok(None)
    }

    /// Enters one that another engine had made, whatever limits there are now.
    pub(super) fn enter_adopted(&self, sandbox: &Arc<Sandbox>) {
        let mut inner = self.inner();
        if let Some(key) = &sandbox.key {
            let used = Used {
                spec: sandbox.spec.clone(),
                id: sandbox.id,
            };
            inner.keys.push_back((key.clone(), used));
        }
        inner.all.push(Arc::clone(sandbox));
        inner.all.sort_by_key(|one| one.id);
    }

    /// Why live sandboxes end with this engine, should it be killed, if it is so.
    pub fn why_not_held(&self) -> Option<String> {
        self.holder.failure()
    }

    /// Forgets one that never was.
    pub(super) fn leave(&self, id: Uuid) {
        let mut inner = self.inner();
        inner.all.retain(|other| other.id != id);
        inner.keys.retain(|(_, used)| used.id != id);
    }

    /// Finds one by its name, its id, or the beginning of its id, among those of a tenant (`None`: of all, the
    /// owner's own first); the living come before those that have ended.
    ///
    /// # Errors
    /// If there is none, or several.
    pub fn find(&self, words: &str, tenant: Option<&str>) -> Result<Arc<Sandbox>, LiveError> {
        let inner = self.inner();
        let is_its = |other: &&Arc<Sandbox>| other.belongs_to(tenant);
        let named = |other: &&Arc<Sandbox>| other.spec.name.as_deref() == Some(words);
        let all = inner.all.iter().filter(is_its);
        let living = all.clone().rev().filter(|other| is_alive(other));
        let own = |other: &&Arc<Sandbox>| other.spec.tenant.as_deref() == tenant;
        let first = living.clone().filter(named).find(own);
        if let Some(found) = first.or_else(|| living.clone().find(named)) {
            return Ok(Arc::clone(found));
        }
        let has_id = |other: &&Arc<Sandbox>| other.id_text() == words;
        if let Some(found) = all.clone().rev().find(|o| has_id(o) || named(o)) {
            return Ok(Arc::clone(found));
        }
        // The end tells those of one second apart: ids begin with the time.
        let begins = |other: &&Arc<Sandbox>| {
            words.len() >= PREFIX_MIN
                && (other.id_text().starts_with(words) || other.id_text().ends_with(words))
        };
        let mut found: Vec<_> = living.filter(begins).collect();
        if found.is_empty() {
            found = all.filter(begins).collect();
        }
        match &found[..] {
            [] => Err(LiveError::NotFound(words.to_owned())),
            [one] => Ok(Arc::clone(one)),
            several => Err(LiveError::Ambiguous(words.to_owned(), several.len())),
        }
    }

    /// All of a tenant that are known, in the order of their making.
    pub fn all_of(&self, tenant: Option<&str>) -> Vec<Arc<Sandbox>> {
        let mut all = self.all();
        all.retain(|one| one.belongs_to(tenant));
        all
    }

    /// All that are known, in the order of their making.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.inner().all.clone()
    }

    /// How many live, and are not on disk.
    pub fn count(&self) -> usize {
        let takes_memory = |one: &&Arc<Sandbox>| is_alive(one) && !is_paused(one);
        self.inner().all.iter().filter(takes_memory).count()
    }

    /// Lets no more in.
    pub fn close(&self) {
        self.inner().is_closed = true;
    }

    /// Ends all of them, and waits until they are gone.
    pub async fn end_all(&self) {
        self.close();
        let all = self.all();
        // All are told before any is waited for.
        for sandbox in &all {
            sandbox.ask_to_end(EndReason::EngineStopped).await;
        }
        for sandbox in &all {
            sandbox.ended().await;
        }
    }
}

fn is_alive(sandbox: &Sandbox) -> bool {
    sandbox.status.borrow().phase != Phase::Ended
}

fn is_paused(sandbox: &Sandbox) -> bool {
    sandbox.status.borrow().phase == Phase::Paused
}

/// A name is a word of a command line, and no beginning of an id's text that could be taken for one.
pub(super) fn check_name(name: &str) -> Result<(), LiveError> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let begins_well = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let is_id = Uuid::try_parse(name).is_ok();
    if !begins_well || is_id || name.len() > NAME_MAX_BYTES || !name.bytes().all(is_good) {
        return Err(LiveError::BadName(name.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words_of_a_command_line() {
        for good in ["a", "box-1", "My_box.2"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        let id = Uuid::nil().to_string();
        for bad in ["", "-a", "a b", "a/b", "ä", "a\n", &long, &id] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
