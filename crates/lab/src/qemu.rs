//! QEMU's command line, and the kernel and initramfs that it boots.

use crate::LabConfig;
use crate::unpack::unpacked;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use zygote_debian::initramfs::Initramfs;
use zygote_debian::kernel::{self, Flavour, Kernel, KernelError};

/// Modules of the emulated host, in no particular order.
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "virtio-rng",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm-amd",
];
const INIT: &str = include_str!("init.sh");
/// xz takes a tenth of a second a module.
const UNPACK_MAX_S: &str = "120";
/// The port by which a command in a kept lab is talked to.
pub const PORT_NAME: &str = "zygote.port";
const BUSYBOX: &str = "/bin/busybox";
/// Kernel parameters: no output but ours, a panic ends the lab, nothing that only costs time.
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nmi_watchdog=0 audit=0";

/// What the lab boots.
#[derive(Clone, Debug)]
pub struct LabFiles {
    /// The kernel's image.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
}

/// Why the lab's files cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// busybox.
    #[error("cannot read {BUSYBOX}; install it with: apt-get install busybox-static")]
    Busybox(#[source] io::Error),
    /// The initramfs.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// A kernel module.
    #[error("cannot unpack {}; install xz-utils", path.display())]
    Module {
        /// Which file.
        path: PathBuf,
    },
}

/// The lab's kernel and initramfs, from the cache folder or made now.
///
/// # Errors
/// If the kernel cannot be fetched or a file cannot be written.
pub fn prepare(cache: &Path, progress: &mut dyn FnMut(&str)) -> Result<LabFiles, PrepareError> {
    let kernel = kernel::fetch(&cache.join("kernels"), Flavour::Generic, progress)?;
    let program = env!("CARGO_PKG_VERSION");
    let folder = cache.join("lab");
    // The name tells what it was made of; another init or kernel gets another file.
    let name = format!(
        "initramfs-{}-{program}-{:08x}.cpio",
        kernel.release,
        checksum()
    );
    // What cannot be made is told by the first file that is created in it.
    let _ = fs::create_dir_all(&folder);
    let files = LabFiles {
        kernel: unpacked(&kernel.image, &kernel.release, &folder),
        initramfs: folder.join(&name),
    };
    if files.initramfs.exists() {
        return Ok(files);
    }
    progress("making the lab's initramfs");
    let fresh = folder.join(format!("{}-{name}", crate::unpack::fresh()));
    let written = File::create(&fresh).map_err(|source| PrepareError::Write {
        path: fresh.clone(),
        source,
    })?;
    let content = contents(&kernel)?;
    write(written, &content)
        .and_then(|()| fs::rename(&fresh, &files.initramfs))
        .map_err(|source| PrepareError::Write {
            path: fresh,
            source,
        })?;
    Ok(files)
}

/// FNV-1a over what this program puts into the initramfs.
fn checksum() -> u32 {
    let words = [INIT, PARAMETERS, &MODULES.concat()].concat();
    words.bytes().fold(0x811c_9dc5, |sum: u32, byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

struct Contents {
    busybox: Vec<u8>,
    modules: Vec<(String, Vec<u8>)>,
}

fn contents(kernel: &Kernel) -> Result<Contents, PrepareError> {
    let busybox = fs::read(BUSYBOX).map_err(PrepareError::Busybox)?;
    let mut modules = Vec::new();
    for path in kernel.modules(&MODULES)? {
        let refuse = || PrepareError::Module { path: path.clone() };
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        // busybox loads no compressed modules.
        let output = Command::new("timeout")
            .args([UNPACK_MAX_S, "xz", "-dc"])
            .arg(&path)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                modules.push((name.into_owned(), output.stdout));
            }
            _ => return Err(refuse()),
        }
    }
    Ok(Contents { busybox, modules })
}

fn write(file: File, contents: &Contents) -> io::Result<()> {
    let mut archive = Initramfs::new(BufWriter::new(file));
    let folders = [
        "bin", "dev", "proc", "sys", "modules", "layer", "host", "root",
    ];
    for folder in folders {
        archive.folder(folder)?;
    }
    archive.device("dev/console", 0o600, (5, 1))?;
    archive.file("bin/busybox", 0o755, &contents.busybox)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let mut order = String::new();
    for (name, content) in &contents.modules {
        archive.file(&format!("modules/{name}"), 0o644, content)?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish()?.flush()
}

/// The command that boots the lab. The job's socket is descriptor 0 of QEMU, that of the second port
/// is `port`; QEMU's own messages and the lab's console go to `console`.
pub fn command(config: &LabConfig, program: &Path, console: &Path, port: Option<RawFd>) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let acceleration = if config.icount {
        vec![
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
        ]
    } else {
        vec!["-accel", "tcg,thread=multi,tb-size=1024"]
    };
    let cpus = if config.icount { 1 } else { config.cpus };
    command
        .args(["-M", "q35", "-cpu", "max,+svm,-la57", "-smp"])
        .arg(cpus.to_string())
        .args(["-m", &config.memory_mib.to_string()])
        .args(acceleration)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(&config.files.kernel)
        .arg("-initrd")
        .arg(&config.files.initramfs)
        .arg("-append")
        .arg(parameters(program))
        .arg("-serial")
        .arg(join("file:", console))
        .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
        .args(["-chardev", "socket,id=job,fd=0"])
        .args(["-device", "virtserialport,chardev=job,name=zygote.lab"]);
    if let Some(port) = port {
        command
            .args(["-chardev", &format!("socket,id=port,fd={port}")])
            .args([
                "-device",
                &format!("virtserialport,chardev=port,name={PORT_NAME}"),
            ]);
    }
    share(&mut command, "root", Path::new("/"), true);
    for (index, folder) in config.writable.iter().enumerate() {
        share(&mut command, &tag(index), folder, false);
    }
    command
}

/// The tag of a folder shared for writing.
pub fn tag(index: usize) -> String {
    format!("share{index}")
}

fn share(command: &mut Command, tag: &str, path: &Path, read_only: bool) {
    let mut option = OsString::from("local,path=");
    option.push(escape_commas(path.as_os_str()));
    option.push(format!(
        ",mount_tag={tag},security_model=none,multidevs=remap"
    ));
    if read_only {
        option.push(",readonly=on");
    }
    command.arg("-virtfs").arg(option);
}

fn join(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(escape_commas(path.as_os_str()));
    text
}

/// QEMU's options separate by commas; a doubled one is a comma.
fn escape_commas(text: &OsStr) -> OsString {
    let mut bytes = Vec::new();
    for &byte in text.as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(byte);
        }
    }
    OsStr::from_bytes(&bytes).to_owned()
}

/// Kernel parameters, with the path of lab-init's program in a form that survives spaces.
fn parameters(program: &Path) -> String {
    let mut text = format!("{PARAMETERS} lab.program=");
    for &byte in program.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_paths_reach_the_lab_whole() {
        let text = parameters(Path::new("/a b/c\"d"));
        assert!(text.ends_with("lab.program=/a\\x20b/c\\x22d"));
        assert_eq!(escape_commas(OsStr::new("/a,b")), "/a,,b");
    }
}
