"""Packing: what is in a micro-batch, how it is balanced, and that segments do not touch each other."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from support.batches import make_batch, make_sample
from turnwise.config import LoraConfig, ModelConfig
from turnwise.trainer.attention import Layout, segment_attention
from turnwise.trainer.lora import add_lora
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.model import Policy, load_model
from turnwise.trainer.packing import MAX_REACH, MIN_SHARED_PROMPT, MicroBatch, assign, pack, step_totals
from turnwise.transport import Sample


def sampled_tokens(samples: list[Sample]) -> list[tuple[int, float, float]]:
    """(token, behaviour logprob, advantage) of every sampled token."""
    columns = (zip(s.token_ids, s.logprobs, s.advantages, s.loss_mask, strict=True) for s in samples)
    return sorted((token, logprob, advantage) for rows in columns for token, logprob, advantage, on in rows if on)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 9999),
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    prompt=st.integers(1, 40),
    ranks=st.integers(1, 4),
    budget=st.integers(30, 300),
    share=st.booleans(),
)
def test_every_sampled_token_is_in_one_micro_batch_with_its_numbers(
    seed: int, groups: int, size: int, prompt: int, ranks: int, budget: int, share: bool
) -> None:
    samples = make_batch(1, groups=groups, group_size=size, seed=seed, prompt_tokens=prompt).samples
    packed = pack(samples, max_tokens=budget, ranks=ranks, share_prompts=share)
    flat = [micro_batch for of_rank in packed for micro_batch in of_rank]
    found = [
        row for b in flat for row in zip(b.targets.tolist(), b.behaviour_logprobs.tolist(), b.advantages.tolist(), strict=True)
    ]
    expected = [(t, torch.tensor(x).item(), torch.tensor(a).item()) for t, x, a in sampled_tokens(samples)]
    assert sorted(found) == sorted(expected)
    assert len({len(of_rank) for of_rank in packed}) == 1
    assert len(packed) == ranks
    for b in flat:
        assert sum(b.layout.lengths) == len(b.input_ids) == len(b.position_ids)
        assert len(b.input_ids) <= budget or len(b.rollout_tokens) == 1


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 9999), size=st.integers(2, 6), prompt=st.integers(1, 40))
def test_following_parents_back_from_a_target_reads_its_sample(seed: int, size: int, prompt: int) -> None:
    """What a target can see, in order, is exactly its sample up to that token, at positions counted from 0."""
    samples = make_batch(1, groups=2, group_size=size, seed=seed, prompt_tokens=prompt).samples
    (micro_batch,) = pack(samples, max_tokens=10_000)[0]
    expected = Counter(tuple(s.token_ids[: i + 1]) for s in samples for i, on in enumerate(s.loss_mask) if on)
    found: Counter[tuple[int, ...]] = Counter()
    starts = [sum(micro_batch.layout.lengths[:i]) for i in range(len(micro_batch.layout.lengths))]
    for position, target in zip(micro_batch.positions.tolist(), micro_batch.targets.tolist(), strict=True):
        segment = max(i for i, start in enumerate(starts) if start <= position)
        parent = micro_batch.layout.parents[segment]
        before = range(starts[parent], starts[parent] + micro_batch.layout.lengths[parent]) if parent >= 0 else range(0)
        seen = [*before, *range(starts[segment], position + 1)]
        assert micro_batch.position_ids[seen].tolist() == list(range(len(seen)))
        found[(*micro_batch.input_ids[seen].tolist(), target)] += 1
    assert found == expected


def test_a_shared_prompt_is_there_once_and_tokens_after_the_last_reply_not_at_all() -> None:
    rng = random.Random(0)
    prompt = list(range(MIN_SHARED_PROMPT + 4))
    samples = [make_sample(rng, prompt=prompt, rollout=f"r{i}") for i in range(3)]
    own = [len(s.token_ids) - len(prompt) for s in samples]
    (shared,) = pack(samples, max_tokens=10_000)[0]
    (apart,) = pack(samples, max_tokens=10_000, share_prompts=False)[0]
    # the input of the last prompt token predicts the first reply: it is each sample's own; the last reply token is no input
    assert len(shared.input_ids) == len(prompt) - 1 + sum(own)
    assert len(apart.input_ids) == 3 * (len(prompt) - 1) + sum(own)
    assert shared.layout.parents == (-1, 0, 0, 0)


@st.composite
def steps(draw: st.DrawFn) -> list[Sample]:
    """Groups with prompts of their own, of very different lengths; some without a sampled token."""
    samples: list[Sample] = []
    for group in range(draw(st.integers(1, 6))):
        prompt = [group] * draw(st.integers(1, 80))
        for index, own in enumerate(draw(st.lists(st.integers(0, 120), min_size=1, max_size=8))):
            mask = [False] * len(prompt) + [True] * own
            numbers = [float(chosen) for chosen in mask]
            ids = prompt + [100 + (index + i) % 100 for i in range(own)]
            name = f"g{group}-{index}"
            samples.append(Sample(ids, mask, numbers, numbers, [chosen - 1 for chosen in mask], own, name, group, "t"))
    return samples


def length(sample: Sample) -> int:
    """Inputs that its loss needs: all before its last sampled token."""
    return max((i for i, on in enumerate(sample.loss_mask) if on), default=0)


@settings(deadline=None, max_examples=200)
@given(samples=steps(), ranks=st.integers(1, 5), budget=st.integers(20, 400), share=st.booleans(), quadratic=st.booleans())
def test_every_sample_is_in_one_bin_and_ranks_have_like_loads_at_any_time_and_in_all(
    samples: list[Sample], ranks: int, budget: int, share: bool, quadratic: bool
) -> None:
    def square(layout: Layout) -> float:
        return float(sum(own**2 for own in layout.lengths))

    of_ranks = assign(samples, max_tokens=budget, ranks=ranks, share_prompts=share, cost=square if quadratic else None)
    bins = [b for of_rank in of_ranks for b in of_rank]
    expected = Counter(sample.rollout_id for sample in samples if any(sample.loss_mask))
    assert Counter(piece.sample.rollout_id for b in bins for piece in b.pieces) == expected
    assert {len(of_rank) for of_rank in of_ranks} == {len(bins) // ranks}
    longest = max((length(sample) for sample in samples), default=0)
    for b in bins:
        reach = sum(length(piece.sample) for piece in b.pieces)
        assert len(b.pieces) <= 1 or (b.tokens <= budget and reach <= MAX_REACH * budget)
        assert sum(b.layout().lengths) == max(1, b.tokens) == len(b.micro_batch().input_ids)
    for at_the_same_time in zip(*of_ranks, strict=True):
        tokens = [b.tokens for b in at_the_same_time]
        assert max(tokens) - min(tokens) <= longest
    totals = [sum(b.tokens for b in of_rank) for of_rank in of_ranks]
    assert max(totals) - min(totals) <= longest


def test_micro_batches_of_like_cost_run_at_the_same_time() -> None:
    """Two long segments and eight short ones, in micro-batches of as many tokens: attention makes the long ones dearer."""

    def sample(name: str, own: int) -> Sample:
        return Sample(
            [1] + [2] * own, [False] + [True] * own, [0.0] * (own + 1), [0.0] * (own + 1), [-1] + [0] * own, own, name, 0, "t"
        )

    samples = [sample("long 0", 100), *(sample(f"short {i}", 25) for i in range(8)), sample("long 1", 100)]
    of_ranks = assign(samples, max_tokens=100, ranks=2, cost=lambda layout: float(sum(own**2 for own in layout.lengths)))
    assert [{len(b.pieces) for b in column} for column in zip(*of_ranks, strict=True)] == [{1}, {4}]
    of_ranks = assign(samples, max_tokens=100, ranks=2, cost=lambda layout: -float(sum(own**2 for own in layout.lengths)))
    assert [{len(b.pieces) for b in column} for column in zip(*of_ranks, strict=True)] == [{4}, {1}]


@pytest.mark.parametrize(("ranks", "waste"), [(1, 0.0), (4, 0.02), (8, 0.1)])
def test_groups_stay_together_as_far_as_balance_allows(ranks: int, waste: float) -> None:
    """64 groups of 8 replies of 50 to 350 tokens behind prompts of 75 to 225: apart they would be 1.6 times as many tokens."""
    rng = random.Random(0)
    samples: list[Sample] = []
    for group in range(64):
        prompt = [group] * rng.randint(75, 225)
        samples += [
            make_sample(rng, prompt=prompt, turns=rng.randint(10, 70), rollout=f"{group}-{i}", group=group) for i in range(8)
        ]
    of_ranks = assign(samples, max_tokens=16_384, ranks=ranks)
    ((whole,),) = assign(samples, max_tokens=10**7)
    assert sum(b.tokens for of_rank in of_ranks for b in of_rank) <= (1 + waste) * whole.tokens
    assert sum(length(sample) for sample in samples) > 1.3 * whole.tokens


def test_children_of_a_shared_prompt_are_divided_when_they_would_need_too_many_keys() -> None:
    """60 replies of 5 tokens behind one prompt of 100 are 400 tokens to compute, but 6,300 keys."""
    samples = [
        Sample(
            [7] * 101 + [i] * 5, [False] * 101 + [True] * 5, [0.0] * 106, [0.0] * 106, [-1] * 101 + [0] * 5, 5, f"r{i}", 0, "t"
        )
        for i in range(60)
    ]
    (bins,) = assign(samples, max_tokens=500)
    assert len(bins) >= 60 * 105 / (MAX_REACH * 500)
    assert all(sum(length(piece.sample) for piece in b.pieces) <= MAX_REACH * 500 for b in bins)
    (bins,) = assign(samples, max_tokens=2000)
    assert [b.tokens for b in bins] == [100 + 60 * 5]


def test_a_rank_without_work_gets_one_token_and_no_target() -> None:
    packed = pack([make_sample(random.Random(0))], max_tokens=100, ranks=3)
    assert [len(of_rank) for of_rank in packed] == [1, 1, 1]
    assert [len(of_rank[0].targets) for of_rank in packed][1:] == [0, 0]
    assert len(packed[2][0].input_ids) == 1


def test_a_sample_longer_than_the_budget_is_not_lost() -> None:
    rng = random.Random(0)
    long, short = make_sample(rng, turns=30, rollout="long"), make_sample(rng, rollout="short")
    (batches,) = pack([long, short], max_tokens=32)
    assert sorted(len(b.targets) for b in batches) == sorted([sum(long.loss_mask), sum(short.loss_mask)])


def test_a_sampled_first_token_is_refused() -> None:
    sample = Sample([1, 2], [True, True], [-1.0, -1.0], [1.0, 1.0], [0, 0], 2, "odd", 0, "t")
    with pytest.raises(ValueError, match="rollout odd: its first token is marked as sampled"):
        pack([sample], max_tokens=10)


def test_totals_count_rollouts_not_samples() -> None:
    rng = random.Random(0)
    samples = [make_sample(rng, rollout="a"), make_sample(rng, rollout="a"), make_sample(rng, rollout="b")]
    totals = step_totals(samples)
    assert totals.sequences == 2
    assert totals.tokens == sum(sum(s.loss_mask) for s in samples)


# What the model makes of it.


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def policy(request: pytest.FixtureRequest, tiny_model) -> Policy:
    """Adapters with B away from 0, so that their gradients all count."""
    torch.set_num_threads(1)
    model = load_model(ModelConfig(name=str(tiny_model)), torch.device("cpu"))
    add_lora(model, LoraConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_B.data.normal_(std=0.05, generator=generator)
    model.to(request.param)
    if request.param == torch.float64:
        _norms_in_float64(model)
    return Policy(model).train()


def _norms_in_float64(model: nn.Module) -> None:
    """transformers computes RMS norms in float32 whatever the model's type, which would hide what packing adds below 1e-7."""

    class Norm(nn.Module):
        def __init__(self, norm: LlamaRMSNorm) -> None:
            super().__init__()
            self.weight, self.epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, Norm(child))


