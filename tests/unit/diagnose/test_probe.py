"""The probe on the tiny model, in this process: what it measures, that it changes nothing, and faults that it must find."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from support.adapters import reference_logprobs
from support.planted_probe import FAULTS, LAYER
from support.probed import TEMPERATURE, judged, probe_here, probed_config, scored_batch, trainer_results
from turnwise.diagnose import probe
from turnwise.diagnose.core import Verdict, first_failure
from turnwise.diagnose.probe_report import ProbeReport, Update, read_report, write_report
from turnwise.diagnose.probing import differences
from turnwise.trainer import fsdp
from turnwise.trainer.publish import publish
from turnwise.trainer.step import Learner
from turnwise.transport import Batch, RunDir, WeightsStore

FULL = {"model": {"lora": "None"}}


@pytest.fixture(scope="module", autouse=True)
def few_differences() -> Generator[None]:
    """Under the type checks of tests every operation of the small copy is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "STEPS", (1e-5,))
        patch.setattr(differences, "RANDOM", 1)
        yield


@pytest.fixture(scope="module")
def batch(tiny_model: Path) -> Batch:
    return scored_batch(tiny_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probed")


@pytest.fixture(scope="module")
def sound(folder: Path, tiny_model: Path, batch: Batch) -> ProbeReport:
    """Everything, of an adapter in float32."""
    return probe_here(probed_config(folder, tiny_model), batch, folder / "probe" / "report.json")


def only(monkeypatch: pytest.MonkeyPatch, *stages: str) -> None:
    monkeypatch.setattr(probe, "STAGES", {name: probe.STAGES[name] for name in stages})


def updated(report: ProbeReport) -> Update:
    assert report.update is not None
    return report.update


def test_nothing_is_wrong_with_a_sound_trainer(sound: ProbeReport, folder: Path) -> None:
    results = trainer_results(sound)
    assert [result.finding.verdict for result in results] == [Verdict.PASS] * 5, [r.finding.evidence for r in results]
    assert sound.stage == ""
    assert read_report(folder / "probe" / "report.json") == sound


def test_the_step_is_that_of_the_trainer_to_the_bit(sound: ProbeReport, tmp_path: Path, tiny_model: Path, batch: Batch) -> None:
    """Whatever was measured before it: another adapter for trial, a copy of the model, versions published."""
    config = probed_config(tmp_path, tiny_model)
    store = WeightsStore(RunDir(tmp_path).weights)
    torch.set_num_threads(1)
    with fsdp.process_group(cuda=False, timeout_s=60.0) as device:
        learner = Learner(config, device)
        metrics = learner.step(batch)
        publish(learner, store, 1, {}, keep=9)
    ready = store.poll(1)
    assert sound.published is not None
    assert ready is not None
    assert sound.published.ready.digest == ready.digest
    assert sound.gradient is not None
    assert sound.gradient.norm == pytest.approx(metrics["actor/grad_norm"], rel=1e-9)
    assert updated(sound).norm == pytest.approx(metrics["actor/update_norm"], rel=1e-6)


def test_recorded_logprobs_are_found_at_the_configured_temperature_and_place(sound: ProbeReport) -> None:
    found = sound.logprobs
    assert found is not None
    assert found.agreement.mean < 1e-6
    assert found.agreement.correlation > 0.999999
    by_engine = {row.value: row.engine for row in found.temperatures}
    assert min(by_engine, key=by_engine.__getitem__) == TEMPERATURE
    assert {0.49, 1.0, 1.4286} <= by_engine.keys()  # applied twice, left out, multiplied
    assert [row.value for row in found.shifts if row.engine < 1e-5] == [0.0]
    assert all(row.engine == pytest.approx(row.trainer, abs=1e-5) for row in found.temperatures)


def test_an_adapter_trains_as_soon_as_its_b_is_not_0(sound: ProbeReport) -> None:
    found = sound.gradient
    assert found is not None
    assert found.expected == len(found.norms) == len(found.awake) == 28
    of_a = {name: norm for name, norm in found.norms.items() if name.endswith(".lora_A")}
    assert set(of_a.values()) == {0.0}
    assert all(found.awake.values())
    assert math.sqrt(sum(norm**2 for norm in found.norms.values())) == pytest.approx(found.norm, rel=1e-9)


def test_finite_differences_agree_to_eight_digits(sound: ProbeReport) -> None:
    assert sound.differences is not None
    assert len(sound.differences.directions) == 4
    assert max(one.error for one in sound.differences.directions) < 1e-7
    assert any(abs(one.autograd) > 0.01 for one in sound.differences.directions)


def test_the_update_is_counted_where_there_is_a_gradient(sound: ProbeReport) -> None:
    update = updated(sound)
    matrices = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) * 4  # every B of two layers, rank 4
    assert update.weights == update.changed == update.published[0].changed == matrices
    assert update.step_share == pytest.approx(1.0, abs=1e-3)  # AdamW's first step is the learning rate
    assert update.norm == pytest.approx(1e-3 * math.sqrt(matrices), rel=1e-3)
    assert (update.lr, update.first_lr, update.full_steps) == (1e-3, 1e-3, pytest.approx(100.0))
    assert update.still == []


