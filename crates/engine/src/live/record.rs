//! What is written down of a live sandbox for the engine after this one; the holder keeps it. Only an
//! engine of the same version reads more than its head.

use super::branch::Held;
use super::contexts::ContextSpec;
use super::phase::End;
use super::process::ProcessInfo;
use super::sandbox::{Birth, Sandbox, SandboxSpec, Status};
use crate::held::Entry;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};
use uuid::Uuid;
use zygote_protocol::ProcessId;
use zygote_runner::control::Pause;

/// Of this format, of what guests remember (see [`super::note`]), and of what runners are told.
const VERSION: u32 = 2;
/// How the keys of sandboxes begin.
const KEY: &str = "sandbox/";

/// A sandbox on paper, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    #[serde(flatten)]
    pub head: Head,
    pub spec: SandboxSpec,
    pub build: String,
    pub key: Option<String>,
    /// The sandbox that it is a branch of.
    pub parent: Option<Uuid>,
    pub expires: Option<SystemTime>,
    pub idle: Option<Duration>,
    pub fork_time: Option<Duration>,
    /// Its runner's process id among those of its zygote.
    pub runner: u32,
    /// Its zygote's key.
    pub zygote: String,
    /// The key of the first of that one's family, which has its runners should it have ended.
    pub family: String,
    /// Interpreters that stay, with their processes.
    pub contexts: Vec<(ContextSpec, ProcessId)>,
    /// Its moments that are kept.
    pub moments: Vec<MomentRecord>,
    /// Its end, once it has one; then nothing but this is held.
    pub end: Option<End>,
    /// Its processes, once it has ended.
    pub processes: Vec<ProcessInfo>,
}

/// A moment on paper.
#[derive(Debug, Serialize, Deserialize)]
pub struct MomentRecord {
    pub number: u64,
    pub name: Option<String>,
    /// Its zygote's key.
    pub zygote: String,
    pub contexts: Vec<(ContextSpec, ProcessId)>,
    pub at: SystemTime,
    pub held: Held,
    pub pause: Pause,
}

/// What engines of all versions understand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    pub version: u32,
    /// The version of the engine that has written it.
    pub engine: String,
    pub id: Uuid,
    pub name: Option<String>,
    pub template: String,
    pub created: SystemTime,
}

impl Head {
    /// Of a sandbox of this engine.
    pub fn of(sandbox: &Sandbox, engine: &str) -> Self {
        Self {
            version: VERSION,
            engine: engine.to_owned(),
            id: sandbox.id,
            name: sandbox.spec.name.clone(),
            template: sandbox.spec.template.clone(),
            created: sandbox.created,
        }
    }

    /// Why an engine of that version cannot go on with what has this head.
    fn refusal(&self, engine: &str) -> Option<String> {
        let is_same = (self.version, &self.engine[..]) == (VERSION, engine);
        (!is_same).then(|| {
            let by = &self.engine;
            format!("it was made by version {by} of the engine, which version {engine} does not take over")
        })
    }
}

/// Whether something that is held is a sandbox.
pub fn is_entry(entry: &Entry) -> bool {
    entry.key.starts_with(KEY)
}

/// The key of a sandbox.
pub fn key(id: Uuid) -> String {
    format!("{KEY}{id}")
}

/// What can be made of a record.
pub enum Read {
    /// All.
    Whole(Box<Record>),
    /// That there was a sandbox, and why there is not any more.
    Head(Head, String),
    /// Nothing.
    Nothing,
}

/// Reads a record, with the eyes of an engine of that version.
pub fn read(bytes: &[u8], engine: &str) -> Read {
    let Ok(head) = serde_json::from_slice::<Head>(bytes) else {
        return Read::Nothing;
    };
    if let Some(why) = head.refusal(engine) {
        return Read::Head(head, why);
    }
    match serde_json::from_slice(bytes) {
        Ok(record) => Read::Whole(Box::new(record)),
        Err(error) => Read::Head(head, format!("its record makes no sense: {error}")),
    }
}

impl Record {
    /// Of a sandbox of this engine, without a process.
    pub fn of(sandbox: &Sandbox, engine: &str) -> Self {
        let status = sandbox.status();
        Self {
            head: Head::of(sandbox, engine),
            spec: sandbox.spec.clone(),
            build: sandbox.build.clone(),
            key: sandbox.key.clone(),
            parent: sandbox.parent,
            expires: status.expires,
            idle: status.idle,
            fork_time: status.fork_time,
            runner: 0,
            zygote: String::new(),
            family: String::new(),
            contexts: Vec::new(),
            moments: Vec::new(),
            end: None,
            processes: Vec::new(),
        }
    }

    /// What it says of the sandbox's making.
    pub fn birth(&self) -> Birth {
        Birth {
            id: self.head.id,
            spec: self.spec.clone(),
            build: self.build.clone(),
            created: self.head.created,
            key: self.key.clone(),
            parent: self.parent,
        }
    }

    /// A status that goes with it.
    pub fn status(&self, phase: super::Phase) -> Status {
        Status {
            phase,
            end: self.end.clone(),
            expires: self.expires,
            idle: self.idle,
            fork_time: self.fork_time,
            disk_bytes: None,
        }
    }
}

impl Head {
    /// As of a sandbox of which nothing else is known.
    pub fn birth(&self) -> Birth {
        Birth {
            id: self.id,
            spec: SandboxSpec {
                template: self.template.clone(),
                name: self.name.clone(),
                ..SandboxSpec::default()
            },
            build: String::new(),
            created: self.created,
            key: None,
            parent: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_reads_the_head_alone() {
        let head = Head {
            version: VERSION,
            engine: "1.0.0".to_owned(),
            id: Uuid::now_v7(),
            name: Some("box".to_owned()),
            template: "python".to_owned(),
            created: SystemTime::now(),
        };
        let bytes = |head: &Head| {
            let record = Record {
                head: head.clone(),
                spec: SandboxSpec::default(),
                build: "b".to_owned(),
                key: None,
                parent: None,
                expires: None,
                idle: Some(Duration::from_millis(300)),
                fork_time: None,
                runner: 7,
                zygote: "z".to_owned(),
                family: "z".to_owned(),
                contexts: vec![(ContextSpec::default(), 3)],
                moments: Vec::new(),
                end: None,
                processes: Vec::new(),
            };
            serde_json::to_vec(&record).unwrap()
        };
        let Read::Whole(record) = read(&bytes(&head), "1.0.0") else {
            panic!("it is whole");
        };
        assert_eq!(
            (record.runner, record.idle),
            (7, Some(Duration::from_millis(300)))
        );
        let Read::Head(known, why) = read(&bytes(&head), "1.0.1") else {
            panic!("another version's");
        };
        assert!(known.name == head.name && why.contains("1.0.0") && why.contains("1.0.1"));
        let newer = Head {
            version: VERSION + 1,
            ..head
        };
        assert!(matches!(read(&bytes(&newer), "1.0.0"), Read::Head(..)));
        assert!(matches!(read(b"{}", "1.0.0"), Read::Nothing));
    }
}
