"""Files into and out of containers as tar archives. What comes out is hostile until it is checked."""

import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from turnwise.containers.errors import TransferRefused

Content = bytes | str | Path
SPOOL_BYTES = 1 << 20  # archives beyond this wait on disk
ENTRY_OVERHEAD = 2048  # bytes of headers and padding of one entry
READABLE, EXECUTABLE = 0o644, 0o755


def pack(files: Mapping[str, Content]) -> IO[bytes]:
    """An archive of files, positioned at its end.

    Args:
        files: content by path, relative to where the archive will be unpacked. A Path is a file of this machine, which is
            followed when it is a link, or a folder, whose regular files are taken and whose links are not.

    Raises:
        ValueError: for a path that leads out of the folder.
        OSError: for a file that cannot be read.
    """
    spool = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        with tarfile.open(fileobj=spool, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in files.items():
                _check_name(name)
                if isinstance(content, Path) and content.is_dir():
                    for path in sorted(content.rglob("*")):
                        if path.is_file() and not path.is_symlink():
                            _add(archive, f"{name}/{path.relative_to(content).as_posix()}", path)
                else:
                    _add(archive, name, content)
    except BaseException:
        spool.close()
        raise
    return spool


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name!r} is no path inside the target folder; give a relative path without '..'")


def _add(archive: tarfile.TarFile, name: str, content: Content) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode = READABLE
    if isinstance(content, Path):
        with content.open("rb") as file:
            status = os.fstat(file.fileno())
            entry.size, entry.mode = status.st_size, EXECUTABLE if status.st_mode & 0o100 else READABLE
            archive.addfile(entry, file)
        return
    data = content.encode() if isinstance(content, str) else content
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def unpack(data: bytes, *, max_bytes: int, max_files: int) -> dict[str, bytes]:
    """Regular files of an archive that somebody hostile may have made, by their path in it. Nothing touches the disk.

    Raises TransferRefused for links, devices and pipes, for paths that lead out, for a broken archive, and past either limit.
    """
    files: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for number, entry in enumerate(archive):
                if number >= max_files:
                    raise TransferRefused(f"the archive has more than {max_files} entries")
                path = PurePosixPath(entry.name)
                if path.is_absolute() or ".." in path.parts:
                    raise TransferRefused(f"{entry.name!r} leads out of its folder")
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise TransferRefused(f"{entry.name!r} is {_kind(entry)}; only regular files are taken out")
                total += entry.size
                if total > max_bytes:
                    raise TransferRefused(f"the files have more than {max_bytes} bytes")
                content = archive.extractfile(entry)
                assert content is not None
                body = content.read()
                if len(body) != entry.size:
                    raise TransferRefused(f"{entry.name!r} is cut short")
                files[str(path)] = body
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise TransferRefused(f"the archive is broken: {error}") from error
    return files


def _kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return f"a link to {entry.linkname!r}"
    if entry.isfifo():
        return "a pipe"
    if entry.ischr() or entry.isblk():
        return "a device"
    return "a sparse file" if entry.issparse() else "no file"
