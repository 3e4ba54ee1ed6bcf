//! Whether this host's KVM can run a kernel: measured with a tiny guest in kernel mode, not guessed
//! from the presence of a file.
//!
//! Some hosts offer a /dev/kvm that emulates kernel mode in software, slowly and without some
//! instructions that Linux needs; each of those is tried here.

use crate::host::OPEN_KVM;
use crate::memory::GuestMemory;
use crate::vcpu::install_kick;
use crate::{boot, machine};
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

/// Slowest kernel mode that is of use: Linux needs half a billion instructions to boot. Emulated
/// hosts (the lab) reach 30 and more, software emulation inside KVM about 4.
pub const SPEED_MIN_MIPS: f64 = 10.0;
/// The speed is measured for no longer than this.
const MEASURE_MAX: Duration = Duration::from_millis(100);

/// A guest that has not been through all of it by then never will be.
const PROBE_MAX: Duration = Duration::from_secs(2);
/// What such a KVM cannot do.
const LATE: &str = "come back from a guest in kernel mode within 2 s";

/// What Zygote asks of KVM, by the names of the kernel's document virt/kvm/api.
const EXTENSIONS: [(Cap, &str); 14] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::GetMsrFeatures, "KVM_CAP_GET_MSR_FEATURES"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Whether a Linux guest can run here.
    pub usable: bool,
    /// Why not, each with what to do about it; empty if usable.
    pub problems: Vec<Problem>,
    /// Speed of the guest's kernel mode in million instructions a second, if it ran.
    pub mips: Option<f64>,
}

/// One reason why KVM is of no use here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub cause: String,
    /// What to do about it.
    pub remedy: String,
}

fn problem(cause: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem {
        cause: cause.into(),
        remedy: remedy.into(),
    }
}

/// Steps of the tiny guest, in order: what an unfinished one means.
const STEPS: [&str; 6] = [
    "start in 64-bit kernel mode",
    "run CMPXCHG16B",
    "run XSAVE and XRSTOR",
    "take an exception (INT3, IRET)",
    "run SWAPGS",
    "run POPCNT",
];
const STEP_PORT: u16 = 0x10;
const SPEED_PORT: u16 = 0x11;
/// Instructions between two writes to the speed port.
const SPEED_INSTRUCTIONS: u32 = 20_000;

const CODE: u64 = 0x10000;
const HANDLER: u64 = 0x11000;
const IDT: u64 = 0x12000;
const XSAVE_AREA: u64 = 0x13000;
const OPERAND: u64 = 0x14000;
const STACK: u64 = 0x18000;
const GUEST_BYTES: u64 = 2 << 20;
const IRETQ: [u8; 2] = [0x48, 0xcf];
const CODE_SELECTOR: u64 = 0x10;
const GATE_INTERRUPT: u64 = 0x8e00;
const BREAKPOINT: u64 = 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;

/// The tiny guest's program: after each step its number goes to a port, then it counts for ever.
fn program() -> Vec<u8> {
    let steps: [&[u8]; 6] = [
        &[],
        &[0x48, 0x0f, 0xc7, 0x0e],             // cmpxchg16b [rsi]
        &[0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2f], // xsave [rdi]; xrstor [rdi]
        &[0xcc],                               // int3
        &[0x0f, 0x01, 0xf8, 0x0f, 0x01, 0xf8], // swapgs, twice
        &[0xf3, 0x48, 0x0f, 0xb8, 0xc9],       // popcnt rcx, rcx
    ];
    let mut code = Vec::new();
    for (number, step) in steps.into_iter().enumerate() {
        code.extend_from_slice(&[0xb8, 3, 0, 0, 0, 0x31, 0xd2]); // mov eax, 3; xor edx, edx
        code.extend_from_slice(step);
        code.extend_from_slice(&[0xb0, number as u8, 0xe6, STEP_PORT as u8]); // out number
    }
    let start = code.len();
    code.push(0xb9); // mov ecx, half of the instructions
    code.extend_from_slice(&(SPEED_INSTRUCTIONS / 2).to_le_bytes());
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xfc]); // dec ecx; jnz back to it
    code.extend_from_slice(&[0xe6, SPEED_PORT as u8, 0xeb]); // out; jmp start
    let back = start as i64 - (code.len() as i64 + 1);
    code.push(back as i8 as u8);
    code
}

