"""The probe with a fault in the trainer that it looks at: `planted_probe.py FAULT --config … --batch … --out …` in its place.

A fault is a function of `setattr`, or of what takes its arguments (`monkeypatch.setattr`).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from turnwise.diagnose import probe
from turnwise.trainer import step
from turnwise.trainer.adamw import AdamW
from turnwise.trainer.loss import LossOutput, policy_loss
from turnwise.trainer.model import Policy
from turnwise.trainer.step import Learner

Patch = Callable[[Any, str, Any], None]

LAYER = "model.layers.0.self_attn.q_proj"


def _after_start(patch: Patch, change: Callable[[Learner], None]) -> None:
    start = Learner.__init__

    def init(self: Learner, *args: Any) -> None:
        start(self, *args)
        change(self)

    patch(Learner, "__init__", init)


def frozen_adapter(patch: Patch) -> None:
    """Somebody freezes the whole model after the adapters were made."""
    _after_start(patch, lambda learner: learner.policy.requires_grad_(False) and None)


def frozen_layer(patch: Patch) -> None:
    """One layer's adapter does not train."""

    def freeze(learner: Learner) -> None:
        for name, parameter in learner.policy.model.named_parameters():
            if name.startswith(LAYER):
                parameter.requires_grad_(False)

    _after_start(patch, freeze)


def forgotten_layer(patch: Patch) -> None:
    """The optimiser does not have one layer's adapter."""

    def forget(learner: Learner) -> None:
        lost = {id(parameter) for name, parameter in learner.parameters.items() if name.startswith(LAYER)}
        learner.optimizer = AdamW([p for p in learner.trained if id(p) not in lost], learner.config.trainer.optim)

    _after_start(patch, forget)


def thawed_base(patch: Patch) -> None:
    """The embeddings train beside the adapter."""
    _after_start(patch, lambda learner: learner.policy.model.get_input_embeddings().requires_grad_(True) and None)


def dropped_gradient(patch: Patch) -> None:
    """A hook throws away the gradient of one A."""
    _after_start(patch, lambda learner: learner.parameters[f"{LAYER}.lora_A"].register_hook(torch.zeros_like) and None)


def nonfinite_loss(patch: Patch) -> None:
    """0 / 0 somewhere in the loss."""
    _scaled_loss(patch, lambda loss: loss * float("nan"))


def ignored_temperature(patch: Patch) -> None:
    """The trainer takes the logits as they are."""
    stats = Policy.stats

    def at_one(self: Policy, batch: Any, *, temperature: float, entropy_grad: bool = False) -> Any:
        return stats(self, batch, temperature=1.0, entropy_grad=entropy_grad)

    patch(Policy, "stats", at_one)


def wrong_backward(patch: Patch) -> None:
    """The gradient is twice that of the loss."""
    _scaled_loss(patch, lambda loss: 2 * loss - loss.detach())


def flipped_loss(patch: Patch) -> None:
    """The loss has the wrong sign, and a gradient that agrees with it."""
    _scaled_loss(patch, lambda loss: -loss)


def _scaled_loss(patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def changed(*args: Any, **options: Any) -> LossOutput:
        output = policy_loss(*args, **options)
        return LossOutput(change(output.loss), output.metrics)

    patch(step, "policy_loss", changed)


def zero_learning_rate(patch: Patch) -> None:
    """The schedule gives 0."""
    patch(step, "learning_rate", lambda *_: 0.0)


def lost_update(patch: Patch) -> None:
    """The optimiser works on copies."""
    patch(AdamW, "step", lambda self: torch.zeros((), dtype=torch.float64))


FAULTS = {
    fault.__name__: fault
    for fault in (
        frozen_adapter,
        frozen_layer,
        forgotten_layer,
        thawed_base,
        dropped_gradient,
        nonfinite_loss,
        ignored_temperature,
        wrong_backward,
        flipped_loss,
        zero_learning_rate,
        lost_update,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)](setattr)
    probe.end(probe.main())
