"""Every configuration that is shipped is valid, and does the steps that its comment promises."""

from pathlib import Path

import pytest

from turnwise.config import EnvConfig, RLConfig
from turnwise.config.command import check, read_command
from turnwise.envs.tasks import SplitSpec
from turnwise.launch.allocation import allocate
from turnwise.launch.arithmetic import count_tasks, training_arithmetic
from turnwise.launch.gpus import Gpu, Machine, TorchBuild
from turnwise.launch.shape import ModelShape
from turnwise.launch.sweep.plan import plan_sweep, read_sweep

CONFIGS = Path(__file__).parents[3] / "configs"
OVERLAY = CONFIGS / "cpu.toml"
GSM8K = CONFIGS / "gsm8k"
EXPERIMENTS = ("e3a", "e3b", "e6a", "e6b", "e7a", "e8a", "e12")
QERL = ("e6b_qerl", "e12_qerl")
REWARDS = [CONFIGS / "wordle" / f"{mode}.toml" for mode in ("dense", "sparse")]
PARTS = {OVERLAY, *REWARDS} | {GSM8K / f"{name}.toml" for name in (*EXPERIMENTS, *QERL, "two_epochs", "short", "cpu")}
SWEEPS = sorted((CONFIGS / "sweeps").glob("gsm8k_*.toml"))
OF_OTHER_TESTS = ("sweeps", "musique", "mlgym")
FILES = sorted(path for path in CONFIGS.rglob("*.toml") if path not in PARTS and path.parent.name not in OF_OTHER_TESTS)
TRAINING_QUESTIONS = 7473


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    config = check(read_command(["@", str(path)]))
    assert config.max_steps or config.epochs
    on_cpu = check(read_command(["@", str(path), "@", str(OVERLAY)]))
    assert (on_cpu.inference.engine, on_cpu.gpus.inference, on_cpu.gpus.trainer) == ("embedded", [], [])


@pytest.mark.parametrize("path", REWARDS, ids=lambda path: path.stem)
def test_wordle_is_paid_as_the_file_over_the_quickstart_says(path: Path) -> None:
    config = check(read_command(["@", str(CONFIGS / "quickstart.toml"), "@", str(path)]))
    assert config.orchestrator.env[0].reward.mode == path.stem


def test_wordle_in_full_takes_70_epochs_of_30_steps() -> None:
    config = check(read_command(["@", str(CONFIGS / "wordle" / "rl_full.toml")]))
    arithmetic = training_arithmetic(config, count_tasks)
    assert (arithmetic.steps_per_epoch, arithmetic.max_steps) == (30, 2100)


@pytest.mark.parametrize(("name", "shared"), [("one_gpu", [0]), ("two_gpus", [])])
def test_wordle_on_gpus_fits_a_gpu_of_24_gib(name: str, shared: list[int]) -> None:
    config = check(read_command(["@", str(CONFIGS / "wordle" / f"{name}.toml")]))
    assert (config.inference.engine, config.gpus.shared, config.model.name) == ("vllm", shared, "smollm2-135m")
    gpus = tuple(Gpu(str(index), f"GPU-{index}", "a GPU", 24 * 2**30, 0) for index in range(2))
    shape = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True, dtype="bfloat16")
    allocation = allocate(config, Machine(gpus[: 1 if shared else 2], None, TorchBuild("2.11.0", "13.0")), shape)
    assert (allocation.errors, allocation.warnings, len(allocation.splits)) == ((), (), len(shared))


def test_the_quickstart_is_the_one_that_was_measured() -> None:
    config = check(read_command(["@", str(CONFIGS / "quickstart.toml")]))
    assert (config.max_steps, config.orchestrator.batch_size, config.model.name) == (24, 32, "smollm2-135m")
    assert config.orchestrator.env[0].args["shortlist"] == 8


def gsm8k(*names: str) -> RLConfig:
    return check(read_command([token for name in ("base", *names) for token in ("@", str(GSM8K / f"{name}.toml"))]))


def questions(env: EnvConfig) -> int:
    """Training questions, without the data: all, or the part that the split names."""
    return len(SplitSpec.parse(env.args.get("train", "train")).indices(TRAINING_QUESTIONS))


def steps(config: RLConfig) -> tuple[int, int]:
    """Steps an epoch, and in all."""
    arithmetic = training_arithmetic(config, questions)
    return arithmetic.steps_per_epoch, arithmetic.max_steps


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_gsm8k_experiment_takes_29_steps_an_epoch_and_is_evaluated_as_the_log_was(name: str) -> None:
    one, two = gsm8k(name), gsm8k(name, "two_epochs")
    assert (steps(one), steps(two)) == ((29, 29), (29, 58))
    assert (one.orchestrator.eval.interval, two.orchestrator.eval.interval) == (20, 10)
    assert one.orchestrator.eval.at_start
    assert (one.orchestrator.batch_size, one.orchestrator.rollouts_per_example) == (256 * 8, 8)
    assert len({*one.gpus.inference, *one.gpus.trainer}) == 8


