//! This program's own terminal, for a process that has one.

use crate::failure;
use anyhow::Context;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, IsTerminal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use zygote_api::{ProcessInput, TerminalSize};

/// What a terminal is that does not say.
const USUAL: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

/// Keys go to the process as they are typed, until this is dropped.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// From here on.
    pub fn begin() -> anyhow::Result<Self> {
        let cannot = "cannot set the terminal";
        let before = tcgetattr(io::stdin()).context(cannot)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context(cannot)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// A failure if standard input is no terminal.
pub fn check() -> anyhow::Result<()> {
    if io::stdin().is_terminal() {
        return Ok(());
    }
    let failure = failure::usage("standard input is no terminal");
    Err(failure.remedy("leave out -t (--tty)").into())
}

/// Its size.
pub fn size() -> TerminalSize {
    match tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => USUAL,
    }
}

/// Tells a process of each change of its size.
pub fn follow_size(sender: mpsc::Sender<ProcessInput>) -> anyhow::Result<()> {
    let mut changes = signal(SignalKind::window_change()).context("cannot catch signals")?;
    tokio::spawn(async move {
        while changes.recv().await.is_some() {
            let TerminalSize { rows, columns } = size();
            if sender
                .send(ProcessInput::Resize { rows, columns })
                .await
                .is_err()
            {
                return;
            }
        }
    });
    Ok(())
}
