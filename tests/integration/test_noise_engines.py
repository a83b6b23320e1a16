"""Noise in the norms of real engines: the embedded one, and vLLM."""

import asyncio
import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.adapters import ALL_LINEAR, peft_model, reference_logprobs
from support.served_engine import ENGINES, Served, connected, dtype_of, started
from support.tiny_model import build_tiny_model
from turnwise.inference import InferenceClient
from turnwise.inference.noise import Stage, run_stage
from turnwise.inference.norms import gaussian, gets_noise
from turnwise.orchestrator.noise import EngineNoise, WrongNoise, expected_norms
from turnwise.orchestrator.rollout import derive_seed
from turnwise.orchestrator.weights import Policy
from turnwise.transport import WeightsReady, WeightsStore, served_adapter, tensor_digest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PROMPT = [256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
TOLERANCE = {"embedded": 1e-3, "vllm": 0.05}  # nats against float32 of the same weights; vLLM computes in bfloat16
SIGMA = 0.5  # large, so that its effect stands out from the rounding of bfloat16
NOISE = {"sigma_start": SIGMA, "sigma_end": 1e-4, "stages": 3}
LORA = {"rank": 4, "alpha": 8.0}
STEPS = 3  # version 0 has no noise, version 1 SIGMA, version 2 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return build_tiny_model(root / "first", hidden=128, seed=0), build_tiny_model(root / "second", hidden=128, seed=1)


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Served]:
    folder = tmp_path_factory.mktemp("engine")
    with started(request.param, models[0], folder, lora=LORA, dtype=dtype_of(request.param), noise=NOISE) as engine:
        yield engine


@pytest.fixture(scope="module", params=ENGINES)
def served_whole(
    request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Served]:
    folder = tmp_path_factory.mktemp("engine")
    with started(request.param, models[0], folder, lora=None, dtype=dtype_of(request.param), noise=NOISE) as engine:
        yield engine


def noise_of(client: InferenceClient, model: Path) -> EngineNoise:
    ends = (NOISE["sigma_start"], NOISE["sigma_end"])
    schedule = lambda step: run_stage(step, steps=STEPS, stages=3, ends=ends)  # noqa: E731
    return EngineNoise(client, schedule, seed=7, norms=expected_norms(str(model)))


def with_noise(model: torch.nn.Module, sigma: float, seed: int) -> torch.nn.Module:
    """The same model of transformers, or one in PEFT's wrapping, with noise put into its norms by hand."""
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.")
        if type(module).__name__ == "LlamaRMSNorm" and gets_noise(plain):
            module.weight.data += sigma * gaussian(plain, module.weight, seed)
    return model


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _adapter(model: Path) -> torch.nn.Module:
    return peft_model(model, seed=1, rank=4, alpha=8.0)


@dataclass
class Publisher:
    """Publishes one adapter as the trainer does, for the engine that is served."""

    served: Served
    model: Path
    store: WeightsStore

    def adapter(self, version: int) -> WeightsReady:
        named = {name.replace(".default", ""): t for name, t in _adapter(self.model).named_parameters() if "lora_" in name}
        tensors = {name: tensor.detach().to(getattr(torch, dtype_of(self.served.kind))) for name, tensor in named.items()}
        held = served_adapter(tensors, dtype=torch.bfloat16, scale=2.0) if self.served.kind == "vllm" else tensors
        ready = WeightsReady(version, "lora", str(self.store.path(version)), tensor_digest(held))
        self.store.publish(ready, lambda folder: _write_adapter(folder, tensors))
        return ready


def _write_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ALL_LINEAR, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


async def _sampled(policy: Policy, version: int) -> tuple[Sequence[int], Sequence[float]]:
    """What an evaluation of a version samples."""
    reply = await policy.generator(temperature=1.0, affinity="e", version=version)(PROMPT, 8, 5)
    return reply.token_ids, reply.logprobs


