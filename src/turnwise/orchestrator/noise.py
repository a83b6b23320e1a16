"""Noise in the norms of the policy that samples (AQN): how much for which version, and the proof that engines hold it.

Every worker reads its norms back after a change. Their number, the size of the change of each, and one digest for all workers
must be what was asked for; without noise the norms must be the clean ones to the bit.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.inference.noise import Schedule, Stage, noise_schedule
from turnwise.inference.wire import NoiseReport, NormReport
from turnwise.orchestrator.rollout import derive_seed

logger = logging.getLogger(__name__)

STANDARD_ERRORS = 8  # of a norm's sigma; in thousands of versions with a hundred norms each, one beyond 5 is to be expected
LOUD = 0.05  # of a norm's weights: with 0.04 a 135M model was 0.1 nats a token away from its clean self, with 0.2 it was 1.6
FAINT = 0.5  # share of elements that change, below which rounding has eaten most of the noise


class WrongNoise(Exception):
    """The norms of an engine are not what they should be: rollouts would come from another policy."""


class EngineNoise:
    """The noise of a run, as its engines hold it. Its methods are called while nothing runs there.

    Args:
        client: of the engines.
        schedule: stage and sigma of a version.
        seed: of the run.
        norms: that every worker must have.
        loudest: the largest sigma that the schedule has.
    """

    def __init__(self, client: InferenceClient, schedule: Schedule, *, seed: int, norms: int, loudest: float = 0.0) -> None:
        self.client, self.schedule, self.seed, self.norms, self.loudest = client, schedule, seed, norms, loudest
        self.stage = Stage(0, 0.0)  # of the version that samples
        self._sigma, self._changed, self._relative = 0.0, 0.0, 0.0  # what became of it: means over the norms
        self._clean: str | None = None  # digest of the norms without noise, once it is known
        self._held = 0.0  # sigma that engines hold now
        self._warned = False

    @classmethod
    def of(cls, config: RLConfig, client: InferenceClient, *, examples: int) -> "EngineNoise | None":
        """The noise of a resolved configuration with `examples` training tasks; None where it asks for none.

        Raises:
            ValueError: the schedule cannot be laid out, or the model's number of layers is not known.
        """
        if config.inference.noise is None:
            return None
        assert config.max_steps is not None
        settings = config.orchestrator
        steps_per_epoch = examples * settings.rollouts_per_example // settings.batch_size
        schedule = noise_schedule(config.inference.noise, max_steps=config.max_steps, steps_per_epoch=steps_per_epoch)
        noise = config.inference.noise
        loudest = max(noise.sigma_start, noise.sigma_end)
        return cls(client, schedule, seed=config.seed, norms=expected_norms(config.model.name), loudest=loudest)

    def due(self, version: int) -> bool:
        """Whether norms must change for a version to be sampled from."""
        return self._clean is None or self._held != 0 or self.schedule(version).sigma != 0

    async def apply(self, version: int) -> None:
        """Give the norms the noise of a version, the same for every engine and every time.

        Raises:
            WrongNoise: a worker holds something else now.
            EngineError, EngineUnavailable: an engine refused or did not answer.
        """
        stage = self.schedule(version)
        if self._clean is None or stage.sigma == 0:
            await self.clear()
        self._sigma = self._changed = self._relative = 0.0
        if stage.sigma != 0:
            reports = await self.client.apply_noise(stage.sigma, derive_seed(self.seed, "noise", version))
            self._held = stage.sigma
            norms = self._agreed(reports)
            for norm in norms:
                _check_size(norm, stage.sigma)
            self._sigma, self._changed = fmean(norm.sigma for norm in norms), fmean(norm.changed for norm in norms)
            self._relative = _relative(stage.sigma, norms)
            self._warn_if_faint(stage.sigma)
        self.stage = stage

    async def clear(self) -> None:
        """Take the noise away.

        Raises:
            WrongNoise: the norms of a worker are not the clean ones.
            EngineError, EngineUnavailable: an engine refused or did not answer.
        """
        reports = await self.client.apply_noise(0.0, 0)
        self._held = 0.0
        norms = self._agreed(reports)
        if self._clean is None:
            self._warn_if_loud(norms)
        digest = reports[0].digest
        if self._clean is not None and digest != self._clean:
            raise WrongNoise(
                f"without noise the engines' norms have the digest {digest[:16]}..., and before there was any it was "
                f"{self._clean[:16]}...; something else has changed them"
            )
        self._clean = digest

    def base_replaced(self) -> None:
        """The engines hold other base weights from now on, without noise."""
        self._clean = None

    def metrics(self) -> dict[str, float]:
        """Of the version that samples."""
        return {
            "noise/stage": float(self.stage.number),
            "noise/sigma": self.stage.sigma,
            "noise/effective_sigma/mean": self._sigma,
            "noise/changed/share": self._changed,
            "noise/relative_sigma/mean": self._relative,
        }

    def _agreed(self, reports: Sequence[NoiseReport]) -> list[NormReport]:
        """The norms, which must be the same for all workers."""
        for index, report in enumerate(reports):
            if len(report.norms) != self.norms:
                raise WrongNoise(
                    f"worker {index} found {len(report.norms)} RMSNorm weights outside attention, and this model has "
                    f"{self.norms}: two a layer, and the last one. Noise would reach some of them or none; models with other "
                    "norms are not supported, remove [inference.noise]"
                )
            if report.digest != reports[0].digest:
                raise WrongNoise(
                    f"the norms of worker {index} have the digest {report.digest[:16]}..., those of worker 0 "
                    f"{reports[0].digest[:16]}...: they would sample from different policies"
                )
        if not reports:
            raise WrongNoise("no worker said what its norms hold")
        return reports[0].norms

    def _warn_if_loud(self, norms: Sequence[NormReport]) -> None:
        """Before there is any noise: whether this model's norms will bear it."""
        share = _relative(self.loudest, norms)
        if share > LOUD:
            logger.warning(
                "noise of sigma %.2g is %.0f %% of this model's norm weights in the mean. From %.0f %% on, replies may come "
                "from a policy too far off to learn from: watch mismatch/kl/mean, and lower inference.noise.sigma_start where it "
                "exceeds 0.1",
                self.loudest,
                100 * share,
                100 * LOUD,
            )

    def _warn_if_faint(self, sigma: float) -> None:
        if self._changed < FAINT and not self._warned:
            self._warned = True
            logger.warning(
                "noise of sigma %.2g changes %.1f %% of the norm weights, by %.2g: the engine rounds it away in the type of its "
                "norms. With vLLM, inference.noise.float32_norms = true keeps it",
                sigma,
                100 * self._changed,
                self._sigma,
            )


