import { ConnectionFailed, SandboxNotFound } from "./errors.js";
import { Files } from "./files.js";
import type { Event, Http } from "./http.js";
import {
  Cell,
  difference,
  ExecResult,
  type Bundle,
  type ContextInfo,
  type Difference,
  type Moment,
  type SandboxInfo,
  type Schemas,
  type Stats,
  type TemplateInfo,
} from "./models.js";
import { pathOf, type Octets } from "./octets.js";
import { Process } from "./process.js";
import { argv, limitOf, quoted, stdinOf, tell, whole, type Cancelable, type Command, type Listeners } from "./requests.js";

/** How much longer than its time limit an answer may take, in seconds. */
const MARGIN_S = 60;
/** How long what is done to a whole machine may take; the engine has deadlines of its own. */
const MACHINE = { limitMs: 1_200_000 };
/** How long one request waits for an end; it is asked again. */
const WAIT_S = 30;

export interface ExecOptions extends Listeners, Cancelable {
  env?: Record<string, string>;
  cwd?: string;
  /** `USER` or `USER:GROUP` of the sandbox; root without. */
  user?: string;
  stdin?: string | Uint8Array;
  /** Seconds, after which it is killed; 0: none. */
  timeout?: number;
}

export interface PythonOptions extends Listeners, Cancelable {
  /** Which interpreter; made if it is not there. */
  context?: string;
  /** Seconds, after which it is interrupted; 0: none. */
  timeout?: number;
  onDisplay?: (bundle: Bundle) => void;
}

export interface BranchOptions {
  /** A moment that is kept, in place of now. */
  at?: Moment | string;
  /** Of the child; of several, what theirs begin with: `NAME-1`, `NAME-2` … */
  name?: string;
  ttl?: number;
  idle?: number;
  /** Whether its interpreters draw random numbers that are not those that this one will draw. */
  reseed?: boolean;
  /** How long its processes may take to stop, in seconds. */
  freeze?: number;
  /** Whether to go on although some have not. */
  force?: boolean;
}

/** A virtual machine that lives until it is ended; with `await using` it ends with its block. */
export class Sandbox {
  /** Its files. */
  readonly files: Files;

  constructor(
    private readonly http: Http,
    /** What was known of it when it was last asked for; see `refresh`. */
    public info: SandboxInfo,
  ) {
    this.files = new Files(http, info.id);
  }

  get id(): string {
    return this.info.id;
  }

  get name(): string | undefined {
    return this.info.name ?? undefined;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.remove().catch((error: unknown) => {
      // It has gone before us.
      if (!(error instanceof SandboxNotFound)) throw error;
    });
  }

  private path(rest = ""): string {
    return `/v1/sandboxes/${this.id}${rest}`;
  }

  private take(told: SandboxInfo): SandboxInfo {
    this.info = told;
    return this.info;
  }

  /** What is known of it now. */
  async refresh(): Promise<SandboxInfo> {
    return this.take(await this.http.ask<SandboxInfo>("GET", this.path()));
  }

  /** Ends it. */
  async remove(): Promise<SandboxInfo> {
    return this.take(await this.http.ask<SandboxInfo>("DELETE", this.path(), undefined, { isSafe: true }));
  }

  /** Waits until it has ended, or for so many seconds; its `state` says which. */
  async wait(timeout = 0): Promise<SandboxInfo> {
    for (let left = timeout; ; ) {
      const piece = timeout ? Math.min(left, WAIT_S) : WAIT_S;
      this.take(await this.http.ask<SandboxInfo>("GET", this.path("/wait"), undefined, { params: { timeout_seconds: piece } }));
      left -= piece;
      if (this.info.state === "ended" || (timeout && left <= 0)) return this.info;
    }
  }

  /** Has it live so long from now on, or so long without being used, in seconds; 0: for any time. */
  async extend({ ttl, idle }: { ttl?: number; idle?: number }): Promise<SandboxInfo> {
    return this.take(await this.http.ask<SandboxInfo>("PATCH", this.path(), whole<Schemas["SandboxChange"]>({ ttl_seconds: ttl, idle_seconds: idle })));
  }

  /** What it takes of its host. */
  async stats(): Promise<Stats> {
    return this.http.ask<Stats>("GET", this.path("/stats"));
  }

  // Programs.

