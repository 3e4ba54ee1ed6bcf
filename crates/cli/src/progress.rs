//! Telling people how long work goes on: a spinner on a terminal, plain lines elsewhere.

use crate::out::complain;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// One piece of long work.
pub struct Reporter {
    bar: Option<ProgressBar>,
    last: String,
}

impl Reporter {
    /// Says nothing until the work says something.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            last: String::new(),
        }
    }

    /// What is being done now.
    pub fn say(&mut self, message: &str) {
        if message == self.last {
            return;
        }
        message.clone_into(&mut self.last);
        match &self.bar {
            Some(bar) => bar.set_message(message.to_owned()),
            None => complain!("zygote: {message}"),
        }
    }

    /// How far it has come.
    pub fn part(&mut self, message: &str, done: u64, total: u64) {
        let percent = (done * 100).checked_div(total).unwrap_or(100);
        match &self.bar {
            Some(bar) => bar.set_message(format!("{message} {percent} %")),
            None => self.say(message),
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
