"""The routes of the embedded engine: what it refuses, and how it tells."""

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from support.adapters import reference_logprobs, write_adapter
from support.engine_support import FAMILIES, build
from turnwise.config import RLConfig
from turnwise.inference import EngineError, InferenceClient
from turnwise.inference.embedded.build import build_server
from turnwise.inference.embedded.engine import Engine
from turnwise.inference.embedded.generic_decoder import GenericDecoder
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.load import parse_load

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODEL_NAME = "name-of-the-base"


def settings(model: Path, **inference: Any) -> RLConfig:
    embedded = {"threads": 1, **inference}
    return RLConfig.model_validate({"seq_len": 199, "model": {"name": str(model)}, "inference": {"embedded": embedded}})


@dataclass
class Running:
    """A server in this event loop, and a session that speaks to it."""

    session: aiohttp.ClientSession
    engine: Engine

    async def post(self, path: str, body: Any = None, *, data: bytes | None = None) -> tuple[int, Any]:
        """Status, and the decoded answer: JSON where it is JSON, else text."""
        async with self.session.post(path, json=body, data=data) as response:
            return response.status, await _content(response)

    async def get(self, path: str) -> Any:
        async with self.session.get(path) as response:
            return await _content(response)


async def _content(response: aiohttp.ClientResponse) -> Any:
    return await response.json() if response.content_type == "application/json" else await response.text()


@pytest.fixture
async def http(tiny_model: Path) -> AsyncGenerator[Running]:
    server = build_server(settings(tiny_model))
    server.model = MODEL_NAME
    runner = web.AppRunner(server.application(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        yield Running(session, server.engine)
    server.engine.stop()
    await runner.cleanup()


async def complete(http: Running, **body: Any) -> tuple[int, Any]:
    request = {"model": MODEL_NAME, "prompt": [72, 73], "max_tokens": 3, "return_token_ids": True, "logprobs": 0, **body}
    return await http.post("/v1/completions", request)


async def test_a_completion_has_the_form_of_vllm(http: Running) -> None:
    status, answer = await complete(http)
    assert status == 200
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert choice["prompt_token_ids"] == [72, 73]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["finish_reason"] == "length"


async def test_without_a_seed_replies_differ(http: Running) -> None:
    answers = [await complete(http, max_tokens=20) for _ in range(2)]
    assert answers[0][1]["choices"][0]["token_ids"] != answers[1][1]["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "v7"}, 404, "The model `v7` does not exist"),
        ({"prompt": "text"}, 400, "no tokenizer"),
        ({"prompt": []}, 400, "non-empty"),
        ({"prompt": [1, 320]}, 400, "token id 320"),
        ({"prompt": [-1]}, 400, "token id -1"),
        ({"prompt": [[1], [2]]}, 400, "invalid request body"),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"prompt": [5] * 200}, 400, "maximum context length is 200"),
        ({"max_tokens": 201}, 400, "cannot be greater than max_model_len=200"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"temperature": -0.1}, 400, "non-negative"),
        ({"top_p": 0.9}, 400, "top_p"),
        ({"n": 2}, 400, "not supported"),
        ({"stream": True}, 400, "not supported"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused(http: Running, body: dict[str, Any], status: int, words: str) -> None:
    code, answer = await complete(http, **body)
    assert code == answer["error"]["code"] == status
    assert words in answer["error"]["message"]
    assert (await complete(http))[0] == 200


async def test_a_body_that_is_not_json_is_refused(http: Running) -> None:
    assert (await http.post("/v1/completions", data=b"{"))[0] == 400


async def test_metrics_count_tokens_under_the_names_of_vllm(http: Running) -> None:
    prompt = list(range(40, 80))
    await complete(http, prompt=prompt, max_tokens=5, ignore_eos=True)
    lines = (await http.get("/metrics")).splitlines()
    assert f'vllm:generation_tokens_total{{model_name="{MODEL_NAME}"}} 5.0' in lines
    assert f'vllm:num_requests_running{{model_name="{MODEL_NAME}"}} 0.0' in lines
    await complete(http, prompt=prompt, max_tokens=5, ignore_eos=True)
    load = parse_load((await http.get("/metrics")).encode())
    assert (load.generated_tokens, load.waiting) == (10.0, 0.0)
    assert load.prompt_tokens + load.prefix_hits == load.prefix_queries == 2 * len(prompt)
    assert load.prefix_hits >= len(prompt) - 1  # of the second time


async def test_loaded_adapters_are_listed_and_unloading_waits_for_their_requests(
    http: Running, tiny_model: Path, tmp_path: Path
) -> None:
    reference = write_adapter(tiny_model, tmp_path, seed=1)
    load = {"lora_name": "v1", "lora_path": str(tmp_path)}
    assert (await http.post("/v1/load_lora_adapter", load))[0] == 200
    models = await http.get("/v1/models")
    assert [entry["id"] for entry in models["data"]] == [MODEL_NAME, "v1"]
    running = asyncio.create_task(complete(http, model="v1", max_tokens=190, ignore_eos=True, seed=1))
    while http.engine.running == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    unload = asyncio.create_task(http.post("/v1/unload_lora_adapter", {"lora_name": "v1"}))
    while (await complete(http, model="v1", max_tokens=1))[0] != 404:
        pass
    assert (await unload)[0] == 200
    choice = (await running)[1]["choices"][0]
    assert len(choice["token_ids"]) == 190
    expected = reference_logprobs(reference, [72, 73, *choice["token_ids"]])[1:]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert (await http.post("/v1/unload_lora_adapter", {"lora_name": "v1"}))[0] == 404


async def test_a_client_that_goes_away_stops_its_request(http: Running) -> None:
    await http.post("/pause?mode=keep")
    request = asyncio.create_task(complete(http, max_tokens=150))
    while http.engine.waiting == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    request.cancel()
    while http.engine.waiting:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await http.post("/resume")
    assert (await complete(http))[0] == 200


async def test_full_weights_are_replaced_during_a_pause_and_the_digest_shows_it(
    http: Running, tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file

    from support.tiny_model import build_tiny_model
    from turnwise.transport import tensor_digest

    other = build_tiny_model(tmp_path / "other", seed=9)
    _, before = await http.post("/collective_rpc", {"method": "weights_digest"})
    assert before["results"] == [tensor_digest(load_file(tiny_model / "model.safetensors"))]
    assert await http.post("/pause?mode=abort") == (200, {"status": "paused"})
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(other)}}
    assert (await http.post("/collective_rpc", reload))[0] == 200
    await http.post("/reset_prefix_cache")
    await http.post("/resume")
    _, after = await http.post("/collective_rpc", {"method": "weights_digest"})
    assert after["results"] == [tensor_digest(load_file(other / "model.safetensors"))]