  /** Runs a program to its end, or kills it if that is given up; a string is for `sh -c`. */
  async exec(command: Command, options: ExecOptions = {}): Promise<ExecResult> {
    const asked: Schemas["ProcessRequest"] = { ...this.asked(command, options), kill_on_disconnect: true };
    const limits = { limitMs: limitOf(options.timeout, MARGIN_S), signal: options.signal };
    if (!options.onStdout && !options.onStderr) {
      return new ExecResult(await this.http.ask<Schemas["ProcessResult"]>("POST", this.path("/exec"), asked, limits));
    }
    for await (const event of this.http.events("POST", this.path("/exec"), asked, limits)) {
      if (event.type === "result") return new ExecResult(event as Event & Schemas["ProcessResult"]);
      tell(event, options);
    }
    throw broken();
  }

  /** Starts a program that goes on by itself, and keeps the newest of what it says. */
  async start(
    command: Command,
    options: Omit<ExecOptions, "stdin" | "onStdout" | "onStderr" | "signal"> & {
      /** Whether it is to be given input; else it has none. */
      stdin?: boolean;
    } = {},
  ): Promise<Process> {
    const { stdin, ...rest } = options;
    const asked = { ...this.asked(command, rest), ...whole<Schemas["ProcessRequest"]>({ detach: true, stdin_stream: stdin }) };
    const told = await this.http.ask<Schemas["ProcessInfo"]>("POST", this.path("/exec"), asked);
    return new Process(this.http, this.id, told.process, told);
  }

  /** Those that somebody has asked for. */
  async processes(): Promise<Process[]> {
    const told = await this.http.ask<Schemas["ProcessList"]>("GET", this.path("/processes"));
    return told.processes.map((one) => new Process(this.http, this.id, one.process, one));
  }

  private asked(command: Command, { env, cwd, user, stdin, timeout }: ExecOptions): Schemas["ProcessRequest"] {
    const fields = { command: argv(command), env, cwd, user, stdin: stdinOf(stdin) };
    return whole<Schemas["ProcessRequest"]>({ ...fields, timeout_seconds: timeout || undefined });
  }

  // Interpreters.

  /** Runs a cell in an interpreter whose state stays. */
  async python(code: string, options: PythonOptions = {}): Promise<Cell> {
    const { context = "default", timeout, onDisplay } = options;
    const limit = { timeout_seconds: timeout || undefined, interrupt_on_disconnect: true };
    const asked = whole<Schemas["CodeRequest"]>({ code, context, ...limit });
    const limits = { limitMs: limitOf(timeout, MARGIN_S), signal: options.signal };
    if (!options.onStdout && !options.onStderr && !onDisplay) {
      return new Cell(await this.http.ask<Schemas["CodeResult"]>("POST", this.path("/code"), asked, limits));
    }
    for await (const event of this.http.events("POST", this.path("/code"), asked, limits)) {
      if (event.type === "result") return new Cell(event as Event & Schemas["CodeResult"]);
      if (event.type === "display") onDisplay?.(event["data"]);
      tell(event, options);
    }
    throw broken();
  }

  /** Its interpreters. */
  async contexts(): Promise<ContextInfo[]> {
    return (await this.http.ask<Schemas["ContextList"]>("GET", this.path("/contexts"))).contexts as ContextInfo[];
  }

  /** Starts one more. */
  async createContext(name: string, { cwd }: { cwd?: string } = {}): Promise<ContextInfo> {
    return this.http.ask<ContextInfo>("POST", this.path("/contexts"), whole<Schemas["ContextRequest"]>({ name, cwd }));
  }

  /** Interrupts the cell that runs, as Ctrl-C does. */
  async interrupt(context = "default"): Promise<void> {
    await this.http.ask("POST", this.path(`/contexts/${quoted(context)}/interrupt`));
  }

  /** Starts an interpreter anew, without its state. */
  async restart(context = "default"): Promise<ContextInfo> {
    return this.http.ask<ContextInfo>("POST", this.path(`/contexts/${quoted(context)}/restart`));
  }

  /** Ends an interpreter. */
  async removeContext(context: string): Promise<void> {
    await this.http.ask("DELETE", this.path(`/contexts/${quoted(context)}`));
  }

  // The whole machine.

