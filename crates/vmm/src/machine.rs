//! One virtual machine, from its making to its end.

#![expect(unsafe_code, reason = "hands mapped memory to KVM")]

use crate::bus::{Bus, Pin, SerialPort, lock};
use crate::devices::virtio::MmioTransport;
use crate::gate::{Entrance, Gate, GuestClock};
use crate::host::Host;
use crate::ioapic::Ioapic;
use crate::layout::*;
use crate::memory::{GuestMemory, MemoryError};
use crate::vcpu::{Prepare, RunningVcpu, Shared, Vcpu};
use crate::{Disk, Statistics, acpi, boot, cpuid, devices, prefault, vcpu_state};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, kvm_clock_data, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::Serial;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use zygote_snapshot::state::{
    ClockState, CpuidEntry, MachineState, SerialState, VirtioDeviceState,
};

/// Most vCPUs of a machine.
pub const VCPUS_MAX: u8 = 32;

/// What to boot.
pub struct BootConfig {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// 1 to 32.
    pub vcpus: u8,
    /// bzImage or ELF.
    pub kernel: File,
    /// initramfs (cpio, maybe compressed).
    pub initramfs: File,
    /// Kernel command line.
    pub command_line: String,
    /// Block devices: the first is /dev/vda.
    pub disks: Vec<Disk>,
}

/// Why the machine stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest reset or powered off (a panicking guest kernel does, too).
    GuestReset,
    /// Triple fault or another state from which the CPU cannot go on.
    GuestCrash(String),
    /// KVM or a device failed: our problem, not the guest's.
    HostError(String),
}

/// Why a machine could not be made, run, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Memory.
    #[error("cannot set up guest memory")]
    Memory(#[from] MemoryError),
    /// A KVM call.
    #[error("KVM refused to {operation}")]
    Kvm {
        /// Verb and object.
        operation: &'static str,
        /// The kernel's word.
        #[source]
        source: std::io::Error,
    },
    /// The state does not fit this machine.
    #[error("the machine state is not usable: {0}")]
    State(String),
    /// The kernel or initramfs cannot be loaded.
    #[error("cannot load the guest's kernel: {0}")]
    Load(String),
}

