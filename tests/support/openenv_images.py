"""Images that serve environments of OpenEnv, made of an image of ours and the packages that are installed here."""

import io
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

SITE = "site"  # in the context and, below the root, in the image


def closure(*requirements: str) -> list[Distribution]:
    """The installed packages that `requirements` need, and they themselves.

    Raises:
        PackageNotFoundError: for one of `requirements`.
    """
    waiting = [(Requirement(one), True) for one in requirements]
    seen: dict[str, set[str]] = {}
    found: dict[str, Distribution] = {}
    while waiting:
        wanted, must = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        extras = {"", *wanted.extras} - seen.setdefault(name, set())
        if not extras:
            continue
        seen[name] |= extras
        try:
            found[name] = distribution(wanted.name)
        except PackageNotFoundError:
            if must:
                raise
            continue  # of an extra or a platform that is not here
        for needed in map(Requirement, found[name].requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((needed, False))
    return list(found.values())


def packaged(*requirements: str) -> dict[str, Path]:
    """The files of `closure(*requirements)` by their path in a context."""
    return {
        f"{SITE}/{file}": path
        for one in closure(*requirements)
        for file in one.files or ()
        if ".." not in file.parts and "__pycache__" not in file.parts and (path := Path(str(file.locate()))).is_file()
    }


def sources(folder: Path, name: str) -> dict[str, Path]:
    """The files of a package that lies in `folder` under `name`, by their path in a context."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{SITE}/{name}/{path.relative_to(folder)}": path for path in paths}


def build(api: Any, tag: str, base: str, files: Mapping[str, Path], command: str) -> None:
    """Make the image `tag` of `base`, `files` (put into a folder on Python's path) and the command that it runs.

    Raises:
        RuntimeError: the engine says that it failed.
    """
    lines = [f"FROM {base}", f"COPY {SITE} /{SITE}", f"ENV PYTHONPATH=/{SITE} PYTHONUNBUFFERED=1", f"CMD {command}"]
    with tempfile.TemporaryFile() as context:
        with tarfile.open(fileobj=context, mode="w") as tar:
            text = "\n".join(lines).encode()
            entry = tarfile.TarInfo("Dockerfile")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
            for name, path in files.items():
                tar.add(path, name)
        context.seek(0)
        said: Iterator[dict[str, Any]] = api.build(
            fileobj=context, custom_context=True, tag=tag, rm=True, decode=True, network_mode="none"
        )
        for line in said:
            if "error" in line:
                raise RuntimeError(f"{tag}: {line['error']}")
