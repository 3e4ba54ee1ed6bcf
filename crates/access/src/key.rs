//! A key, as it is kept.

use crate::caller::{Caller, Role};
use serde::{Deserialize, Serialize};

/// Longest name of a tenant, or of a key.
const NAME_MAX_BYTES: usize = 63;

/// How much somebody may have; what is not said has no limit of its own, and the engine's all the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Requests a second; as many may come at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
    /// Runs of the key at once; more are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runs: Option<u32>,
    /// Sandboxes of the tenant that live at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandboxes: Option<u32>,
    /// Longest time of a run, in seconds; one that asks for more gets this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
    /// Programs of one batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
    /// Memory that the tenant's machines may take at once, in bytes: each counts with all that it may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Their processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Output of a run, in bytes; what is more is thrown away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_bytes: Option<u64>,
    /// Bytes of one request: code, files, input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload_bytes: Option<u64>,
}

impl Limits {
    /// These, and for what they do not say the others.
    #[must_use]
    pub fn over(&self, other: &Self) -> Self {
        Self {
            rate: self.rate.or(other.rate),
            runs: self.runs.or(other.runs),
            sandboxes: self.sandboxes.or(other.sandboxes),
            timeout_s: self.timeout_s.or(other.timeout_s),
            batch: self.batch.or(other.batch),
            memory_bytes: self.memory_bytes.or(other.memory_bytes),
            cpus: self.cpus.or(other.cpus),
            output_bytes: self.output_bytes.or(other.output_bytes),
            upload_bytes: self.upload_bytes.or(other.upload_bytes),
        }
    }
}

/// A key without its secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// What it is called: the first half of its words.
    pub id: String,
    /// Its words, hashed, as 64 hexadecimal digits.
    pub hash: String,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it may ask for.
    pub role: Role,
    /// Whose it is; `None` for one that has everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Since when, in seconds since 1970-01-01T00:00:00Z.
    pub created_unix_s: u64,
    /// Until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_unix_s: Option<u64>,
    /// What it may have.
    #[serde(default)]
    pub limits: Limits,
}

/// A key that is to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct NewKey {
    /// For people.
    pub name: Option<String>,
    /// What it may ask for.
    pub role: Role,
    /// Whose it is to be.
    pub tenant: Option<String>,
    /// Until when.
    pub expires_unix_s: Option<u64>,
    /// What it may have.
    pub limits: Limits,
}

impl NewKey {
    /// What is wrong with it, if something is.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self) -> Result<(), String> {
        match (self.role, &self.tenant) {
            (Role::Admin, Some(_)) => {
                return Err(
                    "a key with the role admin has all tenants'; leave the tenant out".into(),
                );
            }
            (Role::Run | Role::Manage, None) => return Err("whose it is: name a tenant".into()),
            _ => {}
        }
        for name in [&self.name, &self.tenant].into_iter().flatten() {
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if name.is_empty() || name.len() > NAME_MAX_BYTES || !name.bytes().all(is_good) {
                return Err(format!(
                    "{name:?}: names have 1 to {NAME_MAX_BYTES} letters, digits, and - _ ."
                ));
            }
        }
        let is_time = |time: f64| time > 0.0 && time.is_finite();
        let Limits {
            rate,
            runs,
            batch,
            cpus,
            ..
        } = self.limits;
        let counts = [rate, runs, batch, cpus];
        let sizes = [self.limits.memory_bytes, self.limits.upload_bytes];
        if counts.contains(&Some(0))
            || sizes.contains(&Some(0))
            || !self.limits.timeout_s.is_none_or(is_time)
        {
            return Err("a limit of 0 lets nothing through: revoke the key instead".into());
        }
        Ok(())
    }
}

impl Key {
    /// Whether its time is over.
    #[must_use]
    pub fn has_expired(&self, now_unix_s: u64) -> bool {
        self.expires_unix_s.is_some_and(|end| end <= now_unix_s)
    }

    /// Whoever shows it.
    #[must_use]
    pub fn caller(&self, defaults: &Limits) -> Caller {
        Caller {
            role: self.role,
            tenant: self.tenant.clone(),
            key: Some(self.id.clone()),
            limits: self.limits.over(defaults),
            is_owner: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(role: Role, tenant: Option<&str>) -> NewKey {
        NewKey {
            name: None,
            role,
            tenant: tenant.map(str::to_owned),
            expires_unix_s: None,
            limits: Limits::default(),
        }
    }

    #[test]
    fn a_key_stands_for_a_tenant_or_for_all() {
        assert!(new(Role::Run, Some("acme")).check().is_ok());
        assert!(new(Role::Admin, None).check().is_ok());
        assert!(new(Role::Admin, Some("acme")).check().is_err());
        assert!(new(Role::Manage, None).check().is_err());
        for bad in ["", "a b", "a/b", "ä", &"a".repeat(64)] {
            assert!(new(Role::Run, Some(bad)).check().is_err(), "{bad}");
        }
        let mut none = new(Role::Run, Some("acme"));
        none.limits.runs = Some(0);
        assert!(none.check().is_err());
    }

    #[test]
    fn a_keys_own_limits_win() {
        let own = Limits {
            rate: Some(5),
            ..Limits::default()
        };
        let defaults = Limits {
            rate: Some(100),
            runs: Some(3),
            ..Limits::default()
        };
        let both = own.over(&defaults);
        assert_eq!((both.rate, both.runs, both.batch), (Some(5), Some(3), None));
    }
}
