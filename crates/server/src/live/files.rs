//! Files of a live sandbox. Each request is a task in its guest, whose streams are the file's: nothing is
//! kept here, and who is slow slows only that.

use super::errno;
use super::words::{live_failure, lost};
use crate::answer::json;
use crate::lines::{Pieces, object};
use crate::local::printable;
use crate::stream::{EVENTS_MAX, Form, answer_at_once};
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use std::sync::Arc;
use tokio::sync::mpsc;
use zygote_api::{
    Done, ErrorCode, Failure, FileAction, FileEvent, FileInfo, FileList, FileType, Octets,
    from_base64, rfc3339,
};
use zygote_engine::live::{Attachment, Piece, ProcessSpec, ProcessState, Sandbox};
use zygote_engine::{
    ExitStatus, FileAnswer, FileChange, FileEntry, FileFailure, FileKind, FileTask,
    STREAM_CHUNK_MAX_BYTES, Stream, WriteHow, take_answer,
};

/// Most that is listed.
const ENTRIES_MAX: usize = 100_000;
/// Longest failure of a task.
const FAILURE_MAX_BYTES: usize = 64 * 1024;

/// A task in a guest.
struct Task {
    sandbox: Arc<Sandbox>,
    process: u32,
    output: Attachment,
    failure: Vec<u8>,
}

impl Task {
    async fn begin(
        sandbox: Arc<Sandbox>,
        task: FileTask,
        user: &str,
        has_input: bool,
    ) -> Result<Self, Failure> {
        let spec = ProcessSpec {
            command: vec![b"files".to_vec()],
            task: Some(task),
            user: user.to_owned(),
            stdin: has_input,
            follow: true,
            ..ProcessSpec::default()
        };
        let started = sandbox.start(spec).await;
        let (info, output) = started.map_err(|error| live_failure(&error))?;
        let output = output.ok_or_else(|| Failure::internal("a task without output"))?;
        Ok(Self {
            sandbox,
            process: info.id,
            output,
            failure: Vec::new(),
        })
    }

    /// The next bytes of its output; `None` at its good end.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            match self.output.next().await {
                Piece::Output {
                    stream: Stream::Stdout,
                    data,
                    ..
                } => return Ok(Some(data)),
                Piece::Output { data, .. } => {
                    self.failure.extend(data);
                    self.failure.truncate(FAILURE_MAX_BYTES);
                }
                Piece::End => return self.ended().map(|()| None),
                Piece::Lost => return Err(lost(&self.sandbox)),
                Piece::Cell(_) | Piece::Skipped { .. } => {}
            }
        }
    }

    fn ended(&mut self) -> Result<(), Failure> {
        if let Ok(Some(failure)) = take_answer::<FileFailure>(&mut self.failure) {
            return Err(told_failure(&failure));
        }
        let info = self.sandbox.process(self.process);
        let info = info.map_err(|error| live_failure(&error))?;
        match info.state {
            ProcessState::Ended {
                status: ExitStatus::Code(0),
                ..
            } => Ok(()),
            ProcessState::Ended { status, .. } => Err(Failure::new(
                ErrorCode::FileFailed,
                format!("the task in the guest was ended ({status:?})"),
            )),
            _ => Err(lost(&self.sandbox)),
        }
    }

    /// Gives it a body as its input, which ends only if the body is whole.
    async fn feed(&self, body: Body) -> Result<(), Failure> {
        let mut body = Pieces::new(body);
        while let Some(piece) = body.next().await? {
            for chunk in piece.chunks(STREAM_CHUNK_MAX_BYTES) {
                let given = self.sandbox.input(self.process, chunk.to_vec()).await;
                if given.is_err() {
                    // It has ended, and tells why.
                    return Ok(());
                }
            }
        }
        let _ = self.sandbox.end_input(self.process).await;
        Ok(())
    }

    /// Its next answer; `None` at its good end.
    async fn answer(&mut self, buffer: &mut Vec<u8>) -> Result<Option<FileAnswer>, Failure> {
        loop {
            let taken = take_answer(buffer);
            if let Some(answer) = taken.map_err(|_| nonsense())? {
                return Ok(Some(answer));
            }
            match self.next().await? {
                Some(data) => buffer.extend(data),
                None if buffer.is_empty() => return Ok(None),
                None => return Err(nonsense()),
            }
        }
    }

    /// All that it tells of.
    async fn entries(mut self) -> Result<Vec<FileInfo>, Failure> {
        let (mut buffer, mut all) = (Vec::new(), Vec::new());
        while let Some(answer) = self.answer(&mut buffer).await? {
            if let FileAnswer::Entry(entry) = answer {
                all.push(file_info(entry));
            }
            if all.len() > ENTRIES_MAX {
                let message = format!("over {ENTRIES_MAX} files and folders");
                let failure = Failure::new(ErrorCode::TooLarge, message);
                return Err(failure.remedy("list with less depth"));
            }
        }
        Ok(all)
    }

    async fn entry(self) -> Result<FileInfo, Failure> {
        let last = self.entries().await?.pop();
        last.ok_or_else(nonsense)
    }
}

