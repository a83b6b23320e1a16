"""What an engine shows of the trainer's update, and what a swap that goes wrong is told as."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.canaries import Fault, MovingPolicy
from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.served import Answers, Swapped, judge_swap, seen
from turnwise.transport import Canary, WeightsReady

FAULTS: list[Fault] = ["none", "version before", "half of the adapter"]


def swap(
    *,
    change: float = 0.1,
    noise: float = 0.001,
    faults: tuple[Fault, ...] = ("none",),
    canaries: int = 4,
    tokens: int = 96,
    seed: int = 0,
    factor: float = 1.0,
    spans: tuple[tuple[int, int], ...] = ((1, 4),),
) -> Swapped:
    """Version 1 of a policy, as engines with these faults show it; numbers as the probe's."""
    policy = MovingPolicy(change=change, noise=noise, tokens=tokens, count=canaries, seed=seed)
    sent = policy.canaries(1)
    ready = WeightsReady(version=1, kind="lora", path="/w/v1", digest="abcdef123456789", canaries=sent)
    answers = [_answers(policy, sent, fault, index) for index, fault in enumerate(faults)]
    return Swapped(ready, factor, answers, spans, 0.25)


def _answers(policy: MovingPolicy, canaries: list[Canary], fault: Fault, index: int) -> Answers:
    def ask(answer: Callable[[dict[str, Any]], list[float]]) -> list[list[float]]:
        return [answer({"prompt": canary.token_ids, "model": "v1"}) for canary in canaries]

    return Answers(f"http://127.0.0.1:{8000 + index}", ask(policy.engine("version before")), ask(policy.engine(fault)))


def shares(finding: Finding) -> list[float]:
    return [engine["share"] for engine in finding.data["engines"]]


def test_a_right_engine_is_proven_by_its_logprobs():
    found = judge_swap(swap())
    assert found.verdict is Verdict.PASS
    assert shares(found) == [pytest.approx(1, abs=0.02)]
    assert found.evidence.startswith(
        "the engine holds the tensors that were published (digest abcdef123456, 0.25 s) and shows 1.00"
    )
    assert "0.002 nats a token off the new policy, 0.13 before the swap" in found.evidence
    assert found.data["engines"][0]["off_before"] > 10 * found.data["engines"][0]["off_after"]


@pytest.mark.parametrize(
    ("fault", "share", "words"),
    [("version before", 0.0, "it computes with the version before"), ("half of the adapter", 0.5, "a part of it is missing")],
)
def test_an_engine_with_another_policy_behind_a_right_digest_fails(fault: Fault, share: float, words: str):
    found = judge_swap(swap(faults=(fault,)))
    assert found.verdict is Verdict.FAIL
    assert shares(found) == [pytest.approx(share, abs=0.02)]
    assert "does not compute with them" in found.evidence
    assert words in found.remedy


def test_one_wrong_engine_among_right_ones_is_named():
    found = judge_swap(swap(faults=("none", "none", "version before", "none")))
    assert found.verdict is Verdict.FAIL
    assert "engine 2 (http://127.0.0.1:8002)" in found.evidence


def test_several_right_engines_are_counted():
    assert judge_swap(swap(faults=("none",) * 4)).evidence.startswith("each of 4 engines holds")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_change_below_the_noise_is_left_to_the_digest(fault: Fault):
    """No verdict on the engine follows from logprobs then, and that is said."""
    found = judge_swap(swap(change=1e-4, noise=0.05, faults=(fault,)))
    assert found.verdict is Verdict.PASS
    assert "by that alone, since the trainer's logprobs before and after the update differ by 0.098 nats" in found.evidence
    assert "engine and trainer by 0.095 anyhow" in found.evidence


def test_an_update_that_was_made_longer_is_told_as_such():
    assert "update, made 1,000 times as long to show (1 is right" in judge_swap(swap(factor=1000.0)).evidence


def test_without_canaries_the_digest_is_all_there_is():
    found = judge_swap(swap(canaries=0))
    assert found.verdict is Verdict.PASS
    assert "by that alone, since the trainer sent no canaries" in found.evidence


def test_logprobs_that_did_not_change_at_all_prove_nothing():
    found = judge_swap(swap(change=0.0, noise=0.0))
    assert found.verdict is Verdict.PASS
    assert "differ by 0 nats" in found.evidence


@pytest.mark.parametrize(
    ("spans", "words"), [(((0, 4),), "version 0"), (((0, 1), (1, 3)), "version 0 and version 1"), ((), "no version at all")]
)
def test_a_reply_of_another_version_fails(spans: tuple[tuple[int, int], ...], words: str):
    found = judge_swap(swap(spans=spans))
    assert found.verdict is Verdict.FAIL
    assert found.evidence == f"a reply that was asked of version 1 carries {words}"


@pytest.mark.parametrize(("canaries", "tokens"), [(4, 96), (2, 24)])
@pytest.mark.parametrize("noise", [1e-5, 0.01, 0.05])
def test_a_right_engine_never_fails_however_small_its_change_is(canaries: int, tokens: int, noise: float):
    verdicts = [
        judge_swap(swap(change=change, noise=noise, canaries=canaries, tokens=tokens, seed=seed)).verdict
        for change in (1e-4, 0.01, 0.05, 0.2)
        for seed in range(50)
    ]
    assert verdicts.count(Verdict.FAIL) == 0
    assert verdicts.count(Verdict.WARN) <= 2


@pytest.mark.parametrize("fault", ["version before", "half of the adapter"])
def test_a_wrong_engine_is_found_wherever_its_noise_is_far_below_the_change(fault: Fault):
    """With the little that short rollouts leave: two canaries of 24 tokens."""
    verdicts = [judge_swap(swap(noise=0.002, canaries=2, tokens=24, faults=(fault,), seed=seed)).verdict for seed in range(50)]
    assert verdicts == [Verdict.FAIL] * 50


@given(st.integers(0, 10_000), st.floats(0.001, 1.0), st.floats(1e-6, 0.1))
@settings(max_examples=60, deadline=None)
def test_nearer_to_the_new_policy_means_a_larger_share(seed: int, change: float, noise: float):
    right, half, old = (
        seen(made.ready.canaries, made.answers[0]).shown
        for made in (
            swap(change=change, noise=noise, faults=(fault,), seed=seed)
            for fault in ("none", "half of the adapter", "version before")
        )
    )
    assert right is not None
    assert half is not None
    assert old is not None
    if change > 3 * noise:
        assert old.share < half.share < right.share


def test_distances_are_root_mean_squares_in_nats():
    canary = Canary(token_ids=[1, 2, 3], logprobs=[-1.0, -2.0], before=[-1.3, -2.4])
    answers = Answers("http://127.0.0.1:1", before=[[-1.3, -2.1]], after=[[-1.0, -1.0]])
    found = seen([canary], answers)
    assert found.noise == pytest.approx(np.sqrt(0.09 / 2))
    assert found.change == pytest.approx(np.sqrt((0.09 + 0.16) / 2))
    assert found.off_before == pytest.approx(np.sqrt((0.09 + 0.01) / 2))
    assert found.off_after == pytest.approx(np.sqrt(0.5))
