"""Full weights by broadcast into every engine: proven, computed with, in the middle of a reply, and refused with words."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.adapters import reference_logprobs
from support.served_engine import ENGINES, Served, connected, started
from support.tiny_model import build_tiny_model
from turnwise.inference import EngineError, InferenceClient
from turnwise.orchestrator.weights import Policy, WrongWeights
from turnwise.transport import BroadcastError, Manifest, Sender, WeightsReady, WeightsStore, plan_buckets, spec_of, tensor_digest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
DTYPE = {"embedded": torch.float32, "vllm": torch.bfloat16}
TOLERANCE = {"embedded": 1e-3, "vllm": 0.05}  # nats against float32 of the same weights; vLLM computes in bfloat16
PROMPT = [256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
LIMIT = 2**17  # bytes of a bucket: several

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of one shape; heads of 32, the smallest that vLLM has a kernel for on CPUs."""
    root = tmp_path_factory.mktemp("models")
    return [build_tiny_model(root / str(seed), hidden=128, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    dtype = str(DTYPE[request.param]).removeprefix("torch.")
    with started(request.param, models[0], tmp_path_factory.mktemp("engine"), lora=None, dtype=dtype) as engine:
        yield engine


class Trainer:
    """Announces checkpoints as the trainer does, and sends each once it is claimed."""

    def __init__(self, store: WeightsStore, dtype: torch.dtype) -> None:
        self.store, self.dtype = store, dtype
        self.source = Sender(backend="gloo", workers=1, timeout_s=60)
        self.version = 0
        self.errors: list[Exception] = []

    def announce(self, checkpoint: Path, *, sent: Tensors | None = None) -> WeightsReady:
        """`sent`: what is sent instead of the checkpoint whose digest is announced."""
        self.version += 1
        tensors = self.tensors(checkpoint)
        sent = tensors if sent is None else sent
        manifest = Manifest(self.version, "gloo", 2, plan_buckets([spec_of(*pair) for pair in sent.items()], limit_bytes=LIMIT))
        ready = WeightsReady(
            version=self.version,
            kind="full",
            path=str(self.store.path(self.version)),
            digest=tensor_digest(tensors),
            transfer="broadcast",
            rendezvous=self.source.rendezvous,
        )
        self.store.publish(ready, manifest.write)
        threading.Thread(target=self._send, args=(manifest, sent), daemon=True).start()
        return ready

    def tensors(self, checkpoint: Path) -> Tensors:
        return {name: tensor.to(self.dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}

    def _send(self, manifest: Manifest, tensors: Tensors) -> None:
        claim = self.store.claim_path(manifest.version)
        while not claim.exists():
            threading.Event().wait(0.01)
        try:
            self.source.send(manifest, tensors.items())
        except BroadcastError as error:
            self.errors.append(error)


@pytest.fixture(scope="module")
def trainer(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One for all tests, as in a run: the group stays open between versions."""
    return Trainer(WeightsStore(tmp_path_factory.mktemp("weights")), DTYPE[served.kind])


@pytest.fixture
async def client(served: Served) -> AsyncGenerator[InferenceClient]:
    async with connected(served) as opened:
        yield opened


def model_of(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


async def test_an_engine_computes_with_each_version_that_it_received(
    client: InferenceClient, trainer: Trainer, models: list[Path], served: Served
) -> None:
    policy = Policy(client, trainer.store, stop_ids=[])
    for checkpoint in (models[1], models[2], models[0]):
        ready = trainer.announce(checkpoint)
        await policy.swap(ready)
        assert await client.digest(None) == [ready.digest]
        found = await client.prompt_logprobs(PROMPT, version=None)
        assert found == pytest.approx(reference_logprobs(model_of(checkpoint), PROMPT), abs=TOLERANCE[served.kind])
    assert trainer.errors == []


async def test_a_reply_in_the_middle_of_a_swap_goes_on_and_every_token_knows_its_version(
    client: InferenceClient, trainer: Trainer, models: list[Path], served: Served
) -> None:
    policy = Policy(client, trainer.store, stop_ids=[])
    before = trainer.announce(models[1])
    await policy.swap(before)
    generate = policy.generator(temperature=1.0, affinity="a")
    replies = [asyncio.create_task(generate(PROMPT, 400, seed)) for seed in range(4)]
    await asyncio.to_thread(served.wait_until_running)
    after = trainer.announce(models[2])
    await policy.swap(after)
    crossed = [reply for reply in await asyncio.gather(*replies) if len(reply.spans) > 1]  # some may have ended before
    assert crossed
    for reply in crossed:
        assert [version for version, _ in reply.spans] == [before.version, after.version]
        first = reply.spans[0][1]
        ids = [*PROMPT, *reply.token_ids]
        for checkpoint, part in ((models[1], slice(0, first)), (models[2], slice(first, None))):
            wanted = reference_logprobs(model_of(checkpoint), ids)[len(PROMPT) - 1 :][part]
            assert list(reply.logprobs)[part] == pytest.approx(wanted, abs=2 * TOLERANCE[served.kind])


async def test_weights_other_than_those_announced_are_found_out(
    client: InferenceClient, trainer: Trainer, models: list[Path]
) -> None:
    """One element in one tensor."""
    damaged = trainer.tensors(models[1])
    name = "model.layers.1.mlp.down_proj.weight"
    damaged[name] = damaged[name].clone()
    damaged[name][3, 5] += 1
    policy = Policy(client, trainer.store, stop_ids=[])
    with pytest.raises(WrongWeights, match="holds tensors with the digest"):
        await policy.swap(trainer.announce(models[1], sent=damaged))
    assert trainer.store.served() < trainer.version
    await client.resume()


async def test_what_does_not_fit_is_refused_in_words_and_ends_the_group(
    client: InferenceClient, trainer: Trainer, models: list[Path]
) -> None:
    """The last test: neither side uses the group again."""
    wrong = trainer.tensors(models[1])
    wrong["model.norm.weight"] = torch.ones(64, dtype=trainer.dtype)
    policy = Policy(client, trainer.store, stop_ids=[])
    with pytest.raises(EngineError, match=r"receive_weights.*64"):
        await policy.swap(trainer.announce(models[1], sent=wrong))
    assert trainer.store.served() < trainer.version
