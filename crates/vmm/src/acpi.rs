//! ACPI tables: how a stock kernel finds CPUs, the IOAPIC, virtio-mmio devices and the VM
//! generation id (ACPI 6.5; hardware-reduced, §4.1).

use crate::layout::*;
use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

const OEM: [u8; 6] = *b"ZYGOTE";
const OEM_TABLE: [u8; 8] = *b"ZYGOTEVM";
/// Notification value of a changed VM generation id (Microsoft's specification of it).
const GENERATION_CHANGED: u8 = 0x80;
/// IAPC_BOOT_ARCH: no VGA, no CMOS clock; neither legacy devices nor a keyboard controller.
const BOOT_ARCHITECTURE: u16 = (1 << 2) | (1 << 5);

#[derive(Default)]
struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytes::default();
    table.to_aml_bytes(&mut sink);
    sink.0
}

/// All tables as one block of bytes for guest-physical address [`ACPI_TABLES`].
pub fn tables(vcpus: u8, virtio_devices: usize) -> Vec<u8> {
    let mut block = vec![0; 64]; // the RSDP comes first, and is known last
    let mut place = |table: Vec<u8>| {
        let address = ACPI_TABLES + block.len() as u64;
        block.extend_from_slice(&table);
        block.resize(block.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(dsdt(virtio_devices));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt));
    block[..rsdp.len()].copy_from_slice(&rsdp);
    block
}

fn madt(vcpus: u8) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(LAPIC as u32);
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, lapic);
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(
            index,
            index,
            EnabledStatus::Enabled,
        ));
    }
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    bytes_of(&madt)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |address: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(address),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(ACPI_SLEEP_STATUS_PORT);
    bytes_of(&fadt.finalize())
}

fn dsdt(virtio_devices: usize) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    for index in 0..virtio_devices {
        dsdt.append_slice(&virtio_device(index));
    }
    dsdt.append_slice(&serial_port());
    dsdt.append_slice(&generation_id());
    dsdt.append_slice(&event_device());
    dsdt.append_slice(&bytes_of(&aml::Name::new(
        Path::new("_S5_"),
        &aml::Package::new(vec![&5u8, &0u8, &0u8, &0u8]),
    )));
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

/// An edge-triggered, active-high, exclusive interrupt.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

fn virtio_device(index: usize) -> Vec<u8> {
    let base = VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SLOT_BYTES;
    bytes_of(&aml::Device::new(
        Path::new(&format!("_SB_.V{index:03}")),
        vec![
            &aml::Name::new(Path::new("_HID"), &"LNRO0005"),
            &aml::Name::new(Path::new("_UID"), &(index as u32)),
            &aml::Name::new(Path::new("_CCA"), &aml::ONE),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base as u32, VIRTIO_MMIO_SLOT_BYTES as u32),
                    &interrupt(VIRTIO_GSI + index as u32),
                ]),
            ),
        ],
    ))
}

fn serial_port() -> Vec<u8> {
    bytes_of(&aml::Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![
                    &interrupt(SERIAL_GSI),
                    &aml::IO::new(SERIAL_PORT, SERIAL_PORT, 0, SERIAL_PORTS as u8),
                ]),
            ),
        ],
    ))
}

fn generation_id() -> Vec<u8> {
    bytes_of(&aml::Device::new(
        Path::new("_SB_.VGEN"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"VMGENCTR"),
            &aml::Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &aml::Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &aml::Name::new(
                Path::new("ADDR"),
                &aml::Package::new(vec![&(GENERATION_ID as u32), &0u32]),
            ),
        ],
    ))
}

fn event_device() -> Vec<u8> {
    bytes_of(&aml::Device::new(
        Path::new("_SB_.GED_"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"ACPI0013"),
            &aml::Name::new(
                Path::new("_CRS"),
                &aml::ResourceTemplate::new(vec![&interrupt(EVENT_GSI)]),
            ),
            &aml::Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&aml::Notify::new(
                    &Path::new("\\_SB_.VGEN"),
                    &GENERATION_CHANGED,
                )],
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_largest_machine_fits_and_every_table_sums_to_zero() {
        let block = tables(32, VIRTIO_SLOTS_MAX);
        assert!(block.len() <= ACPI_TABLES_MAX_BYTES);
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!(checksum(&block[..36]), 0);
        let mut at = 64;
        let mut seen = Vec::new();
        while at + 8 < block.len() {
            let length = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap()) as usize;
            seen.push(String::from_utf8(block[at..at + 4].to_vec()).unwrap());
            assert_eq!(
                checksum(&block[at..at + length]),
                0,
                "{}",
                seen.last().unwrap()
            );
            at += length.next_multiple_of(16);
        }
        assert_eq!(seen, ["DSDT", "FACP", "APIC", "XSDT"]);
    }
}
