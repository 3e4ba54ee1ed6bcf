//! Who asks.

use crate::key::Limits;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use zygote_api::OnBehalf;

/// What a key may ask for; each role may all that those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Programs, and sandboxes of its tenant.
    Run,
    /// Templates of its tenant, too: made of sandboxes, and removed.
    Manage,
    /// Everything, of all tenants.
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Run, Self::Manage, Self::Admin];

    /// Its word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Manage => "manage",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|role| role.name() == word);
        known.ok_or_else(|| "write run, manage or admin".to_owned())
    }
}

/// Who asks, from the moment on in which that is settled.
#[derive(Clone, Debug, PartialEq)]
pub struct Caller {
    /// What it may ask for.
    pub role: Role,
    /// Whose sandboxes and templates it sees and makes; `None`: everybody's, and its own are nobody else's.
    pub tenant: Option<String>,
    /// Its key's id, if it has shown one.
    pub key: Option<String>,
    /// How much it may have.
    pub limits: Limits,
    /// Whether it has come by a way that only the engine's owner has.
    pub is_owner: bool,
}

impl Caller {
    /// Whoever the engine belongs to.
    #[must_use]
    pub fn owner() -> Self {
        Self {
            role: Role::Admin,
            tenant: None,
            key: None,
            limits: Limits::default(),
            is_owner: true,
        }
    }

    /// Somebody whom an engine in front of this one has let in.
    #[must_use]
    pub fn passed_on(behalf: OnBehalf) -> Self {
        Self {
            role: Role::Manage,
            tenant: behalf.tenant,
            key: behalf.key,
            limits: Limits {
                sandboxes: behalf.sandboxes_max,
                memory_bytes: behalf.memory_bytes_max,
                cpus: behalf.cpus_max,
                ..Limits::default()
            },
            is_owner: false,
        }
    }

    /// For the engine behind this one; `None` if that owes it nothing but what it owes its owner.
    #[must_use]
    pub fn on_behalf(&self) -> Option<OnBehalf> {
        let behalf = OnBehalf {
            tenant: self.tenant.clone(),
            key: self.key.clone(),
            sandboxes_max: self.limits.sandboxes,
            memory_bytes_max: self.limits.memory_bytes,
            cpus_max: self.limits.cpus,
        };
        (behalf != OnBehalf::default()).then_some(behalf)
    }

    /// Whether something of a tenant's is there for it; `None`: what belongs to the engine's owner.
    #[must_use]
    pub fn owns(&self, tenant: Option<&str>) -> bool {
        self.tenant.is_none() || self.tenant.as_deref() == tenant
    }

    /// Whether it may see and use something that is either everybody's or a tenant's.
    #[must_use]
    pub fn sees(&self, tenant: Option<&str>) -> bool {
        tenant.is_none() || self.owns(tenant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tenant: Option<&str>) -> Caller {
        Caller {
            tenant: tenant.map(str::to_owned),
            ..Caller::owner()
        }
    }

    #[test]
    fn a_tenant_has_its_own_and_sees_what_is_everybodys() {
        let (acme, owner) = (of(Some("acme")), of(None));
        assert!(acme.owns(Some("acme")) && !acme.owns(Some("other")) && !acme.owns(None));
        assert!(acme.sees(Some("acme")) && !acme.sees(Some("other")) && acme.sees(None));
        assert!(owner.owns(Some("acme")) && owner.owns(None) && owner.sees(Some("acme")));
    }

    #[test]
    fn roles_are_steps() {
        assert!(Role::Run < Role::Manage && Role::Manage < Role::Admin);
        for role in Role::ALL {
            assert_eq!(role.name().parse(), Ok(role));
        }
        assert!("root".parse::<Role>().is_err());
    }

    #[test]
    fn who_is_passed_on_arrives_as_the_same_tenant() {
        assert_eq!(Caller::owner().on_behalf(), None);
        let acme = of(Some("acme"));
        let arrived = Caller::passed_on(acme.on_behalf().unwrap());
        assert_eq!(arrived.tenant, acme.tenant);
        assert!(!arrived.is_owner && arrived.role < Role::Admin);
    }
}
