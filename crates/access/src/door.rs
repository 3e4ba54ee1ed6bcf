//! The door: whom an engine lets in, and as whom.

use crate::audit::Audit;
use crate::caller::Caller;
use crate::file::{KeyFile, Stamp, now_unix_s};
use crate::gate::{Gate, Held};
use crate::key::{Key, Limits};
use crate::secret::Secret;
use blake3::Hash;
use std::collections::HashMap;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where a key must be shown. The Unix socket is its owner's alone, and needs none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeysWanted {
    /// Where others than this machine can come from.
    #[default]
    Auto,
    /// Also from this machine.
    Always,
    /// Nowhere: something in front of it knows who asks.
    Never,
}

impl KeysWanted {
    /// Whether clients of an address need one.
    #[must_use]
    pub fn at(self, is_loopback: bool) -> bool {
        match self {
            Self::Auto => !is_loopback,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl FromStr for KeysWanted {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err("write auto, always or never".to_owned()),
        }
    }
}

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No key was shown.
    #[error("a key is needed here")]
    NoKey,
    /// There is no such key: it never was, or was revoked.
    #[error("there is no such key")]
    Unknown,
    /// Its time is over.
    #[error("the key {0} has expired")]
    Expired(String),
    /// Nobody can tell.
    #[error("the keys cannot be read")]
    Unreadable(String),
}

/// See the module.
pub struct Access {
    file: Option<KeyFile>,
    audit: Option<Audit>,
    /// Whose word for where a request comes from is believed.
    proxy: Option<IpAddr>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Of which state of the file these are the keys.
    stamp: Option<Stamp>,
    keys: HashMap<String, (Key, Option<Hash>)>,
    failure: Option<String>,
    defaults: Limits,
    gates: HashMap<String, Arc<Gate>>,
}

impl Access {
    /// With a file of keys, and the limits of those that have none of their own.
    #[must_use]
    pub fn new(file: KeyFile, defaults: Limits) -> Self {
        Self {
            file: Some(file),
            audit: None,
            proxy: None,
            inner: Mutex::new(Inner {
                defaults,
                ..Inner::default()
            }),
        }
    }

    /// For an engine that only its owner can ask.
    #[must_use]
    pub fn of_owner() -> Self {
        Self {
            file: None,
            audit: None,
            proxy: None,
            inner: Mutex::default(),
        }
    }

    /// With a log of who asks for what.
    #[must_use]
    pub fn with_audit(self, audit: Option<Audit>) -> Self {
        Self { audit, ..self }
    }

    /// With a proxy in front that knows where requests come from.
    #[must_use]
    pub fn with_proxy(self, proxy: Option<IpAddr>) -> Self {
        Self { proxy, ..self }
    }

    /// The log, if there is one.
    #[must_use]
    pub fn audit(&self) -> Option<&Audit> {
        self.audit.as_ref()
    }

    /// From where a request comes that a peer sends, and says of: the last that X-Forwarded-For names, which the proxy
    /// itself has seen.
    #[must_use]
    pub fn from(&self, peer: IpAddr, forwarded_for: Option<&str>) -> IpAddr {
        let is_believed = self.proxy == Some(peer);
        let said = forwarded_for.filter(|_| is_believed);
        let last = said.and_then(|said| said.rsplit(',').next()?.trim().parse().ok());
        last.unwrap_or(peer)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these are the limits of keys that have none of their own.
    pub fn set_defaults(&self, defaults: Limits) {
        self.inner().defaults = defaults;
    }

    /// Why keys cannot be read, if they cannot, and how many there are.
    pub fn check(&self) -> Result<usize, String> {
        let inner = self.fresh();
        match &inner.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(inner.keys.len()),
        }
    }

    /// As the file is now: a key that was revoked a moment ago counts for nothing. One stat(2) a request.
    fn fresh(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner();
        if let Some(file) = &self.file {
            let stamp = file.stamp();
            if inner.stamp != Some(stamp) {
                inner.load(file, stamp);
            }
        }
        inner
    }

    /// Lets somebody in who shows a key, or none.
    ///
    /// # Errors
    /// If it is none of ours, or one is needed.
    pub fn enter(&self, shown: Option<&str>, is_needed: bool) -> Result<Caller, Refusal> {
        let inner = self.fresh();
        // Nobody is let in by a file that says nothing.
        if let Some(failure) = &inner.failure {
            return Err(Refusal::Unreadable(failure.clone()));
        }
        let Some(shown) = shown.filter(|_| is_needed || !inner.keys.is_empty()) else {
            if is_needed {
                return Err(Refusal::NoKey);
            }
            return Ok(Caller {
                is_owner: false,
                ..Caller::owner()
            });
        };
        let secret = Secret::parse(shown).ok_or(Refusal::Unknown)?;
        let (key, hash) = inner.keys.get(secret.id()).ok_or(Refusal::Unknown)?;
        // Equality of hashes takes the same time for all.
        if *hash != Some(secret.hash()) {
            return Err(Refusal::Unknown);
        }
        if key.has_expired(now_unix_s()) {
            return Err(Refusal::Expired(key.id.clone()));
        }
        Ok(key.caller(&inner.defaults))
    }

