"""Every MLGym experiment of the log composes, says what the log says, and its plan tells what it needs."""

from pathlib import Path
from typing import Any

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import check, read_command
from turnwise.config.differences import leaves
from turnwise.config.files import to_tables
from turnwise.envs import make
from turnwise.envs.mlgym import MLGym
from turnwise.envs.rewards import check_weights
from turnwise.envs.tasks import DATA_VARIABLE
from turnwise.launch.arithmetic import training_arithmetic
from turnwise.launch.hints import COSTS, environment_hints
from turnwise.launch.run import heed_hints

FOLDER = Path(__file__).parents[3] / "configs" / "mlgym"
FOUR = ["titanic", "prisonersDilemma", "imageClassificationFMnist", "regressionKaggleHousePrice"]
OVERLAYS = ("dense", "sparse", "validate_required", "code_quality", "scale_8b")
SMALL = {"debug": ("rl_debug",), "cpu": ("rl_debug", "cpu"), "one_gpu": ("rl_debug", "cpu", "one_gpu")}
RUNS = {**SMALL, "full": ("rl_full",), **{o: ("rl_full", o) for o in OVERLAYS}}


def composed(name: str) -> RLConfig:
    return check(read_command([token for file in RUNS[name] for token in ("@", str(FOLDER / f"{file}.toml"))]))


def environment(config: RLConfig) -> MLGym:
    (table,) = config.orchestrator.env
    made = make(table.id, table.args)
    assert isinstance(made, MLGym)
    check_weights(table.reward, made.component_names, env_id=table.id)
    return made


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that seems to hold what the tasks need."""
    (tmp_path / "fashion_mnist" / "small").mkdir(parents=True)
    (tmp_path / "ames_housing").mkdir()
    (tmp_path / "ames_housing" / "ames_modeldata_2930.csv").touch()
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, str] | None]:
    """An engine's images by name; it has every other one."""
    images: dict[str, dict[str, str] | None] = {}
    monkeypatch.setattr("turnwise.containers.engine.Engine.image_labels", lambda self, image: images.get(image.split(":")[0], {}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return images


def test_every_file_of_the_folder_is_an_experiment_here():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {file for files in RUNS.values() for file in files}


@pytest.mark.parametrize("name", RUNS)
def test_each_composes_and_its_environment_takes_its_arguments(name: str):
    config = composed(name)
    env = environment(config)
    limits = [env.time_limit_s or env.catalogue.time_limit_s(task) for task in env.names]
    assert config.orchestrator.env[0].timeout_s > max(limits)


def test_the_debug_run_is_that_of_the_log():
    config = composed("debug")
    env = environment(config)
    assert (config.max_steps, config.seq_len, config.ckpt.interval) == (10, 4096, 5)
    assert (config.orchestrator.batch_size, config.orchestrator.rollouts_per_example) == (8, 4)
    assert (env.max_turns, env.names, len(env.tasks("train"))) == (10, ("titanic",), 10)
    lora = config.trainer.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, config.trainer.optim.lr, config.model.name) == (16, 32, 1e-5, "Qwen/Qwen3-4B-Instruct-2507")
    assert (config.gpus.inference, config.gpus.trainer, config.gpus.containers) == ([0], [2, 3, 4, 5, 6], [7])


def test_the_full_run_has_the_arithmetic_of_the_log(data: Path):
    config = composed("full")
    arithmetic = training_arithmetic(config)
    assert (arithmetic.examples, arithmetic.examples_per_step, arithmetic.steps_per_epoch) == (40, 4, 10)
    assert (arithmetic.max_steps, arithmetic.epochs) == (200, 20.0)
    assert (environment(config).max_turns, config.seq_len, config.ckpt.interval) == (50, 8192, 20)
    assert list(environment(config).names) == FOUR


@pytest.mark.parametrize("name", ["debug", "full"])
def test_runs_write_where_the_log_looks(name: str):
    config = composed(name)
    assert str(config.output_dir) == "outputs"
    assert config.trajectories_dir is None  # outputs/trajectories


def args_of(config: RLConfig) -> dict[str, Any]:
    return config.orchestrator.env[0].args


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_repeat_what_they_do_not_change(name: str):
    full, over = args_of(composed("full")), args_of(composed(name))
    rewards = {"command_reward", "validate_reward", "submit_reward", "quality_reward", "validate_required"}
    allowed = rewards | ({"num_examples_per_task"} if name == "scale_8b" else set())
    changed = {key for key in full | over if full.get(key) != over.get(key)}
    assert changed <= allowed
    assert set(full) <= set(over)


def test_dense_and_sparse_differ_in_what_pays_and_in_nothing_else():
    dense, sparse = (to_tables(composed(name)) for name in ("dense", "sparse"))
    assert dense["orchestrator"]["env"][0]["args"] == sparse["orchestrator"]["env"][0]["args"]
    for tables in (dense, sparse):
        del tables["orchestrator"]["env"]
    one, other = leaves(dense), leaves(sparse)
    differ = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differ == {"output_dir", "run_name", "orchestrator.advantage.per_turn"}
    assert composed("sparse").orchestrator.env[0].reward.mode == "sparse"


def test_a_missing_data_set_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch, data: Path):
    (data / "ames_housing" / "ames_modeldata_2930.csv").unlink()
    with pytest.raises(
        ConfigError, match=r"regressionKaggleHousePrice needs ames_housing/ames_modeldata_2930\.csv .* does not hold"
    ):
        training_arithmetic(composed("full"))
    monkeypatch.delenv(DATA_VARIABLE)
    with pytest.raises(ConfigError, match=r"imageClassificationFMnist needs fashion_mnist/small .* TURNWISE_DATA is not set"):
        training_arithmetic(composed("full"))
    assert training_arithmetic(composed("debug")).examples == 10  # titanic comes with the package


