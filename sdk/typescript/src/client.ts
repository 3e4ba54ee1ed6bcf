import { ConnectionFailed } from "./errors.js";
import { Http, type Event, type Fetch, type Json } from "./http.js";
import { RunResult, type SandboxInfo, type Schemas, type TemplateInfo } from "./models.js";
import { asOctets } from "./octets.js";
import { argv, limitOf, quoted, stdinOf, tell, whole, type Cancelable, type Command, type Listeners } from "./requests.js";
import { Sandbox } from "./sandbox.js";

/** How much longer than its time limit a program's answer may take: for its fork, and the way, in seconds. */
const MARGIN_S = 120;

export interface ClientOptions {
  /** Where the engine is, such as `https://host:7070`; else `ZYGOTE_URL`. */
  url?: string;
  /** A key of it (`zygote key create`); else `ZYGOTE_API_KEY`. */
  key?: string;
  /**
   * How often to ask again, where that is safe: what was refused before it began (`Retry-After` is heeded), what never
   * reached the engine, and what only reads.
   */
  retries?: number;
  /** In place of the global one. */
  fetch?: Fetch;
}

export interface RunOptions extends Listeners, Cancelable {
  template?: string;
  args?: readonly string[];
  env?: Record<string, string>;
  cwd?: string;
  stdin?: string | Uint8Array;
  /** What to put into the sandbox first, by path. */
  files?: Record<string, string | Uint8Array>;
  /** Paths of what is wanted once it has ended. */
  get?: readonly string[];
  /** Seconds; 0: as long as it likes. */
  timeout?: number;
  measure?: boolean;
}

/** Python code, or a program and its arguments; a string there is for `sh -c`. */
export type What = string | { code: string } | { command: Command };

export interface CreateOptions {
  /** Nobody else's among those that live. */
  name?: string;
  /** Variables for all of its processes. */
  env?: Record<string, string>;
  /** How long it lives, in seconds; 0: until it is ended. */
  ttl?: number;
  /** How long it lives without being used. */
  idle?: number;
  /** Moments that are kept without being asked for. */
  moments?: { keep?: number; every_seconds?: number; on_exec?: boolean };
}

/** Asks one engine, over TCP. For the engine of the same machine see `zygote-vm/node`. */
export class Client {
  private readonly http: Http;

  constructor(options: ClientOptions = {}) {
    const environment: Record<string, string | undefined> = globalThis.process?.env ?? {};
    const url = options.url ?? environment["ZYGOTE_URL"];
    if (!url) {
      const remedy = "give url, or set ZYGOTE_URL and ZYGOTE_API_KEY; on the engine's machine: zygote-vm/node";
      throw new ConnectionFailed({ code: "engine_unreachable", message: "no engine was named", remedy });
    }
    const key = options.key ?? (environment["ZYGOTE_API_KEY"] || undefined);
    const send = options.fetch ?? ((to, init) => fetch(to, init));
    this.http = new Http(url.replace(/\/+$/, ""), key, options.retries ?? 3, send);
  }

  /** Runs Python code, or a command, in a fork of a template that nobody else has. */
  async run(what: What, options: RunOptions = {}): Promise<RunResult> {
    const asked = execution(what, options);
    const limits = { limitMs: limitOf(options.timeout ?? 300, MARGIN_S), signal: options.signal };
    if (!options.onStdout && !options.onStderr) {
      return new RunResult(await this.http.ask<Schemas["ExecResult"]>("POST", "/v1/exec", asked, limits));
    }
    for await (const event of this.http.events("POST", "/v1/exec", { ...asked, line_buffered: true }, limits)) {
      if (event.type === "result") return new RunResult(event as Event & Schemas["ExecResult"]);
      tell(event, options);
    }
    throw new ConnectionFailed({ code: "engine_unreachable", message: "the run ended without a result" });
  }

