//! Where things lie in the guest's physical address space and I/O space.
//!
//! Low memory as a PC firmware leaves it, so that a stock x86-64 kernel boots unmodified; devices
//! and interrupt controllers in the hole below 4 GiB.

/// GDT for the first instructions of the boot vCPU.
pub const GDT: u64 = 0x500;
/// `struct boot_params` ("zero page", Documentation/arch/x86/boot.rst).
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack of the first instructions.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity-mapping page tables of the first instructions: one PML4, one PDPT, four PDs.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x20000;
/// Longest kernel command line with its final zero, in bytes (x86 COMMAND_LINE_SIZE).
pub const COMMAND_LINE_MAX_BYTES: usize = 2048;
/// End of conventional memory; above it the kernel expects firmware.
pub const CONVENTIONAL_END: u64 = 0x9fc00;
/// ACPI tables; the RSDP is the first of them.
pub const ACPI_TABLES: u64 = 0xe0000;
/// Room for ACPI tables.
pub const ACPI_TABLES_MAX_BYTES: usize = 0xf000;
/// VM generation id (16 bytes), in memory that the kernel leaves alone.
pub const GENERATION_ID: u64 = 0xef000;
/// Where memory above the first MiB begins.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First virtio-mmio slot.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of a virtio-mmio slot.
pub const VIRTIO_MMIO_SLOT_BYTES: u64 = 0x1000;
/// Most virtio devices that a machine can have (limited by IOAPIC pins).
pub const VIRTIO_SLOTS_MAX: usize = 12;
/// IOAPIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Size of the IOAPIC's register window.
pub const IOAPIC_BYTES: u64 = 0x1000;
/// LAPIC registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs for real mode on older Intel CPUs (KVM_SET_TSS_ADDR).
pub const KVM_TSS: usize = 0xfffb_d000;

/// Serial port (16550).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Size of the serial port's I/O range.
pub const SERIAL_PORTS: u16 = 8;
/// Command port of the keyboard controller that we do not have, but for its reset command.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The keyboard controller's command that pulses the CPU's reset line.
pub const I8042_RESET: u8 = 0xfe;
/// ACPI reset register.
pub const ACPI_RESET_PORT: u16 = 0x600;
/// Value for the ACPI reset register.
pub const ACPI_RESET_VALUE: u8 = 1;
/// ACPI sleep control register (§4.8.3.7 of ACPI 6.5).
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x601;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x602;

/// IOAPIC pin of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// IOAPIC pin of the ACPI generic event device.
pub const EVENT_GSI: u32 = 9;
/// IOAPIC pin of the first virtio slot.
pub const VIRTIO_GSI: u32 = 10;
/// Number of IOAPIC pins.
pub const IOAPIC_PINS: usize = 24;

const _: () = assert!(VIRTIO_GSI as usize + VIRTIO_SLOTS_MAX <= IOAPIC_PINS);
const _: () = assert!(ACPI_TABLES as usize + ACPI_TABLES_MAX_BYTES <= GENERATION_ID as usize);
