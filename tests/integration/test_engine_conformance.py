"""What every engine must do, checked against the embedded engine and, in `make test-vllm`, against a real vLLM server.

The servers are started with the commands that `rl` would use; the reference is transformers' own forward pass.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.adapters import reference_logprobs, write_adapter
from support.served_engine import ENGINES, Served, connected, started
from support.tiny_model import EOS, build_tiny_model
from turnwise.inference import Completion, EngineError, InferenceClient
from turnwise.inference.load import LoadWatch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOLERANCE = 1e-3  # nats, float32 against float32 in another summation order
PROMPT = [256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, since vLLM's attention on CPUs has no kernel for the 16 of the smallest test model."""
    return build_tiny_model(tmp_path_factory.mktemp("model"), hidden=128)


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    with started(request.param, model_folder, tmp_path_factory.mktemp("engine"), lora={"rank": 8, "alpha": 16.0}) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(model_folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any]]:
    """Versions 1 and 2: adapter folder, and the peft model of the same weights."""
    root = tmp_path_factory.mktemp("adapters")
    return {n: (root / f"v{n}", write_adapter(model_folder, root / f"v{n}", seed=n)) for n in (1, 2)}


@pytest.fixture
async def client(served: Served) -> AsyncGenerator[InferenceClient]:
    async with connected(served) as opened:
        yield opened


async def sample(client: InferenceClient, prompt: list[int], **changes: Any) -> Completion:
    options: dict[str, Any] = {"version": None, "max_tokens": 16, "temperature": 1.0, "seed": 0, "stop_token_ids": [], **changes}
    return await client.generate(prompt, **options)


def gap(model: Any, prompt: list[int], reply: Completion, *, temperature: float = 1.0) -> float:
    """Largest distance in nats between the engine's logprobs and the reference's."""
    expected = reference_logprobs(model, [*prompt, *reply.token_ids], temperature=temperature)[len(prompt) - 1 :]
    return max(abs(a - b) for a, b in zip(expected, reply.logprobs, strict=True))


async def test_prompt_ids_arrive_as_they_were_sent(served: Served) -> None:
    body = {"model": str(served.model), "prompt": PROMPT, "max_tokens": 4, "return_token_ids": True, "logprobs": 0}
    async with aiohttp.ClientSession() as session, session.post(f"{served.url}/v1/completions", json=body) as response:
        choice = (await response.json())["choices"][0]
    assert choice["prompt_token_ids"] == PROMPT
    assert len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) <= 4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    client: InferenceClient, base: Any, temperature: float
) -> None:
    reply = await sample(client, PROMPT, temperature=temperature, max_tokens=32)
    assert gap(base, PROMPT, reply, temperature=temperature) < TOLERANCE


