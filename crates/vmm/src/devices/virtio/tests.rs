//! A driver of our own against the devices: what a good one gets, and what a hostile one cannot do.

use super::block::Block;
use super::entropy::Entropy;
use super::vsock::Vsock;
use super::{Device, InterruptLine, MmioTransport};
use crate::Disk;
use proptest::prelude::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zygote_protocol::{AGENT_LISTEN_PORT, AGENT_PORT, GUEST_CID, HOST_CID};

const MEMORY_BYTES: usize = 2 << 20;
/// Each queue's rings lie in 64 KiB of their own; buffers from 1 MiB on.
const RINGS: u64 = 0x10000;
const BUFFERS: u64 = 0x10_0000;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;

#[derive(Clone, Default)]
struct Pulses(Arc<AtomicUsize>);

impl InterruptLine for Pulses {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A driver: registers by offset (virtio 1.3 §4.2.2), rings in memory (§2.7).
struct Driver {
    transport: MmioTransport,
    memory: GuestMemoryMmap,
    pulses: Pulses,
    next: Vec<u16>,
}

impl Driver {
    fn new(device: Device, queues: u32) -> Self {
        let range = (GuestAddress(0), MEMORY_BYTES);
        let pulses = Pulses::default();
        let mut driver = Self {
            transport: MmioTransport::new(device, Box::new(pulses.clone())),
            memory: GuestMemoryMmap::from_ranges(&[range]).unwrap(),
            pulses,
            next: vec![0; queues as usize],
        };
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x70, 11);
        for queue in 0..queues {
            let base = RINGS * (u64::from(queue) + 1);
            driver.set(0x30, queue);
            driver.set(0x38, 16);
            for (register, offset) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
                driver.set(register, (base + offset) as u32);
            }
            driver.set(0x44, 1);
        }
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70), 15);
        driver
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport
            .write(offset, &value.to_le_bytes(), &self.memory);
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Offers a chain of buffers `(address, length, writable)` and rings; gives its number.
    fn offer(&mut self, queue: u32, buffers: &[(u64, u32, bool)]) -> u16 {
        let base = RINGS * (u64::from(queue) + 1);
        let first = (self.next[queue as usize] % 4) * 4;
        for (index, (address, length, writable)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let next = if last { 0 } else { DESCRIPTOR_NEXT };
            let write = if *writable { DESCRIPTOR_WRITE } else { 0 };
            let number = first + index as u16;
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend_from_slice(&length.to_le_bytes());
            descriptor.extend_from_slice(&(next | write).to_le_bytes());
            descriptor.extend_from_slice(&(number + 1).to_le_bytes());
            self.put(base + u64::from(number) * 16, &descriptor);
        }
        let at = self.next[queue as usize];
        self.put(
            base + 0x1000 + 4 + u64::from(at % 16) * 2,
            &first.to_le_bytes(),
        );
        self.next[queue as usize] = at.wrapping_add(1);
        self.put(base + 0x1000 + 2, &at.wrapping_add(1).to_le_bytes());
        self.set(0x50, queue);
        at
    }

    /// Bytes written into the chain of this number, if it has been used.
    fn used(&self, queue: u32, number: u16) -> Option<u32> {
        let base = RINGS * (u64::from(queue) + 1) + 0x2000;
        let index: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        let entry = base + 4 + u64::from(number % 16) * 8 + 4;
        (index > number).then(|| self.memory.read_obj(GuestAddress(entry)).unwrap())
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn take(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

fn disk(sectors: usize) -> Disk {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8 + 1; 512]).unwrap();
    }
    Disk::new(file, "image".into()).unwrap()
}

fn block(sectors: usize) -> Driver {
    Driver::new(Device::Block(Block::new(disk(sectors))), 1)
}

/// A block request; the status byte that comes back, if one does.
fn request(driver: &mut Driver, kind: u32, sector: u64, length: u32) -> Option<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&sector.to_le_bytes());
    driver.put(BUFFERS, &header);
    let (data, status) = (BUFFERS + 0x1000, BUFFERS + 0x8000);
    driver.put(status, &[0xee]);
    let writable = kind != 1;
    let chain = [
        (BUFFERS, 16, false),
        (data, length, writable),
        (status, 1, true),
    ];
    let number = driver.offer(0, &chain);
    driver.used(0, number)?;
    Some(driver.take(status, 1)[0])
}

