"""One rank of a model whose packed weights FSDP2 shards, beside the same model whole; prints what it saw as JSON.

Started by torchrun: sharded_worker.py FOLDER [compile].
"""

import gc
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from turnwise.kernels.mxfp4 import MXFP4Linear
from turnwise.kernels.mxfp4.sharded import ShardedMXFP4Linear, shard_packed

WIDTH, INNER = 64, 100  # 100 rows are no multiple of 3


class Block(nn.Module):
    """Two packed layers, and parameters that train."""

    def __init__(self) -> None:
        super().__init__()
        self.up = MXFP4Linear.from_linear(nn.Linear(WIDTH, INNER))
        self.gate = MXFP4Linear.from_linear(nn.Linear(WIDTH, INNER, bias=False))
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return y.detach(), [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def compare(compiled: bool) -> dict[str, Any]:
    """Passes of the sharded model beside those of the whole one."""
    ranks = dist.get_world_size()
    whole, sharded = build(), build()
    shard_packed(sharded, ranks)
    if compiled:
        for block in sharded:
            block.compile(backend="aot_eager", fullgraph=True)
    mesh = init_device_mesh("cpu", (ranks,))
    for module in (*sharded, sharded):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(float(ranks))
        module.set_force_sum_reduction_for_comms(True)
    layer = sharded[0].up
    assert isinstance(layer, ShardedMXFP4Linear)
    gathered: list[Tensor] = []
    if not compiled:
        layer.register_forward_pre_hook(lambda module, _: gathered.append(module.weight.packed))
    torch.manual_seed(1)
    x = torch.randn(6, WIDTH)
    y, grads = gradients(whole, x)
    steps = [gradients(sharded, x) for _ in range(2)]
    try:
        refusal = str(layer.weight_packed)
    except RuntimeError as error:
        refusal = str(error)
    local = layer.weight.to_local()
    return {
        "equal": [torch.equal(result, y) for result, _ in steps],
        "gradients": [
            max((a - b).norm().item() / b.norm().item() for a, b in zip(result, grads, strict=True)) for _, result in steps
        ],
        "local": [list(local.packed.shape), list(local.scales.shape)],
        "bytes_after": sum(tensor.untyped_storage().size() for tensor in gathered),
        "gathered": len(gathered),
        "refusal": refusal,
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    result = compare("compile" in sys.argv[2:])
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