async def test_an_adapter_is_sampled_with_the_noise_of_its_version_and_evaluated_without(
    served: Served, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Three versions of one adapter. Against PEFT with the same noise, and against the engine before it had any."""
    publisher, reference = Publisher(served, models[0], WeightsStore(tmp_path / "weights")), _adapter(models[0])
    async with connected(served) as client:
        policy = Policy(client, publisher.store, stop_ids=[], noise=noise_of(client, models[0]))
        await policy.swap(publisher.adapter(0))
        before = await _sampled(policy, 0)
        clean = await client.prompt_logprobs(PROMPT, version=0)
        assert difference(clean, reference_logprobs(reference, PROMPT)) < TOLERANCE[served.kind]
        await policy.swap(publisher.adapter(1))
        noisy = await client.prompt_logprobs(PROMPT, version=1)
        expected = reference_logprobs(with_noise(reference, SIGMA, derive_seed(7, "noise", 1)), PROMPT)
        assert difference(noisy, expected) < TOLERANCE[served.kind] < difference(clean, expected) / 5
        async with policy.without_noise():
            assert await _sampled(policy, 1) == before
        assert await client.prompt_logprobs(PROMPT, version=1) == noisy
        await policy.swap(publisher.adapter(2))
        metrics = policy.noise_metrics()
        await client.pause()
        await noise_of(client, models[0]).clear()
        await client.resume()
        assert await client.prompt_logprobs(PROMPT, version=2) == clean
        await policy.close()
        await client.unload_adapter(2)
    # norms are held in float32, also where the model is bfloat16: the smallest sigma arrives in full
    assert metrics["noise/sigma"] == pytest.approx(1e-4)
    assert metrics["noise/effective_sigma/mean"] == pytest.approx(1e-4, rel=0.1)
    assert metrics["noise/changed/share"] > 0.99


async def test_a_prefix_computed_with_other_norms_is_not_used_again(served: Served, models: tuple[Path, Path]) -> None:
    """The same prompt before, with and after noise: each time the logprob of an engine with an empty cache."""
    prompt, sampled = PROMPT * 20, {}
    async with connected(served) as client:
        noise = noise_of(client, models[0])
        for version in (0, 1, 0, 1):
            await client.pause()
            await noise.apply(version)
            await client.resume()
            for turn in range(2):  # the second finds the first one's blocks
                reply = await client.generate(prompt, version=None, max_tokens=1, temperature=1.0, seed=3, stop_token_ids=[])
                sampled.setdefault((version, turn), []).append((reply.token_ids, reply.logprobs[0]))
        await noise.clear()
    for repeated in sampled.values():
        assert repeated[0][0] == repeated[1][0]
        assert repeated[0][1] == pytest.approx(repeated[1][1], abs=1e-4)
    assert abs(sampled[0, 0][0][1] - sampled[1, 0][0][1]) > 1e-2


@pytest.mark.parametrize("kind", ENGINES)
async def test_a_search_that_finds_no_norms_stops_the_run(kind: str, tmp_path: Path) -> None:
    """A model whose norms are of another kind: adding noise to nothing would look like success."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = build_tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    settings = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=320, n_positions=2048, bos_token_id=256, eos_token_id=257)
    GPT2LMHeadModel(settings).save_pretrained(model)
    with started(kind, model, tmp_path, lora=None, dtype=dtype_of(kind), noise=NOISE) as served:
        async with connected(served) as client:
            noise = EngineNoise(client, lambda step: Stage(1, SIGMA), seed=7, norms=5)
            with pytest.raises(WrongNoise, match="worker 0 found 0 RMSNorm weights outside attention, and this model has 5"):
                await noise.apply(1)


async def test_requests_that_noise_cuts_are_finished(served: Served, models: tuple[Path, Path]) -> None:
    async with connected(served) as client:
        noise = noise_of(client, models[0])
        await noise.clear()
        asked = [
            asyncio.create_task(
                client.generate(PROMPT, version=None, max_tokens=200, temperature=1.0, seed=s, stop_token_ids=[], affinity=str(s))
            )
            for s in range(4)
        ]
        await asyncio.to_thread(served.wait_until_running)
        await client.pause()
        await noise.apply(1)
        await client.resume()
        for reply in await asyncio.gather(*asked):
            assert reply.finish_reason in ("stop", "length")
            assert len(reply.token_ids) == 200 or reply.finish_reason == "stop"
            assert all(math.isfinite(logprob) and logprob <= 0 for logprob in reply.logprobs)
        await client.pause()
        await noise.clear()
        await client.resume()


async def test_full_weights_are_proven_without_noise_and_their_norms_are_the_clean_ones_from_then_on(
    served_whole: Served, models: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    store = WeightsStore(tmp_path / "weights")
    async with connected(served_whole) as client:
        policy = Policy(client, store, stop_ids=[], noise=noise_of(client, models[0]))
        for version, model in ((0, models[0]), (1, models[1]), (2, models[0])):
            tensors = {
                n: t.to(getattr(torch, dtype_of(served_whole.kind))) for n, t in load_file(model / "model.safetensors").items()
            }
            await policy.swap(WeightsReady(version, "full", str(model), tensor_digest(tensors)))
            sigma = noise_of(client, models[0]).schedule(version).sigma
            reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            clean = reference_logprobs(reference, PROMPT)
            noisy = reference_logprobs(with_noise(reference, sigma, derive_seed(7, "noise", version)), PROMPT)
            assert difference(await client.prompt_logprobs(PROMPT, version=None), noisy) < TOLERANCE[served_whole.kind]
            async with policy.without_noise():
                reply = await policy.generator(temperature=1.0, affinity="e", version=version)(PROMPT, 4, 5)
                assert await client.digest(None) == [tensor_digest(tensors)]
            assert len(reply.logprobs) == len(reply.token_ids)
            assert (difference(clean, noisy) > 5 * TOLERANCE[served_whole.kind]) is (version == 1)
