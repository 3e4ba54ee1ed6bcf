/** Asking an engine: requests, streams of events, and what is asked again. */

import { ConnectionFailed, errorOf, type ZygoteError } from "./errors.js";

export type Fetch = (url: string, init: RequestInit & { duplex?: "half" }) => Promise<Response>;
/** What the API's description has no more to say of. */
export type Json = Record<string, any>;

export interface Event {
  type: string;
  [field: string]: any;
}

export interface Options {
  params?: Record<string, string | number | boolean | undefined> | undefined;
  headers?: Record<string, string> | undefined;
  /** Milliseconds until it is given up; none: the engine has deadlines of its own. */
  limitMs?: number | undefined;
  /** Whether it may be asked again though it may have been done. */
  isSafe?: boolean | undefined;
  signal?: AbortSignal | undefined;
}

const NDJSON = "application/x-ndjson";
/** How long an answer may take that needs nothing but words. */
export const WORDS_MAX_MS = 60_000;
/** Longest pause before something is asked again. */
const PAUSE_MAX_MS = 10_000;
/** Refused before anything has begun: asking again is always safe. */
const REFUSED = new Set(["busy", "no_room", "limit_reached"]);

export class Http {
  constructor(
    readonly url: string,
    readonly key: string | undefined,
    private readonly retries: number,
    private readonly fetch: Fetch,
  ) {}

  /** An object for an object. */
  async ask<T = Json>(method: string, path: string, body?: object, options: Options = {}): Promise<T> {
    const headers = { "content-type": "application/json", ...options.headers };
    const content = body === undefined ? undefined : JSON.stringify(body);
    const isSafe = options.isSafe ?? method === "GET";
    const limitMs = "limitMs" in options ? options.limitMs : WORDS_MAX_MS;
    const answer = await this.send(method, path, content, { ...options, headers, isSafe, limitMs });
    return (await answer.json().catch((error: unknown) => {
      throw broken(error, options.signal);
    })) as T;
  }

  /** A good answer, whose body is still to come. */
  async send(
    method: string,
    path: string,
    body: BodyInit | undefined,
    options: Options = {},
  ): Promise<Response> {
    for (let tried = 1; ; tried++) {
      let failure: ZygoteError;
      let canAgain: boolean;
      try {
        const answer = await this.once(method, path, body, options);
        if (answer.ok) return answer;
        failure = errorOf(await answer.json().catch(() => null), answer.status);
        canAgain = REFUSED.has(failure.code) && failure.retryAfter !== undefined;
      } catch (error) {
        options.signal?.throwIfAborted();
        failure = unreachable(error);
        // fetch does not tell whether it has reached anybody, but for some words of Node's.
        canAgain = options.isSafe === true || isRefused(error);
      }
      if (!canAgain || tried > this.retries || typeof body === "object") throw failure;
      const pause = failure.retryAfter === undefined ? 100 * 2 ** tried : failure.retryAfter * 1000;
      await pauseFor(Math.min(pause, PAUSE_MAX_MS), options.signal);
    }
  }

  private once(
    method: string,
    path: string,
    body: BodyInit | undefined,
    options: Options,
  ): Promise<Response> {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(options.params ?? {})) {
      if (value !== undefined) query.set(name, String(value));
    }
    const headers: Record<string, string> = { ...options.headers };
    if (this.key) headers["authorization"] = `Bearer ${this.key}`;
    const signals = [options.signal, options.limitMs ? AbortSignal.timeout(options.limitMs) : undefined];
    const given = signals.filter((signal) => signal !== undefined);
    const init: RequestInit & { duplex?: "half" } = { method, headers };
    if (given.length > 0) init.signal = AbortSignal.any(given);
    if (body !== undefined) init.body = body;
    if (body instanceof ReadableStream) init.duplex = "half";
    const tail = query.size > 0 ? `?${query}` : "";
    return this.fetch(`${this.url}${path}${tail}`, init);
  }

  /** What happens, as the engine tells it; `error` events are thrown. Leaving the loop gives the request up. */
  async *events(method: string, path: string, body?: object, options: Options = {}): AsyncGenerator<Event, void, undefined> {
    const giveUp = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, giveUp.signal]) : giveUp.signal;
    const headers = { accept: NDJSON, "content-type": "application/json", ...options.headers };
    const content = body === undefined ? undefined : JSON.stringify(body);
    try {
      const answer = await this.send(method, path, content, { ...options, headers, signal });
      for await (const line of lines(answer, options.signal)) {
        const event = JSON.parse(line) as Event;
        if (event.type === "error" || (event["error"] && Object.keys(event).length === 1)) {
          throw errorOf(event, answer.status);
        }
        yield event;
      }
    } finally {
      giveUp.abort();
    }
  }
}

async function* lines(answer: Response, signal: AbortSignal | undefined): AsyncGenerator<string, void, undefined> {
  if (!answer.body) return;
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error: unknown) => {
        throw broken(error, signal);
      });
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const whole = rest.split("\n");
      rest = done ? "" : (whole.pop() ?? "");
      yield* whole.filter((line) => line !== "");
      if (done) return;
    }
  } finally {
    reader.releaseLock();
  }
}

/** What is thrown when an answer ends in its middle. */
function broken(error: unknown, signal: AbortSignal | undefined): unknown {
  return signal?.aborted ? signal.reason : unreachable(error);
}

/** As long as nobody gives up what is waited for; then the reason for that is thrown. */
async function pauseFor(ms: number, signal: AbortSignal | undefined): Promise<void> {
  await new Promise<void>((resolve) => {
    const over = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", over);
      resolve();
    };
    const timer = setTimeout(over, ms);
    signal?.addEventListener("abort", over);
  });
  signal?.throwIfAborted();
}

function isRefused(error: unknown): boolean {
  const cause = (error as { cause?: { code?: string } }).cause ?? (error as { code?: string });
  return ["ECONNREFUSED", "ENOENT"].includes(cause?.code ?? "");
}

function unreachable(error: unknown): ConnectionFailed {
  const inner = (error as { cause?: unknown }).cause ?? error;
  return new ConnectionFailed({
    code: "engine_unreachable",
    message: "the engine does not answer, or the connection broke off",
    cause: inner instanceof Error ? inner.message : String(inner),
    remedy: "see whether it is there: zygote status",
  });
}
