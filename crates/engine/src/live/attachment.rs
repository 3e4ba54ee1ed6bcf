//! Somebody's view of a process's output.

use super::limits::READER_WINDOW_BYTES;
use super::process::Piece;
use tokio::sync::mpsc;
use zygote_protocol::{CellEvent, ProcessId, ReaderId};

/// What readers tell the owner; small, and as many as they have read windows.
#[derive(Debug)]
pub enum Notice {
    /// A reader may be sent more.
    More {
        process: ProcessId,
        reader: ReaderId,
        limit: u64,
    },
    /// What a context has displayed has been passed on.
    Shown { process: ProcessId },
    /// A reader has gone.
    Gone {
        process: ProcessId,
        reader: ReaderId,
    },
}

/// A process's output from an offset on. Who does not read it holds the process up, or misses some, as
/// was asked for.
pub struct Attachment {
    /// Which process.
    pub process: ProcessId,
    pub(super) reader: ReaderId,
    pub(super) pieces: mpsc::UnboundedReceiver<Piece>,
    pub(super) notices: mpsc::UnboundedSender<Notice>,
    /// Up to where has been taken.
    pub(super) at: u64,
    /// Up to where the guest may send.
    pub(super) limit: u64,
}

impl Attachment {
    /// The next piece; nothing comes after [`Piece::End`] and [`Piece::Lost`].
    pub async fn next(&mut self) -> Piece {
        let Some(piece) = self.pieces.recv().await else {
            return Piece::Lost;
        };
        match &piece {
            Piece::Output { offset, data, .. } => self.at = offset + data.len() as u64,
            Piece::Skipped { to, .. } => self.at = *to,
            Piece::Cell(CellEvent::Display { .. }) => {
                let process = self.process;
                let _ = self.notices.send(Notice::Shown { process });
                return piece;
            }
            Piece::Cell(_) | Piece::End | Piece::Lost => return piece,
        }
        if self.limit.saturating_sub(self.at) < READER_WINDOW_BYTES / 2 {
            self.limit = self.at.saturating_add(READER_WINDOW_BYTES);
            let (process, reader, limit) = (self.process, self.reader, self.limit);
            // The owner has gone: it has said so.
            let _ = self.notices.send(Notice::More {
                process,
                reader,
                limit,
            });
        }
        piece
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let (process, reader) = (self.process, self.reader);
        let _ = self.notices.send(Notice::Gone { process, reader });
    }
}
