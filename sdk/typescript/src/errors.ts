/** What can go wrong: one class for each code of the engine's catalogue (docs/json.md). */

export interface Failure {
  code: string;
  message: string;
  cause?: string;
  remedy?: string;
  retry_after_seconds?: number;
}

/** A failure. `code` is stable, `remedy` says what to do. */
export class ZygoteError extends Error {
  readonly code: string;
  /** What it came from, if that says more. */
  readonly reason: string | undefined;
  readonly remedy: string | undefined;
  /** After how many seconds to try again, where that can help. */
  readonly retryAfter: number | undefined;
  readonly status: number | undefined;
  readonly requestId: string | undefined;

  constructor(failure: Failure, status?: number, requestId?: string) {
    const { message, cause, remedy } = failure;
    super([message, cause && `: ${cause}`, remedy && `; ${remedy}`].filter(Boolean).join(""));
    this.name = new.target.name;
    this.code = failure.code;
    this.reason = cause;
    this.remedy = remedy;
    this.retryAfter = failure.retry_after_seconds;
    this.status = status;
    this.requestId = requestId;
  }
}

/** No engine answers, or the connection to it broke off. */
export class ConnectionFailed extends ZygoteError {}
/** What was asked for cannot be. */
export class BadRequest extends ZygoteError {}
/** A key is needed, or this one is none. */
export class Unauthorized extends ZygoteError {}
/** Not with this key. */
export class Forbidden extends ZygoteError {}
/** There is none. */
export class NotFound extends ZygoteError {}
export class SandboxNotFound extends NotFound {}
export class TemplateNotFound extends NotFound {}
export class ProcessNotFound extends NotFound {}
export class ContextNotFound extends NotFound {}
export class MomentNotFound extends NotFound {}
/** There is no such file in the sandbox. */
export class FileMissing extends NotFound {}
/** Something is in the way. */
export class Conflict extends ZygoteError {}
/** The sandbox was there, and has ended. */
export class SandboxEnded extends Conflict {}
export class ProcessEnded extends Conflict {}
export class SandboxPaused extends Conflict {}
export class ContextDead extends Conflict {}
export class NotBranched extends Conflict {}
/** A file cannot be had or changed; `reason` is the kernel's name for why, such as ENOSPC. */
export class FileFailed extends Conflict {}
/** A limit of the engine, of a sandbox, or of the key. */
export class LimitReached extends ZygoteError {}
/** Not now; `retryAfter` says when to try again. */
export class Unavailable extends ZygoteError {}
/** Machines cannot run on the engine's host, or not behind all walls. */
export class HostUnfit extends ZygoteError {}
export class TemplateUnusable extends ZygoteError {}
/** A program or a cell that was to succeed has not; `result` is how it ended. */
export class ProgramFailed extends ZygoteError {
  result: unknown;
}

type Kind = new (failure: Failure, status?: number, requestId?: string) => ZygoteError;

const BY_CODE: Record<string, Kind> = {
  engine_unreachable: ConnectionFailed,
  bad_request: BadRequest,
  usage: BadRequest,
  too_large: BadRequest,
  method_not_allowed: BadRequest,
  unauthorized: Unauthorized,
  forbidden: Forbidden,
  not_found: NotFound,
  sandbox_not_found: SandboxNotFound,
  template_not_found: TemplateNotFound,
  process_not_found: ProcessNotFound,
  context_not_found: ContextNotFound,
  moment_not_found: MomentNotFound,
  file_not_found: FileMissing,
  conflict: Conflict,
  ambiguous: Conflict,
  name_taken: Conflict,
  no_terminal: Conflict,
  rolled_back: Conflict,
  sandbox_ended: SandboxEnded,
  sandbox_died: SandboxEnded,
  process_ended: ProcessEnded,
  sandbox_paused: SandboxPaused,
  pause_failed: SandboxPaused,
  context_dead: ContextDead,
  not_branched: NotBranched,
  file_failed: FileFailed,
  get_failed: FileFailed,
  limit_reached: LimitReached,
  busy: Unavailable,
  no_room: Unavailable,
  stopping: Unavailable,
  lab_died: Unavailable,
  no_machines: HostUnfit,
  missing_walls: HostUnfit,
  template_unusable: TemplateUnusable,
  build_failed: TemplateUnusable,
  program_not_found: ProgramFailed,
  program_not_executable: ProgramFailed,
  program_not_started: ProgramFailed,
  timed_out: ProgramFailed,
  out_of_memory: ProgramFailed,
};

/** The error that an answer tells of. */
export function errorOf(body: unknown, status?: number): ZygoteError {
  const told = (body as { error?: Failure } | null)?.error;
  if (typeof told !== "object" || told === null) {
    const message = `what answers is no engine (status ${status})`;
    return new ConnectionFailed({ code: "engine_unreachable", message }, status);
  }
  const kind = BY_CODE[told.code] ?? ZygoteError;
  return new kind(told, status, (body as { request_id?: string }).request_id);
}

/** A program that was to succeed. */
export function programFailed(result: unknown, failure: Failure): ProgramFailed {
  const failed = new ProgramFailed(failure);
  failed.result = result;
  return failed;
}
