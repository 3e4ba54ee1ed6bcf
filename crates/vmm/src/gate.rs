//! What keeps the vCPUs of a parked machine out of its guest: they have threads and wait at the
//! gate, so that letting them in costs one wake-up and no making of threads.

use crate::bus::lock;
use crate::vcpu::Shared;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// What a vCPU does on its thread before it enters the guest for the first time.
pub enum Entrance {
    /// Nothing.
    Open,
    /// Waits until the agent has something to hear, then lets the others in.
    Doorkeeper(OwnedFd, GuestClock),
    /// Waits for the doorkeeper.
    Closed,
}

/// The guest's clock, and what it says in the snapshot. While nobody needs the machine it stands still:
/// a guest that wakes up late would first do all that it should have done meanwhile.
pub struct GuestClock {
    /// Whose clock.
    pub vm: Arc<VmFd>,
    /// Nanoseconds since the guest's boot.
    pub ns: u64,
}

impl GuestClock {
    fn set(&self) {
        let data = kvm_clock_data {
            clock: self.ns,
            ..Default::default()
        };
        // It has been set to this already; should it not be again, it goes on from there.
        let _ = self.vm.set_clock(&data);
    }
}

/// Whether the guest has been entered, or will never be.
#[derive(Default)]
pub struct Gate {
    entered: AtomicBool,
    decided: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// Whether the guest has been entered.
    pub fn is_open(&self) -> bool {
        self.entered.load(Ordering::Acquire)
    }

    /// Lets the vCPUs in.
    pub fn open(&self) {
        self.entered.store(true, Ordering::Release);
        self.decide();
    }

    /// Ends the waiting; whoever waited looks for himself what has become of the machine.
    pub fn decide(&self) {
        *lock(&self.decided) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let decided = lock(&self.decided);
        let undecided = |decided: &mut bool| !*decided;
        drop(
            self.changed
                .wait_while(decided, undecided)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

impl Shared {
    /// Returns when the vCPU may look whether to run.
    pub fn pass(&self, entrance: Entrance) {
        match entrance {
            Entrance::Open => {}
            Entrance::Closed => self.gate.wait(),
            Entrance::Doorkeeper(agent, clock) => self.keep_door(&agent, &clock),
        }
    }

    /// Gives the agent its first bytes on the way in: the guest's first interrupt is then already
    /// the one that it waits for.
    fn keep_door(&self, agent: &OwnedFd, clock: &GuestClock) {
        loop {
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let mut fds = [PollFd::new(agent, PollFlags::IN)];
            // Parked for as long as nobody needs it: a kick, or the stream's end, interrupts it.
            let _ = poll(&mut fds, None);
            let seen = fds[0].revents();
            if seen.contains(PollFlags::IN) {
                break;
            }
            if !seen.is_empty() {
                // The other end is gone without a word; the machine's owner will notice.
                self.stop.store(true, Ordering::Release);
                self.gate.decide();
                return;
            }
        }
        clock.set();
        self.gate.open();
        self.bus.stream_ready();
    }
}
