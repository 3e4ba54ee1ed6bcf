"""A program of a sandbox that goes on by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from .. import errors
from ..models import Event, ExecResult, octets, text_of
from ._http import Http

#: How long one request waits for an end; it is asked again.
WAIT_S = 30.0


class Process:
    """A program that was started; it goes on whether anybody listens or not."""

    def __init__(self, http: Http, sandbox: str, number: int, told: dict[str, Any]) -> None:
        self._http = http
        self._told = told
        #: Its sandbox's id.
        self.sandbox = sandbox
        #: Its number there.
        self.number = number

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} {self.command} {self.state}>"

    @property
    def command(self) -> list[str]:
        """Its program and arguments."""
        return [octets(one).decode(errors="replace") for one in self._told.get("command", ())]

    @property
    def pid(self) -> int | None:
        """Its pid in the sandbox."""
        pid = self._told.get("pid")
        return None if pid is None else int(pid)

    @property
    def state(self) -> str:
        """``starting``, ``running``, ``ended`` or ``lost``, when it was last asked for."""
        return str(self._told.get("state", "running"))

    @property
    def result(self) -> ExecResult | None:
        """How it ended, when it was last asked for; without output."""
        told = self._told.get("result")
        return ExecResult.of(told) if told else None

    def _path(self, rest: str = "") -> str:
        return f"/v1/sandboxes/{self.sandbox}/processes/{self.number}{rest}"

    def refresh(self) -> Process:
        """Asks how it is."""
        self._told = self._http.ask("GET", self._path())
        return self

    def wait(self, timeout: float = 0.0) -> ExecResult | None:
        """Waits for its end, or for so many seconds: then None."""
        left = timeout
        while True:
            piece = min(left, WAIT_S) if timeout else WAIT_S
            params = {"timeout_seconds": piece}
            self._told = self._http.ask("GET", self._path("/wait"), params=params)
            left -= piece
            if self.state == "lost":
                raise errors.SandboxEnded("its sandbox ended before it", code="sandbox_ended")
            if self.result or (timeout and left <= 0):
                return self.result

    def output(self, since: int | None = None) -> tuple[str, str, int]:
        """What it has said and is kept: standard output, standard error, and where to go on the next time."""
        params = {} if since is None else {"from": since}
        told = self._http.ask("GET", self._path("/output"), params=params)
        stdout, stderr = (text_of(told, one).decode(errors="replace") for one in ("stdout", "stderr"))
        return stdout, stderr, int(told["next"])

    @contextmanager
    def stream(self, since: int | None = None) -> Iterator[Iterator[Event]]:
        """What it has said, and says: events ``stdout``, ``stderr``, ``skipped``, and at last ``result``."""
        params: dict[str, Any] = {"follow": "true"}
        if since is not None:
            params["from"] = since
        with closing(self._http.events("GET", self._path("/output"), params=params)) as all_:
            yield all_

    def write(self, data: str | bytes, *, end: bool = False) -> None:
        """Gives it input; with ``end`` that was all."""
        content = data.encode() if isinstance(data, str) else data
        params = {"end": "true"} if end else {}
        self._http.send(
            "POST",
            self._path("/input"),
            content,
            params=params,
            headers={"content-type": "application/octet-stream"},
            limit=None,
        )

    def close_stdin(self) -> None:
        """Tells it that there is no more input."""
        self.write(b"", end=True)

    def signal(self, signal: int) -> None:
        """Sends a signal to it and to what it has started."""
        self._http.ask("POST", self._path("/signal"), {"signal": int(signal)})

    def kill(self) -> None:
        """Kills it, and what it has started."""
        self.signal(9)
