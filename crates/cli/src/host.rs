//! Where machines run: this host's KVM if it can, else the lab, into which this program goes again
//! with the same arguments.

use crate::args::{Global, HostChoice};
use crate::out::complain;
use crate::probed;
use crate::progress::Reporter;
use crate::report;
use anyhow::{Context, bail};
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zygote_daemon::{BUILDS_LOCK_HINT, BuildsLock};
use zygote_lab::{LabCommand, LabConfig, LabError, Streams};
use zygote_template::{SYSTEM_STATE_DIR, Store};
use zygote_vmm::probe::{Probe, probe};

/// Memory of the emulated host.
pub const LAB_MEMORY_MIB: u32 = 6144;
const LAB_CPUS: u8 = 1;
/// Tells the program in the lab that its output ends on a terminal.
pub const TERMINAL_HINT: &str = "ZYGOTE_STDOUT_IS_TERMINAL";

/// Where machines run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this process's host: it may itself be the lab.
    Here,
    /// In a lab that must be started first.
    Lab,
}

/// Decides, by measuring unless the user has decided.
pub fn choose(global: &Global, store: &Store) -> anyhow::Result<Place> {
    if in_lab() {
        return Ok(Place::Here);
    }
    match global.host {
        HostChoice::Lab => Ok(Place::Lab),
        HostChoice::Auto if !probed::is_usable(store) => Ok(Place::Lab),
        HostChoice::Auto => Ok(Place::Here),
        HostChoice::Kvm => {
            let Probe { problems, .. } = probe();
            match problems.first() {
                None => Ok(Place::Here),
                Some(problem) => bail!(
                    "--host kvm: {}; {} (or leave --host out: the lab works anywhere)",
                    problem.cause,
                    problem.remedy
                ),
            }
        }
    }
}

/// Whether this process runs in a lab.
pub fn in_lab() -> bool {
    std::env::var_os(zygote_lab::IN_LAB).is_some()
}

/// Whether standard output ends on a terminal, maybe outside of the lab.
pub fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal() || std::env::var_os(TERMINAL_HINT).is_some()
}

/// The store that the user means. One that the user cannot write to is somebody else's: its templates
/// can be run, and what is written goes to the user's own.
pub fn store(global: &Global) -> anyhow::Result<Store> {
    let absolute =
        |path: &Path| std::path::absolute(path).context("cannot resolve the state directory");
    let own = zygote_template::default_state_dir();
    let state = global.state_dir().map(absolute).transpose()?;
    let mut shared = global.shared_dir().map(absolute).transpose()?;
    let state = match state {
        Some(state) if is_read_only(&state) => {
            shared = Some(state);
            own
        }
        Some(state) => state,
        None => {
            let system = PathBuf::from(SYSTEM_STATE_DIR);
            shared = shared.or_else(|| (own != system).then_some(system));
            own
        }
    };
    Ok(Store::open(state).with_shared(shared))
}

/// Whether something is there that this user can read, and no more.
fn is_read_only(state: &Path) -> bool {
    use rustix::fs::{Access, access};
    access(state, Access::READ_OK | Access::EXEC_OK).is_ok()
        && access(state, Access::WRITE_OK) == Err(rustix::io::Errno::ACCESS)
}

/// Runs this program again in a lab, with the same arguments; gives back its exit status. It keeps
/// its own limits; `timeout` is for a lab in which it does not. What it writes stays in `folders`.
pub fn again_in_lab(
    store: &Store,
    stdin: bool,
    timeout: Option<Duration>,
    folders: &[PathBuf],
) -> anyhow::Result<u8> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut arguments = vec![OsString::from(program)];
    arguments.extend(std::env::args_os().skip(1));
    let mut shares = vec![store.state_dir().to_owned()];
    for folder in folders {
        let folder = match folder.as_os_str().is_empty() {
            true => std::path::absolute("."),
            false => std::path::absolute(folder),
        };
        let folder = folder.context("cannot resolve a folder of --get")?;
        // What is not there yet is made in the lab.
        shares.extend(
            folder
                .ancestors()
                .find(|path| path.is_dir())
                .map(Path::to_owned),
        );
    }
    let job = LabJob {
        arguments,
        shares,
        builds_lock: BuildsLock::HeldOutside,
        icount: false,
        stdin,
        timeout,
    };
    run_in_lab(store, job)
}

/// What runs in a lab.
pub struct LabJob {
    /// Program and arguments.
    pub arguments: Vec<OsString>,
    /// Folders that are shared for writing.
    pub shares: Vec<PathBuf>,
    /// For this program in there: who keeps others from building.
    pub builds_lock: BuildsLock,
    /// Whether the lab's clock counts instructions.
    pub icount: bool,
    /// Whether standard input is passed on.
    pub stdin: bool,
    /// How long it may run.
    pub timeout: Option<Duration>,
}

/// Runs a command in a lab; gives back its exit status. Dies of the signal that ends the lab.
///
/// # Errors
/// `LabError::TimedOut` among them.
pub fn run_in_lab(store: &Store, job: LabJob) -> anyhow::Result<u8> {
    let LabJob {
        arguments,
        shares,
        builds_lock,
        icount,
        stdin,
        timeout,
    } = job;
    let state = store.state_dir();
    std::fs::create_dir_all(state)
        .with_context(|| format!("cannot make the state directory {}", state.display()))?;
    let files = {
        let mut reporter = Reporter::new();
        zygote_lab::prepare(&store.cache(), &mut |line| reporter.say(line))
            .context("cannot prepare the lab")?
    };
    let config = LabConfig {
        files,
        writable: shares,
        memory_mib: LAB_MEMORY_MIB,
        cpus: LAB_CPUS,
        icount,
    };
    let mut environment: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(key, _)| key != "ZYGOTE_HOST" && key != "ZYGOTE_STATE_DIR")
        .filter(|(key, _)| key != "ZYGOTE_SHARED_DIR")
        .collect();
    environment.push(("ZYGOTE_STATE_DIR".into(), state.into()));
    if let Some(shared) = store.shared_dir() {
        environment.push(("ZYGOTE_SHARED_DIR".into(), shared.into()));
    }
    let hint = match builds_lock {
        BuildsLock::OursToTake => "own",
        BuildsLock::HeldOutside => "held",
        BuildsLock::OutOfReach => "",
    };
    environment.push((BUILDS_LOCK_HINT.into(), hint.into()));
    if std::io::stdout().is_terminal() {
        environment.push((TERMINAL_HINT.into(), "1".into()));
    }
    let command = LabCommand {
        arguments,
        environment,
        directory: std::env::current_dir().unwrap_or_else(|_| "/".into()),
        stdin,
        timeout,
    };
    match zygote_lab::run(&config, &command, Streams::inherited()) {
        Ok(status) => Ok(status),
        Err(LabError::Program { message, status }) => {
            complain!("zygote: {message}");
            Ok(status)
        }
        // Whoever read our output has gone, as in `zygote … | head -1`.
        Err(LabError::Output(_)) => Ok(141),
        Err(LabError::Interrupted { signal }) => Ok(report::die_of(signal)),
        Err(error) => Err(error.into()),
    }
}

/// Whether a lab was ended because its command did not end in time.
pub fn is_lab_timeout(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(LabError::TimedOut { .. }))
}
