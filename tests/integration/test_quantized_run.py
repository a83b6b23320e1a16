"""Runs with MXFP4 weights through `rl`: the same bytes in engine and trainer, resumed to the bit; what a wrong engine shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from support.quantized import swap_nibbles
from support.rl_command import finish, write_config
from support.run_records import metrics
from turnwise.config import RLConfig, load_config
from turnwise.inference.embedded.build import build_server
from turnwise.trainer import fsdp
from turnwise.trainer.step import Learner
from turnwise.transport import RunDir, WeightsStore, tensor_digest

QUANT = "\n[trainer.model.quant]\n"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache of models."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURNWISE_CACHE", str(folder))
        yield folder


def quantised_config(folder: Path, model: Path, *, max_steps: int = 2) -> Path:
    path = write_config(folder, model, max_steps=max_steps, max_staleness=0)
    path.write_text(path.read_text() + QUANT)
    return path


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cache: Path) -> tuple[Path, str]:
    """Run folder and output of two steps of an adapter over a packed base."""
    folder = tmp_path_factory.mktemp("lora")
    output = finish(folder, "@", str(quantised_config(folder, tiny_model)), "--ckpt.interval", "1", "--ckpt.keep-last", "5")
    return folder / "run", output


def test_a_run_quantises_once_says_what_and_with_what_error_and_finishes(lora_run: tuple[Path, str], cache: Path):
    root, output = lora_run
    assert "quantising tiny-model0 to MXFP4" in output
    assert "14 linear layers (2 down_proj, 2 gate_proj, 2 k_proj" in output
    assert "worst layer: model.layers." in output
    assert "Done at step 2 of 2" in output
    assert "14 linear layers of it in MXFP4" in (root / "logs" / "inference.stdout").read_text()
    assert "MXFP4, scales by even: 14 linear layers" in (root / "logs" / "trainer.stdout").read_text()
    config = load_config(root / "config.toml")
    assert config.model.quantized is not None
    assert config.model.quantized.parent == cache / "models"


def test_engine_and_trainer_agree_on_logprobs_from_the_first_step_on(lora_run: tuple[Path, str]):
    found = metrics(lora_run[0])
    assert all(found[step]["mismatch/logprob_abs/max"] < 1e-4 for step in (1, 2))
    assert found[2]["canary/change_shown/min"] == pytest.approx(1.0, abs=1e-2)


def resident(config: RLConfig) -> tuple[str, str]:
    """Digests of the packed bytes that the trainer and the embedded engine hold."""
    with fsdp.process_group(cuda=False, timeout_s=60) as device:
        buffers = Learner(config, device).policy.model.named_buffers()
        held = {name.replace(".base.", "."): value for name, value in buffers if "weight_" in name}
    server = build_server(config)
    try:
        tensors = dict(server.engine.decoder.model.tensors())  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        server.engine.stop()
    assert len(held) == 28
    return tensor_digest(held), tensor_digest({name: value for name, value in tensors.items() if "weight_" in name})


def test_trainer_and_engine_hold_the_bytes_of_the_folder(lora_run: tuple[Path, str]):
    config = load_config(lora_run[0] / "config.toml")
    assert config.model.quantized is not None
    stored = load_file(config.model.quantized / "model.safetensors")
    file = tensor_digest({name: value for name, value in stored.items() if "weight_" in name})
    assert resident(config) == (file, file)


def test_nibbles_in_the_wrong_order_are_other_bytes_and_another_policy(lora_run: tuple[Path, str], tmp_path: Path):
    """The planted fault of the test above."""
    config = load_config(lora_run[0] / "config.toml")
    assert config.model.quantized is not None
    shutil.copytree(config.model.quantized, tmp_path / "swapped")
    swap_nibbles(tmp_path / "swapped")
    wrong = config.model_copy(update={"model": config.model.model_copy(update={"quantized": tmp_path / "swapped"})})
    assert resident(wrong)[1] != resident(config)[0]


def test_an_engine_that_decodes_other_values_than_its_bytes_has_no_digest(lora_run: tuple[Path, str]):
    server = build_server(load_config(lora_run[0] / "config.toml"))
    try:
        model = server.engine.decoder.model  # pyright: ignore[reportAttributeAccessIssue]
        packed, scales = model.codes["model.layers.0.mlp.down_proj"]
        model.codes["model.layers.0.mlp.down_proj"] = (packed, scales + 1)
        with pytest.raises(ValueError, match=r"down_proj computes with other values than those of its MXFP4 codes"):
            server.engine.decoder.digest(None)
    finally:
        server.engine.stop()


def test_a_resumed_run_is_the_straight_one_to_the_bit_and_quantises_nothing(lora_run: tuple[Path, str], tmp_path: Path):
    straight, _ = lora_run
    root = tmp_path / "run"
    shutil.copytree(straight, root)
    text = (root / "config.toml").read_text().replace(str(straight), str(root))
    (root / "config.toml").write_text(text)
    shutil.rmtree(root / "checkpoints" / "step_2")
    output = finish(tmp_path, "@", str(straight.parent / "run.toml"), "--output-dir", str(root), "--resume")
    assert "Resuming after step 1" in output
    assert "quantising" not in output
    adapters = [load_file(run / "checkpoints" / "step_2" / "adapter" / "adapter_model.safetensors") for run in (straight, root)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(lora_run: tuple[Path, str]):
    folder = lora_run[0] / "checkpoints" / "step_2" / "trainer"
    names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert sum("lora_" in name for name in names) == 28 * 4  # two of 14 layers: parameters, two moments, steps
    assert all("lora_" in name or name.startswith("generators") for name in names)


PLANTED = """
from turnwise.inference.embedded import __main__ as engine
read = engine.load_config
engine.load_config = lambda path: (c := read(path)).model_copy(update={"model": c.model.model_copy(update={"quantized": None})})
engine.main()
"""
WRAPPER = """#!/bin/bash
if [[ "$1 $2" == "-m turnwise.inference.embedded" ]]; then shift 2; exec {python} {script} "$@"; fi
exec {python} "$@"
"""
START = """
import sys
sys.executable = {python!r}
from turnwise.cli.rl import run_command
sys.exit(run_command(sys.argv[1:]))
"""


def test_an_engine_on_the_unquantised_weights_shows_in_the_mismatch(lora_run: tuple[Path, str], tmp_path: Path, tiny_model: Path):
    """The planted fault: the adapter is the right one, and its digest is right, but the base below it is the original."""
    script, python = tmp_path / "engine.py", tmp_path / "python"
    script.write_text(PLANTED)
    python.write_text(WRAPPER.format(python=sys.executable, script=script))
    python.chmod(0o755)
    config = quantised_config(tmp_path, tiny_model)
    done = subprocess.run(
        [sys.executable, "-c", START.format(python=str(python)), "@", str(config), "--plain"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "14 linear layers of it in MXFP4" not in (tmp_path / "run" / "logs" / "inference.stdout").read_text(), done.stdout
    wrong, right = metrics(tmp_path / "run")[1], metrics(lora_run[0])[1]
    assert wrong["mismatch/logprob_abs/mean"] > 1e-3 > 1000 * right["mismatch/logprob_abs/mean"]


def test_all_parameters_train_quantised_and_engines_prove_the_rounded_weights(tmp_path: Path, tiny_model: Path):
    output = finish(tmp_path, "@", str(quantised_config(tmp_path, tiny_model)), "--no-trainer.model.lora")
    assert "Done at step 2 of 2" in output
    root = tmp_path / "run"
    assert load_config(root / "config.toml").model.quantized is None
    found = metrics(root)
    assert all(found[step]["mismatch/logprob_abs/max"] < 1e-4 for step in (1, 2))
    store = WeightsStore(RunDir(root).weights)
    assert store.served() == 2
    tensors = load_file(root / "checkpoints" / "step_2" / "model" / "model.safetensors")
    blocks = tensors["model.layers.0.mlp.down_proj.weight"].view(-1, 32)
    assert max(len(block.abs().unique()) for block in blocks) <= 8  # the magnitudes of four bits
    ready = store.poll(2)
    assert ready is not None
    assert ready.digest == tensor_digest(tensors)
