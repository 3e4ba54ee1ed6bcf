//! The CPU that a guest sees: what KVM supports here, less what cannot be saved or moved, plus the
//! topology of this machine's vCPUs.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use zygote_snapshot::state::CpuidEntry;

const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM_FEATURE_*: old clock bit, no I/O delay, clock, spinlock kicks, IPIs by hypercall, stable
/// clock. Left out: what keeps state in the host (asynchronous faults) or dirties guest pages at
/// every entry (steal time).
const KVM_FEATURES_KEPT: u32 = 1 | (1 << 1) | (1 << 3) | (1 << 7) | (1 << 11) | (1 << 24);

const LEAF1_ECX_MONITOR: u32 = 1 << 3;
const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_PDCM: u32 = 1 << 15;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// AMX: its state does not fit into the 4 KiB of KVM_GET_XSAVE.
const LEAF7_EDX_AMX: u32 = (1 << 22) | (1 << 24) | (1 << 25);
const XCR0_AMX: u32 = (1 << 17) | (1 << 18);
/// Control-flow enforcement: its shadow stack pointer is not among the registers that are saved.
const LEAF7_ECX_SHADOW_STACK: u32 = 1 << 7;
const LEAF7_EDX_BRANCH_TRACKING: u32 = 1 << 20;
const XSS_CET: u32 = (1 << 11) | (1 << 12);
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT1_ECX_PERFORMANCE: u32 = (1 << 23) | (1 << 24) | (1 << 28);
/// A TSC that never changes its rate: true here, not after a move to another host.
const EXT7_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// KVM's list in the snapshot's words.
pub fn from_kvm_list(list: &CpuId) -> Vec<CpuidEntry> {
    list.as_slice().iter().map(from_kvm).collect()
}

/// CPUID for one vCPU, from what KVM supports.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, vcpus: u8, tsc_deadline: bool) -> Vec<CpuidEntry> {
    let id = u32::from(vcpu);
    let count = u32::from(vcpus);
    let mut entries: Vec<CpuidEntry> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .map(from_kvm)
        .collect();
    for entry in &mut entries {
        adjust(entry, id, count, tsc_deadline);
    }
    if supported
        .as_slice()
        .iter()
        .any(|entry| entry.function == 0xb)
    {
        entries.extend(topology_leaf(id, count));
    }
    entries
}

fn adjust(entry: &mut CpuidEntry, id: u32, count: u32, tsc_deadline: bool) {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (count << 16) | (id << 24);
            entry.ecx &= !(LEAF1_ECX_MONITOR | LEAF1_ECX_VMX | LEAF1_ECX_PDCM);
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            entry.edx &= !LEAF1_EDX_HTT;
            if count > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
        }
        // Cache leaves: every vCPU a core of its own.
        (4, _) if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & 0x0000_3fff) | ((count - 1) << 26);
        }
        (7, 0) => {
            entry.ecx &= !LEAF7_ECX_SHADOW_STACK;
            entry.edx &= !(LEAF7_EDX_AMX | LEAF7_EDX_BRANCH_TRACKING);
        }
        // Performance counters are not saved, so there are none.
        (0xa | 0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        (0xd, 0) => entry.eax &= !XCR0_AMX,
        (0xd, 1) => entry.ecx &= !XSS_CET,
        (KVM_SIGNATURE, _) => entry.eax = KVM_FEATURES,
        (KVM_FEATURES, _) => {
            entry.eax &= KVM_FEATURES_KEPT;
            entry.edx = 0;
        }
        (0x8000_0001, _) => entry.ecx &= !(EXT1_ECX_SVM | EXT1_ECX_PERFORMANCE),
        (0x8000_0007, _) => entry.edx &= !EXT7_EDX_INVARIANT_TSC,
        (0x8000_0008, _) => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1),
        (0x8000_001e, _) => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Extended topology (Intel SDM, CPUID leaf 0BH): one thread a core, all cores in one package.
fn topology_leaf(id: u32, count: u32) -> [CpuidEntry; 3] {
    let core_bits = u32::BITS - (count - 1).leading_zeros();
    let level = |index, eax, ebx, ecx| CpuidEntry {
        function: 0xb,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: id,
    };
    [
        level(0, 0, 1, 0x100),
        level(1, core_bits, count, 0x201),
        level(2, 0, 0, 2),
    ]
}

/// KVM's form to ours.
pub fn from_kvm(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

/// Our form to KVM's.
///
/// # Errors
/// If there are more leaves than KVM takes.
pub fn to_kvm(entries: &[CpuidEntry]) -> Result<CpuId, String> {
    let entries: Vec<kvm_cpuid_entry2> = entries
        .iter()
        .map(
            |&CpuidEntry {
                 function,
                 index,
                 flags,
                 eax,
                 ebx,
                 ecx,
                 edx,
             }| kvm_cpuid_entry2 {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            },
        )
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| format!("{} CPUID leaves are too many", entries.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(1, 0),
            leaf(7, 0),
            leaf(0xa, 0),
            leaf(0xb, 0),
            leaf(0x8000_0001, 0),
        ])
        .unwrap()
    }

    #[test]
    fn nothing_is_offered_that_a_snapshot_could_not_hold() {
        let cpuid = for_vcpu(&supported(), 0, 1, true);
        let find = |function| {
            cpuid
                .iter()
                .find(|entry| entry.function == function)
                .unwrap()
        };
        assert_eq!(
            find(1).ecx & (LEAF1_ECX_VMX | LEAF1_ECX_MONITOR | LEAF1_ECX_PDCM),
            0
        );
        assert_eq!(find(7).edx & (LEAF7_EDX_AMX | LEAF7_EDX_BRANCH_TRACKING), 0);
        assert_eq!(find(7).ecx & LEAF7_ECX_SHADOW_STACK, 0);
        assert_eq!(find(0xa).eax, 0);
        assert_eq!(find(0x8000_0001).ecx & EXT1_ECX_SVM, 0);
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        for vcpu in [0, 1, 31] {
            let cpuid = for_vcpu(&supported(), vcpu, 32, true);
            let leaf1 = cpuid.iter().find(|entry| entry.function == 1).unwrap();
            assert_eq!(leaf1.ebx >> 24, u32::from(vcpu));
            for entry in cpuid.iter().filter(|entry| entry.function == 0xb) {
                assert_eq!(entry.edx, u32::from(vcpu));
            }
            let core = cpuid
                .iter()
                .find(|entry| entry.function == 0xb && entry.index == 1)
                .unwrap();
            assert_eq!((core.eax, core.ebx), (5, 32));
        }
    }
}
