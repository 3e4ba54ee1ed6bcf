//! The jail attacked from inside: as root's child, and as an ordinary user's. Each attack runs in
//! a process of its own (this program again, with the attack's name), because a jail is for good.

#![allow(unsafe_code, clippy::unwrap_used, reason = "attacks, in a test")]

use libtest_mimic::{Arguments, Trial};
use std::ffi::CString;
use std::fs;
use std::io::{Error, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output, Stdio};
use zygote_jail::{Filter, MissingWall, Role};

/// Some ordinary user: these tests make no files.
const ORDINARY: u32 = 12345;
/// How the jail's keeper tells SIGSYS.
const FILTERED: i32 = 128 + libc::SIGSYS;
const HELD: i32 = 0;
const ESCAPED: i32 = 1;

/// `(name, attack)`: gives the errno that stopped it, 0 if nothing did.
type Attack = (&'static str, fn(&Target) -> i32);

/// What of the outside the attacker knows.
struct Target {
    pid: i32,
    port: u16,
    socket: String,
}

const ATTACKS: [Attack; 16] = [
    ("open a file of the host", |_| {
        open("/etc/passwd", libc::O_RDONLY)
    }),
    ("open the list of processes", |_| {
        open("/proc/1/status", libc::O_RDONLY)
    }),
    ("open KVM", |_| open("/dev/kvm", libc::O_RDWR)),
    ("create a file", |_| {
        open("/x", libc::O_RDWR | libc::O_CREAT)
    }),
    ("run a program", |_| {
        let path = c"/bin/sh".as_ptr();
        let arguments = [path, std::ptr::null()];
        // SAFETY: a path and a list that ends in null.
        unsafe { call(libc::execv(path, arguments.as_ptr())) }
    }),
    // SAFETY: signals nobody (0).
    ("signal the parent", |target| unsafe {
        call(libc::kill(target.pid, 0))
    }),
    ("trace the parent", |target| {
        // SAFETY: touches no memory of this process.
        unsafe { call(libc::ptrace(libc::PTRACE_ATTACH, target.pid, 0, 0) as i32) }
    }),
    ("read the parent's memory", |target| {
        let mut byte = 0_u8;
        let own = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        // SAFETY: reads at most one byte into a place for one.
        let read =
            unsafe { libc::process_vm_readv(target.pid, &raw const own, 1, &raw const own, 1, 0) };
        call(read as i32)
    }),
    ("connect over the network", |target| {
        let address = libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: target.port.to_be(),
            sin_addr: libc::in_addr {
                s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
            },
            sin_zero: [0; 8],
        };
        connect(libc::AF_INET, &address)
    }),
    ("connect to an abstract socket", |target| {
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as u16;
        for (place, byte) in address.sun_path[1..].iter_mut().zip(target.socket.bytes()) {
            *place = byte as libc::c_char;
        }
        let bytes = 2 + 1 + target.socket.len();
        // SAFETY: an address and its own length.
        unsafe {
            let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
            call(libc::connect(fd, (&raw const address).cast(), bytes as u32))
        }
    }),
    ("mount", |_| {
        let (kind, place) = (c"tmpfs".as_ptr(), c"/".as_ptr());
        // SAFETY: strings that end in zero.
        unsafe { call(libc::mount(kind, place, kind, 0, std::ptr::null())) }
    }),
    // SAFETY: changes ids only.
    ("become root", |_| unsafe { call(libc::setresuid(0, 0, 0)) }),
    // SAFETY: changes this process's root only.
    ("leave the root", |_| unsafe {
        call(libc::chroot(c"/".as_ptr()))
    }),
    ("raise a limit", |_| {
        let more = libc::rlimit {
            rlim_cur: 1 << 20,
            rlim_max: 1 << 20,
        };
        // SAFETY: reads one structure.
        unsafe { call(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const more)) }
    }),
    // SAFETY: a new name for a namespace.
    ("rename the host", |_| unsafe {
        call(libc::sethostname(c"x".as_ptr(), 1))
    }),
    // SAFETY: asks for a module by a made-up image.
    ("load a module", |_| unsafe {
        call(libc::syscall(libc::SYS_init_module, c"x".as_ptr(), 1, c"".as_ptr()) as i32)
    }),
];

const ROLES: [(&str, Role); 3] = [
    ("zygote", Role::Zygote),
    ("runner", Role::Runner),
    ("vcpu", Role::Vcpu),
];

