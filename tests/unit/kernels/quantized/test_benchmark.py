"""What `benchmarks/engine_client.py` measures in MXFP4: its weights are read by trainer and engine, and its rates compared."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnwise.inference.embedded.loading import load_served
from turnwise.kernels.mxfp4.ops import dequantize
from turnwise.kernels.quantized.layout import is_packed
from turnwise.kernels.quantized.model import load_packed
from turnwise.kernels.quantized.tensors import open_tensors

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return load("_packed_weights").write_packed_folder(tmp_path, "tiny")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 200)[None]).logits[0]


def test_trainer_and_engine_compute_the_same_finite_logits_with_the_random_weights(folder: Path):
    assert is_packed(folder)
    by_trainer = logits(load_packed(folder, torch.float32))
    by_engine = logits(load_served(folder, torch.float32)[0])
    assert by_trainer.isfinite().all()
    assert 0.05 < float(by_trainer.std()) < 5
    assert torch.allclose(by_trainer, by_engine, atol=1e-4)
    assert logits(load_packed(folder, torch.bfloat16)).isfinite().all()


def test_the_weights_are_spread_as_those_of_a_model_that_begins(folder: Path):
    with open_tensors(folder) as tensors:
        assert len(tensors.layers) == 2 * 7
        weights = torch.cat([dequantize(*tensors.packed(layer), torch.float32).flatten() for layer in tensors.layers])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(weights.mean())) < 1e-3


def test_a_scale_byte_that_nobody_wrote_makes_logits_nan(folder: Path):
    (path,) = folder.glob("model-00002-of-*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight_scale"][0, 0] = 255
    save_file(tensors, path, metadata={"format": "pt"})
    assert logits(load_packed(folder, torch.float32)).isnan().all()


def row(weights: str, concurrency: int, rate: float) -> dict[str, Any]:
    served = {"concurrency": concurrency, "tokens_per_s": rate, "server_cpu_ms_per_request": 1.0, "server_cpu_share": 0.5}
    alone = {"concurrency": concurrency, "tokens_per_s": 2000.0}
    return load("_client_report").compare(served, alone, weights=weights, lora=False)


def test_mxfp4_is_compared_with_bfloat16_at_the_same_concurrency(tmp_path: Path):
    report = load("_client_report")
    rows = [row("bfloat16", 64, 1000.0), row("bfloat16", 256, 1900.0), row("mxfp4", 256, 2850.0), row("mxfp4", 8, 500.0)]
    shown = report.table(rows).splitlines()[2:]
    assert ["1.50 x" in line for line in shown] == [False, False, True, False]
    assert report.verdict(rows).startswith("worst: 25.0% of the offline rate, goal 95%: missed")
    report.write(tmp_path / "out.json", rows, {"shape": "tiny", "json": Path("out.json")}, {"vllm": "0"})
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert written["beside_bfloat16"] == [{"weights": "mxfp4", "lora": False, "concurrency": 256, "ratio": 1.5}]
    assert math.isclose(written["worst"], 0.25)
    assert written["results"] == rows
