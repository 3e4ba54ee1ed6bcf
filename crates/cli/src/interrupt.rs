//! Signals that end a program: the first is the program's, in its sandbox; the second is ours.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// Signals of this process since it began to listen.
pub struct Interrupts {
    seen: watch::Receiver<Seen>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    count: u32,
    last: u8,
}

impl Interrupts {
    /// Catches SIGINT, SIGTERM and SIGHUP from here on. Needs a runtime.
    pub fn listen() -> anyhow::Result<Self> {
        let caught = |kind| signal(kind).context("cannot catch signals");
        let mut interrupt = caught(SignalKind::interrupt())?;
        let mut terminate = caught(SignalKind::terminate())?;
        let mut hangup = caught(SignalKind::hangup())?;
        let (sender, seen) = watch::channel(Seen::default());
        tokio::spawn(async move {
            loop {
                let last = any(&mut interrupt, &mut terminate, &mut hangup).await;
                sender.send_modify(|seen| {
                    seen.count += 1;
                    seen.last = last;
                });
            }
        });
        Ok(Self { seen })
    }

    /// For a program: the first signal.
    pub fn for_program(&self) -> mpsc::Receiver<u8> {
        let (sender, signals) = mpsc::channel(1);
        let mut seen = self.seen.clone();
        tokio::spawn(async move {
            if let Ok(first) = seen
                .wait_for(|seen| seen.count >= 1)
                .await
                .map(|seen| seen.last)
            {
                // The program may have ended.
                let _ = sender.send(first).await;
            }
        });
        signals
    }

    /// Waits for so many signals; gives back the last.
    pub async fn after(&self, count: u32) -> i32 {
        let mut seen = self.seen.clone();
        match seen.wait_for(|seen| seen.count >= count).await {
            Ok(seen) => seen.last.into(),
            // The sender lives as long as the runtime.
            Err(_) => std::future::pending().await,
        }
    }

    /// How many there were.
    pub fn count(&self) -> u32 {
        self.seen.borrow().count
    }

    /// The last signal, if there was one.
    pub fn last(&self) -> Option<i32> {
        let seen = *self.seen.borrow();
        (seen.count > 0).then(|| seen.last.into())
    }
}

async fn any(interrupt: &mut Signal, terminate: &mut Signal, hangup: &mut Signal) -> u8 {
    tokio::select! {
        _ = interrupt.recv() => 2,
        _ = terminate.recv() => 15,
        _ = hangup.recv() => 1,
    }
}
