"""The files of a sandbox."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from .._archive import pack, unpack
from ..models import FileInfo
from ._http import AsyncHttp

#: How long a file may be on its way, in seconds.
FILE_MAX_S = 3600.0


class AsyncFiles:
    """Paths are the sandbox's; relative ones are in the user's home."""

    def __init__(self, http: AsyncHttp, sandbox: str) -> None:
        self._http = http
        self._path = f"/v1/sandboxes/{sandbox}"

    async def read(self, path: str) -> bytes:
        """All of a file."""
        answer = await self._http.send(
            "GET",
            f"{self._path}/files",
            b"",
            params={"path": path},
            limit=FILE_MAX_S,
            is_safe=True,
        )
        return answer.content

    async def read_text(self, path: str) -> str:
        """The same, as text (UTF-8)."""
        return (await self.read(path)).decode()

    @asynccontextmanager
    async def open(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """A file in pieces, as they come."""
        async with self._http.bytes("GET", f"{self._path}/files", params={"path": path}) as pieces:
            yield pieces

    async def write(
        self,
        path: str,
        data: str | bytes,
        *,
        mode: int | None = None,
        parents: bool = True,
        append: bool = False,
    ) -> None:
        """Writes a file, whole or not at all.

        Args:
            mode: Permissions, such as 0o755.
            parents: Whether folders that are missing on the way are made.
            append: Whether it goes behind what is there.
        """
        params: dict[str, Any] = {"path": path}
        if mode is not None:
            params["mode"] = f"{mode:o}"
        if parents:
            params["parents"] = "true"
        if append:
            params["append"] = "true"
        content = data.encode() if isinstance(data, str) else data
        await self._http.send(
            "PUT",
            f"{self._path}/files",
            content,
            params=params,
            headers={"content-type": "application/octet-stream"},
            limit=FILE_MAX_S,
            # Once more is the same, unless it goes behind what is there.
            is_safe=not append,
        )

    async def _act(self, action: str, *, is_safe: bool = False, **fields: Any) -> Any:
        asked = {"action": action, **fields}
        return await self._http.ask("POST", f"{self._path}/files", asked, is_safe=is_safe)

    async def list(self, path: str = ".", *, depth: int = 1) -> list[FileInfo]:
        """What is in a folder; with ``depth`` also what is in folders in it."""
        told = await self._act("list", path=path, depth=depth, is_safe=True)
        return [FileInfo.of(one) for one in told["files"]]

    async def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """What there is at a path."""
        return FileInfo.of(await self._act("stat", path=path, no_follow=not follow, is_safe=True))

    async def exists(self, path: str) -> bool:
        """Whether there is something at a path."""
        from .. import errors

        try:
            await self.stat(path, follow=False)
        except errors.FileMissing:
            return False
        return True

    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = True) -> None:
        """Makes a folder."""
        await self._act("mkdir", path=path, mode=mode, parents=parents)

    async def move(self, path: str, to: str, *, replace: bool = False) -> None:
        """Moves, or renames."""
        await self._act("move", path=path, to=to, replace=replace)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file; with ``recursive`` a folder with all that is in it."""
        await self._act("remove", path=path, recursive=recursive)

    async def chmod(self, path: str, mode: int) -> None:
        """Sets permissions."""
        await self._act("chmod", path=path, mode=mode)

    async def chown(self, path: str, owner: str) -> None:
        """Gives it to ``USER`` or ``USER:GROUP``."""
        await self._act("chown", path=path, owner=owner)

    async def symlink(self, path: str, target: str) -> None:
        """Makes a symbolic link."""
        await self._act("symlink", path=path, target=target)

    async def upload(self, local: str | Path, path: str) -> None:
        """Puts a file or folder of this machine into the sandbox, at a path of its own."""
        source = Path(local)
        if not source.is_dir():
            mode = source.stat().st_mode & 0o777
            await self.write(path, source.read_bytes(), mode=mode)
            return
        await self.mkdir(path)
        await self._http.send(
            "PUT",
            f"{self._path}/tar",
            pack(source),
            params={"path": path},
            headers={"content-type": "application/octet-stream"},
            limit=FILE_MAX_S,
        )

    async def download(self, path: str, local: str | Path) -> None:
        """Gets a file or folder out of the sandbox, to a path of this machine that is not there yet, or a folder's."""
        target = Path(local)
        if (await self.stat(path)).type != "folder":
            target.write_bytes(await self.read(path))
            return
        answer = await self._http.send("GET", f"{self._path}/tar", b"", params={"path": path}, limit=FILE_MAX_S)
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            unpack(archive, target)