async def test_temperature_zero_takes_the_most_likely_token_each_time(client: InferenceClient, base: Any) -> None:
    import torch

    first = await sample(client, PROMPT, temperature=0.0, seed=1)
    second = await sample(client, PROMPT, temperature=0.0, seed=2)
    assert first.token_ids == second.token_ids
    with torch.no_grad():
        logits = base(torch.tensor([[*PROMPT, *first.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(first.token_ids)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < TOLERANCE
    assert gap(base, PROMPT, first) < TOLERANCE


async def test_a_seed_repeats_its_reply_and_another_seed_does_not(client: InferenceClient) -> None:
    replies = [await sample(client, PROMPT, seed=seed, max_tokens=24) for seed in (7, 7, 8)]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].token_ids != replies[2].token_ids


async def test_a_stop_id_ends_the_reply_and_is_part_of_it(client: InferenceClient, base: Any) -> None:
    free = await sample(client, PROMPT, seed=3)
    stop = free.token_ids[5]
    cut = await sample(client, PROMPT, seed=3, stop_token_ids=[stop])
    end = free.token_ids.index(stop)
    assert cut.token_ids == free.token_ids[: end + 1]
    assert cut.finish_reason == "stop"
    assert gap(base, PROMPT, cut) < TOLERANCE


async def test_max_tokens_cuts_the_reply(client: InferenceClient) -> None:
    reply = await sample(client, PROMPT, max_tokens=3)
    assert len(reply.token_ids) == 3
    assert reply.finish_reason == "length"


async def test_the_end_token_of_the_model_ends_a_reply(client: InferenceClient) -> None:
    """320 tokens of almost equal probability: 64 replies of 64 tokens meet the end token about 13 times."""
    replies = await asyncio.gather(*(sample(client, PROMPT, seed=seed, max_tokens=64) for seed in range(64)))
    stopped = [reply for reply in replies if reply.finish_reason == "stop"]
    assert stopped
    assert all(reply.token_ids[-1] == EOS for reply in stopped)
    assert all(EOS not in reply.token_ids[:-1] for reply in replies)


async def test_an_adapter_loaded_at_run_time_gives_the_logprobs_of_peft(
    client: InferenceClient, base: Any, adapters: dict[int, tuple[Path, Any]]
) -> None:
    folder, reference = adapters[1]
    await client.load_adapter(1, str(folder))
    reply = await sample(client, PROMPT, version=1, max_tokens=32)
    await client.unload_adapter(1)
    assert reply.spans == ((1, len(reply.token_ids)),)
    assert gap(reference, PROMPT, reply) < TOLERANCE
    assert gap(base, PROMPT, reply) > 10 * TOLERANCE


async def test_versions_answer_side_by_side(
    served: Served, client: InferenceClient, base: Any, adapters: dict[int, tuple[Path, Any]]
) -> None:
    """vLLM 0.32 on a CPU gives requests of the base model the adapter in its last slot when they share a batch with requests
    of adapters (its index -1 for "none" counts from the end), so there the base model is left out. Runs never mix the two."""
    for version, (folder, _) in adapters.items():
        await client.load_adapter(version, str(folder))
    models = {version: model for version, (_, model) in adapters.items()} | ({} if served.kind == "vllm" else {None: base})
    wanted = [version for version in models for _ in range(4)]
    replies = await asyncio.gather(*(sample(client, PROMPT, version=v, seed=i) for i, v in enumerate(wanted)))
    for version in adapters:
        await client.unload_adapter(version)
    assert max(gap(models[v], PROMPT, reply) for v, reply in zip(wanted, replies, strict=True)) < TOLERANCE


async def test_an_unloaded_version_is_refused(client: InferenceClient, adapters: dict[int, tuple[Path, Any]]) -> None:
    await client.load_adapter(1, str(adapters[1][0]))
    await client.unload_adapter(1)
    with pytest.raises(EngineError, match="v1"):
        await sample(client, PROMPT, version=1)


async def test_an_unknown_version_is_refused_in_the_words_of_the_engine(client: InferenceClient) -> None:
    with pytest.raises(EngineError, match=r"404.*v99.*does not exist"):
        await sample(client, PROMPT, version=99)


async def test_a_folder_without_an_adapter_is_refused_and_nothing_changes(
    client: InferenceClient, tmp_path: Path, base: Any
) -> None:
    with pytest.raises(EngineError):
        await client.load_adapter(5, str(tmp_path))
    with pytest.raises(EngineError, match="v5"):
        await sample(client, PROMPT, version=5)
    assert gap(base, PROMPT, await sample(client, PROMPT)) < TOLERANCE


async def test_the_same_name_twice_is_refused(client: InferenceClient, adapters: dict[int, tuple[Path, Any]]) -> None:
    await client.load_adapter(1, str(adapters[1][0]))
    with pytest.raises(EngineError, match="already been loaded"):
        await client.load_adapter(1, str(adapters[2][0]))
    await client.unload_adapter(1)


async def test_a_pause_in_the_middle_loses_no_token(served: Served, client: InferenceClient, base: Any) -> None:
    requests = [asyncio.create_task(sample(client, PROMPT, seed=seed, max_tokens=400, temperature=0.9)) for seed in range(24)]
    await asyncio.to_thread(served.wait_until_running)
    client.set_served(4)
    await client.pause()
    client.set_served(5)
    await asyncio.sleep(0.3)
    assert not all(request.done() for request in requests)
    await client.resume()
    replies = await asyncio.gather(*requests)
    assert any(len(reply.spans) == 2 for reply in replies)
    assert all(sum(count for _, count in reply.spans) == len(reply.token_ids) for reply in replies)
    assert max(gap(base, PROMPT, reply, temperature=0.9) for reply in replies[:4]) < TOLERANCE


async def test_requests_sent_during_a_pause_are_answered_after_it(served: Served, client: InferenceClient) -> None:
    await client.pause()
    async with InferenceClient([served.url], model=str(served.model), request_timeout_s=60.0, max_retries=0) as other:
        request = asyncio.create_task(sample(other, PROMPT))
        await asyncio.sleep(0.5)
        assert not request.done()
        await client.resume()
        assert len((await request).token_ids) > 0


async def test_prompt_logprobs_are_those_of_a_forward_pass(
    client: InferenceClient, base: Any, adapters: dict[int, tuple[Path, Any]]
) -> None:
    ids = [*PROMPT, *range(60, 100)]
    await client.load_adapter(2, str(adapters[2][0]))
    values = {version: await client.prompt_logprobs(ids, version=version) for version in (None, 2)}
    await client.unload_adapter(2)
    for version, model in ((None, base), (2, adapters[2][1])):
        expected = reference_logprobs(model, ids)
        assert len(values[version]) == len(ids) - 1
        assert max(abs(a - b) for a, b in zip(expected, values[version], strict=True)) < TOLERANCE


async def test_many_prompts_of_different_lengths_at_once_each_get_their_own_reply(client: InferenceClient, base: Any) -> None:
    prompts = [[(7 * i + 3 * j) % 250 for j in range(1 + 5 * i % 90)] for i in range(40)]
    replies = await asyncio.gather(*(sample(client, prompt, seed=i) for i, prompt in enumerate(prompts)))
    assert max(gap(base, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)) < TOLERANCE


async def test_the_next_turn_agrees_with_a_fresh_forward_pass(client: InferenceClient, base: Any) -> None:
    prompt = [*PROMPT, *range(40)]
    for turn in range(4):
        reply = await sample(client, prompt, seed=turn)
        assert gap(base, prompt, reply) < TOLERANCE
        prompt = [*prompt, *reply.token_ids, 10 + turn, 20 + turn]


async def test_a_reply_ends_where_the_context_does(client: InferenceClient, base: Any) -> None:
    reply = await sample(client, PROMPT, max_tokens=510, temperature=0.0)
    assert len(PROMPT) + len(reply.token_ids) <= 512
    assert gap(base, PROMPT, reply) < TOLERANCE


async def test_what_can_never_fit_the_context_is_refused(client: InferenceClient) -> None:
    with pytest.raises(EngineError, match="maximum context length"):
        await sample(client, [5] * 513)
    with pytest.raises(EngineError, match="max_tokens=513"):
        await sample(client, PROMPT, max_tokens=513)


async def test_the_load_is_told_whatever_the_engine(served: Served, client: InferenceClient) -> None:
    await sample(client, PROMPT)
    watch, told = LoadWatch(client.replicas.all), asyncio.Event()
    watching = asyncio.create_task(watch.watch(told.set))
    async with asyncio.timeout(30):
        await told.wait()
    watching.cancel()
    (load,) = watch.loads
    assert load is not None
    assert (load.running, load.waiting, load.preemptions) == (0, 0, 0)
    assert load.generated_tokens > 0
    assert load.prefix_queries >= len(PROMPT)


async def test_vllm_answers_our_requests_on_the_short_way_as_on_its_own(served: Served) -> None:
    if served.kind != "vllm":
        pytest.skip("the embedded engine has one way")
    body = {"model": str(served.model), "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0, "logprobs": 0}
    ours = {**body, "return_token_ids": True, "add_special_tokens": False}
    async with aiohttp.ClientSession() as session:
        answers: list[Any] = []
        for request in (ours, {**ours, "n": 1}):  # what we never send goes vLLM's own way
            async with session.post(f"{served.url}/v1/completions", json=request) as response:
                answers.append(await response.json())
    assert [answer["id"].startswith("cmpl-turnwise-") for answer in answers] == [True, False]
    short, long = (answer["choices"][0] for answer in answers)
    assert short["token_ids"] == long["token_ids"]
    assert short["logprobs"]["token_logprobs"] == pytest.approx(long["logprobs"]["token_logprobs"], abs=1e-5)
    assert short["finish_reason"] == long["finish_reason"]
    assert answers[0]["usage"]["total_tokens"] == answers[1]["usage"]["total_tokens"]
