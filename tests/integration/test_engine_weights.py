"""The proof that an engine serves what was published, and that no planted fault gets past it, against every engine."""

import json
import shutil
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.adapters import peft_model, reference_logprobs
from support.served_engine import ENGINES, SLOTS, Served, connected, dtype_of, started
from support.tiny_model import build_tiny_model
from turnwise.inference import EngineError, InferenceClient
from turnwise.orchestrator.weights import Policy, WrongWeights
from turnwise.transport import WeightsReady, WeightsStore, served_adapter, tensor_digest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RANK, ALPHA = 6, 9.0  # vLLM pads the rank to 8; the scale of 1.5 rounds in bfloat16
ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"
PROMPT = [256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
TOLERANCE = {"embedded": 1e-3, "vllm": 0.05}  # nats against float32 of the same weights; vLLM computes in bfloat16

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape, in the type in which they are served."""
    root = tmp_path_factory.mktemp("models")
    return build_tiny_model(root / "first", hidden=128, seed=0), build_tiny_model(root / "second", hidden=128, seed=1)


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Served]:
    folder, lora = tmp_path_factory.mktemp("engine"), {"rank": RANK, "alpha": ALPHA}
    with started(request.param, models[0], folder, lora=lora, dtype=dtype_of(request.param)) as engine:
        yield engine


@pytest.fixture(scope="module", params=ENGINES)
def served_whole(
    request: pytest.FixtureRequest, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Served]:
    """An engine of a run that trains all weights."""
    folder = tmp_path_factory.mktemp("engine")
    with started(request.param, models[0], folder, lora=None, dtype=dtype_of(request.param)) as engine:
        yield engine


@dataclass
class Publisher:
    """Publishes versions as the trainer does, for the engine that is served."""

    served: Served
    store: WeightsStore
    version: int = 0

    def adapter(self, tensors: Tensors, damage: Callable[[Path], None] | None = None) -> WeightsReady:
        """Announce an adapter; `damage` befalls its folder after the announcement was written."""
        files, announced = tensors, tensor_digest(tensors)
        if self.served.kind == "vllm":
            files = {name: tensor.bfloat16() for name, tensor in tensors.items()}
            announced = tensor_digest(served_adapter(files, dtype=torch.bfloat16, scale=ALPHA / RANK))
        return self._announce("lora", announced, lambda folder: _write_adapter(folder, files), damage)

    def model(self, checkpoint: Path, damage: Callable[[Path], None] | None = None) -> WeightsReady:
        """Announce the weights of a checkpoint."""
        tensors = load_file(checkpoint / MODEL)
        if self.served.kind == "vllm":
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}

        def fill(folder: Path) -> None:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
            save_file(tensors, folder / MODEL, metadata={"format": "pt"})

        return self._announce("full", tensor_digest(tensors), fill, damage)

    def _announce(
        self, kind: Any, announced: str, fill: Callable[[Path], None], damage: Callable[[Path], None] | None
    ) -> WeightsReady:
        self.version += 1
        ready = WeightsReady(self.version, kind, str(self.store.path(self.version)), announced)
        self.store.publish(ready, fill)
        if damage is not None:
            damage(Path(ready.path))
        return ready


def _write_adapter(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / ADAPTER)
    modules = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def tensors(models: tuple[Path, Path]) -> list[Tensors]:
    """Two adapters: tensors under PEFT's names, float32."""
    return [_adapter_tensors(models[0], seed) for seed in (1, 2)]


def _adapter_tensors(model: Path, seed: int) -> Tensors:
    wrapped = peft_model(model, seed=seed, rank=RANK, alpha=ALPHA)
    named = {name.replace(".default", ""): tensor for name, tensor in wrapped.named_parameters() if "lora_" in name}
    return {name: tensor.detach().contiguous() for name, tensor in named.items()}


@pytest.fixture(scope="module")
def publisher(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(served, WeightsStore(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def whole_publisher(served_whole: Served, tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(served_whole, WeightsStore(tmp_path_factory.mktemp("weights")))


@pytest.fixture
async def policy(publisher: Publisher) -> AsyncGenerator[Policy]:
    async for made in _policy(publisher):
        yield made


@pytest.fixture
async def whole_policy(whole_publisher: Publisher) -> AsyncGenerator[Policy]:
    async for made in _policy(whole_publisher):
        yield made


async def _policy(publisher: Publisher) -> AsyncGenerator[Policy]:
    async with connected(publisher.served) as client:
        made = Policy(client, publisher.store, stop_ids=[])
        yield made
        for version in made._loaded:
            await client.unload_adapter(version)
        await made.close()


# --- adapters ---------------------------------------------------------------------------------------------------------


async def test_the_digest_of_an_adapter_is_the_published_one(
    policy: Policy, publisher: Publisher, tensors: list[Tensors]
) -> None:
    ready = publisher.adapter(tensors[0])
    await policy.swap(ready)
    assert publisher.store.served() == ready.version
    assert await policy.client.digest(ready.version) == [ready.digest]


async def test_an_adapter_of_some_layers_only_has_the_published_digest(
    policy: Policy, publisher: Publisher, tensors: list[Tensors]
) -> None:
    some = {name: tensor for name, tensor in tensors[0].items() if "v_proj" in name or "up_proj" in name or "down_proj" in name}
    await policy.swap(publisher.adapter(some))


async def test_the_first_adapter_which_changes_nothing_has_the_published_digest(
    policy: Policy, publisher: Publisher, tensors: list[Tensors]
) -> None:
    await policy.swap(publisher.adapter({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors[0].items()}))


@pytest.mark.parametrize("served", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
async def test_an_adapter_that_lost_its_slot_is_proven_in_the_slot_that_requests_get(
    publisher: Publisher, tensors: list[Tensors], models: tuple[Path, Path]
) -> None:
    """More versions are loaded than there are slots: the first one is in vLLM's cache alone by then."""
    readies = [publisher.adapter(tensors[0])] + [publisher.adapter(tensors[1]) for _ in range(SLOTS + 1)]
    async with connected(publisher.served) as client:
        for ready in readies:
            await client.load_adapter(ready.version, ready.path)
        assert await client.digest(readies[0].version) == [readies[0].digest]
        got = await client.prompt_logprobs(PROMPT, version=readies[0].version)
        for ready in readies:
            await client.unload_adapter(ready.version)
    expected = reference_logprobs(peft_model(models[0], seed=1, rank=RANK, alpha=ALPHA), PROMPT)
    assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < TOLERANCE["vllm"]


def old_files(folder: Path) -> None:
    """The files of the version before, as after a copy that came too late."""
    shutil.copy(folder.parent / f"v{int(folder.name[1:]) - 1}" / ADAPTER, folder / ADAPTER)


def half_missing(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.0." in name}, folder / ADAPTER)


def half_of_the_pairs_missing(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, folder / ADAPTER)


def half_zero(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file({n: torch.zeros_like(t) if ".layers.1." in n else t for n, t in tensors.items()}, folder / ADAPTER)


def one_value_off(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    name = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
    tensors[name].view(-1)[-1] *= 1.01
    save_file(tensors, folder / ADAPTER)


@pytest.mark.parametrize("damage", [old_files, half_missing, half_of_the_pairs_missing, half_zero, one_value_off])
async def test_an_engine_that_holds_another_adapter_than_the_published_one_is_found_out(
    policy: Policy, publisher: Publisher, tensors: list[Tensors], damage: Callable[[Path], None]
) -> None:
    await policy.swap(publisher.adapter(tensors[0]))
    ready = publisher.adapter(tensors[1], damage)
    with pytest.raises(WrongWeights, match=rf"version {ready.version}: engine 0 holds tensors .* published {ready.digest[:16]}"):
        await policy.swap(ready)
    assert publisher.store.served() == ready.version - 1
    assert policy.version == ready.version - 1


@pytest.mark.parametrize("served", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
async def test_another_scale_than_the_published_one_is_found_out(
    policy: Policy, publisher: Publisher, tensors: list[Tensors]
) -> None:
    """vLLM holds the scale in B. The embedded engine keeps it apart, where canaries see it."""

    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 2 * ALPHA}))

    with pytest.raises(WrongWeights):
        await policy.swap(publisher.adapter(tensors[0], damage))


class Forgetful(InferenceClient):
    """Says that it loaded, and did not."""

    async def load_adapter(self, version: int, path: str) -> None: ...

    async def reload_weights(self, path: str) -> None: ...


async def test_an_adapter_that_was_never_loaded_is_named(publisher: Publisher, tensors: list[Tensors]) -> None:
    ready = publisher.adapter(tensors[0])
    served = publisher.served
    async with Forgetful([served.url], model=str(served.model), request_timeout_s=60.0, max_retries=0) as client:
        with pytest.raises(
            EngineError, match=rf"{served.url}.*(no adapter v{ready.version} was loaded|'v{ready.version}' cannot be)"
        ):
            await Policy(client, publisher.store, stop_ids=[]).swap(ready)
    assert publisher.store.served() < ready.version


# --- full weights -----------------------------------------------------------------------------------------------------


async def test_the_digest_of_the_base_weights_is_that_of_the_files(
    served: Served, models: tuple[Path, Path], publisher: Publisher
) -> None:
    """Also where layers are wrapped for adapters."""
    tensors = {name: tensor.to(getattr(torch, dtype_of(served.kind))) for name, tensor in load_file(models[0] / MODEL).items()}
    async with connected(served) as client:
        assert await client.digest(None) == [tensor_digest(tensors)]


async def test_new_full_weights_are_proven_and_served(
    whole_policy: Policy, whole_publisher: Publisher, models: tuple[Path, Path]
) -> None:
    """The embedding is tied to the output layer: logprobs agree only when both are new."""
    from transformers import AutoModelForCausalLM

    for checkpoint in (models[1], models[0], models[1]):
        await whole_policy.swap(whole_publisher.model(checkpoint))
        got = await whole_policy.client.prompt_logprobs(PROMPT, version=None)
        expected = reference_logprobs(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), PROMPT)
        assert max(abs(a - b) for a, b in zip(expected, got, strict=True)) < TOLERANCE[whole_publisher.served.kind]


def half_of_the_model_zero(folder: Path) -> None:
    tensors = load_file(folder / MODEL)
    zeroed = {name: torch.zeros_like(tensor) if ".layers.1." in name else tensor for name, tensor in tensors.items()}
    save_file(zeroed, folder / MODEL, metadata={"format": "pt"})


def old_model(folder: Path) -> None:
    shutil.copy(folder.parent / f"v{int(folder.name[1:]) - 1}" / MODEL, folder / MODEL)


@pytest.mark.parametrize("damage", [half_of_the_model_zero, old_model])
async def test_an_engine_that_holds_other_full_weights_than_the_published_ones_is_found_out(
    whole_policy: Policy, whole_publisher: Publisher, models: tuple[Path, Path], damage: Callable[[Path], None]
) -> None:
    await whole_policy.swap(whole_publisher.model(models[0]))
    ready = whole_publisher.model(models[1], damage)
    with pytest.raises(WrongWeights, match=f"version {ready.version}: engine 0"):
        await whole_policy.swap(ready)


async def test_a_reload_that_did_not_happen_is_found_out(whole_publisher: Publisher, models: tuple[Path, Path]) -> None:
    served = whole_publisher.served
    async with connected(served) as client:
        await Policy(client, whole_publisher.store, stop_ids=[]).swap(whole_publisher.model(models[0]))
    async with Forgetful([served.url], model=str(served.model), request_timeout_s=60.0, max_retries=0) as client:
        with pytest.raises(WrongWeights, match="engine 0"):
            await Policy(client, whole_publisher.store, stop_ids=[]).swap(whole_publisher.model(models[1]))