/// What only a filter stops.
const FILTERED_ONLY: [Attack; 8] = [
    // SAFETY: signals nobody (0).
    ("signal a sibling", |_| unsafe {
        call(libc::syscall(libc::SYS_tgkill, 2, 2, 0) as i32)
    }),
    // SAFETY: the child ends at once.
    ("fork", |_| unsafe {
        match libc::fork() {
            0 => libc::_exit(0),
            other => call(other),
        }
    }),
    // SAFETY: a new namespace for this process.
    ("make a user namespace", |_| unsafe {
        call(libc::unshare(libc::CLONE_NEWUSER))
    }),
    // SAFETY: a new mapping.
    ("map executable memory", |_| unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        call(libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) as isize as i32)
    }),
    // SAFETY: a descriptor.
    ("make a socket", |_| unsafe {
        call(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0))
    }),
    // SAFETY: asks for the size of a terminal, into a place large enough.
    ("control a terminal", |_| unsafe {
        let mut size = [0_u64; 8];
        call(libc::ioctl(1, libc::TIOCGWINSZ, size.as_mut_ptr()))
    }),
    // SAFETY: sets an attribute of this process.
    ("become traceable", |_| unsafe {
        call(libc::prctl(libc::PR_SET_DUMPABLE, 1))
    }),
    // SAFETY: opens a descriptor.
    ("use io_uring", |_| unsafe {
        let parameters = [0_u64; 32];
        call(libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_ptr()) as i32)
    }),
];

fn call(result: i32) -> i32 {
    if result >= 0 {
        return 0;
    }
    Error::last_os_error().raw_os_error().unwrap()
}

fn open(path: &str, flags: i32) -> i32 {
    let path = CString::new(path).unwrap();
    // SAFETY: a string that ends in zero.
    unsafe { call(libc::open(path.as_ptr(), flags, 0o600)) }
}

