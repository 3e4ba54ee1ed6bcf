"""Without an engine: what is asked again, what is refused, what comes out of an archive."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import httpx
import pytest

import zygote_vm
from zygote_vm import _archive, _where, errors
from zygote_vm._sync._http import Http

HERE = _where.Where("http://engine")


def answering(*answers: httpx.Response | Exception) -> tuple[Http, list[httpx.Request]]:
    """Somebody who gives these answers, one after the other, and what they were asked."""
    asked: list[httpx.Request] = []
    rest = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        one = rest.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    return Http(HERE, 2, True, httpx.MockTransport(answer)), asked


def refused(status: int, code: str, retry: int | None = None) -> httpx.Response:
    told = {"code": code, "message": "no", "retry_after_seconds": retry}
    return httpx.Response(status, json={"error": told, "request_id": "r"})


def good() -> httpx.Response:
    return httpx.Response(200, json={"ok": True})


def test_what_never_began_is_asked_again_and_what_may_have_is_not() -> None:
    broken = httpx.ReadError("reset")
    for answers, method, is_asked_again in [
        ([refused(503, "busy", 0), good()], "POST", True),
        ([refused(429, "limit_reached", 0), good()], "POST", True),
        ([httpx.ConnectError("nobody"), good()], "POST", True),
        ([broken, good()], "GET", True),
        ([broken, good()], "POST", False),
        ([refused(503, "stopping", 0), good()], "POST", False),
        # A limit that waiting does not move.
        ([refused(429, "limit_reached"), good()], "POST", False),
        ([refused(500, "internal"), good()], "GET", False),
    ]:
        http, asked = answering(*answers)
        if is_asked_again:
            assert http.ask(method, "/x") == {"ok": True}
        else:
            with pytest.raises(errors.ZygoteError):
                http.ask(method, "/x")
        assert len(asked) == 1 + is_asked_again, answers
    http, asked = answering(*[refused(503, "busy", 0) for _ in range(9)])
    with pytest.raises(errors.Unavailable):
        http.ask("POST", "/x")
    assert len(asked) == 3


def test_no_time_limit_is_said() -> None:
    http, asked = answering(httpx.Response(200, json={"exit_code": 0}))
    client = zygote_vm.Client("http://engine")
    client._http = http
    assert client.run("", timeout=0).ok
    assert json.loads(asked[0].content) == {"code": "", "template": "python", "timeout_seconds": 0}


def test_every_code_of_the_catalogue_has_a_class() -> None:
    docs = Path(__file__).parents[3] / "docs/json.md"
    if not docs.exists():
        pytest.skip("the docs are not here")
    catalogue = docs.read_text().split("| code | |")[1].split("\n\n")[0]
    codes = {word for line in catalogue.splitlines() for word in line.split("|")[1:2] for word in word.split("`")[1::2]}
    assert len(codes) > 25
    unknown = {code for code in codes if type(errors.of({"error": {"code": code}})) is errors.ZygoteError}
    # Of the command line alone, and the one that says that nothing is known.
    assert unknown <= {"interrupted", "file", "internal"}, unknown


def test_what_is_no_engine_is_told() -> None:
    http, _ = answering(httpx.Response(502, text="<html>"))
    with pytest.raises(errors.ConnectionFailed, match="no engine"):
        http.ask("GET", "/x")


def test_an_error_in_a_stream_is_raised() -> None:
    lines = [
        {"type": "stdout", "data": {"base64": "/w=="}},
        {"type": "error", "error": {"code": "busy", "message": "m"}},
    ]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    http, _ = answering(httpx.Response(200, text=body))
    events = http.events("POST", "/x", {})
    assert next(events).bytes == b"\xff"
    with pytest.raises(errors.Unavailable):
        next(events)


def test_a_key_and_an_address_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZYGOTE_URL", "https://engine:7070/")
    monkeypatch.setenv("ZYGOTE_API_KEY", "zyg_k")
    assert _where.where(None, None, None) == _where.Where("https://engine:7070", key="zyg_k")
    assert _where.where("http://other", "own", None) == _where.Where("http://other", key="own")
    assert _where.where(None, None, "/run/x").socket == "/run/x"
    monkeypatch.delenv("ZYGOTE_URL")
    monkeypatch.setenv("ZYGOTE_PROGRAM", "/nothing/here")
    with pytest.raises(errors.ConnectionFailed, match="/nothing/here"):
        zygote_vm.Client()


def archive(*members: tuple[str, str, bytes]) -> tarfile.TarFile:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as made:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            if kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, content.decode()
                made.addfile(member)
            else:
                member.size = len(content)
                made.addfile(member, io.BytesIO(content))
    packed.seek(0)
    return tarfile.open(fileobj=packed)


def test_nothing_of_an_archive_lands_elsewhere(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ["/etc/x", "../x", "a/../../x"]:
        with pytest.raises(errors.FileFailed, match="elsewhere"):
            _archive.unpack(archive((name, "file", b"x")), target)
    with pytest.raises((errors.FileFailed, OSError)):
        _archive.unpack(archive(("f/out", "link", b".."), ("f/out/x", "file", b"x")), tmp_path / "second")
    assert not (tmp_path / "x").exists()
    (tmp_path / "third").mkdir()
    (tmp_path / "third/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.FileFailed):
        _archive.unpack(archive(("f/link", "file", b"x")), tmp_path / "third")
    assert not (tmp_path / "elsewhere").exists()
