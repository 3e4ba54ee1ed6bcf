//! Boots a guest with the agent, warms Python, freezes, saves, and runs code in restored machines:
//! the whole idea in one process, for debugging.
//!
//!     fork KERNEL INITRAMFS ROOT_IMAGE [CODE...]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;
use zygote_protocol::*;
use zygote_vmm::{BootConfig, Disk, GuestMemory, Host, Machine};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

struct Guest {
    machine: Machine,
    host: UnixStream,
    epoll: OwnedFd,
    decoder: FrameDecoder,
}

impl Guest {
    fn new(machine: Machine, agent: &UnixStream, host: UnixStream) -> Fallible<Self> {
        use rustix::event::epoll;
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&set, agent, epoll::EventData::new_u64(0), edges)?;
        epoll::add(
            &set,
            machine.stop_event(),
            epoll::EventData::new_u64(1),
            epoll::EventFlags::IN,
        )?;
        epoll::add(
            &set,
            &host,
            epoll::EventData::new_u64(2),
            epoll::EventFlags::IN,
        )?;
        host.set_nonblocking(true)?;
        Ok(Self {
            machine,
            host,
            epoll: set,
            decoder: FrameDecoder::default(),
        })
    }

    fn send(&mut self, message: &HostMessage) -> Fallible<()> {
        Ok(self.host.write_all(&encode(message)?)?)
    }

    fn next(&mut self) -> Fallible<AgentMessage> {
        use rustix::event::epoll;
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            let mut events = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }; 8];
            let count = epoll::wait(&self.epoll, &mut events, None)?;
            for event in &events[..count] {
                match event.data.u64() {
                    0 => drop(self.machine.agent_ready()),
                    1 => return Err(format!("stopped: {:?}", self.machine.stop_reason()).into()),
                    _ => {
                        let mut bytes = [0; 65536];
                        let count = self.host.read(&mut bytes)?;
                        self.decoder.extend(&bytes[..count]);
                    }
                }
            }
        }
    }
}

fn identity(number: u8) -> Identity {
    Identity {
        hostname: format!("fork-{number}"),
        machine_id: [number; 16],
        boot_id: [number; 16],
        kernel_seed: vec![number; 64],
        interpreter_seed: Some(vec![number; 64]),
        reseed: false,
        stays: false,
    }
}

fn main() -> Fallible<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, image, codes @ ..] = &arguments[..] else {
        return Err("usage: fork KERNEL INITRAMFS ROOT_IMAGE CODE...".into());
    };
    let disk = || Disk::new(File::open(image)?, "image".into());
    let (agent, host) = UnixStream::pair()?;
    agent.set_nonblocking(true)?;
    let config = BootConfig {
        memory_bytes: 512 << 20,
        vcpus: 1,
        kernel: File::open(kernel)?,
        initramfs: File::open(initramfs)?,
        command_line: "console=ttyS0 panic=-1 reboot=k init_on_alloc=0 quiet".into(),
        disks: vec![disk()?],
    };
    let start = Instant::now();
    let machine = Machine::boot(
        config,
        agent.try_clone()?.into(),
        Box::new(std::io::stdout()),
    )?;
    let mut guest = Guest::new(machine, &agent, host)?;
    guest.machine.start()?;
    let message = guest.next()?;
    println!("{:?} {message:?}", start.elapsed());
    guest.send(&HostMessage::Warm {
        code: "import numpy, random".into(),
    })?;
    let message = guest.next()?;
    println!("{:?} {message:?}", start.elapsed());
    guest.send(&HostMessage::Freeze)?;
    let message = guest.next()?;
    println!("{:?} {message:?}", start.elapsed());
    guest.machine.pause()?;
    let state = guest.machine.save()?;
    println!("{:?} saved", start.elapsed());
    let mut file = tempfile()?;
    for (offset, host, length) in guest.machine.memory().host_ranges() {
        let fd = file.as_fd().try_clone_to_owned()?;
        write_range(fd, offset, host, length)?;
    }
    file.flush()?;
    drop(guest);
    for (number, code) in codes.iter().enumerate() {
        let start = Instant::now();
        let (agent, host) = UnixStream::pair()?;
        agent.set_nonblocking(true)?;
        let memory = GuestMemory::private(&file, 512 << 20)?;
        let machine = Machine::restore(
            &Host::open()?,
            &state,
            memory,
            vec![disk()?],
            agent.try_clone()?.into(),
            Box::new(std::io::stdout()),
        )?;
        let again = machine.save()?;
        for (a, b) in state.vcpus.iter().zip(&again.vcpus) {
            for (x, y) in a.msrs.iter().zip(&b.msrs) {
                if x != y {
                    println!("msr {x:x?} {y:x?}");
                }
            }
            println!(
                "{} {} {} {} {} {} {} {}",
                a.regs == b.regs,
                a.sregs == b.sregs,
                a.xsave == b.xsave,
                a.xcrs == b.xcrs,
                a.debug_regs == b.debug_regs,
                a.lapic == b.lapic,
                a.events == b.events,
                a.mp_state == b.mp_state
            );
            for (i, (x, y)) in a.lapic.iter().zip(&b.lapic).enumerate() {
                if x != y {
                    println!("lapic {i:x} {x:x} {y:x}");
                }
            }
            for (i, (x, y)) in a.sregs.iter().zip(&b.sregs).enumerate() {
                if x != y {
                    println!("sregs {i:x} {x:x} {y:x}");
                }
            }
        }
        println!(
            "clock {:?} {:?} dev {} ioapic {} serial {}",
            state.clock,
            again.clock,
            state.devices == again.devices,
            state.ioapic == again.ioapic,
            state.serial == again.serial
        );
        println!(
            "{:?} restored; saves equal: {}",
            start.elapsed(),
            again == state
        );
        let mut guest = Guest::new(machine, &agent, host)?;
        guest.send(&HostMessage::Activate(identity(number as u8)))?;
        let program = Program::Python {
            source: PythonSource::Code(code.clone().into()),
            arguments: vec![],
        };
        guest.send(&HostMessage::Start(Start::new(1, program)))?;
        guest.machine.start()?;
        loop {
            let message = guest.next()?;
            match &message {
                AgentMessage::Stdout { data, .. } | AgentMessage::Stderr { data, .. } => {
                    println!("{:?} {}", start.elapsed(), String::from_utf8_lossy(data));
                }
                _ => println!("{:?} {message:?}", start.elapsed()),
            }
            if matches!(
                message,
                AgentMessage::Exited { .. }
                    | AgentMessage::StartFailed { .. }
                    | AgentMessage::ActivateFailed { .. }
            ) {
                break;
            }
        }
    }
    Ok(())
}

fn tempfile() -> Fallible<File> {
    Ok(File::from(rustix::fs::memfd_create(
        "memory",
        rustix::fs::MemfdFlags::CLOEXEC,
    )?))
}

#[expect(unsafe_code, reason = "reads a paused guest's memory")]
fn write_range(fd: OwnedFd, offset: u64, host: *mut u8, length: usize) -> Fallible<()> {
    use std::os::unix::fs::FileExt;
    // SAFETY: the range is mapped guest memory, and the guest is paused.
    let bytes = unsafe { std::slice::from_raw_parts(host, length) };
    let file = File::from(fd);
    file.set_len(offset + length as u64)?;
    for (index, page) in bytes.chunks(4096).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, offset + index as u64 * 4096)?;
        }
    }
    Ok(())
}
