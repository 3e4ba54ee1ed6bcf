//! Interpreters that stay.

use super::*;

pub fn cell(code: &str) -> CodeRequest {
    CodeRequest {
        code: code.into(),
        context: "default".to_owned(),
        timeout_seconds: 0.0,
        interrupt_on_disconnect: false,
    }
}

/// What a cell has printed and displayed, in order, and how it ended.
pub async fn cell_end(
    events: &mut Events<CodeEvent>,
) -> Result<(Vec<String>, CodeResult), ClientError> {
    let mut shown: Vec<String> = Vec::new();
    let mut last_printed = false;
    while let Some(event) = events.next().await? {
        match event {
            CodeEvent::Stdout { data } | CodeEvent::Stderr { data } => {
                let text = String::from_utf8(data.0).unwrap();
                match shown.last_mut().filter(|_| last_printed) {
                    Some(last) => last.push_str(&text),
                    None => shown.push(text),
                }
                last_printed = true;
            }
            CodeEvent::Display { data } => {
                shown.push(format!("display {}", data["text/plain"]));
                last_printed = false;
            }
            CodeEvent::Result(result) => return Ok((shown, *result)),
            CodeEvent::Error { error } => {
                return Err(ClientError::Refused(std::boxed::Box::new(error)));
            }
        }
    }
    panic!("no result");
}

impl Box {
    pub async fn try_cell(
        &self,
        request: &CodeRequest,
    ) -> Result<(Vec<String>, CodeResult), ClientError> {
        let mut events = self.client.run_code(&self.id, request).await?;
        cell_end(&mut events).await
    }

    /// Output and the value's text.
    pub async fn cell(&self, code: &str) -> (String, Option<String>) {
        let (shown, result) = self.try_cell(&cell(code)).await.unwrap();
        assert_eq!(result.exception, None, "{code}");
        let value = result.result.map(|bundle| bundle["text/plain"].clone());
        (shown.concat(), value)
    }
}

pub fn value(text: &str) -> Option<String> {
    Some(text.to_owned())
}

pub fn a_cell_has_output_a_value_and_a_number_and_state_stays() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        assert_eq!(it.cell("x = 20; print('hi')").await, ("hi\n".into(), None));
        assert_eq!(
            it.cell("def f(n):\n    return n + x\nf(22)").await.1,
            value("42")
        );
        assert_eq!(it.cell("f(1);").await.1, None);
        assert_eq!(it.cell("# nothing; at all").await.1, None);
        assert_eq!(it.cell("None").await.1, None);
        assert_eq!(it.cell("_ + 1").await.1, value("43"));
        let (_, result) = it
            .try_cell(&cell("import sys; print('e', file=sys.stderr)"))
            .await
            .unwrap();
        assert_eq!(result.execution_count, 7);
        // Classes can be pickled, as those of a program: their module is __main__.
        let pickled =
            "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A())).__class__.__module__";
        assert_eq!(it.cell(pickled).await.1, value("'__main__'"));
        let html = "class T:\n    def _repr_html_(self): return '<b>x</b>'\n    \
            def _repr_png_(self): return b'\\x89PNG'\n    \
            def _repr_json_(self): return {'a': [1]}\nT()";
        let (_, result) = it.try_cell(&cell(html)).await.unwrap();
        let bundle = result.result.unwrap();
        assert_eq!(bundle["text/html"], "<b>x</b>");
        assert_eq!(bundle["image/png"], base64(b"\x89PNG"));
        assert_eq!(bundle["application/json"], r#"{"a": [1]}"#);
        let input = it.try_cell(&cell("input()")).await.unwrap().1;
        assert_eq!(input.exception.unwrap().name, "EOFError");
        let many = "for n in range(100000): print(n)";
        let whole: String = (0..100_000).map(|n| format!("{n}\n")).collect();
        assert!(it.cell(many).await.0 == whole);
    });
}

pub fn what_is_displayed_comes_between_what_is_printed() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "import os\nfor n in range(50):\n    print('before', n, end='')\n    \
            display(n)\n    os.write(1, b'after')";
        let (shown, _) = it.try_cell(&cell(code)).await.unwrap();
        let mut expected = Vec::new();
        for n in 0..50 {
            let after = if n == 0 { "" } else { "after" };
            expected.push(format!("{after}before {n}"));
            expected.push(format!("display {n}"));
        }
        expected.push("after".to_owned());
        assert_eq!(shown, expected);
        // Several at once, and one that is larger than any message.
        let big = "display('a', 'b'); display('x' * 3_000_000)";
        let (shown, _) = it.try_cell(&cell(big)).await.unwrap();
        assert_eq!((&shown[0][..], shown[2].len()), ("display 'a'", 3_000_010));
        let too_big = it.try_cell(&cell("'x' * 30_000_000")).await.unwrap().1;
        assert!(too_big.exception.unwrap().value.contains("bytes"));
        assert_eq!(it.cell("1 + 1").await.1, value("2"));
    });
}

