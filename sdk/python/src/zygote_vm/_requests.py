"""Requests, from what their callers give."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from .models import Event, as_octets

#: A program and its arguments; a string is for ``sh -c``.
Command = Union[str, Sequence[str]]  # noqa: UP007


def argv(command: Command) -> list[str]:
    """The words of a command."""
    return ["sh", "-c", command] if isinstance(command, str) else list(command)


def program(code: str | None, command: Command | None, args: Sequence[str]) -> dict[str, Any]:
    """What is to be run."""
    if (code is None) == (command is None):
        raise TypeError("give code or command")
    if command is not None:
        return {"command": argv(command)}
    return {"code": code, "args": list(args)} if args else {"code": code}


def whole(what: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A request, without what is not said."""
    files, stdin = fields.pop("files", None), fields.pop("stdin", None)
    asked = {name: value for name, value in fields.items() if value is not False and value not in (None, "", {}, [])}
    if stdin is not None:
        asked["stdin"] = as_octets(stdin)
    if files:
        asked["files"] = [{"path": path, "content": as_octets(content)} for path, content in files.items()]
    return {**what, **asked}


def on_output(
    event: Event,
    on_stdout: Callable[[str], Any] | None,
    on_stderr: Callable[[str], Any] | None,
) -> None:
    """Tells whoever listens."""
    if event.type == "stdout" and on_stdout:
        on_stdout(event.text)
    elif event.type == "stderr" and on_stderr:
        on_stderr(event.text)


def say(sentence: str) -> None:
    """What takes its time: for whoever looks on, or for the log."""
    if sys.stderr.isatty():
        print(f"zygote: {sentence}", file=sys.stderr)
    else:
        logging.getLogger("zygote_vm").info("%s", sentence)
