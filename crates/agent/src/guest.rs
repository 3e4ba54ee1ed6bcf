//! Bringing the guest up: modules, root file system, mounts, loopback. Runs once, at boot.

#![expect(unsafe_code, reason = "loading modules, interface flags, klogctl")]

use crate::{cgroup, identity};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

const MODULES: &str = "/modules";
const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;
const ROOT_DEVICE: &str = "/dev/vda";
/// The disk appears as soon as its driver has probed it.
const ROOT_DEVICE_WAIT_MAX: Duration = Duration::from_secs(60);
/// Part of the guest's memory that files changed in the guest may take.
const OVERLAY_SHARE: &str = "size=50%,mode=755";
/// Open descriptors of a program: at its start, and as far as it may raise that.
const DESCRIPTORS_SOFT: u64 = 1024;
const DESCRIPTORS_HARD: u64 = 1 << 20;
const CONSOLE_LEVEL_EMERGENCIES: libc::c_int = 1;
const SYSLOG_ACTION_CONSOLE_LEVEL: libc::c_int = 8;

fn context<T>(what: impl std::fmt::Display, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(e.kind(), format!("{what}: {e}")))
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let data = CString::new(data)?;
    context(
        format_args!("mount {kind} on {target}"),
        mount(source, target, kind, flags, data.as_c_str()).map_err(io::Error::from),
    )
}

/// Writes to the kernel's log, which is the only place to complain before the host listens.
pub fn log(message: &str) {
    let _ = fs::write("/dev/kmsg", format!("{message}\n"));
}

/// From the first instruction of PID 1 to a guest whose agent can serve.
pub fn bring_up() -> io::Result<()> {
    mount_at("proc", "/proc", "proc", MountFlags::empty(), "")?;
    mount_at("sysfs", "/sys", "sysfs", MountFlags::empty(), "")?;
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), "")?;
    load_modules()?;
    switch_root()?;
    mount_system()?;
    loopback_up()?;
    raise_limits()?;
    cgroup::create(memory_bytes()?)?;
    hide_boot_id()?;
    quieten();
    // SAFETY: sets a number in the kernel.
    unsafe {
        libc::klogctl(
            SYSLOG_ACTION_CONSOLE_LEVEL,
            std::ptr::null_mut(),
            CONSOLE_LEVEL_EMERGENCIES,
        )
    };
    Ok(())
}

/// Loads what the file `order` lists, in that order.
fn load_modules() -> io::Result<()> {
    let order = context(
        "read the list of modules",
        fs::read_to_string(format!("{MODULES}/order")),
    )?;
    for name in order.lines().filter(|line| !line.is_empty()) {
        let file = context(name, fs::File::open(format!("{MODULES}/{name}")))?;
        let flags = if name.ends_with(".ko") {
            0
        } else {
            MODULE_INIT_COMPRESSED_FILE
        };
        // SAFETY: the kernel reads the module from the descriptor.
        let result = unsafe {
            libc::syscall(
                libc::SYS_finit_module,
                file.as_raw_fd(),
                c"".as_ptr(),
                flags,
            )
        };
        let error = io::Error::last_os_error();
        if result < 0 && error.raw_os_error() != Some(libc::EEXIST) {
            return context(format_args!("load module {name}"), Err(error));
        }
    }
    Ok(())
}

