"""Verdicts of the trainer's checks: a table of reports, each like a sound one but for what it is about."""

import math
from typing import Any

import msgspec
import pytest

from support.probed import SETTING, judged
from turnwise.diagnose.core import Verdict
from turnwise.diagnose.probe_report import (
    Agreement,
    Counted,
    Difference,
    Differences,
    Gradient,
    Logprobs,
    Merged,
    ProbeReport,
    Rewarded,
    Scaled,
    Scanned,
    Update,
)

TEMPERATURES = [Scanned(value, 0.5 * abs(value - 0.7) + 1e-6, 0.5 * abs(value - 0.7)) for value in (0.49, 0.7, 1.0, 1.4)]
SHIFTS = [Scanned(-1.0, 0.9, 0.9), Scanned(0.0, 1e-6, 0.0), Scanned(1.0, 0.8, 0.8)]
A, B = "model.layers.0.self_attn.q_proj.lora_A", "model.layers.0.self_attn.q_proj.lora_B"

SOUND = ProbeReport(
    setting=msgspec.structs.replace(SETTING, samples=16, given_samples=32, tokens=800, loss="dapo"),
    logprobs=Logprobs(Agreement(1e-5, 1e-4, 0.0, 1e-10, 1.0), TEMPERATURES, SHIFTS, 1.0),
    gradient=Gradient(
        expected=2,
        frozen=[],
        unexpected=[],
        unheld=[],
        norms={A: 0.0, B: 0.3},
        awake={A: 0.01, B: 0.3},
        norm=0.3,
        max_norm=1.0,
        seconds=1.0,
    ),
    differences=Differences([Difference("LoRA A", 0.1, 0.1 + 1e-9, 1e-8), Difference("LoRA B", 0.2, 0.2, 1e-9)], "Llama, small"),
    update=Update(
        lr=1e-4,
        first_lr=1e-4,
        after_warmup=1,
        steps=100,
        full_steps=80.0,
        applied=True,
        norm=0.01,
        finite=True,
        ratios={A: 0.0},
        still=[],
        weights=1000,
        changed=1000,
        published=[Counted(1, 1000), Counted(10, 1000)],
        step_share=1.0,
        merged=Merged(1e-3, 20, 100),
    ),
    rewarded=Rewarded(
        predicted=0.01,
        observed=0.009,
        noise=1e-6,
        scale=0.8,
        positive=0.02,
        negative=-0.01,
        positives=300,
        negatives=500,
        change=0.02,
        kl=1e-3,
    ),
)
PARTS = {"logprobs": "logprobs", "gradient": "gradient", "finite-differences": "differences"}
NAMES = ("logprobs", "gradient", "finite-differences", "update", "rewarded")


def report(part: str, **changes: Any) -> ProbeReport:
    """The sound one with some fields of a part changed."""
    return msgspec.structs.replace(SOUND, **{part: msgspec.structs.replace(getattr(SOUND, part), **changes)})


def gap(mean: float) -> Agreement:
    return Agreement(mean, 3 * mean, 0.0, mean**2, 0.9)