/// Measures this host's KVM: within a fifth of a second, whatever it is like.
pub fn probe() -> Probe {
    let mut problems = Vec::new();
    let mips = match Kvm::new() {
        Err(error) => {
            problems.push(no_kvm(error.errno()));
            None
        }
        Ok(kvm) => {
            problems.extend(missing_extensions(&kvm));
            match run_guest(&kvm) {
                Ok(mips) => {
                    problems.extend(too_slow(mips));
                    Some(mips)
                }
                Err(cause) => {
                    problems.push(problem(
                        format!("this host's KVM cannot {cause}"),
                        "use a host with hardware virtualization, or let Zygote use its lab",
                    ));
                    None
                }
            }
        }
    };
    Probe {
        usable: problems.is_empty(),
        problems,
        mips,
    }
}

fn no_kvm(errno: i32) -> Problem {
    match errno {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => problem(
            "this host has no /dev/kvm",
            "enable virtualization in the firmware (or nested virtualization in the hypervisor) \
             and load the module: sudo modprobe kvm_intel or kvm_amd",
        ),
        libc::EACCES | libc::EPERM => problem(
            "you may not open /dev/kvm",
            "join its group and log in again: sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm && sudo \
             usermod -aG kvm $USER",
        ),
        _ => problem(
            format!(
                "cannot {OPEN_KVM}: {}",
                std::io::Error::from_raw_os_error(errno)
            ),
            "see the kernel's log: sudo dmesg | grep -i kvm",
        ),
    }
}

fn missing_extensions(kvm: &Kvm) -> Option<Problem> {
    const KERNEL: &str = "use a kernel of 5.10 or later";
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Some(problem(
            "its KVM speaks another version of the interface",
            KERNEL,
        ));
    }
    let missing: Vec<&str> = EXTENSIONS
        .iter()
        .filter(|(extension, _)| !kvm.check_extension(*extension))
        .map(|(_, name)| *name)
        .collect();
    (!missing.is_empty()).then(|| {
        problem(
            format!("this host's KVM lacks {}", missing.join(", ")),
            KERNEL,
        )
    })
}

fn too_slow(mips: f64) -> Option<Problem> {
    (mips < SPEED_MIN_MIPS).then(|| {
        problem(
            format!(
                "this host's KVM emulates kernel mode in software: {mips:.1} million instructions \
                 a second, too slow to boot Linux"
            ),
            "use a host with hardware virtualization, or let Zygote use its lab",
        )
    })
}

/// Runs the tiny guest; its speed, or what it could not do.
fn run_guest(kvm: &Kvm) -> Result<f64, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let memory = GuestMemory::tiny(GUEST_BYTES).map_err(|e| failed("map memory", &e))?;
    write_guest(&memory).map_err(|e| failed("write its memory", &e))?;
    let vm = kvm.create_vm().map_err(|e| failed("make a VM", &e))?;
    vm.set_tss_address(crate::layout::KVM_TSS)
        .map_err(|e| failed("set the TSS address", &e))?;
    for (slot, region) in memory.kvm_regions().into_iter().enumerate() {
        machine::set_region(
            &vm,
            kvm_userspace_memory_region {
                slot: slot as u32,
                ..region
            },
        )
        .map_err(|e| failed("map guest memory", &e))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(|e| failed("make a vCPU", &e))?;
    set_registers(kvm, &vcpu).map_err(|e| failed("set registers", &e))?;
    in_time(move || {
        let _memory = &memory;
        follow(&mut vcpu)
    })
}

