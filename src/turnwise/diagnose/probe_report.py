"""What the trainer's processes measured on a batch: written by `turnwise.diagnose.probe`, judged by `trainer_checks`."""

import json
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from turnwise.transport import WeightsReady, write_atomic


class Setting(Struct, frozen=True, kw_only=True):
    """What was measured, and where."""

    samples: int  # of the batch, that were trained on
    given_samples: int  # of the batch, with a sampled token
    tokens: int  # sampled ones in those samples
    temperature: float  # of the rollouts
    loss: str  # trainer.loss.kind
    dtype: str  # in which the policy computes, "bfloat16"
    published_dtype: str  # in which engines read it
    adapter: bool  # LoRA; all parameters train when False
    dropout: float  # of the adapter
    quantised: bool  # linear layers of the policy in MXFP4
    ranks: int
    device: str  # "cpu", or the GPU's name


class Agreement(Struct, frozen=True):
    """Two logprobs of every sampled token, a less b; nats."""

    mean: float  # of the absolute difference
    largest: float
    bias: float  # mean difference
    kl: float  # KL(b || a) a token, by k3, for tokens drawn from b
    correlation: float


class Scanned(Struct, frozen=True):
    """Mean absolute difference from the softmax of the trainer's logits under another hypothesis; nats."""

    value: float  # a temperature, or a shift in tokens
    engine: float  # of what the engine recorded
    trainer: float  # of what the trainer's own function says


class Logprobs(Struct, frozen=True):
    """Logprobs of the sampled tokens before any update: the trainer's less those that the engine recorded."""

    agreement: Agreement
    temperatures: list[Scanned]
    shifts: list[Scanned]  # recorded ones beside those of the sampled token so many places later, at the batch's temperature
    seconds: float  # of one forward pass over the samples


class Gradient(Struct, frozen=True, kw_only=True):
    """The gradient of the batch's loss, by tensor. Names are those of the model."""

    expected: int  # tensors that the configuration says train
    frozen: list[str]  # of those, that do not
    unexpected: list[str]  # train, and should not
    unheld: list[str]  # train, and the optimiser does not have them
    missing: list[str] = []  # got no gradient at all
    stray: list[str] = []  # frozen, and got a gradient
    norms: dict[str, float] = {}  # before clipping
    awake: dict[str, float] = {}  # of an adapter whose B is not 0, on a few samples: at the first step A's gradient is 0
    norm: float = 0.0  # of all, before clipping
    max_norm: float | None = None  # trainer.optim.max_grad_norm
    loss: float = 0.0
    seconds: float = 0.0  # forward and backward passes over the samples


class Difference(Struct, frozen=True):
    """A directional derivative of the loss, twice."""

    direction: str
    autograd: float
    numeric: float  # central difference in float64
    error: float  # |difference| / the larger of the two


class Differences(Struct, frozen=True):
    """The gradient beside finite differences, on a small float64 copy of the architecture with random weights."""

    directions: list[Difference] = []
    copy: str = ""  # what it is, in words
    trouble: str = ""  # why there is none


class Merged(Struct, frozen=True):
    """What an adapter's update amounts to in the weights that it is added to, over some layers."""

    ratio: float  # median of |scale B A| / |W|, Frobenius norms
    changed: int  # weights that would change if the update were merged into W in W's type
    weights: int


class Counted(Struct, frozen=True):
    """Weights that have changed after the same change of the float32 ones was added so many times."""

    steps: int
    changed: int


class Update(Struct, frozen=True, kw_only=True):
    """One optimiser step on the gradient above, at the learning rate that holds after the warm-up."""

    lr: float
    first_lr: float  # of step 1
    after_warmup: int  # the step that `lr` is that of
    steps: int | None  # max_steps
    full_steps: float | None  # the same, each weighed with its learning rate / `lr`
    applied: bool  # the optimiser took the gradient: its norm was finite and not 0
    norm: float  # of the change
    finite: bool  # all weights are, afterwards
    ratios: dict[str, float]  # |change| / |weight| by tensor; those that were 0 before are left out
    still: list[str]  # tensors with a gradient, of which no weight changed
    weights: int  # float32 ones with a gradient that is not 0
    changed: int  # of them, that are another number now
    published: list[Counted]  # of them, that are another number in the type in which they are published, after so many such steps
    step_share: (
        float  # mean |change| / lr of those weights; 1 for the first step of AdamW, unless gradients are as small as its eps
    )
    merged: Merged | None = None  # of an adapter


class Scaled(Struct, frozen=True):
    """The same change of the weights, so many times as long."""

    factor: float
    predicted: float
    observed: float
    kl: float


class Rewarded(Struct, frozen=True, kw_only=True):
    """What the update did to the sampled tokens. Sums over tokens of weight x advantage x change of logprob, with the weights of
    the loss's kind; to first order that is minus the change of the loss."""

    predicted: float  # minus (gradient . change of the weights)
    observed: float
    noise: float  # standard deviation of `observed` from rounding alone
    scale: float  # sum of weight x |advantage|
    positive: float  # mean change of logprob where the advantage is positive; nats
    negative: float
    positives: int
    negatives: int
    change: float  # mean |change| of a logprob; nats, rounding included
    kl: float  # KL(before || after) a token, by k3
    scaled: Scaled | None = None  # where the change drowns in rounding, or went the wrong way


class Published(Struct, frozen=True):
    """Version 1, which engines can load from its folder."""

    ready: WeightsReady  # with canaries: the trainer's logprobs before and after
    factor: float  # 1: the update as it is; larger: the same, so many times as long, to show above rounding
    seconds: float  # of the publication


class Memory(Struct, frozen=True):
    """Of one rank, in GiB."""

    peak: float  # tensors on a GPU; on a CPU all that the process took
    total: float  # of the device


class Rehearsal(Struct, frozen=True):
    """The longest micro-batches, forward and backward."""

    budget: int  # tokens of a micro-batch
    seconds: float = 0.0
    memory: list[Memory] = []  # by rank
    skipped: str = ""  # why it was not done


class Cost(Struct, frozen=True, kw_only=True):
    """Seconds and tokens, to foresee a whole run by."""

    tokens: int  # inputs that the samples' passes computed, over all ranks: prompts that samples share count once
    batch_tokens: int  # the same for the whole batch
    load_s: float
    update_s: float
    memory: list[Memory]  # by rank, after the update and before the rehearsal


class ProbeReport(Struct, frozen=True, kw_only=True):
    """All measurements; None where one was not reached."""

    setting: Setting
    stage: str = ""  # what was being measured when this was written; empty at the end
    failure: str = ""  # what ended the processes before that
    log: str = ""  # their log
    tail: list[str] = field(default_factory=list[str])  # its last lines, after a failure
    logprobs: Logprobs | None = None
    gradient: Gradient | None = None
    differences: Differences | None = None
    update: Update | None = None
    rewarded: Rewarded | None = None
    published: Published | None = None
    cost: Cost | None = None
    rehearsal: Rehearsal | None = None


def write_report(path: Path, report: ProbeReport) -> None:
    """Put a report into place, whole. Raises OSError."""
    # Python's JSON knows NaN, which the standard's does not: a gradient that is not finite must be told
    write_atomic(path, json.dumps(msgspec.to_builtins(report)).encode())


def read_report(path: Path) -> ProbeReport:
    """Raises FileNotFoundError; ValueError when the file is no report."""
    content: Any = json.loads(path.read_bytes())
    try:
        return msgspec.convert(content, ProbeReport)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path} is no report of a probe: {error}") from error