def at(engine: float, trainer: float, size: float = 0.3) -> list[Scanned]:
    """As if the engine's logprobs were those of one temperature and the trainer's those of another."""
    return [Scanned(value, size * abs(value - engine), size * abs(value - trainer)) for value in (0.49, 0.7, 1.0, 1.4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_report_passes_and_has_numbers(name: str) -> None:
    finding = judged(SOUND, name)
    assert (finding.verdict, finding.remedy) == (Verdict.PASS, "")
    assert any(character.isdigit() for character in finding.evidence)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_reached_fails_with_what_ended_the_processes(name: str) -> None:
    part = PARTS.get(name, name)
    died = msgspec.structs.replace(
        SOUND, stage="rewarded", failure="they were killed\nWhat helps: more memory", log="x.log", tail=["last"], **{part: None}
    )
    finding = judged(died, name)
    assert finding.verdict is Verdict.FAIL
    assert "they were killed (while rewarded was measured)" in finding.evidence
    assert (finding.remedy, finding.lines) == ("more memory", ("last",))


LOGPROBS: dict[str, tuple[dict[str, Any], str, Verdict, str]] = {
    "rounding": ({"agreement": gap(5e-4)}, "float32", Verdict.PASS, "explains up to 0.001"),
    "bfloat16 of a small model": ({"agreement": gap(0.048)}, "bfloat16", Verdict.PASS, "explains up to 0.1"),
    "the same in float32": ({"agreement": gap(0.048)}, "float32", Verdict.FAIL, "by 0.048 nats on average"),
    "more than usual": ({"agreement": gap(0.15)}, "bfloat16", Verdict.WARN, "by 0.15 nats on average"),
    "another model": ({"agreement": gap(0.85)}, "bfloat16", Verdict.FAIL, "by 0.85 nats on average"),
    "not a number": ({"agreement": gap(math.nan)}, "bfloat16", Verdict.FAIL, "by nan nats on average"),
    "trainer ignores": (
        {"agreement": gap(0.12), "temperatures": at(0.7, 1.0)},
        "bfloat16",
        Verdict.FAIL,
        "the trainer's are those of temperature 1, the engine's those of the configured 0.7",
    ),
    "engine ignores": (
        {"agreement": gap(0.12), "temperatures": at(1.0, 0.7)},
        "bfloat16",
        Verdict.FAIL,
        "the engine's are those of temperature 1, the trainer's those of the configured 0.7",
    ),
    "engine twice": (
        {"agreement": gap(0.2), "temperatures": at(0.49, 0.7)},
        "float32",
        Verdict.FAIL,
        "those of temperature 0.49",
    ),
    "both elsewhere": (
        {"agreement": gap(0.2), "temperatures": at(0.49, 1.4)},
        "float32",
        Verdict.FAIL,
        "temperatures 0.49 (engine) and 1.4 (trainer), and 0.7 is configured",
    ),
    "shifted": (
        {"agreement": gap(0.8), "shifts": [Scanned(-1.0, 0.9, 0.9), Scanned(0.0, 0.8, 0.0), Scanned(1.0, 1e-5, 0.8)]},
        "float32",
        Verdict.FAIL,
        "those of the next token",
    ),
}


@pytest.mark.parametrize(("changes", "dtype", "verdict", "evidence"), LOGPROBS.values(), ids=LOGPROBS)
def test_logprobs(changes: dict[str, Any], dtype: str, verdict: Verdict, evidence: str) -> None:
    found = report("logprobs", **changes)
    finding = judged(msgspec.structs.replace(found, setting=msgspec.structs.replace(SOUND.setting, dtype=dtype)), "logprobs")
    assert finding.verdict is verdict
    assert evidence in finding.evidence
    assert bool(finding.remedy) == (verdict is not Verdict.PASS)


def test_dropout_is_warned_of_even_where_the_rest_agrees() -> None:
    finding = judged(report("setting", dropout=0.1), "logprobs")
    assert finding.verdict is Verdict.WARN
    assert finding.remedy == "set trainer.model.lora.dropout = 0"


GRADIENT: dict[str, tuple[dict[str, Any], Verdict, str]] = {
    "a frozen tensor": ({"frozen": [A]}, Verdict.FAIL, f"1 of 2 tensors that should train are frozen: {A}"),
    "a tensor too many": (
        {"unexpected": ["model.norm"]},
        Verdict.FAIL,
        "1 tensors train that should not: model.norm",
    ),
    "not in the optimiser": ({"unheld": [B]}, Verdict.FAIL, f"the optimiser does not have {B}"),
    "not a number": ({"norm": math.nan, "norms": {A: 0.0, B: math.nan}}, Verdict.FAIL, f"not finite in 1 of 2 tensors: {B}"),
    "nothing": ({"norm": 0.0, "norms": {A: 0.0, B: 0.0}}, Verdict.FAIL, "the gradient is exactly 0"),
    "none for B": ({"norms": {A: 0.0, B: 0.0}, "norm": 0.1}, Verdict.FAIL, f"no gradient reaches 1 of 2 tensors that train: {B}"),
    "none for A, ever": ({"awake": {A: 0.0, B: 0.3}}, Verdict.FAIL, f"no gradient reaches 1 of 2 tensors that train: {A}"),
    "no tensor of it": ({"missing": [B]}, Verdict.FAIL, f"no gradient reaches 1 of 2 tensors that train: {B}"),
    "a frozen one has some": ({"stray": ["lm_head"]}, Verdict.FAIL, "frozen tensors get a gradient: lm_head"),
    "clipped a little": ({"max_norm": 0.1}, Verdict.PASS, "max_grad_norm = 0.1"),
    "clipped to nothing": ({"max_norm": 0.01}, Verdict.WARN, "clipping leaves 0.033 of it"),
    "never clipped": ({"max_norm": None}, Verdict.PASS, "no clipping"),
    "an expert without a token": (
        {"norms": {"model.layers.0.mlp.experts.down_proj": 0.0, "x": 1.0}, "awake": {}},
        Verdict.PASS,
        "all 2 tensors that train get a gradient; its norm",
    ),
}


@pytest.mark.parametrize(("changes", "verdict", "evidence"), GRADIENT.values(), ids=GRADIENT)
def test_gradient(changes: dict[str, Any], verdict: Verdict, evidence: str) -> None:
    finding = judged(report("gradient", **changes), "gradient")
    assert finding.verdict is verdict
    assert evidence in finding.evidence
    assert bool(finding.remedy) == (verdict is not Verdict.PASS)


def test_only_the_first_of_many_names_are_told() -> None:
    finding = judged(report("gradient", expected=9, frozen=[f"t{i}" for i in range(9)]), "gradient")
    assert finding.evidence == "9 of 9 tensors that should train are frozen: t0, t1, t2 and 6 more"


def test_a_remedy_for_clipping_is_a_number_that_would_not_clip() -> None:
    assert "max_grad_norm to 0.6" in judged(report("gradient", max_norm=0.01), "gradient").remedy


@pytest.mark.parametrize(
    ("error", "verdict"), [(1e-8, Verdict.PASS), (1e-3, Verdict.WARN), (0.5, Verdict.FAIL), (math.nan, Verdict.FAIL)]
)
def test_differences_are_judged_by_the_worst(error: float, verdict: Verdict) -> None:
    directions = [Difference("LoRA A", 0.1, 0.1, 1e-9), Difference("LoRA B", 0.1, 0.2, error)]
    finding = judged(report("differences", directions=directions), "finite-differences")
    assert finding.verdict is verdict
    assert ("LoRA B is off by" in finding.evidence) == (verdict is not Verdict.PASS)


def test_an_architecture_that_cannot_be_copied_is_a_warning() -> None:
    finding = judged(report("differences", directions=[], trouble="ValueError: no"), "finite-differences")
    assert finding.verdict is Verdict.WARN
    assert "ValueError: no" in finding.evidence


UPDATE: dict[str, tuple[dict[str, Any], Verdict, str]] = {
    "a rate of 0": ({"lr": 0.0, "changed": 0}, Verdict.FAIL, "learning rate 0: no step changes anything"),
    "not applied": ({"applied": False, "changed": 0}, Verdict.FAIL, "the gradient was not applied"),
    "nothing moves": ({"changed": 0}, Verdict.FAIL, "not one of 1,000 weights with a gradient changes"),
    "a tensor stands still": ({"still": [B]}, Verdict.FAIL, f"1 tensors with a gradient do not change: {B}"),
    "nothing arrives": (
        {"published": [Counted(1, 0), Counted(10, 5)]},
        Verdict.FAIL,
        "1,000 weights change in float32, and none of those that engines read",
    ),
    "blown up": ({"finite": False}, Verdict.FAIL, "weights are not finite after one step"),
    "little arrives": (
        {"published": [Counted(1, 8), Counted(10, 80), Counted(100, 700)], "merged": None, "ratios": {"w": 5e-5}},
        Verdict.WARN,
        "8 (0.8 %) in the float32 that engines read; a tensor changes by 5.0e-05 of its norm; the others wait until float32 has "
        "added up enough: 8 % after 10, 70 % after 100 steps",
    ),
    "far": ({"ratios": {"w": 0.2}}, Verdict.WARN, "one step changes tensors by 2.0e-01 of their norm"),
    "a huge adapter": ({"merged": Merged(2.0, 100, 100)}, Verdict.WARN, "the adapter adds 2.0e+00 of the norm"),
    "lost in Adam's eps": ({"step_share": 0.3}, Verdict.WARN, "weights move by 0.3 of the learning rate"),
    "a warm-up": ({"after_warmup": 10, "first_lr": 1e-5}, Verdict.PASS, "0.0001 (reached at step 10; 1e-05 at step 1)"),
}


@pytest.mark.parametrize(("changes", "verdict", "evidence"), UPDATE.values(), ids=UPDATE)
def test_update(changes: dict[str, Any], verdict: Verdict, evidence: str) -> None:
    found = report("update", **changes)
    setting = msgspec.structs.replace(SOUND.setting, adapter=changes.get("merged", 1) is not None)
    finding = judged(msgspec.structs.replace(found, setting=setting), "update")
    assert finding.verdict is verdict, finding.evidence
    assert evidence in finding.evidence
    assert bool(finding.remedy) == (verdict is not Verdict.PASS)


def test_a_run_that_cannot_move_the_policy_is_foreseen() -> None:
    """A step of 1e-4 nats, eighty times: nothing that anybody would see."""
    finding = judged(report("rewarded", predicted=8e-5), "update")
    assert finding.verdict is Verdict.WARN
    assert "1.0e-04 nats a token, so all 100 steps together by 8.0e-03 at most" in finding.evidence


REWARDED: dict[str, tuple[dict[str, Any], Verdict, str]] = {
    "the wrong way": ({"observed": -0.009}, Verdict.FAIL, "weighed by advantages -0.009, by the gradient +0.01"),
    "against its own gradient": ({"observed": -0.009, "predicted": -0.01}, Verdict.FAIL, "by the gradient -0.01"),
    "much too far": ({"observed": 0.001}, Verdict.WARN, "far beyond where the gradient points"),
    "too far, and back": (
        {"observed": -0.009, "scaled": Scaled(0.1, 0.001, 0.0009, 1e-6)},
        Verdict.WARN,
        "0.1 times as long it does +0.0009, by the gradient +0.001: the update goes too far",
    ),
    "the wrong way at any length": (
        {"observed": -0.009, "scaled": Scaled(0.1, 0.001, -0.0009, 1e-6)},
        Verdict.FAIL,
        "does -0.0009",
    ),
    "drowned": (
        {"observed": -1e-7, "predicted": 1e-6, "scaled": Scaled(100.0, 1e-4, 9e-5, 1e-6)},
        Verdict.PASS,
        "one update alone drowns in rounding; 100 times as long it changes logprobs, weighed by advantages, by +9e-05",
    ),
    "drowned, the wrong way": (
        {"observed": 1e-7, "predicted": 1e-6, "scaled": Scaled(100.0, 1e-4, -9e-5, 1e-6)},
        Verdict.FAIL,
        "by -9e-05",
    ),
    "drowned at any length": (
        {"noise": 1e-3, "scaled": Scaled(10.0, 5e-3, 1e-3, 1e-6)},
        Verdict.WARN,
        "still too little to tell",
    ),
}


@pytest.mark.parametrize(("changes", "verdict", "evidence"), REWARDED.values(), ids=REWARDED)
def test_rewarded(changes: dict[str, Any], verdict: Verdict, evidence: str) -> None:
    finding = judged(report("rewarded", **changes), "rewarded")
    assert finding.verdict is verdict, finding.evidence
    assert evidence in finding.evidence
    assert bool(finding.remedy) == (verdict is not Verdict.PASS)
