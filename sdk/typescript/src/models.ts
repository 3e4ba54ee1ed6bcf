/** What the engine tells. */

import { errorOf, programFailed, type Failure, type ZygoteError } from "./errors.js";
import { fromBase64, octets, pathOf, streamOf, textOf } from "./octets.js";
import type { components } from "./api.js";

/** The API's own types, made from its description. */
export type Schemas = components["schemas"];

/** What all programs' ends have. */
type Ended = Pick<
  Schemas["ExecResult"] | Schemas["ProcessResult"],
  | "exit_code" | "stdout" | "stdout_base64" | "stderr" | "stderr_base64"
  | "signal" | "timed_out" | "truncated" | "out_of_memory" | "total_time_ms" | "error"
>;

/** How a program ended, and what it has said. */
export class Output {
  readonly exitCode: number;
  readonly stdoutBytes: Uint8Array;
  readonly stderrBytes: Uint8Array;
  readonly signal: number | null;
  readonly timedOut: boolean;
  readonly truncated: boolean;
  readonly outOfMemory: boolean;
  readonly totalTimeMs: number;
  readonly error: ZygoteError | undefined;

  constructor(data: Ended) {
    this.exitCode = data.exit_code;
    this.stdoutBytes = streamOf(data, "stdout");
    this.stderrBytes = streamOf(data, "stderr");
    this.signal = data.signal ?? null;
    this.timedOut = data.timed_out ?? false;
    this.truncated = data.truncated ?? false;
    this.outOfMemory = data.out_of_memory ?? false;
    this.totalTimeMs = data.total_time_ms ?? 0;
    this.error = data.error ? errorOf({ error: data.error }) : undefined;
  }

  /** Standard output as text; bytes that are not UTF-8 become U+FFFD. */
  get stdout(): string {
    return textOf(this.stdoutBytes);
  }

  /** Standard error, likewise. */
  get stderr(): string {
    return textOf(this.stderrBytes);
  }

  /** Whether it ended with exit code 0. */
  get ok(): boolean {
    return this.exitCode === 0;
  }

  /** Itself, if it ended with exit code 0; throws `ProgramFailed` else. */
  check(): this {
    if (this.ok) return this;
    const last = this.stderr.trim().split("\n").at(-1);
    const failure: Failure = {
      code: this.error?.code ?? "program_failed",
      message: this.error?.message ?? `exit code ${this.exitCode}`,
    };
    if (last) failure.cause = last;
    throw programFailed(this, failure);
  }
}

/** A file that was asked for. */
export interface GotFile {
  path: string;
  bytes: number;
  sha256: string | undefined;
  content: Uint8Array | undefined;
  error: ZygoteError | undefined;
}

/** Of a program in a fork of its own. */
export class RunResult extends Output {
  readonly id: string;
  readonly template: string;
  readonly host: string;
  readonly forkTimeMs: number | undefined;
  readonly execTimeMs: number | undefined;
  readonly memoryPrivateKib: number | undefined;
  readonly files: GotFile[];

  constructor(data: Schemas["ExecResult"]) {
    super(data);
    this.id = data.id;
    this.template = data.template;
    this.host = data.host;
    this.forkTimeMs = data.fork_time_ms ?? undefined;
    this.execTimeMs = data.exec_time_ms ?? undefined;
    this.memoryPrivateKib = data.memory_private_kib ?? undefined;
    this.files = (data.files ?? []).map((one) => ({
      path: pathOf(one.path),
      bytes: one.bytes ?? 0,
      sha256: one.sha256 ?? undefined,
      content: one.content == null ? undefined : octets(one.content),
      error: one.error ? errorOf({ error: one.error }) : undefined,
    }));
  }
}

/** Of a program in a sandbox. */
export class ExecResult extends Output {
  readonly sandbox: string;
  readonly process: number;

  constructor(data: Schemas["ProcessResult"]) {
    super(data);
    this.sandbox = data.sandbox;
    this.process = data.process;
  }
}

/** Media types, and what there is in each: text, or base64 of pictures. */
export type Bundle = Record<string, string>;

/** How a cell ended. */
export class Cell {
  readonly executionCount: number;
  readonly stdout: string;
  readonly stderr: string;
  readonly displays: Bundle[];
  readonly result: Bundle | undefined;
  /** The exception that ended it. */
  readonly exception: { name: string; value: string; traceback: string[] } | undefined;
  readonly timedOut: boolean;
  readonly truncated: boolean;
  readonly totalTimeMs: number;