pub fn an_exception_is_told_with_its_lines() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "def f():\n    raise ValueError('bad ü')\nprint('first')\nf()";
        let (shown, result) = it.try_cell(&cell(code)).await.unwrap();
        assert_eq!(shown, ["first\n"]);
        let exception = result.exception.unwrap();
        assert_eq!(
            (&exception.name[..], &exception.value[..]),
            ("ValueError", "bad ü")
        );
        let trace = exception.traceback.join("\n");
        assert!(
            trace.starts_with("Traceback (most recent call last)"),
            "{trace}"
        );
        assert!(
            trace.contains("<cell 1>") && trace.contains("raise ValueError"),
            "{trace}"
        );
        assert!(!trace.contains("driver"), "{trace}");
        let wrong = it
            .try_cell(&cell("x = ("))
            .await
            .unwrap()
            .1
            .exception
            .unwrap();
        assert_eq!(wrong.name, "SyntaxError");
        let stop = it
            .try_cell(&cell("import sys; sys.exit(3)"))
            .await
            .unwrap()
            .1;
        assert_eq!(stop.exception.unwrap().name, "SystemExit");
        let deep = it.try_cell(&cell("def g(): g()\ng()")).await.unwrap().1;
        assert_eq!(deep.exception.unwrap().name, "RecursionError");
        let odd = "class E(Exception):\n    def __str__(self): raise OSError\nraise E";
        assert_eq!(
            it.try_cell(&cell(odd))
                .await
                .unwrap()
                .1
                .exception
                .unwrap()
                .name,
            "E"
        );
        assert_eq!(it.cell("1").await.1, value("1"));
    });
}

pub fn top_level_await_and_threads_work() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code =
            "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 7\nawait f()";
        assert_eq!(it.cell(code).await.1, value("7"));
        assert_eq!(
            it.cell("t = asyncio.ensure_future(f())\nawait t + 1")
                .await
                .1,
            value("8")
        );
        let code = "async for n in (i async for i in aiter_()): print(n)";
        let failed = it.try_cell(&cell(code)).await.unwrap().1;
        assert_eq!(failed.exception.unwrap().name, "NameError");
        let threads = "import threading\nl = []\nt = threading.Thread(target=lambda: l.append(1))\n\
            t.start(); t.join(); l";
        assert_eq!(it.cell(threads).await.1, value("[1]"));
        let sub = "import subprocess\nsubprocess.run(['echo', 'from a program']).returncode";
        assert_eq!(it.cell(sub).await, ("from a program\n".into(), value("0")));
    });
}

pub fn a_cell_is_interrupted_and_its_state_stays() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.cell("x = 1").await;
        let code = "print('up', flush=True)\nimport time\ntime.sleep(1000)";
        let mut events = it.client.run_code(&it.id, &cell(code)).await.unwrap();
        assert!(matches!(
            events.next().await.unwrap(),
            Some(CodeEvent::Stdout { .. })
        ));
        it.client.interrupt(&it.id, "default").await.unwrap();
        let (_, result) = cell_end(&mut events).await.unwrap();
        assert_eq!(result.exception.unwrap().name, "KeyboardInterrupt");
        assert!(!result.timed_out);
        // With nothing to interrupt, nothing is.
        it.client.interrupt(&it.id, "default").await.unwrap();
        assert_eq!(it.cell("x").await.1, value("1"));
        let limited = CodeRequest {
            timeout_seconds: 0.3,
            ..cell("while True: pass")
        };
        let (_, result) = it.try_cell(&limited).await.unwrap();
        assert!(result.timed_out);
        assert_eq!(it.cell("x").await.1, value("1"));
        let none = it.client.interrupt(&it.id, "nope").await;
        assert_eq!(code_of(none), ErrorCode::ContextNotFound);
    });
}

pub fn code_of<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    code(result)
}

