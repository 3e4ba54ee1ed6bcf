//! Branches as far as there is no machine: what is refused, and that it harms nobody. The rest is in the
//! engine's tests with tiny guests, and in the system tests.

use super::*;
use futures_util::future::join_all;

fn named(name: &str) -> BranchRequest {
    BranchRequest {
        name: Some(name.to_owned()),
        count: 2,
        ..BranchRequest::default()
    }
}

pub fn a_branch_that_cannot_be_made_leaves_its_source_as_it_was() {
    runtime().block_on(async {
        let it = sandbox(request()).await;
        // Several at once, and processes that are started meanwhile.
        let it = &it;
        let branch = |name: String| async move { it.client.branch(&it.id, &named(&name)).await };
        let branches = join_all((0..10).map(|n| branch(format!("try{n}"))));
        let starts = join_all((0..10).map(|_| it.sh("echo there")));
        let (branches, starts) = tokio::join!(branches, starts);
        for refused in branches {
            let Err(ClientError::Refused(failure)) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!(failure.code, ErrorCode::NotBranched);
            assert!(failure.message.contains("no machine"), "{failure}");
        }
        assert!(
            starts.iter().all(|(out, ..)| out == "there\n"),
            "{starts:?}"
        );
        // Nothing is left of them: names are free, and no other sandbox is known.
        let known = it.client.sandboxes(Some("all"), None).await.unwrap();
        assert_eq!(known.sandboxes.len(), 1);
        let again = SandboxRequest {
            name: Some("try0-1".to_owned()),
            ..request()
        };
        made(&it.client, &again).await.unwrap();
        let taken = it.client.branch(&it.id, &named("try0")).await;
        assert_eq!(code(taken), ErrorCode::NameTaken);
        let none = BranchRequest {
            count: 0,
            ..BranchRequest::default()
        };
        assert_eq!(
            code(it.client.branch(&it.id, &none).await),
            ErrorCode::BadRequest
        );
        let nobody = it.client.branch("nobody", &named("x")).await;
        assert_eq!(code(nobody), ErrorCode::SandboxNotFound);
        it.client.end_sandbox(&it.id).await.unwrap();
        let ended = it.client.branch(&it.id, &named("x")).await;
        assert_eq!(code(ended), ErrorCode::SandboxEnded);
    });
}

pub fn a_paused_sandbox_of_another_version_is_shown_refused_and_removed() {
    runtime().block_on(async {
        let home = Home::new();
        let id = uuid::Uuid::now_v7();
        let folder = home.state().join("sandboxes").join(id.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        let created = std::time::SystemTime::now();
        let record = serde_json::json!({"version": 1, "engine": "0.0.1", "id": id, "name": "old",
            "template": HERE, "created": created, "what": "else"});
        let text = serde_json::to_vec(&record).unwrap();
        std::fs::write(folder.join("sandbox.json"), &text).unwrap();
        let client = started(&home, &[]).await;
        let known = client.sandbox("old").await.unwrap();
        assert_eq!(
            (known.state, known.template.as_str()),
            (SandboxState::Paused, HERE)
        );
        let refused = client.resume("old").await;
        let Err(ClientError::Refused(failure)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(failure.code, ErrorCode::PauseFailed);
        assert!(failure.message.contains("version 0.0.1"), "{failure}");
        // What another version has written is not written to.
        let change = SandboxChange {
            ttl_seconds: Some(1000.0),
            ..SandboxChange::default()
        };
        client.change_sandbox("old", change).await.unwrap();
        assert_eq!(std::fs::read(folder.join("sandbox.json")).unwrap(), text);
        client.end_sandbox("old").await.unwrap();
        assert!(!folder.exists());
    });
}
