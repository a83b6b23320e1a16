"""Every MuSiQue experiment of the log composes, differs from the base in what the log says, and has a plan that fits its GPUs."""

import json
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from support.shapes import LLAMA31_8B, QWEN3_4B, QWEN3_8B, QWEN25_7B, SMOLLM2_135M
from turnwise.config import ConfigError, EnvConfig, RLConfig
from turnwise.config.command import check, read_command
from turnwise.config.differences import leaves
from turnwise.config.files import to_tables
from turnwise.envs import make
from turnwise.envs.messages import Tool, tool_message
from turnwise.envs.rewards import check_weights
from turnwise.envs.tasks import SplitSpec
from turnwise.launch.dry_run import dry_run, foresee
from turnwise.launch.gpus import Gpu, Machine, TorchBuild
from turnwise.launch.memory import GIB, estimate
from turnwise.launch.resolve import changed
from turnwise.launch.shape import ModelShape, read_shape
from turnwise.launch.sweep.plan import read_sweep
from turnwise.orchestrator.template_chat import TemplateChat
from turnwise.orchestrator.tokenizer import ModelText, load_model_text

ROOT = Path(__file__).parents[3]
MUSIQUE = ROOT / "configs" / "musique"
SWEEP = ROOT / "configs" / "sweeps" / "musique_log.toml"
PAGE = ROOT / "docs" / "musique.md"
TEMPLATE = MUSIQUE / "llama31_tools.jinja"
SIZES = {"bdsaglam/musique": 19938, "bdsaglam/musique-mini": 1000}  # the second is not known here
SHAPES = {
    "Qwen/Qwen2.5-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen3-4B": QWEN3_4B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA31_8B,
    "smollm2-135m": SMOLLM2_135M,
}


def experiments() -> dict[str, tuple[str, ...]]:
    """Files over the base of each experiment, from the sweep."""
    return {run.id: tuple(path.stem for path in run.files) for run in read_sweep(["@", str(SWEEP)])[0].run}


EXPERIMENTS = experiments()
SMALL = {name: (name,) for name in ("debug", "cpu", "one_gpu", "two_gpus", "gsm8k")}
ALL = EXPERIMENTS | SMALL


def compose(*names: str) -> RLConfig:
    files = [MUSIQUE / f"{name}.toml" for name in names]
    return check(read_command([token for path in files for token in ("@", str(path))]))


def composed(name: str) -> RLConfig:
    """A configuration by its name here; `debug` stands alone, all others lie over the base."""
    return compose(*(ALL[name] if name == "debug" else ("base", *ALL[name])))


def shape_of(name: str, folder: Path) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return read_shape(folder)


def known_tasks(env: EnvConfig) -> int:
    """Training tasks, without the data; the arguments and the weights of the environment are checked for good."""
    made = make(env.id, env.args)
    check_weights(env.reward, made.component_names, env_id=env.id)
    source = str(env.args.get("train", "train"))
    name, _, split = source.rpartition(",")
    size = SIZES.get(name.split(",")[0], 100)
    return len(SplitSpec.parse(split).indices(size))


def unreachable(env: EnvConfig) -> int:
    raise ConfigError("no network")


def four_gpus(gib: int) -> Machine:
    gpus = tuple(Gpu(str(index), f"GPU-{index}", "a GPU", gib * GIB, 0) for index in range(4))
    return Machine(gpus, None, TorchBuild("2.11.0", "13.0"))