fn nonsense() -> Failure {
    Failure::new(
        ErrorCode::FileFailed,
        "the guest sent nonsense about a file",
    )
}

fn told_failure(failure: &FileFailure) -> Failure {
    let code = match failure.errno {
        errno::NOT_FOUND => ErrorCode::FileNotFound,
        _ => ErrorCode::FileFailed,
    };
    let told = Failure::new(code, printable(&failure.message));
    match errno::name(failure.errno) {
        Some("ENOSPC") => told.cause("ENOSPC").remedy(
            "files take up to half of the guest's memory: remove some, or build the template with more",
        ),
        Some(name) => told.cause(name),
        None => told,
    }
}

pub fn file_info(entry: FileEntry) -> FileInfo {
    let modified = u64::try_from(entry.modified_ns / 1_000_000_000).unwrap_or(0);
    FileInfo {
        path: entry.path.into(),
        kind: match entry.kind {
            FileKind::File => FileType::File,
            FileKind::Folder => FileType::Folder,
            FileKind::Link => FileType::Link,
            FileKind::Other => FileType::Other,
        },
        bytes: entry.bytes,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        modified: rfc3339(modified),
        modified_unix_s: modified,
        target: entry.target.map(Into::into),
    }
}

/// A path of a query; one that is not UTF-8 comes as `path_base64`.
fn path(text: &str, base64: Option<&str>) -> Result<Vec<u8>, Failure> {
    match base64 {
        None => checked(text.as_bytes().to_vec()),
        Some(_) if text.contains('\0') => checked(text.as_bytes().to_vec()),
        Some(base64) => {
            let path = from_base64(base64);
            checked(path.ok_or_else(|| Failure::bad_request("path_base64: it is no base64"))?)
        }
    }
}

fn checked(path: Vec<u8>) -> Result<Vec<u8>, Failure> {
    if path.is_empty() || path.contains(&0) {
        return Err(Failure::bad_request("path: not empty, and without a NUL"));
    }
    Ok(path)
}

/// `GET …/files`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReadAsked {
    path: String,
    path_base64: Option<String>,
    offset: u64,
    length: Option<u64>,
    user: String,
}

