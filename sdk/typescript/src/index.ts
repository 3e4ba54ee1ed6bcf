/** Python in virtual machines that are forked, not booted. */

export { Client, type ClientOptions, type CreateOptions, type RunOptions, type What } from "./client.js";
export * from "./errors.js";
export { Files } from "./files.js";
export type { Event, Fetch } from "./http.js";
export {
  Cell,
  ExecResult,
  Output,
  RunResult,
  type Bundle,
  type ContextInfo,
  type Difference,
  type FileInfo,
  type GotFile,
  type Moment,
  type SandboxInfo,
  type Stats,
  type TemplateInfo,
} from "./models.js";
export { Process } from "./process.js";
export type { Command } from "./requests.js";
export { Sandbox, type BranchOptions, type ExecOptions, type PythonOptions } from "./sandbox.js";