fn connect<A>(family: i32, address: &A) -> i32 {
    // SAFETY: an address and its own size.
    unsafe {
        let fd = libc::socket(family, libc::SOCK_STREAM, 0);
        let address: *const A = address;
        call(libc::connect(fd, address.cast(), size_of::<A>() as u32))
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|word| word == "--attack") {
        std::process::exit(attack(&arguments[2..]));
    }
    let checks: [(&str, Check); 5] = [
        ("the_walls_stand", the_walls_stand),
        ("every_attack_fails", every_attack_fails),
        (
            "the_filters_kill_what_is_not_listed",
            the_filters_kill_what_is_not_listed,
        ),
        (
            "what_a_runner_does_is_allowed",
            what_a_runner_does_is_allowed,
        ),
        (
            "the_keeper_and_the_kept_die_together",
            the_keeper_and_the_kept_die_together,
        ),
    ];
    let mut trials = Vec::new();
    let users: [(&str, Somebody); 2] = [
        ("this_user", User::this),
        ("an_ordinary_user", User::ordinary),
    ];
    for (kind, user) in users {
        for (name, check) in checks {
            trials.push(Trial::test(format!("{kind}::{name}"), move || {
                check(&user());
                Ok(())
            }));
        }
    }
    trials.push(Trial::test("a_root_that_is_shared_is_left_alone", || {
        a_root_that_is_shared_is_left_alone();
        Ok(())
    }));
    trials.push(Trial::test(
        "a_parent_that_ignores_children_is_no_trap",
        || {
            a_parent_that_ignores_children_is_no_trap(&User::this());
            Ok(())
        },
    ));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

type Check = fn(&User);
type Somebody = fn() -> User;

struct User {
    name: &'static str,
    id: Option<u32>,
    program: PathBuf,
    _place: Option<tempfile::TempDir>,
}

impl User {
    /// Whoever runs the tests.
    fn this() -> Self {
        Self {
            name: "the user",
            id: None,
            program: std::env::current_exe().unwrap(),
            _place: None,
        }
    }

    /// Another, if that can be had: only root can become somebody.
    fn ordinary() -> Self {
        // SAFETY: asks for an id.
        if unsafe { libc::geteuid() } != 0 {
            return Self::this();
        }
        // Where that user can read it.
        let place = tempfile::tempdir().unwrap();
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(place.path(), open).unwrap();
        let program = place.path().join("attacks");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        Self {
            name: "an ordinary user",
            id: Some(ORDINARY),
            program,
            _place: Some(place),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--attack").args(arguments);
        if let Some(id) = self.id {
            command.uid(id).gid(id);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

fn the_walls_stand(user: &User) {
    let output = user.run(&["report"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        output.status.code(),
        Some(HELD),
        "{}: {text}{output:?}",
        user.name
    );
    for line in [
        "NoNewPrivs:\t1",
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "NSpid:",
        "files: 0",
    ] {
        assert!(text.contains(line), "{}: no `{line}` in {text}", user.name);
    }
    let ids = text.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(!ids.split_whitespace().any(|id| id == "0"), "{ids}");
    let missing = text.lines().find(|line| line.starts_with("missing:"));
    assert_eq!(missing, None, "{}: {text}", user.name);
}

fn every_attack_fails(user: &User) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let socket = format!("zygote-jail-{}-{}", std::process::id(), port);
    let name = SocketAddr::from_abstract_name(&socket).unwrap();
    let _bound = UnixListener::bind_addr(&name).unwrap();
    let pid = std::process::id().to_string();
    for (name, _) in ATTACKS {
        let output = user.run(&["walls", name, &pid, &port, &socket]);
        assert_eq!(
            output.status.code(),
            Some(HELD),
            "{}: {name}: {output:?}",
            user.name
        );
    }
}

fn the_filters_kill_what_is_not_listed(user: &User) {
    for (role, _) in ROLES {
        for (name, _) in ATTACKS.into_iter().chain(FILTERED_ONLY) {
            // What a zygote process is there for, within its walls.
            let own = [
                "fork",
                "signal the parent",
                "signal a sibling",
                "become root",
            ];
            if role == "zygote" && own.contains(&name) {
                continue;
            }
            let output = user.run(&[role, name, "1", "1", "x"]);
            let what = format!("{}: {role}: {name}: {output:?}", user.name);
            assert_eq!(output.status.code(), Some(FILTERED), "{what}");
        }
    }
}

fn what_a_runner_does_is_allowed(user: &User) {
    let output = user.run(&["work"]);
    assert_eq!(
        output.status.code(),
        Some(HELD),
        "{}: {output:?}",
        user.name
    );
}

/// A keeper that is killed takes the jailed process along: the pipe that both hold ends.
fn the_keeper_and_the_kept_die_together(user: &User) {
    let mut keeper = user
        .command(&["wait"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = keeper.stdout.take().unwrap();
    let mut ready = [0; 1];
    output.read_exact(&mut ready).unwrap();
    keeper.kill().unwrap();
    keeper.wait().unwrap();
    let rest = output.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(rest, 0, "{}", user.name);
}

/// A host that gives no mount namespace: played by a user namespace with one that it may not leave.
fn a_root_that_is_shared_is_left_alone() {
    let script = "echo 0 > /proc/sys/user/max_mnt_namespaces || exit 1\n\
        sleep 100 & bystander=$!\n\
        ls /proc/$bystander/root | wc -l\n\
        \"$0\" --attack report >/dev/null 2>&1\n\
        ls /proc/$bystander/root | wc -l\n\
        kill $bystander";
    let mut command = Command::new("unshare");
    command
        .args([
            "--user",
            "--map-root-user",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
        ])
        .args(["sh", "-c", script])
        .arg(std::env::current_exe().unwrap());
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let counts: Vec<&str> = text.lines().collect();
    assert_eq!(counts.len(), 2, "{output:?}");
    assert!(counts[0] == counts[1] && counts[0] != "0", "{counts:?}");
}

/// SIGCHLD ignored is inherited over exec, and makes children vanish unseen.
fn a_parent_that_ignores_children_is_no_trap(user: &User) {
    let mut command = user.command(&["report"]);
    // SAFETY: sets how a signal is met, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(HELD), "{output:?}");
}

/// Inside.
fn attack(arguments: &[String]) -> i32 {
    let processes = fs::File::open("/proc").unwrap();
    let report = zygote_jail::enter(8 << 30).unwrap();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let is_zygote = matches!(words.first(), Some(&"zygote" | &"wait"));
    if report.has_users && !is_zygote {
        zygote_jail::become_runner(5).unwrap();
    }
    match words[..] {
        ["report"] => tell(&processes, &report.missing),
        ["work"] => work(),
        ["wait"] => {
            print!("!");
            std::io::stdout().flush().unwrap();
            loop {
                std::thread::park();
            }
        }
        [kind, name, pid, port, socket] => {
            let target = Target {
                pid: pid.parse().unwrap(),
                port: port.parse().unwrap(),
                socket: socket.to_owned(),
            };
            let known = ATTACKS.into_iter().chain(FILTERED_ONLY);
            let (_, attack) = known.into_iter().find(|(known, _)| *known == name).unwrap();
            if let Some((_, role)) = ROLES.into_iter().find(|(name, _)| *name == kind) {
                Filter::new(Role::Zygote).install().unwrap();
                let id = std::process::id();
                Filter::new(role).for_process(id).install().unwrap();
            }
            if attack(&target) == 0 { ESCAPED } else { HELD }
        }
        _ => 99,
    }
}

/// Prints what the kernel says of the jailed process, and what the jail misses.
fn tell(processes: &fs::File, missing: &[MissingWall]) -> i32 {
    let open = |path: &CString| {
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: a descriptor of a folder, and a string that ends in zero.
        unsafe { libc::openat(processes.as_raw_fd(), path.as_ptr(), flags) }
    };
    let fd = open(&CString::new("self/status").unwrap());
    // SAFETY: just opened, and nobody else's.
    let status = unsafe { fs::File::from_raw_fd(fd) };
    println!("{}", std::io::read_to_string(status).unwrap());
    let files = fs::read_dir("/").map_or(99, Iterator::count);
    println!("files: {files}");
    for wall in missing {
        println!("missing: {wall}");
    }
    0
}

/// As a runner is made: a zygote's child, with a thread, each with its filter on top.
fn work() -> i32 {
    Filter::new(Role::Zygote).install().unwrap();
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    if child > 0 {
        let mut status = 0;
        // SAFETY: writes one integer.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        return i32::from(status != 0);
    }
    let thread = std::thread::Builder::new().name("zygote-vcpu".into());
    let sum = thread.spawn(|| {
        let id = std::process::id();
        Filter::new(Role::Vcpu).for_process(id).install().unwrap();
        vec![1_u64; 1 << 20].iter().sum::<u64>()
    });
    let id = std::process::id();
    Filter::new(Role::Runner).for_process(id).install().unwrap();
    i32::from(sum.unwrap().join().unwrap() != 1 << 20)
}
