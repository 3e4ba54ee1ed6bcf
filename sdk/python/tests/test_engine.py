"""Against an engine: programs, interpreters, files, lives of sandboxes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
from conftest import TEMPLATE

import zygote_vm
from zygote_vm import errors


def test_a_program_is_run_and_its_output_and_end_are_told(box: zygote_vm.Sandbox) -> None:
    done = box.exec(["sh", "-c", "cat; echo err >&2; exit 3"], stdin="héllo")
    assert (done.stdout, done.stderr, done.exit_code, done.ok) == ("héllo", "err\n", 3, False)
    with pytest.raises(errors.ProgramFailed) as caught:
        done.check()
    assert caught.value.result is done and caught.value.cause == "err"
    assert box.exec("printf '\\377'").stdout_bytes == b"\xff"
    assert box.exec("echo $A", env={"A": "b"}).check().stdout == "b\n"
    assert box.exec("sleep 60", timeout=0.2).timed_out


def test_output_is_told_as_it_comes(box: zygote_vm.Sandbox) -> None:
    heard: list[str] = []
    done = box.exec("echo one; echo two >&2", on_stdout=heard.append, on_stderr=heard.append)
    assert done.ok and sorted(heard) == ["one\n", "two\n"]


def test_a_process_goes_on_and_takes_input_and_signals(box: zygote_vm.Sandbox) -> None:
    process = box.start(["cat"], stdin=True)
    process.write("hello\n")
    assert process.wait(timeout=0.2) is None and process.state == "running"
    process.close_stdin()
    ended = process.wait()
    assert ended is not None and ended.exit_code == 0
    stdout, _, end = process.output()
    assert (stdout, end) == ("hello\n", 6)
    assert process.output(since=3)[0] == "lo\n"
    sleeper = box.start("echo up; sleep 600")
    with sleeper.stream() as events:
        assert next(iter(events)).text == "up\n"
    sleeper.kill()
    killed = sleeper.wait()
    assert killed is not None and killed.signal == 9
    assert [one.command[0] for one in box.processes()] == ["cat", "sh"]


def test_cells_keep_their_state_and_show_what_they_show(box: zygote_vm.Sandbox) -> None:
    assert box.python("x = 6 * 7").ok
    cell = box.python("print('said'); x")
    assert (cell.text, cell.stdout, cell.execution_count) == ("42", "said\n", 2)
    assert cell._repr_mimebundle_()["text/plain"] == "42"
    failed = box.python("1 / 0")
    assert failed.exception is not None and failed.exception.name == "ZeroDivisionError"
    with pytest.raises(errors.ProgramFailed, match="ZeroDivisionError"):
        failed.check()
    heard: list[str] = []
    box.python("for n in range(3): print(n)", on_stdout=heard.append)
    assert "".join(heard) == "0\n1\n2\n"
    other = box.create_context("other")
    assert other.name == "other" and box.python("'x' in dir()", context="other").text == "False"
    box.restart()
    assert box.python("'x' in dir()").text == "False"
    box.remove_context("other")
    assert [one.name for one in box.contexts()] == ["default"]


def test_a_cell_is_interrupted(box: zygote_vm.Sandbox) -> None:
    box.python("import time")
    running = threading.Event()
    timer = threading.Thread(target=lambda: (running.wait(), time.sleep(0.2), box.interrupt()))
    timer.start()
    cell = box.python("print(1, flush=True); time.sleep(600)", on_stdout=lambda _: running.set())
    timer.join()
    assert cell.exception is not None and cell.exception.name == "KeyboardInterrupt"
    assert box.python("time.sleep(600)", timeout=0.2).timed_out


def test_files_go_in_and_out(box: zygote_vm.Sandbox, tmp_path: Path) -> None:
    root = f"/tmp/zygote-sdk-{os.getpid()}"
    files = box.files
    try:
        files.write(f"{root}/deep/a.bin", b"\x00\xff")
        files.write(f"{root}/deep/a.bin", b"!", append=True)
        assert files.read(f"{root}/deep/a.bin") == b"\x00\xff!"
        files.write(f"{root}/text", "grüß dich", mode=0o600)
        assert files.read_text(f"{root}/text") == "grüß dich"
        assert (files.stat(f"{root}/text").mode, files.stat(f"{root}/text").size) == (0o600, 11)
        files.symlink(f"{root}/link", "text")
        listed = {one.path: one.type for one in files.list(root, depth=2)}
        assert listed == {"deep": "folder", "deep/a.bin": "file", "link": "link", "text": "file"}
        with files.open(f"{root}/text") as pieces:
            assert b"".join(pieces).decode() == "grüß dich"
        files.download(root, tmp_path / "out")
        assert (tmp_path / "out/deep/a.bin").read_bytes() == b"\x00\xff!"
        assert (tmp_path / "out/link").readlink() == Path("text")
        files.upload(tmp_path / "out", f"{root}/again")
        assert files.read(f"{root}/again/deep/a.bin") == b"\x00\xff!"
        files.move(f"{root}/text", f"{root}/moved")
        assert files.exists(f"{root}/moved") and not files.exists(f"{root}/text")
        with pytest.raises(errors.FileMissing):
            files.read(f"{root}/text")
        with pytest.raises(errors.FileFailed) as caught:
            files.remove(root)
        assert caught.value.cause == "ENOTEMPTY"
        with box.watch(root) as changes:
            writer = threading.Timer(0.2, lambda: files.write(f"{root}/new", "x"))
            writer.start()
            seen = next(one for one in changes if one.data["path"] == "new")
            writer.join()
        assert seen.type in ("created", "renamed", "written")
    finally:
        files.remove(root, recursive=True)


def test_a_sandbox_is_found_listed_and_ended(client: zygote_vm.Client) -> None:
    name = f"sdk-{os.getpid()}"
    with client.create(TEMPLATE, name=name, env={"A": "1"}, ttl=600) as box:
        assert client.sandbox(name).id == box.id
        assert box.exec("echo $A").stdout == "1\n"
        assert box.id in {one.id for one in client.sandboxes(template=TEMPLATE)}
        with pytest.raises(errors.Conflict) as caught:
            client.create(TEMPLATE, name=name)
        assert caught.value.code == "name_taken"
        before = box.info.expires_unix_s
        box.extend(ttl=6000)
        assert before is not None and (box.info.expires_unix_s or 0) > before
        with client.events(sandbox=box.id, follow=False) as events:
            assert next(iter(events)).type == "made"
        threading.Timer(0.1, box.remove).start()
        assert box.wait().state == "ended"
    assert client.sandboxes(state="ended")
    with pytest.raises(errors.SandboxNotFound) as missing:
        client.sandbox("nobody-is-called-so")
    assert missing.value.request_id and missing.value.remedy


def test_what_cannot_be_asked_is_told_with_its_class(client: zygote_vm.Client) -> None:
    with pytest.raises(errors.TemplateNotFound):
        client.create("nothing-of-this-name")
    with pytest.raises(TypeError):
        client.run("1", command=["true"])
    with pytest.raises(errors.BadRequest):
        client.create(TEMPLATE, name="not a name")


@pytest.mark.anyio
async def test_the_same_is_there_for_those_who_await(client: zygote_vm.Client) -> None:
    async with zygote_vm.AsyncClient(socket=os.environ["ZYGOTE_SOCKET"]) as other:
        async with await other.create(TEMPLATE) as box:
            assert (await box.exec("echo hi")).stdout == "hi\n"
            await box.python("x = 1")
            assert (await box.python("x")).text == "1"
            process = await box.start("echo a; sleep 600")
            async with process.stream() as events:
                async for event in events:
                    assert event.text == "a\n"
                    break
            await process.kill()
            path = f"/tmp/zygote-sdk-async-{os.getpid()}"
            await box.files.write(path, "x")
            assert await box.files.read(path) == b"x"
            await box.files.remove(path)
        assert (await box.wait()).state == "ended"


@pytest.mark.anyio
async def test_what_is_cancelled_ends() -> None:
    async with zygote_vm.AsyncClient(socket=os.environ["ZYGOTE_SOCKET"]) as other, await other.create(TEMPLATE) as box:
        code = "import time; time.sleep(600)"
        for asked in (
            lambda: box.exec("sleep 600"),
            lambda: box.exec("sleep 600", on_stdout=lambda text: None),
            lambda: box.python(code),
            lambda: box.python(code, on_stdout=lambda text: None),
            lambda: other.run(code, template=TEMPLATE),
        ):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asked(), 0.3)
        assert (await box.python("6 * 7", timeout=20)).text == "42"
        for process in await box.processes():
            assert process.command == ["python3"] or await process.wait(20) is not None