#[test]
fn a_disk_gives_its_sectors_and_interrupts() {
    let mut driver = block(4);
    assert_eq!(request(&mut driver, 0, 2, 1024), Some(0));
    let data = driver.take(BUFFERS + 0x1000, 1024);
    assert!(data[..512].iter().all(|b| *b == 3) && data[512..].iter().all(|b| *b == 4));
    assert_eq!(driver.pulses.0.load(Ordering::Relaxed), 1);
    assert_eq!(driver.get(0x60), 1);
}

#[test]
fn a_disk_refuses_what_lies_beyond_it_and_all_writes() {
    let mut driver = block(4);
    assert_eq!(request(&mut driver, 0, 4, 512), Some(1));
    assert_eq!(request(&mut driver, 0, 3, 1024), Some(1));
    assert_eq!(request(&mut driver, 0, u64::MAX / 512, 512), Some(1));
    assert_eq!(request(&mut driver, 0, u64::MAX, 512), Some(1));
    assert_ne!(request(&mut driver, 1, 0, 512), Some(0));
    assert_ne!(request(&mut driver, 99, 0, 512), Some(0));
    assert_eq!(request(&mut driver, 0, 0, 512), Some(0));
}

#[test]
fn buffers_outside_of_memory_are_an_error_of_their_request_alone() {
    let mut driver = block(4);
    for address in [MEMORY_BYTES as u64, u64::MAX - 4, MEMORY_BYTES as u64 - 8] {
        let chain = [
            (BUFFERS, 16, false),
            (address, 512, true),
            (BUFFERS + 0x8000, 1, true),
        ];
        driver.offer(0, &chain);
    }
    assert_eq!(request(&mut driver, 0, 0, 512), Some(0));
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let mut driver = block(4);
    let number = driver.offer(0, &[(BUFFERS, 16, false), (BUFFERS, 16, false)]);
    let circle = [
        &BUFFERS.to_le_bytes()[..],
        &16_u32.to_le_bytes(),
        &1_u16.to_le_bytes(),
        &0_u16.to_le_bytes(),
    ];
    driver.put(RINGS + 16, &circle.concat());
    driver.set(0x50, 0);
    let _ = number;
    assert_eq!(request(&mut driver, 0, 1, 512), Some(0));
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut driver = block(4);
    assert_eq!(request(&mut driver, 0, 1, 512), Some(0));
    let saved = driver.transport.save().unwrap();
    let device = Device::Block(Block::new(disk(4)));
    let line = Box::new(driver.pulses.clone());
    driver.transport = MmioTransport::restore(device, line, &saved.transport).unwrap();
    assert_eq!(request(&mut driver, 0, 2, 512), Some(0));
    assert_eq!(driver.take(BUFFERS + 0x1000, 1), [3]);
    assert_eq!(driver.transport.save().unwrap().device, saved.device);
}

#[test]
fn entropy_fills_the_buffer() {
    let mut driver = Driver::new(Device::Entropy(Entropy), 1);
    let number = driver.offer(0, &[(BUFFERS, 64, true)]);
    assert_eq!(driver.used(0, number), Some(64));
    assert_ne!(driver.take(BUFFERS, 64), [0; 64]);
}

fn vsock() -> (Driver, UnixStream) {
    let (agent, host) = UnixStream::pair().unwrap();
    agent.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    (
        Driver::new(Device::Vsock(Vsock::new(agent.into())), 3),
        host,
    )
}

