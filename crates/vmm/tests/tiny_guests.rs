//! Whole machines with guests of a few instructions: any host whose /dev/kvm opens runs them, also
//! one that emulates kernel mode.

#![allow(clippy::unwrap_used, unsafe_code, reason = "a test")]

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use zygote_vmm::{BootConfig, GuestMemory, Host, Machine, MachineError, StopReason};

/// Where the guest's program is loaded and begins.
const START: u64 = 0x100_0000;
/// A word that a guest counts in.
const COUNTER: u64 = 0x200_0000;
/// No guest here needs longer, on any host.
const PATIENCE: Duration = Duration::from_secs(60);

const SERIAL_PORT: u16 = 0x3f8;

/// mov al, VALUE; mov dx, 0x3f8; out dx, al
fn print(value: u8) -> Vec<u8> {
    let [low, high] = SERIAL_PORT.to_le_bytes();
    vec![0xb0, value, 0x66, 0xba, low, high, 0xee]
}

/// mov al, 0xfe; out 0x64, al: a reset by the keyboard controller. Then hlt for ever.
const RESET: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// mov rax, VALUE; mov [ADDRESS], rax
fn store(address: u64, value: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend_from_slice(&value.to_le_bytes());
    code.extend_from_slice(&[0x48, 0xa3]);
    code.extend_from_slice(&address.to_le_bytes());
    code
}

/// An ELF kernel (System V ABI, chapters 4 and 5) with one segment.
fn elf(code: &[u8]) -> File {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2_u16, 62] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&1_u32.to_le_bytes());
    for word in [START, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    for word in [1_u32, 7] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    let length = code.len() as u64;
    for word in [120, START, START, length, length, 0x1000] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    assert_eq!(file.len(), 120);
    file.extend_from_slice(code);
    content(&file)
}

