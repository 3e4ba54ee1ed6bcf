//! System calls that are left (seccomp(2)). Whatever is not listed kills the process.
//!
//! A filter costs its process about 1.4 microseconds an instruction when the calls are compared one
//! after the other, because the kernel tries every call number on it (seccomp_cache_prepare). So
//! the whole list is in one filter that a zygote process has and its runners inherit; what runners
//! and vCPUs must not do is taken away by small ones on top; and all halve their list at each
//! comparison, which makes KVM_RUN itself cheaper, too.

#![expect(unsafe_code, reason = "seccomp, prctl")]

use libc::{sock_filter, sock_fprog};
use std::io;

/// `AUDIT_ARCH_X86_64` of Linux `include/uapi/linux/audit.h`.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// Most calls that are compared one after the other.
const ROW_MAX: usize = 3;
/// Farthest that a conditional jump reaches.
const JUMP_MAX: usize = 255;
/// `_IOC_TYPE` of every KVM request (Documentation/virt/kvm/api.rst), in its place.
const KVM_TYPE: u32 = 0xae << 8;
const TYPE_MASK: u32 = 0xff << 8;

/// KVM's requests (Documentation/virt/kvm/api.rst) of machines that are made.
const KVM_RUN: u32 = 0xae80;
const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_CLOCK: u32 = 0x4030_ae7b;
/// Stands for the id of the process until that is known. No process has it.
const THIS_PROCESS: u32 = u32::MAX;

/// When a call on the list is allowed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    Never,
    /// When this argument's low word, masked, is one of these.
    Argument(u32, u32, &'static [u32]),
    /// Never, but the caller is told that there is no such call: the C library then uses another.
    Absent,
}

use When::{Absent, Always, Never};
/// ioctl(2) for KVM only.
const OF_KVM: When = When::Argument(1, TYPE_MASK, &[KVM_TYPE]);
/// ioctl(2) that raises an interrupt in the guest.
const OF_AN_INTERRUPT: When = When::Argument(1, u32::MAX, &[KVM_SIGNAL_MSI]);
/// ioctl(2) that runs a vCPU, raises an interrupt, tells where the guest has crashed, or sets its clock.
const OF_A_VCPU: When = When::Argument(
    1,
    u32::MAX,
    &[KVM_RUN, KVM_SIGNAL_MSI, KVM_GET_REGS, KVM_SET_CLOCK],
);
/// tgkill(2) within the process: siblings have the same user, and are in the same namespace.
const OF_THIS_PROCESS: When = When::Argument(0, u32::MAX, &[THIS_PROCESS]);
/// Memory that is not executable.
const NOT_EXECUTABLE: When = When::Argument(2, libc::PROT_EXEC as u32, &[0]);
/// fcntl(2) that duplicates a descriptor, or asks whether it is one.
const OF_A_DESCRIPTOR: When = When::Argument(
    1,
    u32::MAX,
    &[libc::F_DUPFD_CLOEXEC as u32, libc::F_GETFD as u32],
);
/// prctl(2) that names a thread.
const OF_A_NAME: When = When::Argument(0, u32::MAX, &[libc::PR_SET_NAME as u32]);
/// prctl(2) that names a thread, or gives up more.
const OF_A_NAME_OR_LESS: When = When::Argument(
    0,
    u32::MAX,
    &[
        libc::PR_SET_NAME as u32,
        libc::PR_SET_NO_NEW_PRIVS as u32,
        libc::PR_SET_PDEATHSIG as u32,
    ],
);
/// prlimit(2) that asks: the new limit's address is null.
const THAT_ASKS: When = When::Argument(2, u32::MAX, &[0]);

