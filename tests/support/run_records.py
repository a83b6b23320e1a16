"""What a run left in its folder, read back."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from turnwise.config import RLConfig
from turnwise.transport import Batch, BatchLog, RunDir, WeightsReady, WeightsStore


def batches(root: Path) -> list[Batch]:
    log = BatchLog(RunDir(root).batches)
    return [log.read(step) for step in log.steps()]


def metrics(root: Path) -> dict[int, dict[str, float]]:
    """By step, all lines of a step in one."""
    merged: dict[int, dict[str, float]] = {}
    for line in RunDir(root).metrics.read_text().splitlines():
        record = json.loads(line)
        merged.setdefault(record["step"], {}).update(record)
    return merged


def announcement(config: RLConfig, version: int) -> WeightsReady:
    found = WeightsStore(RunDir(config.output_dir).weights).poll(version)
    assert found is not None
    return found


def published(config: RLConfig, version: int) -> dict[str, Tensor]:
    """Tensors of a version that travels as files."""
    (file,) = Path(announcement(config, version).path).glob("*.safetensors")
    return load_file(file)
