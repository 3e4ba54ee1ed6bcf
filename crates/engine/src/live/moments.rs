//! Moments of a sandbox that are kept: it can be taken back to them, and branched from there.

use super::branch::Moment;
use super::error::LiveError;
use super::registry::check_name;
use super::sandbox::Sandbox;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// When moments are kept without being asked for, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MomentPolicy {
    /// The newest so many; older ones give way.
    pub keep: usize,
    /// One each time.
    pub every: Option<Duration>,
    /// One before each program, and each cell of code.
    pub on_exec: bool,
}

/// How long a sandbox's processes may take to stop for a moment that nobody waits for.
const FREEZE_MAX: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Keeps a moment before something is begun, if it is to be so. One that cannot be kept keeps nobody from
    /// it.
    pub(super) async fn keep_before(&self) {
        if self.spec.moments.is_some_and(|policy| policy.on_exec) {
            let _ = self.keep_unused(None, FREEZE_MAX, false).await;
        }
    }

    /// Keeps a moment each time, if it is to be so; until it has ended.
    pub(super) async fn keep_regularly(self: Arc<Self>) {
        let Some(every) = self.spec.moments.and_then(|policy| policy.every) else {
            return;
        };
        loop {
            tokio::time::sleep(every).await;
            let kept = self.keep_unused(None, FREEZE_MAX, false).await;
            if let Err(LiveError::Ended { .. }) = kept {
                return;
            }
        }
    }
}

/// A moment that is kept.
pub(super) struct Kept {
    /// Counts from 1 in a sandbox's life.
    pub number: u64,
    /// What it is called; those without a name give way.
    pub name: Option<String>,
    pub moment: Arc<Moment>,
}

/// What is known of a moment.
#[derive(Clone, Debug)]
pub struct MomentInfo {
    /// Counts from 1 in the sandbox's life.
    pub number: u64,
    /// What it is called.
    pub name: Option<String>,
    /// When it was.
    pub at: SystemTime,
    /// How long the sandbox stood still for it.
    pub pause: zygote_runner::control::Pause,
    /// KiB of memory that it shares with nobody, if that is known.
    pub private_kib: Option<u64>,
}

/// Where a moment is among all, each with its number and its name.
fn place<'a>(
    mut all: impl ExactSizeIterator<Item = (u64, Option<&'a str>)>,
    words: &str,
) -> Option<usize> {
    let Some(number) = words.strip_prefix('@') else {
        return all.position(|(_, name)| name == Some(words));
    };
    match number.strip_prefix('-') {
        Some(back) => match back.parse() {
            Ok(0) | Err(_) => None,
            Ok(back) => all.len().checked_sub(back),
        },
        None => {
            let number: u64 = number.parse().ok()?;
            all.position(|(known, _)| known == number)
        }
    }
}

/// Which of all give way, the oldest first: those without a name that are too many.
fn excess(named: &[bool], unnamed_max: usize) -> Vec<usize> {
    let unnamed = named.iter().enumerate().filter(|(_, named)| !**named);
    let unnamed: Vec<usize> = unnamed.map(|(index, _)| index).collect();
    let count = unnamed.len().saturating_sub(unnamed_max);
    unnamed[..count].to_vec()
}

/// All that are kept, in their order.
#[derive(Default)]
pub(super) struct Moments {
    kept: Vec<Kept>,
    last: u64,
}

impl Moments {
    /// Those of another engine.
    pub fn resume(kept: Vec<Kept>) -> Self {
        let last = kept.last().map_or(0, |kept| kept.number);
        Self { kept, last }
    }

    pub fn all(&self) -> &[Kept] {
        &self.kept
    }

    /// Keeps one more; its number. Of those without a name, all but the newest `unnamed_max` are let go.
    pub fn add(
        &mut self,
        name: Option<String>,
        moment: Moment,
        unnamed_max: usize,
        named_max: usize,
    ) -> Result<u64, LiveError> {
        if let Some(name) = &name {
            check_name(name)?;
            let is_same = |kept: &Kept| kept.name.as_ref() == Some(name);
            if self.kept.iter().any(is_same) {
                return Err(LiveError::MomentTaken(name.clone()));
            }
            let named = self.kept.iter().filter(|kept| kept.name.is_some()).count();
            if named >= named_max {
                return Err(LiveError::TooMany {
                    what: "moments of this sandbox are kept",
                    count: named_max,
                });
            }
        }
        self.last += 1;
        self.kept.push(Kept {
            number: self.last,
            name,
            moment: Arc::new(moment),
        });
        let named: Vec<bool> = self.kept.iter().map(|kept| kept.name.is_some()).collect();
        let excess = excess(&named, unnamed_max);
        let mut index = 0;
        self.kept.retain(|_| {
            index += 1;
            !excess.contains(&(index - 1))
        });
        Ok(self.last)
    }

    /// One by its name, by its number as `@7`, or counted from the newest as `@-1`.
    pub fn find(&self, words: &str) -> Result<&Kept, LiveError> {
        let all = self.kept.iter();
        let all = all.map(|kept| (kept.number, kept.name.as_deref()));
        let found = place(all, words).and_then(|index| self.kept.get(index));
        found.ok_or_else(|| LiveError::NoMoment(words.to_owned()))
    }

    /// Lets one go.
    pub fn forget(&mut self, words: &str) -> Result<u64, LiveError> {
        let number = self.find(words)?.number;
        self.kept.retain(|kept| kept.number != number);
        Ok(number)
    }

    /// The sandbox is back at this one: those after it that have no name were of what is not any more.
    pub fn go_back_to(&mut self, number: u64) {
        self.kept
            .retain(|kept| kept.number <= number || kept.name.is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers and names alone.
    fn kept(moments: &[(u64, Option<&str>)]) -> Vec<(u64, Option<String>)> {
        let own = |(number, name): &(u64, Option<&str>)| (*number, name.map(str::to_owned));
        moments.iter().map(own).collect()
    }

    fn found(list: &[(u64, Option<String>)], words: &str) -> Option<u64> {
        place(
            list.iter().map(|(number, name)| (*number, name.as_deref())),
            words,
        )
        .map(|index| list[index].0)
    }

    #[test]
    fn moments_are_found_by_name_number_and_from_the_newest() {
        let list = kept(&[(3, None), (4, Some("base")), (7, None)]);
        for (words, number) in [
            ("base", Some(4)),
            ("@-1", Some(7)),
            ("@-3", Some(3)),
            ("@-4", None),
            ("@4", Some(4)),
            ("@0", None),
            ("@5", None),
            ("@-99999999999999999999", None),
            ("@-9223372036854775808", None),
            ("@", None),
            ("@x", None),
            ("7", None),
            ("", None),
        ] {
            assert_eq!(found(&list, words), number, "{words}");
        }
        assert_eq!(found(&[], "@-1"), None);
    }

    #[test]
    fn the_oldest_without_a_name_give_way() {
        let list = kept(&[(1, None), (2, Some("a")), (3, None), (4, None)]);
        let names: Vec<_> = list.iter().map(|(_, name)| name.is_some()).collect();
        assert_eq!(excess(&names, 2), [0]);
        assert_eq!(excess(&names, 0), [0, 2, 3]);
        assert!(excess(&names, 3).is_empty());
    }
}