pub(crate) fn kvm<T>(
    operation: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, MachineError> {
    result.map_err(|e| MachineError::Kvm {
        operation,
        source: std::io::Error::from_raw_os_error(e.errno()),
    })
}

/// A virtual machine. Its owner's thread moves the agent's bytes and waits for its end; vCPUs have
/// threads of their own while they run, and none while they are paused.
pub struct Machine {
    vm: Arc<VmFd>,
    shared: Arc<Shared>,
    vcpus: Vcpus,
    cpuid: Vec<Vec<CpuidEntry>>,
    msrs: Vec<u32>,
    stop_event: Arc<EventFd>,
    stop_reason: Arc<Mutex<Option<StopReason>>>,
    /// What the guest's clock said when it was restored.
    clock_ns: u64,
    /// Restored and not started yet: where the guest must find a new generation id.
    new_generation: Option<u64>,
}

enum Vcpus {
    Stopped(Vec<Vcpu>),
    Running(Vec<RunningVcpu>),
}

/// What a machine consists of before it has vCPU state.
struct Parts {
    vm: Arc<VmFd>,
    vcpus: Vec<Vcpu>,
}

type SaveDevice = fn(&MmioTransport) -> Result<VirtioDeviceState, String>;

impl Machine {
    /// Makes a machine that has not run yet. `agent`: non-blocking stream; `serial`: where the
    /// guest's early messages go.
    ///
    /// # Errors
    /// If KVM, memory or the kernel image is not usable.
    pub fn boot(
        mut config: BootConfig,
        agent: OwnedFd,
        serial: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        if !(1..=VCPUS_MAX).contains(&config.vcpus) {
            return Err(MachineError::State(format!(
                "{} vCPUs: a machine has 1 to {VCPUS_MAX}",
                config.vcpus
            )));
        }
        let memory = GuestMemory::anonymous(config.memory_bytes)?;
        write_guest(&memory, GENERATION_ID, &fresh_generation_id()?)?;
        let entry = boot::load(
            &memory,
            &mut config.kernel,
            &mut config.initramfs,
            &config.command_line,
        )?;
        let host = Host::open()?;
        let parts = Parts::create(&host, &memory, config.vcpus)?;
        let supported = host.kvm_cpuid()?;
        let deadline = host.kvm.check_extension(Cap::TscDeadlineTimer);
        let mut cpuid = Vec::new();
        for vcpu in &parts.vcpus {
            let entries = cpuid::for_vcpu(&supported, vcpu.index, config.vcpus, deadline);
            let list = cpuid::to_kvm(&entries).map_err(MachineError::State)?;
            kvm("set CPUID", vcpu.fd.set_cpuid2(&list))?;
            vcpu_state::start_tsc(vcpu)?;
            cpuid.push(entries);
        }
        prepare_boot_vcpu(&parts.vcpus[0], entry)?;
        let ioapic = Arc::new(Ioapic::new(Arc::clone(&parts.vm)));
        let serial_pin = Pin::new(Arc::clone(&ioapic), SERIAL_GSI);
        let serial = Serial::new(serial_pin, serial);
        let slots = devices::create(config.disks, agent, &ioapic)?;
        write_guest(
            &memory,
            ACPI_TABLES,
            &acpi::tables(config.vcpus, slots.len()),
        )?;
        Self::assemble(&host, parts, memory, ioapic, serial, slots, cpuid)
    }

    /// Makes a machine from a snapshot, parked before its first instruction.
    ///
    /// # Errors
    /// If the state does not fit together or KVM refuses it.
    pub fn restore(
        host: &Host,
        state: &MachineState,
        memory: GuestMemory,
        disks: Vec<Disk>,
        agent: OwnedFd,
        serial: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        let MachineState {
            vcpus,
            clock,
            ioapic,
            serial: serial_state,
            devices,
            generation_id_address,
        } = state;
        let count = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        if !(1..=VCPUS_MAX).contains(&count) {
            return Err(MachineError::State(format!("{} vCPUs", vcpus.len())));
        }
        let parts = Parts::create(host, &memory, count)?;
        for (vcpu, state) in parts.vcpus.iter().zip(vcpus) {
            vcpu_state::restore(vcpu, state, &host.fresh)?;
        }
        let data = kvm_clock_data {
            clock: clock.clock_ns,
            ..Default::default()
        };
        kvm("set the guest's clock", parts.vm.set_clock(&data))?;
        for vcpu in &parts.vcpus {
            // Tells the guest's watchdogs that it has been stopped; fails if the guest has no
            // kvm-clock, and then it has none of those watchdogs either.
            let _ = vcpu.fd.kvmclock_ctrl();
        }
        let ioapic = Ioapic::restore(Arc::clone(&parts.vm), ioapic).map_err(MachineError::State)?;
        let ioapic = Arc::new(ioapic);
        let serial = restore_serial(serial_state, &ioapic, serial)?;
        let slots = devices::restore(devices, disks, agent, &ioapic)?;
        let cpuid = vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
        let mut machine = Self::assemble(host, parts, memory, ioapic, serial, slots, cpuid)?;
        machine.clock_ns = clock.clock_ns;
        machine.new_generation = Some(*generation_id_address);
        Ok(machine)
    }

    fn assemble(
        host: &Host,
        parts: Parts,
        memory: GuestMemory,
        ioapic: Arc<Ioapic>,
        serial: SerialPort,
        slots: Vec<MmioTransport>,
        cpuid: Vec<Vec<CpuidEntry>>,
    ) -> Result<Self, MachineError> {
        let event =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| MachineError::Kvm {
                operation: "make an eventfd",
                source,
            })?;
        let stop_event = Arc::new(event);
        let stop_reason = Arc::new(Mutex::new(None));
        let (event, reason) = (Arc::clone(&stop_event), Arc::clone(&stop_reason));
        let on_end = move |why: StopReason| {
            lock(&reason).get_or_insert(why);
            // An eventfd's counter cannot overflow by one write a vCPU.
            let _ = event.write(1);
        };
        let vsock_slot = slots
            .iter()
            .position(MmioTransport::is_vsock)
            .ok_or_else(|| MachineError::State("no vsock device".into()))?;
        let bus = Bus {
            memory,
            ioapic,
            serial: Mutex::new(serial),
            virtio: slots.into_iter().map(Mutex::new).collect(),
            vsock_slot,
        };
        let shared = Shared {
            stop: AtomicBool::new(true),
            on_end: Box::new(on_end),
            gate: Gate::default(),
            bus,
        };
        Ok(Self {
            vm: parts.vm,
            shared: Arc::new(shared),
            vcpus: Vcpus::Stopped(parts.vcpus),
            cpuid,
            msrs: host.msrs.clone(),
            stop_event,
            stop_reason,
            clock_ns: 0,
            new_generation: None,
        })
    }

    /// Lets the vCPUs run. Does nothing if they run already.
    ///
    /// # Errors
    /// If a thread cannot be made; the machine is then of no more use.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.shared.gate.open();
        self.spawn(None, &(Arc::new(|| Ok(())) as Prepare))
    }

    /// Lets the vCPUs of a machine that has run go on, each on a thread of its own, which does `prepare`
    /// first. Does nothing if they run.
    ///
    /// # Errors
    /// If it has not run yet, or a thread cannot be made; the machine is then of no more use.
    pub fn resume(&mut self, prepare: &Prepare) -> Result<(), MachineError> {
        if !self.has_begun() {
            return Err(MachineError::State("it has not run yet".into()));
        }
        self.spawn(None, prepare)
    }

    /// Whether its guest has been entered.
    pub fn has_begun(&self) -> bool {
        self.shared.gate.is_open()
    }

    /// Gives a machine that was restored a new generation id (VMGenID: the guest's kernel reseeds its
    /// generator, and tells those who listen), once. The machine may run.
    ///
    /// # Errors
    /// If the host has no random numbers, or the id's place is not in memory.
    pub fn tell_new_generation(&mut self) -> Result<(), MachineError> {
        if let Some(address) = self.new_generation.take() {
            write_guest(self.memory(), address, &fresh_generation_id()?)?;
            self.shared.bus.ioapic.pulse(EVENT_GSI);
        }
        Ok(())
    }

    /// Makes the vCPUs wait on threads of their own, each of which does `prepare` first, until
    /// there are bytes to read on `agent`, a descriptor of the agent's stream: then they run. Does
    /// nothing if they run already. When the guest gets its new generation id is its owner's choice:
    /// [`Machine::tell_new_generation`].
    ///
    /// # Errors
    /// If a thread cannot be made; the machine is then of no more use.
    pub fn park(&mut self, agent: OwnedFd, prepare: &Prepare) -> Result<(), MachineError> {
        self.spawn(Some(agent), prepare)
    }

    fn clock(&self) -> GuestClock {
        GuestClock {
            vm: Arc::clone(&self.vm),
            ns: self.clock_ns,
        }
    }

    fn spawn(&mut self, agent: Option<OwnedFd>, prepare: &Prepare) -> Result<(), MachineError> {
        let Vcpus::Stopped(stopped) = &mut self.vcpus else {
            return Ok(());
        };
        let stopped = std::mem::take(stopped);
        self.shared.stop.store(false, Ordering::Release);
        let (parked, mut agent) = (agent.is_some(), agent);
        let mut running = Vec::with_capacity(stopped.len());
        for vcpu in stopped {
            let entrance = match agent.take() {
                Some(agent) => Entrance::Doorkeeper(agent, self.clock()),
                None if parked => Entrance::Closed,
                None => Entrance::Open,
            };
            let (shared, prepare) = (Arc::clone(&self.shared), Arc::clone(prepare));
            running.push(vcpu.start(shared, entrance, prepare)?);
        }
        self.vcpus = Vcpus::Running(running);
        Ok(())
    }

    /// Stops every vCPU outside the guest and outside locks; when it returns, their threads are
    /// gone. Does nothing if they are stopped already.
    ///
    /// # Errors
    /// If a vCPU thread panicked; the machine is then of no more use.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        let Vcpus::Running(running) = &mut self.vcpus else {
            return Ok(());
        };
        let running = std::mem::take(running);
        self.shared.stop.store(true, Ordering::Release);
        if self.shared.gate.is_open() {
            running.iter().for_each(RunningVcpu::kick);
        } else {
            self.shared.gate.decide();
            running.iter().for_each(RunningVcpu::call_away);
        }
        let stopped: Result<Vec<Vcpu>, MachineError> =
            running.into_iter().map(RunningVcpu::join).collect();
        self.vcpus = Vcpus::Stopped(stopped?);
        Ok(())
    }

    /// Maps pages into a guest that does not run yet, so that touching them costs no exit: `ranges` of RAM
    /// offsets and lengths in bytes. Where the kernel cannot, each is mapped when it is touched.
    pub fn map_ahead(&self, ranges: &[(u64, u64)]) {
        let Vcpus::Stopped(vcpus) = &self.vcpus else {
            return;
        };
        if let Some(first) = vcpus.first() {
            let ranges = self.memory().guest_ranges(ranges);
            // Nothing is lost but the faults' time.
            let _ = prefault::map(&first.fd, &ranges);
        }
    }

    /// KVM's counters of a machine that does not run yet.
    ///
    /// # Errors
    /// If it runs, or the kernel has none (before Linux 5.14).
    pub fn statistics(&self) -> Result<Statistics, MachineError> {
        let Vcpus::Stopped(vcpus) = &self.vcpus else {
            return Err(MachineError::State(
                "it must not run when its counters are opened".into(),
            ));
        };
        let vcpus = vcpus.iter().map(|vcpu| vcpu.fd.as_raw_fd());
        let descriptors: Vec<_> = vcpus.chain([self.vm.as_raw_fd()]).collect();
        Statistics::open(&descriptors).map_err(|source| MachineError::Kvm {
            operation: "open KVM's counters",
            source,
        })
    }

    /// The state of a paused machine.
    ///
    /// # Errors
    /// If the machine runs, KVM refuses, or a device is in a state that cannot be saved.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        self.save_devices(MmioTransport::save)
    }

    /// The same of a paused machine that goes on: what is on the way between its agent and the host stays
    /// its own. Who restores it has to give it another stream, by [`Machine::replace_agent`], before it
    /// runs.
    ///
    /// # Errors
    /// If the machine runs, or KVM refuses.
    pub fn save_branch(&self) -> Result<MachineState, MachineError> {
        self.save_devices(MmioTransport::save_branch)
    }

    fn save_devices(&self, save: SaveDevice) -> Result<MachineState, MachineError> {
        let Vcpus::Stopped(vcpus) = &self.vcpus else {
            return Err(MachineError::State("it must be paused to be saved".into()));
        };
        let clock = kvm("read the guest's clock", self.vm.get_clock())?;
        let mut saved = Vec::with_capacity(vcpus.len());
        for (vcpu, cpuid) in vcpus.iter().zip(&self.cpuid) {
            saved.push(vcpu_state::save(vcpu, cpuid.clone(), &self.msrs)?);
        }
        vcpu_state::settle_clocks(&mut saved);
        let bus = &self.shared.bus;
        let mut devices = Vec::with_capacity(bus.virtio.len());
        for slot in &bus.virtio {
            devices.push(save(&lock(slot)).map_err(MachineError::State)?);
        }
        Ok(MachineState {
            vcpus: saved,
            clock: ClockState {
                clock_ns: clock.clock,
            },
            ioapic: bus.ioapic.save(),
            serial: save_serial(&lock(&bus.serial)),
            devices,
            generation_id_address: GENERATION_ID,
        })
    }

    /// The paused guest's memory: `(RAM offset, bytes)` of each region, in ascending order.
    ///
    /// # Errors
    /// If the machine runs.
    pub fn paused_memory(&self) -> Result<Vec<(u64, &[u8])>, MachineError> {
        let Vcpus::Stopped(_) = &self.vcpus else {
            return Err(MachineError::State("it must be paused to be read".into()));
        };
        let ranges = self.shared.bus.memory.host_ranges().into_iter();
        // SAFETY: mapped for as long as the machine lives; nobody writes it while the vCPUs are
        // stopped, and starting them needs `&mut self`.
        let slice = |host, length| unsafe { std::slice::from_raw_parts(host, length) };
        Ok(ranges
            .map(|(offset, host, length)| (offset, slice(host, length)))
            .collect())
    }

    /// The guest's memory; stable only while paused.
    pub fn memory(&self) -> &GuestMemory {
        &self.shared.bus.memory
    }

    /// Call at each edge of the agent's stream (epoll with EPOLLIN, EPOLLOUT and EPOLLET: vCPU
    /// threads move bytes as well, so readiness that they have used up must not wake anyone):
    /// moves bytes both ways as far as they go. False once an end of the stream is closed. While
    /// the machine is parked it leaves them to the vCPU that lets the others in.
    pub fn agent_ready(&mut self) -> bool {
        !self.shared.gate.is_open() || self.shared.bus.stream_ready()
    }

    /// Gives the agent of a machine that runs another stream, which must be non-blocking, in place of the
    /// one it had: each end begins anew. Call [`Machine::agent_ready`] then, and at its edges.
    pub fn replace_agent(&mut self, agent: OwnedFd) {
        self.shared.bus.replace_stream(agent);
    }

    /// Readable once the machine has stopped by itself.
    pub fn stop_event(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor belongs to `self.stop_event`, which lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.stop_event.as_raw_fd()) }
    }

    /// Why it stopped, once `stop_event` is readable.
    pub fn stop_reason(&self) -> Option<StopReason> {
        lock(&self.stop_reason).clone()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Threads must not outlive the memory that they run on.
        let _ = self.pause();
    }
}

