"""`torchrun … -m turnwise.diagnose.probe --config CONFIG --batch FILE --out FILE`: everything that checks ask of the trainer.

In the trainer's place, in its processes, on its model and one batch: what is measured, in the order in which it is, is `STAGES`.
The report is written after each stage, so that what one that fails leaves behind can be judged.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from pydantic import ValidationError

from turnwise.config import RLConfig
from turnwise.config.files import ConfigError, load_config
from turnwise.diagnose.probe_report import Cost, ProbeReport, Setting, write_report
from turnwise.diagnose.probing import cost
from turnwise.diagnose.probing.agreement import compare
from turnwise.diagnose.probing.differences import finite_differences
from turnwise.diagnose.probing.gradient import measure_gradient
from turnwise.diagnose.probing.publication import Publisher
from turnwise.diagnose.probing.rewarded import Effect, better_factor, measure_effect, scaled_effect
from turnwise.diagnose.probing.subset import TOKENS, choose_samples, part_of
from turnwise.diagnose.probing.tokens import measure, tokens_of
from turnwise.diagnose.probing.update import take_step
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.trainer import fsdp
from turnwise.trainer.__main__ import end
from turnwise.trainer.model import ModelError
from turnwise.trainer.process import trainer_process
from turnwise.trainer.publish import PublishError, engine_dtype
from turnwise.trainer.rehearsal import OutOfMemory, explained
from turnwise.trainer.step import Learner
from turnwise.transport import Batch

MARK = "probe: "  # begins a line that tells how far the measurement is


class Probe:
    """The measurement, on one rank. Every method is a collective.

    Args:
        config: resolved.
        batch: of step 1, with at least one sample that has an advantage.
        out: the report's file.
    """

    def __init__(self, config: RLConfig, batch: Batch, out: Path, device: torch.device) -> None:
        began = time.perf_counter()
        self.config, self.given, self.out = config, batch, out
        with explained(config, device, "while the model was loaded"):
            self.learner = Learner(config, device)
        self.load_s = time.perf_counter() - began
        budget = TOKENS[device.type] * (fsdp.world_size() if device.type == "cuda" else 1)
        self.batch = part_of(batch, choose_samples(batch.samples, tokens=budget))
        self.passes = self.learner.passes(self.batch)
        self.tokens = tokens_of(self.passes)
        self.report = ProbeReport(setting=self._setting())

    def run(self) -> ProbeReport:
        """Measure everything; nothing more where nothing trains."""
        for name, stage in STAGES.items():
            self._note(stage=name)
            if fsdp.rank() == 0:
                print(f"{MARK}{name}", flush=True)
            with explained(self.config, self.learner.device, f"while {name} was measured"):
                stage(self)
            if self.report.gradient is not None and not self.report.gradient.norms:
                break
        self._note(stage="")
        return self.report

    def logprobs(self) -> None:
        """Engine and trainer, before any update."""
        found, self.before = compare(self.learner, self.passes, self.tokens)
        self._note(logprobs=found)

    def gradient(self) -> None:
        """Of the batch's loss, by tensor."""
        self._note(gradient=measure_gradient(self.learner, self.passes, self.batch))

    def differences(self) -> None:
        """Of a small copy, on rank 0."""
        if fsdp.rank() == 0:
            self._note(differences=finite_differences(self.config, self.batch, self.out.parent / "small_copy"))

    def update(self) -> None:
        """A step on that gradient, between two versions."""
        assert self.report.gradient is not None
        self.publisher = Publisher(self.learner, self.batch)
        self.publisher.first()
        began = time.perf_counter()
        self.step = take_step(self.learner, self.report.gradient.norm)
        self.update_s = time.perf_counter() - began
        self._note(update=self.step.update)

    def rewarded(self) -> None:
        """What the step did to the sampled tokens."""
        self.effect = Effect.of(self.passes, self.tokens, self.before)
        after, _ = measure(self.learner, self.passes)
        self._note(rewarded=measure_effect(self.effect, after, -self.step.predicted))

    def publication(self) -> None:
        """The step as version 1. Hardly more than rounding, it is made longer first, measured and published so; where it went the
        wrong way, a shorter one is measured afterwards."""
        found = self.report.rewarded
        assert found is not None
        factor = better_factor(found, self.effect.rounding, self.step.update.published)
        if factor > 1:
            self._scale(factor)
        published = self.publisher.next(max(1.0, factor))
        if factor < 1:
            self._scale(factor)
        self._note(published=published)

    def _scale(self, factor: float) -> None:
        found = self.report.rewarded
        assert found is not None
        scaled = scaled_effect(self.learner, self.passes, self.effect, self.step.before, found.predicted, factor)
        self._note(rewarded=msgspec.structs.replace(found, scaled=scaled))

    def cost(self) -> None:
        """Tokens, seconds, memory."""
        self.computed = cost.computed_tokens(self.passes)
        found = Cost(
            tokens=self.computed,
            batch_tokens=cost.batch_tokens(self.learner, self.given.samples),
            load_s=self.load_s,
            update_s=self.update_s,
            memory=cost.memory_by_rank(self.learner.device),
        )
        self._note(cost=found)

    def rehearsal(self) -> None:
        """The longest micro-batches."""
        assert self.report.gradient is not None
        speed = self.computed / fsdp.world_size() / self.report.gradient.seconds
        self._note(rehearsal=cost.rehearse_longest(self.learner, speed))

    def _note(self, **changes: Any) -> None:
        """Add to the report."""
        self.report = msgspec.structs.replace(self.report, **changes)
        if fsdp.rank() == 0:
            write_report(self.out, self.report)

    def _setting(self) -> Setting:
        learner, lora = self.learner, self.learner.lora
        packed = any(isinstance(module, MXFP4Linear) for module in learner.policy.modules())
        on_gpu = learner.device.type == "cuda"
        return Setting(
            samples=len(self.batch.samples),
            given_samples=sum(any(sample.loss_mask) for sample in self.given.samples),
            tokens=len(self.tokens.engine),
            temperature=self.batch.temperature,
            loss=self.config.trainer.loss.kind,
            dtype=_name(learner.dtype),
            published_dtype=_name(engine_dtype(learner)),
            adapter=lora is not None,
            dropout=lora.dropout if lora is not None else 0.0,
            quantised=packed or learner.fake_quant is not None,
            ranks=fsdp.world_size(),
            device=torch.cuda.get_device_name(learner.device) if on_gpu else "cpu",
        )


STAGES: dict[str, Callable[[Probe], None]] = {
    "logprobs": Probe.logprobs,
    "gradient": Probe.gradient,
    "finite-differences": Probe.differences,
    "update": Probe.update,
    "rewarded": Probe.rewarded,
    "publication": Probe.publication,
    "cost": Probe.cost,
    "rehearsal": Probe.rehearsal,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the resolved configuration says; 0 when all is in the report, 1 with a message otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m turnwise.diagnose.probe", description="Measure what checks ask of a trainer."
    )
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--batch", type=Path, required=True, help="a batch of step 1, as in a run's batches/")
    parser.add_argument("--out", type=Path, required=True, help="where the report is written")
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.config)
        batch = msgspec.msgpack.decode(cast(Path, given.batch).read_bytes(), type=Batch)
        with trainer_process(config, stop=lambda: False) as device:
            Probe(config, batch, given.out, device).run()
    except (ConfigError, ValidationError, ModelError, PublishError, OutOfMemory, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    end(main())
