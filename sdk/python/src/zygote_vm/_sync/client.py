"""An engine, wherever it is."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Callable, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any

from .. import errors
from .._requests import Command, on_output, program, say, whole
from .._where import where
from ..models import Event, RunResult, SandboxInfo, TemplateInfo
from ._http import Http
from .sandbox import Sandbox

#: How much longer than its time limit a program's answer may take: for its fork, and the way, in seconds.
MARGIN_S = 120.0
#: The template that every engine can build.
BUILT_IN = "python"


class Client:
    """Asks one engine.

    Without arguments: the one that ``ZYGOTE_URL`` and ``ZYGOTE_API_KEY`` name, else this machine's, which is started
    if it is not there.

    Args:
        url: Where it is, such as ``https://host:7070``.
        key: A key of it (``zygote key create``).
        socket: Its socket, if it is on this machine.
        retries: How often to ask again, where that is safe: what was refused before it began (``Retry-After`` is
            heeded), what never reached the engine, and what only reads.
        verify: Whether to check its certificate; or a file with those that are trusted.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        socket: str | None = None,
        retries: int = 3,
        verify: bool | str = True,
    ) -> None:
        found = where(url, key, socket)
        self._http = Http(found, retries, verify)
        self._is_here = found.socket is not None

    def close(self) -> None:
        """Lets its connections go."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        code: str | None = None,
        *,
        command: Command | None = None,
        args: Sequence[str] = (),
        template: str = "python",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        stdin: str | bytes | None = None,
        files: Mapping[str, str | bytes] | None = None,
        get: Iterable[str] = (),
        timeout: float = 300.0,
        measure: bool = False,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
    ) -> RunResult:
        """Runs Python code, or a command, in a fork of a template that nobody else has.

        Args:
            command: A program and its arguments; a string is for ``sh -c``.
            files: What to put into the sandbox first, by path.
            get: Paths of what is wanted once it has ended.
            timeout: Seconds; 0: as long as it likes.
            on_stdout, on_stderr: Called with what it says, as it says it; then it is not in the result.
        """
        asked = whole(
            program(code, command, args),
            template=template,
            env=dict(env or {}),
            cwd=cwd,
            stdin=stdin,
            files=files,
            get=list(get),
            timeout_seconds=timeout,
            measure=measure,
        )
        limit = timeout + MARGIN_S if timeout else None
        try:
            return self._run(asked, limit, on_stdout, on_stderr)
        except errors.TemplateNotFound:
            if not self._built(template):
                raise
        return self._run(asked, limit, on_stdout, on_stderr)

    def _run(
        self,
        asked: dict[str, Any],
        limit: float | None,
        on_stdout: Callable[[str], Any] | None,
        on_stderr: Callable[[str], Any] | None,
    ) -> RunResult:
        if on_stdout is None and on_stderr is None:
            return RunResult.of(self._http.ask("POST", "/v1/exec", asked, limit=limit))
        happening = self._http.events("POST", "/v1/exec", {**asked, "line_buffered": True}, limit=limit)
        with closing(happening) as events:
            for event in events:
                if event.type == "result":
                    return RunResult.of(event.end)
                on_output(event, on_stdout, on_stderr)
        raise errors.ConnectionFailed("the run ended without a result")

    def batch(self, executions: Iterable[str | Mapping[str, Any]], *, timeout: float = 300.0) -> list[RunResult]:
        """Runs many, each in a fork of its own, and gives back their results in their order.

        Each is Python code, or the arguments of :meth:`run` (``code``, ``command``, ``env`` …). One that had no sandbox
        has the exit code 125 and an ``error``.
        """
        asked = []
        for one in executions:
            given: dict[str, Any] = {"code": one} if isinstance(one, str) else dict(one)
            what = program(given.pop("code", None), given.pop("command", None), given.pop("args", ()))
            given["timeout_seconds"] = given.pop("timeout", timeout)
            asked.append(whole(what, **given))
        told = self._http.ask("POST", "/v1/exec/batch", {"executions": asked}, limit=None)
        return [RunResult.of(one) for one in told["results"]]

    def create(
        self,
        template: str = "python",
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        ttl: float = 0.0,
        idle: float = 0.0,
        moments: Mapping[str, Any] | None = None,
    ) -> Sandbox:
        """Makes a sandbox that lives until it is ended.

        Args:
            name: Nobody else's among those that live.
            env: Variables for all of its processes.
            ttl: How long it lives, in seconds; 0: until it is ended.
            idle: How long it lives without being used.
            moments: Moments that are kept without being asked for: ``keep``, ``every_seconds``, ``on_exec``.
        """
        asked = whole(
            {},
            template=template,
            name=name,
            env=dict(env or {}),
            ttl_seconds=ttl,
            idle_seconds=idle,
            moments=dict(moments) if moments else None,
        )
        try:
            told = self._create(asked)
        except errors.TemplateNotFound:
            if not self._built(template):
                raise
            told = self._create(asked)
        return Sandbox(self._http, SandboxInfo.of(told))

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        # So that it may be asked again when the answer did not come.
        told: dict[str, Any] = self._http.ask(
            "POST",
            "/v1/sandboxes",
            asked,
            headers={"idempotency-key": secrets.token_hex(16)},
            limit=MARGIN_S,
            is_safe=True,
        )
        return told

    def sandbox(self, words: str) -> Sandbox:
        """One that is there: by its name, its id, or the beginning or end of its id."""
        told = self._http.ask("GET", f"/v1/sandboxes/{quoted(words)}")
        return Sandbox(self._http, SandboxInfo.of(told))

    def sandboxes(self, *, state: str | None = None, template: str | None = None) -> list[SandboxInfo]:
        """Those that live, or are in a state (``all``: also those that have ended)."""
        params = {"state": state, "template": template}
        asked = {name: value for name, value in params.items() if value}
        found: list[SandboxInfo] = []
        while True:
            page = self._http.ask("GET", "/v1/sandboxes", params=asked)
            found += [SandboxInfo.of(one) for one in page["sandboxes"]]
            if not page.get("next"):
                return found
            asked["after"] = page["next"]

    def templates(self) -> list[TemplateInfo]:
        """What can be forked."""
        told = self._http.ask("GET", "/v1/templates")
        return [TemplateInfo.of(one) for one in told["templates"]]

    def build(
        self, recipe: str = BUILT_IN, *, force: bool = False, on_progress: Callable[[str], Any] | None = None
    ) -> TemplateInfo:
        """Builds a template, if it is not there as its recipe says; that takes minutes.

        Args:
            recipe: One that is built in, a template's name, or an absolute path of the engine's host, in .toml.
            on_progress: Called with what is being done.
        """
        asked = whole({"recipe": recipe}, force=force)
        with closing(self._http.events("POST", "/v1/templates", asked)) as events:
            for event in events:
                if event.type == "built":
                    return TemplateInfo.of(event.data)
                if event.type == "progress" and on_progress:
                    on_progress(event.data["message"])
        raise errors.ConnectionFailed("the build ended without a result")

    def _built(self, template: str) -> bool:
        """Builds what is built in, where it is missing on this machine, as ``zygote run`` does it; says whether."""
        if not self._is_here or template != BUILT_IN:
            return False
        say(f"the template {template} is built, once; that takes some minutes")
        self.build(template, on_progress=say)
        return True

    def remove_template(self, name: str, *, derived: bool = False) -> None:
        """Removes one, and with ``derived`` those that are derived from it."""
        params = {"derived": "true" if derived else "false"}
        self._http.ask("DELETE", f"/v1/templates/{quoted(name)}", params=params)

    def health(self) -> dict[str, Any]:
        """Whether it is there, and what it can fork."""
        told: dict[str, Any] = self._http.ask("GET", "/v1/health")
        return told

    @contextmanager
    def events(self, *, after: int = 0, follow: bool = True, sandbox: str | None = None) -> Iterator[Iterator[Event]]:
        """What has happened to sandboxes behind an event's number, and what happens."""
        params: dict[str, Any] = {"after": after, "follow": "true" if follow else "false"}
        if sandbox:
            params["sandbox"] = sandbox
        with closing(self._http.events("GET", "/v1/events", params=params)) as events:
            yield events


def quoted(segment: str) -> str:
    """A path's segment (RFC 3986 §2.1)."""
    from urllib.parse import quote

    return quote(segment, safe="")
