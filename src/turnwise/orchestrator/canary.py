"""The canary alarm: engines are asked for the logprobs by which the trainer tells a new version from the one before.

The digest proves which tensors an engine holds. Canaries show which it computes with: an adapter that is held but not applied, a
wrong one, half of one, or an old one under the new name. They are asked for beside the work, of each engine by itself.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.inference.replicas import Replica
from turnwise.orchestrator.evidence import Blocks, Evidence, Shown
from turnwise.orchestrator.weights import Policy, WrongWeights
from turnwise.transport import Canary, WeightsReady

logger = logging.getLogger(__name__)

NOISE_LIMIT = (
    0.5  # nats a token; engines and trainers in bfloat16 differ by 0.05, and more where a temperature or a scale is wrong
)
UNSURE = 0.25  # standard error of a share, above which its value is not worth a line
SILENT = 3  # versions in a row that an engine does not answer for before that is said; a swap may cut one short

CHANGE = ("canary/change_shown/mean", "canary/change_shown/min", "canary/change_shown/error")
ADAPTER = ("canary/adapter_shown/mean", "canary/adapter_shown/min", "canary/adapter_shown/error")

Answer = list[list[float]]  # logprobs of one engine, for each canary


class CanaryAlarm(WrongWeights):
    """An engine computes with another policy than the one whose tensors it holds."""


@dataclass
class _Engine:
    """What is known of one engine."""

    step: Evidence = field(default_factory=Evidence)  # against the version before
    adapter: Evidence = field(default_factory=Evidence)  # against the model without an adapter
    noise: float | None = None  # mean |engine - trainer| of the newest version, nats a token
    unanswered: int = 0  # versions in a row
    warned: bool = False


class CanaryWatch:
    """Asks engines for the canaries of each version and judges what they show.

    Args:
        policy: as engines serve it.
        group: where the asking runs; an alarm ends it.
    """

    def __init__(self, policy: Policy, group: asyncio.TaskGroup) -> None:
        self.policy, self.client = policy, policy.client
        self._group = group
        self._engines = [_Engine() for _ in self.client.replicas.all]
        self._asking: asyncio.Task[None] | None = None
        self._fresh = False

    def ask(self, ready: WeightsReady) -> None:
        """Ask for the canaries of the version that has just been swapped in; passed over while the last ones are not answered,
        and in runs with noise, whose engines compute with another policy on purpose.

        The task raises CanaryAlarm when an engine serves something else.
        """
        busy = self._asking is not None and not self._asking.done()
        if not ready.canaries or busy or self.policy.noise is not None:
            return
        pin = ExitStack()
        if (
            ready.kind == "lora"
        ):  # an adapter stays loaded meanwhile; full weights are not held back, and late answers are dropped
            pin.enter_context(self.policy.pinned(ready.version))
        self._asking = self._group.create_task(self._run(ready, pin))

    def take(self) -> dict[str, float]:
        """Metrics of the newest version that was answered for, once."""
        if not self._fresh:
            return {}
        self._fresh = False
        noise = [engine.noise for engine in self._engines if engine.noise is not None]
        metrics = {"canary/noise/mean": fmean(noise)} if noise else {}
        metrics |= _metrics(CHANGE, [engine.step.everything() for engine in self._engines])
        return metrics | _metrics(ADAPTER, [engine.adapter.everything() for engine in self._engines])

    async def _run(self, ready: WeightsReady, pin: ExitStack) -> None:
        with pin:
            answers = await asyncio.gather(*(self._answer(replica, ready) for replica in self.client.replicas.all))
        if ready.kind == "full" and self.client.served != ready.version:
            return
        for index, answer in enumerate(answers):
            if answer is not None:
                self._fresh = True
                self._judge(index, ready, answer)

    async def _answer(self, replica: Replica, ready: WeightsReady) -> Answer | None:
        """What one engine says; None when it does not, which is no proof of anything."""
        engine = self._engines[self.client.replicas.all.index(replica)]
        version = ready.version if ready.kind == "lora" else None
        try:
            asked = (self.client.prompt_logprobs(c.token_ids, version=version, replica=replica) for c in ready.canaries)
            answer = list(await asyncio.gather(*asked))
        except (EngineError, EngineUnavailable) as error:
            engine.unanswered += 1
            if engine.unanswered == SILENT:
                logger.warning("%s has not answered for the canaries of %d versions: %s", replica.url, SILENT, error)
            return None
        engine.unanswered = 0
        return answer

    def _judge(self, index: int, ready: WeightsReady, answer: Answer) -> None:
        engine, canaries = self._engines[index], ready.canaries
        differences = [np.subtract(said, canary.logprobs) for said, canary in zip(answer, canaries, strict=True)]
        engine.noise = float(np.abs(np.concatenate(differences)).mean())
        if engine.noise > NOISE_LIMIT and not engine.warned:
            engine.warned = True
            logger.warning(_noisy(self._name(index), ready.version, engine.noise))
        engine.step.add(_blocks(answer, canaries, [canary.before for canary in canaries]))
        against = engine.step.against()
        if against is not None:
            raise CanaryAlarm(_alarm(self._name(index), ready.version, against, f"the step from version {ready.version - 1}"))
        if all(canary.base for canary in canaries):
            engine.adapter.add(_blocks(answer, canaries, [canary.base for canary in canaries]))
            against = engine.adapter.against()
            if against is not None:
                raise CanaryAlarm(_alarm(self._name(index), ready.version, against, "the adapter"))

    def _name(self, index: int) -> str:
        return f"engine {index} ({self.client.replicas.all[index].url})"


def _blocks(answer: Answer, canaries: Sequence[Canary], origins: Sequence[Sequence[float]]) -> list[Blocks]:
    return [Blocks.of(e, canary, o) for e, canary, o in zip(answer, canaries, origins, strict=True)]


def _metrics(names: tuple[str, str, str], shares: Sequence[Shown | None]) -> dict[str, float]:
    """Of all engines that can be judged: the mean share, the lowest, and the largest standard error."""
    known = [share for share in shares if share is not None and share.error < UNSURE]
    if not known:
        return {}
    values = (fmean(k.share for k in known), min(k.share for k in known), max(k.error for k in known))
    return dict(zip(names, values, strict=True))


def _alarm(engine: str, version: int, found: Shown, what: str) -> str:
    over = f"{found.versions} versions" if found.versions > 1 else "this version"
    return (
        f"version {version}: {engine} holds the tensors that the trainer published and does not compute with them. Its logprobs "
        f"on canaries show {found.share:.2f} of {what}, standard error {found.error:.2g}, over {over}; 1 is right, 0 is "
        f"an engine without it, and below {found.limit:.2g} is an alarm. Rollouts would come from another policy. Look at what "
        "the engine's log says of adapters or modules that it ignores or evicts, at its temperature and scaling, and at "
        "mismatch/logprob_abs/mean in metrics.jsonl. `rl --resume` goes on from the last checkpoint, with trainer.canaries = 0 "
        "without this check"
    )


def _noisy(engine: str, version: int, noise: float) -> str:
    return (
        f"version {version}: logprobs of {engine} differ from the trainer's by {noise:.2g} nats a token on canaries, and "
        f"rounding explains less than {NOISE_LIMIT}. Look for a temperature, a type or a model that is not the trainer's"
    )
