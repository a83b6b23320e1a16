"""Do the engines serve what the trainer publishes? Version 1 is swapped in as in a run, and engines are asked before and after.

The share of the trainer's change that an engine shows is that of the canary alarm (`turnwise.orchestrator.evidence`): 1 for an
engine that computes with the new version, 0 for one that still computes with the old one, between for a part of it. The alarm
learns the noise of its numbers over many versions. Here there is one, but engines are also asked before the swap, when
they and the trainer compute the same: what they differ by then is the noise N (mean square, nats), and T is the mean square of
the trainer's change with its own noise. A right engine's share is at least 1 - N / T on average, with a standard error of
sqrt(N / T / n) over n independent values, for which blocks of tokens are taken.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TYPE_CHECKING

import numpy as np

from turnwise.diagnose.core import Check, CheckFailed, Finding, Verdict
from turnwise.diagnose.probe_report import Published
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.inference.replicas import Replica
from turnwise.orchestrator.evidence import HALF, Blocks, Shown, Vector, shown
from turnwise.orchestrator.weights import Policy, WrongWeights
from turnwise.transport import Canary, WeightsReady

if TYPE_CHECKING:
    from turnwise.diagnose.context import Context
    from turnwise.diagnose.session import Session

WRONG = 6.0  # standard errors of a right engine's share below what it is at least: by chance 1e-9
SURE = 3.0  # standard errors by which a share must be resolved from 0.5, to be called proof
PART = 0.25  # share from which on an engine shows a part of the change rather than none
REPLY_TOKENS = 4

Logprobs = Sequence[Sequence[float]]  # of token_ids[1:] of each canary


@dataclass(frozen=True)
class Answers:
    """What one engine said of the canaries, in nats."""

    url: str
    before: Logprobs  # while it served the version before
    after: Logprobs  # once it served the new one


@dataclass(frozen=True)
class Swapped:
    """What was seen while version 1 took the place of version 0."""

    ready: WeightsReady
    factor: float  # 1 for the update as it is; that many times as long for one that is to show above rounding
    answers: Sequence[Answers]  # of every engine
    spans: Sequence[tuple[int, int]]  # (version, tokens) of a reply that was sampled afterwards
    swap_s: float  # seconds until every engine served it, with the proof


@dataclass(frozen=True)
class Seen:
    """What one engine shows of the change from the version before; distances are root mean squares, in nats a token."""

    noise: float  # between engine and trainer under the version before
    change: float  # of the trainer, from one version to the other
    off_before: float  # between the engine under the version before and the trainer under the new one
    off_after: float  # between both under the new one
    shown: Shown | None  # None when the trainer's logprobs did not change at all

    @property
    def error(self) -> float:
        """Standard error of a right engine's share."""
        return inf if self.shown is None else self.noise / self.change / sqrt(self.shown.blocks)

    @property
    def wrong(self) -> bool:
        """Whether no right engine would show so little."""
        return self._below_by(WRONG)

    @property
    def doubtful(self) -> bool:
        """Whether a right engine would hardly ever show so little."""
        return self._below_by(SURE)

    @property
    def proven(self) -> bool:
        """Whether only an engine that computes with the new version shows so much."""
        found = self.shown
        return found is not None and found.share > found.limit and found.share - SURE * self.error > HALF

    def _below_by(self, errors: float) -> bool:
        found = self.shown
        return found is not None and found.share < found.limit and found.share < found.floor - errors * self.error


def seen(canaries: Sequence[Canary], answers: Answers) -> Seen:
    """Compare an engine's logprobs with the trainer's.

    Raises:
        ValueError: logprobs are of different numbers of tokens, or there are none.
    """
    new, old, before, after = (
        np.concatenate([np.asarray(values, dtype=np.float64) for values in logprobs])
        for logprobs in ([c.logprobs for c in canaries], [c.before for c in canaries], answers.before, answers.after)
    )
    blocks = [Blocks.of(said, canary, canary.before) for said, canary in zip(answers.after, canaries, strict=True)]
    noise, change = _rms(before - old), _rms(new - old)
    share = shown(Blocks.join(blocks), 1)
    if share is not None:
        share = replace(share, floor=max(HALF, 1 - (noise / change) ** 2))
    return Seen(noise, change, _rms(before - new), _rms(after - new), share)


