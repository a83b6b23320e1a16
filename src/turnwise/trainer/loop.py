"""The trainer's life: publish, wait for a batch, step, publish, and now and then a checkpoint."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from turnwise.config import RLConfig
from turnwise.trainer import fsdp
from turnwise.trainer.canary import Canaries
from turnwise.trainer.checkpoint import load_checkpoint, save_checkpoint
from turnwise.trainer.checkpoint_index import prune_checkpoints
from turnwise.trainer.handover import Handover
from turnwise.trainer.model import ModelError
from turnwise.trainer.process import trainer_process
from turnwise.trainer.publish import publish
from turnwise.trainer.rehearsal import explained, rehearse, wanted
from turnwise.trainer.step import Learner, Metrics, signal_share
from turnwise.transport import Batch, BatchLog, Canary, Control, Progress, RunDir, WeightsStore, wait_for

HEARTBEAT_S = 20.0  # rank 0 tells the others this often that it still waits: a collective has a deadline, a rollout may be longer


@dataclass
class _Clock:
    """Where the time of a step went, in seconds."""

    begun: float
    wait_s: float = 0.0
    publish_s: float = 0.0  # of the version before: a version cannot hold how long its own publication took
    claim_s: float = 0.0  # of the same, until engines took it: an evaluation, or their start, may keep them from it


def run_trainer(config: RLConfig, *, resume_step: int | None = None) -> None:
    """Train until `max_steps` or a request to stop; returns when the last checkpoint is written. Every rank calls it.

    Raises:
        CheckpointError: a checkpoint cannot be read or written.
        OutOfMemory: model, rehearsal or step does not fit into memory.
        ModelError, ValueError: the model, a batch, or the trainer's part of a shared GPU cannot be used.
        TimeoutError: an engine that shares a GPU with the trainer does not answer.
        PublishError: weights cannot be published.
    """
    control = Control(RunDir(config.output_dir).root)
    with trainer_process(config, stop=lambda: control.stop_request() is not None) as device:
        Trainer(config, device).run(resume_step)


class Trainer:
    """The loop, on one rank."""

    def __init__(self, config: RLConfig, device: torch.device) -> None:
        self.config = config
        self.run_dir = RunDir(config.output_dir)
        self.batches = BatchLog(self.run_dir.batches)
        self.store = WeightsStore(self.run_dir.weights)
        self.control = Control(self.run_dir.root)
        with explained(config, device, "while the model was loaded"):
            self.learner = Learner(config, device)
        if not self.learner.trained:
            raise ModelError("no parameter of the model trains, so no step could change it: adapters and weights are all frozen")
        broadcast = config.weight_transfer == "broadcast"
        self.handover = Handover(self.learner, self.store, self.control) if broadcast else None
        self.stopping = False  # the run was asked to end
        self.step = 0
        self.progress = Progress()
        self.saved: int | None = None  # step of the newest checkpoint of this lineage
        self.clock = _Clock(time.perf_counter())

    def run(self, resume_step: int | None) -> None:
        """Train to the end, or until someone asks to stop."""
        if resume_step:
            self.progress = load_checkpoint(self.learner, self.run_dir, resume_step)
            self.step = self.saved = resume_step
        if fsdp.rank() == 0:
            self.store.forget_after(self.step)
        try:
            self._train_all()
        finally:
            if self.handover is not None:
                self.handover.close()
        if self.saved != self.step:
            self._checkpoint()

    def _train_all(self) -> None:
        for note in self.learner.notes:
            self._say(note)
        self._publish({})
        trained = sum(parameter.numel() for parameter in self.learner.parameters.values())
        self._say(f"policy v{self.step} published; {trained:,} parameters train on {fsdp.arrangement(self.learner.policy)}")
        if wanted(self.config) and not self._finished():
            self._say(rehearse(self.learner))
        while not self._finished():
            batch = self._next_batch()
            if batch is None:
                break
            self._train(batch)
            interval = self.config.ckpt.interval
            if interval is not None and self.step % interval == 0:
                self._checkpoint()

    def _finished(self) -> bool:
        return self.stopping or (self.config.max_steps is not None and self.step >= self.config.max_steps)

    def _next_batch(self) -> Batch | None:
        """The batch of the next step, on every rank; None when the run is asked to stop.

        Raises:
            ValueError: the file is not a batch of this step.
        """
        begun = time.perf_counter()
        path = self.batches.path(self.step + 1)
        found = self._await(path)
        self.clock.wait_s = time.perf_counter() - begun
        if not found:
            return None
        batch = self.batches.read(self.step + 1)
        if batch.step != self.step + 1:
            raise ValueError(f"{path} holds the batch of step {batch.step}: the batch log is damaged; resume from a checkpoint")
        return batch

    def _await(self, path: Path) -> bool:
        """Wait for a file, on every rank; False when the run is asked to stop."""
        while (state := fsdp.broadcast(self._look(path) if fsdp.rank() == 0 else "")) == "wait":
            pass
        self.stopping = state == "stop"
        return not self.stopping

    def _look(self, path: Path) -> str:
        request = self.control.stop_request()
        if request is None:
            try:
                found = wait_for(path, stop=lambda: self.control.stop_request() is not None, timeout_s=HEARTBEAT_S)
            except TimeoutError:
                return "wait"
            if found:
                return "found"
            request = self.control.stop_request()
        self._say(f"stopping after step {self.step}: {request.reason if request else 'asked to'}")
        return "stop"

    def _train(self, batch: Batch) -> None:
        signal = signal_share(batch)
        if signal == 0:
            self._say(f"warning: no sample of batch {batch.step} has an advantage; the policy stays as it is")
        canaries = Canaries(self.learner, batch)
        begun = time.perf_counter()
        with explained(self.config, self.learner.device, f"in step {batch.step}"):
            metrics = self.learner.step(batch)
        metrics |= self.learner.meter.metrics()
        now = time.perf_counter()
        if metrics["actor/updates_skipped"] and signal > 0:
            self._say(f"warning: step {batch.step}: gradient norm {metrics['actor/grad_norm']}; the update was left out")
        cycle = now - self.clock.begun
        metrics |= {
            "timing/train_s": now - begun,
            "timing/wait_batch_s": self.clock.wait_s,
            "timing/publish_s": self.clock.publish_s,
            "timing/step_s": cycle,
            "perf/trainer_idle/share": (self.clock.wait_s + self.clock.claim_s) / cycle,
        }
        if self.handover is not None:
            metrics["timing/wait_claim_s"] = self.clock.claim_s
        self.step, self.progress = batch.step, batch.progress
        self.clock = _Clock(now)
        measured = canaries.after()
        self._publish(metrics | canaries.metrics(), measured)
        self._say(_line(self.step, self.config.max_steps, metrics))

    def _publish(self, metrics: Metrics, canaries: Sequence[Canary] = ()) -> None:
        begun = time.perf_counter()
        keep = self.config.orchestrator.max_staleness + 2
        if self.handover is None:
            publish(self.learner, self.store, self.step, metrics, keep=keep, canaries=canaries)
        else:
            self.handover.announce(self.step, metrics, keep=keep, canaries=canaries)
            self._hand_over(self.handover)
        self.clock.publish_s = time.perf_counter() - begun - self.clock.claim_s

    def _hand_over(self, handover: Handover) -> None:
        """Wait until the engines take what was announced, and give it to them; without them when the run is asked to stop."""
        begun = time.perf_counter()
        claimed = self._await(self.store.claim_path(self.step))
        self.clock.claim_s = time.perf_counter() - begun
        if claimed:
            self.stopping = not handover.send()

    def _checkpoint(self) -> None:
        folder = save_checkpoint(self.learner, self.run_dir, self.step, self.progress)
        self.saved = self.step
        if fsdp.rank() == 0:
            prune_checkpoints(self.run_dir.root, self.config.ckpt)
        self._say(f"checkpoint {folder}")

    def _say(self, text: str) -> None:
        if fsdp.rank() == 0:
            print(text, flush=True)


def _line(step: int, max_steps: int | None, metrics: Metrics) -> str:
    of = f"/{max_steps}" if max_steps else ""
    parts = [
        f"step {step}{of}",
        f"loss {metrics['actor/loss']:+.4f}",
        f"grad {metrics['actor/grad_norm']:.3g}",
        f"entropy {metrics.get('actor/entropy', float('nan')):.3f}",
        f"clipped {metrics.get('actor/clip_fraction', 0.0):.1%}",
        f"mismatch {metrics.get('mismatch/logprob_abs/mean', float('nan')):.1e}",
        f"moved {metrics['actor/update_norm']:.3g}",
        f"lr {metrics['actor/lr']:.1e}",
        f"train {metrics['timing/train_s']:.1f} s",
        f"waited {metrics['timing/wait_batch_s']:.1f} s",
    ]
    return "  ".join(parts)
