//! MMIO and PIO of any address and width. Needs /dev/kvm.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zygote_vmm::fuzzing::Machine;

thread_local! {
    static MACHINE: Option<Machine> = Machine::new().ok();
}

fuzz_target!(|script: &[u8]| {
    MACHINE.with(|machine| {
        if let Some(machine) = machine {
            machine.run(script);
        }
    });
});