/// A call's number, and when it is allowed.
type Rule = (i64, When);
/// The same with the reason.
type Call = (i64, When, &'static str);

/// What every process of ours needs.
const EVERYBODY: &[Call] = &[
    (libc::SYS_read, Always, "eventfds, signals, agent's stream"),
    (libc::SYS_write, Always, "eventfds, agent's stream"),
    (libc::SYS_futex, Always, "locks"),
    (libc::SYS_close, Always, "gives up descriptors"),
    (libc::SYS_mmap, NOT_EXECUTABLE, "allocator"),
    (libc::SYS_mprotect, NOT_EXECUTABLE, "allocator"),
    (libc::SYS_munmap, Always, "allocator"),
    (libc::SYS_mremap, Always, "allocator"),
    (libc::SYS_madvise, Always, "allocator"),
    (libc::SYS_brk, Always, "allocator"),
    (libc::SYS_getrandom, Always, "entropy device, allocator"),
    (
        libc::SYS_clock_gettime,
        Always,
        "clock register, where the vDSO cannot",
    ),
    (
        libc::SYS_rt_sigprocmask,
        Always,
        "start and end of a thread",
    ),
    (libc::SYS_rt_sigreturn, Always, "end of a kick"),
    (libc::SYS_sigaltstack, Always, "start and end of a thread"),
    (libc::SYS_getpid, Always, "own id, for tgkill"),
    (
        libc::SYS_fcntl,
        OF_A_DESCRIPTOR,
        "duplicates descriptors, and debug builds check them",
    ),
    (libc::SYS_gettid, Always, "own thread's id, for tgkill"),
    (libc::SYS_tgkill, OF_THIS_PROCESS, "kicks vCPUs, abort"),
    (libc::SYS_clone3, Absent, "its flags are out of sight"),
    (libc::SYS_exit, Always, "end of a thread"),
    (libc::SYS_exit_group, Always, "end"),
];

/// A process that holds a snapshot and makes runners, up to the moment when a runner has made its
/// machine; besides what those may. It has heard no guest, unless it is a live sandbox's, which keeps this list
/// to be branched, or holds a branch.
const ZYGOTE: &[Call] = &[
    (libc::SYS_ioctl, OF_KVM, "makes machines"),
    (libc::SYS_tgkill, Always, "abort; each runner's is its own"),
    (libc::SYS_clone, Always, "forks runners; their vCPU threads"),
    (libc::SYS_wait4, Always, "reaps runners"),
    (
        libc::SYS_kill,
        Always,
        "ends runners; sees its own namespace only",
    ),
    (libc::SYS_pidfd_open, Always, "hands runners to the engine"),
    (libc::SYS_setresuid, Always, "a runner's own user"),
    (libc::SYS_setresgid, Always, "a runner's own user"),
    (libc::SYS_capset, Always, "a runner keeps no capability"),
    (
        libc::SYS_close_range,
        Always,
        "a runner gives up its parent's",
    ),
    (libc::SYS_prctl, OF_A_NAME_OR_LESS, "names, filters"),
    (
        libc::SYS_seccomp,
        Always,
        "the runner's filters, on top of this",
    ),
    (
        libc::SYS_prlimit64,
        THAT_ASKS,
        "asks for the size of stacks",
    ),
    (libc::SYS_eventfd2, Always, "a machine's end"),
    (libc::SYS_epoll_create1, Always, "what a runner waits with"),
    (
        libc::SYS_rt_sigaction,
        Always,
        "the C library's own, at the first thread",
    ),
    (libc::SYS_set_robust_list, Always, "start of a thread"),
    (libc::SYS_rseq, Always, "start of a thread"),
    (
        libc::SYS_sched_getaffinity,
        Always,
        "allocator: how many arenas",
    ),
];

/// A runner's main thread once its machine is made.
const RUNNER: &[Call] = &[
    (libc::SYS_ioctl, OF_AN_INTERRUPT, "the agent's stream"),
    (libc::SYS_readv, Always, "agent's stream into guest memory"),
    (libc::SYS_writev, Always, "agent's stream from guest memory"),
    (
        libc::SYS_shutdown,
        Always,
        "agent's stream, when the guest ends it",
    ),
    (libc::SYS_sendmsg, Always, "last words to the engine"),
    (libc::SYS_recvmsg, Always, "the engine's end"),
    (libc::SYS_epoll_wait, Always, "waits"),
    (libc::SYS_epoll_pwait, Always, "waits"),
    (libc::SYS_epoll_ctl, Always, "a stream that has ended"),
];

/// A vCPU's thread.
const VCPU: &[Call] = &[
    (libc::SYS_ioctl, OF_A_VCPU, "runs the vCPU and its devices"),
    (libc::SYS_poll, Always, "parked: waits for activation"),
    (libc::SYS_ppoll, Always, "parked: waits for activation"),
    (libc::SYS_readv, Always, "agent's stream into guest memory"),
    (libc::SYS_writev, Always, "agent's stream from guest memory"),
    (
        libc::SYS_shutdown,
        Always,
        "agent's stream, when the guest ends it",
    ),
    (libc::SYS_pread64, Always, "disk image"),
    (libc::SYS_preadv, Always, "disk image into guest memory"),
    (libc::SYS_prctl, OF_A_NAME, "its name"),
];

/// Whose calls a filter lets through. The kernel asks all filters that a thread has, and the
/// strictest answer stands: those of runners and vCPUs are made for threads that have their
/// zygote's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A process that holds a snapshot and makes runners.
    Zygote,
    /// The main thread of a runner whose machine is made.
    Runner,
    /// A vCPU's thread.
    Vcpu,
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
#[error("cannot install the filter of system calls")]
pub struct FilterError(#[source] io::Error);

/// A role's compiled filter. Made once; each thread of the role installs it.
#[derive(Clone, Debug)]
pub struct Filter(Vec<sock_filter>);

impl Filter {
    /// Compiles a role's list.
    pub fn new(role: Role) -> Self {
        let (rules, others) = match role {
            Role::Zygote => (calls(role), libc::SECCOMP_RET_KILL_PROCESS),
            Role::Runner | Role::Vcpu => (taken_away(role), libc::SECCOMP_RET_ALLOW),
        };
        let mut program = vec![
            load(ARCHITECTURE),
            jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
            answer(libc::SECCOMP_RET_KILL_PROCESS),
            load(NUMBER),
        ];
        program.extend(choose(&rules, others));
        Self(program)
    }

    /// The same for a process by its id: what it may do to itself only.
    pub fn for_process(&self, id: u32) -> Self {
        let mut program = self.0.clone();
        for instruction in &mut program {
            let is_comparison = instruction.code == (libc::BPF_JMP | libc::BPF_JEQ) as u16;
            if is_comparison && instruction.k == THIS_PROCESS {
                instruction.k = id;
            }
        }
        Self(program)
    }

    /// For this thread and those that it starts. Cannot be undone. Needs no_new_privs, which
    /// [`crate::enter`] sets.
    ///
    /// # Errors
    /// If the kernel has no seccomp.
    pub fn install(&self) -> Result<(), FilterError> {
        let program = sock_fprog {
            len: self.0.len() as u16,
            filter: self.0.as_ptr().cast_mut(),
        };
        let (mode, no_flags) = (libc::SECCOMP_SET_MODE_FILTER, 0_u32);
        // SAFETY: the kernel copies the program, which lives until the call returns.
        let result =
            unsafe { libc::syscall(libc::SYS_seccomp, mode, no_flags, &raw const program) };
        if result < 0 {
            return Err(FilterError(io::Error::last_os_error()));
        }
        Ok(())
    }
}

/// A role's list, in the order of the numbers.
fn calls(role: Role) -> Vec<Rule> {
    let own: &[&[Call]] = match role {
        Role::Zygote => &[ZYGOTE, RUNNER, VCPU],
        Role::Runner => &[RUNNER],
        Role::Vcpu => &[VCPU],
    };
    let own = own.iter().copied().flatten().chain(EVERYBODY);
    let mut calls: Vec<Rule> = own.map(|&(number, when, _)| (number, when)).collect();
    // Stable: of two rules for a call the first stands.
    calls.sort_by_key(|(number, _)| *number);
    calls.dedup_by_key(|(number, _)| *number);
    calls
}

/// What a role must not do of what its zygote may.
fn taken_away(role: Role) -> Vec<Rule> {
    let kept = calls(role);
    let rule = |(number, zygotes): Rule| match kept.iter().find(|call| call.0 == number) {
        None => Some((number, Never)),
        Some((_, own)) if *own != zygotes => Some((number, *own)),
        Some(_) => None,
    };
    calls(Role::Zygote).into_iter().filter_map(rule).collect()
}

/// Binary search for the number in the accumulator, ending in an answer.
fn choose(rules: &[Rule], others: u32) -> Vec<sock_filter> {
    let (below, above) = match rules {
        [] => return vec![answer(others)],
        [(_, first), ..]
            if rules.len() <= ROW_MAX && rules.iter().all(|(_, when)| when == first) =>
        {
            return row(rules, *first, others);
        }
        _ => rules.split_at(rules.len() / 2),
    };
    let (first_above, lower) = (above[0].0 as u32, choose(below, others));
    let mut program = if lower.len() > JUMP_MAX {
        let far = instruction(libc::BPF_JMP | libc::BPF_JA, lower.len() as u32, 0, 0);
        vec![jump(libc::BPF_JGE, first_above, 0, 1), far]
    } else {
        vec![jump(libc::BPF_JGE, first_above, lower.len(), 0)]
    };
    program.extend(lower);
    program.extend(choose(above, others));
    program
}

/// The same for a few calls with one answer, which is shorter: one comparison after the other.
fn row(rules: &[Rule], when: When, others: u32) -> Vec<sock_filter> {
    let decided = decide(when);
    let mut program = Vec::new();
    for (left, (number, _)) in (0..rules.len()).rev().zip(rules) {
        let otherwise = if left == 0 { decided.len() } else { 0 };
        program.push(jump(libc::BPF_JEQ, *number as u32, left, otherwise));
    }
    program.extend(decided);
    program.push(answer(others));
    program
}

/// The answer to a call that has a rule.
fn decide(when: When) -> Vec<sock_filter> {
    match when {
        Always => vec![answer(libc::SECCOMP_RET_ALLOW)],
        Never => vec![answer(libc::SECCOMP_RET_KILL_PROCESS)],
        Absent => vec![answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32)],
        When::Argument(index, mask, values) => {
            let mut program = vec![
                load(ARGUMENTS + 8 * index),
                instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask, 0, 0),
            ];
            for (left, value) in (1..=values.len()).rev().zip(values) {
                program.push(jump(libc::BPF_JEQ, *value, left, 0));
            }
            program.push(answer(libc::SECCOMP_RET_KILL_PROCESS));
            program.push(answer(libc::SECCOMP_RET_ALLOW));
            program
        }
    }
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
}

