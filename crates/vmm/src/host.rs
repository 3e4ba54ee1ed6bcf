//! The host's KVM, opened once. What it tells of itself does not change while it is open, so
//! processes that make many machines ask once, before they give up their way to /dev/kvm.

use crate::machine::{MachineError, create_vm, kvm, split_irqchip};
use crate::vcpu_state::FreshVcpu;
use crate::{cpuid, vcpu, vcpu_state};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};
use std::os::fd::{AsRawFd, RawFd};
use zygote_snapshot::state::CpuidEntry;

/// The operation that fails when a host has no KVM, or keeps it from us.
pub const OPEN_KVM: &str = "open /dev/kvm (is there one, and may you use it?)";

/// An open /dev/kvm. Can be used by the children of a process too.
pub struct Host {
    pub(crate) kvm: Kvm,
    /// MSRs that are a vCPU's state.
    pub(crate) msrs: Vec<u32>,
    /// What a vCPU has before anything is restored.
    pub(crate) fresh: FreshVcpu,
    /// A VM that never runs: with no VM open the kernel switches its hooks for KVM off, and on
    /// again, in running code, at the price of a third of a VM.
    _idle: VmFd,
}

impl Host {
    /// Opens it.
    ///
    /// # Errors
    /// If there is no usable /dev/kvm.
    pub fn open() -> Result<Self, MachineError> {
        // Here, since children inherit it.
        vcpu::install_kick()?;
        let kvm = crate::machine::kvm(OPEN_KVM, Kvm::new())?;
        let msrs = vcpu_state::msrs_to_save(&kvm)?;
        let idle = create_vm(&kvm)?;
        split_irqchip(&idle)?;
        let vcpu = crate::machine::kvm("make a vCPU", idle.create_vcpu(0))?;
        Ok(Self {
            fresh: FreshVcpu::read(&vcpu)?,
            kvm,
            msrs,
            _idle: idle,
        })
    }

    /// What KVM supports, to be compared with what a snapshot's guest was shown.
    ///
    /// # Errors
    /// If KVM does not tell.
    pub fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, MachineError> {
        Ok(cpuid::from_kvm_list(&self.kvm_cpuid()?))
    }

    pub(crate) fn kvm_cpuid(&self) -> Result<CpuId, MachineError> {
        let list = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        kvm("list the supported CPUID", list)
    }
}

impl AsRawFd for Host {
    fn as_raw_fd(&self) -> RawFd {
        self.kvm.as_raw_fd()
    }
}
