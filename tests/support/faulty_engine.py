"""A real embedded engine in this process that computes with another adapter than the one it was told to load."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from aiohttp import web
from safetensors.torch import load_file, save_file

from turnwise.config import RLConfig
from turnwise.inference.embedded.build import build_server
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.transport import WeightsStore

HiddenFault = Literal["version before", "not applied", "half of it"]
"""Behind a right digest: every adapter is held as published."""
Fault = HiddenFault | Literal["none", "version before held"]


class FaultyDecoder(LeanDecoder):
    """Computes prompts with an adapter of its own choice."""

    fault: Fault
    published: WeightsStore

    def load_adapter(self, name: str, folder: Path) -> None:
        before = self.published.path(max(0, int(name[1:]) - 1))
        super().load_adapter(name, before if self.fault == "version before held" else folder)
        wrong = {"version before": before, "half of it": _half(folder)}
        super().load_adapter(_hidden(name), wrong.get(self.fault, folder))

    def prompt_logprobs(self, ids: Any, adapter: str | None) -> list[float]:
        unused = adapter is None or self.fault == "not applied"
        return super().prompt_logprobs(ids, None if unused or adapter is None else _hidden(adapter))


def _hidden(name: str) -> str:
    return f"{name} as it is computed with"


def _half(folder: Path) -> Path:
    """The adapter of the feed-forward blocks, and none of attention."""
    half = folder.with_name(f"{folder.name}-half")
    half.mkdir(exist_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: torch.zeros_like(value) if "self_attn" in name else value for name, value in tensors.items()}
    save_file(kept, half / "adapter_model.safetensors")
    (half / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return half


@asynccontextmanager
async def faulty_engine(config: RLConfig, store: WeightsStore, fault: Fault) -> AsyncGenerator[Sequence[str]]:
    """URLs of such an engine, which answers on the running event loop."""
    server = build_server(config)
    decoder: Any = server.engine.decoder
    decoder.__class__ = FaultyDecoder
    decoder.fault, decoder.published = fault, store
    runner = web.AppRunner(server.application(), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield [f"http://127.0.0.1:{runner.addresses[0][1]}"]
    finally:
        server.engine.stop()
        await runner.cleanup()
