"""Canaries of the trainer: which sequences, whose logprobs, and that training does not notice them."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from support.adapters import reference_logprobs
from support.batches import ConfigOf, make_batch, make_sample
from turnwise.trainer import canary
from turnwise.trainer.canary import Canaries, choose, measure
from turnwise.trainer.loop import run_trainer
from turnwise.trainer.publish import full_tensors, write_policy
from turnwise.trainer.step import Learner
from turnwise.transport import BatchLog, Canary, RunDir, Sample, WeightsReady, WeightsStore

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks

SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]


def sample(rng: random.Random, *, prompt: int, advantage: float, group: int = 0) -> Sample:
    return make_sample(rng, prompt=[rng.randrange(256) for _ in range(prompt)], turns=3, advantage=advantage, group=group)


def base_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def move_adapter(learner: Learner) -> None:
    """An adapter that changes every logprob."""
    torch.manual_seed(5)
    for name, parameter in learner.parameters.items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_the_sequences_are_those_that_the_step_pushes_hardest_one_of_a_group() -> None:
    rng = random.Random(0)
    samples = [sample(rng, prompt=6, advantage=a, group=g) for a, g in [(0.1, 0), (-2.0, 0), (1.0, 1), (0.0, 2), (-3.0, 1)]]
    pushed = [sum(abs(a) for a in s.advantages) for s in samples]
    best = sorted(
        [samples[1], max(samples[2], samples[4], key=lambda s: pushed[samples.index(s)])], key=lambda s: -pushed[samples.index(s)]
    )
    assert choose(samples, count=2, longest=256) == [s.token_ids for s in best]
    assert len(choose(samples, count=9, longest=256)) == 3
    assert choose(samples, count=0, longest=256) == []


def test_a_short_prompt_is_there_from_its_beginning_and_of_a_long_one_the_end() -> None:
    short = sample(random.Random(1), prompt=5, advantage=1.0)
    assert choose([short], count=1, longest=20) == [short.token_ids[:20]]
    long = sample(random.Random(2), prompt=200, advantage=1.0)
    (ids,) = choose([long], count=1, longest=20)
    assert ids == long.token_ids[190:210]
    (tail,) = choose([long], count=1, longest=180)
    assert tail == long.token_ids[-180:]  # of the whole length where the sample has it


def test_samples_without_a_sampled_token_and_equal_sequences_are_left_out() -> None:
    drawn = sample(random.Random(3), prompt=6, advantage=1.0)
    unsampled = make_sample(random.Random(4), turns=0)
    twin = make_sample(random.Random(5), group=7)
    twins = [twin, Sample(**{name: getattr(twin, name) for name in twin.__struct_fields__} | {"group_id": 8})]
    assert choose([unsampled, drawn], count=3, longest=99) == [drawn.token_ids]
    assert choose(twins, count=3, longest=99) == [twin.token_ids]


def test_logprobs_are_those_of_a_plain_forward_pass_at_temperature_1(
    device: torch.device, config_of: ConfigOf, tiny_model: Path, tmp_path: Path
) -> None:
    """Of the base model while the adapter is zero, and of peft's model with the adapter's files afterwards."""
    from peft import PeftModel

    learner = Learner(config_of(), device)
    base = base_model(tiny_model)
    expected = [reference_logprobs(base, ids) for ids in SEQUENCES]
    close(measure(learner, SEQUENCES), expected)
    move_adapter(learner)
    write_policy(tmp_path, learner, full_tensors(learner))
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    moved = [reference_logprobs(adapted, ids) for ids in SEQUENCES]
    close(measure(learner, SEQUENCES), moved)
    assert max(abs(a - b) for a, b in zip(moved[0], expected[0], strict=True)) > 0.1
    assert measure(learner, []) == []


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_a_round_holds_the_policy_before_and_after_the_step_and_the_base_of_an_adapter(
    device: torch.device, config_of: ConfigOf, tiny_model: Path, lora: dict[str, int] | None
) -> None:
    learner = Learner(config_of({"model": {"lora": lora}}), device)
    if lora:
        move_adapter(learner)
    round_ = Canaries(learner, make_batch(1))
    before = measure(learner, round_.sequences)
    learner.step(make_batch(1))
    found = round_.after()
    assert [c.token_ids for c in found] == round_.sequences
    assert len(found) == 2
    assert [c.before for c in found] == before
    assert [c.logprobs for c in found] == measure(learner, round_.sequences)
    assert all(c.logprobs != c.before for c in found)
    base = base_model(tiny_model)
    close([c.base for c in found], [reference_logprobs(base, c.token_ids) for c in found] if lora else [[], []])
    assert round_.seconds > 0


def test_no_random_number_is_drawn_and_dropout_is_off_only_meanwhile(device: torch.device, config_of: ConfigOf) -> None:
    learner = Learner(config_of({"model": {"lora": {"rank": 4, "dropout": 0.5}}}), device)
    move_adapter(learner)
    state = torch.get_rng_state()
    assert measure(learner, SEQUENCES) == measure(learner, SEQUENCES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in learner.policy.modules())
    assert all(parameter.grad is None for parameter in learner.parameters.values())


def test_compiled_layers_are_not_compiled_anew(device: torch.device, config_of: ConfigOf) -> None:
    from torch._dynamo.utils import counters

    plain = measure(Learner(config_of(), device), SEQUENCES)
    learner = Learner(config_of({"model": {"compile": True}}), device)
    counters.clear()
    assert measure(learner, SEQUENCES) == plain
    assert counters["frames"]["total"] == 0


def test_a_policy_that_is_not_finite_announces_no_canary(device: torch.device, config_of: ConfigOf) -> None:
    learner = Learner(config_of(), device)
    round_ = Canaries(learner, make_batch(1))
    with torch.no_grad():
        next(iter(learner.parameters.values())).fill_(float("nan"))
    assert round_.after() == []


def test_canaries_take_a_small_share_of_the_batch_and_fit_the_context(device: torch.device, config_of: ConfigOf) -> None:
    learner = Learner(config_of(), device)
    batch = make_batch(1, groups=60, group_size=8, prompt_tokens=120)
    computed = sum(len(s.token_ids) - 120 for s in batch.samples) + 60 * 120  # the prompt of a group once
    assert canary.MIN_TOKENS < canary.SHARE * computed / 2 < canary.MAX_TOKENS
    found = Canaries(learner, batch).sequences
    assert [len(ids) for ids in found] == [int(canary.SHARE * computed / 2)] * 2
    assert max(map(len, Canaries(learner, make_batch(1, prompt_tokens=120)).sequences)) == canary.MIN_TOKENS
    narrow = Learner(config_of(seq_len=24, orchestrator={"sampling": {"max_tokens": 8}}), device)
    assert max(map(len, Canaries(narrow, make_batch(1, prompt_tokens=120)).sequences)) == 23


def test_only_every_step_of_the_interval_has_canaries(device: torch.device, config_of: ConfigOf) -> None:
    learner = Learner(config_of({"canary_interval": 3}), device)
    assert [len(Canaries(learner, make_batch(step)).sequences) for step in range(1, 8)] == [0, 0, 2, 0, 0, 2, 0]


def announced(run_dir: RunDir, version: int) -> WeightsReady:
    found = WeightsStore(run_dir.weights).poll(version)
    assert found is not None
    return found


def test_every_version_but_the_first_is_announced_with_canaries(config_of: ConfigOf) -> None:
    config = config_of(max_steps=3, ckpt={"interval": 1})
    run_dir = RunDir(config.output_dir)
    for step in (1, 2, 3):
        BatchLog(run_dir.batches).write(make_batch(step))
    run_trainer(config)
    straight = [announced(run_dir, version).canaries for version in range(4)]
    assert [len(canaries) for canaries in straight] == [0, 2, 2, 2]
    assert announced(run_dir, 1).metrics["timing/canary_s"] > 0
    texts = [str(s.token_ids)[1:-1] for s in make_batch(2).samples]
    assert all(any(str(c.token_ids)[1:-1] in text for text in texts) for c in straight[2])
    run_trainer(config, resume_step=1)
    assert [announced(run_dir, version).canaries for version in (1, 2, 3)] == [[], *straight[2:]]


def test_training_is_the_same_to_the_bit_with_and_without_canaries(config_of: ConfigOf) -> None:
    digests: list[str] = []
    for name, count in (("with", 3), ("without", 0)):
        config = config_of({"canaries": count, "model": {"lora": {"rank": 4, "dropout": 0.2}}}, max_steps=2)
        config = config.model_copy(update={"output_dir": config.output_dir / name})
        run_dir = RunDir(config.output_dir)
        for step in (1, 2):
            BatchLog(run_dir.batches).write(make_batch(step, groups=3))
        run_trainer(config)
        digests.append(announced(run_dir, 2).digest)
        assert len(announced(run_dir, 2).canaries) == count
    assert digests[0] == digests[1]


def test_canaries_survive_the_announcement(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    told = Canary([1, 2, 3], [-0.123456, -17.0], [-0.2, -16.5], [-3.0, -0.0])
    store.publish(WeightsReady(4, "lora", "x", "d", {"loss": float("nan")}, canaries=[told]), lambda folder: None)
    found = store.poll(4)
    assert found is not None
    assert found.canaries == [told]
