//! The connection to a lab: threads that may block, so that the lab's owner never does.
//!
//! A lab that is alive answers. One that has said nothing for [`SILENCE_MAX`], though it was asked
//! every [`PING_EVERY`], has hung: an emulator can.

use crate::wire::{self, FromLab, INPUT_WINDOW_BYTES, PIECE_MAX_BYTES, ToLab};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the lab is listened to before it is asked whether it is alive.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A lab that has been silent for so long is dead.
const SILENCE_MAX: Duration = Duration::from_secs(55);

/// Where the program's streams come from and go to.
pub struct Streams {
    /// Standard input, if the command has one.
    pub input: Box<dyn Read + Send>,
    /// Standard output.
    pub output: Box<dyn Write + Send>,
    /// Standard error.
    pub error: Box<dyn Write + Send>,
}

impl Streams {
    /// Those of this process.
    pub fn inherited() -> Self {
        Self {
            input: Box::new(io::stdin()),
            output: Box::new(io::stdout()),
            error: Box::new(io::stderr()),
        }
    }
}

/// What the lab's owner is told.
#[derive(Debug)]
pub enum Event {
    /// It is up, and waits for its job.
    Up,
    /// This process has got a signal.
    Signal(i32),
    /// Nobody wants the lab any more.
    Ended,
    /// The program has ended, and its output is written.
    Exited(u8),
    /// The program could not be run.
    Failed {
        /// Why.
        message: String,
        /// As a shell tells it.
        status: u8,
    },
    /// The program's output cannot be written.
    OutputGone(io::Error),
    /// The lab is of no more use; completes "the lab …".
    Broken(String),
}

/// The owner's end. All of its threads end with the lab, or with the process.
pub struct Link {
    outgoing: Sender<ToLab>,
    window: Arc<Window>,
    input: Option<Box<dyn Read + Send>>,
}

impl Link {
    /// Begins to listen.
    pub fn open(port: UnixStream, streams: Streams, events: Sender<Event>) -> io::Result<Self> {
        port.set_read_timeout(Some(PING_EVERY))?;
        let writer = port.try_clone()?;
        let (outgoing, messages) = channel();
        let window = Arc::new(Window::default());
        start("lab-writer", move || write(writer, &messages))?;
        let listener = Listener {
            port: Patient {
                port,
                pings: None,
                heard: Instant::now(),
            },
            pings: outgoing.clone(),
            window: Arc::clone(&window),
            output: streams.output,
            error: streams.error,
        };
        start("lab-listener", move || {
            // Fails only if the owner has gone already.
            let mut tell = |event| events.send(event).is_ok();
            let last = listener.listen(&mut tell);
            tell(last);
        })?;
        Ok(Self {
            outgoing,
            window,
            input: Some(streams.input),
        })
    }

    /// Queues a message. If the lab is gone the listener tells.
    pub fn send(&self, message: ToLab) {
        let _ = self.outgoing.send(message);
    }

    /// Begins to pass input on, or tells that there is none.
    pub fn forward_input(&mut self, wanted: bool) {
        let Some(input) = self.input.take().filter(|_| wanted) else {
            return;
        };
        let (outgoing, window) = (self.outgoing.clone(), Arc::clone(&self.window));
        if start("lab-input", move || forward(input, &outgoing, &window)).is_err() {
            self.send(ToLab::InputEnd);
        }
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.into());
    thread.spawn(work).map(drop)
}

/// Blocks while the lab takes nothing, until QEMU ends.
fn write(mut port: UnixStream, messages: &Receiver<ToLab>) {
    for message in messages {
        if wire::send(&mut port, &message).is_err() {
            return;
        }
    }
}

struct Listener {
    port: Patient,
    pings: Sender<ToLab>,
    window: Arc<Window>,
    output: Box<dyn Write + Send>,
    error: Box<dyn Write + Send>,
}

