//! One run whose streams are this program's.

use crate::args::RunArgs;
use crate::interrupt::Interrupts;
use crate::out;
use crate::program::Job;
use crate::report::{exit_code, sentence};
use crate::run::End;
use anyhow::Context;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use tokio::sync::mpsc;
use zygote_engine::{Event, ExitStatus, Outcome, Stdin, Zygote};

/// Output that waits for a slow reader, in messages of up to 64 KiB.
const EVENTS_MAX: usize = 16;
const INPUT_CHUNK_BYTES: usize = 32 * 1024;
/// How much of the end of standard error is remembered.
const TAIL_BYTES: usize = 4096;

/// Runs it to its end.
pub async fn run(
    zygote: &Zygote,
    args: &RunArgs,
    job: Job,
    interrupts: &Interrupts,
) -> anyhow::Result<End> {
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let request = job.request(args, stdin_stream(), interrupts.for_program());
    let running = zygote_engine::run(zygote, request, sender);
    let mut printing = tokio::task::spawn_blocking(move || print_events(events));
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
    let tail = match printed {
        Ok(tail) => tail,
        error => return reader_gone(error),
    };
    let hint = job.import_hint(tail.as_slices().0);
    let sentences = sentence(&result.outcome, args.timeout.0)
        .into_iter()
        .chain(hint);
    let sentences: Vec<String> = sentences.collect();
    // Not on this thread: who reads it may be slow, and signals must be heard.
    let telling = tokio::task::spawn_blocking(move || {
        for sentence in sentences {
            out::complain!("zygote: {sentence}");
        }
    });
    telling.await.context("printing panicked")?;
    Ok(end(&result.outcome, interrupts.last()))
}

/// Who was sent a signal, and passed it on to a program that it ended, dies of it too.
pub fn end(outcome: &Outcome, signal: Option<i32>) -> End {
    match (outcome, signal) {
        (Outcome::Exited(ExitStatus::Signal { signal: by, .. }), Some(signal))
            if i32::from(*by) == signal =>
        {
            End::Signal(signal)
        }
        _ => End::Code(exit_code(outcome)),
    }
}

fn reader_gone(printed: io::Result<VecDeque<u8>>) -> anyhow::Result<End> {
    Ok(End::Code(printed.map_or_else(
        |error| out::code(&error),
        |_| out::READER_GONE,
    )))
}

/// Prints output as it comes, until it ends; a reader that has gone ends it early. Gives back the
/// end of standard error.
fn print_events(mut events: mpsc::Receiver<Event>) -> io::Result<VecDeque<u8>> {
    let mut tail = VecDeque::new();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Activated => {}
            Event::Stdout(data) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&data)?;
                stdout.flush()?;
            }
            Event::Stderr(data) => {
                tail.extend(&data[data.len().saturating_sub(TAIL_BYTES)..]);
                tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
                io::stderr().lock().write_all(&data)?;
            }
        }
    }
    tail.make_contiguous();
    Ok(tail)
}

/// Standard input in chunks. The thread that reads it ends with the process.
fn stdin_stream() -> Stdin {
    let (sender, chunks) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut chunk = vec![0; INPUT_CHUNK_BYTES];
        while let Ok(count) = input.read(&mut chunk) {
            if count == 0 || sender.blocking_send(chunk[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    Stdin::Stream(chunks)
}
