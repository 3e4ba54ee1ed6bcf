//! The part of the description that is about sandboxes that live.

#![expect(dead_code, reason = "describes routes")]

use zygote_api::*;

/// Makes a sandbox that lives until it is ended. With application/x-ndjson or text/event-stream
/// accepted, the answer is a stream of `CreateEvent`.
#[utoipa::path(post, path = "/v1/sandboxes", request_body = SandboxRequest,
    params(("idempotency-key" = Option<String>, Header,
        description = "The same request with the same key makes one sandbox")),
    responses((status = 200, content((SandboxInfo = "application/json"),
        (CreateEvent = "application/x-ndjson"), (CreateEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
pub fn create() {}

/// Sandboxes, a page of them.
#[utoipa::path(get, path = "/v1/sandboxes",
    params(("state" = Option<String>, Query, description = "making, running, paused, ending, \
        ended or all; without, those that have not ended"),
        ("template" = Option<String>, Query, description = "Only of this template"),
        ("name" = Option<String>, Query, description = "Only of this name"),
        ("limit" = Option<usize>, Query, description = "At most so many, up to 1000"),
        ("after" = Option<String>, Query, description = "`next` of the page before")),
    responses((status = 200, body = SandboxList), (status = "default", body = ErrorBody)))]
pub fn list() {}

/// A sandbox, by its id, the beginning or end of that, or its name.
#[utoipa::path(get, path = "/v1/sandboxes/{id}",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn inspect() {}

/// Ends it.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn end() {}

/// Gives it another time to live, or idle time.
#[utoipa::path(patch, path = "/v1/sandboxes/{id}", request_body = SandboxChange,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn change() {}

/// Waits for its end.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/wait",
    params(("id" = String, Path, description = "Id or name"),
        ("timeout_seconds" = Option<f64>, Query, description = "How long; then it is told as it is")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn wait() {}

/// What it takes of the host.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/stats",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxStats), (status = "default", body = ErrorBody)))]
pub fn stats() {}

/// What differs between two moments: files, and pages of memory. It stands still for about a millisecond; forks
/// are looked at, whose processes never run. `/etc/hostname`, `/etc/hosts` and `/etc/machine-id` are left out.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/diff", request_body = DiffRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = Diff), (status = "default", body = ErrorBody)))]
pub fn diff() {}

/// Makes a template of it, as it is now or as it was at a moment that is kept: on disk, where it outlives the
/// sandbox. Sandboxes of it begin there, with its files and its processes.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/template", request_body = PublishRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = Built), (status = "default", body = ErrorBody)))]
pub fn publish() {}

/// Makes children of it that go on where it is: with its memory, its files, its processes, each in the middle
/// of what it does. It stands still for that, for about a millisecond, and goes on.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/branch", request_body = BranchRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = Branched), (status = "default", body = ErrorBody)))]
pub fn branch() {}

/// Keeps this moment of it, as long as it lives.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/moments", request_body = MomentRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = MomentInfo), (status = "default", body = ErrorBody)))]
pub fn keep_moment() {}

/// Its moments that are kept, and what each costs.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/moments",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = MomentList), (status = "default", body = ErrorBody)))]
pub fn list_moments() {}

/// Keeps one no longer.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}/moments/{moment}",
    params(("id" = String, Path, description = "Id or name"),
        ("moment" = String, Path, description = "Its name, `@` and its number, or `@-1`")),
    responses((status = 200, body = MomentList), (status = "default", body = ErrorBody)))]
pub fn forget_moment() {}

/// Takes it back to a moment, under the same id. What has run since is gone, and whoever waits for it is told
/// (`rolled_back`).
#[utoipa::path(post, path = "/v1/sandboxes/{id}/rollback", request_body = RollbackRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn roll_back() {}

/// Writes it to disk, and ends its process: it costs no memory, and outlives engines and hosts. Its moments are
/// let go. Whoever waits for a process or a cell of it is told (`sandbox_paused`).
#[utoipa::path(post, path = "/v1/sandboxes/{id}/pause", request_body = PauseRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn pause() {}

/// Has a paused one go on where it was.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/resume",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = SandboxInfo), (status = "default", body = ErrorBody)))]
pub fn resume() {}

/// Starts a process. As an object, the answer has all of its output; as a stream it is of
/// `ProcessEvent`. With the content type application/x-ndjson lines of `ProcessInput` follow the
/// request. Detached, the answer is a `ProcessInfo`. A client that goes away leaves the process, but with
/// `kill_on_disconnect`.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/exec", request_body = ProcessRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, content((ProcessResult = "application/json"),
        (ProcessEvent = "application/x-ndjson"), (ProcessEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
pub fn exec_in() {}

/// Its processes.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = ProcessList), (status = "default", body = ErrorBody)))]
pub fn processes() {}

/// One of them.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes/{process}",
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number")),
    responses((status = 200, body = ProcessInfo), (status = "default", body = ErrorBody)))]