/// What the work gives, on a thread of its own that is kicked out of the guest when it is late.
fn in_time(work: impl FnOnce() -> Result<f64, String> + Send + 'static) -> Result<f64, String> {
    install_kick().map_err(|error| error.to_string())?;
    let (done, result) = channel();
    let thread = std::thread::Builder::new().name("probe".into());
    let thread = thread.spawn(move || drop(done.send(work())));
    let thread = thread.map_err(|error| format!("start a thread: {error}"))?;
    let begun = Instant::now();
    let mut wait = PROBE_MAX;
    while begun.elapsed() < PROBE_MAX * 2 {
        match result.recv_timeout(wait) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err("run a guest at all".into()),
            // A kick can come too early: until it is heard.
            Err(RecvTimeoutError::Timeout) => drop(thread.kill(SIGRTMIN())),
        }
        wait = PROBE_MAX / 20;
    }
    // The thread is stuck in the kernel, and ends with this process.
    Err(LATE.into())
}

fn write_guest(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    boot::write_page_tables(memory)?;
    boot::write_gdt(memory)?;
    let map = memory.map_ref();
    map.write_slice(&program(), GuestAddress(CODE))?;
    map.write_slice(&IRETQ, GuestAddress(HANDLER))?;
    // An interrupt gate (Intel SDM vol. 3 §6.14.1), its target below 64 KiB of the segment's base.
    let gate = (HANDLER & 0xffff)
        | (CODE_SELECTOR << 16)
        | (GATE_INTERRUPT << 32)
        | ((HANDLER >> 16 & 0xffff) << 48);
    map.write_slice(&gate.to_le_bytes(), GuestAddress(IDT + BREAKPOINT * 16))
}

fn set_registers(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    boot::set_long_mode(&mut sregs);
    sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
    sregs.idt.base = IDT;
    sregs.idt.limit = 0xfff;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: CODE,
        rsp: STACK,
        rsi: OPERAND,
        rdi: XSAVE_AREA,
        rflags: 2,
        ..Default::default()
    })
}

/// Follows the guest through its steps, then measures.
fn follow(vcpu: &mut VcpuFd) -> Result<f64, String> {
    let mut done = 0;
    let mut started: Option<Instant> = None;
    let mut rounds = 0_u32;
    let begun = Instant::now();
    while begun.elapsed() < PROBE_MAX {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(STEP_PORT, _)) => done += 1,
            Ok(VcpuExit::IoOut(SPEED_PORT, _)) => {
                let start = *started.get_or_insert_with(Instant::now);
                let elapsed = start.elapsed();
                if elapsed >= MEASURE_MAX || rounds >= 500 {
                    let instructions = f64::from(rounds) * f64::from(SPEED_INSTRUCTIONS);
                    return Ok(instructions / elapsed.as_secs_f64() / 1e6);
                }
                rounds += 1;
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Ok(_) | Err(_) => {
                let step = STEPS.get(done).unwrap_or(&"count");
                return Err((*step).to_owned());
            }
        }
    }
    Err(LATE.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_and_a_forbidden_one_have_different_remedies() {
        assert!(no_kvm(libc::ENOENT).remedy.contains("modprobe"));
        assert!(no_kvm(libc::EACCES).remedy.contains("usermod"));
    }

    #[test]
    fn a_verdict_has_its_reasons() {
        let probe = probe();
        assert_eq!(probe.usable, probe.problems.is_empty());
        assert!(!probe.usable || probe.mips.is_some_and(|mips| mips >= SPEED_MIN_MIPS));
    }

    #[test]
    fn a_guest_that_never_exits_is_given_up() {
        let begun = Instant::now();
        let result = in_time(|| {
            std::thread::sleep(PROBE_MAX * 10);
            Ok(1.0)
        });
        assert_eq!(result.unwrap_err(), LATE);
        assert!(begun.elapsed() < PROBE_MAX * 3);
    }

    #[test]
    fn the_program_jumps_back_to_the_start_of_its_loop() {
        let code = program();
        let back = code[code.len() - 1] as i8 as i64;
        let target = (code.len() as i64 + back) as usize;
        assert_eq!(code[target], 0xb9);
        assert_eq!(
            code[target + 1..target + 5],
            (SPEED_INSTRUCTIONS / 2).to_le_bytes()
        );
    }
}
