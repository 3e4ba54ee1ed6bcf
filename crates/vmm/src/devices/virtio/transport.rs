//! The MMIO transport, version 2 (virtio 1.3 §4.2.2).

use super::{Device, InterruptLine};
use std::os::fd::OwnedFd;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use zygote_snapshot::state::{DeviceState, QueueState, TransportState, VirtioDeviceState};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"ZYGO");
const CONFIG: u64 = 0x100;

const STATUS_FEATURES_OK: u32 = 8;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_FAILED: u32 = 128;
const STATUS_ALL: u32 = 0xcf;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// One device and the registers in front of it. Called under a lock by whichever vCPU accesses
/// the registers, and by the owner's thread for the vsock device's stream.
pub struct MmioTransport {
    device: Device,
    queues: Vec<Queue>,
    line: Box<dyn InterruptLine>,
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    config_generation: u32,
}

fn new_queues(device: &Device) -> Vec<Queue> {
    // Sizes are constants, powers of two: `Queue::new` takes them.
    device
        .queue_sizes()
        .iter()
        .filter_map(|&size| Queue::new(size).ok())
        .collect()
}

impl MmioTransport {
    /// A device as after reset.
    pub fn new(device: Device, line: Box<dyn InterruptLine>) -> Self {
        Self {
            queues: new_queues(&device),
            device,
            line,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            interrupt_status: 0,
            config_generation: 0,
        }
    }