pub fn process() {}

/// Waits for its end.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes/{process}/wait",
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number"),
        ("timeout_seconds" = Option<f64>, Query, description = "How long; then it is told as it is")),
    responses((status = 200, body = ProcessInfo), (status = "default", body = ErrorBody)))]
pub fn wait_process() {}

/// Its output, as far as it is kept; with `follow`, to its end.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes/{process}/output",
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number"),
        ("from" = Option<u64>, Query, description = "The offset to begin at"),
        ("follow" = Option<bool>, Query, description = "Whether to wait for more")),
    responses((status = 200, content((ProcessOutput = "application/json"),
        (ProcessEvent = "application/x-ndjson"), (ProcessEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
pub fn output() {}

/// Its output to its end, and its input by lines.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/processes/{process}/attach",
    request_body = AttachRequest,
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number")),
    responses((status = 200, content((ProcessResult = "application/json"),
        (ProcessEvent = "application/x-ndjson"), (ProcessEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
pub fn attach() {}

/// The same on a WebSocket (RFC 6455): binary messages are output and standard input, text messages the
/// other events and lines.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/processes/{process}/socket",
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number"),
        ("from" = Option<u64>, Query, description = "The offset to begin at"),
        ("hold" = Option<bool>, Query, description = "Whether the process waits for this client")),
    responses((status = 101), (status = "default", body = ErrorBody)))]
pub fn socket() {}

/// Gives it input: the body.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/processes/{process}/input",
    request_body(content = Option<Vec<u8>>, content_type = "application/octet-stream"),
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number"),
        ("end" = Option<bool>, Query, description = "Whether that is all")),
    responses((status = 200), (status = "default", body = ErrorBody)))]
pub fn input() {}

/// Sends it a signal.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/processes/{process}/signal",
    request_body = ProcessSignal,
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number")),
    responses((status = 200), (status = "default", body = ErrorBody)))]
pub fn signal_process() {}

/// Gives its terminal another size.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/processes/{process}/resize",
    request_body = TerminalSize,
    params(("id" = String, Path, description = "Id or name"),
        ("process" = u32, Path, description = "Its number")),
    responses((status = 200), (status = "default", body = ErrorBody)))]
pub fn resize() {}

/// Runs a cell of code in an interpreter that stays.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/code", request_body = CodeRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, content((CodeResult = "application/json"),
        (CodeEvent = "application/x-ndjson"), (CodeEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
pub fn code() {}

/// Its interpreters that stay.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/contexts",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = ContextList), (status = "default", body = ErrorBody)))]
pub fn contexts() {}

/// Makes one.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/contexts", request_body = ContextRequest,
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = ContextInfo), (status = "default", body = ErrorBody)))]
pub fn create_context() {}

/// Ends one.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}/contexts/{name}",
    params(("id" = String, Path, description = "Id or name"),
        ("name" = String, Path, description = "The context's name")),
    responses((status = 200), (status = "default", body = ErrorBody)))]
pub fn remove_context() {}

/// Interrupts the cell that it runs.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/contexts/{name}/interrupt",
    params(("id" = String, Path, description = "Id or name"),
        ("name" = String, Path, description = "The context's name")),
    responses((status = 200), (status = "default", body = ErrorBody)))]
pub fn interrupt() {}

/// Gives it a new interpreter.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/contexts/{name}/restart",
    params(("id" = String, Path, description = "Id or name"),
        ("name" = String, Path, description = "The context's name")),
    responses((status = 200, body = ContextInfo), (status = "default", body = ErrorBody)))]
