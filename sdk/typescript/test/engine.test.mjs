// Against an engine: the one that ZYGOTE_SOCKET names; its template is ZYGOTE_TEST_TEMPLATE.

import assert from "node:assert/strict";
import { test } from "node:test";
import { errors, local } from "./package.mjs";

const TEMPLATE = process.env.ZYGOTE_TEST_TEMPLATE ?? "python";
const skip = process.env.ZYGOTE_SOCKET ? false : "no engine: ZYGOTE_SOCKET is not set";

async function withBox(use) {
  const client = await local();
  const box = await client.create(TEMPLATE);
  try {
    await use(box, client);
  } finally {
    await box[Symbol.asyncDispose]();
  }
}

const after = (ms, what) => new Promise((resolve) => setTimeout(() => resolve(what()), ms));

test("a program is run, and its output and end are told", { skip }, () =>
  withBox(async (box) => {
    const done = await box.exec(["sh", "-c", "cat; echo err >&2; exit 3"], { stdin: "héllo" });
    assert.deepEqual([done.stdout, done.stderr, done.exitCode, done.ok], ["héllo", "err\n", 3, false]);
    assert.throws(() => done.check(), (error) => error instanceof errors.ProgramFailed && error.result === done);
    assert.deepEqual([...(await box.exec("printf '\\377'")).stdoutBytes], [255]);
    assert.equal((await box.exec("echo $A", { env: { A: "b" } })).check().stdout, "b\n");
    assert.ok((await box.exec("sleep 60", { timeout: 0.2 })).timedOut);
    const heard = [];
    await box.exec("echo one; echo two >&2", { onStdout: (text) => heard.push(text), onStderr: (text) => heard.push(text) });
    assert.deepEqual(heard.sort(), ["one\n", "two\n"]);
  }));

test("what is given up ends", { skip }, () =>
  withBox(async (box, client) => {
    const path = "/tmp/given-up-" + box.id;
    const given = (options) => ({ signal: AbortSignal.timeout(300), ...options });
    const onStdout = () => undefined;
    const code = "import time; time.sleep(60)";
    const isTimeout = { name: "TimeoutError" };
    await assert.rejects(box.exec(`sleep 60; touch ${path}`, given()), isTimeout);
    await assert.rejects(box.exec("sleep 60", given({ onStdout })), isTimeout);
    await assert.rejects(box.python(code, given()), isTimeout);
    await assert.rejects(client.run(code, given({ template: TEMPLATE })), isTimeout);
    await assert.rejects(client.batch([[code, { template: TEMPLATE }]], given()), isTimeout);
    // The interpreter is free again, and no program is left.
    assert.equal((await box.python("6 * 7", { timeout: 20 })).text, "42");
    for (const process of await box.processes()) {
      assert.ok(process.command[0] === "python3" || (await process.wait(20)));
    }
    assert.equal((await box.exec(["test", "-e", path])).exitCode, 1);
  }));

test("a process goes on, and takes input and signals", { skip }, () =>
  withBox(async (box) => {
    const cat = await box.start(["cat"], { stdin: true });
    await cat.write("hello\n");
    assert.equal(await cat.wait(0.2), undefined);
    await cat.closeStdin();
    assert.equal((await cat.wait()).exitCode, 0);
    assert.deepEqual(await cat.output(3), { stdout: "lo\n", stderr: "", next: 6 });
    const sleeper = await box.start("echo up; sleep 600");
    for await (const event of sleeper.stream()) {
      assert.equal(event.data, "up\n");
      break;
    }
    await sleeper.kill();
    assert.equal((await sleeper.wait()).signal, 9);
    assert.deepEqual((await box.processes()).map((one) => one.command[0]), ["cat", "sh"]);
  }));

