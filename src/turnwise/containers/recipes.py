"""Images from recipes in this package, without a registry: made once, cached by the recipe's hash, imported into each engine."""

import fcntl
import hashlib
import logging
import os
import tarfile
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from turnwise.containers import rootfs
from turnwise.containers.engine import Engine
from turnwise.containers.errors import ImageMissing, RecipeFailed

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "images"
SHELL_LABEL = "turnwise.shell"
LAYOUT = 2  # of what `rootfs` makes of a recipe; another number makes every image anew
HASH_LENGTH = 12
SETUP_S = 600


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an image is made of; one TOML file in `images/`."""

    packages: tuple[str, ...]
    shell: str
    shell_name: str = "bash"
    applets: str | None = None
    links: dict[str, str] = {}
    setup: str = ""  # runs once in the image, as root, without network

    @property
    def hash(self) -> str:
        """Of all that decides what the image holds, but for the versions that the distribution has on the day it is made."""
        text = msgspec.json.encode((LAYOUT, os.uname().machine, self), order="sorted")
        return hashlib.sha256(text).hexdigest()[:HASH_LENGTH]

    @property
    def shell_path(self) -> str:
        """The unreadable shell in the image."""
        return f"/{rootfs.SHELL_FOLDER}/{self.shell_name}"


@cache
def recipes() -> dict[str, Recipe]:
    """The recipes of this package by name."""
    tables = {path.stem: tomllib.loads(path.read_text()) for path in sorted(FOLDER.glob("*.toml"))}
    return {name: msgspec.convert(_extended(table, tables), Recipe) for name, table in tables.items()}


def _extended(table: dict[str, Any], tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A recipe with what the one that it `extends` has: packages and links of both, its own other keys first."""
    if "extends" not in table:
        return table
    own = {key: value for key, value in table.items() if key != "extends"}
    base = _extended(tables[table["extends"]], tables)
    packages = [*base["packages"], *own.get("packages", ())]
    return {**base, **own, "packages": packages, "links": {**base.get("links", {}), **own.get("links", {})}}


def cache_folder() -> Path:
    """Where archives of images are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turnwise" / "images"


@contextmanager
def _one_at_a_time(path: Path) -> Generator[None]:
    """Hold a lock between processes, so that two runs do not make the same image twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def archive_path(name: str) -> Path:
    """Where the archive of a recipe is kept once it has been made."""
    return cache_folder() / f"{name}-{recipes()[name].hash}.tar"


def archive(name: str) -> Path:
    """The root file system of a recipe as a tar archive, made where it is not in the cache. Raises RecipeFailed."""
    recipe, path = recipes()[name], archive_path(name)
    with _one_at_a_time(path.with_suffix(".lock")):
        if not path.exists():
            log.info("containers: making the image %s, once", name)
            rootfs.build(
                recipe.packages,
                recipe.shell,
                recipe.shell_name,
                recipe.applets,
                recipe.links,
                path,
                lambda said: log.info("containers: image %s: %s", name, said),
            )
    return path


def unpacked(name: str) -> Path:
    """The root file system of a recipe as a folder, for a backend without an engine. Raises RecipeFailed."""
    source = archive(name)
    folder = source.with_suffix("")
    with _one_at_a_time(source.with_suffix(".lock")):
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part")
            with tarfile.open(source) as tar:
                tar.extractall(part, filter="tar")
            os.replace(part, folder)
    return folder


def ensure_image(engine: Engine, image: str) -> str:
    """The engine's name of an image: made from its recipe where it has one, looked up otherwise; never pulled.

    Raises ImageMissing, RecipeFailed, EngineDown.
    """
    recipe = recipes().get(image)
    if recipe is None:
        if engine.image_labels(image) is None:
            raise ImageMissing(
                f"{engine.name} has no image {image!r}, and no recipe makes it (recipes: {', '.join(recipes())}); "
                f"run `docker pull {image}` there, or name another one"
            )
        return image
    tag = f"turnwise/{image}:{recipe.hash}"
    if engine.image_labels(tag) is None:
        source = archive(image)
        log.info("containers: importing the image %s into %s", image, engine.name)
        engine.import_image(source, f"turnwise/{image}", recipe.hash, {SHELL_LABEL: recipe.shell_path}, recipe.setup)
        if engine.image_labels(tag) is None:
            raise RecipeFailed(f"{engine.name} did not keep the image {tag} that it was given")
    return tag