def judge_swap(swapped: Swapped) -> Finding:
    """The verdict on every engine, whose digests have been proven by then."""
    ready, canaries = swapped.ready, swapped.ready.canaries
    found = [_Judged(i, a.url, swapped.factor, seen(canaries, a)) for i, a in enumerate(swapped.answers) if canaries]
    data = {"swap_s": swapped.swap_s, "factor": swapped.factor, "engines": [one.numbers() for one in found]}
    holds = f"holds the tensors that were published (digest {ready.digest[:12]}, {swapped.swap_s:.2g} s)"
    if [version for version, _ in swapped.spans] != [ready.version]:
        said = " and ".join(f"version {version}" for version, _ in swapped.spans) or "no version at all"
        evidence = f"a reply that was asked of version {ready.version} carries {said}"
        return Finding(Verdict.FAIL, evidence, "another client may use these engines; end it", data)
    for verdict, suspects in (
        (Verdict.FAIL, [one for one in found if one.seen.wrong]),
        (Verdict.WARN, [one for one in found if one.seen.doubtful]),
    ):
        for one in suspects:
            evidence = f"engine {one.engine} ({one.url}) {holds} and does not compute with them: it {one.words()}"
            return Finding(verdict, evidence, one.remedy(), data)
    who = "the engine" if len(swapped.answers) == 1 else f"each of {len(swapped.answers)} engines"
    unproven = [one for one in found if not one.seen.proven]
    if found and not unproven:
        least = min(found, key=lambda one: one.share)
        return Finding(Verdict.PASS, f"{who} {holds} and {least.words()}", data=data)
    why = unproven[0].drowned() if unproven else "the trainer sent no canaries"
    return Finding(Verdict.PASS, f"{who} {holds}; by that alone, since {why}", data=data)


@dataclass(frozen=True)
class _Judged:
    """What one engine shows, in words."""

    engine: int
    url: str
    factor: float
    seen: Seen

    @property
    def share(self) -> float:
        return 0.0 if self.seen.shown is None else self.seen.shown.share

    def words(self) -> str:
        long = "" if self.factor == 1 else f", made {self.factor:,.4g} times as long to show"
        return (
            f"shows {self.share:.2f} of the trainer's update{long} (1 is right, 0 the policy before): {self.seen.off_after:.2g} "
            f"nats a token off the new policy, {self.seen.off_before:.2g} before the swap"
        )

    def drowned(self) -> str:
        """Why logprobs cannot tell."""
        return (
            f"the trainer's logprobs before and after the update differ by {self.seen.change:.2g} nats a token, and engine and "
            f"trainer by {self.seen.noise:.2g} anyhow"
        )

    def remedy(self) -> str:
        part = "a part of it is missing" if self.share > PART else "it computes with the version before"
        return (
            f"{part}: look at what the engine's log says of adapters or modules that it ignores or evicts, at its scale "
            "(trainer.model.lora.alpha / rank) and target_modules"
        )

    def numbers(self) -> dict[str, float | bool | str]:
        names = ("noise", "change", "off_before", "off_after", "proven")
        return {"url": self.url, "share": self.share, **{name: getattr(self.seen, name) for name in names}}


def _rms(values: Vector) -> float:
    return float(np.sqrt(np.square(values).mean()))


def swap_in(session: "Session", published: Published, prompt_ids: Sequence[int]) -> Swapped:
    """Have the engines of a session serve version 1, as a run does, and ask for the canaries before and after.

    Args:
        session: whose engines serve version 0.
        published: by the trainer.
        prompt_ids: of a reply that is sampled afterwards.

    Raises:
        CheckFailed: engines refuse the version, do not hold what was published, or do not answer.
    """
    try:
        return session.run(_swap_in(session.policy, published, prompt_ids))
    except WrongWeights as error:
        remedy = (
            "engine and trainer must read the same files: look whether their folder is the same disk, and whether that is full"
        )
        raise CheckFailed(str(error), remedy) from error
    except (EngineError, EngineUnavailable) as error:
        remedy = "look at the engine's log: it may refuse an adapter's modules or its rank, or have run out of memory"
        raise CheckFailed(f"version {published.ready.version} could not be served: {error}", remedy) from error


async def _swap_in(policy: Policy, published: Published, prompt_ids: Sequence[int]) -> Swapped:
    ready, replicas = published.ready, policy.client.replicas.all
    before = [await _ask(policy, ready, replica) for replica in replicas]
    await policy.swap(ready)
    after = [await _ask(policy, ready, replica) for replica in replicas]
    sample = policy.generator(temperature=1.0, affinity="check")
    reply = await sample(prompt_ids, REPLY_TOKENS, 0)
    answers = [Answers(replica.url, b, a) for replica, b, a in zip(replicas, before, after, strict=True)]
    return Swapped(ready, published.factor, answers, reply.spans, policy.swap_s)


async def _ask(policy: Policy, ready: WeightsReady, replica: Replica) -> Logprobs:
    """An engine's logprobs of a version's canaries, under the version that it serves."""
    version = policy.version if policy.kind == "lora" else None
    asked = (policy.client.prompt_logprobs(c.token_ids, version=version, replica=replica) for c in ready.canaries)
    return await asyncio.gather(*asked)


def _run(context: "Context") -> Finding:
    finding = judge_swap(context.swapped)
    _ = context.footprint  # `memory` wants it, and comes when the engines are gone
    if context.config.weight_transfer == "broadcast":
        note = "; by files here, where no trainer stays to broadcast: a run broadcasts, with the same proof of every version"
        return replace(finding, evidence=finding.evidence + note)
    return finding


SERVED = Check("served", "Do the engines serve what the trainer publishes?", needs=("rollouts", "update"), run=_run)