pub fn a_context_that_dies_is_told_and_restarted() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.cell("x = 1").await;
        let died = it
            .try_cell(&cell("print('last')\nimport os\nos._exit(3)"))
            .await;
        let Err(ClientError::Refused(failure)) = died else {
            panic!("{died:?}");
        };
        assert_eq!(failure.code, ErrorCode::ContextDead);
        assert!(failure.message.contains("exit status 3"), "{failure}");
        let again = it.try_cell(&cell("1")).await;
        assert_eq!(code_of(again), ErrorCode::ContextDead);
        let listed = it.client.contexts(&it.id).await.unwrap().contexts;
        assert_eq!(
            (&listed[0].name[..], &listed[0].state[..]),
            ("default", "dead")
        );
        // The sandbox lives on.
        assert_eq!(it.sh("echo on").await.0, "on\n");
        let fresh = it.client.restart(&it.id, "default").await.unwrap();
        assert_eq!((&fresh.state[..], fresh.execution_count), ("idle", 0));
        let gone = it.try_cell(&cell("x")).await.unwrap().1;
        assert_eq!(
            (gone.exception.unwrap().name, gone.execution_count),
            ("NameError".into(), 1)
        );
        // In the middle of a cell.
        let mut events = it
            .client
            .run_code(&it.id, &cell("while True: pass"))
            .await
            .unwrap();
        let restarting = async {
            while it.client.contexts(&it.id).await.unwrap().contexts[0].state != "busy" {}
            it.client.restart(&it.id, "default").await.unwrap()
        };
        let (ended, _) = tokio::join!(cell_end(&mut events), restarting);
        assert_eq!(code_of(ended), ErrorCode::ContextDead);
        assert_eq!(it.cell("1").await.1, value("1"));
        it.client.remove_context(&it.id, "default").await.unwrap();
        assert!(
            it.client
                .contexts(&it.id)
                .await
                .unwrap()
                .contexts
                .is_empty()
        );
        assert_eq!(it.cell("2").await.1, value("2"));
    });
}

pub fn contexts_have_states_of_their_own() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        it.cell("x = 1").await;
        let asked = ContextRequest {
            name: "other".to_owned(),
            language: "python".to_owned(),
            cwd: "/tmp".to_owned(),
        };
        let made = it.client.create_context(&it.id, &asked).await.unwrap();
        assert_eq!(made.state, "idle");
        let twice = it.client.create_context(&it.id, &asked).await;
        assert_eq!(code_of(twice), ErrorCode::NameTaken);
        let wrong = ContextRequest {
            name: "third".to_owned(),
            language: "cobol".to_owned(),
            ..asked.clone()
        };
        let wrong = it.client.create_context(&it.id, &wrong).await;
        assert_eq!(code_of(wrong), ErrorCode::BadRequest);
        let within = |code: &str| CodeRequest {
            context: "other".to_owned(),
            ..cell(code)
        };
        let (_, result) = it
            .try_cell(&within("import os; os.getcwd()"))
            .await
            .unwrap();
        assert_eq!(result.result.unwrap()["text/plain"], "'/tmp'");
        let (_, result) = it.try_cell(&within("x")).await.unwrap();
        assert_eq!(result.exception.unwrap().name, "NameError");
        let nowhere = ContextRequest {
            name: "nowhere".to_owned(),
            cwd: "/no/such".to_owned(),
            ..asked
        };
        it.client.create_context(&it.id, &nowhere).await.unwrap();
        let failed = CodeRequest {
            context: "nowhere".to_owned(),
            ..cell("1")
        };
        let failed = it.try_cell(&failed).await;
        assert_eq!(code_of(failed), ErrorCode::ContextDead);
    });
}

pub fn cells_wait_for_each_other() {
    runtime().block_on(async {
        let it = &sandbox(request()).await;
        it.cell("l = []").await;
        let one = |n: u32| async move {
            it.cell(&format!("import time; time.sleep(0.02); l.append({n})"))
                .await
        };
        futures_util::future::join_all((0..10).map(one)).await;
        assert_eq!(
            it.cell("sorted(l) == list(range(10)), len(l)").await.1,
            value("(True, 10)")
        );
    });
}

pub fn a_cell_goes_on_when_its_client_has_gone() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "display(0)\nimport time\ntime.sleep(0.2)\nfor n in range(5): display(n)\nx = 5";
        let mut events = it.client.run_code(&it.id, &cell(code)).await.unwrap();
        assert!(matches!(
            events.next().await.unwrap(),
            Some(CodeEvent::Display { .. })
        ));
        drop(events);
        assert_eq!(it.cell("x").await.1, value("5"));
    });
}