def test_the_change_of_logprobs_is_that_which_the_gradient_promises(sound: ProbeReport) -> None:
    found = sound.rewarded
    assert found is not None
    assert found.observed == pytest.approx(found.predicted, rel=0.02)
    assert found.positive > 0 > found.negative
    assert found.scaled is None


def test_version_1_is_an_adapter_that_moved_with_canaries_from_before_and_after(
    sound: ProbeReport, folder: Path, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    assert sound.published is not None
    ready = sound.published.ready
    assert (ready.version, ready.kind, sound.published.factor) == (1, "lora", 1.0)
    assert WeightsStore(RunDir(folder).weights).versions() == [0, 1]
    tensors = load_file(Path(ready.path) / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for canary in ready.canaries:
        assert canary.before == canary.base == pytest.approx(reference_logprobs(base, canary.token_ids), abs=2e-5)
        assert canary.logprobs != canary.before


def test_costs_are_told_for_the_samples_and_the_whole_batch(sound: ProbeReport, batch: Batch) -> None:
    assert sound.cost is not None
    assert sound.rehearsal is not None
    sampled = sum(len(sample.token_ids) - 1 for sample in batch.samples)
    assert 0 < sound.cost.tokens <= sampled
    assert sound.cost.batch_tokens == sound.cost.tokens
    assert sound.rehearsal.budget == 128
    assert 0 < sound.cost.memory[0].peak < sound.cost.memory[0].total
    assert sound.rehearsal.seconds > 0


FIRST = {
    "ignored_temperature": ("logprobs", f"those of temperature 1, the engine's those of the configured {TEMPERATURE}"),
    "frozen_adapter": ("gradient", "28 of 28 tensors that should train are frozen"),
    "frozen_layer": ("gradient", f"2 of 28 tensors that should train are frozen: {LAYER}.lora_A, {LAYER}.lora_B"),
    "forgotten_layer": ("gradient", f"the optimiser does not have {LAYER}.lora_A, {LAYER}.lora_B"),
    "thawed_base": ("gradient", "1 tensors train that should not: model.embed_tokens.weight"),
    "dropped_gradient": ("gradient", f"no gradient reaches 1 of 28 tensors that train: {LAYER}.lora_A"),
    "nonfinite_loss": ("gradient", "not finite in 28 of 28 tensors"),
    "wrong_backward": ("finite-differences", "off by 0.5 of its size"),
    "zero_learning_rate": ("update", "learning rate 0: no step changes anything"),
    "lost_update": ("update", "not one of 4,096 weights with a gradient changes"),
    "flipped_loss": ("rewarded", "weighed by advantages -0.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_check_that_fails_names_the_fault(
    fault: str, sound: ProbeReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    name, evidence = FIRST[fault]
    if name != "finite-differences":
        monkeypatch.setattr(probe, "finite_differences", lambda *_: sound.differences)
    only(monkeypatch, *list(probe.STAGES)[: [*probe.STAGES].index(name) + 1])
    FAULTS[fault](monkeypatch.setattr)
    failed = first_failure(trainer_results(probe_here(probed_config(tmp_path, tiny_model), batch, tmp_path / "report.json")))
    assert failed is not None
    assert failed.check.name == name
    assert evidence in failed.finding.evidence
    assert failed.finding.remedy


def warned(report: ProbeReport, name: str) -> str:
    finding = judged(report, name)
    assert finding.verdict is Verdict.WARN, finding.evidence
    return finding.evidence


def test_full_fine_tuning_at_1e_6_in_bfloat16_hardly_changes_what_engines_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    """Masters begin on bfloat16 numbers, and most of them are further from the next one than a step."""
    only(monkeypatch, "gradient", "update")
    trainer: dict[str, Any] = FULL | {"optim": {"lr": 1e-6, "warmup_steps": 10, "max_grad_norm": 0.01}}
    config = probed_config(tmp_path, tiny_model, model={"dtype": "bfloat16"}, trainer=trainer)
    report = probe_here(config, batch, tmp_path / "report.json")
    update = updated(report)
    shares = [count.changed / update.weights for count in update.published]
    assert update.changed == update.weights
    assert shares[0] < 0.05 < shares[1] < 0.5 < shares[2] < shares[3] == pytest.approx(1.0, abs=0.01)
    evidence = warned(report, "update")
    assert f"{update.published[0].changed:,} ({100 * shares[0]:.2g} %) in the bfloat16 that engines read" in evidence
    assert "learning rate 1e-06 (reached at step 10; 1e-07 at step 1)" in evidence
    assert "clipping leaves" in warned(report, "gradient")


def test_an_update_that_drowns_in_rounding_is_made_longer_and_so_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    only(monkeypatch, "logprobs", "gradient", "update", "rewarded", "publication")
    config = probed_config(tmp_path, tiny_model, trainer=FULL | {"optim": {"lr": 1e-6}}, model={"dtype": "bfloat16"})
    report = probe_here(config, batch, tmp_path / "report.json")
    assert report.rewarded is not None
    assert report.rewarded.scaled is not None
    assert report.published is not None
    scaled = report.rewarded.scaled
    assert scaled.factor == report.published.factor > 10
    assert scaled.observed == pytest.approx(scaled.predicted, rel=0.3)
    finding = judged(report, "rewarded")
    assert finding.verdict is Verdict.PASS
    assert "one update alone drowns in rounding" in finding.evidence
    assert report.published.ready.kind == "full"
    assert WeightsStore(RunDir(tmp_path).weights).versions() == [1]  # engines start with the weights of version 0


def test_a_step_far_too_long_is_warned_of(
    sound: ProbeReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    monkeypatch.setattr(probe, "finite_differences", lambda *_: sound.differences)
    config = probed_config(tmp_path, tiny_model, trainer={"optim": {"lr": 3.0}})
    report = probe_here(config, batch, tmp_path / "report.json")
    assert "one step makes the adapter that large" in warned(report, "update")
    assert "far beyond where the gradient points" in warned(report, "rewarded")


def test_the_report_is_there_after_each_stage_and_says_which_was_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    def die(*_: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(probe, "measure_gradient", die)
    with pytest.raises(RuntimeError, match="no more"):
        probe_here(probed_config(tmp_path, tiny_model), batch, tmp_path / "report.json")
    report = read_report(tmp_path / "report.json")
    assert report.stage == "gradient"
    assert report.logprobs is not None
    assert report.gradient is None


def test_numbers_that_are_not_finite_survive_the_file(sound: ProbeReport, tmp_path: Path) -> None:
    assert sound.gradient is not None
    strange = msgspec.structs.replace(sound, gradient=msgspec.structs.replace(sound.gradient, norm=math.nan))
    write_report(tmp_path / "report.json", strange)
    found = read_report(tmp_path / "report.json").gradient
    assert found is not None
    assert math.isnan(found.norm)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="no report of a probe"):
        read_report(tmp_path / "report.json")