@pytest.mark.parametrize("name", ALL)
def test_a_composition_is_valid_and_has_a_plan_that_fits_four_gpus_of_80_gib(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(name)
    shape = shape_of(config.model.name, tmp_path)
    monkeypatch.chdir(ROOT)  # model.chat_template is relative to where one is
    monkeypatch.setattr("turnwise.launch.dry_run.known_shape", lambda model: shape)
    machine = four_gpus(80)
    seen = foresee(config, count=known_tasks, machine=machine)
    if config.gpus.trainer:  # on a CPU it is told that GPUs are free
        assert (seen.allocation.errors, seen.allocation.warnings) == ((), ())
    console = Console(file=StringIO(), width=200)
    dry_run(config, console=console, count=known_tasks, machine=machine)
    text = console.file.getvalue()
    group = config.orchestrator.rollouts_per_example
    assert f"{config.orchestrator.batch_size} rollouts a step / {group} of each task" in text
    assert "Memory, estimated" in text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_dry_run_where_neither_data_nor_model_can_be_had_says_so_and_prints_the_plan(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("turnwise.launch.dry_run.known_shape", lambda model: f"config.json of {model} is not at hand: no network")
    console = Console(file=StringIO(), width=200)
    dry_run(composed(name), console=console, count=unreachable, machine=Machine())
    text = console.file.getvalue()
    assert "unknown number of training tasks: no network" in text
    assert "Memory: not estimated, since config.json of " in text
    assert "turnwise.trainer --config" in text


def leaves_of(config: RLConfig) -> dict[str, Any]:
    return leaves(to_tables(config))


COMBINED = "orchestrator.env[0].args."
CHANGES: dict[str, dict[str, Any]] = {
    "lora_8_16": {"trainer.model.lora.rank": 8, "trainer.model.lora.alpha": 16.0},
    "lora_64_64": {"trainer.model.lora.rank": 64, "trainer.model.lora.alpha": 64.0},
    "lora_64_128": {"trainer.model.lora.rank": 64, "trainer.model.lora.alpha": 128.0},
    "full": {"trainer.model.lora": "None", "trainer.optim.offload": True},
    "lr_1e-6": {"trainer.optim.lr": 1e-6},
    "lr_5e-6": {"trainer.optim.lr": 5e-6},
    "grad_norm_0.01": {"trainer.optim.max_grad_norm": 0.01},
    "kl_0": {"trainer.loss.kl_beta": 0.0},
    "kl_0.01": {"trainer.loss.kl_beta": 0.01},
    "dr_grpo": {"trainer.loss.kind": "dr_grpo"},
    "reward_scaling": {"orchestrator.advantage.kind": "grpo"},
    "generations_16": {"orchestrator.rollouts_per_example": 16},
    "batch_8x2": {"orchestrator.batch_size": 8 * 3 * 2},
    "batch_8x4": {"orchestrator.batch_size": 8 * 3 * 4},
    "batch_16x2": {"orchestrator.batch_size": 16 * 3 * 2},
    "batch_16x4": {},  # 16 x 3 x 4 = 8 x 3 x 8: turnwise has no other trace of how a step is accumulated
    "batch_16x8": {"orchestrator.batch_size": 16 * 3 * 8},
    "two_trainers": {"gpus.trainer": [1, 2], "orchestrator.batch_size": 8 * 2 * 8},
    "replicated": {"trainer.model.shard": False},
    "qwen3_4b": {"model.name": "Qwen/Qwen3-4B"},
    "qwen3_8b": {"model.name": "Qwen/Qwen3-8B"},
    "llama31_8b": {
        "model.name": "meta-llama/Llama-3.1-8B-Instruct",
        "model.chat_template": "configs/musique/llama31_tools.jinja",
    },
    "mini": {f"{COMBINED}train": "bdsaglam/musique-mini,answerable,train"},
    "slice_256": {f"{COMBINED}train": "bdsaglam/musique,answerable,train[:256]"},
    "sparse": {"orchestrator.env[0].reward.mode": "sparse"},
    "dense": {
        "orchestrator.advantage.per_turn": True,
        f"{COMBINED}format_reward": 0.1,
        f"{COMBINED}search_cost": 0.02,
        f"{COMBINED}invalid_call_cost": 0.05,
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_changes_what_its_name_says_and_nothing_else(name: str) -> None:
    before, after = leaves_of(compose("base")), leaves_of(compose("base", name))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    assert changed == CHANGES[name]
    gone = set(before) - set(after)
    assert gone == ({key for key in before if key.startswith("trainer.model.lora.")} if name == "full" else set())


def test_every_file_is_the_base_a_part_that_some_experiment_uses_or_a_configuration_of_its_own() -> None:
    files = {path.stem for path in MUSIQUE.glob("*.toml")}
    used = {part for parts in EXPERIMENTS.values() for part in parts}
    assert used == set(CHANGES)
    assert files == {"base", *CHANGES, *SMALL}


def test_the_experiments_cover_every_value_of_the_log() -> None:
    configs = [composed(name) for name in EXPERIMENTS]
    loras = [config.trainer.model.lora for config in configs]
    assert {(lora.rank, lora.alpha) for lora in loras if lora} == {(64, 128), (64, 64), (16, 32), (8, 16)}
    assert None in loras
    assert {config.trainer.optim.lr for config in configs} == {1e-6, 5e-6, 1e-5}
    assert {config.trainer.optim.max_grad_norm for config in configs} == {0.01, 0.1}
    assert {config.trainer.loss.kl_beta for config in configs} == {0, 0.01, 0.04}
    assert {config.trainer.loss.kind for config in configs} == {"grpo", "dr_grpo"}
    assert {config.orchestrator.rollouts_per_example for config in configs} == {8, 16}
    assert {config.orchestrator.advantage.kind for config in configs} == {"grpo", "grpo_nostd"}  # reward scaling on and off
    assert {config.trainer.model.shard for config in configs} == {True, False}  # ZeRO-3 or plain replication
    assert {(len(config.gpus.inference), len(config.gpus.trainer)) for config in configs} == {(1, 2), (1, 3)}
    assert {config.orchestrator.sampling.max_tokens for config in configs} == {1024}
    assert {config.model.name for config in configs} == set(SHAPES) - {"smollm2-135m"}
    assert {config.orchestrator.env[0].args["train"] for config in configs} == {
        "bdsaglam/musique,answerable,train",
        "bdsaglam/musique,answerable,train[:256]",
        "bdsaglam/musique-mini,answerable,train",
    }
    batches = {(config.orchestrator.batch_size, len(config.gpus.trainer)) for config in configs}
    on_three = {(batch * 3 * accumulated, 3) for batch in (8, 16) for accumulated in (2, 4, 8)}
    assert batches == on_three | {(8 * 2 * 8, 2)}


def test_the_control_is_the_base_on_gsm8k() -> None:
    before, after = compose("base"), compose("base", "gsm8k")
    assert after.orchestrator.env[0].id == "gsm8k"
    assert after.model_copy(update={"orchestrator": before.orchestrator}) == before
    assert after.orchestrator.model_copy(update={"env": before.orchestrator.env}) == before.orchestrator


def test_the_page_has_every_experiment_as_the_command_that_the_sweep_runs() -> None:
    page = PAGE.read_text()
    listed = {
        name: tuple(Path(path).stem for path in re.findall(r"@ (\S+\.toml)", command))
        for name, command in re.findall(r"^\| `([\w.-]+)` \|.*\| `(rl @ [^`]*)` \|$", page, re.MULTILINE)
    }
    assert listed == {name: ("base", *parts) for name, parts in (EXPERIMENTS | {"gsm8k": ("gsm8k",)}).items()}


def trainer_gib(config: RLConfig, shape: ModelShape) -> float:
    (first,) = [one for one in estimate(config, shape) if one.process == "trainer rank 0"]
    return first.total / GIB


def test_full_fine_tuning_of_7b_fits_as_its_comment_and_the_page_say(tmp_path: Path) -> None:
    shape = shape_of("Qwen/Qwen2.5-7B-Instruct", tmp_path)
    full = compose("base", "full")
    on_gpus = changed(full, {"trainer": {"optim": {"offload": False}}})
    whole = changed(on_gpus, {"trainer": {"model": {"shard": False}}})
    sums = [trainer_gib(config, shape) for config in (compose("base"), full, on_gpus, whole)]
    assert f"| **sum** | {' | '.join(f'**{size:.1f}**' for size in sums)} |" in PAGE.read_text()
    told = [f"{size:.0f}" for size in sums[1:]]
    assert told == ["33", "52", "137"]
    comment = re.sub(r"\n# ", " ", (MUSIQUE / "full.toml").read_text())
    assert f"Here {told[0]} GiB" in comment
    assert f"{told[1]} GiB without the last; {told[2]} where nothing is sharded" in comment
    (moments,) = [one for one in estimate(full, shape) if "moments" in one.parts]
    assert f"{moments.total / GIB:.0f} GiB of the CPU's memory" in comment


def test_a_gpu_that_is_too_small_for_a_composition_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of("Qwen/Qwen2.5-7B-Instruct", tmp_path)
    monkeypatch.setattr("turnwise.launch.dry_run.known_shape", lambda model: shape)
    errors = foresee(compose("base", "full"), count=known_tasks, machine=four_gpus(8)).allocation.errors
    assert any("GPU 1 (a GPU, 8.0 GiB) cannot hold the trainer" in error for error in errors)


def llama_text(tiny_model: Path, folder: Path) -> ModelText:
    """A small tokenizer with the special tokens of Llama 3, and our template."""
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_model_text(str(folder), chat_template=TEMPLATE)


def test_llamas_template_takes_any_number_of_calls_and_only_grows(tiny_model: Path, tmp_path: Path) -> None:
    look = Tool(name="look", description="Looks.", parameters={"type": "object", "properties": {"at": {"type": "string"}}})
    chat = TemplateChat(llama_text(tiny_model, tmp_path)).with_tools([look])
    assert chat.style is not None
    assert (chat.append_only, chat.style.native, chat.style.several) == (True, True, True)
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    prompt = chat.first_prompt(question)
    assert '"name": "look"' in chat.text(prompt)
    written = '{"name": "look", "parameters": {"at": "a"}}\n{"name": "look", "parameters": {"at": "b"}}'
    sampled = [*chat.encoder.encode(written, ""), chat.encoder.ids["<|eot_id|>"]]
    reply = chat.reply(sampled, prompt)
    assert [call.arguments for call in reply.tool_calls] == [{"at": "a"}, {"at": "b"}]
    answers = [dict(tool_message(call, f"answer {number}")) for number, call in enumerate(reply.tool_calls)]
    history = [*question, reply.to_message()]
    grown = chat.next_prompt(prompt, sampled, history, answers)
    assert grown == chat.first_prompt([*history, *answers])
    heads = "<|start_header_id|>ipython<|end_header_id|>\n\nanswer {}<|eot_id|>"
    tail = heads.format(0) + heads.format(1) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert grown == [*prompt, *sampled, *chat.encoder.encode(tail, "")]