def test_the_plan_of_the_full_run_warns_that_turns_do_not_fit(engine: dict[str, Any]):
    texts = [hint.text for hint in environment_hints(composed("full"))]
    (turns,) = [text for text in texts if text.startswith("mlgym: 50 turns")]
    assert "come to 88,700, and seq_len = 8,192 leaves 163 for each" in turns
    assert any("gpus.containers = [7]: no environment leases one" in text for text in texts)


def test_the_plan_of_the_cpu_run_has_nothing_to_warn_of(engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    config = composed("cpu")
    assert [hint.text for hint in environment_hints(config)] == []
    assert config.orchestrator.inflight_limit == config.containers.max_containers
    engine["turnwise/python"] = None
    (image,) = environment_hints(config)
    assert COSTS["python"] in image.text
    assert not image.fatal


def changed_env(name: str, **args: Any) -> RLConfig:
    tables = to_tables(composed(name))
    table = tables["orchestrator"]["env"][0]
    timeout_s = args.pop("timeout_s", table["timeout_s"])
    tables["orchestrator"]["env"] = [{**table, "timeout_s": timeout_s, "args": {**table["args"], **args}}]
    return RLConfig.model_validate(tables)


def test_a_step_limit_below_the_tasks_own_is_told_with_a_better_one(engine: dict[str, Any]):
    (hint,) = environment_hints(changed_env("cpu", time_limit_s=700))
    assert "timeout_s = 700 is not above the 700 s that titanic gives" in hint.text
    assert "set it to 1300" in hint.text


def test_gpus_that_no_list_names_stop_the_run_before_it_starts(engine: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"to have 1 GPUs \(args.gpus\), and gpus.containers names 0"):
        heed_hints(changed_env("cpu", gpus=1), lambda text: None)
    engine["mine"] = None
    with pytest.raises(ConfigError, match="has no image 'mine', and nothing is ever pulled"):
        heed_hints(changed_env("cpu", image="mine"), lambda text: None)


def test_an_engine_that_does_not_answer_stops_the_run_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"nobody\.sock does not answer.*bubblewrap"):
        heed_hints(composed("debug"), said.append)
    assert len(said) >= 1  # what is no obstacle is told as well


def test_more_rollouts_than_places_are_told(engine: dict[str, Any]):
    tables = to_tables(composed("cpu")) | {"containers": {"max_containers": 4}}
    (hint,) = [h.text for h in environment_hints(RLConfig.model_validate(tables)) if "places" in h.text]
    assert "8 rollouts are in flight and there are places for 4 containers" in hint