async def test_broadcast_weights_are_received_while_nothing_runs(http: Running, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from support.tiny_model import build_tiny_model
    from turnwise.transport import Manifest, Sender, plan_buckets, spec_of, tensor_digest

    other = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "other", seed=9))
    tensors = {name: parameter.detach() for name, parameter in other.named_parameters()}
    manifest = Manifest(1, "gloo", 2, plan_buckets([spec_of(*pair) for pair in tensors.items()], limit_bytes=2**16))
    manifest.write(tmp_path)
    source = Sender(backend="gloo", workers=1, timeout_s=20)
    receive = {"method": "receive_weights", "args": [source.rendezvous, str(tmp_path), 1]}
    asking = asyncio.create_task(complete(http, max_tokens=150))
    while http.engine.running == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    status, answer = await http.post("/collective_rpc", receive)
    assert (status, "requests are running" in answer["error"]["message"]) == (400, True)
    await http.post("/pause?mode=abort")
    await asking
    sending = asyncio.create_task(asyncio.to_thread(source.send, manifest, tensors.items()))
    assert await http.post("/collective_rpc", receive) == (200, {"results": [None]})
    await sending
    await http.post("/resume")
    _, after = await http.post("/collective_rpc", {"method": "weights_digest"})
    assert after["results"] == [tensor_digest(tensors)]
    source.close()


