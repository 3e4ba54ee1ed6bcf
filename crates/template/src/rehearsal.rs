//! Runs of programs in forks that nobody will see, for what they touch: what every run touches, every
//! run can have ahead.

use crate::guest::{Guest, GuestError};
use std::time::Duration;
use zygote_protocol::{
    AgentMessage, ExitStatus, HostMessage, Identity, ProcessId, Program, PythonSource, Start,
};

/// How long a step may take; emulated hosts are a hundred times slower than real ones, and what
/// watches a guest's pages slows it down further.
const STEP_MAX: Duration = Duration::from_secs(300);
const PROCESS: ProcessId = 1;
const SEED_BYTES: usize = 64;
const STAGE: &str = "run a program";

/// What happens in it, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The fork is somebody.
    Activated,
    /// The program has been started.
    Started,
    /// It has written something.
    Output(Vec<u8>),
    /// It has ended.
    Exited(ExitStatus),
}

/// `python3 -c CODE`.
#[must_use]
pub fn python(code: &str) -> Program {
    Program::Python {
        source: PythonSource::Code(code.as_bytes().to_vec()),
        arguments: vec![],
    }
}

/// Who is told each moment, while the guest stands still.
pub type Seen<'a> = &'a mut dyn FnMut(&Guest, Moment) -> Result<(), GuestError>;

/// Has a guest that has just been restored become somebody, and no more.
///
/// # Errors
/// See [`GuestError`].
pub fn activate(guest: &mut Guest) -> Result<(), GuestError> {
    guest.send(&HostMessage::Activate(identity()?), STAGE, STEP_MAX)?;
    match guest.next(STAGE, STEP_MAX)? {
        AgentMessage::Activated { .. } => Ok(()),
        other => Err(GuestError::Unexpected(format!("{other:?}"))),
    }
}

/// Runs a program in a guest that has just been restored, to its end. Without anybody who looks, the guest
/// runs as any other.
///
/// # Errors
/// See [`GuestError`].
pub fn rehearse(
    guest: &mut Guest,
    program: Program,
    mut seen: Option<Seen<'_>>,
) -> Result<(), GuestError> {
    activate(guest)?;
    stand_still(guest, Moment::Activated, &mut seen)?;
    guest.send(
        &HostMessage::Start(Start::new(PROCESS, program)),
        STAGE,
        STEP_MAX,
    )?;
    loop {
        let moment = match guest.next(STAGE, STEP_MAX)? {
            AgentMessage::Started { .. } => Moment::Started,
            AgentMessage::Stdout { data, .. } | AgentMessage::Stderr { data, .. } => {
                Moment::Output(data)
            }
            AgentMessage::Exited { status, .. } => {
                guest.machine.pause()?;
                return match seen {
                    Some(seen) => seen(guest, Moment::Exited(status)),
                    None => Ok(()),
                };
            }
            other => return Err(GuestError::Unexpected(format!("{other:?}"))),
        };
        stand_still(guest, moment, &mut seen)?;
    }
}

fn stand_still(
    guest: &mut Guest,
    moment: Moment,
    seen: &mut Option<Seen<'_>>,
) -> Result<(), GuestError> {
    if let Some(seen) = seen {
        guest.machine.pause()?;
        seen(guest, moment)?;
        guest.machine.start()?;
    }
    Ok(())
}

/// Nobody's: the fork is thrown away, and nothing of it is kept but which pages it touched.
fn identity() -> std::io::Result<Identity> {
    let mut seed = vec![0; SEED_BYTES];
    let flags = rustix::rand::GetRandomFlags::empty();
    let filled = rustix::rand::getrandom(&mut seed[..], flags)?;
    seed.truncate(filled);
    Ok(Identity {
        hostname: "zygote-rehearsal".to_owned(),
        machine_id: [1; 16],
        boot_id: [1; 16],
        kernel_seed: seed.clone(),
        interpreter_seed: Some(seed),
        reseed: false,
        stays: false,
    })
}
