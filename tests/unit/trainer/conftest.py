"""Fixtures of the trainer's tests: a process group of one, and configurations of runs on the tiny model."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

from support.batches import ConfigOf
from turnwise.config import RLConfig

with install_import_hook("turnwise.trainer", "beartype.beartype"):  # shapes and types in signatures hold at every call in tests
    from turnwise.trainer import fsdp, loop  # noqa: F401  # the loop imports the rest


@pytest.fixture
def device() -> Generator[torch.device]:
    """The device of a process group of one process."""
    torch.set_num_threads(1)
    with fsdp.process_group(cuda=False, timeout_s=60.0) as device:
        yield device


@pytest.fixture
def config_of(tmp_path: Path, tiny_model: Path) -> ConfigOf:
    """Configurations of a run in `tmp_path/run`: `config_of(trainer={...}, max_steps=3)`."""

    def build(trainer: Mapping[str, Any] | None = None, **root: Any) -> RLConfig:
        tables: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "model": {"name": str(tiny_model)},
            "trainer": {"threads": 1, "optim": {"lr": 1e-3}, "micro_batch_tokens": 128, **(trainer or {})},
        }
        return RLConfig.model_validate(tables | root)

    return build
