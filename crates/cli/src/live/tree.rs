//! `zygote tree`: who is a branch of whom, and what each costs.

use super::{all, called, engine_there, engine_with, now_s, span};
use crate::args::{Global, TreeArgs};
use crate::out::say;
use serde::Serialize;
use serde_json::json;
use std::collections::HashSet;
use zygote_api::{SandboxInfo, SandboxState, SandboxStats};
use zygote_daemon::Client;
use zygote_template::format_size;

/// A sandbox, and what has come of it.
#[derive(Clone, Debug, Serialize)]
struct Node {
    #[serde(flatten)]
    info: SandboxInfo,
    /// KiB that its process shares with nobody; none of one that has ended.
    memory_private_kib: Option<u64>,
    branches: Vec<Node>,
}

/// Shows them; gives back the exit code.
pub fn tree(global: &Global, args: &TreeArgs) -> anyhow::Result<u8> {
    super::block_on(async {
        let client = match &args.sandbox {
            Some(sandbox) => Some(engine_with(global, sandbox).await?),
            None => engine_there(global).await?,
        };
        let roots = match &client {
            Some(client) => roots(client, args).await?,
            None => Vec::new(),
        };
        if args.json {
            say!("{}", json!({"sandboxes": roots}));
        } else if roots.is_empty() {
            say!("no sandboxes; make one with: zygote create");
        } else {
            roots.iter().for_each(|root| show(root, "", ""));
        }
        Ok(0)
    })
}

async fn roots(client: &Client, args: &TreeArgs) -> anyhow::Result<Vec<Node>> {
    let sandboxes = all(client, Some("all")).await?;
    let mut roots = grow(sandboxes);
    if let Some(sandbox) = &args.sandbox {
        let id = client.sandbox(sandbox).await?.id;
        roots = roots
            .iter()
            .find_map(|root| find(root, &id))
            .into_iter()
            .collect();
    }
    if !args.all {
        roots.retain_mut(prune);
    }
    for root in &mut roots {
        Box::pin(measure(client, root)).await;
    }
    Ok(roots)
}

/// Puts each below the one that it is a branch of, if that is known.
fn grow(sandboxes: Vec<SandboxInfo>) -> Vec<Node> {
    let known: HashSet<String> = sandboxes.iter().map(|info| info.id.clone()).collect();
    let is_root = |info: &SandboxInfo| {
        let parent = info.parent.as_ref();
        parent.is_none_or(|parent| !known.contains(parent))
    };
    let (roots, mut rest): (Vec<_>, Vec<_>) = sandboxes.into_iter().partition(is_root);
    let mut roots: Vec<Node> = roots.into_iter().map(Node::new).collect();
    for root in &mut roots {
        root.take_branches(&mut rest);
    }
    roots
}

impl Node {
    fn new(info: SandboxInfo) -> Self {
        Self {
            info,
            memory_private_kib: None,
            branches: Vec::new(),
        }
    }

    fn take_branches(&mut self, rest: &mut Vec<SandboxInfo>) {
        let id = &self.info.id;
        let own = rest.extract_if(.., |info| info.parent.as_ref() == Some(id));
        self.branches = own.map(Node::new).collect();
        for branch in &mut self.branches {
            branch.take_branches(rest);
        }
    }

    fn has_ended(&self) -> bool {
        self.info.state == SandboxState::Ended
    }

    /// This one and all that has come of it, the last first.
    pub fn ids(&self, to: &mut Vec<String>) {
        self.branches.iter().for_each(|branch| branch.ids(to));
        if !self.has_ended() {
            to.push(self.info.id.clone());
        }
    }
}

/// Leaves those out from which nothing that lives has come; whether anything is left.
fn prune(node: &mut Node) -> bool {
    node.branches.retain_mut(prune);
    !node.has_ended() || !node.branches.is_empty()
}

fn find(node: &Node, id: &str) -> Option<Node> {
    if node.info.id == id {
        return Some(node.clone());
    }
    node.branches.iter().find_map(|branch| find(branch, id))
}

async fn measure(client: &Client, node: &mut Node) {
    if !node.has_ended() {
        // One that ends meanwhile costs nothing.
        let stats: Option<SandboxStats> = client.sandbox_stats(&node.info.id).await.ok();
        node.memory_private_kib = stats.map(|stats| stats.memory_private_kib);
    }
    for branch in &mut node.branches {
        Box::pin(measure(client, branch)).await;
    }
}

/// `first`: what stands before it; `rest`: before what is below it.
fn show(node: &Node, first: &str, rest: &str) {
    let info = &node.info;
    let memory = node.memory_private_kib.map_or(String::new(), |kib| {
        format!(", {} of its own", format_size(kib << 10))
    });
    let origin = match info.parent {
        None => format!(", of {}", info.template),
        Some(_) => String::new(),
    };
    let age = span(now_s().saturating_sub(info.created_unix_s));
    let state = info.state.name();
    say!("{first}{} ({state}, {age}{memory}{origin})", called(info));
    for (index, branch) in node.branches.iter().enumerate() {
        let (first, below) = if index + 1 < node.branches.len() {
            ("├── ", "│   ")
        } else {
            ("└── ", "    ")
        };
        show(branch, &format!("{rest}{first}"), &format!("{rest}{below}"));
    }
}

/// The ids of a sandbox and of what has come of it, those that live, branches before their source.
pub async fn family(client: &Client, sandbox: &str) -> anyhow::Result<Vec<String>> {
    let id = client.sandbox(sandbox).await?.id;
    let roots = grow(all(client, Some("all")).await?);
    let mut ids = Vec::new();
    if let Some(node) = roots.iter().find_map(|root| find(root, &id)) {
        node.ids(&mut ids);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(id: &str, parent: Option<&str>, state: SandboxState) -> SandboxInfo {
        SandboxInfo {
            id: id.to_owned(),
            parent: parent.map(str::to_owned),
            state,
            ..SandboxInfo::default()
        }
    }

    #[test]
    fn branches_lie_below_their_source_and_the_dead_only_above_the_living() {
        let (running, ended) = (SandboxState::Running, SandboxState::Ended);
        let mut roots = grow(vec![
            info("a", None, ended),
            info("b", Some("a"), running),
            info("c", Some("b"), ended),
            info("d", Some("forgotten"), running),
            info("e", None, ended),
        ]);
        assert_eq!(roots.len(), 3);
        let mut ids = Vec::new();
        roots[0].ids(&mut ids);
        assert_eq!(ids, ["b"]);
        roots.retain_mut(prune);
        let shown: Vec<&str> = roots.iter().map(|root| &root.info.id[..]).collect();
        assert_eq!(shown, ["a", "d"]);
        assert!(roots[0].branches[0].branches.is_empty());
        assert!(find(&roots[0], "b").is_some() && find(&roots[0], "c").is_none());
    }
}