  /** Makes children that go on where it is: processes, memory, files. */
  async branch(n = 1, options: BranchOptions = {}): Promise<Sandbox[]> {
    const { at, name, ttl, idle, reseed, freeze = 5, force } = options;
    const times = { ttl_seconds: ttl, idle_seconds: idle, freeze_seconds: freeze };
    const asked = whole<Schemas["BranchRequest"]>({ count: n, at: at && words(at), name, reseed, force, ...times });
    const told = await this.http.ask<Schemas["Branched"]>("POST", this.path("/branch"), asked, MACHINE);
    return (told.sandboxes as SandboxInfo[]).map((one) => new Sandbox(this.http, one));
  }

  /** Keeps this moment, to go back to it, or to branch from it. One without a name gives way to newer ones. */
  async snapshot(name?: string, { freeze = 5, force }: { freeze?: number; force?: boolean } = {}): Promise<Moment> {
    const asked = whole<Schemas["MomentRequest"]>({ name, freeze_seconds: freeze, force });
    return this.http.ask<Moment>("POST", this.path("/moments"), asked, MACHINE);
  }

  /** The moments that are kept. */
  async moments(): Promise<Moment[]> {
    return (await this.http.ask<Schemas["MomentList"]>("GET", this.path("/moments"))).moments as Moment[];
  }

  /** Lets one go. */
  async forget(moment: Moment | string): Promise<void> {
    await this.http.ask("DELETE", this.path(`/moments/${quoted(words(moment))}`));
  }

  /** Goes back to a moment: by its name, its number (`@7`), or counted from the newest (`@-1`). */
  async rollback(to: Moment | string = "@-1", { reseed }: { reseed?: boolean } = {}): Promise<SandboxInfo> {
    const asked = whole<Schemas["RollbackRequest"]>({ to: words(to), reseed });
    return this.take(await this.http.ask<SandboxInfo>("POST", this.path("/rollback"), asked, MACHINE));
  }

  /** What differs between a moment of it (now) and an earlier one: of its own, or another sandbox; else its beginning. */
  async diff({ at, since }: { at?: Moment | string; since?: Sandbox | Moment | string } = {}): Promise<Difference> {
    const own = since === undefined || since instanceof Sandbox ? undefined : { sandbox: this.id, at: words(since) };
    const side = since instanceof Sandbox ? { sandbox: since.id } : own;
    const asked = whole<Schemas["DiffRequest"]>({ at: at && words(at), from: side });
    return difference(await this.http.ask<Schemas["Diff"]>("POST", this.path("/diff"), asked, MACHINE));
  }

  /** Puts it on disk, where it costs no memory. */
  async pause({ freeze = 5, force }: { freeze?: number; force?: boolean } = {}): Promise<SandboxInfo> {
    const asked = whole<Schemas["PauseRequest"]>({ freeze_seconds: freeze, force });
    return this.take(await this.http.ask<SandboxInfo>("POST", this.path("/pause"), asked, MACHINE));
  }

  /** Has it go on. */
  async resume(): Promise<SandboxInfo> {
    return this.take(await this.http.ask<SandboxInfo>("POST", this.path("/resume"), undefined, MACHINE));
  }

  /** Makes a template of a moment of it, on disk; forks of that begin as branches do. */
  async publish(template: string, { at, force }: { at?: Moment | string; force?: boolean } = {}): Promise<TemplateInfo> {
    const asked = whole<Schemas["PublishRequest"]>({ template, at: at && words(at), force });
    return this.http.ask<TemplateInfo>("POST", this.path("/template"), asked, MACHINE);
  }

  /** Changes of files, as they happen: `created`, `written`, `removed`, `renamed`, `attributes`. */
  async *watch(path: string, { recursive }: { recursive?: boolean } = {}): AsyncGenerator<Event, void, undefined> {
    const params = { path, recursive: recursive || undefined };
    for await (const event of this.http.events("GET", this.path("/watch"), undefined, { params })) {
      if (event.type === "watching") continue;
      for (const field of ["path", "to"]) {
        if (field in event) event[field] = pathOf(event[field] as Octets);
      }
      yield event;
    }
  }
}

function words(moment: Moment | string): string {
  return typeof moment === "string" ? moment : (moment.name ?? `@${moment.number}`);
}

function broken(): ConnectionFailed {
  return new ConnectionFailed({ code: "engine_unreachable", message: "the output ended without a result" });
}
