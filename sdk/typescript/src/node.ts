/** The engine of this machine, by its socket: for Node alone. */

import { execFile } from "node:child_process";
import { request as ask, type IncomingMessage } from "node:http";
import { Readable } from "node:stream";
import { Client, type ClientOptions } from "./client.js";
import { ConnectionFailed, errorOf, type Failure } from "./errors.js";
import type { Fetch } from "./http.js";

/** How long an engine may take to start. */
const START_MAX_MS = 60_000;

/** A client of this machine's engine, which is started if it is not there (`zygote` must be installed). */
export async function local(options: Omit<ClientOptions, "url" | "key" | "fetch"> & { socket?: string } = {}): Promise<Client> {
  const socket = options.socket ?? process.env["ZYGOTE_SOCKET"] ?? (await started());
  return new Client({ ...options, url: "http://localhost", fetch: overSocket(socket) });
}

async function started(): Promise<string> {
  const program = process.env["ZYGOTE_PROGRAM"] || "zygote";
  const told = await new Promise<string>((resolve) => {
    execFile(program, ["start", "--json"], { timeout: START_MAX_MS }, (error, stdout) => {
      const failure: Failure = { code: "engine_unreachable", message: `cannot start the engine with ${program}` };
      if (error) failure.cause = error.message;
      resolve(stdout || JSON.stringify({ error: failure }));
    });
  });
  const answer = JSON.parse(told) as { socket?: string };
  if (!answer.socket) throw errorOf(answer);
  return answer.socket;
}

/** fetch, over a Unix socket. */
export function overSocket(socketPath: string): Fetch {
  return (url, init) =>
    new Promise<Response>((resolve, reject) => {
      const { pathname, search } = new URL(url);
      const headers = Object.fromEntries(new Headers(init.headers));
      const options = { socketPath, path: pathname + search, method: init.method ?? "GET", headers };
      const signal = init.signal ?? undefined;
      const asked = ask({ ...options, ...(signal ? { signal } : {}) }, (answer) => resolve(response(answer)));
      asked.on("error", reject);
      if (init.body instanceof ReadableStream) {
        Readable.fromWeb(init.body as never).pipe(asked);
      } else {
        asked.end(init.body ?? undefined);
      }
    });
}

function response(answer: IncomingMessage): Response {
  const headers = new Headers();
  for (const [name, value] of Object.entries(answer.headers)) {
    if (value !== undefined) headers.set(name, Array.isArray(value) ? value.join(", ") : value);
  }
  const body = Readable.toWeb(answer) as ReadableStream<Uint8Array>;
  return new Response(body, { status: answer.statusCode ?? 502, headers });
}

export { ConnectionFailed };
