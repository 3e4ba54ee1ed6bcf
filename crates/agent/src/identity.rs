//! Becoming somebody: what a fork must not share with any other (DESIGN: clock, kernel generator,
//! names), applied in an order that leaves the user's processes frozen until all of it is done.

#![expect(unsafe_code, reason = "a mapped register, ioctls, clock_settime")]

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use zygote_protocol::{HOST_CLOCK_ADDRESS, Identity};

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of Linux `include/uapi/linux/random.h`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203u32 as libc::Ioctl;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
const PAGE_BYTES: usize = 4096;
const SEED_MAX_BYTES: usize = 256;
const HOSTNAME_MAX_BYTES: usize = 63;
/// What /etc/hosts says before and after the machine's own name.
const HOSTS_BEFORE: &str = "127.0.0.1\tlocalhost\n";
const HOSTS_AFTER: &str = "::1\tlocalhost ip6-localhost ip6-loopback\n";
/// A longer one is left alone.
const HOSTS_MAX_BYTES: u64 = 1 << 20;
/// As long as the names that forks get.
const PLACEHOLDER: &str = "zygote-000000000000";
/// Bind-mounted over /proc/sys/kernel/random/boot_id.
pub const BOOT_ID: &str = "/run/zygote/boot_id";
/// 2020: a host clock before this is no clock.
const CLOCK_MIN_NS: u64 = 1_577_836_800_000_000_000;

fn context<T>(what: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(e.kind(), format!("{what}: {e}")))
}

/// What is written for each fork, opened before the snapshot: no path is looked up in a fork, and no
/// file is copied up into the overlay.
pub struct Papers {
    urandom: File,
    /// `None`: somebody has changed it.
    hostname: Option<File>,
    /// Likewise.
    hosts: Option<Hosts>,
    machine_id: File,
    boot_id: File,
}

/// /etc/hosts, but for the line of the machine's own name (hosts(5)).
struct Hosts {
    file: File,
    before: Cow<'static, str>,
    after: Cow<'static, str>,
}

impl Hosts {
    /// As it is at first.
    fn new(file: File) -> Self {
        Self {
            file,
            before: HOSTS_BEFORE.into(),
            after: HOSTS_AFTER.into(),
        }
    }

    /// With what its user has written around that line; `None` if it is not there any more.
    fn keep(self, name: &str) -> Option<Self> {
        let mut text = String::new();
        let read = (&self.file).take(HOSTS_MAX_BYTES).read_to_string(&mut text);
        if read.ok()? as u64 == HOSTS_MAX_BYTES {
            return None;
        }
        let own = own_line(name);
        let is_line = |at: &usize| *at == 0 || text.as_bytes()[at - 1] == b'\n';
        let at = text.match_indices(&own).map(|(at, _)| at).find(is_line)?;
        Some(Self {
            file: self.file,
            before: text[..at].to_owned().into(),
            after: text[at + own.len()..].to_owned().into(),
        })
    }

    fn name(&self, name: &str) -> io::Result<()> {
        let text = [&*self.before, &own_line(name), &*self.after].concat();
        rewrite(&self.file, &text)
    }
}

fn own_line(name: &str) -> String {
    format!("127.0.1.1\t{name}\n")
}

impl Papers {
    /// Opens what is to be written. Who is nobody yet writes it once, too: what that allocates is there
    /// then.
    pub fn prepare(is_nobody: bool) -> io::Result<Self> {
        let open = |path: &str| {
            let mut options = fs::OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(false);
            context(path, file.open(path))
        };
        let papers = Self {
            urandom: open("/dev/urandom")?,
            hostname: Some(open("/etc/hostname")?),
            hosts: Some(Hosts::new(open("/etc/hosts")?)),
            machine_id: open("/etc/machine-id")?,
            boot_id: open(BOOT_ID)?,
        };
        if is_nobody {
            papers.name(PLACEHOLDER)?;
            papers.number(&[0; 16], &[0; 16])?;
        }
        Ok(papers)
    }

    /// Applies everything but the thaw. Gives back the proof of the reseed: bytes drawn after it.
    pub fn apply(&self, identity: &Identity, clock: &HostClock) -> io::Result<Vec<u8>> {
        let Identity {
            hostname,
            machine_id,
            boot_id,
            kernel_seed,
            interpreter_seed: _,
            reseed: _,
            stays,
        } = identity;
        context("set the clock", set_clock(clock))?;
        let reseeded = reseed(&self.urandom, kernel_seed);
        context("reseed the kernel's generator", reseeded)?;
        if !stays {
            context("set the host name", self.name(hostname))?;
            context("write the machine's ids", self.number(machine_id, boot_id))?;
        }
        let mut sample = vec![0; 32];
        rustix::rand::getrandom(&mut sample, rustix::rand::GetRandomFlags::empty())?;
        Ok(sample)
    }

    /// Leaves what names the machine as its user has left it, but for what is as it was written when it
    /// became `before`.
    pub fn keep_changes(mut self, before: &str) -> Self {
        let is_ours = |file: &File, text: String| {
            let mut now = Vec::new();
            let is_read = file.take(text.len() as u64 + 1).read_to_end(&mut now);
            is_read.is_ok() && now == text.into_bytes()
        };
        self.hostname = self.hostname.filter(|file| is_ours(file, line(before)));
        self.hosts = self.hosts.and_then(|hosts| hosts.keep(before));
        self
    }

