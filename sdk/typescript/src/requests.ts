/** Requests, from what their callers give. */

import type { Event } from "./http.js";
import { asOctets, octets, textOf, type Octets } from "./octets.js";

/** A program and its arguments; a string is for `sh -c`. */
export type Command = string | readonly string[];

export interface Cancelable {
  /** Gives it up: what was asked for is ended, and the signal's reason is thrown. */
  signal?: AbortSignal;
}

export interface Listeners {
  /** Called with what it says, as it says it; then it is not in the result. */
  onStdout?: (text: string) => void;
  onStderr?: (text: string) => void;
}

export function argv(command: Command): string[] {
  return typeof command === "string" ? ["sh", "-c", command] : [...command];
}

/** A request as the API's description has it, without what is not said. */
export function whole<T extends object>(fields: { [K in keyof T]?: T[K] | undefined }): T {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as T;
}

export function stdinOf(stdin: string | Uint8Array | undefined): Octets | undefined {
  return stdin === undefined ? undefined : asOctets(stdin);
}

/** Tells whoever listens. */
export function tell(event: Event, { onStdout, onStderr }: Listeners): void {
  if (event.type === "stdout") onStdout?.(textOf(octets(event["data"])));
  if (event.type === "stderr") onStderr?.(textOf(octets(event["data"])));
}

/** A path's segment (RFC 3986 §2.1). */
export const quoted = encodeURIComponent;

/** Seconds that are waited for, and a margin for the way, in milliseconds; none if there is no limit. */
export function limitOf(seconds: number | undefined, margin: number): number | undefined {
  return seconds ? (seconds + margin) * 1000 : undefined;
}
