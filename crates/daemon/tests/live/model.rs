//! Long random sequences of verbs, compared with a model of what they should do.

use super::*;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};
use std::collections::BTreeMap;

/// Something that a user does, to one of a few sandboxes.
#[derive(Clone, Debug)]
enum Op {
    Create(u8),
    Remove(u8),
    List,
    Write(u8, u8, Vec<u8>),
    Append(u8, u8, Vec<u8>),
    Read(u8, u8),
    Delete(u8, u8),
    Files(u8),
    Exec(u8, u8),
    Start(u8),
    Kill(u8, u8, u8),
    Processes(u8),
    Add(u8, u8),
    Value(u8),
    Raise(u8),
    Restart(u8),
    Die(u8),
    /// The daemon is killed.
    KillDaemon,
}

fn op() -> impl Strategy<Value = Op> {
    let s = || 0..3_u8;
    let n = || 0..3_u8;
    let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        3 => s().prop_map(Op::Create),
        1 => s().prop_map(Op::Remove),
        1 => Just(Op::List),
        2 => (s(), n(), bytes()).prop_map(|(s, n, b)| Op::Write(s, n, b)),
        1 => (s(), n(), bytes()).prop_map(|(s, n, b)| Op::Append(s, n, b)),
        2 => (s(), n()).prop_map(|(s, n)| Op::Read(s, n)),
        1 => (s(), n()).prop_map(|(s, n)| Op::Delete(s, n)),
        1 => s().prop_map(Op::Files),
        2 => (s(), any::<u8>()).prop_map(|(s, n)| Op::Exec(s, n)),
        2 => s().prop_map(Op::Start),
        2 => (s(), n(), 1..16_u8).prop_map(|(s, n, signal)| Op::Kill(s, n, signal)),
        1 => s().prop_map(Op::Processes),
        2 => (s(), any::<u8>()).prop_map(|(s, n)| Op::Add(s, n)),
        2 => s().prop_map(Op::Value),
        1 => s().prop_map(Op::Raise),
        1 => s().prop_map(Op::Restart),
        1 => s().prop_map(Op::Die),
        1 => Just(Op::KillDaemon),
    ]
}

/// What should be there.
#[derive(Default)]
struct Model {
    live: BTreeMap<u8, Modelled>,
}

#[derive(Default)]
struct Modelled {
    files: BTreeMap<u8, Vec<u8>>,
    /// Detached processes that run, by number.
    running: Vec<u32>,
    /// The sum that an interpreter keeps; `None`: there is none yet.
    sum: Option<u32>,
    is_context_dead: bool,
}

struct World {
    home: Home,
    client: Client,
    model: Model,
    folder: String,
}

fn name(sandbox: u8) -> String {
    format!("box-{sandbox}")
}

/// The codes of what is refused.
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, expected: &[ErrorCode]) {
    let code = code(result);
    assert!(expected.contains(&code), "{code:?} is none of {expected:?}");
}

const GONE: [ErrorCode; 2] = [ErrorCode::SandboxNotFound, ErrorCode::SandboxEnded];

impl World {
    fn path(&self, sandbox: u8, file: u8) -> Vec<u8> {
        format!("{}/{sandbox}/{file}", self.folder).into_bytes()
    }

    async fn act(&mut self, op: Op) {
        match op {
            Op::Create(s) => self.create(s).await,
            Op::Remove(s) => {
                let ended = self.client.end_sandbox(&name(s)).await;
                match self.model.live.remove(&s) {
                    Some(_) => assert_eq!(ended.unwrap().state, SandboxState::Ended),
                    // One that has ended is there still, to be looked at.
                    None => {
                        if let Ok(info) = ended {
                            assert_eq!(info.state, SandboxState::Ended);
                        }
                    }
                }
            }
            Op::List => {
                let listed = self.client.sandboxes(None, None).await.unwrap().sandboxes;
                let mut names: Vec<String> =
                    listed.into_iter().filter_map(|one| one.name).collect();
                names.sort();
                let expected: Vec<String> = self.model.live.keys().map(|s| name(*s)).collect();
                assert_eq!(names, expected);
            }
            Op::Write(s, n, data) => self.write(s, n, data, false).await,
            Op::Append(s, n, data) => self.write(s, n, data, true).await,
            Op::Read(s, n) => self.read(s, n).await,
            Op::Delete(s, n) => self.delete(s, n).await,
            Op::Files(s) => self.files(s).await,
            Op::Exec(s, n) => self.exec(s, n).await,
            Op::Start(s) => self.start(s).await,
            Op::Kill(s, n, signal) => self.kill(s, n, signal).await,
            Op::Processes(s) => self.processes(s).await,
            Op::Add(s, n) => self.add(s, n).await,
            Op::Value(s) => self.value(s).await,
            Op::Raise(s) => self.raise(s).await,
            Op::Restart(s) => self.restart(s).await,
            Op::Die(s) => self.die(s).await,
            Op::KillDaemon => {
                killed::kill(&self.client).await;
                self.client = started(&self.home, &[]).await;
            }
        }
    }