    fn name(&self, name: &str) -> io::Result<()> {
        let valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > HOSTNAME_MAX_BYTES || !name.bytes().all(valid) {
            return Err(io::Error::other(format!("{name:?} is no host name")));
        }
        rustix::system::sethostname(name.as_bytes())?;
        if let Some(file) = &self.hostname {
            rewrite(file, &line(name))?;
        }
        self.hosts.as_ref().map_or(Ok(()), |hosts| hosts.name(name))
    }

    fn number(&self, machine_id: &[u8; 16], boot_id: &[u8; 16]) -> io::Result<()> {
        let machine_id = machine_id.iter().map(|byte| format!("{byte:02x}"));
        rewrite(&self.machine_id, &(machine_id.collect::<String>() + "\n"))?;
        rewrite(&self.boot_id, &(uuid(boot_id) + "\n"))
    }
}

/// What /etc/hostname says.
fn line(name: &str) -> String {
    format!("{name}\n")
}

/// In place; a length that stays costs no call.
fn rewrite(file: &File, text: &str) -> io::Result<()> {
    file.write_all_at(text.as_bytes(), 0)?;
    let length = text.len() as u64;
    if rustix::fs::fstat(file)?.st_size as u64 != length {
        file.set_len(length)?;
    }
    Ok(())
}

/// A random UUID's text: version 4, variant 1.
fn uuid(bytes: &[u8; 16]) -> String {
    let mut bytes = *bytes;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// The host's clock: a register that is mapped before the snapshot, so that every fork only reads.
pub struct HostClock {
    register: *const u64,
}

impl HostClock {
    /// Maps the register.
    pub fn map() -> io::Result<Self> {
        let memory = fs::File::open("/dev/mem")?;
        // SAFETY: a new mapping of one page of device memory, never unmapped.
        let page = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::POPULATE,
                &memory,
                HOST_CLOCK_ADDRESS,
            )
        };
        let page = page.map_err(io::Error::from);
        Ok(Self {
            register: context("map the host's clock", page)?.cast(),
        })
    }

    fn now_ns(&self) -> io::Result<u64> {
        // SAFETY: the mapping is there for ever, aligned, and readable.
        let now = unsafe { self.register.read_volatile() };
        if now == u64::MAX || now < CLOCK_MIN_NS {
            return Err(io::Error::other(format!("the host's clock says {now} ns")));
        }
        Ok(now)
    }
}

fn set_clock(clock: &HostClock) -> io::Result<()> {
    let now = clock.now_ns()?;
    let time = libc::timespec {
        tv_sec: (now / 1_000_000_000) as libc::time_t,
        tv_nsec: (now % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: reads one timespec.
    if unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn reseed(device: &File, seed: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` with room for the bytes.
    #[repr(C)]
    struct Pool {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        data: [u8; SEED_MAX_BYTES],
    }
    if !(32..=SEED_MAX_BYTES).contains(&seed.len()) {
        return Err(io::Error::other(format!("a seed of {} bytes", seed.len())));
    }
    let mut pool = Pool {
        entropy_bits: seed.len() as libc::c_int * 8,
        bytes: seed.len() as libc::c_int,
        data: [0; SEED_MAX_BYTES],
    };
    pool.data[..seed.len()].copy_from_slice(seed);
    let fd = device.as_raw_fd();
    // SAFETY: RNDADDENTROPY reads `bytes` bytes of `data`; RNDRESEEDCRNG has no argument. The
    // first alone changes nothing once the generator is up; the second makes it start afresh.
    unsafe {
        if libc::ioctl(fd, RNDADDENTROPY, &raw const pool) < 0 || libc::ioctl(fd, RNDRESEEDCRNG) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_has_the_form_of_a_random_uuid() {
        assert_eq!(uuid(&[0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }

    #[test]
    fn host_names_that_could_break_etc_hosts_are_refused() {
        let file = || tempfile::tempfile().unwrap();
        let papers = Papers {
            urandom: file(),
            hostname: Some(file()),
            hosts: Some(Hosts::new(file())),
            machine_id: file(),
            boot_id: file(),
        };
        for name in ["", "a b", "a\n127.0.0.1 x", "A", &"x".repeat(64)] {
            assert!(papers.name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn what_a_user_has_written_into_etc_hosts_stays_around_the_name() {
        let written = |text: &str| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(text.as_bytes(), 0).unwrap();
            Hosts::new(file)
        };
        let text = |hosts: &Hosts| {
            let mut all = vec![0; 4096];
            let length = hosts.file.read_at(&mut all, 0).unwrap();
            String::from_utf8(all[..length].to_vec()).unwrap()
        };
        let first = written("");
        first.name("first").unwrap();
        let before = text(&first);
        let more = format!("# 127.0.1.1\tfirst\n{before}10.0.0.1\tmine\n");
        let kept = written(&more).keep("first").unwrap();
        kept.name("another").unwrap();
        let expected = more.replacen("\n127.0.1.1\tfirst\n", "\n127.0.1.1\tanother\n", 1);
        assert_eq!(text(&kept), expected);
        let unchanged = written(&before).keep("first").unwrap();
        unchanged.name("x").unwrap();
        assert_eq!(text(&unchanged), before.replace("first", "x"));
        assert!(written("10.0.0.1\tmine\n").keep("first").is_none());
        assert!(written(&before).keep("fir").is_none());
    }

    #[test]
    fn a_file_is_rewritten_whole() {
        let file = tempfile::tempfile().unwrap();
        for text in ["longer\n", "short\n", "equal\n"] {
            rewrite(&file, text).unwrap();
            let mut now = [0; 64];
            let length = file.read_at(&mut now, 0).unwrap();
            assert_eq!(&now[..length], text.as_bytes());
        }
    }
}
