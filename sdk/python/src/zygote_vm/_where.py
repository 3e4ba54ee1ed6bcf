"""Where the engine is: by what its user says, by the environment, or on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from . import errors

#: How long an engine may take to start, in seconds.
START_MAX_S = 60.0


@dataclass(frozen=True)
class Where:
    """A URL, or a socket of this machine."""

    url: str
    socket: str | None = None
    key: str | None = None


def where(url: str | None, key: str | None, socket: str | None) -> Where:
    """Looks at the arguments, then ``ZYGOTE_URL``, ``ZYGOTE_API_KEY`` and ``ZYGOTE_SOCKET``, then here."""
    url = url or (None if socket else os.environ.get("ZYGOTE_URL"))
    key = key or os.environ.get("ZYGOTE_API_KEY") or None
    if url:
        return Where(url.rstrip("/"), key=key)
    # The key is for an engine elsewhere.
    return Where("http://localhost", socket=socket or started())


def started() -> str:
    """The socket of this machine's engine, which is started if it is not there."""
    program = find_program()
    asked = [program, "start", "--json"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=START_MAX_S, check=False)
        told = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise errors.ConnectionFailed(
            f"cannot start the engine with {program}",
            code="engine_unreachable",
            cause=str(error),
            remedy="see what is wrong: zygote start; zygote doctor",
        ) from error
    if "error" in told:
        raise errors.of(told)
    return str(told["socket"])


def find_program() -> str:
    """The ``zygote`` program: as ``ZYGOTE_PROGRAM`` says, this package's, or the one in PATH."""
    said = os.environ.get("ZYGOTE_PROGRAM")
    if said:
        return said
    beside = Path(sysconfig.get_path("scripts")) / "zygote"
    if beside.is_file() and os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which("zygote")
    if found:
        return found
    raise errors.ConnectionFailed(
        "there is no zygote program on this machine, and no engine elsewhere was named",
        code="engine_unreachable",
        remedy="install it (make install), or say where an engine is: ZYGOTE_URL and ZYGOTE_API_KEY",
    )
