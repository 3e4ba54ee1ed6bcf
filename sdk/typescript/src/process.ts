import { SandboxEnded } from "./errors.js";
import type { Event, Http } from "./http.js";
import { ExecResult, type Schemas } from "./models.js";
import { pathOf, streamOf, textOf } from "./octets.js";

/** How long one request waits for an end; it is asked again. */
const WAIT_S = 30;

/** A program that was started; it goes on whether anybody listens or not. */
export class Process {
  constructor(
    private readonly http: Http,
    /** Its sandbox's id. */
    readonly sandbox: string,
    /** Its number there. */
    readonly number: number,
    private told: Schemas["ProcessInfo"],
  ) {}

  /** Its program and arguments. */
  get command(): string[] {
    return this.told.command.map(pathOf);
  }

  /** Its pid in the sandbox. */
  get pid(): number | undefined {
    return this.told.pid ?? undefined;
  }

  /** `starting`, `running`, `ended` or `lost`, when it was last asked for. */
  get state(): string {
    return this.told.state;
  }

  /** How it ended, when it was last asked for; without output. */
  get result(): ExecResult | undefined {
    return this.told.result ? new ExecResult(this.told.result) : undefined;
  }

  private path(rest = ""): string {
    return `/v1/sandboxes/${this.sandbox}/processes/${this.number}${rest}`;
  }

  /** Asks how it is. */
  async refresh(): Promise<this> {
    this.told = await this.http.ask("GET", this.path());
    return this;
  }

  /** Waits for its end, or for so many seconds: then nothing. */
  async wait(timeout = 0): Promise<ExecResult | undefined> {
    for (let left = timeout; ; ) {
      const piece = timeout ? Math.min(left, WAIT_S) : WAIT_S;
      this.told = await this.http.ask("GET", this.path("/wait"), undefined, { params: { timeout_seconds: piece } });
      left -= piece;
      if (this.state === "lost") {
        throw new SandboxEnded({ code: "sandbox_ended", message: "its sandbox ended before it" });
      }
      if (this.result || (timeout && left <= 0)) return this.result;
    }
  }

  /** What it has said and is kept, and where to go on the next time. */
  async output(since?: number): Promise<{ stdout: string; stderr: string; next: number }> {
    const told = await this.http.ask<Schemas["ProcessOutput"]>("GET", this.path("/output"), undefined, { params: { from: since } });
    return { stdout: textOf(streamOf(told, "stdout")), stderr: textOf(streamOf(told, "stderr")), next: told.next };
  }

  /** What it has said, and says: events `stdout`, `stderr` (with `offset`), `skipped`, and at last `result`. */
  stream(since?: number): AsyncGenerator<Event, void, undefined> {
    const params = { follow: true, from: since };
    return this.http.events("GET", this.path("/output"), undefined, { params });
  }

  /** Gives it input; with `end` that was all. */
  async write(data: string | Uint8Array, end = false): Promise<void> {
    const headers = { "content-type": "application/octet-stream" };
    const params = end ? { end } : {};
    const answer = await this.http.send("POST", this.path("/input"), data as BodyInit, { headers, params });
    await answer.body?.cancel();
  }

  /** Tells it that there is no more input. */
  async closeStdin(): Promise<void> {
    await this.write("", true);
  }

  /** Sends a signal to it and to what it has started. */
  async signal(signal: number): Promise<void> {
    await this.http.ask("POST", this.path("/signal"), { signal } satisfies Schemas["ProcessSignal"]);
  }

  /** Kills it, and what it has started. */
  async kill(): Promise<void> {
    await this.signal(9);
  }

  /**
   * A WebSocket to it, for a terminal in a browser: binary messages are output and input, text messages the other
   * events, and `resize`, `signal`, `stdin_end`.
   */
  socket(since?: number): WebSocket {
    const url = new URL(`${this.http.url}${this.path("/socket")}`);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    if (since !== undefined) url.searchParams.set("from", String(since));
    // Headers cannot be sent with it.
    const key = this.http.key ? [`zygote.key.${this.http.key}`] : [];
    const socket = new WebSocket(url, ["zygote", ...key]);
    socket.binaryType = "arraybuffer";
    return socket;
  }
}
