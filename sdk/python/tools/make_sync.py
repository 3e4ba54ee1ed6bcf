"""Makes ``_sync`` from ``_async``: what is awaited there is called here. ``--check`` only compares."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

PACKAGE = Path(__file__).parent.parent / "src" / "zygote_vm"
WORDS = {
    "AsyncBaseTransport": "BaseTransport",
    "AsyncClient": "Client",
    "AsyncFiles": "Files",
    "AsyncHTTPTransport": "HTTPTransport",
    "AsyncHttp": "Http",
    "AsyncProcess": "Process",
    "AsyncSandbox": "Sandbox",
    "aclose": "close",
    "aclosing": "closing",
    "aiter_bytes": "iter_bytes",
    "aiter_lines": "iter_lines",
    "aread": "read",
    "async_sleep": "sleep",
    "asynccontextmanager": "contextmanager",
}


def make(target: Path) -> None:
    source = PACKAGE / "_async"
    rule = unasync.Rule(f"{source}/", f"{target}/", additional_replacements=WORDS)
    unasync.unasync_files([str(path) for path in sorted(source.glob("*.py"))], [rule])
    for path in target.glob("*.py"):
        text = path.read_text()
        # Words within strings and comments.
        for word, instead in WORDS.items():
            text = text.replace(word, instead)
        text = text.replace("``async with``", "``with``").replace(
            "For those who await.", "For those who do not await. Made by tools/make_sync.py."
        )
        path.write_text(text)
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(target)], check=True)


def main() -> int:
    kept = PACKAGE / "_sync"
    if sys.argv[1:] != ["--check"]:
        make(kept)
        return 0
    with tempfile.TemporaryDirectory(dir=PACKAGE) as folder:
        make(Path(folder))
        names = {path.name for path in [*kept.glob("*.py"), *Path(folder).glob("*.py")]}
        stale = [
            name
            for name in sorted(names)
            if not (kept / name).exists()
            or not (Path(folder) / name).exists()
            or (kept / name).read_text() != (Path(folder) / name).read_text()
        ]
    if stale:
        print(f"_sync is not what _async makes of it: {', '.join(stale)}; run tools/make_sync.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
