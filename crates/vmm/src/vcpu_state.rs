//! Saving and restoring a vCPU's registers: the one place where KVM's structs become the
//! snapshot's types and back.
//!
//! Order matters on restore (Documentation/virt/kvm/api.rst): CPUID before anything that it
//! gates, special registers (APIC base, CR4) before XSAVE and MSRs, the LAPIC before the
//! TSC-deadline MSR that arms its timer, TSC before both, and pending events last.

use crate::cpuid;
use crate::machine::{MachineError, kvm};
use crate::vcpu::Vcpu;
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use zerocopy::{FromBytes, IntoBytes};
use zygote_snapshot::state::{MsrEntry, VcpuState};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_APIC_BASE: u32 = 0x1b;
/// Registers of KVM's list that are not the guest's state: the APIC base travels with the special
/// registers, and microcode revision and the capabilities of nested virtualization are the host's.
const MSRS_LEFT_OUT: [u32; 3] = [MSR_APIC_BASE, 0x8b, 0x3a];
const MSRS_VMX: std::ops::RangeInclusive<u32> = 0x480..=0x493;
const MSRS_SVM: std::ops::RangeInclusive<u32> = 0xc001_0114..=0xc001_0117;
const MSRS_HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;
const MSRS_PERFORMANCE: [std::ops::RangeInclusive<u32>; 5] = [
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30c,
    0x38d..=0x391,
    0xc001_0000..=0xc001_0007,
];
/// KVM's paravirtual MSRs that are no state: the wall clock, at whose writing KVM writes a page of
/// the guest; and those of features that the guest is not offered: asynchronous page faults, steal
/// time, end-of-interrupt.
const MSRS_PARAVIRTUAL_LEFT_OUT: [u32; 7] = [
    0x11,
    0x4b56_4d00,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
    0x4b56_4d06,
    0x4b56_4d07,
];
/// Most registers that one KVM_GET_MSRS takes.
const MSRS_BATCH_MAX: usize = 255;

fn read<T: FromBytes>(name: &str, bytes: &[u8]) -> Result<T, MachineError> {
    T::read_from_bytes(bytes).map_err(|_| {
        MachineError::State(format!(
            "{name} is {} bytes long, not {}",
            bytes.len(),
            std::mem::size_of::<T>()
        ))
    })
}

/// Where a new guest's TSC begins. KVM takes a TSC that is written within a second of the one that
/// it wrote itself (0, when it made the vCPU) for the same, and ignores it (before Linux 6.8,
/// `kvm_synchronize_tsc`): the TSC of a guest that is snapshotted young could not be restored.
const TSC_AT_BOOT: u64 = 1 << 40;

/// Sets a new guest's TSC going.
pub fn start_tsc(vcpu: &Vcpu) -> Result<(), MachineError> {
    let tsc = MsrEntry {
        index: MSR_TSC,
        value: TSC_AT_BOOT,
    };
    restore_msrs(vcpu, &[tsc])
}

/// The MSRs to save: what this host's KVM says is state, less what we leave out.
///
/// # Errors
/// If KVM does not tell.
pub fn msrs_to_save(host: &Kvm) -> Result<Vec<u32>, MachineError> {
    let list = kvm("list the MSRs that are state", host.get_msr_index_list())?;
    Ok(list
        .as_slice()
        .iter()
        .copied()
        .filter(|msr| {
            !MSRS_LEFT_OUT.contains(msr)
                && !MSRS_PARAVIRTUAL_LEFT_OUT.contains(msr)
                && !MSRS_VMX.contains(msr)
                && !MSRS_SVM.contains(msr)
                && !MSRS_HYPERV.contains(msr)
                && !MSRS_PERFORMANCE.iter().any(|range| range.contains(msr))
        })
        .collect())
}

/// Saves a stopped vCPU.
///
/// # Errors
/// If KVM refuses.
pub fn save(
    vcpu: &Vcpu,
    cpuid: Vec<zygote_snapshot::state::CpuidEntry>,
    msrs: &[u32],
) -> Result<VcpuState, MachineError> {
    let fd = &vcpu.fd;
    // First, since reading it makes KVM settle INIT and SIPI, which changes the others.
    let mp_state = kvm("read a vCPU's run state", fd.get_mp_state())?.mp_state;
    let regs = kvm("read registers", fd.get_regs())?;
    let sregs = kvm("read special registers", fd.get_sregs())?;
    let xsave = kvm("read the XSAVE area", fd.get_xsave())?;
    let xcrs = kvm("read XCRs", fd.get_xcrs())?;
    let debug_regs = kvm("read debug registers", fd.get_debug_regs())?;
    let lapic = kvm("read the LAPIC", fd.get_lapic())?;
    let msrs = save_msrs(vcpu, msrs)?;
    let events = kvm("read pending events", fd.get_vcpu_events())?;
    Ok(VcpuState {
        cpuid,
        msrs,
        regs: regs.as_bytes().to_vec(),
        sregs: sregs.as_bytes().to_vec(),
        xsave: xsave.as_bytes().to_vec(),
        xcrs: xcrs.as_bytes().to_vec(),
        debug_regs: debug_regs.as_bytes().to_vec(),
        lapic: lapic.as_bytes().to_vec(),
        events: events.as_bytes().to_vec(),
        mp_state,
        tsc_khz: kvm("read the TSC's frequency", fd.get_tsc_khz())?,
    })
}

