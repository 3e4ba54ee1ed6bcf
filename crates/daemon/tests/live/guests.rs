//! Guests that die, or break the rules.

use super::*;
use rustix::process::{Pid, Signal, kill_process};

pub fn a_sandbox_whose_guest_dies_is_told_to_have_died() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let mut events = it
            .client
            .exec_in(&it.id, &shell("sleep 1000"), None)
            .await
            .unwrap();
        events.next().await.unwrap();
        let daemon = it.client.health().await.unwrap().pid;
        for guest in children(daemon).into_iter().flat_map(children) {
            kill_process(Pid::from_raw(guest.cast_signed()).unwrap(), Signal::KILL).unwrap();
        }
        let ended = finished(&mut events).await;
        assert_eq!(code(ended), ErrorCode::SandboxEnded);
        let info = it.client.wait_sandbox(&it.id).await.unwrap();
        assert_eq!(info.end.unwrap().reason, "died");
    });
}

pub fn a_guest_that_breaks_the_rules_loses_its_sandbox_alone() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let lies = [
            "unknown",
            "ended",
            "overflow",
            "offset",
            "window",
            "input",
            "described",
            "stranger",
            "garbage",
            "hangup",
        ];
        for lie in lies {
            let liar = SandboxRequest {
                template: LIAR.to_owned(),
                ..request()
            };
            let id = made(&it.client, &liar).await.unwrap().id;
            let begun = it.client.exec_in(&id, &process(&[lie]), None).await;
            let info = it.client.wait_sandbox(&id).await.unwrap();
            // Not read before: nothing is taken but what may be sent ahead.
            if let Ok(mut events) = begun {
                while let Ok(Some(event)) = events.next().await {
                    assert!(
                        !matches!(event, ProcessEvent::Result(_)),
                        "{lie}: {event:?}"
                    );
                }
            }
            let end = info.end.unwrap();
            assert_eq!(end.reason, "died", "{lie}: {end:?}");
            assert_eq!(
                it.client.process(&id, 1).await.unwrap().state,
                "lost",
                "{lie}"
            );
            assert_eq!(it.sh("echo on").await.0, "on\n");
        }
    });
}

pub fn a_guest_that_tells_an_end_twice_or_displays_without_end_loses_its_sandbox() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        let liar = SandboxRequest {
            template: LIAR.to_owned(),
            ..request()
        };
        for lie in ["twice", "display"] {
            let id = made(&it.client, &liar).await.unwrap().id;
            let twice = process(&[lie]);
            // Who listens stays: what is displayed for nobody is taken.
            let _listening: std::boxed::Box<dyn std::any::Any> = if lie == "twice" {
                std::boxed::Box::new(it.client.exec_in(&id, &twice, None).await.unwrap())
            } else {
                std::boxed::Box::new(it.client.run_code(&id, &cell("1")).await.unwrap())
            };
            let end = it.client.wait_sandbox(&id).await.unwrap().end.unwrap();
            assert_eq!(end.reason, "died", "{lie}: {end:?}");
        }
        assert_eq!(it.sh("echo on").await.0, "on\n");
    });
}

pub fn a_guest_that_does_not_answer_is_told_to_be_late() {
    runtime().block_on(async {
        let liar = SandboxRequest {
            template: LIAR.to_owned(),
            ..request()
        };
        let it = sandbox_with(liar, &["start_ms=300"]).await;
        let late = it.client.exec_in(&it.id, &process(&["silent"]), None).await;
        assert_eq!(code(late.map(drop)), ErrorCode::Busy);
        // It can be ended all the same.
        let ended = it.client.end_sandbox(&it.id).await.unwrap();
        assert_eq!(ended.end.unwrap().reason, "removed");
    });
}

/// Processes that another's first thread has started.
fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}