/// Reads a file; with the header `range`, a part of it (RFC 9110 §14).
pub async fn read(
    sandbox: Arc<Sandbox>,
    asked: ReadAsked,
    headers: &HeaderMap,
) -> Result<Response, Failure> {
    let name = path(&asked.path, asked.path_base64.as_deref())?;
    let range = headers
        .get(header::RANGE)
        .and_then(|range| range.to_str().ok());
    let (mut offset, mut length, mut part) = (asked.offset, asked.length, None);
    if let Some(range) = range {
        let stat = FileTask::Stat {
            path: name.clone(),
            follow: true,
        };
        let stat = Task::begin(Arc::clone(&sandbox), stat, &asked.user, false).await?;
        let total = stat.entry().await?.bytes;
        let Some((first, last)) = within(range, total) else {
            let mut response = StatusCode::RANGE_NOT_SATISFIABLE.into_response();
            if let Ok(value) = format!("bytes */{total}").parse() {
                response.headers_mut().insert(header::CONTENT_RANGE, value);
            }
            return Ok(response);
        };
        (offset, length) = (first, Some(last + 1 - first));
        part = Some(format!("bytes {first}-{last}/{total}"));
    }
    let task = FileTask::Read {
        path: name,
        offset,
        length,
    };
    let task = Task::begin(sandbox, task, &asked.user, false).await?;
    let mut response = bytes(task, "application/octet-stream").await?;
    if let Some(value) = part.and_then(|part| part.parse().ok()) {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    Ok(response)
}

/// The first and the last byte of a range; `None` if there is none of it, or several.
fn within(range: &str, total: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match (first.trim(), last.trim()) {
        ("", count) => (total.saturating_sub(count.parse().ok()?), total),
        (first, "") => (first.parse().ok()?, total),
        (first, last) => (
            first.parse().ok()?,
            last.parse::<u64>().ok()?.checked_add(1)?,
        ),
    };
    let last = last.min(total);
    (first < last).then(|| (first, last - 1))
}

/// A task's output as a body. A failure before the first byte is the answer's; a later one breaks it off.
async fn bytes(mut task: Task, kind: &'static str) -> Result<Response, Failure> {
    let first = task.next().await?;
    let is_over = first.is_none();
    let state = (task, first, is_over);
    let pieces = stream::unfold(state, |(mut task, first, is_over)| async move {
        if let Some(first) = first {
            return Some((Ok(Bytes::from(first)), (task, None, is_over)));
        }
        if is_over {
            return None;
        }
        match task.next().await {
            Ok(Some(data)) => Some((Ok(data.into()), (task, None, false))),
            Ok(None) => None,
            Err(failure) => Some((Err(failure), (task, None, true))),
        }
    });
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// `PUT …/files`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WriteAsked {
    path: String,
    path_base64: Option<String>,
    /// Octal, as chmod(1) has it.
    mode: Option<String>,
    append: bool,
    /// Into what is there, which others see while it is written.
    in_place: bool,
    parents: bool,
    user: String,
}

/// Writes a file; gives back what is there then.
pub async fn write(
    sandbox: Arc<Sandbox>,
    asked: WriteAsked,
    body: Body,
) -> Result<Response, Failure> {
    let mode = asked
        .mode
        .as_deref()
        .map(|text| u32::from_str_radix(text, 8));
    let mode = mode
        .transpose()
        .ok()
        .filter(|mode| mode.is_none_or(|mode| mode <= 0o7777));
    let task = FileTask::Write {
        path: path(&asked.path, asked.path_base64.as_deref())?,
        mode: mode.ok_or_else(|| Failure::bad_request("mode: octal, such as 644"))?,
        how: match (asked.append, asked.in_place) {
            (true, _) => WriteHow::Append,
            (false, true) => WriteHow::Truncate,
            (false, false) => WriteHow::Replace,
        },
        parents: asked.parents,
    };
    let task = Task::begin(sandbox, task, &asked.user, true).await?;
    // Broken off, the task is dropped, and with it what it has not given a name.
    task.feed(body).await?;
    Ok(json(&task.entry().await?))
}

/// Whose task it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AsUser {
    user: String,
}

/// `POST …/files`.
pub async fn act(sandbox: Arc<Sandbox>, asked: AsUser, body: Body) -> Result<Response, Failure> {
    let of = |path: Octets| checked(path.0);
    let (task, is_list) = match object(body).await? {
        FileAction::Stat { path, no_follow } => {
            let (path, follow) = (of(path)?, !no_follow);
            (FileTask::Stat { path, follow }, false)
        }
        FileAction::List { path, depth } => {
            let (path, depth) = (of(path)?, depth.max(1));
            (FileTask::List { path, depth }, true)
        }
        FileAction::Mkdir {
            path,
            mode,
            parents,
        } => {
            let path = of(path)?;
            (
                FileTask::MakeFolder {
                    path,
                    mode,
                    parents,
                },
                false,
            )
        }
        FileAction::Move { path, to, replace } => {
            let (from, to) = (of(path)?, of(to)?);
            (FileTask::Move { from, to, replace }, false)
        }
        FileAction::Remove { path, recursive } => {
            let path = of(path)?;
            (FileTask::Remove { path, recursive }, false)
        }
        FileAction::Chmod { path, mode } => {
            let path = of(path)?;
            (FileTask::Chmod { path, mode }, false)
        }
        FileAction::Chown { path, owner } => {
            let (path, user) = (of(path)?, owner);
            (FileTask::Chown { path, user }, false)
        }
        FileAction::Symlink { path, target } => {
            let (path, target) = (of(path)?, of(target)?);
            (FileTask::Link { path, target }, false)
        }
    };
    let wants_entry = matches!(task, FileTask::Stat { .. });
    let task = Task::begin(sandbox, task, &asked.user, false).await?;
    if is_list {
        let files = task.entries().await?;
        return Ok(json(&FileList { files }));
    }
    if wants_entry {
        return Ok(json(&task.entry().await?));
    }
    task.entries().await?;
    Ok(json(&Done { done: true }))
}

