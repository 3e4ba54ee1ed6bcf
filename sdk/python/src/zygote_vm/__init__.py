"""Python in virtual machines that are forked, not booted.

>>> import zygote_vm
>>> zygote_vm.run("print(6*7)").stdout          # doctest: +SKIP
'42\\n'
"""

from __future__ import annotations

from typing import Any

from . import errors
from ._async import AsyncClient, AsyncFiles, AsyncProcess, AsyncSandbox
from ._sync import Client, Files, Process, Sandbox
from .errors import ZygoteError
from .models import (
    Cell,
    CellError,
    ContextInfo,
    Difference,
    Event,
    ExecResult,
    FileDifference,
    FileInfo,
    Moment,
    RunResult,
    SandboxInfo,
    Stats,
    TemplateInfo,
)

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncFiles",
    "AsyncProcess",
    "AsyncSandbox",
    "Cell",
    "CellError",
    "Client",
    "ContextInfo",
    "Difference",
    "Event",
    "ExecResult",
    "FileDifference",
    "FileInfo",
    "Files",
    "Moment",
    "Process",
    "RunResult",
    "Sandbox",
    "SandboxInfo",
    "Stats",
    "TemplateInfo",
    "ZygoteError",
    "errors",
    "run",
]


def run(code: str | None = None, **options: Any) -> RunResult:
    """Runs Python code in a fork that nobody else has, on the engine that the environment names, or this machine's: see
    :meth:`Client.run`."""
    with Client() as client:
        return client.run(code, **options)
