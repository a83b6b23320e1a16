"""The memory of a shared GPU: the split adds up, both fit, and what cannot fit is refused with its numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.shapes import QWEN3_4B, SMOLLM2_135M
from turnwise.config import ConfigError, RLConfig
from turnwise.config.files import merge
from turnwise.config.root import shared_gpu_reserve
from turnwise.launch.shape import ModelShape, read_shape
from turnwise.launch.split import MOST, Split, engine_fraction, engine_minimum, splits, trainer_minimum

GIB = 2**30
H200 = 143771 * 2**20
SHARED: dict[str, Any] = {
    "gpus": {"inference": [0], "trainer": [0], "share": True},
    "inference": {"engine": "vllm"},
    "seq_len": 1536,
}


def config(**changes: Any) -> RLConfig:
    return RLConfig.model_validate(merge(SHARED, changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape(tmp_path_factory.mktemp("small"), SMOLLM2_135M)


@pytest.fixture(scope="module")
def qwen4(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape(tmp_path_factory.mktemp("qwen"), QWEN3_4B)


def shape(folder: Path, raw: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_shape(folder)


def test_the_trainer_gets_its_estimate_and_half_as_much_again_and_the_engine_the_rest(qwen4: ModelShape):
    packs = config(trainer={"micro_batch_tokens": 8192})
    fraction = engine_fraction(packs, qwen4, {0: H200})
    needed = trainer_minimum(packs, qwen4)
    assert fraction == pytest.approx((H200 - shared_gpu_reserve(H200) - 1.5 * needed) / H200, abs=0.01)
    (split,) = splits(config(gpus={"inference_memory": fraction}), {0: H200})
    assert split.trainer >= 1.5 * needed
    assert split.engine + split.trainer + split.free == H200


def test_a_small_model_leaves_the_engine_no_more_than_where_it_is_alone(small: ModelShape):
    assert engine_fraction(config(), small, {0: H200}) == MOST


def test_the_margin_shrinks_before_a_split_is_refused(qwen4: ModelShape):
    tight = config(trainer={"micro_batch_tokens": 1536})
    total = int(engine_minimum(tight, qwen4, H200) + 1.1 * trainer_minimum(tight, qwen4) + shared_gpu_reserve(100 * GIB))
    fraction = engine_fraction(tight, qwen4, {0: total})
    assert fraction * total >= engine_minimum(tight, qwen4, total)
    assert (1 - fraction) * total - shared_gpu_reserve(total) >= trainer_minimum(tight, qwen4)


def test_a_gpu_too_small_for_both_is_refused_with_the_numbers(qwen4: ModelShape):
    with pytest.raises(ConfigError) as refused:
        engine_fraction(config(), qwen4, {0: 24 * GIB})
    text = str(refused.value)
    assert text.startswith("gpus.share: GPU 0 has 24.0 GiB, too little for both: the engine needs at least ")
    for number in (engine_minimum(config(), qwen4, 24 * GIB), trainer_minimum(config(), qwen4)):
        assert f"{number / GIB:.1f} GiB" in text
    assert "gpus.inference_memory" in text


def test_the_smallest_of_the_shared_gpus_decides(qwen4: ModelShape):
    pair = config(gpus={"inference": [0, 1], "trainer": [0, 1]})
    both = engine_fraction(pair, qwen4, {0: H200, 1: H200 // 2})
    assert both == engine_fraction(pair, qwen4, {0: H200 // 2, 1: H200 // 2})


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gib=st.integers(8, 200), tokens=st.sampled_from([1536, 8192, 32768]), checkpointing=st.booleans())
def test_both_fit_whatever_the_gpu_or_the_split_is_refused(small: ModelShape, gib: int, tokens: int, checkpointing: bool):
    asked = config(trainer={"micro_batch_tokens": tokens, "model": {"gradient_checkpointing": checkpointing}})
    total = gib * GIB
    try:
        fraction = engine_fraction(asked, small, {0: total})
    except ConfigError:
        needed = engine_minimum(asked, small, total) + trainer_minimum(asked, small) + shared_gpu_reserve(total)
        assert needed > total * 0.98  # fractions are rounded down to hundredths
        return
    (split,) = splits(config(gpus={"inference_memory": fraction}), {0: total})
    assert split.engine >= engine_minimum(asked, small, total)
    assert split.trainer >= trainer_minimum(asked, small)


def test_only_shared_gpus_of_known_size_are_split():
    three = config(gpus={"inference": [0, 1], "trainer": [1, 2], "inference_memory": 0.5})
    assert [split.gpu for split in splits(three, {0: H200, 1: H200, 2: H200})] == [1]
    assert splits(three, {0: H200}) == []
    assert splits(config(gpus={"share": False, "trainer": [1]}), {0: H200, 1: H200}) == []


def test_vllms_own_setting_wins():
    asked = config(gpus={"inference_memory": 0.5}, inference={"vllm": {"gpu-memory-utilization": 0.25}})
    (split,) = splits(asked, {0: 100 * GIB})
    assert (split.engine, split.trainer) == (25 * GIB, 75 * GIB - shared_gpu_reserve(100 * GIB))


def test_a_split_is_told_in_gib():
    assert Split(0, 100 * GIB, 60 * GIB, 38 * GIB).text("GPU 0 (NVIDIA X)") == (
        "GPU 0 (NVIDIA X) is shared: engine 60.0 GiB (60%), trainer at most 38.0 GiB, 2.0 GiB stay free; "
        "the trainer starts once the engine serves."
    )


def test_the_reserve_is_a_context_and_a_little_of_each_gpu():
    assert [shared_gpu_reserve(gib * GIB) / GIB for gib in (0, 25, 100)] == [1.5, 2.0, 3.5]