def test_the_experiments_differ_in_what_the_log_says_they_differ_in() -> None:
    kinds = {name: gsm8k(name) for name in (*EXPERIMENTS, *QERL)}
    assert {n for n, c in kinds.items() if c.trainer.model.quant is None} == {"e7a", "e8a"}
    assert {n for n, c in kinds.items() if c.trainer.model.lora is None} == {"e3a", "e3b", "e8a"}
    loras = [c.trainer.model.lora for c in kinds.values() if c.trainer.model.lora]
    assert {(lora.rank, lora.alpha) for lora in loras} == {(32, 16)}
    noises = {n: (c.inference.noise.sigma_start, c.inference.noise.sigma_end) for n, c in kinds.items() if c.inference.noise}
    low, high = (0.01, 0.0001), (0.05, 0.0005)
    assert noises == {"e3b": low, "e6b": low, "e6b_qerl": low, "e12": high, "e12_qerl": high}
    assert {c.inference.noise.stages for c in kinds.values() if c.inference.noise} == {10}


@pytest.mark.parametrize("name", QERL)
def test_qerl_takes_3736_steps_of_two_prompts(name: str) -> None:
    config = gsm8k(name)
    assert steps(config) == (3736, 3736)
    assert (config.orchestrator.batch_size, config.orchestrator.eval.interval) == (2 * 8, 200)
    assert config.inference.noise is not None
    assert not config.inference.noise.epoch_aware


def test_the_base_is_dapo_in_full() -> None:
    config = gsm8k()
    assert (config.trainer.loss.kind, config.trainer.loss.clip_low, config.trainer.loss.clip_high) == ("dapo", 0.2, 0.28)
    assert config.orchestrator.filters.dynamic_sampling
    overlong = config.orchestrator.overlong
    assert overlong is not None
    assert (config.orchestrator.overlong_limit, overlong.buffer, overlong.factor) == (2048, 128, 1.0)
    assert config.orchestrator.env[0].name == "openai/gsm8k"  # the metric is val-core/openai/gsm8k/acc/mean


@pytest.mark.parametrize("name", [*EXPERIMENTS, *QERL])
def test_every_experiment_has_a_shortened_version_for_one_gpu_and_one_for_a_cpu(name: str) -> None:
    short, cpu = gsm8k(name, "short"), gsm8k(name, "short", "cpu")
    for config in (short, cpu):
        assert steps(config) == (100, 100)
        assert config.model.name == "smollm2-135m"
    full = gsm8k(name)
    assert short.trainer == full.trainer.model_copy(update={"micro_batch_tokens": 8192})
    assert short.inference == full.inference
    assert (short.gpus.shared, cpu.gpus.inference, cpu.inference.engine) == ([0], [], "embedded")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
@pytest.mark.parametrize("overlay", ["", "short", "short_cpu"])
def test_a_shipped_sweep_can_be_planned_whole_and_shortened(path: Path, overlay: str) -> None:
    behind = ["@", str(CONFIGS / "sweeps" / f"{overlay}.toml")] if overlay else []
    plan = plan_sweep(*read_sweep(["@", str(path), *behind], seeds=2))
    assert len(plan.runs) == 2 * (2 if "qerl" in path.name else 7)
    assert bool(plan.shortened) == bool(overlay)
    assert plan.sweep.metric == "val-core/openai/gsm8k/acc/mean"


def test_the_scores_of_the_log_stand_in_the_files_and_in_the_sweeps() -> None:
    log = {"e3a": (73.77, 72.78), "e3b": (74.37, 70.05), "e6a": (65.88, 72.93), "e6b": (67.48, 73.24), "e7a": (71.27, 73.84)}
    log |= {"e8a": (74.75, 75.97), "e12": (72.48, 72.93)}
    for name, scores in log.items():
        comment = (GSM8K / f"{name}.toml").read_text()
        assert all(f"{score:.2f}" in comment for score in scores), name
    for at, sweep in enumerate(("gsm8k_1ep", "gsm8k_2ep")):
        runs = read_sweep(["@", str(CONFIGS / "sweeps" / f"{sweep}.toml")])[0].run
        assert {run.id: run.reference for run in runs} == {name: scores[at] for name, scores in log.items()}
