//! What a tenant's machines may take at once: each counts with what its template lets it take, from the moment it is
//! asked for until it has ended or is on disk. What they do take is less, and nobody's to plan with.

use crate::engine::Engine;
use crate::live::Phase;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a machine may take, or several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Its memory.
    pub memory_bytes: u64,
    /// Its processors.
    pub cpus: u32,
}

impl Size {
    fn plus(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            cpus: self.cpus.saturating_add(other.cpus),
        }
    }

    fn times(self, count: u32) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_mul(count.into()),
            cpus: self.cpus.saturating_mul(count),
        }
    }
}

/// What the machines of a tenant may take at once; `None`: what the engine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Of memory.
    pub memory_bytes: Option<u64>,
    /// Of processors.
    pub cpus: Option<u32>,
}

/// What somebody may have, of whatever he asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// Sandboxes that live at once.
    pub sandboxes: Option<u32>,
    /// What all machines may take.
    pub quota: Quota,
}

/// There is not enough of it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the machines of this tenant may have {max} {what} at once and have {used}; {more} more are asked for"
)]
pub struct OverQuota {
    /// The unit.
    pub what: &'static str,
    /// How many there may be.
    pub max: u64,
    /// How many there are.
    pub used: u64,
    /// How many are asked for.
    pub more: u64,
}

impl Quota {
    fn check(self, used: Size, more: Size) -> Result<(), OverQuota> {
        let over = |what, max: Option<u64>, used: u64, more: u64| match max {
            Some(max) if used.saturating_add(more) > max => Err(OverQuota {
                what,
                max,
                used,
                more,
            }),
            _ => Ok(()),
        };
        let mib = |bytes| bytes >> 20;
        over(
            "MiB of memory",
            self.memory_bytes.map(mib),
            mib(used.memory_bytes),
            mib(more.memory_bytes),
        )?;
        let max = self.cpus.map(u64::from);
        over("processors", max, used.cpus.into(), more.cpus.into())
    }

    fn is_all(self) -> bool {
        self == Self::default()
    }
}

/// What runs have at the moment, by tenant; and the sizes of builds, which do not change.
#[derive(Default)]
pub(crate) struct Shares {
    runs: Mutex<HashMap<String, Size>>,
    sizes: Mutex<HashMap<String, Size>>,
}

/// A run's part, until it is dropped.
pub(crate) struct Part {
    engine: Arc<Shares>,
    tenant: String,
    size: Size,
}

impl Shares {
    fn runs(&self) -> MutexGuard<'_, HashMap<String, Size>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let mut runs = self.engine.runs();
        if let Some(all) = runs.get_mut(&self.tenant) {
            all.memory_bytes -= self.size.memory_bytes;
            all.cpus -= self.size.cpus;
            if *all == Size::default() {
                runs.remove(&self.tenant);
            }
        }
    }
}

impl Engine {
    /// One more run of a tenant's. Who has no quota is not counted.
    pub(crate) fn begin_run(
        &self,
        tenant: Option<&str>,
        template: &str,
        build: &str,
        quota: Quota,
    ) -> Result<Option<Part>, OverQuota> {
        let Some(tenant) = tenant.filter(|_| !quota.is_all()) else {
            return Ok(None);
        };
        let size = self.size(template, build);
        quota.check(self.used(tenant), size)?;
        let mut runs = self.shares().runs();
        let all = runs.entry(tenant.to_owned()).or_default();
        *all = all.plus(size);
        Ok(Some(Part {
            engine: Arc::clone(self.shares()),
            tenant: tenant.to_owned(),
            size,
        }))
    }

    /// Whether so many more sandboxes of a tenant's fit.
    pub(crate) fn check_quota(
        &self,
        tenant: Option<&str>,
        (template, build): (&str, &str),
        count: usize,
        quota: Quota,
    ) -> Result<(), OverQuota> {
        let Some(tenant) = tenant.filter(|_| !quota.is_all()) else {
            return Ok(());
        };
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let more = self.size(template, build).times(count);
        quota.check(self.used(tenant), more)
    }

    fn used(&self, tenant: &str) -> Size {
        let runs = self.shares().runs().get(tenant).copied();
        let live = self.live().all_of(Some(tenant));
        let live = live.iter().filter(|sandbox| {
            let phase = sandbox.status().phase;
            matches!(phase, Phase::Making | Phase::Running | Phase::Ending)
        });
        let sizes = live.map(|sandbox| self.size(&sandbox.spec.template, &sandbox.build));
        sizes.fold(runs.unwrap_or_default(), Size::plus)
    }

    /// Of a build; nothing, if nobody knows any more.
    fn size(&self, template: &str, build: &str) -> Size {
        let sizes = &self.shares().sizes;
        let mut sizes = sizes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = sizes.get(build) {
            return *known;
        }
        let described = self.settings().store.inspect_build(template, build);
        let size = described.map_or(Size::default(), |described| Size {
            memory_bytes: described.memory_bytes,
            cpus: described.vcpus.into(),
        });
        sizes.insert(build.to_owned(), size);
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(mib: u64, cpus: u32) -> Size {
        Size {
            memory_bytes: mib << 20,
            cpus,
        }
    }

    #[test]
    fn what_is_used_and_asked_for_must_fit_together() {
        let quota = Quota {
            memory_bytes: Some(1024 << 20),
            cpus: Some(3),
        };
        assert_eq!(quota.check(size(512, 1), size(512, 1)), Ok(()));
        let over = quota.check(size(512, 1), size(513, 1)).unwrap_err();
        assert_eq!((over.max, over.used, over.more), (1024, 512, 513));
        let over = quota.check(size(0, 2), size(1, 2)).unwrap_err();
        assert_eq!((over.what, over.max), ("processors", 3));
        assert_eq!(
            Quota::default().check(size(u64::MAX >> 21, 9), size(9, 9)),
            Ok(())
        );
        let three = size(512, 1).times(3);
        assert_eq!(three, size(1536, 3));
    }

    #[test]
    fn a_run_gives_back_what_it_had() {
        let shares = Arc::new(Shares::default());
        let part = |size| {
            let mut runs = shares.runs();
            let all = runs.entry("acme".to_owned()).or_default();
            *all = all.plus(size);
            drop(runs);
            Part {
                engine: Arc::clone(&shares),
                tenant: "acme".to_owned(),
                size,
            }
        };
        let (first, second) = (part(size(512, 1)), part(size(256, 2)));
        assert_eq!(shares.runs()["acme"], size(768, 3));
        drop(first);
        assert_eq!(shares.runs()["acme"], size(256, 2));
        drop(second);
        assert!(shares.runs().is_empty());
    }
}
