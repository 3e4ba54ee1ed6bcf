"""What the engine tells, as it tells it; fields that this version does not know are left out."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from . import errors

if TYPE_CHECKING:
    # Made from the description of the API; not there when a program runs.
    from . import _api

T = TypeVar("T", bound="Model")


@dataclass(frozen=True)
class Model:
    """Made from JSON."""

    @classmethod
    def of(cls: type[T], data: dict[str, Any]) -> T:
        known = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


def octets(value: Any) -> bytes:
    """Bytes, which come as a string, or as ``{"base64": …}`` where they are not UTF-8."""
    if isinstance(value, dict):
        return base64.b64decode(value["base64"])
    return str(value).encode()


def as_octets(value: str | bytes) -> Any:
    """The way back."""
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def text_of(data: Mapping[str, Any], stream: str) -> bytes:
    """A stream of a result that is one object."""
    coded = data.get(f"{stream}_base64")
    return base64.b64decode(coded) if coded else (data.get(stream) or "").encode()


@dataclass(frozen=True)
class Output:
    """How a program ended, and what it has said."""

    exit_code: int
    stdout_bytes: bytes = field(repr=False, default=b"")
    stderr_bytes: bytes = field(repr=False, default=b"")
    signal: int | None = None
    timed_out: bool = False
    truncated: bool = False
    out_of_memory: bool = False
    total_time_ms: float = 0.0
    error: errors.ZygoteError | None = None

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error, likewise."""
        return self.stderr_bytes.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Whether it ended with exit code 0."""
        return self.exit_code == 0

    def check(self: O) -> O:
        """Itself, if it ended with exit code 0.

        Raises:
            ProgramFailed: else.
        """
        if self.ok:
            return self
        last = self.stderr.strip().rsplit("\n", 1)[-1]
        known = self.error
        failure = errors.ProgramFailed(
            known.message if known else f"exit code {self.exit_code}",
            code=known.code if known else "program_failed",
            cause=last or None,
            remedy=known.remedy if known else None,
        )
        failure.result = self
        raise failure


O = TypeVar("O", bound=Output)  # noqa: E741


def _common(data: _api.ExecResult | _api.ProcessResult) -> dict[str, Any]:
    told = data.get("error")
    return {
        "exit_code": data["exit_code"],
        "stdout_bytes": text_of(data, "stdout"),
        "stderr_bytes": text_of(data, "stderr"),
        "signal": data.get("signal"),
        "timed_out": bool(data.get("timed_out")),
        "truncated": bool(data.get("truncated")),
        "out_of_memory": bool(data.get("out_of_memory")),
        "total_time_ms": data.get("total_time_ms", 0.0),
        "error": errors.of({"error": told}) if told else None,
    }


@dataclass(frozen=True)
class GotFile:
    """A file that was asked for."""

    path: str
    size: int
    sha256: str | None = None
    content: bytes | None = field(repr=False, default=None)
    error: errors.ZygoteError | None = None


@dataclass(frozen=True)
class RunResult(Output):
    """Of a program in a fork of its own."""

    id: str = ""
    template: str = ""
    host: str = ""
    fork_time_ms: float | None = None
    exec_time_ms: float | None = None
    memory_private_kib: int | None = None
    files: tuple[GotFile, ...] = ()

    @classmethod
    def of(cls, data: _api.ExecResult) -> RunResult:
        return cls(
            **_common(data),
            id=data.get("id", ""),
            template=data.get("template", ""),
            host=data.get("host", ""),
            fork_time_ms=data.get("fork_time_ms"),
            exec_time_ms=data.get("exec_time_ms"),
            memory_private_kib=data.get("memory_private_kib"),
            files=tuple(_got(one) for one in data.get("files", ())),
        )


def _got(data: _api.GotFile) -> GotFile:
    content, told = data.get("content"), data.get("error")
    return GotFile(
        path=octets(data["path"]).decode(errors="surrogateescape"),
        size=data.get("bytes", 0),
        sha256=data.get("sha256"),
        content=None if content is None else octets(content),
        error=errors.of({"error": told}) if told else None,
    )


@dataclass(frozen=True)
class ExecResult(Output):
    """Of a program in a sandbox."""

    sandbox: str = ""
    process: int = 0

    @classmethod
    def of(cls, data: _api.ProcessResult) -> ExecResult:
        return cls(**_common(data), sandbox=data.get("sandbox", ""), process=data.get("process", 0))


@dataclass(frozen=True)
class CellError(Model):
    """The exception that ended a cell."""

    name: str
    value: str
    traceback: list[str] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Cell:
    """How a cell ended. Shown in Jupyter as it would be there."""

    execution_count: int
    stdout: str = ""
    stderr: str = ""
    displays: tuple[dict[str, str], ...] = field(default=(), repr=False)
    result: dict[str, str] | None = None
    exception: CellError | None = None
    timed_out: bool = False
    truncated: bool = False
    total_time_ms: float = 0.0

    @property
    def text(self) -> str | None:
        """The value of its last expression, as Python prints it."""
        return self.result.get("text/plain") if self.result else None

    @property
    def ok(self) -> bool:
        """Whether it came to its end without an exception."""
        return self.exception is None and not self.timed_out

    @property
    def images(self) -> list[bytes]:
        """PNG images among what it has shown, and its value."""
        shown = [*self.displays, self.result or {}]
        return [base64.b64decode(one["image/png"]) for one in shown if "image/png" in one]

    def check(self) -> Cell:
        """Itself, if it came to its end.

        Raises:
            ProgramFailed: if an exception, or its time limit, ended it.
        """
        if self.ok:
            return self
        raised = self.exception
        failure = errors.ProgramFailed(
            f"{raised.name}: {raised.value}" if raised else "it was interrupted at its time limit",
            code="timed_out" if self.timed_out else "cell_failed",
            cause="".join(raised.traceback) if raised else None,
        )
        failure.result = self
        raise failure

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The last that it has shown: its value, or a picture (IPython's protocol)."""
        if self.exception:
            return {"text/plain": "".join(self.exception.traceback)}
        shown = self.result or (self.displays[-1] if self.displays else None)
        return dict(shown) if shown else {"text/plain": self.stdout}

    @classmethod
    def of(cls, data: _api.CodeResult) -> Cell:
        raised = data.get("exception")
        return cls(
            execution_count=data["execution_count"],
            stdout=text_of(data, "stdout").decode(errors="replace"),
            stderr=text_of(data, "stderr").decode(errors="replace"),
            displays=tuple(data.get("displays", ())),
            result=data.get("result"),
            exception=CellError.of(dict(raised)) if raised else None,
            timed_out=bool(data.get("timed_out")),
            truncated=bool(data.get("truncated")),
            total_time_ms=data.get("total_time_ms", 0.0),
        )


