//! Packages of the Python Package Index: resolved and downloaded here for the guest's Python and
//! platform, installed into its root file system from those files alone. Nothing of them is run.

use super::contents::Wheel;
use super::error::{RootfsError, at};
use super::tools::{dependent, rooted, tool};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The guest's Python (Debian 12).
const PYTHON_VERSION: &str = "3.11";
/// The newest C library that wheels may be built for (PEP 600): Debian 12's.
const GLIBC_MINOR: u32 = 36;
/// Where Debian's Python looks for what does not come from Debian.
const PACKAGES: &str = "usr/local/lib/python3.11/dist-packages";
const PROGRAMS: &str = "usr/local/bin";
/// Where the interpreter lies in the guest.
const INTERPRETER: &str = "#!/usr/bin/python3\n";
/// What pip puts beside packages, and where it goes.
const BESIDE: [(&str, &str); 3] = [
    ("bin", PROGRAMS),
    ("share", "usr/local/share"),
    ("etc", "usr/local/etc"),
];

/// What is wanted.
pub struct Wanted<'a> {
    /// Requirement specifiers (PEP 508).
    pub requirements: &'a [String],
    /// The text of a file of such.
    pub file: Option<&'a str>,
}

impl Wanted<'_> {
    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty() && self.file.is_none()
    }
}

/// Installs what is wanted into `tree`; `work`: a folder of ours. Gives back what was installed.
pub fn install(
    wanted: &Wanted<'_>,
    tree: &Path,
    work: &Path,
    log: &Path,
) -> Result<Vec<Wheel>, RootfsError> {
    let found = unpack_into(wanted, tree, work, log)?;
    compile(tree, log)?;
    Ok(found)
}

/// The same, without byte code: `tree` need have nothing else.
pub fn unpack_into(
    wanted: &Wanted<'_>,
    tree: &Path,
    work: &Path,
    log: &Path,
) -> Result<Vec<Wheel>, RootfsError> {
    let python = python().ok_or(RootfsError::Missing {
        program: "pip",
        package: "python3-pip",
    })?;
    let wheels = work.join("wheels");
    download(&python, wanted, work, &wheels, log)?;
    let found = describe(&wheels)?;
    let target = work.join("target");
    unpack(&python, &found, &wheels, &target, log)?;
    place(&target, tree)?;
    Ok(found)
}

/// A Python of this host that has pip.
fn python() -> Option<PathBuf> {
    let candidates = ["python3", "/usr/bin/python3"].map(PathBuf::from);
    candidates.into_iter().find(|python| {
        let mut ask = Command::new(python);
        ask.args(["-m", "pip", "--version"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        ask.status().is_ok_and(|status| status.success())
    })
}

fn pip(python: &Path, verb: &str) -> Command {
    let mut command = dependent(&python.to_string_lossy());
    command
        .args([
            "-m",
            "pip",
            verb,
            "--disable-pip-version-check",
            "--no-input",
        ])
        .args(["--only-binary=:all:", "--implementation=cp"])
        .arg(format!("--python-version={PYTHON_VERSION}"))
        .arg("--platform=linux_x86_64");
    // pip knows older platforms of the first three only.
    for platform in ["manylinux1", "manylinux2010", "manylinux2014"] {
        command.arg(format!("--platform={platform}_x86_64"));
    }
    for minor in (5..=GLIBC_MINOR).rev() {
        command.arg(format!("--platform=manylinux_2_{minor}_x86_64"));
    }
    command
}

fn download(
    python: &Path,
    wanted: &Wanted<'_>,
    work: &Path,
    wheels: &Path,
    log: &Path,
) -> Result<(), RootfsError> {
    let mut command = pip(python, "download");
    command.arg("--dest").arg(wheels);
    if let Some(text) = wanted.file {
        let path = work.join("requirements.txt");
        fs::write(&path, text).map_err(at("write", &path))?;
        command.arg("--requirement").arg(path);
    }
    command.args(wanted.requirements);
    tool(command, "pip", "python3-pip", log).map_err(|error| not_found(error, log))
}

/// pip's complaint about a package that does not exist, or not for the guest, in one line.
fn not_found(error: RootfsError, log: &Path) -> RootfsError {
    let text = fs::read_to_string(log).unwrap_or_default();
    let wanted = text
        .lines()
        .find_map(|line| line.strip_prefix("ERROR: No matching distribution found for "));
    match wanted {
        Some(wanted) => RootfsError::NoPackage {
            what: format!(
                "the Python Package Index has no wheel of {} for Python {PYTHON_VERSION} on x86-64 Linux",
                wanted.trim()
            ),
            log: log.to_owned(),
        },
        None => error,
    }
}

/// What has been downloaded.
fn describe(wheels: &Path) -> Result<Vec<Wheel>, RootfsError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(wheels).map_err(at("read", wheels))?.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        // {distribution}-{version}(-{build})?-{python}-{abi}-{platform}.whl
        let mut parts = file.split('-');
        if let (Some(name), Some(version)) = (parts.next(), parts.next()) {
            let (name, version) = (name.to_owned(), version.to_owned());
            let mut hasher = Sha256::new();
            let path = entry.path();
            let copied = File::open(&path).and_then(|mut file| io::copy(&mut file, &mut hasher));
            copied.map_err(at("read", &path))?;
            let digest = hasher.finalize();
            found.push(Wheel {
                name,
                version,
                file,
                sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            });
        }
    }
    found.sort();
    Ok(found)
}