fn save_msrs(vcpu: &Vcpu, wanted: &[u32]) -> Result<Vec<MsrEntry>, MachineError> {
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSRS_BATCH_MAX)];
        let entries: Vec<kvm_msr_entry> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msr_list(&entries)?;
        let count = kvm("read MSRs", vcpu.fd.get_msrs(&mut msrs))?;
        saved.extend(msrs.as_slice()[..count].iter().map(|e| MsrEntry {
            index: e.index,
            value: e.data,
        }));
        // KVM stops at the first that this vCPU does not have: that one is no state of it.
        rest = &rest[(count + usize::from(count < batch.len())).min(rest.len())..];
    }
    // The TSC first, the deadline that it is compared with last.
    saved.sort_by_key(|msr| match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(saved)
}

/// Makes the clocks of vCPUs that were saved one after the other those of one moment.
///
/// On restore KVM takes TSCs written within a second of each other for one clock and lets the
/// first decide (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET). Saved as read,
/// those of the later vCPUs would be ahead by what saving the earlier ones took, and go back when
/// restoring is quicker than that. The guest was stopped before the earliest.
pub fn settle_clocks(vcpus: &mut [VcpuState]) {
    let tscs = || vcpus.iter().filter_map(|vcpu| msr(vcpu, MSR_TSC));
    let (Some(earliest), Some(latest)) = (tscs().min(), tscs().max()) else {
        return;
    };
    let second = vcpus
        .first()
        .map_or(0, |vcpu| u64::from(vcpu.tsc_khz) * 1000);
    let one_clock = latest - earliest < second;
    for vcpu in vcpus {
        if one_clock && let Some(tsc) = msr_mut(vcpu, MSR_TSC) {
            *tsc = earliest;
        }
        settle_deadline(vcpu);
    }
}

/// A deadline of zero can mean that the timer has just expired and its interrupt is not yet in the
/// LAPIC; restored as it is, the guest would wait for ever. An expired deadline costs at worst one
/// interrupt too many.
fn settle_deadline(vcpu: &mut VcpuState) {
    if let Some(tsc) = msr(vcpu, MSR_TSC)
        && let Some(deadline) = msr_mut(vcpu, MSR_TSC_DEADLINE)
        && *deadline == 0
    {
        *deadline = tsc;
    }
}

fn msr(vcpu: &VcpuState, index: u32) -> Option<u64> {
    let found = vcpu.msrs.iter().find(|msr| msr.index == index);
    found.map(|msr| msr.value)
}

fn msr_mut(vcpu: &mut VcpuState, index: u32) -> Option<&mut u64> {
    let found = vcpu.msrs.iter_mut().find(|msr| msr.index == index);
    found.map(|msr| &mut msr.value)
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, MachineError> {
    Msrs::from_entries(entries)
        .map_err(|_| MachineError::State(format!("{} MSRs are too many", entries.len())))
}

/// What a vCPU has that has just been made: groups that are saved so need no call.
pub struct FreshVcpu {
    xcrs: Vec<u8>,
    debug_regs: Vec<u8>,
    events: Vec<u8>,
    /// Of vCPU 0; the others wait for it to start them.
    mp_state: u32,
    tsc_khz: u32,
}

impl FreshVcpu {
    /// Reads it from vCPU 0 of a VM.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn read(fd: &VcpuFd) -> Result<Self, MachineError> {
        let xcrs = kvm("read XCRs", fd.get_xcrs())?;
        let debug_regs = kvm("read debug registers", fd.get_debug_regs())?;
        let events = kvm("read pending events", fd.get_vcpu_events())?;
        Ok(Self {
            xcrs: xcrs.as_bytes().to_vec(),
            debug_regs: debug_regs.as_bytes().to_vec(),
            events: events.as_bytes().to_vec(),
            mp_state: kvm("read a vCPU's run state", fd.get_mp_state())?.mp_state,
            tsc_khz: kvm("read the TSC's frequency", fd.get_tsc_khz())?,
        })
    }
}

