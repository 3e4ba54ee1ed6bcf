//! One run whose streams are this program's.

use crate::args::RunArgs;
use crate::get::Received;
use crate::interrupt::Interrupts;
use crate::out;
use crate::program::{Job, Stdin};
use crate::run::End;
use crate::running::{Output, follow};
use anyhow::Context;
use std::collections::VecDeque;
use std::io::{self, Write};
use tokio::sync::mpsc;
use zygote_api::ExecResult;
use zygote_daemon::Client;

/// Output that waits for a slow reader, in messages of up to 64 KiB.
const OUTPUT_MAX: usize = 16;
/// How much of the end of standard error is remembered.
const TAIL_BYTES: usize = 4096;

/// Runs it to its end.
pub async fn run(
    client: &Client,
    args: &RunArgs,
    job: Job,
    interrupts: &Interrupts,
) -> anyhow::Result<End> {
    let (sender, output) = mpsc::channel(OUTPUT_MAX);
    let received = Received::new(&args.get, None);
    let mut printing = tokio::task::spawn_blocking(move || print_output(output, received));
    let running = async {
        let input = job.input(Stdin::Ours);
        let events = client.exec(&job.request(args, true), input).await?;
        follow(client, events, interrupts.for_program(), sender).await
    };
    let result = tokio::select! {
        result = running => result,
        // Only an error ends it first: nobody reads the output, and the fork is killed.
        printed = &mut printing => return reader_gone(printed.context("printing panicked")?),
    };
    // The program has ended: from here on a signal is ours.
    let seen = interrupts.count();
    let printed = tokio::select! {
        printed = &mut printing => printed.context("printing panicked")?,
        signal = interrupts.after(seen + 1) => return Ok(End::Signal(signal)),
    };
    let printed = match printed {
        Ok(printed) => printed,
        error => return reader_gone(error),
    };
    let mut result = result?;
    printed.received.into_result(&mut result);
    let hint = job.import_hint(printed.tail.as_slices().0);
    let error = result.error.as_ref().map(ToString::to_string);
    let sentences: Vec<String> = error.into_iter().chain(hint).collect();
    // Not on this thread: who reads it may be slow, and signals must be heard.
    let telling = tokio::task::spawn_blocking(move || {
        for sentence in sentences {
            out::complain!("zygote: {sentence}");
        }
    });
    telling.await.context("printing panicked")?;
    Ok(end(&result, interrupts.last()))
}

/// Who was sent a signal, and passed it on to a program that it ended, dies of it too.
pub fn end(result: &ExecResult, signal: Option<i32>) -> End {
    match (result.signal, signal) {
        (Some(by), Some(signal)) if i32::from(by) == signal => End::Signal(signal),
        _ => End::Code(result.exit_code),
    }
}

pub fn reader_gone(printed: io::Result<Printed>) -> anyhow::Result<End> {
    Ok(End::Code(printed.map_or_else(
        |error| out::code(&error),
        |_| out::READER_GONE,
    )))
}

/// What is left of output that has been printed.
pub struct Printed {
    /// The end of standard error.
    pub tail: VecDeque<u8>,
    /// Files.
    pub received: Received,
}

/// Prints output as it comes, until it ends, and writes files; a reader that has gone ends it early.
pub fn print_output(
    mut output: mpsc::Receiver<Output>,
    mut received: Received,
) -> io::Result<Printed> {
    let mut tail = VecDeque::new();
    while let Some(piece) = output.blocking_recv() {
        match piece {
            Output::Stdout(data) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&data)?;
                stdout.flush()?;
            }
            Output::Stderr(data) => {
                tail.extend(&data[data.len().saturating_sub(TAIL_BYTES)..]);
                tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
                io::stderr().lock().write_all(&data)?;
            }
            Output::Got(index, piece) => received.take(index, piece),
        }
    }
    tail.make_contiguous();
    Ok(Printed { tail, received })
}
