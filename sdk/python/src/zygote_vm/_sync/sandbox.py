"""A sandbox that lives: its programs, its interpreters, its files, its branches."""

from __future__ import annotations

from collections.abc import Iterator, Callable, Mapping
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import quote

from .. import errors
from .._requests import Command, argv, on_output, whole
from ..models import (
    Cell,
    ContextInfo,
    Difference,
    Event,
    ExecResult,
    Moment,
    SandboxInfo,
    Stats,
    TemplateInfo,
    octets,
)
from ._http import Http
from .files import Files
from .process import Process

#: How much longer than its time limit an answer may take, in seconds.
MARGIN_S = 60.0
#: How long what is done to a whole machine may take, in seconds; the engine has deadlines of its own.
MACHINE_MAX_S = 1200.0
#: How long one request waits for an end; it is asked again.
WAIT_S = 30.0


class Sandbox:
    """A virtual machine that lives until it is ended. With ``with`` it ends there."""

    def __init__(self, http: Http, info: SandboxInfo, client: Any = None) -> None:
        self._http = http
        self._client = client
        #: What was known of it when it was last asked for; see :meth:`refresh`.
        self.info = info
        #: Its files.
        self.files = Files(http, info.id)

    @classmethod
    def create(cls, template: str = "python", **options: Any) -> Sandbox:
        """Makes one, on the engine that the environment names, or this machine's: see ``Client.create``."""
        from .client import Client

        client = Client()
        try:
            made = client.create(template, **options)
        except BaseException:
            client.close()
            raise
        # Its connections go with it.
        made._client = client
        return made

    @property
    def id(self) -> str:
        """Its id."""
        return self.info.id

    @property
    def name(self) -> str | None:
        """Its name, if it has one."""
        return self.info.name

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<{type(self).__name__}{name} {self.id} {self.info.state}>"

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.remove()
        except errors.SandboxNotFound:
            # It has gone before us.
            pass
        finally:
            if self._client is not None:
                self._client.close()

    def _path(self, rest: str = "") -> str:
        return f"/v1/sandboxes/{self.id}{rest}"

    def refresh(self) -> SandboxInfo:
        """What is known of it now."""
        self.info = SandboxInfo.of(self._http.ask("GET", self._path()))
        return self.info

    def remove(self) -> SandboxInfo:
        """Ends it."""
        told = self._http.ask("DELETE", self._path(), is_safe=True)
        self.info = SandboxInfo.of(told)
        return self.info

    def wait(self, timeout: float = 0.0) -> SandboxInfo:
        """Waits until it has ended, or for so many seconds; its ``state`` says which."""
        left = timeout
        while True:
            piece = min(left, WAIT_S) if timeout else WAIT_S
            params = {"timeout_seconds": piece}
            told = self._http.ask("GET", self._path("/wait"), params=params)
            self.info = SandboxInfo.of(told)
            left -= piece
            if self.info.state == "ended" or (timeout and left <= 0):
                return self.info

    def extend(self, *, ttl: float | None = None, idle: float | None = None) -> None:
        """Has it live so long from now on, or so long without being used, in seconds; 0: for any time."""
        asked: dict[str, float] = {}
        if ttl is not None:
            asked["ttl_seconds"] = ttl
        if idle is not None:
            asked["idle_seconds"] = idle
        self.info = SandboxInfo.of(self._http.ask("PATCH", self._path(), asked))

    def stats(self) -> Stats:
        """What it takes of its host."""
        return Stats.of(self._http.ask("GET", self._path("/stats")))

    # Programs.

    def exec(
        self,
        command: Command,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: str | bytes | None = None,
        timeout: float = 0.0,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
    ) -> ExecResult:
        """Runs a program to its end; it is killed when that is given up: cancelled, or interrupted.

        Args:
            command: A program and its arguments; a string is for ``sh -c``.
            user: ``USER`` or ``USER:GROUP`` of the sandbox; root without.
            timeout: Seconds, after which it is killed; 0: none.
            on_stdout, on_stderr: Called with what it says, as it says it; then it is not in the result.
        """
        asked = {**self._asked(command, env, cwd, user, stdin, timeout), "kill_on_disconnect": True}
        limit = timeout + MARGIN_S if timeout else None
        path = self._path("/exec")
        if on_stdout is None and on_stderr is None:
            return ExecResult.of(self._http.ask("POST", path, asked, limit=limit))
        with closing(self._http.events("POST", path, asked, limit=limit)) as events:
            for event in events:
                if event.type == "result":
                    return ExecResult.of(event.end)
                on_output(event, on_stdout, on_stderr)
        raise errors.ConnectionFailed("the program's output ended without a result")

    def start(
        self,
        command: Command,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        timeout: float = 0.0,
        stdin: bool = False,
    ) -> Process:
        """Starts a program that goes on by itself, and keeps the newest of what it says.

        Args:
            stdin: Whether it is to be given input; else it has none.
        """
        asked = self._asked(command, env, cwd, user, None, timeout)
        asked["detach"] = True
        if stdin:
            asked["stdin_stream"] = True
        told = self._http.ask("POST", self._path("/exec"), asked)
        return Process(self._http, self.id, told["process"], told)

    def processes(self) -> list[Process]:
        """Those that somebody has asked for."""
        told = self._http.ask("GET", self._path("/processes"))
        return [Process(self._http, self.id, one["process"], one) for one in told["processes"]]

    @staticmethod
    def _asked(
        command: Command,
        env: Mapping[str, str] | None,
        cwd: str,
        user: str,
        stdin: str | bytes | None,
        timeout: float,
    ) -> dict[str, Any]:
        return whole(
            {"command": argv(command)},
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=stdin,
            timeout_seconds=timeout or None,
        )

    # Interpreters.

    def python(
        self,
        code: str,
        *,
        context: str = "default",
        timeout: float = 0.0,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
        on_display: Callable[[dict[str, str]], Any] | None = None,
    ) -> Cell:
        """Runs a cell in an interpreter whose state stays.

        Args:
            context: Which interpreter; made if it is not there.
            timeout: Seconds, after which it is interrupted; 0: none.
            on_stdout, on_stderr, on_display: Called with what it says and shows, in the order in which it does.
        """
        asked = whole(
            {"code": code, "context": context, "interrupt_on_disconnect": True}, timeout_seconds=timeout or None
        )
        limit = timeout + MARGIN_S if timeout else None
        path = self._path("/code")
        if on_stdout is None and on_stderr is None and on_display is None:
            return Cell.of(self._http.ask("POST", path, asked, limit=limit))
        with closing(self._http.events("POST", path, asked, limit=limit)) as events:
            for event in events:
                if event.type == "result":
                    return Cell.of(event.end)
                if event.type == "display" and on_display:
                    on_display(event.data["data"])
                on_output(event, on_stdout, on_stderr)
        raise errors.ConnectionFailed("the cell's output ended without a result")

    def contexts(self) -> list[ContextInfo]:
        """Its interpreters."""
        told = self._http.ask("GET", self._path("/contexts"))
        return [ContextInfo.of(one) for one in told["contexts"]]

    def create_context(self, name: str, *, cwd: str = "") -> ContextInfo:
        """Starts one more."""
        asked = whole({"name": name}, cwd=cwd)
        return ContextInfo.of(self._http.ask("POST", self._path("/contexts"), asked))

    def interrupt(self, context: str = "default") -> None:
        """Interrupts the cell that runs, as Ctrl-C does."""
        self._http.ask("POST", self._path(f"/contexts/{quote(context, safe='')}/interrupt"))

    def restart(self, context: str = "default") -> ContextInfo:
        """Starts an interpreter anew, without its state."""
        path = self._path(f"/contexts/{quote(context, safe='')}/restart")
        return ContextInfo.of(self._http.ask("POST", path))

    def remove_context(self, context: str) -> None:
        """Ends an interpreter."""
        self._http.ask("DELETE", self._path(f"/contexts/{quote(context, safe='')}"))

    # The whole machine.

    def branch(
        self,
        n: int = 1,
        *,
        at: Moment | str | None = None,
        name: str | None = None,
        ttl: float | None = None,
        idle: float | None = None,
        reseed: bool = False,
        freeze: float = 5.0,
        force: bool = False,
    ) -> list[Sandbox]:
        """Makes children that go on where it is: processes, memory, files.

        Args:
            at: A moment that is kept, in place of now.
            name: Of the child; of several, what theirs begin with: ``NAME-1``, ``NAME-2`` …
            reseed: Whether its interpreters draw random numbers that are not those that this one will draw.
            freeze: How long its processes may take to stop, in seconds.
            force: Whether to go on although some have not.
        """
        asked = whole({"count": n, "freeze_seconds": freeze}, name=name, reseed=reseed, force=force)
        if at is not None:
            asked["at"] = words(at)
        if ttl is not None:
            asked["ttl_seconds"] = ttl
        if idle is not None:
            asked["idle_seconds"] = idle
        told = self._http.ask("POST", self._path("/branch"), asked, limit=MACHINE_MAX_S)
        return [Sandbox(self._http, SandboxInfo.of(one)) for one in told["sandboxes"]]

    def snapshot(self, name: str | None = None, *, freeze: float = 5.0, force: bool = False) -> Moment:
        """Keeps this moment, to go back to it, or to branch from it. One without a name gives way to newer ones."""
        asked = whole({"freeze_seconds": freeze}, name=name, force=force)
        told = self._http.ask("POST", self._path("/moments"), asked, limit=MACHINE_MAX_S)
        return Moment.of(told)

    def moments(self) -> list[Moment]:
        """Those that are kept."""
        told = self._http.ask("GET", self._path("/moments"))
        return [Moment.of(one) for one in told["moments"]]

    def forget(self, moment: Moment | str) -> None:
        """Lets one go."""
        path = self._path(f"/moments/{quote(words(moment), safe='')}")
        self._http.ask("DELETE", path)

    def rollback(self, to: Moment | str = "@-1", *, reseed: bool = False) -> None:
        """Goes back to a moment: by its name, its number (``@7``), or counted from the newest (``@-1``)."""
        asked = whole({"to": words(to)}, reseed=reseed)
        told = self._http.ask("POST", self._path("/rollback"), asked, limit=MACHINE_MAX_S)
        self.info = SandboxInfo.of(told)

    def diff(
        self,
        at: Moment | str | None = None,
        *,
        since: Sandbox | Moment | str | None = None,
    ) -> Difference:
        """What differs between a moment of it (now) and an earlier one.

        Args:
            since: A moment of this sandbox, or another sandbox as it is now; without, this one's beginning.
        """
        asked: dict[str, Any] = {}
        if at is not None:
            asked["at"] = words(at)
        if isinstance(since, Sandbox):
            asked["from"] = {"sandbox": since.id}
        elif since is not None:
            asked["from"] = {"sandbox": self.id, "at": words(since)}
        told = self._http.ask("POST", self._path("/diff"), asked, limit=MACHINE_MAX_S)
        return Difference.of(told)

    def pause(self, *, freeze: float = 5.0, force: bool = False) -> None:
        """Puts it on disk, where it costs no memory."""
        asked = whole({"freeze_seconds": freeze}, force=force)
        told = self._http.ask("POST", self._path("/pause"), asked, limit=MACHINE_MAX_S)
        self.info = SandboxInfo.of(told)

    def resume(self) -> None:
        """Has it go on."""
        told = self._http.ask("POST", self._path("/resume"), limit=MACHINE_MAX_S)
        self.info = SandboxInfo.of(told)

    def publish(self, template: str, *, at: Moment | str | None = None, force: bool = False) -> TemplateInfo:
        """Makes a template of a moment of it, on disk; forks of that begin as branches do."""
        asked = whole({"template": template}, force=force)
        if at is not None:
            asked["at"] = words(at)
        told = self._http.ask("POST", self._path("/template"), asked, limit=MACHINE_MAX_S)
        return TemplateInfo.of(told)

    @contextmanager
    def watch(self, path: str, *, recursive: bool = False) -> Iterator[Iterator[Event]]:
        """Changes of files, as they happen: ``created``, ``written``, ``removed``, ``renamed``, ``attributes``."""
        params: dict[str, Any] = {"path": path}
        if recursive:
            params["recursive"] = "true"
        with closing(self._http.events("GET", self._path("/watch"), params=params)) as all_:
            yield changes(all_)


def changes(events: Iterator[Event]) -> Iterator[Event]:
    """With paths as text, and without the word that they are told from here on."""
    for event in events:
        if event.type == "watching":
            continue
        paths: dict[str, Any] = {
            name: octets(event.data[name]).decode(errors="surrogateescape")
            for name in ("path", "to")
            if name in event.data
        }
        yield Event(event.type, {**event.data, **paths})


def words(moment: Moment | str) -> str:
    """What a moment is asked for by."""
    return moment.words if isinstance(moment, Moment) else moment
