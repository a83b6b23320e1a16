"""From a model to a folder with its linear layers in MXFP4: made once, in the user's cache, and loaded by trainer and engines."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from turnwise.config import ConfigError, QuantConfig, RLConfig
from turnwise.kernels.quantized.layout import REPORT, LayoutError, is_packed, read_config, weight_files
from turnwise.kernels.quantized.report import read_lines
from turnwise.launch.cache import Progress, cache_root, is_whole, locked, write_stamp
from turnwise.launch.models import HUB_ID
from turnwise.transport import atomic_dir

VERSION = 1  # of what `export` writes: another one makes folders anew
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def quantized_model(config: RLConfig, model: str, progress: Progress = print, *, trains: bool | None = None) -> Path | None:
    """The folder of packed weights that trainer and engines load; None where they load `model` itself.

    Under LoRA with `[trainer.model.quant]` it is in the cache, made there when it is missing. A model that comes in the format is
    used as it is. Full fine-tuning starts from plain weights, and its engines get values, not codes.

    Args:
        model: folder of the resolved model, or hub id.
        trains: whether its own weights train; as `config` says when left out.

    Raises:
        ConfigError: the model cannot be quantised, or all of its packed weights would have to be trained.
    """
    quant, whole_model = config.trainer.model.quant, config.trainer.model.lora is None if trains is None else trains
    came = _came_packed(model, progress, look_at_hub=quant is not None and not whole_model)
    if came is not None:
        if whole_model:
            raise ConfigError(
                f"model.name = {model} holds MXFP4 weights, and trainer.model.lora is unset: there are no masters to train; set "
                "[trainer.model.lora], or name the model that they were made from."
            )
        if quant is not None:
            progress(f"{model} is in MXFP4: its bytes are used as they are, whatever [trainer.model.quant] says")
        return came
    if quant is None or whole_model:
        return None
    return _prepared(_downloaded(model, progress), quant, progress, shape_only=config.model.load_format == "dummy")


def planned_folder(config: RLConfig, model: str) -> Path | None:
    """As `quantized_model`, without making or downloading anything; None also where the model is not at hand.

    Raises:
        ConfigError: the model's weights are in a form that cannot be quantised.
    """
    folder, quant = Path(model), config.trainer.model.quant
    if not folder.is_dir():
        return None
    try:
        if is_packed(folder):
            return folder
        if quant is None or config.trainer.model.lora is None:
            return None
        return _place(folder, _identity(folder, quant, shape_only=config.model.load_format == "dummy"))
    except LayoutError as error:
        raise ConfigError(f"{error}.") from error


def _came_packed(model: str, progress: Progress, *, look_at_hub: bool) -> Path | None:
    folder = Path(model) if Path(model).is_dir() else _downloaded(model, progress) if look_at_hub else None
    try:
        return folder if folder is not None and is_packed(folder) else None
    except LayoutError as error:
        raise ConfigError(f"{error}.") from error


def _downloaded(model: str, progress: Progress) -> Path:
    if Path(model).is_dir() or not HUB_ID.fullmatch(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"looking for {model} on the hub")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"model.name = {model} cannot be quantised, since it is not at hand: {error}") from error


def _prepared(source: Path, quant: QuantConfig, progress: Progress, *, shape_only: bool) -> Path:
    try:
        identity = _identity(source, quant, shape_only=shape_only)
    except LayoutError as error:
        raise ConfigError(f"{error}.") from error
    folder = _place(source, identity)
    if not is_whole(folder, identity):
        with locked(folder, progress):
            if not is_whole(folder, identity):  # somebody else may have made it while we waited
                _make(source, folder, identity, quant, progress, shape_only=shape_only)
    progress(f"MXFP4 weights: {folder}")
    for line in read_lines(folder / REPORT):
        progress(f"  {line}")
    return folder


def _place(source: Path, identity: str) -> Path:
    return cache_root() / "models" / f"{source.name}-mxfp4-{identity[:12]}"


def _identity(source: Path, quant: QuantConfig, *, shape_only: bool) -> str:
    """SHA-256 of what decides the bytes: settings, configuration, and name, size and time of every file of weights."""
    stats = [] if shape_only else [(file.name, file.stat()) for file in weight_files(source)]
    decides = {
        "version": VERSION,
        "source": str(source.resolve()),
        "config": read_config(source),
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "scale_mode": quant.scale_mode,
        "target_modules": sorted(quant.target_modules),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _make(source: Path, folder: Path, identity: str, quant: QuantConfig, progress: Progress, *, shape_only: bool) -> None:
    """Run the export in a process of its own, which loads torch, and show what it says."""
    progress(f"quantising {source.name} to MXFP4 (once; about a minute for a billion weights on a few CPU cores)")
    with atomic_dir(folder) as draft:
        command = [sys.executable, "-m", "turnwise.kernels.quantized.export", str(source), str(draft)]
        command += ["--scale-mode", quant.scale_mode, "--modules", *quant.target_modules]
        command += ["--shape-only"] if shape_only else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            said: list[str] = []
            for line in process.stdout:
                said.append(line.rstrip())
                if not line.startswith("error: "):
                    progress(f"  {said[-1]}")
        if process.returncode != 0:
            raise ConfigError("\n".join([f"{source} could not be quantised (exit code {process.returncode}):", *said[-12:]]))
        write_stamp(draft, identity)
