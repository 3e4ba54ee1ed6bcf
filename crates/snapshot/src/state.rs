//! The persisted state of a machine: what is in a snapshot besides memory.
//!
//! These types belong to the format and to nobody's runtime: `vmm` converts at its edge. Register
//! groups that KVM hands out as plain structs are kept as named fields where we look into them,
//! and as the bytes of the kernel's ABI struct (Linux `include/uapi/asm/kvm.h`) where we do not.

use serde::{Deserialize, Serialize};

/// Everything about a stopped machine but its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// One per vCPU, by index (= APIC id).
    pub vcpus: Vec<VcpuState>,
    /// The paravirtual clock.
    pub clock: ClockState,
    /// The IOAPIC in user space.
    pub ioapic: IoapicState,
    /// The serial port of early boot.
    pub serial: SerialState,
    /// Virtio devices, in the order of their slots on the bus.
    pub devices: Vec<VirtioDeviceState>,
    /// Guest-physical address of the 16 bytes of the VM generation id.
    pub generation_id_address: u64,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// CPUID as the guest sees it.
    pub cpuid: Vec<CpuidEntry>,
    /// Model-specific registers, in the order in which they are restored.
    pub msrs: Vec<MsrEntry>,
    /// `struct kvm_regs`.
    #[serde(with = "serde_bytes")]
    pub regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[serde(with = "serde_bytes")]
    pub sregs: Vec<u8>,
    /// The XSAVE area, as long as the guest's enabled features need it.
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[serde(with = "serde_bytes")]
    pub xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[serde(with = "serde_bytes")]
    pub debug_regs: Vec<u8>,
    /// `struct kvm_lapic_state`.
    #[serde(with = "serde_bytes")]
    pub lapic: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    #[serde(with = "serde_bytes")]
    pub events: Vec<u8>,
    /// `struct kvm_mp_state`'s only field.
    pub mp_state: u32,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u32,
}

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input.
    pub index: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrEntry {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// kvm-clock at the moment when the machine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds on the guest's clock.
    pub clock_ns: u64,
}

/// The IOAPIC (82093AA), 24 pins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Identification register.
    pub id: u8,
    /// Index register.
    pub select: u8,
    /// One redirection entry a pin.
    pub redirections: Vec<u64>,
    /// Pins with an edge that came while they were masked; bit n is pin n.
    pub pending: u32,
}

/// The 16550 serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Received bytes that the guest has not read.
    #[serde(with = "serde_bytes")]
    pub in_buffer: Vec<u8>,
}

/// One virtio-mmio device (virtio 1.3 §4.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioDeviceState {
    /// The transport's registers.
    pub transport: TransportState,
    /// The device behind it.
    pub device: DeviceState,
}

/// Registers of the virtio-mmio transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status field (§2.1).
    pub status: u32,
    /// Feature bits that the driver has accepted.
    pub driver_features: u64,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// QueueSel.
    pub queue_select: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// By index.
    pub queues: Vec<QueueState>,
}

/// One virtqueue (§2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Largest size the device offers.
    pub size_max: u16,
    /// Size the driver chose.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest-physical address of the available ring.
    pub available_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// Next available entry the device will look at.
    pub next_available: u16,
    /// Next used entry the device will write.
    pub next_used: u16,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// What a device keeps besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Block (§5.2): a read-only image.
    Block {
        /// Size in sectors of 512 bytes.
        sectors: u64,
        /// Identity of the image: its digest as in the manifest.
        image_digest: String,
    },
    /// Entropy (§5.4): nothing.
    Entropy,
    /// Socket (§5.10), with the agent's connection, the only one there ever is.
    Vsock {
        /// The agent's connection, if it is open.
        agent: Option<VsockConnectionState>,
    },
}

/// The agent's connection, with the credit of both sides (§5.10.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConnectionState {
    /// The agent's port in the guest.
    pub guest_port: u32,
    /// The host's port.
    pub host_port: u32,
    /// Bytes the host has sent on this connection.
    pub sent_bytes: u32,
    /// Bytes received from the guest and passed on by the host.
    pub forwarded_bytes: u32,
    /// Last `buf_alloc` of the guest.
    pub peer_buffer_bytes: u32,
    /// `fwd_cnt` that the guest was last told.
    pub announced_bytes: u32,
    /// Last `fwd_cnt` of the guest.
    pub peer_forwarded_bytes: u32,
}