/// Restores a vCPU that has never run.
///
/// # Errors
/// If a group has the wrong length, or KVM refuses one.
pub fn restore(vcpu: &Vcpu, state: &VcpuState, fresh: &FreshVcpu) -> Result<(), MachineError> {
    let VcpuState {
        cpuid,
        msrs,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        events,
        mp_state,
        tsc_khz,
    } = state;
    let fd = &vcpu.fd;
    let cpuid = cpuid::to_kvm(cpuid).map_err(MachineError::State)?;
    kvm("set CPUID", fd.set_cpuid2(&cpuid))?;
    restore_tsc_khz(vcpu, *tsc_khz, fresh)?;
    if vcpu.index != 0 || *mp_state != fresh.mp_state {
        let run_state = kvm_mp_state {
            mp_state: *mp_state,
        };
        kvm("set a vCPU's run state", fd.set_mp_state(run_state))?;
    }
    kvm(
        "set registers",
        fd.set_regs(&read::<kvm_regs>("registers", regs)?),
    )?;
    kvm(
        "set special registers",
        fd.set_sregs(&read::<kvm_sregs>("special registers", sregs)?),
    )?;
    if *xcrs != fresh.xcrs {
        kvm("set XCRs", fd.set_xcrs(&read::<kvm_xcrs>("XCRs", xcrs)?))?;
    }
    restore_xsave(vcpu, &read::<kvm_xsave>("XSAVE area", xsave)?)?;
    if *debug_regs != fresh.debug_regs {
        let debug_regs = read::<kvm_debugregs>("debug registers", debug_regs)?;
        kvm("set debug registers", fd.set_debug_regs(&debug_regs))?;
    }
    kvm(
        "set the LAPIC",
        fd.set_lapic(&read::<kvm_lapic_state>("LAPIC", lapic)?),
    )?;
    restore_msrs(vcpu, msrs)?;
    if *events == fresh.events {
        return Ok(());
    }
    let events = read::<kvm_vcpu_events>("pending events", events)?;
    kvm("set pending events", fd.set_vcpu_events(&events))
}

/// The guest keeps the frequency that it has measured; equal frequencies need no call.
fn restore_tsc_khz(vcpu: &Vcpu, tsc_khz: u32, fresh: &FreshVcpu) -> Result<(), MachineError> {
    // Hosts of one model differ by parts per million from boot to boot; KVM itself tolerates 250.
    if fresh.tsc_khz.abs_diff(tsc_khz) <= tsc_khz / 4000 {
        return Ok(());
    }
    kvm(
        "set the TSC's frequency (this CPU cannot scale it to the snapshot's)",
        vcpu.fd.set_tsc_khz(tsc_khz),
    )
}

#[expect(
    unsafe_code,
    reason = "KVM_SET_XSAVE trusts the caller about the area's length"
)]
fn restore_xsave(vcpu: &Vcpu, xsave: &kvm_xsave) -> Result<(), MachineError> {
    // SAFETY: the guest is never offered features whose state lies beyond the 4 KiB of
    // `kvm_xsave` (crate::cpuid leaves AMX out), so the kernel reads no more than that.
    let result = unsafe { vcpu.fd.set_xsave(xsave) };
    kvm("set the XSAVE area", result)
}