pub fn restart() {}

/// Reads a file; `range` is heeded.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/files",
    params(("id" = String, Path, description = "Id or name"),
        ("path" = String, Query, description = "Where; relative to the user's home"),
        ("path_base64" = Option<String>, Query, description = "The same, if it is not UTF-8; then `path` counts for nothing, and may be left out"),
        ("offset" = Option<u64>, Query, description = "From where"),
        ("length" = Option<u64>, Query, description = "How much at most"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>),
        (status = "default", body = ErrorBody)))]
pub fn read() {}

/// Writes a file: the body. Others see the old or the new, unless it is appended to or written in
/// place.
#[utoipa::path(put, path = "/v1/sandboxes/{id}/files",
    request_body(content = Option<Vec<u8>>, content_type = "application/octet-stream"),
    params(("id" = String, Path, description = "Id or name"),
        ("path" = String, Query, description = "Where; relative to the user's home"),
        ("path_base64" = Option<String>, Query, description = "The same, if it is not UTF-8; then `path` counts for nothing, and may be left out"),
        ("mode" = Option<String>, Query, description = "Permissions, octal"),
        ("append" = Option<bool>, Query, description = "Behind what is there"),
        ("in_place" = Option<bool>, Query, description = "Into what is there"),
        ("parents" = Option<bool>, Query, description = "Make folders that are missing"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, body = FileInfo), (status = "default", body = ErrorBody)))]
pub fn write() {}

/// Does something with files.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/files", request_body = FileAction,
    params(("id" = String, Path, description = "Id or name"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, body = FileResult), (status = "default", body = ErrorBody)))]
pub fn act() {}

/// Removes a file or folder.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}/files",
    params(("id" = String, Path, description = "Id or name"),
        ("path" = String, Query, description = "Where; relative to the user's home"),
        ("path_base64" = Option<String>, Query, description = "The same, if it is not UTF-8; then `path` counts for nothing, and may be left out"),
        ("recursive" = Option<bool>, Query, description = "A folder with all that is in it"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, body = Done), (status = "default", body = ErrorBody)))]
pub fn remove_file() {}

/// Tells of changes of a file or folder.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/watch",
    params(("id" = String, Path, description = "Id or name"),
        ("path" = String, Query, description = "Where; relative to the user's home"),
        ("path_base64" = Option<String>, Query, description = "The same, if it is not UTF-8; then `path` counts for nothing, and may be left out"),
        ("recursive" = Option<bool>, Query, description = "Folders in it as well"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, content((FileEvent = "application/x-ndjson"),
        (FileEvent = "text/event-stream"))), (status = "default", body = ErrorBody)))]
pub fn watch() {}

/// A file or folder as a tar archive.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/tar",
    params(("id" = String, Path, description = "Id or name"),
        ("path" = String, Query, description = "Where; relative to the user's home"),
        ("path_base64" = Option<String>, Query, description = "The same, if it is not UTF-8; then `path` counts for nothing, and may be left out"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, content_type = "application/x-tar", body = Vec<u8>),
        (status = "default", body = ErrorBody)))]
pub fn pack() {}

/// Unpacks a tar archive, the body, into a folder.
#[utoipa::path(put, path = "/v1/sandboxes/{id}/tar",
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    params(("id" = String, Path, description = "Id or name"),
        ("path" = String, Query, description = "Where; relative to the user's home"),
        ("path_base64" = Option<String>, Query, description = "The same, if it is not UTF-8; then `path` counts for nothing, and may be left out"),
        ("user" = Option<String>, Query, description = "As whom")),
    responses((status = 200, body = Done), (status = "default", body = ErrorBody)))]
pub fn unpack() {}

/// What has happened to sandboxes; with `follow`, as a stream, what happens.
#[utoipa::path(get, path = "/v1/events",
    params(("after" = Option<u64>, Query, description = "Behind the event of this number"),
        ("follow" = Option<bool>, Query, description = "Whether to wait for more"),
        ("sandbox" = Option<String>, Query, description = "Only of this id or name")),
    responses((status = 200, content((SandboxEvents = "application/json"),
        (SandboxEvent = "application/x-ndjson"), (SandboxEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
pub fn events() {}