/// A packet's header (§5.10.6) with these port, operation, length and credit.
fn packet(port: u32, operation: u16, payload: &[u8], forwarded: u32) -> Vec<u8> {
    let mut bytes = u64::from(GUEST_CID).to_le_bytes().to_vec();
    bytes.extend_from_slice(&u64::from(HOST_CID).to_le_bytes());
    bytes.extend_from_slice(&port.to_le_bytes());
    bytes.extend_from_slice(&AGENT_PORT.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&1_u16.to_le_bytes());
    bytes.extend_from_slice(&operation.to_le_bytes());
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    bytes.extend_from_slice(&65536_u32.to_le_bytes());
    bytes.extend_from_slice(&forwarded.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const DATA: u16 = 5;

fn transmit(driver: &mut Driver, bytes: &[u8]) {
    driver.put(BUFFERS, bytes);
    driver.offer(1, &[(BUFFERS, bytes.len() as u32, false)]);
}

/// What the device puts into a fresh receive buffer: operation and payload.
fn receive(driver: &mut Driver) -> Option<(u16, Vec<u8>)> {
    let address = BUFFERS + 0x10000;
    let number = driver.offer(0, &[(address, 4096, true)]);
    let length = driver.used(0, number)? as usize;
    let bytes = driver.take(address, length);
    Some((
        u16::from_le_bytes([bytes[30], bytes[31]]),
        bytes[44..].to_vec(),
    ))
}

#[test]
fn the_agent_connects_once_and_talks_both_ways() {
    let (mut driver, mut host) = vsock();
    transmit(&mut driver, &packet(77, REQUEST, &[], 0));
    assert_eq!(receive(&mut driver), Some((RESPONSE, vec![])));
    transmit(&mut driver, &packet(77, DATA, b"to the host", 0));
    let mut bytes = [0; 64];
    let count = host.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"to the host");
    host.write_all(b"to the guest").unwrap();
    assert_eq!(receive(&mut driver), Some((DATA, b"to the guest".to_vec())));
    transmit(&mut driver, &packet(78, REQUEST, &[], 0));
    let mut answer = receive(&mut driver);
    if answer.is_none() {
        answer = receive(&mut driver);
    }
    assert_eq!(answer, Some((RESET, vec![])));
}

#[test]
fn a_fork_goes_on_with_the_saved_connection_over_its_own_stream() {
    let (mut driver, mut old_host) = vsock();
    transmit(&mut driver, &packet(77, REQUEST, &[], 0));
    assert_eq!(receive(&mut driver), Some((RESPONSE, vec![])));
    let saved = driver.transport.save().unwrap();
    let zygote_snapshot::state::DeviceState::Vsock { agent } = saved.device else {
        panic!("another device");
    };
    let (stream, mut host) = UnixStream::pair().unwrap();
    stream.set_nonblocking(true).unwrap();
    let device = Device::Vsock(Vsock::restore(stream.into(), agent));
    let line = Box::new(Pulses::default());
    driver.transport = MmioTransport::restore(device, line, &saved.transport).unwrap();
    host.write_all(b"hello fork").unwrap();
    assert_eq!(receive(&mut driver), Some((DATA, b"hello fork".to_vec())));
    transmit(&mut driver, &packet(77, DATA, b"fork here", 0));
    let mut bytes = [0; 64];
    let count = host.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"fork here");
    assert_eq!(old_host.read(&mut bytes).unwrap(), 0);
}

#[test]
fn another_host_gets_a_connection_of_its_own_and_nothing_of_the_old_one() {
    let (mut driver, old_host) = vsock();
    transmit(&mut driver, &packet(77, REQUEST, &[], 0));
    assert_eq!(receive(&mut driver), Some((RESPONSE, vec![])));
    drop(old_host);
    driver.transport.stream_ready(&driver.memory);
    transmit(&mut driver, &packet(77, DATA, b"for the old one", 0));
    for generation in 1..4 {
        let (stream, mut host) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        driver.transport.replace_stream(stream.into());
        host.write_all(b"hello").unwrap();
        assert_eq!(receive(&mut driver), Some((RESET, vec![])));
        assert_eq!(receive(&mut driver), Some((REQUEST, vec![])));
        // Not before the guest has answered.
        let address = BUFFERS + 0x10000;
        let number = driver.offer(0, &[(address, 4096, true)]);
        assert_eq!(driver.used(0, number), None);
        let host_port = AGENT_PORT + generation;
        let from_agent = |operation, payload: &[u8]| {
            let mut bytes = packet(AGENT_LISTEN_PORT, operation, payload, 0);
            bytes[20..24].copy_from_slice(&host_port.to_le_bytes());
            bytes
        };
        transmit(&mut driver, &from_agent(RESPONSE, &[]));
        assert_eq!(driver.used(0, number), Some(44 + 5));
        assert_eq!(driver.take(address, 49)[44..], *b"hello");
        transmit(&mut driver, &from_agent(DATA, b"new"));
        let mut bytes = [0; 64];
        let count = host.read(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"new");
        // What still comes over the old one, and who else connects, is refused.
        transmit(&mut driver, &packet(77, DATA, b"late", 0));
        assert_eq!(receive(&mut driver), Some((RESET, vec![])));
        transmit(&mut driver, &packet(78, REQUEST, &[], 0));
        assert_eq!(receive(&mut driver), Some((RESET, vec![])));
        assert!(host.read(&mut bytes).is_err());
    }
}