def _relative(sigma: float, norms: Sequence[NormReport]) -> float:
    """Sigma as a share of the norms' clean weights, mean over the norms; one without weights has no share."""
    shares = [sigma / norm.magnitude for norm in norms if norm.magnitude > 0]
    return fmean(shares) if shares else 0.0


def expected_norms(model: str) -> int:
    """How many norms of a model get noise, by its config.json: two a decoder layer, and the last one.

    Args:
        model: a folder, or a hub id.

    Raises:
        ValueError: it does not say how many layers there are.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download  # late: a local folder needs no hub

        folder = Path(hf_hub_download(model, "config.json")).parent
    settings = json.loads((folder / "config.json").read_text())
    layers = {**settings, **settings.get("text_config", {})}.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ValueError(
            f"{folder}/config.json has no num_hidden_layers, so that noise cannot be proven; remove [inference.noise]"
        )
    return 2 * layers + 1


def _check_size(norm: NormReport, sigma: float) -> None:
    """Raises WrongNoise when a norm changed by less or more than chance and rounding explain."""
    margin = STANDARD_ERRORS * sigma / math.sqrt(2 * norm.elements) + norm.resolution
    if not abs(norm.sigma - sigma) <= margin:
        raise WrongNoise(
            f"noise of sigma {sigma:.3g} changed {norm.name} by {norm.sigma:.3g}; chance and rounding explain a difference of "
            f"{margin:.3g}, so the engine does not hold the noise that it was given"
        )
