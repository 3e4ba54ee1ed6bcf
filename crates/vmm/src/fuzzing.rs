//! A guest that tries everything on its devices, as a string of bytes tells it. For fuzz targets
//! (fuzz/) and for the test that runs their corpus; whatever the bytes, it must come to its end.

use crate::Disk;
use crate::bus::{Bus, Pin};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::{Device, InterruptLine, MmioTransport};
use crate::ioapic::Ioapic;
use crate::layout::{IOAPIC, SERIAL_GSI, VIRTIO_MMIO, VIRTIO_MMIO_SLOT_BYTES};
use crate::machine::split_irqchip;
use crate::memory::GuestMemory;
use kvm_ioctls::Kvm;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_superio::Serial;
use zygote_protocol::HOST_CLOCK_ADDRESS;

const MEMORY_BYTES: u64 = 2 << 20;
const SECTORS: usize = 64;
/// Each queue's rings lie in 64 KiB of their own.
const RINGS: u64 = 0x1_0000;

/// Which device's queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// §5.2
    Block,
    /// §5.4
    Entropy,
    /// §5.10
    Vsock,
}

/// The bytes that tell what to do; at their end all are zero.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    fn number(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn some(&mut self) -> Vec<u8> {
        let count = usize::from(self.byte() % 64).min(self.0.len());
        let (now, later) = self.0.split_at(count);
        self.0 = later;
        now.to_vec()
    }
}

struct Silent;

impl InterruptLine for Silent {
    fn pulse(&self) {}
}

fn disk() -> std::io::Result<Disk> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = std::fs::File::from(rustix::fs::memfd_create("fuzz", flags)?);
    file.write_all(&[7; SECTORS * 512])?;
    Disk::new(file, "digest".into())
}

fn device(kind: Kind) -> std::io::Result<(Device, UnixStream)> {
    let (host, agent) = UnixStream::pair()?;
    host.set_nonblocking(true)?;
    agent.set_nonblocking(true)?;
    let device = match kind {
        Kind::Block => Device::Block(Block::new(disk()?)),
        Kind::Entropy => Device::Entropy(Entropy),
        Kind::Vsock => Device::Vsock(Vsock::new(agent.into())),
    };
    Ok((device, host))
}

/// Registers, rings and doorbells of one device; the host's end of the stream, too.
///
/// # Errors
/// If this host is short of descriptors or memory.
pub fn queues(kind: Kind, bytes: &[u8]) -> std::io::Result<()> {
    let range = (GuestAddress(0), MEMORY_BYTES as usize);
    let memory = GuestMemoryMmap::from_ranges(&[range]).map_err(std::io::Error::other)?;
    let (device, mut host) = device(kind)?;
    let mut transport = MmioTransport::new(device, Box::new(Silent));
    let mut script = Script(bytes);
    // Most of the time the driver knows how to begin: what comes after is deeper.
    if script.byte() % 8 != 0 {
        begin(&mut transport, &memory);
    }
    while !script.is_over() {
        match script.byte() % 9 {
            0 => {
                let offset = u64::from(script.byte()) * 4;
                let value = script.number();
                transport.write(offset, &value.to_le_bytes(), &memory);
            }
            1 => transport.read(u64::from(script.byte()) * 2, &mut [0; 4]),
            2 => {
                let at = RINGS + u64::from(script.number()) % (3 * RINGS);
                // Past the end is refused.
                let _ = memory.write_slice(&script.some(), GuestAddress(at));
            }
            3 => {
                // A descriptor and the ring that offers it.
                let queue = u64::from(script.byte() % 3);
                let ring = RINGS * (queue + 1);
                let number = u16::from(script.byte() % 16);
                let _ = memory.write_slice(
                    &script.take::<16>(),
                    GuestAddress(ring + u64::from(number) * 16),
                );
                let index: u16 = memory.read_obj(GuestAddress(ring + 0x1002)).unwrap_or(0);
                let entry = ring + 0x1004 + u64::from(index % 16) * 2;
                let _ = memory.write_obj(number, GuestAddress(entry));
                let _ = memory.write_obj(index.wrapping_add(1), GuestAddress(ring + 0x1002));
            }
            4 => drop(host.write(&script.some())),
            5 => drop(host.read(&mut [0; 4096])),
            6 => drop(transport.stream_ready(&memory)),
            7 => {
                let (other, stream) = UnixStream::pair()?;
                other.set_nonblocking(true)?;
                stream.set_nonblocking(true)?;
                transport.replace_stream(stream.into());
                host = other;
            }
            _ => transport.write(0x50, &u32::from(script.byte() % 4).to_le_bytes(), &memory),
        }
    }
    // What is in a state that cannot be saved says so.
    let _ = transport.save();
    Ok(())
}

/// What a Linux driver writes first (§3.1.1).
fn begin(transport: &mut MmioTransport, memory: &GuestMemoryMmap) {
    let mut set = |offset: u64, value: u32| transport.write(offset, &value.to_le_bytes(), memory);
    for (offset, value) in [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
        set(offset, value);
    }
    for queue in 0..3 {
        let ring = RINGS as u32 * (queue + 1);
        set(0x30, queue);
        set(0x38, 16);
        for (register, offset) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
            set(register, ring + offset);
        }
        set(0x44, 1);
    }
    set(0x70, 15);
}

/// Instructions and accesses of a whole machine's bus: MMIO and PIO of any address and width.
pub struct Machine {
    bus: Bus,
    _host: UnixStream,
}

impl Machine {
    /// A machine without vCPUs.
    ///
    /// # Errors
    /// If this host has no KVM, or too little memory.
    pub fn new() -> std::io::Result<Self> {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = vm.map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        split_irqchip(&vm).map_err(std::io::Error::other)?;
        let ioapic = Arc::new(Ioapic::new(Arc::new(vm)));
        let memory = GuestMemory::tiny(MEMORY_BYTES).map_err(std::io::Error::other)?;
        let pin = Pin::new(Arc::clone(&ioapic), SERIAL_GSI);
        let serial = Serial::new(pin, Box::new(std::io::sink()) as Box<dyn Write + Send>);
        let (vsock, host) = device(Kind::Vsock)?;
        let devices = [device(Kind::Block)?.0, device(Kind::Entropy)?.0, vsock];
        let slots = devices.map(|device| Mutex::new(MmioTransport::new(device, Box::new(Silent))));
        Ok(Self {
            bus: Bus {
                memory,
                ioapic,
                serial: Mutex::new(serial),
                virtio: slots.into(),
                vsock_slot: 2,
            },
            _host: host,
        })
    }

    /// Does what the bytes tell.
    pub fn run(&self, bytes: &[u8]) {
        let mut script = Script(bytes);
        while !script.is_over() {
            let what = script.byte();
            let width = 1 << (what >> 4 & 3);
            let mut data = [0; 8];
            data[..4].copy_from_slice(&script.take::<4>());
            let place = script.number();
            let address = match what % 4 {
                0 => VIRTIO_MMIO + u64::from(place) % (VIRTIO_MMIO_SLOT_BYTES * 4),
                1 => IOAPIC + u64::from(place % 0x40),
                2 => HOST_CLOCK_ADDRESS + u64::from(place % 16),
                _ => u64::from(place),
            };
            match what >> 2 & 3 {
                0 => self.bus.mmio_read(address, &mut data[..width]),
                1 => self.bus.mmio_write(address, &data[..width]),
                2 => self.bus.port_read(place as u16, &mut data[..width.min(4)]),
                _ => drop(self.bus.port_write(place as u16, &data[..width.min(4)])),
            }
        }
    }
}
