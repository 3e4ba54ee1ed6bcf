//! Runs whose output is collected: several at once, or one for a machine. Each is printed as it
//! ends.

use crate::args::RunArgs;
use crate::host::{self, Place};
use crate::interrupt::Interrupts;
use crate::one;
use crate::out;
use crate::program::{Job, wants_stdin};
use crate::report::{RunRecord, exit_code, sentence};
use crate::run::End;
use anyhow::Context;
use futures_util::StreamExt;
use futures_util::stream;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use zygote_engine::{CAPTURE_MAX_BYTES, Captured, OutputBudget, RunResult, Stdin, Zygote, capture};

/// Runs at once; others wait for one to end.
const AT_ONCE_MAX: usize = 64;
/// Output that is kept of all that run, together.
const CAPTURED_MAX_BYTES: usize = 1 << 30;
const EVENTS_MAX: usize = 16;
/// Runs that wait to be printed.
const RECORDS_MAX: usize = 64;

/// Runs them to their ends.
pub async fn run(
    zygotes: &[Zygote],
    args: &RunArgs,
    job: Job,
    interrupts: &Interrupts,
) -> anyhow::Result<End> {
    let input = if wants_stdin(args) {
        let read = tokio::task::spawn_blocking(|| {
            let mut bytes = Vec::new();
            io::stdin().read_to_end(&mut bytes).map(|_| bytes)
        });
        // Nothing runs yet: a signal is ours.
        tokio::select! {
            bytes = read => Some(Arc::<[u8]>::from(
                bytes.context("reading panicked")?.context("cannot read standard input")?,
            )),
            signal = interrupts.after(1) => return Ok(End::Signal(signal)),
        }
    } else {
        None
    };
    let budget = Arc::new(OutputBudget::new(CAPTURED_MAX_BYTES));
    let numbered = zygotes.iter().cycle().take(args.count as usize).enumerate();
    let (input, job, budget) = (&input, &job, &budget);
    let runs = stream::iter(numbered)
        // Who has been told to end begins nothing new.
        .take_while(|_| std::future::ready(interrupts.last().is_none()))
        .map(|(index, zygote)| async move {
            let (sender, events) = mpsc::channel(EVENTS_MAX);
            let request = job.request(args, stdin_copy(input.as_ref()), interrupts.for_program());
            let running = zygote_engine::run(zygote, request, sender);
            let captured = capture(events, CAPTURE_MAX_BYTES, budget);
            let (result, output) = tokio::join!(running, captured);
            (index, result, output)
        })
        .buffer_unordered(AT_ONCE_MAX);
    tokio::pin!(runs);
    let (records, waiting) = mpsc::channel(RECORDS_MAX);
    let printer = Printer::new(args, job, Arc::clone(budget));
    let printing = tokio::task::spawn_blocking(move || printer.print_all(waiting));
    let (mut worst, mut signalled) = (0, None);
    while let Some(record) = runs.next().await {
        let outcome = &record.1.outcome;
        if worst == 0 {
            worst = exit_code(outcome);
        }
        if let End::Signal(signal) = one::end(outcome, interrupts.last()) {
            signalled = Some(signal);
        }
        // Only an error ends the printer first: nobody reads, and what runs is killed.
        if records.send(record).await.is_err() {
            break;
        }
    }
    drop(records);
    let seen = interrupts.count();
    let printed = tokio::select! {
        printed = printing => printed.context("printing panicked")?,
        signal = interrupts.after(seen + 1) => return Ok(End::Signal(signal)),
    };
    if let Err(error) = printed {
        return Ok(End::Code(out::code(&error)));
    }
    // Those that never began.
    let signal = signalled.or(interrupts.last().filter(|_| worst == 0 && args.count > 1));
    Ok(signal.map_or(End::Code(worst), End::Signal))
}

/// All of standard input, for each fork anew.
fn stdin_copy(input: Option<&Arc<[u8]>>) -> Stdin {
    const PIECE_BYTES: usize = 1 << 20;
    let Some(input) = input.map(Arc::clone) else {
        return Stdin::Empty;
    };
    let (sender, chunks) = mpsc::channel(1);
    tokio::spawn(async move {
        for piece in input.chunks(PIECE_BYTES) {
            // The program may have ended before it has read all.
            if sender.send(piece.to_vec()).await.is_err() {
                return;
            }
        }
    });
    Stdin::Stream(chunks)
}

/// A run that has ended: its number, how, and what it has said.
type Record = (usize, RunResult, Captured);

/// Prints runs as they end, on a thread that may wait for a slow reader.
struct Printer {
    template: String,
    as_json: bool,
    limit: Option<Duration>,
    job: Job,
    budget: Arc<OutputBudget>,
}

impl Printer {
    fn new(args: &RunArgs, job: &Job, budget: Arc<OutputBudget>) -> Self {
        Self {
            template: args.template.clone(),
            as_json: args.json,
            limit: args.timeout.0,
            job: job.clone(),
            budget,
        }
    }

    fn print_all(&self, mut records: mpsc::Receiver<Record>) -> io::Result<()> {
        while let Some((index, result, output)) = records.blocking_recv() {
            self.print(index, &result, &output)?;
            self.budget.free(&output);
        }
        Ok(())
    }

    fn print(&self, index: usize, result: &RunResult, output: &Captured) -> io::Result<()> {
        let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
        if self.as_json {
            let host = host::name(Place::Here);
            let mut record = RunRecord::new(&self.template, host, self.limit, result, output);
            record.index = index;
            record.hint = self.job.import_hint(&output.stderr);
            let line = serde_json::to_string(&record)?;
            writeln!(stdout, "{line}")?;
        } else {
            stdout.write_all(&output.stdout)?;
            stderr.write_all(&output.stderr)?;
            let hint = self.job.import_hint(&output.stderr);
            for sentence in sentence(&result.outcome, self.limit)
                .into_iter()
                .chain(hint)
            {
                writeln!(stderr, "zygote: {sentence}")?;
            }
        }
        stdout.flush()
    }
}
