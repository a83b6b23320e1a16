"""A scripted engine with real norms, so that what it reports about noise is measured and not made up."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from aiohttp import web
from torch import Tensor, nn

from support.scripted_engine import ScriptedEngine
from turnwise.inference.norms import ModuleNorm, Norm, NormNoise, module_norms


class RMSNorm(nn.Module):
    """Called as vLLM's, and no relative of that of transformers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Attention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(torch.ones(size)), RMSNorm(torch.ones(size))


class Layer(nn.Module):
    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, RMSNorm(1 + 0.1 * torch.randn(size, generator=generator)))


class Model(nn.Module):
    """The norms of a decoder in the layout of Qwen3, and nothing else."""

    def __init__(self, *, layers: int = 2, size: int = 256, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(Layer(size, generator) for _ in range(layers))
        self.norm = RMSNorm(1 + 0.1 * torch.randn(size, generator=generator))


def bare(**options: int) -> nn.Module:
    """The model under the name that checkpoints give it."""
    return nn.ModuleDict({"model": Model(**options)})


class Deaf(ModuleNorm):
    """Planted: takes what is written and keeps what it has."""

    def write(self, value: Tensor) -> None: ...


@dataclass
class NoisyEngine(ScriptedEngine):
    """Its replies have the logprob -1 - sigma, with the sigma that its norms hold then.

    `deaf` norms do not change, `adds_up` forgets to begin from clean weights, `blind` finds none.
    """

    workers: int = 1
    deaf: frozenset[str] = frozenset()
    adds_up: bool = False
    blind: bool = False
    applied: list[tuple[float, int]] = field(default_factory=list)  # (sigma, seed) in order
    answered: list[tuple[float, str, float]] = field(default_factory=list)  # (temperature, model, sigma) of every answer

    def __post_init__(self) -> None:
        self.models = [bare() for _ in range(self.workers)]
        self.noises = [NormNoise() for _ in range(self.workers)]
        self.seed_shift = 0  # planted: what each further worker adds to the seed

    def _answer(self, body: dict[str, Any], ids: Sequence[int], reason: str) -> dict[str, Any]:
        if ids:
            self.answered.append((body["temperature"], body["model"], -1 - self.logprob))
        return super()._answer(body, ids, reason)

    async def _rpc(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        if body["method"] != "apply_noise":
            return await super()._rpc(request)
        sigma, seed = body["args"]
        self.admin.append(f"apply_noise {sigma:.3g}")
        self.applied.append((sigma, seed))
        self.logprob = -1 - sigma
        reports = [self._apply(worker, sigma, seed + worker * self.seed_shift) for worker in range(self.workers)]
        return web.json_response({"results": reports})

    def _apply(self, worker: int, sigma: float, seed: int) -> dict[str, object]:
        model = self.models[worker]
        if self.adds_up:
            before = {norm.name: norm.read().clone() for norm in module_norms(model)}
            self.originals = getattr(self, "originals", before)
            NormNoise().apply(module_norms(model), sigma, seed)
            held = {norm.name: norm.read().clone() for norm in module_norms(model)}
            return self._as_if_from(self.originals, held)
        norms: Sequence[Norm] = [
            Deaf(n.name, model.get_submodule(n.name)) if n.name in self.deaf else n for n in module_norms(model)
        ]
        return self.noises[worker].apply([] if self.blind else norms, sigma, seed)

    def _as_if_from(self, clean: dict[str, Tensor], held: dict[str, Tensor]) -> dict[str, object]:
        norms = [
            {
                "name": name,
                "elements": weight.numel(),
                "sigma": float((weight - clean[name]).square().mean().sqrt()),
                "changed": 1.0,
                "resolution": 1e-6,
                "magnitude": 1.0,
            }
            for name, weight in held.items()
        ]
        return {"digest": "piled up", "norms": norms}
