"""`[orchestrator]`: environments, rollouts, advantages, evaluation."""

from typing import Any, Literal

from pydantic import Field

from turnwise.config.base import Config


class SamplingConfig(Config):
    """How training rollouts are sampled. There is no top-p and no top-k: they would bias the gradient."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in the engine and in the trainer alike."""

    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of one reply (one turn)."""

    request_seeds: bool | None = None
    """Give each request of a training rollout a seed of its own. vLLM then draws the noise of every row by itself, some
    microseconds each in every step of decoding, and does not repeat its replies to the bit all the same; so not there when unset,
    but with the embedded engine. Evaluations always have seeds."""


class RewardConfig(Config):
    """How reward components become one number."""

    mode: Literal["dense", "sparse"] = "dense"
    """`dense` pays components as they occur; `sparse` pays the environment's outcome components at the end."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Factor of each named component; 1 where none is given, 0 switches one off."""


class EnvConfig(Config):
    """One environment of the training mixture."""

    id: str
    """Registered name (`wordle`), or `package.module:Class`."""

    name: str | None = None
    """Name in metrics; the id's last part when unset."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment."""

    reward: RewardConfig = RewardConfig()

    weight: float = Field(default=1.0, gt=0)
    """Share of this environment in the stream of training tasks."""

    max_turns: int | None = Field(default=None, ge=1)
    """Most replies of one rollout; the environment's own limit when unset."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit of one `reset` or `step`, in seconds; a longer one makes an errored rollout."""


class EvalConfig(Config):
    """Evaluation on held-out tasks: before the first step, every `interval` steps, and always at the end."""

    interval: int | None = Field(default=None, ge=1)
    """Steps between evaluations; only at the start and at the end when unset."""

    num_examples: int | None = Field(default=None, ge=1)
    """Held-out tasks evaluated; all when unset."""

    rollouts_per_example: int = Field(default=1, ge=1)
    """Rollouts of each held-out task."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature in evaluation; 0 is greedy."""

    at_start: bool = True
    """Evaluate the untrained policy too, so that there is a before."""

    split: str = "validation"
    """Task split that is evaluated."""


class FilterConfig(Config):
    """Which groups never reach the trainer."""

    zero_variance: bool = True
    """Drop groups whose rewards are all equal: they carry no gradient."""

    dynamic_sampling: bool = False
    """Replace dropped groups by new ones until the batch is full (DAPO); they use up no step."""

    max_rounds: int = Field(default=10, ge=1)
    """With dynamic sampling: a run stops with an explanation after generating this many batches' worth for one batch.
    Without it: after this many batches in a row without a single group that carries signal."""


class OverlongConfig(Config):
    """DAPO's overlong penalty, min(0, -(tokens - (max_tokens - buffer)) / buffer * factor): each reply pays at its own turn."""

    buffer: int = Field(default=128, ge=1)
    """Tokens before the limit over which the penalty grows from 0 to `factor`."""

    factor: float = Field(default=1.0, gt=0)
    """Penalty of a reply that reaches the limit, in units of reward."""

    max_tokens: int | None = Field(default=None, ge=1)
    """The limit; `orchestrator.sampling.max_tokens` when unset."""


class AdvantageConfig(Config):
    """How rewards become advantages."""

    kind: Literal["grpo", "grpo_nostd", "rloo"] = "grpo"
    """`grpo`: centred and divided by the group's std; `grpo_nostd`: centred (Dr. GRPO); `rloo`: leave-one-out."""

    per_turn: bool = False
    """Credit each turn with the return from that turn on, instead of the whole rollout's total."""


class BufferConfig(Config):
    """How training tasks are drawn."""

    kind: Literal["epochs", "difficulty"] = "epochs"
    """`epochs`: every task once per shuffled pass; `difficulty`: tasks away from floor and ceiling more often."""

    tasks: list[str] = Field(default_factory=list)
    """Train on these tasks alone, by their ids, or by `environment/id` where several environments have the same id: to overfit
    one task, or to look at one that goes wrong. Environments without any of them take no part, and evaluation knows nothing of
    it. All tasks when empty."""


class OrchestratorConfig(Config):
    """Collects rollouts and turns them into batches."""

    env: list[EnvConfig] = Field(default_factory=list)
    """Environments of the training mixture, each a `[[orchestrator.env]]` table."""

    batch_size: int = Field(default=32, ge=2)
    """Rollouts per optimiser step."""

    rollouts_per_example: int = Field(default=8, ge=2)
    """Rollouts of one task. Advantages are centred inside this group."""

    max_staleness: int = Field(default=1, ge=0)
    """Trainer steps a sample may lag behind the policy that trains on it; 0 waits for every version."""

    max_inflight: int | None = Field(default=None, ge=1)
    """Rollouts in progress over all replicas; `batch_size * (max_staleness + 1)` when unset."""

    max_error_retries: int = Field(default=2, ge=0)
    """Repetitions of a rollout that ended with an error before its group goes on without it."""

    max_error_share: float = Field(default=0.5, gt=0, le=1)
    """Share of errored rollouts over the last batches above which the run stops with the reasons."""

    straggler_timeout_s: float | None = Field(default=None, gt=0)
    """A rollout older than this many seconds is cut and errored; no limit when unset. With `[inference.noise]` the time for which
    an evaluation holds it back counts."""

    straggler_factor: float | None = Field(default=2.0, ge=1)
    """A group that takes longer than this many times the median of recent groups no longer holds a place: another begins in its
    stead, and the slow one goes into a later batch, or is dropped once it is too old. None do when unset, or with
    `max_staleness = 0`, where batches do not depend on who is done first; `straggler_timeout_s` helps there."""

    overlong: OverlongConfig | None = None
    """Set the table to make long replies pay: component `overlong` of the reward, under either reward mode, in training and in
    evaluation. The metric `acc` does not contain it."""

    filters: FilterConfig = FilterConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    buffer: BufferConfig = BufferConfig()
    sampling: SamplingConfig = SamplingConfig()
    eval: EvalConfig = EvalConfig()
    eval_env: list[EnvConfig] = Field(default_factory=list)
    """Environments of the evaluation; the training ones, on their held-out split, when empty."""

    @property
    def inflight_limit(self) -> int:
        """Most rollouts in progress: `max_inflight`, or what fills every batch that may be under way."""
        return self.max_inflight or self.batch_size * (self.max_staleness + 1)

    @property
    def overlong_limit(self) -> int:
        """Tokens at which a reply pays the whole overlong penalty."""
        given = self.overlong.max_tokens if self.overlong else None
        return given or self.sampling.max_tokens
