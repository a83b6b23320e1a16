"""Layers with the class names, attributes and division among ranks of vLLM's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PADDING = 4  # the vocabulary is padded to a multiple of this and of the ranks


class UnquantizedLinearMethod:
    def apply(self, layer: "LinearBase", x: Tensor, bias: Tensor | None) -> Tensor:
        return layer.cpu_linear(x, layer.weight, bias)

    def process_weights_after_loading(self, layer: "LinearBase") -> None:
        """What a CPU does: pack the weight and drop it."""
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: nn.functional.linear(x, packed, bias)
        if "Embedding" not in type(self).__name__:
            layer.weight = nn.Parameter(torch.empty(0, dtype=packed.dtype), requires_grad=False)


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod): ...


class LinearBase(nn.Module):
    """`slices`: rows and columns of each slice of the weight on this rank."""

    slices: list[tuple[int, int]]

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, world
        self.quant_method = UnquantizedLinearMethod()

    def fill(self, parts: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> None:
        self.slices = [(part.shape[0], part.shape[1]) for part in parts]
        self.input_size_per_partition = parts[0].shape[1]
        self.weight = nn.Parameter(torch.cat(list(parts)), requires_grad=False)
        self.weight.weight_loader = self.load
        known = [bias for bias in biases if bias is not None]
        self.bias = nn.Parameter(torch.cat(known), requires_grad=False) if known else None

    def load(self, parameter: Tensor, tensor: Tensor) -> None:
        raise NotImplementedError


class ColumnParallelLinear(LinearBase):
    output_sizes: list[int]
    output_size: int

    def shard(self, tensor: Tensor, index: int) -> Tensor:
        return tensor.chunk(self.tp_size)[self.tp_rank]


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, weights: Sequence[Tensor], rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.output_sizes = [len(weight) for weight in weights]
        self.output_size = sum(self.output_sizes)
        self.fill([self.shard(weight, index) for index, weight in enumerate(weights)])


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        rank: int,
        world: int,
        *,
        heads: tuple[int, int, int],
    ) -> None:
        super().__init__(rank, world)
        total, total_kv, self.head_size = heads
        self.num_heads, self.num_kv_heads = total // world, max(1, total_kv // world)
        self.num_kv_head_replicas = max(1, world // total_kv)
        self.output_size = (self.num_heads + 2 * self.num_kv_heads) * self.head_size * world
        parts = [self.shard(weight, index) for index, weight in enumerate(weights)]
        self.fill(parts, [None if bias is None else self.shard(bias, index) for index, bias in enumerate(biases)])

    def shard(self, tensor: Tensor, index: int) -> Tensor:
        """Neighbouring ranks share a key and value head where there are more ranks than heads."""
        replicas = self.num_kv_head_replicas if index else 1
        return tensor.chunk(self.tp_size // replicas)[self.tp_rank // replicas]


class RowParallelLinear(LinearBase):
    def __init__(self, weight: Tensor, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.fill([self.shard(weight)])

    def shard(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.tp_size, 1)[self.tp_rank]


class VocabParallelEmbedding(nn.Module):
    def __init__(self, weight: Tensor, rank: int, world: int) -> None:
        super().__init__()
        self.tp_size, self.org_vocab_size, self.embedding_dim = world, len(weight), weight.shape[1]
        self.num_added_embeddings = 0
        self.quant_method = UnquantizedEmbeddingMethod()
        rows = -(-len(weight) // (PADDING * world)) * PADDING * world
        padded = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
        self.weight = nn.Parameter(padded.chunk(world)[rank].clone(), requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, parameter: Tensor, tensor: Tensor) -> None:
        raise NotImplementedError


class ParallelLMHead(VocabParallelEmbedding): ...


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