impl Parts {
    fn create(host: &Host, memory: &GuestMemory, vcpus: u8) -> Result<Self, MachineError> {
        let vm = create_vm(&host.kvm)?;
        kvm("set the TSS address", vm.set_tss_address(KVM_TSS))?;
        split_irqchip(&vm)?;
        for (slot, region) in memory.kvm_regions().into_iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                ..region
            };
            kvm("map guest memory", set_region(&vm, region))?;
        }
        let mut created = Vec::with_capacity(usize::from(vcpus));
        for index in 0..vcpus {
            let fd = kvm("make a vCPU", vm.create_vcpu(u64::from(index)))?;
            created.push(Vcpu { index, fd });
        }
        Ok(Self {
            vm: Arc::new(vm),
            vcpus: created,
        })
    }
}

/// A signal that comes meanwhile, of a child's end say, ends that call.
pub(crate) fn create_vm(host: &Kvm) -> Result<VmFd, MachineError> {
    loop {
        match host.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return kvm("make a VM", made),
        }
    }
}

pub(crate) fn split_irqchip(vm: &VmFd) -> Result<(), MachineError> {
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = IOAPIC_PINS as u64;
    kvm(
        "keep the IOAPIC in user space (KVM_CAP_SPLIT_IRQCHIP)",
        vm.enable_cap(&split),
    )
}

