/** Bytes in JSON: a string, or `{"base64": …}` where they are not UTF-8. */

export type Octets = string | { base64: string };

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const lenient = new TextDecoder("utf-8", { ignoreBOM: true });
const encoder = new TextEncoder();

export function fromBase64(text: string): Uint8Array {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export function toBase64(bytes: Uint8Array): string {
  let text = "";
  // An argument list has an end.
  for (let at = 0; at < bytes.length; at += 0x8000) {
    text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  }
  return btoa(text);
}

export function octets(value: Octets): Uint8Array {
  return typeof value === "string" ? encoder.encode(value) : fromBase64(value.base64);
}

export function asOctets(value: string | Uint8Array): Octets {
  if (typeof value === "string") return value;
  try {
    return strict.decode(value);
  } catch {
    return { base64: toBase64(value) };
  }
}

/** As text; bytes that are not UTF-8 become U+FFFD. */
export function textOf(bytes: Uint8Array): string {
  return lenient.decode(bytes);
}

export function pathOf(value: Octets): string {
  return textOf(octets(value));
}

/** A stream of a result that is one object. */
export function streamOf(data: Record<string, unknown>, stream: "stdout" | "stderr"): Uint8Array {
  const coded = data[`${stream}_base64`];
  if (typeof coded === "string") return fromBase64(coded);
  return encoder.encode((data[stream] as string | null | undefined) ?? "");
}
