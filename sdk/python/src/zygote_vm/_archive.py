"""Folders as archives. What comes out of a sandbox leads nowhere else."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from . import errors


def pack(folder: Path) -> bytes:
    """What is in a folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, arcname=entry.name)
    return packed.getvalue()


def unpack(archive: tarfile.TarFile, target: Path) -> None:
    """What is in the one folder of an archive, into another. No path of it leads out, nor through a link."""
    target.mkdir(parents=True, exist_ok=True)
    links: list[tuple[Path, str]] = []
    for member in archive:
        # The first word is the folder itself.
        place = target.joinpath(*parts(member.name)[1:])
        if member.isdir():
            place.mkdir(parents=True, exist_ok=True)
        elif member.isfile():
            place.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            if content is None or place.is_symlink():
                raise escapes(member.name)
            with content, place.open("wb") as file:
                shutil.copyfileobj(content, file)
            place.chmod(member.mode & 0o777)
        elif member.issym():
            links.append((place, member.linkname))
    # Last: nothing is written through one.
    for place, leads_to in links:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(leads_to)


def parts(name: str) -> tuple[str, ...]:
    """The words of a path that stays below where it begins."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise escapes(name)
    return path.parts


def escapes(name: str) -> errors.FileFailed:
    return errors.FileFailed(f"the sandbox has sent the path {name!r}, which leads elsewhere", code="file_failed")
