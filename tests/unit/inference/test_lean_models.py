"""The lean forward pass against transformers' own, family by family."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma2Config, LlamaConfig, MistralConfig

from support.adapters import reference_logprobs
from support.engine_support import FAMILIES, GPT2, build, random_prompts, run, sequence
from turnwise.inference.embedded.generic_decoder import GenericDecoder
from turnwise.inference.embedded.lean import LeanModel, why_not_lean
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.transport import tensor_digest


def lean(model: Any, *, deterministic: bool = False) -> LeanDecoder:
    return LeanDecoder(LeanModel(model, 256), cache_bytes=2**24, deterministic=deterministic)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_family_agrees_with_its_own_forward_pass(family: str, deterministic: bool) -> None:
    model = build(FAMILIES[family])
    sequences = [sequence(prompt, seed=i) for i, prompt in enumerate(random_prompts(6))]
    run(lean(model, deterministic=deterministic), sequences)
    for item in sequences:
        expected = reference_logprobs(model, item.tokens)[len(item.prompt) - 1 :]
        assert item.logprobs == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_agrees_within_its_precision(family: str) -> None:
    model = build(FAMILIES[family], dtype=torch.bfloat16)
    sequences = [sequence(prompt, seed=i) for i, prompt in enumerate(random_prompts(6))]
    run(lean(model), sequences)
    for item in sequences:
        expected = reference_logprobs(model, item.tokens)[len(item.prompt) - 1 :]
        assert item.logprobs == pytest.approx(expected, abs=0.03)


def test_the_generic_path_gives_the_same_replies_as_the_lean_one() -> None:
    model = build(FAMILIES["llama"])
    prompts = random_prompts(4)
    replies: list[list[tuple[list[int], list[float]]]] = []
    for decoder in (lean(model), GenericDecoder(model, max_length=256)):
        sequences = [sequence(prompt, seed=i) for i, prompt in enumerate(prompts)]
        run(decoder, sequences)
        replies.append([(item.sampled, item.logprobs) for item in sequences])
    for (ids, logprobs), (other_ids, other_logprobs) in zip(*replies, strict=True):
        assert ids == other_ids
        assert logprobs == pytest.approx(other_logprobs, abs=2e-5)


def test_another_architecture_is_served_by_the_generic_path() -> None:
    model = build(GPT2)
    assert why_not_lean(model.config) == "model type gpt2"
    sequences = [sequence(prompt, seed=i) for i, prompt in enumerate(random_prompts(3))]
    run(GenericDecoder(model, max_length=256), sequences)
    for item in sequences:
        expected = reference_logprobs(model, item.tokens)[len(item.prompt) - 1 :]
        assert item.logprobs == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(hidden_act="gelu"), "activation gelu"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope type dynamic"),
        (MistralConfig(sliding_window=128), "sliding window"),
        (Gemma2Config(), "model type gemma2"),
    ],
)
def test_what_the_lean_path_would_compute_differently_is_left_to_the_generic_one(config: Any, reason: str) -> None:
    assert why_not_lean(config) == reason


@pytest.mark.parametrize("family", FAMILIES)
def test_the_digest_covers_every_weight_under_its_checkpoint_name(family: str, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = build(FAMILIES[family])
    model.save_pretrained(tmp_path)
    decoder = lean(model)
    assert decoder.digest(None) == tensor_digest(load_file(tmp_path / "model.safetensors"))
    assert AutoConfig.from_pretrained(tmp_path).model_type in family


def test_prompt_logprobs_agree_with_the_forward_pass() -> None:
    model = build(FAMILIES["qwen2"])
    ids = (random_prompts(1, longest=200, seed=3)[0] * 3)[:250]
    expected = reference_logprobs(model, ids)
    assert lean(model).prompt_logprobs(ids, None) == pytest.approx(expected, abs=2e-5)
    assert GenericDecoder(model, max_length=256).prompt_logprobs(ids, None) == pytest.approx(expected, abs=2e-5)