@dataclass(frozen=True)
class SandboxInfo(Model):
    """What is known of a sandbox."""

    id: str
    template: str
    build: str
    state: str
    created: str
    created_unix_s: int
    name: str | None = None
    tenant: str | None = None
    parent: str | None = None
    end: dict[str, Any] | None = None
    expires_unix_s: int | None = None
    idle_seconds: float | None = None
    processes: int = 0
    env: dict[str, str] = field(default_factory=dict)
    fork_time_ms: float | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True)
class Stats(Model):
    """What a sandbox takes of its host."""

    id: str
    memory_private_kib: int
    page_tables_kib: int
    cpu_seconds: float
    processes: int
    name: str | None = None


@dataclass(frozen=True)
class Moment(Model):
    """A moment of a sandbox that is kept."""

    number: int
    at: str
    at_unix_s: int
    pause_us: int
    name: str | None = None
    memory_private_kib: int | None = None

    @property
    def words(self) -> str:
        """What it is asked for by."""
        return self.name or f"@{self.number}"


@dataclass(frozen=True)
class FileInfo:
    """A file of a sandbox."""

    path: str
    type: str
    size: int
    mode: int
    uid: int
    gid: int
    modified: str
    modified_unix_s: int
    target: str | None = None

    @classmethod
    def of(cls, data: _api.FileInfo) -> FileInfo:
        target = data.get("target")
        return cls(
            path=octets(data["path"]).decode(errors="surrogateescape"),
            type=data["type"],
            size=data["bytes"],
            mode=data["mode"],
            uid=data["uid"],
            gid=data["gid"],
            modified=data["modified"],
            modified_unix_s=data["modified_unix_s"],
            target=None if target is None else octets(target).decode(errors="surrogateescape"),
        )


@dataclass(frozen=True)
class FileDifference:
    """A file that is not in two moments the same."""

    path: str
    change: str
    before: FileInfo | None = None
    after: FileInfo | None = None


@dataclass(frozen=True)
class Difference:
    """What differs between two moments."""

    files: tuple[FileDifference, ...]
    more_files: int
    pages: int | None

    @classmethod
    def of(cls, data: _api.Diff) -> Difference:
        def one(told: _api.FileDiff) -> FileDifference:
            before, after = told.get("before"), told.get("after")
            return FileDifference(
                path=octets(told["path"]).decode(errors="surrogateescape"),
                change=told["change"],
                before=FileInfo.of(before) if before else None,
                after=FileInfo.of(after) if after else None,
            )

        return cls(
            files=tuple(one(told) for told in data["files"]),
            more_files=data["more_files"],
            pages=data.get("pages"),
        )


@dataclass(frozen=True)
class ContextInfo(Model):
    """An interpreter of a sandbox."""

    name: str
    language: str
    cwd: str
    process: int
    state: str
    execution_count: int


@dataclass(frozen=True)
class TemplateInfo(Model):
    """A template."""

    template: str
    build: str
    created: str
    created_unix_s: int
    memory_bytes: int
    vcpus: int
    interpreter: str
    digest: str
    disk_bytes: int
    tenant: str | None = None
    sandbox: str | None = None


@dataclass(frozen=True)
class Event:
    """Something that has happened, or happens: its ``type``, and what it says."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> Any:
        """What the event ``result`` says: as much as an answer that is one object."""
        return self.data

    @property
    def bytes(self) -> bytes:
        """The bytes of an event of output."""
        return octets(self.data.get("data", ""))

    @property
    def text(self) -> str:
        """The same, as text."""
        return self.bytes.decode(errors="replace")