  constructor(data: Schemas["CodeResult"]) {
    this.executionCount = data.execution_count;
    this.stdout = textOf(streamOf(data, "stdout"));
    this.stderr = textOf(streamOf(data, "stderr"));
    this.displays = data.displays ?? [];
    this.result = data.result ?? undefined;
    this.exception = data.exception ?? undefined;
    this.timedOut = data.timed_out ?? false;
    this.truncated = data.truncated ?? false;
    this.totalTimeMs = data.total_time_ms ?? 0;
  }

  /** The value of its last expression, as Python prints it. */
  get text(): string | undefined {
    return this.result?.["text/plain"];
  }

  /** PNG images among what it has shown, and its value. */
  get images(): Uint8Array[] {
    const shown = [...this.displays, this.result ?? {}];
    return shown.flatMap((one) => (one["image/png"] ? [fromBase64(one["image/png"])] : []));
  }

  /** Whether it came to its end without an exception. */
  get ok(): boolean {
    return this.exception === undefined && !this.timedOut;
  }

  /** Itself, if it came to its end; throws `ProgramFailed` else. */
  check(): this {
    if (this.ok) return this;
    const raised = this.exception;
    const failure: Failure = {
      code: this.timedOut ? "timed_out" : "cell_failed",
      message: raised ? `${raised.name}: ${raised.value}` : "it was interrupted at its time limit",
    };
    if (raised) failure.cause = raised.traceback.join("");
    throw programFailed(this, failure);
  }
}

/** What is known of a sandbox. */
export interface SandboxInfo {
  id: string;
  name: string | null;
  tenant?: string;
  template: string;
  build: string;
  parent: string | null;
  state: "making" | "running" | "paused" | "ending" | "ended";
  end: { reason: string; message: string; at: string } | null;
  created: string;
  created_unix_s: number;
  expires_unix_s: number | null;
  idle_seconds: number | null;
  processes: number;
  env?: Record<string, string>;
  fork_time_ms: number | null;
  disk_bytes: number | null;
}

/** What a sandbox takes of its host. */
export interface Stats {
  id: string;
  name: string | null;
  memory_private_kib: number;
  page_tables_kib: number;
  cpu_seconds: number;
  processes: number;
}

/** A moment of a sandbox that is kept. */
export interface Moment {
  number: number;
  name: string | null;
  at: string;
  at_unix_s: number;
  pause_us: number;
  memory_private_kib: number | null;
}

/** A file of a sandbox. */
export interface FileInfo {
  path: string;
  type: "file" | "folder" | "link" | "other";
  bytes: number;
  mode: number;
  uid: number;
  gid: number;
  modified: string;
  modified_unix_s: number;
  target?: string;
}

export function fileInfo(data: Schemas["FileInfo"]): FileInfo {
  const info = { ...data, path: pathOf(data.path) } as FileInfo;
  if (data.target) info.target = pathOf(data.target);
  return info;
}

/** What differs between two moments. */
export interface Difference {
  files: { path: string; change: "added" | "changed" | "removed"; before?: FileInfo; after?: FileInfo }[];
  more_files: number;
  pages: number | null;
}

export function difference(data: Schemas["Diff"]): Difference {
  const files = data.files.map((one) => ({
    path: pathOf(one.path),
    change: one.change,
    ...(one.before ? { before: fileInfo(one.before) } : {}),
    ...(one.after ? { after: fileInfo(one.after) } : {}),
  }));
  return { files, more_files: data.more_files, pages: data.pages ?? null };
}

/** An interpreter of a sandbox. */
export interface ContextInfo {
  name: string;
  language: string;
  cwd: string;
  process: number;
  state: "idle" | "busy" | "dead";
  execution_count: number;
}

/** A template. */
export interface TemplateInfo {
  template: string;
  build: string;
  created: string;
  created_unix_s: number;
  memory_bytes: number;
  vcpus: number;
  interpreter: string;
  digest: string;
  disk_bytes: number;
  tenant?: string;
  sandbox?: string;
}

/** A type of ours whose fields are all the API's: another one does not compile. */
type Known<Api, Own extends { [K in keyof Own]: K extends keyof Api ? unknown : never }> = Own;
export type KnownModels = [
  Known<Schemas["SandboxInfo"], SandboxInfo>,
  Known<Schemas["SandboxStats"], Stats>,
  Known<Schemas["MomentInfo"], Moment>,
  Known<Schemas["FileInfo"], FileInfo>,
  Known<Schemas["Diff"], Difference>,
  Known<Schemas["ContextInfo"], ContextInfo>,
  Known<Schemas["TemplateInfo"], TemplateInfo>,
];