fn content(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn agent() -> std::os::fd::OwnedFd {
    UnixStream::pair().unwrap().0.into()
}

fn boot(kernel: File, memory_bytes: u64, vcpus: u8) -> Result<(Machine, Screen), MachineError> {
    let screen = Screen::default();
    let config = BootConfig {
        memory_bytes,
        vcpus,
        kernel,
        initramfs: content(b"initramfs"),
        command_line: "quiet".into(),
        disks: vec![],
    };
    let machine = Machine::boot(config, agent(), Box::new(screen.clone()))?;
    Ok((machine, screen))
}

fn wait_for_end(machine: &Machine) -> StopReason {
    let event = machine.stop_event();
    let mut fds = [rustix::event::PollFd::new(
        &event,
        rustix::event::PollFlags::IN,
    )];
    let patience = rustix::time::Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    assert_eq!(rustix::event::poll(&mut fds, Some(&patience)).unwrap(), 1);
    machine.stop_reason().unwrap()
}

#[test]
fn a_guest_prints_and_resets_with_any_number_of_vcpus() {
    for vcpus in [1, 2, 32] {
        let code = [print(b'o'), print(b'k'), RESET.to_vec()].concat();
        let (mut machine, screen) = boot(elf(&code), 128 << 20, vcpus).unwrap();
        machine.start().unwrap();
        assert_eq!(wait_for_end(&machine), StopReason::GuestReset);
        machine.pause().unwrap();
        assert_eq!(screen.0.lock().unwrap().as_slice(), b"ok");
    }
}

#[test]
fn memory_beyond_the_hole_is_there() {
    let high = 1_u64 << 32;
    let (directory, pdpt) = (0x20_0000_u64, 0xa000_u64);
    for bytes in [4_u64 << 30, 16 << 30] {
        let mut code = store(pdpt + 4 * 8, directory | 3);
        code.extend(store(directory, high | 0x83));
        code.extend(store(high + 0x1000, u64::from(b'H')));
        code.extend([0xa0]); // mov al, [high + 0x1000]
        code.extend((high + 0x1000).to_le_bytes());
        code.extend(&print(0)[2..]);
        code.extend(RESET);
        let (mut machine, screen) = boot(elf(&code), bytes, 1).unwrap();
        machine.start().unwrap();
        assert_eq!(wait_for_end(&machine), StopReason::GuestReset);
        machine.pause().unwrap();
        assert_eq!(screen.0.lock().unwrap().as_slice(), b"H");
        // What the guest wrote at 4 GiB lies in the file where the memory below the hole ends.
        let ranges = machine.paused_memory().unwrap();
        let (offset, range) = ranges[1];
        assert_eq!((offset, range[0x1000]), (3 << 30, b'H'));
    }
}

#[test]
fn sizes_and_numbers_beyond_the_limits_are_refused() {
    let refused = |bytes, vcpus| boot(elf(&RESET), bytes, vcpus).is_err();
    assert!(refused((128 << 20) - 4096, 1) && refused((16 << 30) + 4096, 1));
    assert!(refused((128 << 20) + 1, 1));
    assert!(refused(128 << 20, 0) && refused(128 << 20, 33));
    assert!(!refused(128 << 20, 1));
}

#[test]
fn a_kernel_that_is_none_is_refused_by_a_sentence() {
    for bytes in [&b""[..], b"\x7fELF", b"MZ nonsense", &[0; 4096]] {
        let error = boot(content(bytes), 128 << 20, 1).err().unwrap();
        assert!(error.to_string().contains("kernel"), "{error}");
    }
}

#[test]
fn a_guest_that_cannot_go_on_is_a_crash_and_not_a_hang() {
    // ud2 without an interrupt table: a triple fault.
    let (mut machine, _) = boot(elf(&[0x0f, 0x0b]), 128 << 20, 1).unwrap();
    machine.start().unwrap();
    let reason = wait_for_end(&machine);
    assert!(
        matches!(reason, StopReason::GuestReset | StopReason::GuestCrash(_)),
        "{reason:?}"
    );
}

/// inc qword [COUNTER]; jmp back
fn counting() -> Vec<u8> {
    let mut code = vec![0x48, 0xff, 0x04, 0x25];
    code.extend_from_slice(&(COUNTER as u32).to_le_bytes());
    code.extend_from_slice(&[0xeb, 0xf6]);
    code
}

fn count(machine: &Machine) -> u64 {
    let map = machine.memory().map_ref();
    map.read_obj(GuestAddress(COUNTER)).unwrap()
}

fn wait_for_count(machine: &Machine, more_than: u64) {
    let start = Instant::now();
    while count(machine) <= more_than {
        assert!(start.elapsed() < PATIENCE, "stuck at {}", count(machine));
        std::thread::yield_now();
    }
}

#[test]
fn forks_of_a_paused_machine_go_on_from_the_same_instruction_and_apart() {
    let (mut machine, _) = boot(elf(&counting()), 128 << 20, 2).unwrap();
    machine.start().unwrap();
    wait_for_count(&machine, 1000);
    machine.pause().unwrap();
    let (state, at) = (machine.save().unwrap(), count(&machine));
    for vcpu in &state.vcpus {
        let tsc = vcpu.msrs.iter().find(|msr| msr.index == 0x10).unwrap();
        let second = u64::from(vcpu.tsc_khz) * 1000;
        assert!(
            tsc.value > 10 * second,
            "older kernels would not restore it"
        );
    }
    let file = tempfile::tempfile().unwrap();
    for (offset, bytes) in machine.paused_memory().unwrap() {
        file.write_all_at(bytes, offset).unwrap();
    }
    let mut forks = Vec::new();
    for _ in 0..3 {
        let memory = GuestMemory::private(&file, 128 << 20).unwrap();
        let sink = Box::new(std::io::sink());
        let fork = Machine::restore(
            &Host::open().unwrap(),
            &state,
            memory,
            vec![],
            agent(),
            sink,
        )
        .unwrap();
        assert_eq!(count(&fork), at);
        forks.push(fork);
    }
    forks[1].start().unwrap();
    wait_for_count(&forks[1], at + 1000);
    forks[1].pause().unwrap();
    assert_eq!((count(&forks[0]), count(&machine)), (at, at));
    machine.start().unwrap();
    wait_for_count(&machine, at + 10);
    machine.pause().unwrap();
    assert_eq!(count(&forks[2]), at);
    for _ in 0..20 {
        forks[2].start().unwrap();
        let now = count(&forks[2]);
        wait_for_count(&forks[2], now);
        forks[2].pause().unwrap();
    }
}

#[test]
fn a_stray_kick_stops_nobody() {
    let (mut machine, _) = boot(elf(&counting()), 128 << 20, 1).unwrap();
    machine.start().unwrap();
    for _ in 0..20 {
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if name.starts_with("vcpu") {
                let id: i64 = task.file_name().to_string_lossy().parse().unwrap();
                let (process, signal) = (std::process::id(), vmm_sys_util::signal::SIGRTMIN());
                // SAFETY: signals a thread of this process, which has a handler for it.
                unsafe { libc::syscall(libc::SYS_tgkill, process, id, signal) };
            }
        }
        let now = count(&machine);
        wait_for_count(&machine, now + 10);
    }
    machine.pause().unwrap();
}

#[test]
fn a_running_machine_can_be_neither_saved_nor_read() {
    let (mut machine, _) = boot(elf(&counting()), 128 << 20, 1).unwrap();
    machine.start().unwrap();
    assert!(machine.save().is_err() && machine.paused_memory().is_err());
    machine.pause().unwrap();
    assert!(machine.save().is_ok() && machine.paused_memory().is_ok());
}
