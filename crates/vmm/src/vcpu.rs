//! One vCPU: making it, running it on its thread, stopping it.
//!
//! A vCPU belongs to exactly one place at a time: to the machine while it is stopped, to its
//! thread while it runs. The thread gives it back when it ends. So whoever can call
//! [`crate::vcpu_state`] holds a stopped vCPU, and a process that forks has no vCPU threads at all.

#![expect(
    unsafe_code,
    reason = "signal handler, and a word of the vCPU's shared page"
)]

use crate::bus::Bus;
use crate::gate::{Entrance, Gate};
use crate::machine::{MachineError, StopReason};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs, for the signal handler.
    static IMMEDIATE_EXIT: Cell<*const AtomicPtr<u8>> = const { Cell::new(std::ptr::null()) };
}

/// The kick: makes KVM_RUN return at once, also when the signal comes just before it is entered.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|slot| {
        let slot = slot.get();
        if !slot.is_null() {
            // SAFETY: points to a local of `run_until_stopped`, which clears it before it ends;
            // the byte lies in the vCPU's shared page, which lives as long as the vCPU.
            unsafe { (*slot).load(Ordering::Relaxed).write_volatile(1) };
        }
    });
}

/// Installs the kick's signal handler, once a process.
pub fn install_kick() -> Result<(), MachineError> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = register_signal_handler(SIGRTMIN(), on_kick));
    result.map_err(|e| MachineError::Kvm {
        operation: "install the signal that stops vCPUs",
        source: std::io::Error::from_raw_os_error(e.errno()),
    })
}

/// A stopped vCPU.
pub struct Vcpu {
    /// Index, and APIC id.
    pub index: u8,
    /// KVM's handle.
    pub fd: VcpuFd,
}

/// A running or parked vCPU.
pub struct RunningVcpu {
    thread: JoinHandle<Vcpu>,
}

/// What every vCPU thread does first; the error is a sentence.
pub type Prepare = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What vCPU threads share with their machine.
pub struct Shared {
    /// Set to make every vCPU thread give its vCPU back.
    pub stop: AtomicBool,
    /// Called once by the first vCPU that cannot go on.
    pub on_end: Box<dyn Fn(StopReason) + Send + Sync>,
    /// Whether the guest may be entered.
    pub gate: Gate,
    /// Devices.
    pub bus: Bus,
}

enum Step {
    Continue,
    Interrupted,
    End(StopReason),
}

impl Vcpu {
    /// Starts the vCPU on a thread of its own, which first does `prepare`.
    ///
    /// # Errors
    /// If no thread can be made.
    pub fn start(
        self,
        shared: Arc<Shared>,
        entrance: Entrance,
        prepare: Prepare,
    ) -> Result<RunningVcpu, MachineError> {
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn(move || match prepare() {
                Ok(()) => self.run_until_stopped(&shared, entrance),
                Err(why) => {
                    (shared.on_end)(StopReason::HostError(why));
                    self
                }
            })
            .map_err(|source| MachineError::Kvm {
                operation: "start a vCPU thread",
                source,
            })?;
        Ok(RunningVcpu { thread })
    }

    fn run_until_stopped(mut self, shared: &Shared, entrance: Entrance) -> Self {
        let flag = AtomicPtr::new(&raw mut self.fd.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.with(|slot| slot.set(&raw const flag));
        // What the kernel does at a vCPU's first run, it does now.
        self.complete_io();
        shared.pass(entrance);
        while !shared.stop.load(Ordering::Acquire) {
            match self.step(&shared.bus) {
                Step::Continue => {}
                // A kick is for once: without a reason to stop, the guest goes on. Who has a reason
                // has set it before he kicked.
                Step::Interrupted => self.fd.set_kvm_immediate_exit(0),
                Step::End(reason) => {
                    (shared.on_end)(reason);
                    break;
                }
            }
        }
        IMMEDIATE_EXIT.with(|slot| slot.set(std::ptr::null()));
        self.complete_io();
        self
    }

    /// Runs the guest until its next exit, and serves that.
    fn step(&mut self, bus: &Bus) -> Step {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(reason) = bus.port_write(port, data) {
                    return Step::End(reason);
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::Intr) => return Step::Interrupted,
            Ok(VcpuExit::IoapicEoi(_) | VcpuExit::Hlt) => {}
            Ok(exit) => {
                let reason = describe_end(&exit);
                return Step::End(self.with_registers(reason));
            }
            Err(error) if error.errno() == libc::EINTR => return Step::Interrupted,
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => {
                return Step::End(StopReason::HostError(format!("KVM_RUN failed: {error}")));
            }
        }
        Step::Continue
    }

    fn with_registers(&self, reason: StopReason) -> StopReason {
        match (reason, self.fd.get_regs()) {
            (StopReason::GuestCrash(what), Ok(regs)) => StopReason::GuestCrash(format!(
                "{what} on vCPU {} at instruction address {:#x}",
                self.index, regs.rip
            )),
            (reason, _) => reason,
        }
    }

    /// KVM finishes an emulated I/O instruction when it is entered again: enter without running,
    /// so that the saved registers stand after the instruction.
    fn complete_io(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }
}

impl RunningVcpu {
    /// Interrupts the guest; the vCPU looks at [`Shared::stop`] next.
    pub fn kick(&self) {
        // Fails only if the thread has ended already, and then there is nothing to kick.
        let _ = self.thread.kill(SIGRTMIN());
    }

    /// As `kick`, for one that may be at the gate, where a kick can come too early.
    pub fn call_away(&self) {
        while !self.thread.is_finished() {
            self.kick();
            std::thread::yield_now();
        }
    }

    /// Waits for the thread to give the vCPU back. Kicked, it leaves the guest at once; a device that
    /// it serves is done within a second (`devices::virtio::serve`).
    ///
    /// # Errors
    /// If the thread panicked.
    pub fn join(self) -> Result<Vcpu, MachineError> {
        self.thread
            .join()
            .map_err(|_| MachineError::State("a vCPU thread panicked".into()))
    }
}

fn describe_end(exit: &VcpuExit<'_>) -> StopReason {
    match exit {
        VcpuExit::Shutdown => StopReason::GuestReset,
        VcpuExit::SystemEvent(kind, _) => match *kind {
            kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN | kvm_bindings::KVM_SYSTEM_EVENT_RESET => {
                StopReason::GuestReset
            }
            other => StopReason::GuestCrash(format!("system event {other}")),
        },
        VcpuExit::InternalError => {
            StopReason::GuestCrash("an instruction that KVM cannot emulate".into())
        }
        VcpuExit::FailEntry(reason, _) => StopReason::GuestCrash(format!(
            "the CPU refused to enter the guest (reason {reason:#x})"
        )),
        other => StopReason::HostError(format!("unexpected exit from the guest: {other:?}")),
    }
}
