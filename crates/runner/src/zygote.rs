//! The zygote process: holds a snapshot mapped copy-on-write, and forks runners. Runs no guest,
//! has one thread, and never allocates between fork and the runner's own start.

#![expect(unsafe_code, reason = "fork")]

use crate::children::Children;
use crate::control::{FromZygote, ToZygote, decode, encode};
use crate::loaded::{self, Loaded};
use crate::{packet, process};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Serves the engine over standard input, a SOCK_SEQPACKET socket, until that closes; then ends
/// the runners that are left, and gives back the process's exit status. Call it first thing in a
/// process that was started for it.
pub fn zygote_main() -> u8 {
    match take_control().and_then(|control| live(&control)) {
        Ok(()) => 0,
        // The engine is gone, or talks nonsense: there is nobody to tell.
        Err(_) => 1,
    }
}

/// Moves the control socket away from descriptor 0, which forks would inherit. The user's
/// terminal is nothing for a process that holds a guest.
fn take_control() -> io::Result<OwnedFd> {
    let control = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(control)
}

fn live(control: &OwnedFd) -> io::Result<()> {
    let (bytes, _) = packet::receive(control)?;
    let Ok(ToZygote::Load(load)) = decode(&bytes) else {
        return Err(io::Error::other("the first message must be Load"));
    };
    let loaded = match loaded::load(&load) {
        Ok(loaded) => loaded,
        Err(message) => return tell(control, &FromZygote::Refused { message }),
    };
    // Everything is open that will be needed. Behind this line there is no host.
    let jail = match zygote_jail::enter() {
        Ok(report) => report,
        Err(error) => {
            let message = process::chain(&error);
            return tell(control, &FromZygote::Refused { message });
        }
    };
    let mut children = Children::new()?;
    tell(
        control,
        &FromZygote::Loaded {
            memory_bytes: loaded.memory.size_bytes(),
            vcpus: loaded.state.vcpus.len() as u32,
            missing_walls: jail.missing,
        },
    )?;
    let served = serve(control, &loaded, &mut children);
    children.end_all();
    served
}

fn serve(control: &OwnedFd, loaded: &Loaded, children: &mut Children) -> io::Result<()> {
    loop {
        let mut fds = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(&*children, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let asked = !fds[0].revents().is_empty();
        if !fds[1].revents().is_empty() {
            children.reap(|pid, status| tell(control, &FromZygote::Ended { pid, status }))?;
        }
        if asked {
            let (bytes, descriptors) = packet::receive(control)?;
            if bytes.is_empty() {
                return Ok(());
            }
            answer(control, &bytes, descriptors, loaded, children)?;
        }
    }
}

fn answer(
    control: &OwnedFd,
    bytes: &[u8],
    descriptors: Vec<OwnedFd>,
    loaded: &Loaded,
    children: &mut Children,
) -> io::Result<()> {
    let refuse = |message: &str| {
        let message = message.to_owned();
        tell(control, &FromZygote::ForkFailed { message })
    };
    let Ok(ToZygote::Fork) = decode(bytes) else {
        return refuse("only forks can be asked for once the snapshot is loaded");
    };
    let Ok([agent, runner_control]) = <[OwnedFd; 2]>::try_from(descriptors) else {
        return refuse("a fork needs the agent's stream and a control socket");
    };
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        0 => {
            let status = process::runner_main(loaded, agent, runner_control);
            // SAFETY: ends the child without running what the parent has registered for its end.
            unsafe { libc::_exit(status) }
        }
        pid if pid > 0 => {
            let pid = pid as u32;
            children.add(pid);
            tell(control, &FromZygote::Forked { pid })
        }
        _ => refuse(&format!(
            "cannot fork a runner: {} (too many processes, or too little memory?)",
            io::Error::last_os_error()
        )),
    }
}

fn tell(control: &OwnedFd, message: &FromZygote) -> io::Result<()> {
    let bytes = encode(message).map_err(io::Error::other)?;
    packet::send(control.as_fd(), &bytes, &[])
}
