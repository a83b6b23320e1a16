"""Samples are validated when made and when read; batches come back as they were written."""

import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.transport import NOT_SAMPLED, Batch, BatchLog, Canary, Control, Progress, Sample, StopRequest


def sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "token_ids": [5, 6, 7],
        "loss_mask": [False, True, True],
        "logprobs": [0.0, -0.5, -1.5],
        "advantages": [0.0, 1.0, 1.0],
        "policy_versions": [NOT_SAMPLED, 3, 2],
        "rollout_tokens": 2,
        "rollout_id": "g1/r0",
        "group_id": 1,
        "task_id": "wordle/frost",
    }
    return Sample(**(fields | changes))


@pytest.mark.parametrize("name", ["loss_mask", "logprobs", "advantages", "policy_versions"])
def test_lists_of_another_length_are_refused_with_the_rollout_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"rollout g1/r0: per-token lists of lengths .* for 3 tokens"):
        sample(**{name: getattr(sample(), name)[:2]})


@pytest.mark.parametrize("versions", [[0, 3, 2], [NOT_SAMPLED, 3, NOT_SAMPLED]])
def test_mask_and_versions_must_agree(versions: list[int]) -> None:
    with pytest.raises(ValueError, match="in the loss mask without a policy version, or the reverse"):
        sample(policy_versions=versions)


def test_the_oldest_version_is_that_of_the_sampled_tokens() -> None:
    assert sample().oldest_version == 2
    nothing = sample(loss_mask=[False] * 3, policy_versions=[NOT_SAMPLED] * 3)
    assert nothing.oldest_version == NOT_SAMPLED


def test_an_invalid_sample_on_disk_is_refused_when_read(tmp_path: Path) -> None:
    log = BatchLog(tmp_path)
    log.write(Batch(1, [sample()], ["g1/r0"], 1, 1.0, Progress()))
    content = msgspec.msgpack.decode(log.path(1).read_bytes())
    content["samples"][0]["logprobs"].pop()
    log.path(1).write_bytes(msgspec.msgpack.encode(content))
    with pytest.raises(ValueError, match=r"step_1\.msgpack is not a batch.*lists of lengths"):
        log.read(1)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xc1" + data])
def test_a_damaged_batch_is_named(tmp_path: Path, damage: Any) -> None:
    log = BatchLog(tmp_path)
    log.write(Batch(4, [sample()], ["g1/r0"], 1, 1.0, Progress()))
    log.path(4).write_bytes(damage(log.path(4).read_bytes()))
    with pytest.raises(ValueError, match=r"step_4\.msgpack is not a batch"):
        log.read(4)


def test_a_batch_is_written_once(tmp_path: Path) -> None:
    log = BatchLog(tmp_path)
    first = Batch(1, [], ["a"], 1, 1.0, Progress())
    log.write(first)
    with pytest.raises(FileExistsError, match="written once"):
        log.write(Batch(1, [], ["b"], 1, 1.0, Progress()))
    assert log.read(1) == first


def test_steps_are_in_the_order_of_their_numbers_and_strangers_are_ignored(tmp_path: Path) -> None:
    log = BatchLog(tmp_path / "batches")
    assert log.steps() == []
    for step in (10, 9, 2):
        log.write(Batch(step, [], [], 0, 1.0, Progress()))
    (tmp_path / "batches" / "step_3 (copy).msgpack").touch()
    assert log.steps() == [2, 9, 10]
    with pytest.raises(FileNotFoundError):
        log.read(3)


floats = st.floats(allow_nan=False)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    mask = draw(st.lists(st.booleans(), max_size=12))
    size = len(mask)
    versions = [draw(st.integers(0, 10**6)) if chosen else NOT_SAMPLED for chosen in mask]
    lists = [draw(st.lists(floats, min_size=size, max_size=size)) for _ in range(2)]
    ids = draw(st.lists(st.integers(0, 2**31), min_size=size, max_size=size))
    return Sample(ids, mask, *lists, versions, sum(mask), draw(st.text()), draw(st.integers(0, 2**40)), draw(st.text()))


@pytest.mark.parametrize(("now", "before", "base"), [([-1.0], [-1.0, -2.0], []), ([-1.0, -2.0], [-1.0, -2.0], [-1.0])])
def test_a_canary_has_one_logprob_for_each_token_but_the_first(now: list[float], before: list[float], base: list[float]) -> None:
    assert Canary([5, 6, 7], [-1.0, -2.0], [-1.0, -2.5]).base == []
    with pytest.raises(ValueError, match="a canary of 3 tokens has logprobs of lengths"):
        Canary([5, 6, 7], now, before, base)


@settings(deadline=None)
@given(
    st.lists(samples(), max_size=4), st.dictionaries(st.text(), floats), st.lists(st.integers(0, 2**40)), st.integers(0, 10**9)
)
def test_a_batch_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, made: list[Sample], metrics: dict[str, float], pending: list[int], next_group: int
) -> None:
    progress = Progress(next_group, pending, {"counts": {"wordle": [1, 2.5, None, "x"]}})
    batch = Batch(7, made, [s.rollout_id for s in made], len(made), 0.7, progress, metrics, 32)
    log = BatchLog(tmp_path_factory.mktemp("batches"))
    log.write(batch)
    assert log.read(7) == batch


@given(st.floats(allow_nan=True))
def test_logprobs_survive_to_the_bit(value: float) -> None:
    made = sample(logprobs=[0.0, value, -1.0])
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Sample)
    assert struct.pack("<d", back.logprobs[1]) == struct.pack("<d", value)


def test_a_stop_request_is_seen_until_it_is_cleared(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.stop_request() is None
    control.clear()
    control.request_stop("interrupted", "Ctrl-C")
    assert Control(tmp_path).stop_request() == StopRequest("interrupted", "Ctrl-C")
    control.clear()
    assert control.stop_request() is None