  /**
   * Runs many, each in a fork of its own, and gives back their results in their order. One that had no sandbox has the
   * exit code 125 and an `error`.
   */
  async batch(executions: Iterable<What | [What, Omit<RunOptions, "signal">]>, { signal }: Cancelable = {}): Promise<RunResult[]> {
    const one = (given: What | [What, RunOptions]) =>
      Array.isArray(given) ? execution(given[0], given[1]) : execution(given, {});
    const asked: Schemas["BatchRequest"] = { executions: Array.from(executions, one) };
    const told = await this.http.ask<Schemas["BatchResult"]>("POST", "/v1/exec/batch", asked, { limitMs: undefined, signal });
    return told.results.map((result) => new RunResult(result));
  }

  /** Makes a sandbox that lives until it is ended. */
  async create(template = "python", options: CreateOptions = {}): Promise<Sandbox> {
    const { name, env, ttl, idle, moments } = options;
    const asked = whole<Schemas["SandboxRequest"]>({ template, name, env, ttl_seconds: ttl, idle_seconds: idle, moments });
    // So that it may be asked again when the answer did not come.
    const headers = { "idempotency-key": crypto.randomUUID() };
    const told = await this.http.ask<SandboxInfo>("POST", "/v1/sandboxes", asked, { headers, limitMs: MARGIN_S * 1000, isSafe: true });
    return new Sandbox(this.http, told);
  }

  /** One that is there: by its name, its id, or the beginning or end of its id. */
  async sandbox(words: string): Promise<Sandbox> {
    return new Sandbox(this.http, await this.http.ask<SandboxInfo>("GET", `/v1/sandboxes/${quoted(words)}`));
  }

  /** Those that live, or are in a state (`all`: also those that have ended). */
  async sandboxes({ state, template }: { state?: string; template?: string } = {}): Promise<SandboxInfo[]> {
    const found: SandboxInfo[] = [];
    for (let after: string | undefined; ; ) {
      const params = { state, template, after };
      const page = await this.http.ask<Schemas["SandboxList"]>("GET", "/v1/sandboxes", undefined, { params });
      found.push(...(page.sandboxes as SandboxInfo[]));
      after = page.next ?? undefined;
      if (!after) return found;
    }
  }

  /** What can be forked. */
  async templates(): Promise<TemplateInfo[]> {
    return (await this.http.ask<Schemas["TemplateList"]>("GET", "/v1/templates")).templates as TemplateInfo[];
  }

  /** Removes one, and with `derived` those that are derived from it. */
  async removeTemplate(name: string, { derived = false }: { derived?: boolean } = {}): Promise<void> {
    await this.http.ask("DELETE", `/v1/templates/${quoted(name)}`, undefined, { params: { derived } });
  }

  /** Whether it is there, and what it can fork. */
  async health(): Promise<Json> {
    return this.http.ask("GET", "/v1/health");
  }

  /** What has happened to sandboxes behind an event's number, and what happens. */
  events(options: { after?: number; follow?: boolean; sandbox?: string } = {}): AsyncGenerator<Event, void, undefined> {
    const { after = 0, follow = true, sandbox } = options;
    return this.http.events("GET", "/v1/events", undefined, { params: { after, follow, sandbox } });
  }
}

function execution(what: What, options: RunOptions): Schemas["ExecRequest"] {
  const program =
    typeof what === "string" ? { code: what } : "code" in what ? what : { command: argv(what.command) };
  const { template, args, env, cwd, stdin, files, get, timeout, measure } = options;
  const sent = Object.entries(files ?? {}).map(([path, content]) => ({ path, content: asOctets(content) }));
  return whole<Schemas["ExecRequest"]>({
    ...program,
    template,
    args: args && [...args],
    env,
    cwd,
    stdin: stdinOf(stdin),
    files: sent.length > 0 ? sent : undefined,
    get: get && [...get],
    timeout_seconds: timeout,
    measure,
  });
}