/// From the files alone, each of the digest that was recorded.
fn unpack(
    python: &Path,
    found: &[Wheel],
    wheels: &Path,
    target: &Path,
    log: &Path,
) -> Result<(), RootfsError> {
    let lock = wheels.join("lock.txt");
    let lines: String = found
        .iter()
        .map(|wheel| {
            format!(
                "{}=={} --hash=sha256:{}\n",
                wheel.name, wheel.version, wheel.sha256
            )
        })
        .collect();
    fs::write(&lock, lines).map_err(at("write", &lock))?;
    let mut command = pip(python, "install");
    command
        .args([
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--require-hashes",
        ])
        .arg("--find-links")
        .arg(wheels)
        .arg("--target")
        .arg(target)
        .arg("--requirement")
        .arg(&lock);
    tool(command, "pip", "python3-pip", log)
}

/// Moves what pip has unpacked to where the guest looks for it.
fn place(target: &Path, tree: &Path) -> Result<(), RootfsError> {
    for (name, place) in BESIDE {
        let source = target.join(name);
        if source.is_dir() && !source.join("__init__.py").exists() {
            merge(&source, &tree.join(place))?;
        }
    }
    let programs = tree.join(PROGRAMS);
    for entry in fs::read_dir(&programs).into_iter().flatten().flatten() {
        lead_to_the_guests_interpreter(&entry.path())?;
    }
    merge(target, &tree.join(PACKAGES))
}

/// Moves all that lies in one folder into another; what is there already stays.
fn merge(source: &Path, dest: &Path) -> Result<(), RootfsError> {
    fs::create_dir_all(dest).map_err(at("make the folder", dest))?;
    for entry in fs::read_dir(source).map_err(at("read", source))? {
        let from = entry.map_err(at("read", source))?.path();
        let to = dest.join(from.file_name().unwrap_or_default());
        if from.is_dir() && to.is_dir() {
            merge(&from, &to)?;
        } else {
            fs::rename(&from, &to).map_err(at("move", &from))?;
        }
    }
    fs::remove_dir(source).map_err(at("remove", source))
}

/// Scripts name the interpreter of this host in their first line.
fn lead_to_the_guests_interpreter(script: &Path) -> Result<(), RootfsError> {
    let bytes = fs::read(script).map_err(at("read", script))?;
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return Ok(());
    };
    let first = String::from_utf8_lossy(&bytes[..end]);
    if first.starts_with("#!") && first.contains("python") {
        let text = [INTERPRETER.as_bytes(), &bytes[end + 1..]].concat();
        fs::write(script, text).map_err(at("write", script))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(script, mode).map_err(at("write", script))?;
    }
    Ok(())
}

/// What makes byte code by the guest's own Python, that is believed without looking at the source again.
pub fn compiler() -> [String; 6] {
    let folder = format!("/{PACKAGES}");
    let words = [
        "/usr/bin/python3",
        "-m",
        "compileall",
        "-q",
        "--invalidation-mode=unchecked-hash",
        &folder,
    ];
    words.map(str::to_owned)
}

