//! Boots a kernel with an initramfs and shows its serial port until it stops: for debugging guests.
//!
//!     boot KERNEL INITRAMFS [MEMORY_MIB [VCPUS [COMMAND_LINE [DISK]]]]

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use zygote_vmm::{BootConfig, Disk, Machine};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| {
        arguments
            .get(index)
            .cloned()
            .unwrap_or_else(|| default.to_owned())
    };
    let disks = match arguments.get(5) {
        Some(path) => vec![Disk::new(File::open(path)?, String::new())?],
        None => Vec::new(),
    };
    let config = BootConfig {
        memory_bytes: argument(2, "512").parse::<u64>()? << 20,
        vcpus: argument(3, "1").parse()?,
        kernel: File::open(argument(0, "vmlinuz"))?,
        initramfs: File::open(argument(1, "initramfs"))?,
        command_line: argument(4, "console=ttyS0 panic=-1"),
        disks,
    };
    let (agent, _host) = UnixStream::pair()?;
    agent.set_nonblocking(true)?;
    let mut machine = Machine::boot(config, agent.into(), Box::new(std::io::stdout()))?;
    machine.start()?;
    let stop = machine.stop_event();
    let mut fds = [rustix::event::PollFd::new(
        &stop,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None)?;
    std::io::stdout().flush()?;
    println!("\nstopped: {:?}", machine.stop_reason());
    Ok(())
}
