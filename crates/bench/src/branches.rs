//! What it costs to branch a sandbox that runs, to take it back, and to have it on disk.

use crate::measure::Plan;
use crate::runs::RunError;
use crate::samples::Samples;
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zygote_engine::live::{BranchSpec, EndReason, ProcessSpec, Sandbox, SandboxSpec};
use zygote_engine::{Allowance, Engine, Quota, Settings};
use zygote_template::Store;

/// How long processes may take to stop.
const FREEZE_MAX: Duration = Duration::from_secs(60);
/// Rounds, at most: each is some forks.
const ROUNDS_MAX: usize = 50;

/// Times of sandboxes that live, from the request on.
#[derive(Clone, Debug, Serialize)]
pub struct BranchTimes {
    /// How long the source of a branch stands still.
    pub pause: Samples,
    /// Until a child of a sandbox has answered.
    pub branch: Samples,
    /// Until a sandbox has answered that was taken back.
    pub rollback: Samples,
    /// Until a sandbox is on disk.
    pub to_disk: Samples,
    /// Until it runs again.
    pub from_disk: Samples,
    /// Until a sandbox of a template has answered that was made ahead.
    pub create: Samples,
}

/// Measures all of it, with a Python program that runs meanwhile.
pub async fn measure(store: &Store, plan: &Plan) -> Result<BranchTimes, RunError> {
    let mut settings = Settings::new(plan.zygote_command.clone(), store.clone());
    settings.patience = plan.patience;
    let engine = Engine::new(settings);
    let measured = rounds(&engine, plan).await;
    engine.shut_down().await;
    measured
}

async fn rounds(engine: &Arc<Engine>, plan: &Plan) -> Result<BranchTimes, RunError> {
    let failed = |error: zygote_engine::live::LiveError| RunError::new(&error.to_string());
    let mut times: [Vec<Duration>; 6] = Default::default();
    for round in 0..=plan.runs.min(ROUNDS_MAX) {
        let begun = Instant::now();
        let source = create(engine, plan).await.map_err(failed)?;
        let mut took = vec![begun.elapsed()];
        let command = ["python3", "-c", "import time\nwhile True: time.sleep(0.01)"];
        let program = ProcessSpec {
            command: command.map(|word| word.as_bytes().to_vec()).into(),
            ..ProcessSpec::default()
        };
        source.start(program).await.map_err(failed)?;
        let branched = engine.branch(&source, &once()).await.map_err(failed)?;
        took.push(Duration::from_micros(branched.pause.total_us().into()));
        took.push(branched.took);
        for child in branched.sandboxes {
            child.end(EndReason::Removed).await;
        }
        source.keep(None, FREEZE_MAX, false).await.map_err(failed)?;
        let begun = Instant::now();
        source.roll_back("@-1", false).await.map_err(failed)?;
        took.push(begun.elapsed());
        let begun = Instant::now();
        engine
            .pause(&source, FREEZE_MAX, false)
            .await
            .map_err(failed)?;
        took.push(begun.elapsed());
        let begun = Instant::now();
        engine
            .wake(&source, Quota::default())
            .await
            .map_err(failed)?;
        took.push(begun.elapsed());
        source.end(EndReason::Removed).await;
        // The first has found everything cold.
        if round > 0 {
            times
                .iter_mut()
                .zip(took)
                .for_each(|(all, one)| all.push(one));
        }
    }
    let [create, pause, branch, rollback, to_disk, from_disk] = times.map(Samples::of);
    Ok(BranchTimes {
        pause,
        branch,
        rollback,
        to_disk,
        from_disk,
        create,
    })
}

async fn create(
    engine: &Arc<Engine>,
    plan: &Plan,
) -> Result<Arc<Sandbox>, zygote_engine::live::LiveError> {
    let spec = SandboxSpec {
        template: plan.template.clone(),
        ..SandboxSpec::default()
    };
    engine
        .create(spec, None, Allowance::default(), &|_| ())
        .await
}

fn once() -> BranchSpec {
    BranchSpec {
        count: 1,
        name: None,
        ttl: None,
        idle: None,
        reseed: false,
        limit: FREEZE_MAX,
        anyway: false,
        moment: None,
        allowance: Allowance::default(),
    }
}
