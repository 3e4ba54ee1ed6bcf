//! Socket device (virtio 1.3 §5.10) with the one connection that a sandbox needs: the agent's.
//!
//! While a template is built, the agent connects to ([`HOST_CID`], [`AGENT_PORT`]); it is accepted
//! once in a machine's life. The connection is part of the snapshot, and a fork goes on with it
//! over a stream of its own: no handshake in the guest, no TRANSPORT_RESET. Everything else that a
//! guest tries to connect to is refused.
//!
//! Whoever holds the stream's other end may go, and another may come. What was on its way then is lost,
//! so the two must begin anew: the old connection is reset, and the host connects to the agent, which
//! listens at ([`GUEST_CID`], [`AGENT_LISTEN_PORT`]).

use super::{Buffer, gather, pop, scatter, writable_bytes};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use zygote_protocol::{AGENT_LISTEN_PORT, AGENT_PORT, GUEST_CID, HOST_CID};
use zygote_snapshot::state::{DeviceState, VsockConnectionState};

const RX: usize = 0;
const TX: usize = 1;
const HEADER_BYTES: usize = 44;
/// Largest payload of a packet, as in Linux (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
pub const PAYLOAD_MAX_BYTES: usize = 64 * 1024;
/// What the guest may send ahead of the host's reading it.
pub const BUFFER_MAX_BYTES: u32 = 256 * 1024;
/// Answers that wait for a receive buffer; a guest that offers none loses further ones.
const ANSWERS_MAX: usize = 64;

const TYPE_STREAM: u16 = 1;
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;

/// Configuration space: the guest's context id.
pub fn config() -> Vec<u8> {
    u64::from(GUEST_CID).to_le_bytes().to_vec()
}

/// `struct virtio_vsock_hdr` (§5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    source_cid: u64,
    destination_cid: u64,
    source_port: u32,
    destination_port: u32,
    length: u32,
    kind: u16,
    operation: u16,
    flags: u32,
    buffer_bytes: u32,
    forwarded_bytes: u32,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

impl Header {
    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            source_cid: u64::from_le_bytes(field(bytes, 0)?),
            destination_cid: u64::from_le_bytes(field(bytes, 8)?),
            source_port: u32::from_le_bytes(field(bytes, 16)?),
            destination_port: u32::from_le_bytes(field(bytes, 20)?),
            length: u32::from_le_bytes(field(bytes, 24)?),
            kind: u16::from_le_bytes(field(bytes, 28)?),
            operation: u16::from_le_bytes(field(bytes, 30)?),
            flags: u32::from_le_bytes(field(bytes, 32)?),
            buffer_bytes: u32::from_le_bytes(field(bytes, 36)?),
            forwarded_bytes: u32::from_le_bytes(field(bytes, 40)?),
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.length as usize);
        bytes.extend_from_slice(&self.source_cid.to_le_bytes());
        bytes.extend_from_slice(&self.destination_cid.to_le_bytes());
        bytes.extend_from_slice(&self.source_port.to_le_bytes());
        bytes.extend_from_slice(&self.destination_port.to_le_bytes());
        bytes.extend_from_slice(&self.length.to_le_bytes());
        bytes.extend_from_slice(&self.kind.to_le_bytes());
        bytes.extend_from_slice(&self.operation.to_le_bytes());
        bytes.extend_from_slice(&self.flags.to_le_bytes());
        bytes.extend_from_slice(&self.buffer_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.forwarded_bytes.to_le_bytes());
        bytes
    }
}

/// The device. `pump` and `notify` are called under the transport's lock, by any thread.
pub struct Vsock {
    stream: OwnedFd,
    stream_open: bool,
    /// A machine's agent connects once: a user's program that tries the port again is refused.
    accepted: bool,
    connection: Option<VsockConnectionState>,
    /// Bytes of the guest that the stream has not taken yet; at most [`BUFFER_MAX_BYTES`].
    unsent: VecDeque<u8>,
    answers: VecDeque<Header>,
}

impl Vsock {
    /// A device whose agent has not connected yet. `stream` must be non-blocking.
    pub fn new(stream: OwnedFd) -> Self {
        Self {
            stream,
            stream_open: true,
            accepted: false,
            connection: None,
            unsent: VecDeque::new(),
            answers: VecDeque::new(),
        }
    }

    /// A saved device that goes on with the agent's connection over another stream.
    pub fn restore(stream: OwnedFd, agent: Option<VsockConnectionState>) -> Self {
        Self {
            accepted: agent.is_some(),
            connection: agent,
            ..Self::new(stream)
        }
    }

