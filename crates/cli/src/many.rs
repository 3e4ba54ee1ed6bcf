//! Runs whose output is collected: several at once, or one for a machine. Each is printed as it
//! ends.

use crate::args::RunArgs;
use crate::get::Received;
use crate::interrupt::Interrupts;
use crate::one;
use crate::out;
use crate::program::{Job, Stdin, wants_stdin};
use crate::report::{FAILED, RunRecord};
use crate::run::End;
use crate::running::{Output, follow};
use anyhow::Context;
use futures_util::StreamExt;
use futures_util::stream;
use std::io::{self, Read, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_api::{COLLECTED_MAX_BYTES, Collected, ErrorCode, ExecResult, Failure, OutputBudget};
use zygote_daemon::{Client, ClientError};

/// Runs at once; others wait for one to end.
pub const AT_ONCE_MAX: usize = 64;
/// Output that is kept of all that run, together.
const KEPT_MAX_BYTES: usize = 1 << 30;
const OUTPUT_MAX: usize = 16;
/// The signal that kills runs: the one before is the programs'.
const KILLING: u32 = 2;
/// Runs that wait to be printed.
const RECORDS_MAX: usize = 64;

/// Runs them to their ends.
pub async fn run(
    client: &Client,
    args: &RunArgs,
    job: Job,
    interrupts: &Interrupts,
) -> anyhow::Result<End> {
    let stdin = if wants_stdin(args) {
        let read = tokio::task::spawn_blocking(|| {
            let mut bytes = Vec::new();
            io::stdin().read_to_end(&mut bytes).map(|_| bytes)
        });
        // Nothing runs yet: a signal is ours.
        tokio::select! {
            bytes = read => Stdin::Copy(Arc::<[u8]>::from(
                bytes.context("reading panicked")?.context("cannot read standard input")?,
            )),
            signal = interrupts.after(1) => return Ok(interrupted(args, signal)),
        }
    } else {
        Stdin::Empty
    };
    let budget = OutputBudget::new(KEPT_MAX_BYTES);
    let request = job.request(args, stdin != Stdin::Empty);
    let (stdin, request, job, budget) = (&stdin, &request, &job, &budget);
    let runs = stream::iter(0..args.count as usize)
        // Who has been told to end begins nothing new.
        .take_while(|_| std::future::ready(interrupts.last().is_none()))
        .map(|index| async move {
            let (sender, output) = mpsc::channel(OUTPUT_MAX);
            let running = async {
                let events = client.exec(request, job.input(stdin.clone())).await?;
                follow(client, events, interrupts.for_program(), sender).await
            };
            // Dropped, the run is killed; what it has said until then is told all the same.
            let running = async {
                tokio::select! {
                    result = running => result,
                    signal = interrupts.after(KILLING) => Ok(killed(args, signal)),
                }
            };
            let received = Received::new(&args.get, (args.count > 1).then_some(index));
            let collecting = collect(output, budget, received);
            let (result, (output, received)) = tokio::join!(running, collecting);
            let mut result = failed_is_a_result(args, result);
            received.into_result(&mut result);
            (index, result, output)
        })
        .buffer_unordered(AT_ONCE_MAX);
    tokio::pin!(runs);
    let (records, waiting) = mpsc::channel(RECORDS_MAX);
    let printer = Printer {
        as_json: args.json,
        job: job.clone(),
    };
    let printing = tokio::task::spawn_blocking(move || printer.print_all(waiting));
    let (mut worst, mut signalled) = (0, None);
    while let Some(record) = runs.next().await {
        let result = &record.1;
        if worst == 0 {
            worst = result.exit_code;
        }
        if let End::Signal(signal) = one::end(result, interrupts.last()) {
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

async fn collect(
    mut output: mpsc::Receiver<Output>,
    budget: &Arc<OutputBudget>,
    mut received: Received,
) -> (Collected, Received) {
    let mut collected = Collected::new(COLLECTED_MAX_BYTES, budget);
    while let Some(piece) = output.recv().await {
        match piece {
            Output::Stdout(data) => collected.push_stdout(&data),
            Output::Stderr(data) => collected.push_stderr(&data),
            Output::Got(index, piece) => received.take(index, piece),
        }
    }
    (collected, received)
}

/// A run for which there was no sandbox has a record as well.
fn failed_is_a_result(args: &RunArgs, ran: Result<ExecResult, ClientError>) -> ExecResult {
    ran.unwrap_or_else(|error| ExecResult {
        template: args.template.clone(),
        exit_code: FAILED,
        error: Some(error.to_failure()),
        ..ExecResult::default()
    })
}

/// A signal came before there was anything to run.
pub fn interrupted(args: &RunArgs, signal: i32) -> End {
    if args.json {
        let failure = Failure::new(ErrorCode::Interrupted, "a signal came before anything ran");
        out::say!("{}", serde_json::json!({ "error": failure }));
    }
    End::Signal(signal)
}

/// A run that a signal to this program has ended.
fn killed(args: &RunArgs, signal: i32) -> ExecResult {
    let message = "a second signal ended the sandbox";
    let signal = u8::try_from(signal).unwrap_or_default();
    ExecResult {
        template: args.template.clone(),
        exit_code: 128_u8.saturating_add(signal),
        signal: Some(signal),
        error: Some(Failure::new(ErrorCode::Interrupted, message)),
        ..ExecResult::default()
    }
}

/// Output of one of several, each line with its number before it.
fn write_lines(stream: &mut impl Write, index: usize, output: &[u8]) -> io::Result<()> {
    for line in output.split_inclusive(|byte| *byte == b'\n') {
        write!(stream, "{index} | ")?;
        stream.write_all(line)?;
    }
    if output.last().is_some_and(|last| *last != b'\n') {
        writeln!(stream)?;
    }
    Ok(())
}

/// A run that has ended: its number, how, and what it has said.
type Record = (usize, ExecResult, Collected);

/// Prints runs as they end, on a thread that may wait for a slow reader.
struct Printer {
    as_json: bool,
    job: Job,
}

impl Printer {
    fn print_all(&self, mut records: mpsc::Receiver<Record>) -> io::Result<()> {
        while let Some((index, result, output)) = records.blocking_recv() {
            self.print(index, result, output)?;
        }
        Ok(())
    }

    fn print(&self, index: usize, result: ExecResult, mut output: Collected) -> io::Result<()> {
        let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
        let hint = self.job.import_hint(&output.stderr);
        if self.as_json {
            let record = RunRecord::new(index, result, &mut output, hint);
            let line = serde_json::to_string(&record)?;
            writeln!(stdout, "{line}")?;
        } else {
            write_lines(&mut stdout, index, &output.stdout)?;
            write_lines(&mut stderr, index, &output.stderr)?;
            let error = result.error.map(|error| error.to_string());
            for sentence in error.into_iter().chain(hint) {
                writeln!(stderr, "zygote: run {index}: {sentence}")?;
            }
        }
        stdout.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_of_several_runs_says_whose_it_is() {
        let mut told = Vec::new();
        write_lines(&mut told, 3, b"a\nb").unwrap();
        write_lines(&mut told, 4, b"").unwrap();
        assert_eq!(String::from_utf8(told).unwrap(), "3 | a\n3 | b\n");
    }
}