fn restore_msrs(vcpu: &Vcpu, msrs: &[MsrEntry]) -> Result<(), MachineError> {
    let entries: Vec<kvm_msr_entry> = msrs
        .iter()
        .map(|&MsrEntry { index, value }| kvm_msr_entry {
            index,
            data: value,
            ..Default::default()
        })
        .collect();
    for batch in entries.chunks(MSRS_BATCH_MAX) {
        let list = msr_list(batch)?;
        let count = kvm("set MSRs", vcpu.fd.set_msrs(&list))?;
        if let Some(refused) = batch.get(count) {
            return Err(MachineError::State(format!(
                "KVM refuses MSR {:#x} = {:#x}: this host's CPU or kernel lacks it",
                refused.index, refused.data
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid;
    use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs};
    use kvm_ioctls::VmFd;
    use zygote_snapshot::state::CpuidEntry;

    /// Offset of XSTATE_BV in the XSAVE area, and of the upper halves of the YMM registers in its
    /// standard format (Intel SDM vol. 1 §13.4).
    const XSTATE_BV: usize = 512;
    const YMM_HIGH: usize = 576;
    const XCR0_X87_SSE_AVX: u64 = 7;

    /// A vCPU as a machine has them, with the CPUID that it shows. Any /dev/kvm will do: nothing
    /// of a guest is run.
    fn vcpu(kvm: &Kvm) -> (VmFd, Vcpu, Vec<CpuidEntry>) {
        let vm = kvm.create_vm().unwrap();
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = 24;
        vm.enable_cap(&split).unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let entries = cpuid::for_vcpu(&supported, 0, 1, true);
        fd.set_cpuid2(&cpuid::to_kvm(&entries).unwrap()).unwrap();
        (vm, Vcpu { index: 0, fd }, entries)
    }

    fn patterned(kvm: &Kvm) -> VcpuState {
        let (_vm, vcpu, entries) = vcpu(kvm);
        let regs = kvm_regs {
            rax: 0x1122_3344_5566_7788,
            r15: u64::MAX,
            rip: 0x1000,
            rflags: 2,
            ..Default::default()
        };
        vcpu.fd.set_regs(&regs).unwrap();
        let mut xcrs = vcpu.fd.get_xcrs().unwrap();
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].value = XCR0_X87_SSE_AVX;
        vcpu.fd.set_xcrs(&xcrs).unwrap();
        let msrs = msrs_to_save(kvm).unwrap();
        let mut state = save(&vcpu, entries, &msrs).unwrap();
        settle_clocks(std::slice::from_mut(&mut state));
        let end = YMM_HIGH + 16 * 16;
        assert!(state.xsave.len() >= end, "{} bytes", state.xsave.len());
        state.xsave[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&XCR0_X87_SSE_AVX.to_le_bytes());
        for (index, byte) in state.xsave[YMM_HIGH..end].iter_mut().enumerate() {
            *byte = index as u8 ^ 0x5a;
        }
        state
    }

    #[test]
    fn vector_registers_and_all_others_survive_restore_and_save() {
        let kvm = Kvm::new().unwrap();
        let mut state = patterned(&kvm);
        let (_vm, other, entries) = vcpu(&kvm);
        restore(&other, &state, &FreshVcpu::read(&other.fd).unwrap()).unwrap();
        let mut again = save(&other, entries, &msrs_to_save(&kvm).unwrap()).unwrap();
        settle_clocks(std::slice::from_mut(&mut again));
        // Time goes on: the TSC, and the deadline that is saved as just expired while none is set.
        let take = |state: &mut VcpuState, index| msr_mut(state, index).map(std::mem::take);
        let (new, old) = (take(&mut again, MSR_TSC), take(&mut state, MSR_TSC));
        assert!(new >= old, "{new:?} {old:?}");
        let deadline = take(&mut again, MSR_TSC_DEADLINE);
        assert!(deadline == take(&mut state, MSR_TSC_DEADLINE) || deadline == new);
        assert_eq!(again.xsave, state.xsave);
        for (new, old) in again.msrs.iter().zip(&state.msrs) {
            assert_eq!(new, old);
        }
        assert_eq!((&again.regs, &again.sregs), (&state.regs, &state.sregs));
        assert_eq!((&again.lapic, &again.events), (&state.lapic, &state.events));
        assert!(again == state);
    }

    #[test]
    fn vcpus_saved_one_after_the_other_have_one_clock() {
        let kvm = Kvm::new().unwrap();
        let one = patterned(&kvm);
        let at = |tsc: u64, deadline: u64| {
            let mut state = one.clone();
            *msr_mut(&mut state, MSR_TSC).unwrap() = tsc;
            *msr_mut(&mut state, MSR_TSC_DEADLINE).unwrap() = deadline;
            state
        };
        let clocks = |vcpus: &[VcpuState]| -> Vec<(u64, u64)> {
            let read = |vcpu, index| msr(vcpu, index).unwrap();
            let both = |vcpu| (read(vcpu, MSR_TSC), read(vcpu, MSR_TSC_DEADLINE));
            vcpus.iter().map(both).collect()
        };
        let mut close = [at(5_000, 0), at(9_000, 7_000), at(6_000, 0)];
        settle_clocks(&mut close);
        assert_eq!(
            clocks(&close),
            [(5_000, 5_000), (5_000, 7_000), (5_000, 5_000)]
        );
        // Farther apart than what KVM takes for one clock: the guest wants them so.
        let second = u64::from(one.tsc_khz) * 1000;
        let mut apart = [at(1, 0), at(1 + second, 0)];
        settle_clocks(&mut apart);
        assert_eq!(clocks(&apart), [(1, 1), (1 + second, 1 + second)]);
        settle_clocks(&mut []);
    }

    #[test]
    fn a_state_of_another_shape_is_refused() {
        let kvm = Kvm::new().unwrap();
        let state = patterned(&kvm);
        let (_vm, other, _) = vcpu(&kvm);
        let fresh = FreshVcpu::read(&other.fd).unwrap();
        let cut = |change: fn(&mut VcpuState)| {
            let mut state = state.clone();
            change(&mut state);
            restore(&other, &state, &fresh).is_err()
        };
        assert!(cut(|state| state.regs.truncate(3)));
        assert!(cut(|state| state.sregs.push(0)));
        assert!(cut(|state| state.lapic.clear()));
        assert!(cut(|state| state.xsave = vec![0; 1 << 20]));
        assert!(!cut(|_| ()));
    }
}