    /// Goes on over another stream, with a connection of its own; `stream` must be non-blocking. Pump
    /// then.
    pub fn replace(&mut self, stream: OwnedFd) {
        self.unsent.clear();
        // From a port that the guest's kernel does not know as the old connection's.
        let mut host_port = AGENT_PORT + 1;
        if let Some(old) = self.connection.take() {
            host_port = old.host_port.wrapping_add(1).max(host_port);
            self.answer_from(old.host_port, old.guest_port, OP_RST);
        }
        self.accepted = true;
        // Without credit until the guest has answered.
        self.connection = Some(VsockConnectionState {
            guest_port: AGENT_LISTEN_PORT,
            host_port,
            sent_bytes: 0,
            forwarded_bytes: 0,
            announced_bytes: 0,
            peer_buffer_bytes: 0,
            peer_forwarded_bytes: 0,
        });
        self.answer_from(host_port, AGENT_LISTEN_PORT, OP_REQUEST);
        (self.stream, self.stream_open) = (stream, true);
    }

    /// What to persist.
    ///
    /// # Errors
    /// If bytes or answers are on their way: pump first, with the guest silent.
    pub fn save(&self) -> Result<DeviceState, String> {
        if !self.unsent.is_empty() || !self.answers.is_empty() {
            return Err(format!(
                "the agent's connection is busy ({} bytes, {} answers on their way)",
                self.unsent.len(),
                self.answers.len()
            ));
        }
        Ok(DeviceState::Vsock {
            agent: self.connection,
        })
    }

    /// The same for a machine that goes on, of which this one's connection stays: who restores it must
    /// [`Vsock::replace`] its stream before the guest runs.
    pub fn save_branch(&self) -> DeviceState {
        DeviceState::Vsock {
            agent: self.connection,
        }
    }

    /// The driver has reset the device: connections are gone, and none will be accepted again.
    pub fn reset(&mut self) {
        self.connection = None;
        self.unsent.clear();
        self.answers.clear();
    }

    /// False once the host's end of the stream is closed.
    pub fn is_open(&self) -> bool {
        self.stream_open
    }

    /// A doorbell: takes what the guest sends, gives what waits for it.
    pub fn notify(&mut self, queue: usize, queues: &mut [Queue], memory: &GuestMemoryMmap) -> bool {
        let mut interrupt = false;
        if queue == TX {
            let transmit = &mut queues[TX];
            interrupt = super::serve(transmit, memory, |chain| {
                self.receive_packet(chain, memory);
                0
            });
        }
        self.pump(queues, memory) || interrupt
    }

    /// Moves bytes both ways as far as they go; gives back whether to interrupt the driver.
    pub fn pump(&mut self, queues: &mut [Queue], memory: &GuestMemoryMmap) -> bool {
        self.flush_stream();
        let queue = &mut queues[RX];
        if !queue.ready() {
            return false;
        }
        let mut served = false;
        // As `serve`: buffers that are offered meanwhile come with a doorbell.
        for _ in 0..queue.size() {
            let offered = self.wants_buffer().then(|| pop(queue, memory)).flatten();
            let Some((head, chain)) = offered else { break };
            let Some(packet) = self.next_packet(writable_bytes(&chain)) else {
                queue.go_to_previous_position();
                break;
            };
            let written = scatter(&chain, &packet, memory).unwrap_or(0);
            if queue.add_used(memory, head, written).is_err() {
                break;
            }
            served = true;
        }
        served && queue.needs_notification(memory).unwrap_or(true)
    }

    fn wants_buffer(&self) -> bool {
        !self.answers.is_empty() || (self.stream_open && self.credit() > 0)
    }

    /// Bytes that the guest is ready to take.
    fn credit(&self) -> usize {
        self.connection.map_or(0, |connection| {
            let in_flight = connection
                .sent_bytes
                .wrapping_sub(connection.peer_forwarded_bytes);
            connection.peer_buffer_bytes.saturating_sub(in_flight) as usize
        })
    }

    /// The next packet for a receive buffer of `room` bytes.
    fn next_packet(&mut self, room: usize) -> Option<Vec<u8>> {
        if let Some(header) = self.answers.pop_front() {
            return Some(self.stamped(header).encode());
        }
        let limit = self
            .credit()
            .min(room.saturating_sub(HEADER_BYTES))
            .min(PAYLOAD_MAX_BYTES);
        if limit == 0 || !self.stream_open {
            return None;
        }
        // Room that is not touched costs no pages.
        let mut payload = Vec::with_capacity(limit);
        let room = rustix::buffer::spare_capacity(&mut payload);
        let count = match rustix::io::read(&self.stream, room) {
            Ok(0) => {
                self.stream_open = false;
                return None;
            }
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return None,
            Err(_) => {
                self.stream_open = false;
                return None;
            }
        };
        let connection = self.connection.as_mut()?;
        connection.sent_bytes = connection.sent_bytes.wrapping_add(count as u32);
        let header = Header {
            source_port: connection.host_port,
            destination_port: connection.guest_port,
            length: count as u32,
            operation: OP_RW,
            ..Header::default()
        };
        let mut packet = self.stamped(header).encode();
        packet.extend_from_slice(&payload);
        Some(packet)
    }

