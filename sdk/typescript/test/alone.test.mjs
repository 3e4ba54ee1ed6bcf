// Without an engine: what is asked again, what is refused, and both kinds of modules.

import assert from "node:assert/strict";
import { readFileSync, existsSync } from "node:fs";
import { createRequire } from "node:module";
import { test } from "node:test";
import { Client, errors } from "./package.mjs";

function answering(...answers) {
  const asked = [];
  const fetch = async (url, init) => {
    asked.push({ url, init });
    const one = answers.shift();
    if (one instanceof Error) throw one;
    return one;
  };
  return { client: new Client({ url: "http://engine/", key: "zyg_k", retries: 2, fetch }), asked };
}

const refused = (status, code, retry) =>
  Response.json({ error: { code, message: "no", retry_after_seconds: retry }, request_id: "r" }, { status });
const health = () => Response.json({ status: "ok" });
const ran = () => Response.json({ exit_code: 0, stdout: "x", stderr: "", total_time_ms: 1 });
const reset = () => new TypeError("fetch failed", { cause: Object.assign(new Error("reset"), { code: "ECONNRESET" }) });
const nobody = () => new TypeError("fetch failed", { cause: Object.assign(new Error("no"), { code: "ECONNREFUSED" }) });

test("what never began is asked again, and what may have is not", async () => {
  for (const [first, isRead, isAskedAgain] of [
    [refused(503, "busy", 0), false, true],
    [refused(429, "limit_reached", 0), false, true],
    [refused(429, "limit_reached"), false, false],
    [refused(503, "stopping", 0), false, false],
    [refused(500, "internal"), true, false],
    [nobody(), false, true],
    [reset(), true, true],
    [reset(), false, false],
  ]) {
    const { client, asked } = answering(first, isRead ? health() : ran());
    const asking = isRead ? client.health() : client.run("1");
    await (isAskedAgain ? asking : assert.rejects(asking, errors.ZygoteError));
    assert.equal(asked.length, isAskedAgain ? 2 : 1);
    assert.equal(asked[0].init.headers.authorization, "Bearer zyg_k");
    assert.ok(asked[0].url.startsWith("http://engine/v1/"));
  }
  const { client, asked } = answering(...Array.from({ length: 9 }, () => refused(503, "busy", 0)));
  await assert.rejects(client.run("1"), errors.Unavailable);
  assert.equal(asked.length, 3);
});

test("what is given up is not asked again, and its reason is thrown", async () => {
  const giveUp = new AbortController();
  const { client, asked } = answering(refused(503, "busy", 60));
  const asking = client.run("1", { signal: giveUp.signal });
  setTimeout(() => giveUp.abort(new Error("enough")), 10);
  await assert.rejects(asking, /enough/);
  assert.equal(asked.length, 1);
});

test("what is nothing is said all the same", async () => {
  const { client, asked } = answering(ran());
  await client.run("", { timeout: 0 });
  assert.deepEqual(JSON.parse(asked[0].init.body), { code: "", timeout_seconds: 0 });
});

test("an error in a stream is thrown, and bytes of any kind come", async () => {
  const lines = [
    { type: "stdout", data: "one" },
    { type: "stdout", data: { base64: "/w==" } },
    { type: "error", error: { code: "busy", message: "m" } },
  ];
  const body = lines.map((line) => JSON.stringify(line) + "\n").join("");
  const { client } = answering(new Response(body));
  const heard = [];
  await assert.rejects(client.run("1", { onStdout: (text) => heard.push(text) }), errors.Unavailable);
  assert.deepEqual(heard, ["one", "\ufffd"]);
});

test("what is no engine is told, and who names none", async () => {
  const { client } = answering(new Response("<html>", { status: 502 }));
  await assert.rejects(client.health(), errors.ConnectionFailed);
  delete process.env.ZYGOTE_URL;
  assert.throws(() => new Client(), errors.ConnectionFailed);
});

test("every code of the catalogue has a class", () => {
  const docs = new URL("../../../docs/json.md", import.meta.url);
  if (!existsSync(docs)) return;
  const catalogue = readFileSync(docs, "utf8").split("| code | |")[1].split("\n\n")[0];
  const codes = catalogue.split("\n").flatMap((line) => (line.split("|")[1] ?? "").split("`").filter((_, index) => index % 2));
  assert.ok(codes.length > 25);
  const unknown = codes.filter((code) => errors.errorOf({ error: { code, message: "" } }).constructor === errors.ZygoteError);
  assert.deepEqual(unknown.filter((code) => !["interrupted", "file", "internal"].includes(code)), []);
});

test("it can be required, too", { skip: process.env.ZYGOTE_TEST_PACKAGE !== undefined }, () => {
  const require = createRequire(import.meta.url);
  const { Client: Required } = require("../dist/cjs/index.js");
  assert.equal(typeof Required, "function");
  assert.equal(typeof require("../dist/cjs/node.js").local, "function");
});