def tolerance(policy: Policy) -> float:
    return 1e-10 if policy.model.dtype == torch.float64 else 1e-5


def weighted(policy: Policy, batch: MicroBatch, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logprobs, and parameter gradients of their sum weighted by advantages (over the targets in `keep`)."""
    stats = policy.stats(batch, temperature=0.9)
    weights = batch.advantages.to(stats.logprobs.dtype)
    if keep is not None:
        weights = torch.where(keep, weights, 0)
    grads = torch.autograd.grad((stats.logprobs * weights).sum(), list(policy.trainable().values()))
    return stats.logprobs.detach(), list(grads)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_packed_equals_unpacked_in_logprobs_and_gradients(policy: Policy, share: bool) -> None:
    samples = make_batch(1, groups=2, group_size=3, prompt_tokens=30).samples
    (packed,) = pack(samples, max_tokens=10_000, share_prompts=share)[0]
    if share:
        assert packed.layout.parents.count(-1) == 2
    logprobs, grads = weighted(policy, packed)
    alone: dict[tuple[float, float], float] = {}
    summed = [torch.zeros_like(grad) for grad in grads]
    for sample in samples:
        (single,) = pack([sample], max_tokens=10_000)[0]
        single_logprobs, single_grads = weighted(policy, single)
        keys = zip(single.behaviour_logprobs.tolist(), single.advantages.tolist(), strict=True)
        alone |= dict(zip(keys, single_logprobs.tolist(), strict=True))
        summed = [total + grad for total, grad in zip(summed, single_grads, strict=True)]
    keys = zip(packed.behaviour_logprobs.tolist(), packed.advantages.tolist(), strict=True)
    expected = torch.tensor([alone[key] for key in keys], dtype=logprobs.dtype)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=tolerance(policy))
    torch.testing.assert_close(grads, summed, rtol=tolerance(policy), atol=tolerance(policy))


def test_logprobs_equal_those_of_the_plain_transformers_model(policy: Policy, tiny_model) -> None:
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, LoraLinear):
                module.enabled = False
        sample = make_sample(random.Random(4), turns=3)
        (batch,) = pack([sample], max_tokens=1000)[0]
        stats = policy.stats(batch, temperature=1.0)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=policy.model.dtype)
        logs = plain(torch.tensor([sample.token_ids])).logits[0].log_softmax(-1)
        expected = [logs[i - 1, sample.token_ids[i]].item() for i, on in enumerate(sample.loss_mask) if on]
        entropy = [-(logs[i - 1].exp() * logs[i - 1]).sum().item() for i, on in enumerate(sample.loss_mask) if on]
        for module in policy.modules():
            if isinstance(module, LoraLinear):
                module.enabled = True
    torch.testing.assert_close(stats.logprobs.tolist(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.entropy.tolist(), entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt_tokens", [8, 30], ids=["apart", "with shared prompts"])
def test_changing_one_segment_leaves_the_others_equal_to_the_bit(policy: Policy, prompt_tokens: int) -> None:
    """At the same packed shape: logprobs of the other samples, and gradients of a loss over them alone."""
    samples = make_batch(1, groups=2, group_size=3, prompt_tokens=prompt_tokens).samples
    (before,) = pack(samples, max_tokens=10_000)[0]
    changed_sample = 2
    mine = before.segment_ids == changed_sample
    ids = before.input_ids.clone()
    own = before.positions[mine]
    ids[own] = (ids[own] + 7) % 256
    after = MicroBatch(**{**vars(before), "input_ids": ids})
    first, first_grads = weighted(policy, before, keep=~mine)
    second, second_grads = weighted(policy, after, keep=~mine)
    assert not torch.equal(first[mine], second[mine])
    assert torch.equal(first[~mine], second[~mine])
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


def test_no_segment_is_seen_by_another_even_when_it_holds_nan(policy: Policy) -> None:
    """The strongest leak detector: NaN spreads through anything that touches it, masked by a zero weight or not."""
    samples = make_batch(1, groups=1, group_size=3, prompt_tokens=8).samples
    (batch,) = pack(samples, max_tokens=10_000)[0]
    victim = batch.segment_ids == 1
    start, end = (sum(batch.layout.lengths[:i]) for i in (1, 2))

    def poison(_module: object, _args: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :start], torch.full_like(output[:, start:end], torch.nan), output[:, end:]], dim=1)

    handle = policy.model.get_input_embeddings().register_forward_hook(poison)
    stats = policy.stats(batch, temperature=1.0)
    handle.remove()
    assert torch.isnan(stats.logprobs[victim]).all()
    assert torch.isfinite(stats.logprobs[~victim]).all()


@pytest.mark.parametrize(("lengths", "parents"), [((3, 2), (-1,)), ((3, 2), (1, -1)), ((3, 2, 2), (-1, 0, 1))])
def test_an_impossible_layout_is_refused(lengths: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parent"):
        Layout(lengths, parents)


def test_what_attention_cannot_do_is_refused_not_ignored() -> None:
    tensor = torch.zeros(1, 2, 5, 4)
    layout = Layout((5,), (-1,))
    with pytest.raises(ValueError, match="passes s_aux to attention"):
        segment_attention(nn.Module(), tensor, tensor, tensor, None, layout=layout, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="5 tokens exceeds the sliding window of 4"):
        segment_attention(nn.Module(), tensor, tensor, tensor, None, layout=layout, sliding_window=4)