    /// Adds what every packet to the guest carries: ids, and the host's credit.
    fn stamped(&mut self, mut header: Header) -> Header {
        header.source_cid = u64::from(HOST_CID);
        header.destination_cid = u64::from(GUEST_CID);
        header.kind = TYPE_STREAM;
        if let Some(connection) = &mut self.connection
            && (connection.guest_port, connection.host_port)
                == (header.destination_port, header.source_port)
        {
            connection.announced_bytes = connection.forwarded_bytes;
            header.buffer_bytes = BUFFER_MAX_BYTES;
            header.forwarded_bytes = connection.forwarded_bytes;
        }
        header
    }

    fn answer(&mut self, to: &Header, operation: u16) {
        if self.answers.len() < ANSWERS_MAX {
            self.answer_from(to.destination_port, to.source_port, operation);
        }
    }

    fn answer_from(&mut self, source_port: u32, destination_port: u32, operation: u16) {
        self.answers.push_back(Header {
            source_port,
            destination_port,
            operation,
            ..Header::default()
        });
    }

    fn receive_packet(&mut self, chain: &[Buffer], memory: &GuestMemoryMmap) {
        let Some(bytes) = gather(chain, HEADER_BYTES + PAYLOAD_MAX_BYTES, memory) else {
            return;
        };
        let Some(header) = Header::decode(&bytes) else {
            return;
        };
        let payload = &bytes[HEADER_BYTES..];
        let known = header.kind == TYPE_STREAM
            && header.source_cid == u64::from(GUEST_CID)
            && header.destination_cid == u64::from(HOST_CID);
        let connected = self.connection.is_some_and(|c| {
            (c.guest_port, c.host_port) == (header.source_port, header.destination_port)
        });
        let is_agent_port = header.destination_port == AGENT_PORT;
        match (known, connected, header.operation) {
            (_, _, OP_RST) if !(known && connected) => {}
            (true, false, OP_REQUEST) if is_agent_port && !self.accepted => self.accept(&header),
            (true, true, operation) => {
                self.take_credit(&header);
                self.converse(&header, operation, payload);
            }
            _ => self.answer(&header, OP_RST),
        }
    }

    fn accept(&mut self, header: &Header) {
        self.accepted = true;
        self.connection = Some(VsockConnectionState {
            guest_port: header.source_port,
            host_port: header.destination_port,
            sent_bytes: 0,
            forwarded_bytes: 0,
            announced_bytes: 0,
            peer_buffer_bytes: header.buffer_bytes,
            peer_forwarded_bytes: header.forwarded_bytes,
        });
        self.answer(header, OP_RESPONSE);
    }

    fn take_credit(&mut self, header: &Header) {
        if let Some(connection) = &mut self.connection {
            connection.peer_buffer_bytes = header.buffer_bytes;
            connection.peer_forwarded_bytes = header.forwarded_bytes;
        }
    }

    fn converse(&mut self, header: &Header, operation: u16, payload: &[u8]) {
        match operation {
            OP_RW => {
                let whole = payload.len() == header.length as usize;
                if !whole || self.unsent.len() + payload.len() > BUFFER_MAX_BYTES as usize {
                    self.close(header);
                    return;
                }
                self.unsent.extend(payload);
                self.flush_stream();
            }
            // The agent's answer to a connection of the host's brings credit.
            OP_CREDIT_UPDATE | OP_RESPONSE => {}
            OP_CREDIT_REQUEST => self.answer(header, OP_CREDIT_UPDATE),
            OP_RST => self.drop_connection(),
            OP_SHUTDOWN => self.close(header),
            _ => self.close(header),
        }
    }

    fn close(&mut self, header: &Header) {
        self.answer(header, OP_RST);
        self.drop_connection();
    }

    /// The agent has gone: whoever holds the other end of the stream must see its end.
    fn drop_connection(&mut self) {
        self.connection = None;
        self.stream_open = false;
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    fn flush_stream(&mut self) {
        let Some(mut connection) = self.connection else {
            return;
        };
        while !self.unsent.is_empty() && self.stream_open {
            let (front, _) = self.unsent.as_slices();
            match rustix::io::write(&self.stream, front) {
                Ok(count) => {
                    self.unsent.drain(..count);
                    connection.forwarded_bytes =
                        connection.forwarded_bytes.wrapping_add(count as u32);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.stream_open = false,
            }
        }
        self.connection = Some(connection);
        let untold = connection
            .forwarded_bytes
            .wrapping_sub(connection.announced_bytes);
        let update = Header {
            source_port: connection.host_port,
            destination_port: connection.guest_port,
            operation: OP_CREDIT_UPDATE,
            ..Header::default()
        };
        if untold >= BUFFER_MAX_BYTES / 2
            && self.answers.len() < ANSWERS_MAX
            && !self.answers.contains(&update)
        {
            self.answers.push_back(update);
        }
    }
}