/// Gives a VM a range of [`GuestMemory`]. The caller keeps that memory for as long as the VM's
/// vCPUs run (`Bus` owns a machine's; `Drop` joins the threads first).
pub(crate) fn set_region(
    vm: &VmFd,
    region: kvm_userspace_memory_region,
) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the range comes from a mapping of guest memory, which the caller keeps.
    unsafe { vm.set_user_memory_region(region) }
}

fn prepare_boot_vcpu(vcpu: &Vcpu, entry: boot::Entry) -> Result<(), MachineError> {
    let mut sregs = kvm("read special registers", vcpu.fd.get_sregs())?;
    boot::set_long_mode(&mut sregs);
    kvm("set special registers", vcpu.fd.set_sregs(&sregs))?;
    kvm(
        "set registers",
        vcpu.fd.set_regs(&boot::entry_registers(entry)),
    )
}

fn write_guest(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), MachineError> {
    memory
        .map_ref()
        .write_slice(bytes, GuestAddress(address))
        .map_err(|e| MachineError::State(format!("{} bytes at {address:#x}: {e}", bytes.len())))
}

fn fresh_generation_id() -> Result<[u8; 16], MachineError> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).map_err(|e| {
        MachineError::Kvm {
            operation: "draw a generation id",
            source: e.into(),
        }
    })?;
    Ok(id)
}

fn save_serial(serial: &SerialPort) -> SerialState {
    let state = serial.state();
    SerialState {
        baud_divisor_low: state.baud_divisor_low,
        baud_divisor_high: state.baud_divisor_high,
        interrupt_enable: state.interrupt_enable,
        interrupt_identification: state.interrupt_identification,
        line_control: state.line_control,
        line_status: state.line_status,
        modem_control: state.modem_control,
        modem_status: state.modem_status,
        scratch: state.scratch,
        in_buffer: state.in_buffer,
    }
}

fn restore_serial(
    state: &SerialState,
    ioapic: &Arc<Ioapic>,
    output: Box<dyn Write + Send>,
) -> Result<SerialPort, MachineError> {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    } = state.clone();
    let state = vm_superio::SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    };
    let pin = Pin::new(Arc::clone(ioapic), SERIAL_GSI);
    Serial::from_state(&state, pin, NoEvents, output)
        .map_err(|e| MachineError::State(format!("serial port: {e:?}")))
}
