"""The rehearsal: nothing that comes later is larger, nothing is changed by it, and what is said when memory runs out."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.batches import ConfigOf, make_batch
from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.trainer import fsdp, rehearsal
from turnwise.trainer.__main__ import main
from turnwise.trainer.loop import run_trainer
from turnwise.trainer.model import Policy
from turnwise.trainer.packing import MAX_REACH, MicroBatch, pack
from turnwise.trainer.rehearsal import OutOfMemory, explained, longest_samples, rehearse, sharing, wanted
from turnwise.trainer.step import Learner
from turnwise.transport import BatchLog, RunDir, Sample


def shapes(budget: int, seq_len: int) -> list[MicroBatch]:
    found = [pack(samples, max_tokens=budget)[0] for samples in longest_samples(budget, seq_len, vocabulary=50)]
    assert all(len(micro_batches) == 1 for micro_batches in found)
    return [micro_batches[0] for micro_batches in found]


def reach(batch: MicroBatch) -> int:
    """Keys that attention holds: each segment's own and its parent's."""
    parents = [0 if parent < 0 else batch.layout.lengths[parent] for parent in batch.layout.parents]
    used = set(batch.layout.parents)
    own = [0 if index in used else length for index, length in enumerate(batch.layout.lengths)]
    return sum(own) + sum(parents)


def test_the_shapes_of_a_budget_of_several_samples() -> None:
    shared, alone, packed = shapes(budget=1000, seq_len=101)
    assert alone.layout.lengths == (100,)
    assert packed.layout.lengths == (100,) * 10
    assert len(packed.targets) == 1000  # logits at every token
    prompt, own, children = sharing(1000, 100)
    assert shared.layout.lengths == (prompt, *[own] * children)
    assert shared.layout.parents == (-1, *[0] * children)


def test_a_budget_of_one_sample_is_filled_with_a_short_one() -> None:
    *_, packed = shapes(budget=64, seq_len=64)
    assert packed.layout.lengths == (63, 1)


def test_a_sample_beyond_the_budget_is_rehearsed() -> None:
    *_, alone = shapes(budget=64, seq_len=500)
    assert alone.layout.lengths == (499,)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 9999),
    seq_len=st.integers(8, 150),
    factor=st.floats(0.5, 6),
    groups=st.integers(1, 6),
    size=st.integers(1, 12),
)
def test_no_micro_batch_of_a_step_is_larger_than_what_was_rehearsed(
    seed: int, seq_len: int, factor: float, groups: int, size: int
) -> None:
    budget = max(8, int(seq_len * factor))
    rng = random.Random(seed)
    samples: list[Sample] = []
    for group in range(groups):
        prompt = rng.randint(1, seq_len - 1)
        for _ in range(size):
            own = rng.randint(1, seq_len - prompt)
            ids = [group] * prompt + [rng.randrange(50) for _ in range(own)]
            mask = [False] * prompt + [True] * own
            numbers = [float(chosen) for chosen in mask]
            samples.append(Sample(ids, mask, numbers, numbers, [chosen - 1 for chosen in mask], own, "r", group, "t"))
    rehearsed = shapes(budget, seq_len)
    for batch in pack(samples, max_tokens=budget)[0]:
        assert len(batch.input_ids) <= max(len(shape.input_ids) for shape in rehearsed)
        assert len(batch.targets) <= max(len(shape.targets) for shape in rehearsed)
        assert max(batch.layout.lengths) <= max(max(shape.layout.lengths) for shape in rehearsed)
        assert reach(batch) <= max(seq_len - 1, MAX_REACH * budget)


@pytest.mark.parametrize(("budget", "seq_len"), [(16_384, 16_384), (16_384, 2_048), (65_536, 1_024), (4_096, 4_096)])
def test_the_shared_shape_has_nearly_all_the_keys_and_logits_that_there_can_be(budget: int, seq_len: int) -> None:
    prompt, own, children = sharing(budget, seq_len - 1)
    assert 0.98 * MAX_REACH * budget < children * (prompt + own) <= MAX_REACH * budget
    assert 0.93 * budget < children * own <= budget - prompt
    assert prompt + own < seq_len


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"model": {"lora": {"rank": 4}}},
    "lora with dropout": {"model": {"lora": {"rank": 4, "dropout": 0.2}}},
    "full": {"model": {"lora": None}},
    "everything": {
        "model": {"lora": {"rank": 4}, "gradient_checkpointing": True},
        "loss": {"kind": "dr_grpo", "kl_beta": 0.1, "importance_sampling": "truncate", "entropy_coef": 0.01},
        "updates_per_batch": 2,
    },
    "offload": {"model": {"lora": None}, "optim": {"lr": 1e-3, "offload": True}},
}


@pytest.mark.parametrize("trainer", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_rehearsal_leaves_everything_to_the_bit_as_it_was(
    config_of: ConfigOf, device: torch.device, trainer: dict[str, Any]
) -> None:
    config = config_of({"micro_batch_tokens": 96, **trainer}, seq_len=64)
    torch.manual_seed(1)
    learner = Learner(config, device)
    learner.step(make_batch(1))
    state = torch.get_rng_state()
    before = [p.detach().clone() for p in learner.parameters.values()]
    moments = [{k: v.clone() for k, v in learner.optimizer.state[p].items()} for p in learner.parameters.values()]
    rehearse(learner)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, old, old_moments in zip(learner.parameters.values(), before, moments, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
        assert all(torch.equal(learner.optimizer.state[parameter][key], value) for key, value in old_moments.items())
    rehearsed = learner.step(make_batch(2))
    torch.manual_seed(1)
    other = Learner(config, device)
    other.step(make_batch(1))
    assert other.step(make_batch(2)) == rehearsed


def test_gradients_are_there_in_the_last_and_largest_pass(
    config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(config_of({"micro_batch_tokens": 200}, seq_len=64), device)
    seen: list[tuple[int, bool]] = []
    stats = Policy.stats

    def watched(policy: Policy, batch: MicroBatch, **options: Any) -> Any:
        seen.append((len(batch.input_ids), all(p.grad is not None for p in learner.parameters.values())))
        return stats(policy, batch, **options)

    monkeypatch.setattr(Policy, "stats", watched)
    assert rehearse(learner).startswith("rehearsed 200 tokens in ")
    assert seen[-1] == (200, True)
    assert seen[0][1] is False


@pytest.mark.parametrize(
    ("rehearse", "gpus", "expected"), [(None, [], False), (None, [0], True), (True, [], True), (False, [0], False)]
)
def test_it_is_for_gpus_unless_asked_for(rehearse: bool | None, gpus: list[int], expected: bool) -> None:
    config = RLConfig.model_validate({"trainer": {"rehearse": rehearse}, "gpus": {"trainer": gpus}})
    assert wanted(config) is expected


def test_a_run_rehearses_before_its_first_step_and_after_a_resume(
    config_of: ConfigOf, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of({"rehearse": True}, seq_len=64, max_steps=2, ckpt={"interval": 1})
    run_dir = RunDir(config.output_dir)
    for step in (1, 2):
        BatchLog(run_dir.batches).write(make_batch(step))
    run_trainer(config)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["policy", "rehearsed", "step", "checkpoint", "step", "checkpoint"]
    run_trainer(config, resume_step=1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:3] == ["policy", "rehearsed", "step"]
    run_trainer(config, resume_step=2)
    assert "rehearsed" not in capsys.readouterr().out  # nothing is left to train


def run_out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.72 GiB")


def test_running_out_of_memory_ends_a_run_with_the_settings_and_what_helps(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of({"rehearse": True, "micro_batch_tokens": 128, "model": {"lora": {"rank": 4}}}, seq_len=64)
    path = RunDir(config.output_dir).config
    path.parent.mkdir(parents=True)
    path.write_text(dump_toml(config))
    monkeypatch.setattr("sys.argv", ["trainer", "--config", str(path)])
    monkeypatch.setattr(Policy, "stats", run_out_of_memory)
    assert main() == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("error: out of memory in the rehearsal of a micro-batch of 128 tokens: ")
    assert "2.50 GiB more were asked for" in error
    for setting in (
        "trainer.micro_batch_tokens = 128",
        "seq_len = 64",
        "trainer.model.gradient_checkpointing = false",
        "trainer.model.lora.rank = 4",
        "trainer.model.shard = true over 1 process",
    ):
        assert setting in error
    remedies = error.partition("What helps: ")[2]
    assert remedies.index("trainer.micro_batch_tokens = 64") < remedies.index("trainer.model.gradient_checkpointing = true")
    assert "offload" not in remedies  # an adapter's moments are small


def test_the_cpu_allocator_s_own_words_are_understood_and_other_errors_are_left_alone(device: torch.device) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"out of memory in step 3: the CPU's memory is full"),
        explained(RLConfig(), device, "in step 3"),
    ):
        torch.empty(1 << 58, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"), explained(RLConfig(), device, "in step 3"):
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize(
    ("trainer", "helps", "useless"),
    [
        ({"model": {"lora": None}}, ["trainer.optim.offload = true", "an adapter"], ["kl_beta"]),
        ({"model": {"lora": None}, "optim": {"offload": True}, "loss": {"kl_beta": 0.1}}, ["kl_beta = 0"], ["offload"]),
        ({"model": {"gradient_checkpointing": True}}, ["a seq_len below"], ["gradient_checkpointing", "an adapter"]),
        ({"model": {"gradient_checkpointing": True, "checkpoint_scope": "mlp"}}, ['checkpoint_scope = "layer"'], []),
    ],
)
def test_only_what_is_left_to_do_is_advised(
    device: torch.device, trainer: dict[str, Any], helps: list[str], useless: list[str]
) -> None:
    config = RLConfig.model_validate({"trainer": trainer})
    with pytest.raises(OutOfMemory) as caught, explained(config, device, "here"):
        run_out_of_memory()
    remedies = str(caught.value).partition("What helps: ")[2]
    assert all(text in remedies for text in helps)
    assert not any(text in remedies for text in useless)


def test_replicas_and_whole_copies_are_advised_against_where_there_are_several_processes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsdp, "world_size", lambda: 4)
    monkeypatch.setattr(fsdp, "meshes", lambda: fsdp.Meshes(2))
    assert "trainer.model.replicas = 1" in "; ".join(rehearsal._remedies(RLConfig()))
    copies = RLConfig.model_validate({"trainer": {"model": {"shard": False}}})
    assert "trainer.model.shard = true" in "; ".join(rehearsal._remedies(copies))