    /// One more request of somebody's.
    ///
    /// # Errors
    /// After how long it may come, if its key asks too fast.
    pub fn ask(&self, caller: &Caller) -> Result<(), Duration> {
        self.gate(caller).map_or(Ok(()), |gate| gate.ask())
    }

    /// One more run of somebody's; `None` if its key has as many as it may.
    #[must_use]
    pub fn hold(&self, caller: &Caller) -> Option<Held> {
        match self.gate(caller) {
            Some(gate) => gate.hold(caller.limits.runs),
            None => Some(Held::free()),
        }
    }

    fn gate(&self, caller: &Caller) -> Option<Arc<Gate>> {
        let key = caller.key.as_ref()?;
        let mut inner = self.inner();
        let known = inner.gates.get(key);
        let gate = match known.map(|gate| (gate.with(&caller.limits), gate)) {
            Some((None, gate)) => return Some(Arc::clone(gate)),
            Some((Some(changed), _)) => changed,
            None => Gate::new(&caller.limits),
        };
        let gate = Arc::new(gate);
        inner.gates.insert(key.clone(), Arc::clone(&gate));
        Some(gate)
    }
}

impl Inner {
    fn load(&mut self, file: &KeyFile, stamp: Stamp) {
        self.stamp = Some(stamp);
        self.failure = None;
        self.keys.clear();
        match file.read() {
            Ok(keys) => self.keys.extend(keys.into_iter().map(|key| {
                let hash = Hash::from_hex(&key.hash).ok();
                (key.id.clone(), (key, hash))
            })),
            Err(error) => self.failure = Some(zygote_api::with_causes(&error)),
        }
        let keys = &self.keys;
        self.gates.retain(|id, _| keys.contains_key(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::Role;
    use crate::key::NewKey;
    use std::fs;

    fn new(expires_unix_s: Option<u64>) -> NewKey {
        NewKey {
            name: None,
            role: Role::Run,
            tenant: Some("acme".to_owned()),
            expires_unix_s,
            limits: Limits::default(),
        }
    }

    #[test]
    fn a_key_counts_from_its_making_to_its_revocation() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeyFile::at(folder.path().join("keys.json"));
        let access = Access::new(file.clone(), Limits::default());
        assert_eq!(access.enter(None, true), Err(Refusal::NoKey));
        // Clients of others send some key; without any of ours, loopback is as open as it was.
        assert!(access.enter(Some("zb_live_x"), false).is_ok());
        assert_eq!(access.enter(Some("zb_live_x"), true), Err(Refusal::Unknown));
        let (secret, key) = file.create(new(None)).unwrap();
        let words = secret.reveal();
        let caller = access.enter(Some(&words), true).unwrap();
        assert_eq!(
            (caller.tenant.as_deref(), caller.key.as_deref()),
            (Some("acme"), Some(&*key.id))
        );
        assert!(access.enter(Some("zb_live_x"), false).is_err());
        let mut wrong = words.clone();
        wrong.replace_range(
            wrong.len() - 1..,
            if words.ends_with('0') { "1" } else { "0" },
        );
        assert_eq!(access.enter(Some(&wrong), true), Err(Refusal::Unknown));
        file.revoke(&key.id).unwrap();
        assert_eq!(access.enter(Some(&words), true), Err(Refusal::Unknown));
        let (old, _) = file.create(new(Some(1))).unwrap();
        let refused = access.enter(Some(&old.reveal()), true);
        assert!(matches!(refused, Err(Refusal::Expired(_))));
        fs::write(file.path(), "{").unwrap();
        let refused = access.enter(Some(&words), false);
        assert!(matches!(refused, Err(Refusal::Unreadable(_))));
        assert!(access.enter(None, false).is_err(), "nobody can tell");
    }

    #[test]
    fn only_the_proxy_is_believed_where_a_request_comes_from() {
        let (proxy, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let access = Access::of_owner().with_proxy(Some(proxy));
        let seen = |peer, said| access.from(peer, said).to_string();
        assert_eq!(seen(proxy, Some("1.1.1.1, 2.2.2.2")), "2.2.2.2");
        assert_eq!(seen(other, Some("1.1.1.1")), "10.0.0.2");
        assert_eq!(seen(proxy, Some("nonsense")), "10.0.0.1");
        assert_eq!(seen(proxy, None), "10.0.0.1");
        assert_eq!(Access::of_owner().from(proxy, Some("1.1.1.1")), proxy);
    }

    #[test]
    fn each_key_has_a_gate_of_its_own_and_the_owner_none() {
        let access = Access::of_owner();
        let of = |key: &str| Caller {
            key: Some(key.to_owned()),
            limits: Limits {
                rate: Some(1),
                runs: Some(1),
                ..Limits::default()
            },
            ..Caller::owner()
        };
        let (one, two) = (of("one"), of("two"));
        assert!(access.ask(&one).is_ok() && access.ask(&one).is_err() && access.ask(&two).is_ok());
        let held = access.hold(&one);
        assert!(held.is_some() && access.hold(&one).is_none() && access.hold(&two).is_some());
        drop(held);
        assert!(access.hold(&one).is_some());
        for _ in 0..100 {
            assert!(access.ask(&Caller::owner()).is_ok());
            assert!(access.hold(&Caller::owner()).is_some());
        }
    }
}