    async fn create(&mut self, s: u8) {
        let asked = SandboxRequest {
            name: Some(name(s)),
            ..request()
        };
        let made = made(&self.client, &asked).await;
        if self.model.live.contains_key(&s) {
            return refused(made, &[ErrorCode::NameTaken]);
        }
        made.unwrap();
        // The machine is this one: what another had here is not this one's.
        let _ = std::fs::remove_dir_all(format!("{}/{s}", self.folder));
        self.model.live.insert(s, Modelled::default());
    }

    async fn write(&mut self, s: u8, n: u8, data: Vec<u8>, append: bool) {
        let options = if append {
            "&append=true&parents=true"
        } else {
            "&parents=true"
        };
        let input = pieces(vec![Ok(data.clone())]);
        let path = self.path(s, n);
        let written = self
            .client
            .write_file(&name(s), &path, options, input)
            .await;
        let Some(it) = self.model.live.get_mut(&s) else {
            return refused(written, &GONE);
        };
        let file = it.files.entry(n).or_default();
        if !append {
            file.clear();
        }
        file.extend(data);
        assert_eq!(written.unwrap().bytes, file.len() as u64);
    }

    async fn read(&mut self, s: u8, n: u8) {
        let reading = self
            .client
            .read_file(&name(s), &self.path(s, n), 0, None)
            .await;
        let read = match reading {
            Ok(octets) => all_of(octets).await,
            Err(error) => Err(error),
        };
        match self.model.live.get(&s).map(|it| it.files.get(&n)) {
            None => refused(read, &GONE),
            Some(None) => refused(read, &[ErrorCode::FileNotFound]),
            Some(Some(data)) => assert_eq!(&read.unwrap(), data),
        }
    }

    async fn delete(&mut self, s: u8, n: u8) {
        let action = FileAction::Remove {
            path: self.path(s, n).into(),
            recursive: false,
        };
        let removed = self
            .client
            .files::<serde_json::Value>(&name(s), &action)
            .await;
        match self.model.live.get_mut(&s).map(|it| it.files.remove(&n)) {
            None => refused(removed, &GONE),
            Some(None) => refused(removed, &[ErrorCode::FileNotFound]),
            Some(Some(_)) => drop(removed.unwrap()),
        }
    }

    async fn files(&mut self, s: u8) {
        let action = FileAction::List {
            path: format!("{}/{s}", self.folder).as_str().into(),
            depth: 1,
        };
        let listed = self.client.files::<FileList>(&name(s), &action).await;
        let Some(it) = self.model.live.get(&s) else {
            return refused(listed, &GONE);
        };
        match listed {
            Ok(listed) => assert_eq!(listed.files.len(), it.files.len()),
            // Nothing has been written yet.
            Err(error) => refused::<()>(Err(error), &[ErrorCode::FileNotFound]),
        }
    }

    async fn exec(&mut self, s: u8, n: u8) {
        let asked = shell(&format!("echo {n}; exit {n}"));
        let events = self.client.exec_in(&name(s), &asked, None).await;
        if !self.model.live.contains_key(&s) {
            return refused(events.map(drop), &GONE);
        }
        let (stdout, _, result) = finished(&mut events.unwrap()).await.unwrap();
        assert_eq!(
            (stdout, result.exit_code),
            (format!("{n}\n").into_bytes(), n)
        );
    }

    async fn start(&mut self, s: u8) {
        let asked = ProcessRequest {
            detach: true,
            ..process(&["sleep", "1000"])
        };
        let started = self.client.start_in(&name(s), &asked).await;
        match self.model.live.get_mut(&s) {
            Some(it) => it.running.push(started.unwrap().process),
            None => refused(started, &GONE),
        }
    }

    async fn kill(&mut self, s: u8, n: u8, signal: u8) {
        let signals = ProcessSignal {
            signal,
            only_process: false,
        };
        let Some(it) = self.model.live.get_mut(&s) else {
            let killed = self.client.signal_process(&name(s), 1, signals).await;
            let gone = [
                &GONE[..],
                &[ErrorCode::ProcessNotFound, ErrorCode::ProcessEnded],
            ];
            return refused(killed, &gone.concat());
        };
        let Some(process) = it.running.get(usize::from(n)).copied() else {
            let killed = self.client.signal_process(&name(s), 9999, signals).await;
            return refused(killed, &[ErrorCode::ProcessNotFound]);
        };
        it.running.remove(usize::from(n));
        self.client
            .signal_process(&name(s), process, signals)
            .await
            .unwrap();
        let ended = self.client.wait_process(&name(s), process).await.unwrap();
        assert_eq!(ended.result.unwrap().signal, Some(signal));
    }