#[test]
fn a_packet_longer_than_it_says_ends_the_connection_only() {
    let (mut driver, mut host) = vsock();
    transmit(&mut driver, &packet(77, REQUEST, &[], 0));
    receive(&mut driver);
    let mut lie = packet(77, DATA, b"abc", 0);
    lie[24] = 200;
    transmit(&mut driver, &lie);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    assert!(!driver.transport.stream_ready(&driver.memory));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Random registers, rings and payloads: no panic, no endless loop.
    #[test]
    fn a_driver_that_writes_noise_harms_nobody(
        kind in 0..3,
        writes in prop::collection::vec((0_u64..0x120, any::<u32>(), any::<bool>()), 0..60),
        noise in prop::collection::vec((0_u64..(MEMORY_BYTES as u64 - 64), prop::collection::vec(any::<u8>(), 1..64)), 0..60),
    ) {
        let (mut driver, _host) = match kind {
            0 => (block(2), None),
            1 => (Driver::new(Device::Entropy(Entropy), 1), None),
            _ => { let (driver, host) = vsock(); (driver, Some(host)) }
        };
        for (index, (address, bytes)) in noise.iter().enumerate() {
            // Half of it into the rings, where it hurts.
            let address = if index % 2 == 0 { RINGS + address % 0x3000 } else { *address };
            driver.put(address, bytes);
        }
        for (offset, value, small) in writes {
            let offset = if small { offset & !3 } else { offset };
            let value = if small { value % 20 } else { value };
            driver.set(offset, value);
            driver.get(offset);
            for queue in 0..3 {
                driver.set(0x50, queue);
            }
        }
        let _ = driver.transport.save();
    }
}

#[test]
fn a_file_that_cannot_be_read_is_no_disk() {
    let gone = File::open("/proc/self/mem").unwrap();
    let mut disk = Disk::new(gone, String::new()).unwrap();
    disk.bytes = 512;
    let mut driver = Driver::new(Device::Block(Block::new(disk)), 1);
    assert_eq!(request(&mut driver, 0, 0, 512), Some(1));
}

#[test]
fn a_ring_that_is_kept_full_is_not_served_without_end() {
    let mut driver = Driver::new(Device::Entropy(Entropy), 1);
    driver.offer(0, &[(BUFFERS, 64, true)]);
    let memory = driver.memory.clone();
    let over = Arc::new(AtomicUsize::new(0));
    let told = Arc::clone(&over);
    let other_vcpu = std::thread::spawn(move || {
        while told.load(Ordering::Relaxed) == 0 {
            let used: u16 = memory.read_obj(GuestAddress(RINGS + 0x2002)).unwrap();
            let available = used.wrapping_add(16);
            memory
                .write_obj(available, GuestAddress(RINGS + 0x1002))
                .unwrap();
        }
    });
    for _ in 0..100 {
        driver.set(0x50, 0);
    }
    over.store(1, Ordering::Relaxed);
    other_vcpu.join().unwrap();
}

#[test]
fn an_indirect_table_is_no_way_to_a_chain_longer_than_the_queue() {
    const INDIRECT: u16 = 4;
    let mut driver = Driver::new(Device::Entropy(Entropy), 1);
    let table: Vec<u8> = (0..200_u16)
        .flat_map(|number| {
            let mut descriptor = (BUFFERS + u64::from(number)).to_le_bytes().to_vec();
            descriptor.extend_from_slice(&1_u32.to_le_bytes());
            let flags = DESCRIPTOR_WRITE | DESCRIPTOR_NEXT;
            descriptor.extend_from_slice(&flags.to_le_bytes());
            descriptor.extend_from_slice(&(number + 1).to_le_bytes());
            descriptor
        })
        .collect();
    driver.put(BUFFERS + 0x1000, &table);
    let mut head = (BUFFERS + 0x1000).to_le_bytes().to_vec();
    head.extend_from_slice(&(table.len() as u32).to_le_bytes());
    head.extend_from_slice(&[INDIRECT as u8, 0, 0, 0]);
    driver.put(RINGS, &head);
    driver.put(RINGS + 0x1002, &1_u16.to_le_bytes());
    driver.set(0x50, 0);
    assert!(driver.used(0, 0).is_some_and(|written| written <= 16));
}
