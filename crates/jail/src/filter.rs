//! System calls that are left (seccomp(2)). Whatever is not listed kills the process.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};
use std::collections::BTreeMap;

/// `_IOC_TYPE` of every KVM request (Documentation/virt/kvm/api.rst), in its place.
const KVM_TYPE: u64 = 0xae << 8;
const TYPE_MASK: u64 = 0xff << 8;

/// When a call on the list is allowed.
#[derive(Clone, Copy)]
enum When {
    Always,
    /// ioctl(2) for KVM only.
    OfKvm,
    /// Memory that is not executable (argument 2 lacks PROT_EXEC).
    NotExecutable,
    /// clone(2) of a thread (argument 0 has CLONE_THREAD).
    OfAThread,
    /// fcntl(2) that duplicates a descriptor, or asks whether it is one.
    OfADescriptor,
    /// prctl(2) that names a thread.
    OfAName,
}

/// Calls of a runner once its machine is made, with the reason for each.
const RUNNER: [(i64, When, &str); 42] = [
    (
        libc::SYS_ioctl,
        When::OfKvm,
        "runs the vCPUs, injects interrupts",
    ),
    (
        libc::SYS_read,
        When::Always,
        "agent's stream, eventfds, open files of /proc",
    ),
    (libc::SYS_write, When::Always, "agent's stream, eventfds"),
    (
        libc::SYS_readv,
        When::Always,
        "agent's stream into guest memory",
    ),
    (
        libc::SYS_writev,
        When::Always,
        "agent's stream from guest memory",
    ),
    (libc::SYS_pread64, When::Always, "disk image"),
    (
        libc::SYS_preadv,
        When::Always,
        "disk image into guest memory",
    ),
    (libc::SYS_recvmsg, When::Always, "engine's requests"),
    (libc::SYS_recvfrom, When::Always, "agent's stream"),
    (libc::SYS_sendmsg, When::Always, "answers to the engine"),
    (libc::SYS_sendto, When::Always, "agent's stream"),
    (libc::SYS_poll, When::Always, "parked: waits for activation"),
    (
        libc::SYS_ppoll,
        When::Always,
        "parked: waits for activation",
    ),
    (
        libc::SYS_epoll_create1,
        When::Always,
        "waits while the machine runs",
    ),
    (
        libc::SYS_epoll_ctl,
        When::Always,
        "waits while the machine runs",
    ),
    (
        libc::SYS_epoll_wait,
        When::Always,
        "waits while the machine runs",
    ),
    (
        libc::SYS_epoll_pwait,
        When::Always,
        "waits while the machine runs",
    ),
    (libc::SYS_futex, When::Always, "locks"),
    (libc::SYS_close, When::Always, "gives up descriptors"),
    (libc::SYS_getrandom, When::Always, "entropy device"),
    (
        libc::SYS_clock_gettime,
        When::Always,
        "clock register, where the vDSO cannot",
    ),
    (
        libc::SYS_mmap,
        When::NotExecutable,
        "allocator, stacks of vCPU threads",
    ),
    (
        libc::SYS_mprotect,
        When::NotExecutable,
        "allocator, guard pages",
    ),
    (libc::SYS_munmap, When::Always, "allocator"),
    (libc::SYS_mremap, When::Always, "allocator"),
    (
        libc::SYS_madvise,
        When::Always,
        "allocator, stacks of threads that have ended",
    ),
    (libc::SYS_brk, When::Always, "allocator"),
    (libc::SYS_clone, When::OfAThread, "vCPU threads"),
    (libc::SYS_set_robust_list, When::Always, "start of a thread"),
    (libc::SYS_rseq, When::Always, "start of a thread"),
    (
        libc::SYS_sigaltstack,
        When::Always,
        "start and end of a thread",
    ),
    (
        libc::SYS_fcntl,
        When::OfADescriptor,
        "duplicates descriptors",
    ),
    (
        libc::SYS_gettid,
        When::Always,
        "own thread's id, for tgkill",
    ),
    (
        libc::SYS_sched_getaffinity,
        When::Always,
        "allocator: how many arenas",
    ),
    (
        libc::SYS_rt_sigaction,
        When::Always,
        "the C library's own handlers, at the first thread",
    ),
    (
        libc::SYS_rt_sigprocmask,
        When::Always,
        "start and end of a thread",
    ),
    (libc::SYS_rt_sigreturn, When::Always, "end of a kick"),
    (libc::SYS_prctl, When::OfAName, "names of threads"),
    (
        libc::SYS_tgkill,
        When::Always,
        "kicks vCPUs out of the guest; sees its own namespace only",
    ),
    (
        libc::SYS_getpid,
        When::Always,
        "own process's id, for tgkill",
    ),
    (libc::SYS_exit, When::Always, "end of a thread"),
    (libc::SYS_exit_group, When::Always, "end"),
];

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The lists do not compile.
    #[error("cannot compile the filter of system calls")]
    Compile(#[from] seccompiler::BackendError),
    /// The kernel refuses it.
    #[error("cannot install the filter of system calls")]
    Install(#[from] seccompiler::Error),
}

/// A role's compiled filter. Made once; each process of the role installs it.
pub struct Filter(BpfProgram);

impl Filter {
    /// For a runner whose machine is made, all of its threads.
    ///
    /// # Errors
    /// If the list is wrong.
    pub fn runner() -> Result<Self, FilterError> {
        let mut rules = BTreeMap::new();
        for (call, when, _) in RUNNER {
            rules.insert(call, self::rules(when)?);
        }
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )?;
        let allowed: BpfProgram = filter.try_into()?;
        let mut program = no_clone3();
        program.extend(allowed);
        Ok(Self(program))
    }

    /// For this thread and those that it starts. Cannot be undone.
    ///
    /// # Errors
    /// If the kernel has no seccomp.
    pub fn install(&self) -> Result<(), FilterError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }
}

/// Answers clone3(2), whose flags a filter cannot see, with ENOSYS: the C library then uses
/// clone(2). A filter of its own would cost each process a tenth of a millisecond, so these are
/// the first instructions of the one that there is.
fn no_clone3() -> BpfProgram {
    let instruction = |code: u32, jf, k| sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let answer = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    vec![
        // The number of the call is the first word of seccomp_data.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_clone3 as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, answer),
    ]
}

/// Each a way to be allowed; none: always.
fn rules(when: When) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let masked = |argument, mask, value| {
        let operator = SeccompCmpOp::MaskedEq(mask);
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let word = u64::from(u32::MAX);
    match when {
        When::Always => Ok(Vec::new()),
        When::OfKvm => Ok(vec![masked(1, TYPE_MASK, KVM_TYPE)?]),
        When::NotExecutable => Ok(vec![masked(2, libc::PROT_EXEC as u64, 0)?]),
        When::OfAThread => {
            let thread = libc::CLONE_THREAD as u64;
            Ok(vec![masked(0, thread, thread)?])
        }
        When::OfADescriptor => Ok(vec![
            masked(1, word, libc::F_DUPFD_CLOEXEC as u64)?,
            masked(1, word, libc::F_GETFD as u64)?,
        ]),
        When::OfAName => Ok(vec![masked(0, word, libc::PR_SET_NAME as u64)?]),
    }
}
