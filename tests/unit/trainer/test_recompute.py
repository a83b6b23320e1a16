"""Compiled and recomputed layers give the numbers of plain ones, and keep less."""

from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import nn

from support.batches import make_batch
from turnwise.config import LoraConfig, ModelConfig
from turnwise.trainer.lora import add_lora
from turnwise.trainer.model import Policy, load_model
from turnwise.trainer.packing import pack
from turnwise.trainer.recompute import Scope, prepare_layers

# dynamo looks at .grad of what it traces, and warnings are errors here
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
CPU = torch.device("cpu")


def gradients(
    model: Path, *, recompute: Scope | None = None, compiled: bool = False, lora: bool = False
) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the mean logprob of a batch, and how many bytes the forward pass kept for them."""
    loaded = load_model(ModelConfig(name=str(model)), CPU)
    policy = Policy(add_lora(loaded, LoraConfig(rank=4), seed=0) if lora else loaded).train()
    prepare_layers(policy.layers, recompute=recompute, compiled=compiled, dropout=False)
    (batch,) = pack(make_batch(1).samples, max_tokens=10_000)[0]
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = policy.stats(batch, temperature=1.0).logprobs.mean()
    torch.autograd.backward(loss)
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, sum(kept.values())


def test_recomputation_changes_no_bit_of_the_gradients_and_keeps_less(tiny_model: Path) -> None:
    plain, most = gradients(tiny_model)
    selective, fewer = gradients(tiny_model, recompute="mlp")
    whole, fewest = gradients(tiny_model, recompute="layer")
    for other in (selective, whole):
        assert plain.keys() == other.keys()
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert fewest < fewer < most


@pytest.mark.parametrize(("recompute", "lora"), [(None, False), ("mlp", True), ("layer", True)])
def test_compiled_layers_agree_with_plain_ones(
    tiny_model: Path, recompute: Scope | None, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced and differentiated as ever, without generated code: whole trainer processes are tested with that
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks of shapes cannot be traced
    plain, _ = gradients(tiny_model, lora=lora)
    compiled, _ = gradients(tiny_model, recompute=recompute, compiled=True, lora=lora)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_without_a_feed_forward_block_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="called mlp, which Linear has not"):
        prepare_layers([nn.Linear(2, 2)], recompute="mlp", compiled=False, dropout=False)