    async fn processes(&mut self, s: u8) {
        let listed = self.client.processes(&name(s)).await;
        let Some(it) = self.model.live.get(&s) else {
            // Of one that has ended it is known what there was.
            if let Err(error) = listed {
                refused::<()>(Err(error), &GONE);
            }
            return;
        };
        let is_sleep =
            |one: &&ProcessInfo| one.state == "running" && one.command[0] == "sleep".into();
        let listed = listed.unwrap().processes;
        let running: Vec<u32> = listed
            .iter()
            .filter(is_sleep)
            .map(|one| one.process)
            .collect();
        assert_eq!(running, it.running);
    }

    async fn try_code(&self, s: u8, code: &str) -> Result<CodeResult, ClientError> {
        let mut events = self.client.run_code(&name(s), &cell(code)).await?;
        cell_end(&mut events).await.map(|(_, result)| result)
    }

    async fn add(&mut self, s: u8, n: u8) {
        let code = format!("try: total += {n}\nexcept NameError: total = {n}\n");
        let ran = self.try_code(s, &code).await;
        match self.model.live.get_mut(&s) {
            None => refused(ran, &GONE),
            Some(it) if it.is_context_dead => refused(ran, &[ErrorCode::ContextDead]),
            Some(it) => {
                assert_eq!(ran.unwrap().exception, None);
                it.sum = Some(it.sum.unwrap_or(0) + u32::from(n));
            }
        }
    }

    async fn value(&mut self, s: u8) {
        let ran = self.try_code(s, "total").await;
        match self.model.live.get(&s) {
            None => refused(ran, &GONE),
            Some(it) if it.is_context_dead => refused(ran, &[ErrorCode::ContextDead]),
            Some(Modelled { sum: Some(sum), .. }) => {
                assert_eq!(ran.unwrap().result.unwrap()["text/plain"], sum.to_string());
            }
            Some(_) => assert_eq!(ran.unwrap().exception.unwrap().name, "NameError"),
        }
    }

    async fn raise(&mut self, s: u8) {
        let ran = self.try_code(s, "raise OSError(5, 'bad')").await;
        match self.model.live.get(&s) {
            None => refused(ran, &GONE),
            Some(it) if it.is_context_dead => refused(ran, &[ErrorCode::ContextDead]),
            Some(_) => assert_eq!(ran.unwrap().exception.unwrap().name, "OSError"),
        }
    }

    async fn restart(&mut self, s: u8) {
        let restarted = self.client.restart(&name(s), "default").await;
        match self.model.live.get_mut(&s) {
            None => refused(restarted, &GONE),
            Some(it) => match restarted {
                Ok(_) => {
                    it.sum = None;
                    it.is_context_dead = false;
                }
                // Never used.
                Err(error) => {
                    assert!(it.sum.is_none() && !it.is_context_dead);
                    refused::<()>(Err(error), &[ErrorCode::ContextNotFound]);
                }
            },
        }
    }

    async fn die(&mut self, s: u8) {
        let ran = self.try_code(s, "import os; os._exit(3)").await;
        match self.model.live.get_mut(&s) {
            None => refused(ran, &GONE),
            Some(it) => {
                refused(ran, &[ErrorCode::ContextDead]);
                it.is_context_dead = true;
            }
        }
    }
}

/// Sequences of verbs do what a model of them does.
pub fn random_sequences_of_verbs_do_what_a_model_does() {
    let mut runner = TestRunner::new(Cases {
        cases: 64,
        max_shrink_iters: 40,
        failure_persistence: None,
        ..Cases::default()
    });
    let sequences = proptest::collection::vec(op(), 1..60);
    let checked = runner.run(&sequences, |ops| {
        let ran = std::panic::catch_unwind(|| runtime().block_on(run(ops.clone())));
        ran.map_err(|_| TestCaseError::fail("it differs from its model"))
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}

async fn run(ops: Vec<Op>) {
    let home = Home::new();
    let client = started(&home, &[]).await;
    let folder = home.folder.path().join("files");
    let mut world = World {
        client,
        model: Model::default(),
        folder: folder.to_str().unwrap().to_owned(),
        home,
    };
    for op in ops {
        world.act(op).await;
    }
    // The daemon is there to the end.
    assert!(world.home.socket().exists());
    world.client.health().await.unwrap();
}