impl Listener {
    /// Gives back the last event.
    fn listen(mut self, tell: &mut dyn FnMut(Event) -> bool) -> Event {
        loop {
            match wire::receive(&mut self.port) {
                Ok(FromLab::Up) => {
                    self.port.pings = Some(self.pings.clone());
                    tell(Event::Up);
                }
                Ok(FromLab::Alive) => {}
                Ok(FromLab::Output(bytes)) => {
                    if let Err(error) = put(&mut self.output, &bytes) {
                        return Event::OutputGone(error);
                    }
                }
                Ok(FromLab::Error(bytes)) => {
                    if let Err(error) = put(&mut self.error, &bytes) {
                        return Event::OutputGone(error);
                    }
                }
                Ok(FromLab::Taken(count)) => self.window.taken(count as usize),
                Ok(FromLab::Exit { status }) => return Event::Exited(status),
                Ok(FromLab::Failed { message, status }) => {
                    return Event::Failed { message, status };
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    let silence_s = SILENCE_MAX.as_secs();
                    return Event::Broken(format!("has hung: it was silent for {silence_s} s"));
                }
                Err(_) => return Event::Broken("broke down".to_owned()),
            }
            // Nobody listened while somebody was slow to read our output.
            self.port.heard = Instant::now();
        }
    }
}

fn put(stream: &mut Box<dyn Write + Send>, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

/// Reads from the port; asks a silent lab whether it is alive, and gives up on a dead one with
/// `TimedOut`.
struct Patient {
    port: UnixStream,
    /// Once it is up.
    pings: Option<Sender<ToLab>>,
    heard: Instant,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.port.read(buffer) {
                Ok(count) => {
                    self.heard = Instant::now();
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            // How long it takes to come up is the owner's concern.
            let Some(pings) = &self.pings else { continue };
            if self.heard.elapsed() >= SILENCE_MAX {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let _ = pings.send(ToLab::Ping);
        }
    }
}

/// How much input is on its way to a program that has not taken it yet.
#[derive(Default)]
struct Window {
    outstanding: Mutex<usize>,
    taken: Condvar,
}

impl Window {
    fn lock(&self) -> MutexGuard<'_, usize> {
        let locked = self.outstanding.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self, count: usize) {
        let mut outstanding = self.lock();
        *outstanding = outstanding.saturating_sub(count);
        self.taken.notify_all();
    }

    /// Waits until so many bytes more may be on their way: for as long as the program takes
    /// nothing, on a thread of its own that ends with the process.
    fn reserve(&self, count: usize) {
        let mut outstanding = self.lock();
        while *outstanding + count > INPUT_WINDOW_BYTES {
            let waited = self.taken.wait(outstanding);
            outstanding = waited.unwrap_or_else(PoisonError::into_inner);
        }
        *outstanding += count;
    }
}

/// Ends with the input, or with the lab.
fn forward(mut input: Box<dyn Read + Send>, outgoing: &Sender<ToLab>, window: &Window) {
    let mut piece = vec![0; PIECE_MAX_BYTES];
    loop {
        let message = match input.read(&mut piece) {
            Ok(0) => ToLab::InputEnd,
            Ok(count) => {
                window.reserve(count);
                ToLab::Input(piece[..count].to_vec())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => ToLab::InputEnd,
        };
        let last = message == ToLab::InputEnd;
        if outgoing.send(message).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> (Link, UnixStream, Receiver<Event>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (events, inbox) = channel();
        let streams = Streams {
            input: Box::new(io::empty()),
            output: Box::new(io::sink()),
            error: Box::new(io::sink()),
        };
        (Link::open(ours, streams, events).unwrap(), theirs, inbox)
    }

    #[test]
    fn a_lab_that_is_gone_is_told_at_once() {
        let (_link, mut lab, inbox) = link();
        wire::send(&mut lab, &FromLab::Up).unwrap();
        assert!(matches!(inbox.recv().unwrap(), Event::Up));
        drop(lab);
        assert!(matches!(inbox.recv().unwrap(), Event::Broken(_)));
    }

    #[test]
    fn a_silent_lab_is_asked_before_it_is_given_up() {
        let (port, lab) = UnixStream::pair().unwrap();
        port.set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let (pings, asked) = channel();
        let mut patient = Patient {
            port,
            pings: Some(pings),
            heard: Instant::now(),
        };
        let reading = std::thread::spawn(move || {
            let first = patient.read(&mut [0; 1]).unwrap();
            patient.heard = Instant::now().checked_sub(SILENCE_MAX).unwrap();
            (first, patient.read(&mut [0; 1]).unwrap_err().kind())
        });
        assert_eq!(asked.recv().unwrap(), ToLab::Ping);
        (&lab).write_all(b"x").unwrap();
        assert_eq!(reading.join().unwrap(), (1, io::ErrorKind::TimedOut));
    }
}