/// A path alone.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PathAsked {
    path: String,
    path_base64: Option<String>,
    recursive: bool,
    user: String,
}

/// `DELETE …/files`.
pub async fn remove(sandbox: Arc<Sandbox>, asked: PathAsked) -> Result<Response, Failure> {
    let task = FileTask::Remove {
        path: path(&asked.path, asked.path_base64.as_deref())?,
        recursive: asked.recursive,
    };
    let task = Task::begin(sandbox, task, &asked.user, false).await?;
    task.entries().await?;
    Ok(json(&Done { done: true }))
}

/// `GET …/tar`.
pub async fn pack(sandbox: Arc<Sandbox>, asked: PathAsked) -> Result<Response, Failure> {
    let path = path(&asked.path, asked.path_base64.as_deref())?;
    let task = Task::begin(sandbox, FileTask::Pack { path }, &asked.user, false).await?;
    bytes(task, "application/x-tar").await
}

/// `PUT …/tar`.
pub async fn unpack(
    sandbox: Arc<Sandbox>,
    asked: PathAsked,
    body: Body,
) -> Result<Response, Failure> {
    let path = path(&asked.path, asked.path_base64.as_deref())?;
    let task = Task::begin(sandbox, FileTask::Unpack { path }, &asked.user, true).await?;
    task.feed(body).await?;
    task.entries().await?;
    Ok(json(&Done { done: true }))
}

/// `GET …/watch`.
pub async fn watch(
    sandbox: Arc<Sandbox>,
    asked: PathAsked,
    form: Form,
) -> Result<Response, Failure> {
    let task = FileTask::Watch {
        path: path(&asked.path, asked.path_base64.as_deref())?,
        recursive: asked.recursive,
    };
    let mut task = Task::begin(sandbox, task, &asked.user, false).await?;
    let mut buffer = Vec::new();
    // Whether it can be watched at all is the answer's to tell.
    let first = task.answer(&mut buffer).await?.ok_or_else(nonsense)?;
    let (events, happening) = mpsc::channel(EVENTS_MAX);
    let work = Box::pin(async move {
        let mut next = Some(first);
        while let Some(answer) = next {
            if let Some(event) = event(answer) {
                // Who does not listen any more drops this.
                let _ = events.send(event).await;
            }
            next = task.answer(&mut buffer).await?;
        }
        Ok(None)
    });
    let form = if form == Form::Json {
        Form::Lines
    } else {
        form
    };
    Ok(answer_at_once(form, work, happening, |error| {
        FileEvent::Error { error }
    }))
}

fn event(answer: FileAnswer) -> Option<FileEvent> {
    let (path, folder, change) = match answer {
        FileAnswer::Entry(_) => return None,
        FileAnswer::Watching => return Some(FileEvent::Watching),
        FileAnswer::Change {
            path,
            is_folder,
            change,
        } => (Octets::from(path), is_folder, change),
    };
    Some(match change {
        FileChange::Created => FileEvent::Created { path, folder },
        FileChange::Written => FileEvent::Written { path },
        FileChange::Attributes => FileEvent::Attributes { path, folder },
        FileChange::Removed => FileEvent::Removed { path, folder },
        FileChange::Renamed { to } => FileEvent::Renamed {
            path,
            to: to.into(),
            folder,
        },
        FileChange::Overflow => FileEvent::Overflow,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_http() {
        assert_eq!(within("bytes=0-9", 100), Some((0, 9)));
        assert_eq!(within("bytes=90-200", 100), Some((90, 99)));
        assert_eq!(within("bytes=90-", 100), Some((90, 99)));
        assert_eq!(within("bytes=-10", 100), Some((90, 99)));
        assert_eq!(within("bytes=-1000", 100), Some((0, 99)));
        for bad in [
            "bytes=100-",
            "bytes=5-4",
            "bytes=a-b",
            "lines=1-2",
            "bytes=-0",
            "bytes=1-2,4-5",
        ] {
            assert_eq!(within(bad, 100), None, "{bad}");
        }
    }
}