async def test_noise_is_applied_while_nothing_runs_and_goes_away_to_the_bit(http: Running) -> None:
    apply, clear = ({"method": "apply_noise", "args": args} for args in ([0.1, 7], [0.0, 0]))
    _, before = await http.post("/collective_rpc", {"method": "weights_digest"})
    asking = asyncio.create_task(complete(http, max_tokens=150))
    while http.engine.running == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    status, answer = await http.post("/collective_rpc", apply)
    assert (status, "requests are running" in answer["error"]["message"]) == (400, True)
    await http.post("/pause?mode=abort")
    await asking
    status, answer = await http.post("/collective_rpc", apply)
    assert (status, len(answer["results"][0]["norms"])) == (200, 5)
    assert all(norm["sigma"] == pytest.approx(0.1, rel=0.3) for norm in answer["results"][0]["norms"])
    _, noisy = await http.post("/collective_rpc", {"method": "weights_digest"})
    assert noisy != before
    await http.post("/collective_rpc", clear)
    assert (await http.post("/collective_rpc", {"method": "weights_digest"}))[1] == before


async def test_weights_that_hold_nan_end_in_the_words_of_the_client_and_sound_ones_are_served_afterwards(
    http: Running, tmp_path: Path, tiny_model: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    url = str(http.session._base_url).rstrip("/")  # pyright: ignore[reportPrivateUsage]
    async with InferenceClient([url], model=MODEL_NAME, request_timeout_s=20, max_retries=0) as client:

        async def swap(version: int, folder: Path) -> None:
            await client.pause()
            await client.reload_weights(str(folder))
            client.set_served(version)
            await client.resume()

        ask = {"version": None, "max_tokens": 3, "temperature": 1.0, "seed": 1, "stop_token_ids": ()}
        await swap(1, tmp_path)
        with pytest.raises(EngineError, match=f"^{url}: the logits of policy version 1 are not finite: .* token 1 of the reply"):
            await client.generate([72, 73], **ask)
        with pytest.raises(EngineError, match=r"policy version 1 are not finite: .* of the prompt"):
            await client.prompt_logprobs([72, 73], version=None)
        await swap(2, tiny_model)
        assert len((await client.generate([72, 73], **ask)).token_ids) == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"method": "launch"}, "weights_digest, reload_weights, receive_weights"),
        ({"method": "receive_weights", "args": ["127.0.0.1:1", "/no/such/folder", 1]}, "/no/such/folder/manifest.json"),
        ({"method": "weights_digest", "args": ["v9"]}, "cannot be found"),
        ({"method": "reload_weights", "kwargs": {"weights_path": "/no/such/folder"}}, "is not a folder"),
        ({"method": "reload_weights"}, "weights_path"),
    ],
)
async def test_a_method_that_cannot_run_is_refused(http: Running, body: dict[str, Any], words: str) -> None:
    status, answer = await http.post("/collective_rpc", body)
    assert status == 400
    assert words in answer["error"]["message"]


async def test_an_unknown_way_to_pause_is_refused(http: Running) -> None:
    assert (await http.post("/pause?mode=sideways"))[0] == 400


def test_the_path_and_the_mode_follow_model_and_configuration(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config

    gpt2 = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300, n_positions=256, bos_token_id=0, eos_token_id=1)
    build(gpt2).save_pretrained(tmp_path / "gpt2")
    build(FAMILIES["qwen2"]).save_pretrained(tmp_path / "qwen2")
    for folder, kind in ((tmp_path / "gpt2", GenericDecoder), (tmp_path / "qwen2", LeanDecoder), (tiny_model, LeanDecoder)):
        server = build_server(settings(folder, deterministic=True))
        assert type(server.engine.decoder) is kind
        server.engine.stop()
    strict = settings(tiny_model).model_copy(
        update={"orchestrator": settings(tiny_model).orchestrator.model_copy(update={"max_staleness": 0})}
    )
    for config, wanted in ((strict, True), (settings(tiny_model), False)):
        server = build_server(config)
        assert isinstance(server.engine.decoder, LeanDecoder)
        assert server.engine.decoder.deterministic is wanted
        server.engine.stop()
