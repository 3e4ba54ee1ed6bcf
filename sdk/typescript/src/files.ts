import { FileMissing } from "./errors.js";
import type { Http, Json } from "./http.js";
import { fileInfo, type FileInfo, type Schemas } from "./models.js";

/** How long a file may be on its way. */
const FILE_MAX_MS = 3_600_000;
const OCTETS = { "content-type": "application/octet-stream" };

/** The files of a sandbox. Relative paths are in the user's home. */
export class Files {
  private readonly path: string;

  constructor(
    private readonly http: Http,
    sandbox: string,
  ) {
    this.path = `/v1/sandboxes/${sandbox}`;
  }

  /** All of a file. */
  async read(path: string): Promise<Uint8Array> {
    const answer = await this.get("/files", path);
    return new Uint8Array(await answer.arrayBuffer());
  }

  /** The same, as text (UTF-8). */
  async readText(path: string): Promise<string> {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(await this.read(path));
  }

  /** A file in pieces, as they come. */
  async open(path: string): Promise<ReadableStream<Uint8Array>> {
    const answer = await this.get("/files", path);
    return answer.body ?? new ReadableStream({ start: (end) => end.close() });
  }

  /** A file or folder as a tar archive. */
  async tar(path: string): Promise<ReadableStream<Uint8Array>> {
    const answer = await this.get("/tar", path);
    return answer.body ?? new ReadableStream({ start: (end) => end.close() });
  }

  /** Unpacks a tar archive into a folder. */
  async untar(path: string, archive: Uint8Array | ReadableStream<Uint8Array>): Promise<void> {
    const options = { params: { path }, headers: OCTETS, limitMs: FILE_MAX_MS };
    const answer = await this.http.send("PUT", `${this.path}/tar`, archive as BodyInit, options);
    await answer.body?.cancel();
  }

  /** Writes a file, whole or not at all; folders that are missing on the way are made. */
  async write(
    path: string,
    data: string | Uint8Array | ReadableStream<Uint8Array>,
    { mode, parents = true, append = false }: { mode?: number; parents?: boolean; append?: boolean } = {},
  ): Promise<void> {
    const params = {
      path,
      mode: mode?.toString(8),
      parents: parents || undefined,
      append: append || undefined,
    };
    const options = { params, headers: OCTETS, limitMs: FILE_MAX_MS, isSafe: !append };
    const answer = await this.http.send("PUT", `${this.path}/files`, data as BodyInit, options);
    await answer.body?.cancel();
  }

  /** What is in a folder; with `depth` also what is in folders in it. */
  async list(path = ".", { depth = 1 }: { depth?: number } = {}): Promise<FileInfo[]> {
    const told = await this.act<Schemas["FileList"]>({ action: "list", path, depth }, true);
    return told.files.map(fileInfo);
  }

  /** What there is at a path. */
  async stat(path: string, { follow = true }: { follow?: boolean } = {}): Promise<FileInfo> {
    return fileInfo(await this.act<Schemas["FileInfo"]>({ action: "stat", path, no_follow: !follow }, true));
  }

  /** Whether there is something at a path. */
  async exists(path: string): Promise<boolean> {
    try {
      await this.stat(path, { follow: false });
      return true;
    } catch (error) {
      if (error instanceof FileMissing) return false;
      throw error;
    }
  }

  /** Makes a folder. */
  async mkdir(path: string, { mode = 0o755, parents = true }: { mode?: number; parents?: boolean } = {}): Promise<void> {
    await this.act({ action: "mkdir", path, mode, parents });
  }

  /** Moves, or renames. */
  async move(path: string, to: string, { replace = false }: { replace?: boolean } = {}): Promise<void> {
    await this.act({ action: "move", path, to, replace });
  }

  /** Removes a file; with `recursive` a folder with all that is in it. */
  async remove(path: string, { recursive = false }: { recursive?: boolean } = {}): Promise<void> {
    await this.act({ action: "remove", path, recursive });
  }

  /** Sets permissions. */
  async chmod(path: string, mode: number): Promise<void> {
    await this.act({ action: "chmod", path, mode });
  }

  /** Gives it to `USER` or `USER:GROUP`. */
  async chown(path: string, owner: string): Promise<void> {
    await this.act({ action: "chown", path, owner });
  }

  /** Makes a symbolic link. */
  async symlink(path: string, target: string): Promise<void> {
    await this.act({ action: "symlink", path, target });
  }

  private act<T = Json>(asked: Schemas["FileAction"], isSafe = false): Promise<T> {
    return this.http.ask<T>("POST", `${this.path}/files`, asked, { isSafe });
  }

  private get(rest: string, path: string): Promise<Response> {
    return this.http.send("GET", this.path + rest, undefined, { params: { path }, limitMs: FILE_MAX_MS, isSafe: true });
  }
}
