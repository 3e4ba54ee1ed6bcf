"""What can go wrong: one class for each code of the engine's catalogue (docs/json.md)."""

from __future__ import annotations

from typing import Any, ClassVar


class ZygoteError(Exception):
    """A failure. ``code`` is stable, ``remedy`` says what to do."""

    codes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        message: str,
        *,
        code: str = "internal",
        cause: str | None = None,
        remedy: str | None = None,
        retry_after: float | None = None,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.cause = cause
        self.remedy = remedy
        self.retry_after = retry_after
        self.status = status
        self.request_id = request_id

    def __str__(self) -> str:
        text = self.message
        if self.cause:
            text += f": {self.cause}"
        if self.remedy:
            text += f"; {self.remedy}"
        return text


class ConnectionFailed(ZygoteError):
    """No engine answers, or the connection to it broke off."""

    codes: ClassVar[tuple[str, ...]] = ("engine_unreachable",)


class BadRequest(ZygoteError):
    """What was asked for cannot be."""

    codes: ClassVar[tuple[str, ...]] = ("bad_request", "usage", "too_large", "method_not_allowed")


class Unauthorized(ZygoteError):
    """A key is needed, or this one is none."""

    codes: ClassVar[tuple[str, ...]] = ("unauthorized",)


class Forbidden(ZygoteError):
    """Not with this key."""

    codes: ClassVar[tuple[str, ...]] = ("forbidden",)


class NotFound(ZygoteError):
    """There is none."""

    codes: ClassVar[tuple[str, ...]] = ("not_found",)


class SandboxNotFound(NotFound):
    codes: ClassVar[tuple[str, ...]] = ("sandbox_not_found",)


class TemplateNotFound(NotFound):
    codes: ClassVar[tuple[str, ...]] = ("template_not_found",)


class ProcessNotFound(NotFound):
    codes: ClassVar[tuple[str, ...]] = ("process_not_found",)


class ContextNotFound(NotFound):
    codes: ClassVar[tuple[str, ...]] = ("context_not_found",)


class MomentNotFound(NotFound):
    codes: ClassVar[tuple[str, ...]] = ("moment_not_found",)


class FileMissing(NotFound):
    """There is no such file in the sandbox."""

    codes: ClassVar[tuple[str, ...]] = ("file_not_found",)


class Conflict(ZygoteError):
    """Something is in the way."""

    codes: ClassVar[tuple[str, ...]] = ("conflict", "ambiguous", "name_taken", "no_terminal", "rolled_back")


class SandboxEnded(Conflict):
    """The sandbox was there, and has ended."""

    codes: ClassVar[tuple[str, ...]] = ("sandbox_ended", "sandbox_died")


class ProcessEnded(Conflict):
    codes: ClassVar[tuple[str, ...]] = ("process_ended",)


class SandboxPaused(Conflict):
    codes: ClassVar[tuple[str, ...]] = ("sandbox_paused", "pause_failed")


class ContextDead(Conflict):
    codes: ClassVar[tuple[str, ...]] = ("context_dead",)


class NotBranched(Conflict):
    codes: ClassVar[tuple[str, ...]] = ("not_branched",)


class FileFailed(Conflict):
    """A file cannot be had or changed; ``cause`` is the kernel's name for why, such as ENOSPC."""

    codes: ClassVar[tuple[str, ...]] = ("file_failed", "get_failed")


class LimitReached(ZygoteError):
    """A limit of the engine, of a sandbox, or of the key."""

    codes: ClassVar[tuple[str, ...]] = ("limit_reached",)


class Unavailable(ZygoteError):
    """Not now; ``retry_after`` says when to try again."""

    codes: ClassVar[tuple[str, ...]] = ("busy", "no_room", "stopping", "lab_died")


class HostUnfit(ZygoteError):
    """Machines cannot run on the engine's host, or not behind all walls."""

    codes: ClassVar[tuple[str, ...]] = ("no_machines", "missing_walls")


class TemplateUnusable(ZygoteError):
    codes: ClassVar[tuple[str, ...]] = ("template_unusable", "build_failed")


class ProgramFailed(ZygoteError):
    """A program or a cell that was to succeed has not; ``result`` is how it ended."""

    codes: ClassVar[tuple[str, ...]] = (
        "program_not_found",
        "program_not_executable",
        "program_not_started",
        "timed_out",
        "out_of_memory",
    )

    result: Any = None


def _all(base: type[ZygoteError]) -> dict[str, type[ZygoteError]]:
    known = {code: base for code in base.__dict__.get("codes", ())}
    for derived in base.__subclasses__():
        known.update(_all(derived))
    return known


_BY_CODE = _all(ZygoteError)


def of(body: Any, *, status: int | None = None) -> ZygoteError:
    """The error that an answer tells of."""
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict):
        # Something between us and the engine.
        return ConnectionFailed(
            f"what answers is no engine (status {status})", code="engine_unreachable", status=status
        )
    code = str(told.get("code", "internal"))
    retry = told.get("retry_after_seconds")
    return _BY_CODE.get(code, ZygoteError)(
        str(told.get("message", code)),
        code=code,
        cause=told.get("cause"),
        remedy=told.get("remedy"),
        retry_after=float(retry) if isinstance(retry, (int, float)) else None,
        status=status,
        request_id=body.get("request_id"),
    )
