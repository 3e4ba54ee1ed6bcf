//! Loading a Linux kernel and entering it by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst), from a bzImage or an ELF `vmlinux`.

use crate::layout::*;
use crate::machine::MachineError;
use crate::memory::{GuestMemory, HOLE_START};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const LOADER_TYPE_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// Offset of the 64-bit entry point in a bzImage's protected-mode part.
const ENTRY_64: u64 = 0x200;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// First four GiB, mapped by 2 MiB pages.
const IDENTITY_GIB: u64 = 4;

/// `boot_params` as bytes for guest memory.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);

#[expect(unsafe_code, reason = "boot_params is plain old data")]
// SAFETY: `boot_params` is a packed `repr(C)` struct of integers; any bytes are a valid value.
unsafe impl ByteValued for ZeroPage {}

/// Where the boot vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// First instruction.
    pub address: u64,
}

/// Loads everything that the kernel expects in memory.
///
/// # Errors
/// If the kernel is neither a bzImage nor an ELF, or something does not fit.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    initramfs: &mut File,
    command_line: &str,
) -> Result<Entry, MachineError> {
    let fail =
        |what: &str, error: &dyn std::fmt::Display| MachineError::Load(format!("{what}: {error}"));
    let map = memory.map_ref();
    let mut page = ZeroPage::default();
    let mut magic = [0; 4];
    kernel
        .read_exact(&mut magic)
        .map_err(|e| fail("kernel", &e))?;
    let (entry, kernel_end) = if magic == *b"\x7fELF" {
        let loaded = Elf::load(map, None, kernel, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|e| fail("ELF kernel", &e))?;
        page.0.hdr.header = HEADER_MAGIC;
        page.0.hdr.boot_flag = BOOT_FLAG;
        page.0.hdr.kernel_alignment = KERNEL_ALIGNMENT;
        (loaded.kernel_load.raw_value(), loaded.kernel_end)
    } else {
        let loaded = BzImage::load(map, None, kernel, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|e| fail("kernel (neither ELF nor bzImage?)", &e))?;
        page.0.hdr = loaded
            .setup_header
            .ok_or_else(|| MachineError::Load("kernel: no setup header".into()))?;
        // The decompressor works in place: `init_size` bytes from the load address are its.
        let end = loaded.kernel_load.raw_value() + u64::from(page.0.hdr.init_size);
        (
            loaded.kernel_load.raw_value() + ENTRY_64,
            end.max(loaded.kernel_end),
        )
    };
    load_command_line(memory, command_line)?;
    let (initramfs_at, initramfs_bytes) = load_initramfs(memory, initramfs, kernel_end)?;
    page.0.hdr.type_of_loader = LOADER_TYPE_UNDEFINED;
    page.0.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    page.0.hdr.cmdline_size = command_line.len() as u32 + 1;
    page.0.hdr.ramdisk_image = initramfs_at;
    page.0.hdr.ramdisk_size = initramfs_bytes;
    page.0.acpi_rsdp_addr = ACPI_TABLES;
    add_e820(&mut page.0, memory.size_bytes());
    map.write_obj(page, GuestAddress(BOOT_PARAMS))
        .map_err(|e| fail("boot parameters", &e))?;
    write_page_tables(memory).map_err(|e| fail("boot page tables", &e))?;
    write_gdt(memory).map_err(|e| fail("boot GDT", &e))?;
    Ok(Entry { address: entry })
}

fn load_command_line(memory: &GuestMemory, command_line: &str) -> Result<(), MachineError> {
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    if bytes.len() > COMMAND_LINE_MAX_BYTES {
        return Err(MachineError::Load(format!(
            "the command line is {} bytes long; the kernel takes {COMMAND_LINE_MAX_BYTES}",
            bytes.len()
        )));
    }
    memory
        .map_ref()
        .write_slice(&bytes, GuestAddress(COMMAND_LINE))
        .map_err(|e| MachineError::Load(format!("command line: {e}")))
}

/// As high as possible in low memory, so that the kernel has room below.
fn load_initramfs(
    memory: &GuestMemory,
    initramfs: &mut File,
    kernel_end: u64,
) -> Result<(u32, u32), MachineError> {
    let fail = |e: &dyn std::fmt::Display| MachineError::Load(format!("initramfs: {e}"));
    let length = initramfs.seek(SeekFrom::End(0)).map_err(|e| fail(&e))?;
    initramfs.rewind().map_err(|e| fail(&e))?;
    let low_end = memory.size_bytes().min(HOLE_START);
    let start = low_end.checked_sub(length).map(|start| start & !0xfff);
    let Some(start) = start.filter(|start| *start >= kernel_end) else {
        return Err(fail(&format_args!(
            "{length} bytes do not fit above the kernel"
        )));
    };
    memory
        .map_ref()
        .read_exact_volatile_from(GuestAddress(start), initramfs, length as usize)
        .map_err(|e| fail(&e))?;
    Ok((start as u32, length as u32))
}

fn add_e820(page: &mut boot_params, memory_bytes: u64) {
    let mut ranges = vec![
        (0, CONVENTIONAL_END, E820_RAM),
        (
            CONVENTIONAL_END,
            HIGH_MEMORY - CONVENTIONAL_END,
            E820_RESERVED,
        ),
    ];
    for (_, address, length) in GuestMemory::layout(memory_bytes) {
        let start = address.max(HIGH_MEMORY);
        ranges.push((start, address + length - start, E820_RAM));
    }
    for (slot, (addr, size, kind)) in page.e820_table.iter_mut().zip(&ranges) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    page.e820_entries = ranges.len() as u8;
}

pub fn write_page_tables(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    let map = memory.map_ref();
    let pml4 = BOOT_PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    map.write_obj(pdpt | PAGE_PRESENT_WRITABLE, GuestAddress(pml4))?;
    for gib in 0..IDENTITY_GIB {
        let directory = pdpt + 0x1000 * (gib + 1);
        map.write_obj(
            directory | PAGE_PRESENT_WRITABLE,
            GuestAddress(pdpt + gib * 8),
        )?;
        for index in 0..512 {
            let page = (gib << 30) | (index << 21) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            map.write_obj(page, GuestAddress(directory + index * 8))?;
        }
    }
    Ok(())
}

/// Null, unused, 64-bit code (selector 0x10 = __BOOT_CS), data (0x18 = __BOOT_DS).
pub fn write_gdt(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    let table: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (index, entry) in table.iter().enumerate() {
        memory
            .map_ref()
            .write_obj(*entry, GuestAddress(GDT + index as u64 * 8))?;
    }
    Ok(())
}

/// Puts the boot vCPU's special registers into 64-bit mode on the tables above.
pub fn set_long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 0x3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = BOOT_PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// General registers at the entry: RSI points to the boot parameters.
pub fn entry_registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.address,
        rsi: BOOT_PARAMS,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: 2,
        ..Default::default()
    }
}
