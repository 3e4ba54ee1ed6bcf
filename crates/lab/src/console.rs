//! What a lab's console and its QEMU say: a file that lives as long as the lab, and is quoted when
//! the lab breaks down.

use crate::{LabConfig, LabError};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Lines of the lab's console that go into an error.
const LINES_MAX: usize = 60;

/// The file; dropped, it goes.
pub struct Console {
    path: PathBuf,
}

impl Console {
    /// Makes the file, beside the lab's initramfs.
    pub fn create(config: &LabConfig) -> Result<(Self, File), LabError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = config.files.initramfs.parent().unwrap_or(Path::new("/"));
        sweep(folder);
        let path = folder.join(format!("console-{}-{number}.log", std::process::id()));
        let file = File::create(&path).map_err(|source| LabError::Console {
            path: path.clone(),
            source,
        })?;
        Ok((Self { path }, file))
    }

    /// For QEMU.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its last lines.
    pub fn tail(&self) -> String {
        let text = fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(LINES_MAX)..].join("\n")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the files of labs whose process was killed.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix("console-")
            .and_then(|rest| rest.split(['-', '.']).next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
