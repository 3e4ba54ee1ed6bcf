//! The zygote process: holds a snapshot mapped copy-on-write, and forks runners. Runs no guest,
//! has one thread, and never allocates between fork and the runner's own start.

#![expect(unsafe_code, reason = "fork, mallopt, malloc_trim")]

use crate::children::Children;
use crate::control::{
    FromZygote, Load, MissingWall, PACKET_MAX_BYTES, REQUEST_MAX_BYTES, ToZygote, decode, encode,
};
use crate::loaded::{self, Loaded};
use crate::process::{Fate, Making};
use crate::{packet, pages, process};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::mem::forget;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zygote_jail::{Filter, Role, cgroup};

/// What a zygote or a runner may map beside its guest's memory: programs, stacks of 32 vCPUs, heap.
const ADDRESS_SPACE_BESIDE_BYTES: u64 = 1 << 30;

/// Serves the engine over standard input, a SOCK_SEQPACKET socket, until that closes; then ends
/// the runners that are left, and gives back the process's exit status. Call it first thing in a
/// process that was started for it.
pub fn zygote_main() -> u8 {
    // An arena for each thread would cost each vCPU of a fork two calls and 128 MiB of addresses.
    // SAFETY: sets a number, before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    match take_control().and_then(live) {
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

fn live(control: OwnedFd) -> io::Result<()> {
    let Some((loaded, children)) = begin(&control)? else {
        return Ok(());
    };
    serve_all(loaded, children, control)
}

/// Until the engine lets go of this process, which may be a runner and a zygote again in between: each
/// child goes on from here, so that a branch of a branch does not lie deeper on its stack.
fn serve_all(mut loaded: Loaded, mut children: Children, mut control: OwnedFd) -> io::Result<()> {
    loop {
        let making = match serve(&control, &loaded, &mut children) {
            Ok(Some(making)) => making,
            over => {
                children.end_all();
                return over.map(|_| ());
            }
        };
        // The parent's; the runner closes what it has no use for, all at once.
        forget(control);
        match process::runner_main(&loaded, making, children.as_fd()) {
            // SAFETY: ends the child without running what the parent has registered for its end.
            Fate::End(status) => unsafe { libc::_exit(status) },
            Fate::Zygote(branch) => {
                let _ = rustix::thread::set_name(c"zygote-branch");
                loaded.become_branch(*branch.state);
                children.begin_anew();
                control = branch.control;
                tell_loaded(&control, &loaded, Vec::new())?;
            }
        }
    }
}

/// Loads the snapshot that the first message names, and goes into the jail; `None`: it is not usable, and
/// the engine has been told, or the engine has gone.
fn begin(control: &OwnedFd) -> io::Result<Option<(Loaded, Children)>> {
    let mut bytes = vec![0; PACKET_MAX_BYTES];
    let (length, _) = packet::receive(control, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    let Ok(ToZygote::Load(load)) = decode(&bytes[..length]) else {
        return Err(io::Error::other("the first message must be Load"));
    };
    let mut missing_walls = limit(&load);
    let mut loaded = match loaded::load(&load, control) {
        Ok(loaded) => loaded,
        Err(message) => return refuse(control, message),
    };
    // Everything is open that will be needed. Behind this line there is no host.
    let address_space = loaded.memory.size_bytes() + ADDRESS_SPACE_BESIDE_BYTES;
    let jail = match zygote_jail::enter(address_space) {
        Ok(report) => report,
        Err(error) => {
            return refuse(control, process::chain(&error));
        }
    };
    loaded.has_users = jail.has_users;
    let children = Children::new()?;
    warm_up()?;
    missing_walls.extend(jail.missing.into_iter().map(told));
    if let Err(error) = Filter::new(Role::Zygote).install() {
        loaded.is_filtered = false;
        let why = process::chain(&error);
        missing_walls.push(told(zygote_jail::MissingWall::new(
            zygote_jail::FILTER,
            &why,
        )));
    }
    tell_loaded(control, &loaded, missing_walls)?;
    Ok(Some((loaded, children)))
}

fn refuse<T>(control: &OwnedFd, message: String) -> io::Result<Option<T>> {
    tell(control, &FromZygote::Refused { message })?;
    Ok(None)
}

fn tell_loaded(
    control: &OwnedFd,
    loaded: &Loaded,
    missing_walls: Vec<MissingWall>,
) -> io::Result<()> {
    let message = FromZygote::Loaded {
        memory_bytes: loaded.memory.size_bytes(),
        vcpus: loaded.state.vcpus.len() as u32,
        missing_walls,
    };
    tell(control, &message)
}

/// What the host's kernel keeps this process and its children to; what it does not.
fn limit(load: &Load) -> Vec<MissingWall> {
    let mut missing = Vec::new();
    let mut note = |wall: &str, result: io::Result<()>| {
        if let Err(error) = result {
            missing.push(told(zygote_jail::MissingWall::new(wall, &error)));
        }
    };
    note("first to die without memory", cgroup::die_first());
    if let Some(group) = &load.group {
        note("limits by cgroup", cgroup::enter(group));
    }
    missing
}

fn told(wall: zygote_jail::MissingWall) -> MissingWall {
    let zygote_jail::MissingWall { wall, why, is_main } = wall;
    MissingWall { wall, why, is_main }
}

/// Makes forks cheaper. A thread is made and ended: its stack stays for the first vCPU of each.
fn warm_up() -> io::Result<()> {
    let thread = std::thread::Builder::new().spawn(|| ())?;
    // It does nothing, so it ends.
    thread
        .join()
        .map_err(|_| io::Error::other("a thread that does nothing has failed"))?;
    // What loading has left in the heap, each fork would get the page tables of.
    // SAFETY: gives free memory back to the kernel.
    unsafe { libc::malloc_trim(0) };
    Ok(())
}

/// In a child: what it is to be. In the parent: nothing, once the engine lets go of it.
fn serve(
    control: &OwnedFd,
    loaded: &Loaded,
    children: &mut Children,
) -> io::Result<Option<Making>> {
    loop {
        let mut fds = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(&*children, PollFlags::IN),
        ];
        // For as long as there is an engine.
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let asked = !fds[0].revents().is_empty();
        if !fds[1].revents().is_empty() {
            let ended = |pid, status, spent| {
                let ended = FromZygote::Ended { pid, status, spent };
                tell(control, &ended)
            };
            children.reap(ended)?;
        }
        if asked {
            let mut bytes = [0; REQUEST_MAX_BYTES];
            let (length, descriptors) = packet::receive(control, &mut bytes)?;
            if length == 0 {
                return Ok(None);
            }
            let making = answer(control, &bytes[..length], descriptors, loaded, children)?;
            if making.is_some() {
                return Ok(making);
            }
        }
    }
}

fn answer(
    control: &OwnedFd,
    bytes: &[u8],
    descriptors: Vec<OwnedFd>,
    loaded: &Loaded,
    children: &mut Children,
) -> io::Result<Option<Making>> {
    let refuse = |message: &str| {
        let message = message.to_owned();
        tell(control, &FromZygote::ForkFailed { message }).map(|()| None)
    };
    let Ok([first, second]) = <[OwnedFd; 2]>::try_from(descriptors) else {
        return refuse("a fork needs the agent's stream and a control socket");
    };
    let kind = match decode(bytes) {
        Ok(ToZygote::Fork(kind)) => kind,
        Ok(ToZygote::Send) => return send_branch(loaded, first, second, children),
        _ => return refuse("only forks can be asked for once the snapshot is loaded"),
    };
    let (agent, runner_control) = (first, second);
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        0 => Ok(Some(Making {
            kind,
            number: children.made(),
            agent,
            control: runner_control,
        })),
        pid if pid > 0 => {
            children.add(pid as u32);
            match Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
                Some(Ok(process)) => {
                    let forked = FromZygote::Forked { pid: pid as u32 };
                    send(control, &forked, &[process.as_fd()]).map(|()| None)
                }
                // What could not be ended must not begin.
                _ => {
                    children.end(pid as u32);
                    refuse("cannot open a pidfd for a runner (too many open files?)")
                }
            }
        }
        _ => refuse(&format!(
            "cannot fork a runner: {} (too many processes, or too little memory?)",
            io::Error::last_os_error()
        )),
    }
}

/// Has a child send what this process holds, so that forks go on meanwhile. What goes wrong is seen by the
/// stream's end.
fn send_branch(
    loaded: &Loaded,
    stream: OwnedFd,
    pagemap: OwnedFd,
    children: &mut Children,
) -> io::Result<Option<Making>> {
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        0 => {
            let sent = pages::send(loaded, stream, pagemap);
            // SAFETY: ends the child without running what the parent has registered for its end.
            unsafe { libc::_exit(i32::from(sent.is_err())) }
        }
        pid if pid > 0 => children.add(pid as u32),
        _ => {}
    }
    Ok(None)
}

fn tell(control: &OwnedFd, message: &FromZygote) -> io::Result<()> {
    send(control, message, &[])
}

fn send(control: &OwnedFd, message: &FromZygote, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = encode(message).map_err(io::Error::other)?;
    packet::send(control, &bytes, descriptors)
}
