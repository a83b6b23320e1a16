"""Noise in the RMSNorm weights of an engine's model (AQN; QeRL, arXiv 2510.11696).

Runs inside the worker that holds the model: vLLM's, or the embedded engine. Imports nothing of either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from turnwise.transport.digest import Digest

KIND = "RMSNorm"  # in the name of the class, or of one it derives from: engines have classes of their own
INSIDE = ("attn", "attention")  # in the name of a parent: norms of queries and keys, as Qwen3's, are left out


class Norm(Protocol):
    """A norm of the model: where its weight lies."""

    @property
    def name(self) -> str:
        """What it is called in the Hugging Face model."""
        ...

    def read(self) -> Tensor:
        """The weight that requests compute with."""
        ...

    def write(self, value: Tensor) -> None:
        """Have requests compute with this weight; it is cast where the norm needs another type."""
        ...


class ModuleNorm:
    """A norm that is a module of torch. Its weight keeps its address, which CUDA graphs hold, and its type."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self._module = name, module

    def read(self) -> Tensor:
        return self._module.weight.detach()

    def write(self, value: Tensor) -> None:
        self._module.weight.detach().copy_(value)


def module_norms(model: torch.nn.Module) -> list[ModuleNorm]:
    """The norms of a model that get noise: those of its layers and the last one, but not those inside attention.

    They are found by the name of their class. A search for the class of transformers would find none in vLLM, and say nothing.
    """
    return [ModuleNorm(name, module) for name, module in model.named_modules() if _is_norm(module) and gets_noise(name)]


def gets_noise(name: str) -> bool:
    """Whether a norm of this name is outside attention."""
    return not any(word in parent for parent in name.split(".")[:-1] for word in INSIDE)


def _is_norm(module: torch.nn.Module) -> bool:
    named = any(KIND in kind.__name__ for kind in type(module).__mro__)
    return named and "weight" in dict(module.named_parameters(recurse=False))


@dataclass(frozen=True)
class _Kept:
    """Of one norm with noise, in memory of its own: what it was before, and what was left there."""

    clean: Tensor
    written: Tensor


class NormNoise:
    """Adds noise to norms and takes it away again. It adds to kept copies of the clean weights, so that nothing piles up."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    @torch.no_grad()
    def apply(self, norms: Sequence[Norm], sigma: float, seed: int) -> dict[str, Any]:
        """Set each norm to its clean weight plus N(0, sigma), or for sigma = 0 to its clean weight, to the bit.

        The noise is a function of seed and name alone, the same on every rank and device. A weight that is not what was left
        here has been loaded anew, and is the clean one from now on. Nothing may be running.

        Returns:
            What the norms hold now, read back: `digest` over their weights, and for each of `norms` its `name`, how many
            `elements` it has, `sigma`, the root mean square of what they differ by from the clean ones, `changed`, the share of
            elements that differ at all, `resolution`, how far rounding may have moved `sigma`, and `magnitude`, the root mean
            square of its clean weight.
        """
        digest = Digest()
        reports: list[dict[str, Any]] = []
        for norm in norms:
            clean = self._clean(norm)
            norm.write(clean if sigma == 0 else clean.float() + sigma * gaussian(norm.name, clean, seed))
            now = norm.read()
            self._kept.pop(norm.name, None)
            if sigma != 0:
                self._kept[norm.name] = _Kept(clean, now.clone())
            digest.add(norm.name, now)
            reports.append(_report(norm.name, now, clean))
        return {"digest": digest.hexdigest(), "norms": reports}

    def _clean(self, norm: Norm) -> Tensor:
        """A weight without noise, not shared with the norm."""
        now, kept = norm.read(), self._kept.get(norm.name)
        if kept is not None and now.dtype == kept.written.dtype and torch.equal(now, kept.written):
            return kept.clean
        return now.clone()


def gaussian(name: str, like: Tensor, seed: int) -> Tensor:
    """Standard normal float32 numbers in the shape and on the device of `like`. numpy draws the same ones on every machine."""
    key = int.from_bytes(blake2b(repr((seed, name)).encode(), digest_size=16).digest(), "big")
    numbers = np.random.Generator(np.random.Philox(key=key)).standard_normal(like.numel(), dtype=np.float32)
    return torch.from_numpy(numbers).view(like.shape).to(like.device)


def _report(name: str, now: Tensor, clean: Tensor) -> dict[str, Any]:
    change = (now.double() - clean.double()).cpu()
    half_step = torch.finfo(now.dtype).eps / 2  # of a number, relative to it
    return {
        "name": name,
        "elements": now.numel(),
        "sigma": float(change.square().mean().sqrt()),
        "changed": float((change != 0).double().mean()),
        "resolution": half_step * float(now.double().square().mean().sqrt()),
        "magnitude": float(clean.double().square().mean().sqrt()),
    }