pub fn a_cell_that_is_bound_is_interrupted_when_its_client_goes() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let bound = |code: &str| CodeRequest {
            interrupt_on_disconnect: true,
            ..cell(code)
        };
        it.try_cell(&bound("import time; x = 1")).await.unwrap();
        let within = Duration::from_secs(20);
        for patience in [0, 1, 5, 50] {
            let code = bound("x += 1; time.sleep(1000)");
            let events = it.client.run_code(&it.id, &code).await;
            let free = async {
                tokio::time::sleep(Duration::from_millis(patience)).await;
                drop(events);
            };
            // Another's cell, which waits for that one.
            let next = cell("x");
            let next = tokio::time::timeout(within, it.try_cell(&next));
            let (next, ()) = tokio::join!(next, free);
            let (_, result) = next.expect("it is interrupted").unwrap();
            assert_eq!(result.exception, None);
        }
        // One that waits for others has not begun.
        let code = bound("x = 7; time.sleep(1000)");
        let mut events = it.client.run_code(&it.id, &code).await.unwrap();
        let bored = bound("x = -1");
        let bored = tokio::time::timeout(
            Duration::from_millis(30),
            it.client.run_code(&it.id, &bored),
        );
        assert!(bored.await.is_err());
        it.client.interrupt(&it.id, "default").await.unwrap();
        cell_end(&mut events).await.unwrap();
        assert_eq!(it.cell("x").await.1, value("7"));
        // Nor does one that goes too late harm those after it.
        for _ in 0..20 {
            let mut events = it.client.run_code(&it.id, &bound("1")).await.unwrap();
            cell_end(&mut events).await.unwrap();
            let slow = it
                .client
                .run_code(&it.id, &cell("time.sleep(0.01); 2"))
                .await;
            drop(events);
            let (_, result) = cell_end(&mut slow.unwrap()).await.unwrap();
            assert_eq!((result.exception, result.result.is_some()), (None, true));
        }
        // The first of a context, whose interpreter is not there yet.
        let early = CodeRequest {
            context: "other".to_owned(),
            ..bound("import time; time.sleep(1000)")
        };
        drop(it.client.run_code(&it.id, &early).await);
        let after = CodeRequest {
            interrupt_on_disconnect: false,
            code: "3".into(),
            ..early
        };
        let (_, result) = it.try_cell(&after).await.unwrap();
        assert_eq!(result.exception, None);
    });
}

pub fn a_cell_goes_on_when_nobody_has_taken_what_it_displays() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let file = it.home.folder.path().join("begun");
        let code = format!(
            "for n in range(100):\n    display('y' * 200_000)\n    open({:?}, 'a').write('.')\nx = 7",
            file.to_str().unwrap()
        );
        let events = it.client.run_code(&it.id, &cell(&code)).await.unwrap();
        // Some have been taken, on the way to a client that reads none, and one waits.
        let count = || std::fs::read(&file).map_or(0, |data| data.len());
        let (mut last, begun) = (0, Instant::now());
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = count();
            if now > 0 && now == last {
                break;
            }
            last = now;
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        assert!(last < 100, "nothing held it up");
        drop(events);
        assert_eq!(it.cell("x").await.1, value("7"));
    });
}

pub fn a_flood_of_output_and_of_displays_is_slowed_by_its_reader() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let code = "for n in range(300):\n    print('x' * 100_000)\n    display('y' * 100_000)";
        let mut events = it.client.run_code(&it.id, &cell(code)).await.unwrap();
        // Others are served meanwhile.
        for _ in 0..5 {
            assert_eq!(it.sh("echo a").await.0, "a\n");
        }
        let (shown, _) = cell_end(&mut events).await.unwrap();
        assert_eq!(shown.len(), 600);
        assert!(shown.iter().step_by(2).all(|text| text.len() == 100_001));
    });
}

pub fn an_interpreter_that_breaks_the_rules_harms_itself_alone() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let find = "import os, socket, stat\nfds = [int(n) for n in os.listdir('/proc/self/fd')]\n\
            def good(n):\n    try: return stat.S_ISSOCK(os.fstat(n).st_mode)\n    except OSError: return False\n\
            control = [n for n in fds if good(n)][-1]";
        for lie in [
            "os.write(control, (2).to_bytes(4, 'little') + b'\\xff\\xff')",
            "os.write(control, b'\\xff' * 100)",
            "os.close(control)",
        ] {
            it.cell(find).await;
            let lied = it.try_cell(&cell(lie)).await;
            assert!(lied.is_err(), "{lie}: {lied:?}");
            assert_eq!(it.sh("echo on").await.0, "on\n");
            it.client.restart(&it.id, "default").await.unwrap();
        }
    });
}
