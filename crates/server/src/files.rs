//! Files that were asked for, collected into an answer that is one object.

use sha2::{Digest, Sha256};
use zygote_api::{GetPiece, GotFile, Octets};

/// Most content that is kept in one answer; of more, length and digest are told.
const KEPT_MAX_BYTES: u64 = 64 << 20;

/// What has come so far.
pub struct Files {
    /// As asked for.
    asked: Vec<Octets>,
    files: Vec<GotFile>,
    open: Option<Open>,
    kept_bytes: u64,
}

/// A file that comes.
struct Open {
    path: Octets,
    bytes: u64,
    hasher: Sha256,
    content: Option<Vec<u8>>,
}

impl Files {
    /// Of these.
    pub fn new(asked: Vec<Octets>) -> Self {
        Self {
            asked,
            files: Vec::new(),
            open: None,
            kept_bytes: 0,
        }
    }

    /// The next piece of one of them.
    pub fn take(&mut self, index: usize, piece: GetPiece) {
        if let GetPiece::Data { data } = piece {
            self.data(&data.0);
            return;
        }
        self.close();
        match piece {
            GetPiece::File { path, .. } => {
                self.open = Some(Open {
                    path: self.full(index, &path),
                    bytes: 0,
                    hasher: Sha256::new(),
                    content: Some(Vec::new()),
                });
            }
            GetPiece::Failed { error } => self.files.push(GotFile {
                path: self.full(index, &Octets::default()),
                error: Some(error),
                ..GotFile::default()
            }),
            GetPiece::Data { .. }
            | GetPiece::Folder { .. }
            | GetPiece::Link { .. }
            | GetPiece::End => {}
        }
    }

    fn data(&mut self, data: &[u8]) {
        let Some(open) = &mut self.open else { return };
        open.bytes += data.len() as u64;
        open.hasher.update(data);
        if self.kept_bytes + open.bytes > KEPT_MAX_BYTES {
            open.content = None;
        }
        if let Some(content) = &mut open.content {
            content.extend_from_slice(data);
        }
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if open.content.is_some() {
            self.kept_bytes += open.bytes;
        }
        let digest = open.hasher.finalize();
        self.files.push(GotFile {
            path: open.path,
            bytes: open.bytes,
            sha256: Some(digest.iter().map(|byte| format!("{byte:02x}")).collect()),
            content: open.content.map(Into::into),
            error: None,
        });
    }

    fn full(&self, index: usize, path: &Octets) -> Octets {
        let asked = self.asked.get(index).cloned().unwrap_or_default();
        if path.0.is_empty() {
            return asked;
        }
        [&asked.0[..], b"/", &path.0[..]].concat().into()
    }

    /// All of them.
    pub fn end(mut self) -> Vec<GotFile> {
        self.close();
        self.files
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zygote_api::{ErrorCode, Failure};

    #[test]
    fn files_of_folders_have_whole_paths_and_what_failed_is_told() {
        let mut files = Files::new(vec!["out".into(), "nope".into()]);
        let (path, mode) = (Octets::from("sub/a"), 0o644);
        let folder = Octets::from("sub");
        files.take(0, GetPiece::Folder { path: folder, mode });
        let bytes = 3;
        files.take(0, GetPiece::File { path, mode, bytes });
        files.take(0, GetPiece::Data { data: "ab".into() });
        files.take(0, GetPiece::Data { data: "c".into() });
        files.take(0, GetPiece::End);
        let error = Failure::new(ErrorCode::GetFailed, "no such file");
        files.take(1, GetPiece::Failed { error });
        let files = files.end();
        assert_eq!(files[0].path, "out/sub/a".into());
        assert_eq!(files[0].content, Some("abc".into()));
        let digest = files[0].sha256.as_deref().unwrap();
        assert!(digest.starts_with("ba7816bf"), "{digest}");
        assert_eq!(files[1].path, "nope".into());
        assert!(files[1].error.is_some());
    }

    #[test]
    fn of_too_much_only_length_and_digest_are_told() {
        let mut files = Files::new(vec!["big".into()]);
        let path = Octets::default();
        let (mode, bytes) = (0o644, 0);
        files.take(0, GetPiece::File { path, mode, bytes });
        let data = vec![1; 1 << 20];
        for _ in 0..65 {
            let data = data.clone().into();
            files.take(0, GetPiece::Data { data });
        }
        let files = files.end();
        assert_eq!((files[0].bytes, &files[0].content), (65 << 20, &None));
        assert!(files[0].sha256.is_some());
    }
}