test("cells keep their state, and show what they show", { skip }, () =>
  withBox(async (box) => {
    await box.python("x = 6 * 7");
    const cell = await box.python("print('said'); x");
    assert.deepEqual([cell.text, cell.stdout, cell.executionCount], ["42", "said\n", 2]);
    const failed = await box.python("1 / 0");
    assert.equal(failed.exception.name, "ZeroDivisionError");
    assert.throws(() => failed.check(), /ZeroDivisionError/);
    let heard = "";
    await box.python("for n in range(3): print(n)", { onStdout: (text) => (heard += text) });
    assert.equal(heard, "0\n1\n2\n");
    await box.createContext("other");
    assert.equal((await box.python("'x' in dir()", { context: "other" })).text, "False");
    await box.restart();
    assert.equal((await box.python("'x' in dir()")).text, "False");
    await box.python("import time");
    const interrupted = box.python("time.sleep(600)");
    await after(300, () => box.interrupt());
    assert.equal((await interrupted).exception.name, "KeyboardInterrupt");
  }));

test("files go in and out", { skip }, () =>
  withBox(async (box) => {
    const root = `/tmp/zygote-ts-${process.pid}`;
    const { files } = box;
    try {
      await files.write(`${root}/deep/a.bin`, new Uint8Array([0, 255]));
      await files.write(`${root}/deep/a.bin`, "!", { append: true });
      assert.deepEqual([...(await files.read(`${root}/deep/a.bin`))], [0, 255, 33]);
      await files.write(`${root}/text`, "grüß dich", { mode: 0o600 });
      assert.equal(await files.readText(`${root}/text`), "grüß dich");
      assert.equal((await files.stat(`${root}/text`)).mode, 0o600);
      const stream = new Blob(["in", " pieces"]).stream();
      await files.write(`${root}/stream`, stream);
      let read = "";
      for await (const piece of await files.open(`${root}/stream`)) read += new TextDecoder().decode(piece);
      assert.equal(read, "in pieces");
      const listed = (await files.list(root, { depth: 2 })).map((one) => one.path).sort();
      assert.deepEqual(listed, ["deep", "deep/a.bin", "stream", "text"]);
      await files.mkdir(`${root}/again`);
      await files.untar(`${root}/again`, await files.tar(`${root}/deep`));
      assert.deepEqual([...(await files.read(`${root}/again/deep/a.bin`))], [0, 255, 33]);
      await files.move(`${root}/text`, `${root}/moved`);
      assert.deepEqual([await files.exists(`${root}/moved`), await files.exists(`${root}/text`)], [true, false]);
      await assert.rejects(files.read(`${root}/text`), errors.FileMissing);
      await assert.rejects(files.remove(root), (error) => error instanceof errors.FileFailed && error.reason === "ENOTEMPTY");
      const writing = after(300, () => files.write(`${root}/new`, "x"));
      for await (const change of box.watch(root)) if (change.path === "new") break;
      await writing;
    } finally {
      await files.remove(root, { recursive: true });
    }
  }));

test("a sandbox is found, listed and ended, and what cannot be is told by its class", { skip }, async () => {
  const client = await local();
  const name = `ts-${process.pid}`;
  const box = await client.create(TEMPLATE, { name, env: { A: "1" }, ttl: 600 });
  assert.equal((await client.sandbox(name)).id, box.id);
  assert.equal((await box.exec("echo $A")).stdout, "1\n");
  assert.ok((await client.sandboxes()).some((one) => one.id === box.id));
  await assert.rejects(client.create(TEMPLATE, { name }), (error) => error.code === "name_taken");
  for await (const event of client.events({ sandbox: box.id, follow: false })) {
    assert.equal(event.type, "made");
    break;
  }
  const ending = after(100, () => box.remove());
  assert.equal((await box.wait()).state, "ended");
  await ending;
  await assert.rejects(client.create("nothing-of-this-name"), errors.TemplateNotFound);
  await assert.rejects(client.sandbox("nobody"), (error) => error instanceof errors.SandboxNotFound && !!error.requestId);
});
