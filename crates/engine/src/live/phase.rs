//! The life of a sandbox: its phases, and the one function that leads from one to the next.

use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its fork is being made, and takes its identity.
    Making,
    /// It runs.
    Running,
    /// It is on disk, and costs no memory.
    Paused,
    /// Its process is being ended.
    Ending,
    /// It is no more; what is known of it is kept for a while.
    Ended,
}

/// What moves a sandbox on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The fork has become somebody.
    Activated,
    /// It has been written to disk.
    Sleep,
    /// It runs again.
    Wake,
    /// It is to end, for whatever reason.
    End,
    /// Nothing is left of it.
    Gone,
}

impl Phase {
    /// The next phase; `None` if that step means nothing here.
    #[must_use]
    pub fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (Self::Making, Step::Activated) => Some(Self::Running),
            (Self::Running, Step::Sleep) => Some(Self::Paused),
            (Self::Paused, Step::Wake) => Some(Self::Running),
            (Self::Making | Self::Running | Self::Paused, Step::End) => Some(Self::Ending),
            (Self::Ending, Step::Gone) => Some(Self::Ended),
            (Self::Making | Self::Running | Self::Paused, Step::Gone) => Some(Self::Ended),
            _ => None,
        }
    }

    /// Its name in the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Making => "making",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ending => "ending",
            Self::Ended => "ended",
        }
    }
}

/// Why a sandbox has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// Somebody asked for it.
    Removed,
    /// Its time to live was over.
    Ttl,
    /// Nobody used it for as long as was set.
    Idle,
    /// The engine has stopped.
    EngineStopped,
    /// It could not be made.
    NotMade(String),
    /// It died, or broke the rules of its protocol.
    Died(String),
    /// Another engine had made it, and this one could not go on with it.
    NotAdopted(String),
}

impl EndReason {
    /// Its name in the API.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Removed => "removed",
            Self::Ttl => "ttl",
            Self::Idle => "idle",
            Self::EngineStopped => "engine_stopped",
            Self::NotMade(_) => "not_made",
            Self::Died(_) => "died",
            Self::NotAdopted(_) => "not_adopted",
        }
    }
}

/// As a part of a sentence: "sandbox x has ended: ...".
impl std::fmt::Display for EndReason {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Removed => to.write_str("it was removed"),
            Self::Ttl => to.write_str("its time to live was over"),
            Self::Idle => to.write_str("nobody used it for its idle time"),
            Self::EngineStopped => to.write_str("the engine was stopped"),
            Self::NotMade(why) | Self::Died(why) | Self::NotAdopted(why) => to.write_str(why),
        }
    }
}

/// A sandbox's end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// When.
    pub at: SystemTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_lives_once_and_may_sleep_meanwhile() {
        let phases = [
            Phase::Making,
            Phase::Running,
            Phase::Paused,
            Phase::Ending,
            Phase::Ended,
        ];
        let steps = [Step::Activated, Step::Sleep, Step::End, Step::Gone];
        for phase in phases {
            for step in steps {
                if let Some(next) = phase.after(step) {
                    let place = |phase| phases.iter().position(|other| *other == phase);
                    assert!(place(next) > place(phase), "{phase:?} {step:?} {next:?}");
                }
            }
            assert_eq!(phase.after(Step::Gone).is_none(), phase == Phase::Ended);
            let wakes = phase.after(Step::Wake) == Some(Phase::Running);
            assert_eq!(wakes, phase == Phase::Paused);
        }
    }
}