/// The root is a read-only image under an overlay in memory, so that changes fork with memory.
fn switch_root() -> io::Result<()> {
    await_path(ROOT_DEVICE, ROOT_DEVICE_WAIT_MAX)?;
    mount_at(ROOT_DEVICE, "/lower", "erofs", MountFlags::RDONLY, "")?;
    mount_at(
        "tmpfs",
        "/changes",
        "tmpfs",
        MountFlags::empty(),
        OVERLAY_SHARE,
    )?;
    fs::create_dir_all("/changes/upper")?;
    fs::create_dir_all("/changes/work")?;
    // redirect_dir: a folder of the image can be renamed. xino: the inode numbers of a folder's
    // entries are those that stat(2) gives (Documentation/filesystems/overlayfs.rst).
    let layers = "lowerdir=/lower,upperdir=/changes/upper,workdir=/changes/work,redirect_dir=on,\
        xino=on";
    mount_at("overlay", "/root", "overlay", MountFlags::empty(), layers)?;
    for tree in ["/dev", "/proc", "/sys"] {
        let target = format!("/root{tree}");
        fs::create_dir_all(&target)?;
        context(
            format_args!("move {tree}"),
            mount_move(tree, &target).map_err(io::Error::from),
        )?;
    }
    fs::remove_dir_all(MODULES)?; // the initramfs is memory
    std::env::set_current_dir("/root")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Waits for a device: the kernel makes its file, and changes /dev, when it is ready.
fn await_path(path: &str, wait_max: Duration) -> io::Result<()> {
    use rustix::fs::inotify;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE)?;
    let start = Instant::now();
    while !Path::new(path).exists() {
        let left = wait_max.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(io::Error::other(format!("{path} has not appeared")));
        }
        let timeout = rustix::time::Timespec {
            tv_sec: left.as_secs() as i64 + 1,
            tv_nsec: 0,
        };
        let mut fds = [rustix::event::PollFd::new(
            &watch,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, Some(&timeout))?;
        let mut events = [0; 4096];
        rustix::io::read(&watch, &mut events[..])?;
    }
    Ok(())
}

fn mount_system() -> io::Result<()> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    mount_at("tmpfs", "/dev/shm", "tmpfs", plain, "mode=1777,size=50%")?;
    mount_at("tmpfs", "/run", "tmpfs", plain, "mode=755,size=16m")?;
    mount_cgroups(plain)?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if !Path::new(link).exists() {
            std::os::unix::fs::symlink(target, link)?;
        }
    }
    fs::create_dir_all("/root")?;
    fs::create_dir_all("/tmp")?;
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))
}

/// Each program that is started moves into its group, for which the kernel else waits for a grace period
/// of RCU, in a guest 10 to 20 ms (Documentation/admin-guide/cgroup-v2.rst, favordynmods: Linux 6.0).
fn mount_cgroups(flags: MountFlags) -> io::Result<()> {
    let mount = |data| mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", flags, data);
    mount("favordynmods").or_else(|_| mount(""))
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: an `ifreq` for the name "lo" with two flags; the kernel reads it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let result = libc::ioctl(
            socket,
            libc::SIOCSIFFLAGS as libc::Ioctl,
            &raw const request,
        );
        let error = io::Error::last_os_error();
        libc::close(socket);
        if result < 0 {
            context("bring lo up", Err(error))
        } else {
            Ok(())
        }
    }
}

/// As a container has them; programs inherit them.
fn raise_limits() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let descriptors = Rlimit {
        current: Some(DESCRIPTORS_SOFT),
        maximum: Some(DESCRIPTORS_HARD),
    };
    context(
        "raise the limit of descriptors",
        setrlimit(Resource::Nofile, descriptors).map_err(io::Error::from),
    )
}

fn memory_bytes() -> io::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))
}

/// What the kernel does from time to time by itself, each fork would pay for: compacting memory ahead,
/// adding up statistics, writing back to disks that are not there. A kernel without a switch goes on.
fn quieten() {
    for (switch, value) in [
        ("compaction_proactiveness", "0"),
        ("stat_interval", "3600"),
        ("dirty_writeback_centisecs", "0"),
    ] {
        let _ = fs::write(format!("/proc/sys/vm/{switch}"), value);
    }
}

/// The kernel draws its boot id once: a file over it is drawn once a fork.
fn hide_boot_id() -> io::Result<()> {
    fs::create_dir_all("/run/zygote")?;
    fs::write(identity::BOOT_ID, "\n")?;
    let target = "/proc/sys/kernel/random/boot_id";
    context(
        "cover boot_id",
        mount_bind(identity::BOOT_ID, target).map_err(io::Error::from),
    )
}