fn answer(value: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

/// Compares with the accumulator, and skips so many instructions.
fn jump(comparison: u32, value: u32, if_true: usize, if_false: usize) -> sock_filter {
    let code = libc::BPF_JMP | comparison | libc::BPF_K;
    instruction(code, value, if_true as u8, if_false as u8)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program answers to a call with one argument that matters (classic BPF, in the part
    /// that is used here).
    fn run(filter: &Filter, number: i64, argument: Option<(u32, u32)>) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter.0[at];
            let code = u32::from(code);
            at += 1;
            let skip = |truth| usize::from(if truth { jt } else { jf });
            match code & 0x07 {
                libc::BPF_LD => {
                    accumulator = match (k, argument) {
                        (NUMBER, _) => number as u32,
                        (ARCHITECTURE, _) => AUDIT_ARCH_X86_64,
                        (at, Some((index, value))) if at == ARGUMENTS + 8 * index => value,
                        _ => 0,
                    }
                }
                libc::BPF_ALU => accumulator &= k,
                libc::BPF_RET => return k,
                _ => match code & 0xf0 {
                    libc::BPF_JA => at += k as usize,
                    libc::BPF_JEQ => at += skip(accumulator == k),
                    libc::BPF_JGE => at += skip(accumulator >= k),
                    other => panic!("{other:#x}"),
                },
            }
        }
    }

    const OWN_ID: u32 = 77;

    /// What the kernel answers to a thread of this role.
    fn ask(role: Role, number: i64, argument: Option<(u32, u32)>) -> u32 {
        let zygote = run(&Filter::new(Role::Zygote), number, argument);
        if role == Role::Zygote {
            return zygote;
        }
        let own = run(&Filter::new(role).for_process(OWN_ID), number, argument);
        // Each is an i32 whose lowest is the strictest (Linux kernel/seccomp.c).
        zygote.cast_signed().min(own.cast_signed()).cast_unsigned()
    }

    #[test]
    fn a_role_may_do_what_its_list_says_and_nothing_else() {
        for role in [Role::Zygote, Role::Runner, Role::Vcpu] {
            let own = calls(role);
            for number in (0..600).chain([1 << 30, (1 << 30) + 1, u32::MAX.into()]) {
                let listed = own.iter().find(|call| call.0 == number);
                let (argument, expected) = match listed.map(|call| call.1) {
                    None | Some(Never) => (None, libc::SECCOMP_RET_KILL_PROCESS),
                    Some(Always) => (None, libc::SECCOMP_RET_ALLOW),
                    Some(Absent) => (None, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
                    Some(When::Argument(index, _, values)) => {
                        let last = values.last().copied().unwrap();
                        let last = if last == THIS_PROCESS { OWN_ID } else { last };
                        (Some((index, last)), libc::SECCOMP_RET_ALLOW)
                    }
                };
                let got = ask(role, number, argument);
                assert_eq!(got, expected, "{role:?} {number} {argument:?}");
            }
        }
    }

    #[test]
    fn arguments_that_are_not_listed_kill() {
        let killed = |role, number, index, value| {
            ask(role, number, Some((index, value))) == libc::SECCOMP_RET_KILL_PROCESS
        };
        for role in [Role::Zygote, Role::Runner, Role::Vcpu] {
            assert!(killed(role, libc::SYS_ioctl, 1, libc::TIOCSTI as u32));
            assert_eq!(
                killed(role, libc::SYS_ioctl, 1, KVM_RUN),
                role == Role::Runner
            );
            // KVM_CREATE_DEVICE, KVM_SET_USER_MEMORY_REGION, KVM_CREATE_VCPU, KVM_IRQFD
            for request in [0xc00c_aee0, 0x4020_ae46, 0xae41, 0x4020_ae76] {
                let makes = role == Role::Zygote;
                assert_eq!(killed(role, libc::SYS_ioctl, 1, request), !makes);
            }
            let sibling = killed(role, libc::SYS_tgkill, 0, OWN_ID + 1);
            assert_eq!(sibling, role != Role::Zygote);
            assert!(killed(role, libc::SYS_mmap, 2, libc::PROT_EXEC as u32 | 1));
            assert!(!killed(role, libc::SYS_mmap, 2, 3));
            assert!(killed(
                role,
                libc::SYS_prctl,
                0,
                libc::PR_SET_DUMPABLE as u32
            ));
        }
        let no_new_privs = libc::PR_SET_NO_NEW_PRIVS as u32;
        assert!(!killed(Role::Zygote, libc::SYS_prctl, 0, no_new_privs));
        assert!(killed(Role::Vcpu, libc::SYS_prctl, 0, no_new_privs));
    }

    #[test]
    fn filters_that_every_fork_installs_are_small() {
        let length = |role| Filter::new(role).0.len();
        assert!(length(Role::Runner) < 90, "{}", length(Role::Runner));
        assert!(length(Role::Vcpu) < 90, "{}", length(Role::Vcpu));
    }
}
