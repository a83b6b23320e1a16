"""The batcher: pauses, cancellation, adapters in use, and steps that fail."""

import math
from collections.abc import Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from support.adapters import reference_logprobs, write_adapter
from support.engine_support import FAMILIES, build, random_prompts, save
from turnwise.inference.embedded.engine import Engine, Mode
from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.embedded.loading import load_model
from turnwise.inference.embedded.sequence import Sequence

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MODEL = build(FAMILIES["llama"])


@pytest.fixture
def engine() -> Generator[Engine]:
    running = Engine(LeanDecoder(LeanModel(MODEL, 512), cache_bytes=2**24, deterministic=False), max_batch_size=4)
    running.start()
    yield running
    running.stop()


class Request:
    """A submitted sequence and its answer."""

    def __init__(self, engine: Engine, prompt: list[int], **options: Any) -> None:
        self.answer: Future[Sequence] = Future()
        settings: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 0, "adapter": None, **options}
        self.sequence = Sequence(prompt=prompt, stop_ids=frozenset(), on_done=self.answer.set_result, **settings)
        engine.submit(self.sequence)

    def result(self) -> Sequence:
        return self.answer.result(60)


def expected(item: Sequence) -> list[float]:
    return reference_logprobs(MODEL, item.tokens)[len(item.prompt) - 1 :]


def test_more_requests_than_rows_are_all_answered(engine: Engine) -> None:
    requests = [Request(engine, prompt, seed=i) for i, prompt in enumerate(random_prompts(13))]
    for request in requests:
        item = request.result()
        assert item.finish_reason == "length"
        assert item.logprobs == pytest.approx(expected(item), abs=2e-5)
    assert engine.generated == 13 * 8
    assert engine.running == engine.waiting == 0


def test_an_aborting_pause_answers_in_part_and_holds_what_comes_later(engine: Engine) -> None:
    requests = [Request(engine, [5, 6, 7], seed=i, max_tokens=450) for i in range(6)]
    engine.pause("abort").result(60)
    later = Request(engine, [5, 6, 7])
    items = [request.result() for request in requests]
    assert all(item.finish_reason == "abort" for item in items)
    assert all(len(item.sampled) == len(item.logprobs) < 450 for item in items)
    assert engine.mode is Mode.FROZEN
    assert not later.answer.done()
    engine.resume().result(60)
    assert later.result().finish_reason == "length"


def test_a_keeping_pause_freezes_requests_and_they_go_on(engine: Engine) -> None:
    request = Request(engine, [5, 6, 7], max_tokens=300)
    engine.pause("keep").result(60)
    count = len(request.sequence.logprobs)
    engine.call(lambda: None).result(60)
    assert len(request.sequence.logprobs) == count < 300
    engine.resume().result(60)
    item = request.result()
    assert len(item.sampled) == 300
    assert item.logprobs == pytest.approx(expected(item), abs=3e-5)


def test_a_waiting_pause_ends_what_runs_first(engine: Engine) -> None:
    request = Request(engine, [5, 6, 7], max_tokens=100)
    engine.call(lambda: None).result(60)
    engine.pause("wait").result(60)
    later = Request(engine, [5, 6, 7])
    engine.call(lambda: None).result(60)
    assert not later.answer.done()
    engine.resume().result(60)
    assert later.result().finish_reason == "length"
    assert request.result().finish_reason == "length"


def test_a_cancelled_request_frees_its_row(engine: Engine) -> None:
    requests = [Request(engine, [5, 6, 7], max_tokens=500) for _ in range(5)]
    for request in requests:
        engine.cancel(request.sequence)
    assert all(request.result().finish_reason == "abort" for request in requests)
    assert engine.running == engine.waiting == 0


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "step", broken)
        item = Request(engine, [5, 6, 7]).result()
    assert item.finish_reason == "error"
    assert item.error == "MemoryError: planted"
    after = Request(engine, [5, 6, 7]).result()
    assert after.logprobs == pytest.approx(expected(after), abs=2e-5)


def test_an_adapter_counts_as_used_until_its_last_request_is_answered(tmp_path: Path) -> None:
    folder = save(MODEL, tmp_path / "model")
    write_adapter(folder, tmp_path / "adapter", seed=1)
    decoder = LeanDecoder(LeanModel(load_model(folder, torch.float32), 512), cache_bytes=0, deterministic=False)
    engine = Engine(decoder, max_batch_size=2)
    engine.start()
    engine.call(lambda: decoder.load_adapter("v1", tmp_path / "adapter")).result(60)
    assert engine.when_unused("v1").done()
    engine.pause("keep").result(60)
    requests = [Request(engine, [5, 6], adapter="v1", seed=i, max_tokens=30) for i in range(5)]
    unused = engine.when_unused("v1")
    assert not unused.done()
    engine.resume().result(60)
    unused.result(60)
    assert all(request.answer.done() for request in requests[:-1])
    assert [request.result().finish_reason for request in requests] == ["length"] * 5
    engine.stop()


def test_an_exception_in_a_call_reaches_its_caller(engine: Engine) -> None:
    def broken() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        engine.call(broken).result(60)
    assert Request(engine, [5]).result().finish_reason == "length"


def test_a_request_that_cannot_be_admitted_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    admit = engine.decoder.admit

    def picky(item: Sequence) -> int:
        if len(item.prompt) > 3:
            raise MemoryError("planted")
        return admit(item)

    monkeypatch.setattr(engine.decoder, "admit", picky)
    long, short = Request(engine, [5, 6, 7, 8]), Request(engine, [5, 6, 7])
    assert long.result().error == "MemoryError: planted"
    assert short.result().finish_reason == "length"
    assert engine.alive


def test_a_sequence_whose_logits_are_not_finite_ends_there_and_harms_no_other() -> None:
    """Token 13 has NaN for an embedding. The row of the sequence that met it is given to another one, beside a longer one."""
    model = build(FAMILIES["qwen2"])
    model.model.embed_tokens.weight[13] = float("nan")
    decoder = LeanDecoder(LeanModel(model, 512), cache_bytes=0, deterministic=False)
    engine = Engine(decoder, max_batch_size=2)
    engine.start()
    engine.pause("keep").result(60)
    long, broken = Request(engine, list(range(20, 100)), max_tokens=60), Request(engine, [13, *range(20, 90)], max_tokens=60)
    after = Request(engine, [5, 6, 7], max_tokens=20)
    engine.resume().result(60)
    items = [request.result() for request in (long, broken, after)]
    engine.stop()
    assert [(item.finish_reason, item.error, len(item.logprobs)) for item in items] == [
        ("length", "", 60),
        ("error", "", 1),
        ("length", "", 20),
    ]
    assert math.isnan(items[1].logprobs[0])
    for item in (items[0], items[2]):
        assert 13 not in item.tokens
        assert item.logprobs == pytest.approx(reference_logprobs(model, item.tokens)[len(item.prompt) - 1 :], abs=3e-5)