    /// A device as it was saved. What is in `state` is checked as a guest's writes are.
    ///
    /// # Errors
    /// A sentence that names what does not fit.
    pub fn restore(
        device: Device,
        line: Box<dyn InterruptLine>,
        state: &TransportState,
    ) -> Result<Self, String> {
        let TransportState {
            status,
            driver_features,
            device_features_select,
            driver_features_select,
            queue_select,
            interrupt_status,
            config_generation,
            queues,
        } = state;
        let sizes = device.queue_sizes();
        if queues.len() != sizes.len() {
            return Err(format!(
                "device {} has {} queues",
                device.id(),
                queues.len()
            ));
        }
        if driver_features & !device.features() != 0 {
            return Err(format!(
                "device {} lacks features {driver_features:#x}",
                device.id()
            ));
        }
        let queues = queues
            .iter()
            .zip(sizes)
            .map(|(queue, size_max)| restore_queue(queue, *size_max))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            queues,
            line,
            status: *status,
            driver_features: *driver_features,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            queue_select: *queue_select,
            interrupt_status: *interrupt_status,
            config_generation: *config_generation,
        })
    }

    /// What to persist.
    ///
    /// # Errors
    /// A sentence, if the device holds something that a snapshot does not.
    pub fn save(&self) -> Result<VirtioDeviceState, String> {
        Ok(self.saved(self.device.save()?))
    }

    /// The same of a machine that goes on: without what is on the way between its agent and the host.
    ///
    /// # Errors
    /// As a device's.
    pub fn save_branch(&self) -> Result<VirtioDeviceState, String> {
        Ok(self.saved(self.device.save_branch()?))
    }

    fn saved(&self, device: DeviceState) -> VirtioDeviceState {
        let transport = TransportState {
            status: self.status,
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: self.queues.iter().map(save_queue).collect(),
        };
        VirtioDeviceState { transport, device }
    }

    /// Whether this is the socket device.
    pub fn is_vsock(&self) -> bool {
        matches!(self.device, Device::Vsock(_))
    }

    /// Moves the agent's bytes both ways as far as they go (socket device only). False once the
    /// host's end of the stream is closed.
    pub fn stream_ready(&mut self, memory: &GuestMemoryMmap) -> bool {
        let working = self.is_working();
        let Device::Vsock(device) = &mut self.device else {
            return false;
        };
        let interrupt = working && device.pump(&mut self.queues, memory);
        let open = device.is_open();
        if interrupt {
            self.interrupt();
        }
        open
    }

    /// Goes on over another stream (socket device only), which must be non-blocking.
    pub fn replace_stream(&mut self, stream: OwnedFd) {
        if let Device::Vsock(device) = &mut self.device {
            device.replace(stream);
        }
    }

    /// A register read. Registers are 4 bytes wide; the configuration space takes any width.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = self.device.config();
            let tail = config.get(at as usize..).unwrap_or_default();
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = tail.get(index).copied().unwrap_or(0);
            }
            return;
        }
        data.fill(0);
        if let Some(word) = data.first_chunk_mut::<4>() {
            *word = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.id(),
            0x0c => VENDOR,
            0x10 => match self.device_features_select {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            0x34 => queue.map_or(0, |queue| u32::from(queue.max_size())),
            0x44 => queue.map_or(0, |queue| u32::from(queue.ready())),
            0x60 => self.interrupt_status,
            0x70 => self.status,
            0xfc => self.config_generation,
            _ => 0,
        }
    }

    /// A register write. Ringing a doorbell does the device's work before this returns.
    pub fn write(&mut self, offset: u64, data: &[u8], memory: &GuestMemoryMmap) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.accept_features(value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x38 | 0x44 | 0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 => {
                self.configure_queue(offset, value, memory);
            }
            0x50 => self.notify(value as usize, memory),
            0x64 => self.interrupt_status &= !value,
            0x70 => self.set_status(value),
            _ => {}
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = 0xffff_ffff_u64 << shift;
        self.driver_features = (self.driver_features & !mask) | (u64::from(value) << shift);
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut value = value & STATUS_ALL & !STATUS_NEEDS_RESET;
        let asks_features =
            value & STATUS_FEATURES_OK != 0 && self.status & STATUS_FEATURES_OK == 0;
        let acceptable = self.driver_features & !self.device.features() == 0
            && self.driver_features & super::VERSION_1 != 0;
        if asks_features && !acceptable {
            value &= !STATUS_FEATURES_OK;
        }
        self.status |= value;
    }

    fn reset(&mut self) {
        self.queues = new_queues(&self.device);
        self.device.reset();
        self.status = 0;
        self.driver_features = 0;
        self.interrupt_status = 0;
        self.queue_select = 0;
    }

    fn configure_queue(&mut self, offset: u64, value: u32, memory: &GuestMemoryMmap) {
        let negotiated = self.status & STATUS_FEATURES_OK != 0;
        let Some(queue) = self
            .queues
            .get_mut(self.queue_select as usize)
            .filter(|_| negotiated)
        else {
            return;
        };
        if offset == 0x44 {
            queue.set_ready(value == 1);
            if value == 1 && !queue.is_valid(memory) {
                queue.set_ready(false);
                self.need_reset();
            }
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            0x38 => {
                let size = u16::try_from(value).unwrap_or(0);
                if queue.try_set_size(size).is_err() {
                    self.need_reset();
                }
            }
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            _ => queue.set_used_ring_address(None, Some(value)),
        }
    }

    fn is_working(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
            && self.status & (STATUS_NEEDS_RESET | STATUS_FAILED) == 0
    }

    fn notify(&mut self, queue: usize, memory: &GuestMemoryMmap) {
        if !self.is_working() || !self.queues.get(queue).is_some_and(QueueT::ready) {
            return;
        }
        if self.device.notify(queue, &mut self.queues, memory) {
            self.interrupt();
        }
    }

    fn interrupt(&mut self) {
        self.interrupt_status |= INTERRUPT_USED;
        self.line.pulse();
    }

    fn need_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
        self.interrupt_status |= INTERRUPT_CONFIG;
        self.line.pulse();
    }
}

fn save_queue(queue: &Queue) -> QueueState {
    let virtio_queue::QueueState {
        max_size,
        next_avail,
        next_used,
        event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    } = queue.state();
    QueueState {
        size_max: max_size,
        size,
        ready,
        descriptor_table: desc_table,
        available_ring: avail_ring,
        used_ring,
        next_available: next_avail,
        next_used,
        event_idx: event_idx_enabled,
    }
}

fn restore_queue(state: &QueueState, size_max: u16) -> Result<Queue, String> {
    let &QueueState {
        size_max: max_size,
        size,
        ready,
        descriptor_table: desc_table,
        available_ring: avail_ring,
        used_ring,
        next_available: next_avail,
        next_used,
        event_idx: event_idx_enabled,
    } = state;
    if max_size != size_max {
        return Err(format!(
            "a queue of at most {max_size} entries, not {size_max}"
        ));
    }
    let state = virtio_queue::QueueState {
        max_size,
        next_avail,
        next_used,
        event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    };
    Queue::try_from(state).map_err(|e| format!("a queue's state is not valid: {e}"))
}