fn compile(tree: &Path, log: &Path) -> Result<(), RootfsError> {
    let mut command = rooted("chroot");
    command.arg(tree).args(compiler());
    match tool(command, "compileall", "python3", log) {
        // Some packages bring files for other versions of the language.
        Err(RootfsError::Tool { .. }) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_placed_where_the_guest_finds_them_and_lead_to_its_python() {
        let folder = tempfile::tempdir().unwrap();
        let (target, tree) = (folder.path().join("target"), folder.path().join("tree"));
        for path in ["bin", "pack", "share/man"] {
            fs::create_dir_all(target.join(path)).unwrap();
        }
        fs::create_dir_all(tree.join("usr/local/share/man")).unwrap();
        fs::write(target.join("pack/__init__.py"), "1").unwrap();
        fs::write(target.join("share/man/x"), "2").unwrap();
        fs::write(
            target.join("bin/tool"),
            "#!/some/where/python3.12\nprint(1)\n",
        )
        .unwrap();
        fs::write(target.join("bin/native"), b"\x7fELF\n\xff").unwrap();
        place(&target, &tree).unwrap();
        let tool = fs::read_to_string(tree.join("usr/local/bin/tool")).unwrap();
        assert_eq!(tool, "#!/usr/bin/python3\nprint(1)\n");
        let native = fs::read(tree.join("usr/local/bin/native")).unwrap();
        assert_eq!(native, b"\x7fELF\n\xff");
        assert!(tree.join(PACKAGES).join("pack/__init__.py").exists());
        assert!(tree.join("usr/local/share/man/x").exists());
        assert!(!target.exists());
    }

    /// Makes a wheel (binary distribution format, version 1.0) with the tools of this host.
    const MAKE_WHEEL: &str = r#"
import sys, zipfile
info = "zygote_test-1.0.dist-info/"
with zipfile.ZipFile(sys.argv[1] + "/zygote_test-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("zygote_test.py", "def main(): print('here')")
    wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: zygote-test\nVersion: 1.0\n")
    wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(info + "entry_points.txt", "[console_scripts]\nzt = zygote_test:main\n")
    wheel.writestr(info + "RECORD", "")
"#;

    #[test]
    fn what_is_wanted_is_taken_as_wheels_recorded_and_installed_from_those_files() {
        let folder = tempfile::tempdir().unwrap();
        let (work, tree) = (folder.path().join("work"), folder.path().join("tree"));
        let log = folder.path().join("log");
        fs::create_dir(&work).unwrap();
        let made = Command::new("/usr/bin/python3")
            .args(["-c", MAKE_WHEEL])
            .arg(folder.path())
            .status();
        assert!(made.unwrap().success());
        let links = format!("--no-index\n--find-links {}\n", folder.path().display());
        let wanted = |name: &str| format!("{links}{name}\n");
        let python = python().unwrap();
        let fetch = |text: &str, wheels: &Path| {
            let wanted = Wanted {
                requirements: &[],
                file: Some(text),
            };
            download(&python, &wanted, &work, wheels, &log)
        };
        let wheels = work.join("wheels");
        fetch(&wanted("zygote-test>=1"), &wheels).unwrap();
        let found = describe(&wheels).unwrap();
        assert_eq!(
            (found[0].name.as_str(), found[0].version.as_str()),
            ("zygote_test", "1.0")
        );
        assert_eq!(found[0].sha256.len(), 64);
        let target = work.join("target");
        unpack(&python, &found, &wheels, &target, &log).unwrap();
        place(&target, &tree).unwrap();
        assert!(tree.join(PACKAGES).join("zygote_test.py").exists());
        let script = fs::read_to_string(tree.join("usr/local/bin/zt")).unwrap();
        assert!(script.starts_with(INTERPRETER), "{script}");
        // A file that is not what was recorded is not installed.
        let mut changed = found.clone();
        changed[0].sha256 = "0".repeat(64);
        assert!(unpack(&python, &changed, &wheels, &target, &log).is_err());
        let missing = fetch(&wanted("no-such-package"), &work.join("others"));
        let sentence = missing.unwrap_err().to_string();
        assert!(
            sentence.contains("no wheel of no-such-package"),
            "{sentence}"
        );
    }

    #[test]
    fn what_does_not_exist_is_the_first_word_of_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let words = "ERROR: Could not find a version that satisfies the requirement nope==9 (from versions: none)\n\
                     ERROR: No matching distribution found for nope==9\n";
        fs::write(&log, words).unwrap();
        let error = RootfsError::Missing {
            program: "pip",
            package: "python3-pip",
        };
        let error = not_found(error, &log).to_string();
        assert!(
            error.contains("no wheel of nope==9 for Python 3.11"),
            "{error}"
        );
    }
}
