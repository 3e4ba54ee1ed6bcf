//! The IOAPIC (Intel 82093AA), in user space: KVM's split irqchip keeps only the LAPICs.
//!
//! A pin that is raised becomes one MSI to the LAPICs. Every pin of this machine is edge-triggered
//! (the DSDT says so), so there is no end-of-interrupt to wait for; an entry that a guest sets to
//! level is delivered as an edge. An edge on a masked pin is kept and delivered when unmasked.

use crate::layout::IOAPIC_PINS;
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zygote_snapshot::state::IoapicState;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;
const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_REDIRECTION: u8 = 0x10;
/// Version 0x11: no EOI register; bits 16 to 23: highest redirection entry.
const VERSION: u32 = 0x11 | ((IOAPIC_PINS as u32 - 1) << 16);
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are the hardware's.
const READ_ONLY_BITS: u64 = (1 << 12) | (1 << 14);
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// The interrupt controller that devices raise their pins on. Any thread may call it.
pub struct Ioapic {
    vm: Arc<VmFd>,
    registers: Mutex<IoapicState>,
}

impl Ioapic {
    /// As after reset: every pin masked.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let registers = IoapicState {
            id: 0,
            select: 0,
            redirections: vec![MASKED; IOAPIC_PINS],
            pending: 0,
        };
        Self {
            vm,
            registers: Mutex::new(registers),
        }
    }

    /// As it was saved.
    ///
    /// # Errors
    /// A sentence, if the state has another number of pins.
    pub fn restore(vm: Arc<VmFd>, state: &IoapicState) -> Result<Self, String> {
        if state.redirections.len() != IOAPIC_PINS {
            return Err(format!(
                "the IOAPIC has {} pins, not 24",
                state.redirections.len()
            ));
        }
        Ok(Self {
            vm,
            registers: Mutex::new(state.clone()),
        })
    }

    /// What to persist.
    pub fn save(&self) -> IoapicState {
        self.lock().clone()
    }

    /// Raises an edge on a pin.
    pub fn pulse(&self, pin: u32) {
        let mut registers = self.lock();
        let Some(&entry) = registers.redirections.get(pin as usize) else {
            return;
        };
        if entry & MASKED != 0 {
            registers.pending |= 1 << pin;
        } else {
            drop(registers);
            self.deliver(entry);
        }
    }

    /// A guest read of the register window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let value = match offset {
            REGISTER_SELECT => u32::from(registers.select),
            REGISTER_WINDOW => read_indexed(&registers),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (to, from) in data
            .iter_mut()
            .zip(bytes.into_iter().chain(std::iter::repeat(0)))
        {
            *to = from;
        }
    }

    /// A guest write to the register window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Some(bytes) = data.first_chunk::<4>() else {
            return;
        };
        let value = u32::from_le_bytes(*bytes);
        match offset {
            REGISTER_SELECT => self.lock().select = value as u8,
            REGISTER_WINDOW => self.write_indexed(value),
            _ => {}
        }
    }

    fn write_indexed(&self, value: u32) {
        let mut registers = self.lock();
        match registers.select {
            INDEX_ID => registers.id = ((value >> 24) & 0xf) as u8,
            index => {
                let Some((pin, high)) = redirection_of(index) else {
                    return;
                };
                let entry = &mut registers.redirections[pin];
                *entry = if high {
                    (*entry & 0xffff_ffff) | (u64::from(value) << 32)
                } else {
                    (*entry & (!0xffff_ffff | READ_ONLY_BITS))
                        | (u64::from(value) & !READ_ONLY_BITS)
                };
                let entry = *entry;
                if entry & MASKED == 0 && registers.pending & (1 << pin) != 0 {
                    registers.pending &= !(1 << pin);
                    drop(registers);
                    self.deliver(entry);
                }
            }
        }
    }

    fn deliver(&self, entry: u64) {
        // Entry to MSI, as in Intel SDM vol. 3 §11.11: vector and delivery mode go into the data,
        // destination and its mode into the address.
        let message = kvm_msi {
            address_lo: MSI_ADDRESS
                | ((((entry >> 56) & 0xff) as u32) << 12)
                | ((((entry >> 11) & 1) as u32) << 2),
            data: (entry & 0x7ff) as u32,
            ..Default::default()
        };
        // A guest can program a vector or destination that nobody takes: the interrupt is lost, as
        // on hardware.
        let _ = self.vm.signal_msi(message);
    }

    fn lock(&self) -> MutexGuard<'_, IoapicState> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn redirection_of(index: u8) -> Option<(usize, bool)> {
    let relative = usize::from(index.checked_sub(INDEX_REDIRECTION)?);
    (relative / 2 < IOAPIC_PINS).then_some((relative / 2, relative % 2 == 1))
}

fn read_indexed(registers: &IoapicState) -> u32 {
    match registers.select {
        INDEX_ID | INDEX_ARBITRATION => u32::from(registers.id) << 24,
        INDEX_VERSION => VERSION,
        index => match redirection_of(index) {
            Some((pin, true)) => (registers.redirections[pin] >> 32) as u32,
            Some((pin, false)) => registers.redirections[pin] as u32,
            None => 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> IoapicState {
        IoapicState {
            id: 3,
            select: 0,
            redirections: vec![MASKED; IOAPIC_PINS],
            pending: 0,
        }
    }

    #[test]
    fn an_index_past_the_last_pin_reads_as_zero() {
        let mut state = registers();
        state.select = INDEX_REDIRECTION + 2 * IOAPIC_PINS as u8;
        assert_eq!(read_indexed(&state), 0);
        state.select -= 1;
        assert_eq!(redirection_of(state.select), Some((IOAPIC_PINS - 1, true)));
    }

    #[test]
    fn the_version_tells_the_number_of_pins() {
        let mut state = registers();
        state.select = INDEX_VERSION;
        assert_eq!(read_indexed(&state), 0x0017_0011);
    }
}
