//! The measured verdict on this host's KVM, remembered until the host is booted again or its KVM
//! module is loaded anew. `zygote doctor` always measures.

use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use zygote_template::Store;
use zygote_vmm::probe::{Probe, probe};

/// What a verdict holds for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Subject {
    version: String,
    boot_id: String,
    user: u32,
    /// Device number and time of change of /dev/kvm, if there is one.
    device: Option<(u64, i64, i64)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    subject: Subject,
    usable: bool,
}

impl Subject {
    fn now() -> Self {
        let device = fs::metadata("/dev/kvm").ok();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            user: rustix::process::geteuid().as_raw(),
            device: device.map(|meta| (meta.rdev(), meta.ctime(), meta.ctime_nsec())),
        }
    }
}

fn path(store: &Store) -> PathBuf {
    store.cache().join("kvm.json")
}

/// Whether this host's KVM can run a kernel.
pub fn is_usable(store: &Store) -> bool {
    let subject = Subject::now();
    let known = fs::read(path(store)).ok();
    let known: Option<Verdict> = known.and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(verdict) = known.filter(|verdict| verdict.subject == subject) {
        return verdict.usable;
    }
    let probe = probe();
    remember(store, &probe);
    probe.usable
}

/// Remembers what has been measured, where there is a store already.
pub fn remember(store: &Store, probe: &Probe) {
    let verdict = Verdict {
        subject: Subject::now(),
        usable: probe.usable,
    };
    let Ok(text) = serde_json::to_vec(&verdict) else {
        return;
    };
    // Not remembered (a store that is not ours, or not there): measured again next time.
    let _ = replace(&path(store), &text);
}

fn replace(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&fresh, text)?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_remembered_and_that_on_another_boot_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_owned());
        fs::create_dir(store.cache()).unwrap();
        let usable = is_usable(&store);
        let text = fs::read_to_string(path(&store)).unwrap();
        let (was, lie) = (
            format!("\"usable\":{usable}"),
            format!("\"usable\":{}", !usable),
        );
        let lying = text.replace(&was, &lie);
        fs::write(path(&store), &lying).unwrap();
        assert_eq!(is_usable(&store), !usable, "read back");
        let boot = Subject::now().boot_id;
        fs::write(path(&store), lying.replace(boot.trim(), "another")).unwrap();
        assert_eq!(is_usable(&store), usable, "measured");
    }
}
