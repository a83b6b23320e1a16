"""MLGym in real containers: a scripted agent solves each task, and what an agent must not reach stays out of its reach."""

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from turnwise.config.containers import ContainersConfig
from turnwise.containers import Pools, open_pools
from turnwise.envs.base import Step
from turnwise.envs.mlgym import MLGym

NEEDS_DATA = pytest.mark.skipif("TURNWISE_DATA" not in os.environ, reason="TURNWISE_DATA names no folder with the task's data")

TITANIC = """
import csv
with open("data/test.csv", newline="") as file:
    rows = list(csv.DictReader(file))
def survives(row):
    family = int(row["SibSp"] or 0) + int(row["Parch"] or 0)
    if row["Pclass"] == "3" and family > 3:
        return 0
    return int(row["Sex"] == "female" or "Master." in row["Name"])
with open("submission.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["PassengerId", "Survived"])
    writer.writerows([row["PassengerId"], survives(row)] for row in rows)
"""
HOUSES = """
import csv
from collections import defaultdict
from statistics import median
read = lambda path: list(csv.DictReader(open(path, newline="")))
train, test = read("data/train.csv"), read("data/test.csv")
number = lambda row, key: float(row[key] or 0)
area = lambda row: number(row, "Gr_Liv_Area") + 0.5 * number(row, "Total_Bsmt_SF") + 30 * number(row, "Garage_Cars")
age = lambda row: int(number(row, "Year_Built")) // 20
rates = defaultdict(list)
for row in train:
    for key in ((row["Neighborhood"], age(row)), row["Neighborhood"], ""):
        rates[key].append(number(row, "SalePrice") / area(row))
keys = lambda row: ((row["Neighborhood"], age(row)), row["Neighborhood"], "")
usual = lambda row: next(median(rates[key]) for key in keys(row) if len(rates[key]) > 4)
with open("submission.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["Id", "SalePrice"])
    writer.writerows([row["Id"], usual(row) * area(row)] for row in test)
"""
PICTURES = """
import gzip
import numpy as np
def read(path, header):
    return np.frombuffer(gzip.open(path).read()[header:], dtype=np.uint8)
train = read("data/train-images.idx3.gz", 16).reshape(-1, 784).astype(np.float32)
labels = read("data/train-labels.idx1.gz", 8)
test = read("data/test-images.idx3.gz", 16).reshape(-1, 784).astype(np.float32)
distances = (train**2).sum(1)[None] - 2 * test @ train.T
nearest = labels[np.argsort(distances, axis=1)[:, :5]]
votes = np.array([np.bincount(row, minlength=10).argmax() for row in nearest])
open("submission.csv", "w").write("label\\n" + "".join(f"{vote}\\n" for vote in votes))
"""


@pytest.fixture(scope="module")
def pools(config: ContainersConfig) -> Iterator[Pools]:
    limits = config.limits.model_copy(update={"memory_mib": 1024, "home_mib": 64, "data_mib": 64})
    with open_pools(config.model_copy(update={"limits": limits, "evaluations": 2}), run="mlgym tests") as pools:
        yield pools


@pytest.fixture
def env(pools: Pools) -> Iterator[MLGym]:
    made = make(pools, "titanic", validate_required=False)
    yield made
    made.close()


def make(pools: Pools, task: str, **args: object) -> MLGym:
    env = MLGym(tasks=[task], **{"image": "python", "max_turns": 12, **args})  # type: ignore[arg-type]
    env.containers = pools
    env.reset(options={"task": env.tasks("train")[0]})
    return env


def act(env: MLGym, command: str) -> Step:
    return env.step(f"So:\n```\n{command}\n```")


def write(env: MLGym, path: str, text: str) -> Step:
    return act(env, f"cat > {path} <<'THE_END'\n{text.strip()}\nTHE_END")


@pytest.mark.parametrize(
    ("task", "path", "solution", "image"),
    [
        ("titanic", "solve.py", TITANIC, "python"),
        ("prisonersDilemma", "strategy.py", "def row_strategy(history):\n    return 1\n", "python"),
        pytest.param("regressionKaggleHousePrice", "solve.py", HOUSES, "python", marks=NEEDS_DATA),
        pytest.param("imageClassificationFMnist", "solve.py", PICTURES, "python-science", marks=NEEDS_DATA),
    ],
)
def test_a_scripted_agent_solves_the_task(pools: Pools, task: str, path: str, solution: str, image: str):
    env = make(pools, task, image=image)
    write(env, path, solution)
    if path == "solve.py":
        observation = act(env, "python3 solve.py")[0]
        assert "exit status" not in observation, observation
    observation, _, terminated, _, info = act(env, "validate")
    assert info["reward_components"]["improvement"] > 0, observation
    assert info["reward_components"]["validate_used"] == pytest.approx(0.1)
    assert not terminated
    again = act(env, "validate")[4]["reward_components"]
    assert again == {"improvement": 0.0}  # the same score is no improvement, and the first use is paid once
    observation, _reward, terminated, _, info = act(env, "submit")
    assert terminated
    assert info["reward_components"]["final_score"] > 0, observation
    assert info["metrics"]["acc"] == info["metrics"]["ended_submitted"] == 1.0
    env.close()


def test_labels_and_evaluator_are_nowhere_in_the_agents_container(env: MLGym):
    label = env.catalogue.build("titanic", 0).secret["test"]["labels.csv"]
    assert isinstance(label, bytes)
    pair = label.decode().splitlines()[1]
    observation = act(
        env, f"grep -rlx '{pair}' / --include=*.csv 2>/dev/null; find / -name 'evaluate.py' -o -name labels.csv 2>/dev/null"
    )
    assert "labels.csv" not in observation[0]
    assert "evaluate.py" not in observation[0]


def test_the_data_cannot_be_changed_by_the_agent(env: MLGym):
    assert "exit status" in act(env, "echo x >> data/train.csv")[0]
    assert "exit status" in act(env, "rm data/train.csv")[0]


def test_a_submission_cannot_replace_its_evaluator(env: MLGym):
    write(env, "evaluate.py", "print('{\"accuracy\": 1.0}')")
    act(env, "python3 baseline.py")
    components = act(env, "submit")[4]["reward_components"]
    assert components["final_score"] == 0.0  # that of the baseline


def test_links_are_no_submission(env: MLGym):
    act(env, "ln -s /etc/passwd submission.csv")
    observation, _, terminated, _, info = act(env, "submit")
    assert terminated
    assert info["reward_components"]["final_score"] == 0.0
    assert "cannot be taken" in observation


@pytest.mark.parametrize(
    "strategy",
    [
        "import os\nprint('{\"Score\": 5.0}', flush=True)\nos._exit(0)",
        "print('{\"Score\": 5.0}')\ndef row_strategy(history):\n    return 2",
        "def row_strategy(history):\n    raise ValueError('no idea')",
        "def other(history):\n    return 0",
    ],
)
def test_code_that_forges_a_score_or_breaks_has_none(pools: Pools, strategy: str):
    env = make(pools, "prisonersDilemma")
    write(env, "strategy.py", strategy)
    observation, *_, info = act(env, "validate")
    assert "There is no score" in observation
    assert info["reward_components"] == {}
    env.close()


def test_an_episode_that_is_cut_is_scored_on_what_is_there(env: MLGym):
    write(env, "solve.py", TITANIC)
    act(env, "python3 solve.py")
    assert env.finish("context_full")["final_score"] > 0
    assert (env.episode_metrics()["ended_autosubmitted"], env.episode_metrics()["acc"]) == (1.0, 1.0)
    assert env.finish("context_full") == {}


def test_the_last_turn_is_scored_too(pools: Pools):
    env = make(pools, "titanic", max_turns=2)
    write(env, "solve.py", TITANIC)
    _, _, terminated, truncated, info = act(env, "python3 solve.py")
    assert (terminated, truncated) == (False, True)
    assert info["reward_components"]["final_score"] > 0
    env.close()


def test_where_validation_is_required_a_submission_alone_scores_nothing(pools: Pools):
    env = make(pools, "titanic", validate_required=True)
    write(env, "solve.py", TITANIC)
    act(env, "python3 solve.py")
    observation, *_, info = act(env, "submit")
    assert info["reward_components"]["final_score"] == 0.0
    assert "wants a validation" in observation
    env.close()


def test_three_misread_replies_in_a_row_end_the_episode(env: MLGym):
    assert not env.step("hello")[2]
    act(env, "skip")
    assert not env.step("hello")[2]
    assert not env.step("```\nls\n```\n```\nls\n```")[2]
    _observation, _, terminated, _, info = env.step("hello")
    assert terminated
    assert (info["metrics"]["format_errors"], info["metrics"]["ended_format"]) == (4.0, 1.0)


def test_a_reply_without_a_command_costs_what_a_command_that_fails_costs(pools: Pools):
    env = make(pools, "titanic", command_reward=1.2)
    paid = [step[4]["reward_components"]["command_ok"] for step in (act(env, "ls"), act(env, "ls nowhere"), env.step("hello"))]
    assert paid == pytest.approx([0.1, -0.1, -0.1])
    env.close()


def test_a_tasks_time_can_be_cut(pools: Pools):
    env = make(pools, "titanic", time_limit_s=1)
    assert "stopped after 1 s" in act(env, "python3 -c 'import time; time.sleep(30)'")[0]
    env.close()


def test_a_deadline_ends_the_command_and_the_episode_goes_on(env: MLGym, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.envs.mlgym.env.QUICK_S", 1.0)
    assert "stopped after 1 s" in act(env, "export X=1; sleep 30")[0]
    assert "baseline.py" in act(env, "ls; echo X=$X.")[0]


def test_files_are_opened_edited_and_searched(env: MLGym):
    assert "1: " in act(env, "open baseline.py")[0]
    text = act(env, "edit 1:1\n'''New.'''\nend_of_edit")[0]
    assert "1: '''New.'''" in text
    refused = act(env, "edit 1:1\ndef (\nend_of_edit")[0]
    assert "Nothing was changed" in refused
    assert "SyntaxError" in refused
    act(env, "create notes.txt")
    act(env, "insert 0\nfirst\nsecond\nend_of_insert")
    assert "2: second" in act(env, "goto 1")[0]
    assert "notes.txt:2:second" in act(env, "search_dir second")[0]
    assert "is there already" in act(env, "create notes.txt")[0]
    assert "there is no" in act(env, "open nowhere.txt")[0]


def test_a_checkout_is_read_and_its_evaluation_kept_from_the_agent(pools: Pools, tmp_path: Path):
    for name, text in {
        "configs/tasks/guess.yaml": """
            id: guessing
            name: Guess
            description: "Write the number. {dataset_docs} {braces}"
            dataset_configs: [datasets/numbers.yaml]
            starter_code: [data/guess/readme.txt, data/guess/score.py]
            evaluation_paths: [score.py]
            baseline_scores: [{accuracy: 0.5}]
            training_timeout: 60
            """,
        "configs/datasets/numbers.yaml": "name: numbers\ndescription: One number.\ndata_path: data/numbers\nis_local: true",
        "data/numbers/number.txt": "7",
        "data/guess/readme.txt": "hello",
        "data/guess/score.py": """
            import argparse, json
            parser = argparse.ArgumentParser()
            parser.add_argument("--submission_file")
            given = open(parser.parse_args().submission_file).read().strip()
            print("a warning")
            print(json.dumps({"Accuracy": float(given == open("data/number.txt").read().strip())}))
            """,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).strip() + "\n")
    env = MLGym(tasks=["guess"], mlgym_root=tmp_path, image="python", max_turns=5)
    env.containers = pools
    observation, _ = env.reset(options={"task": env.tasks("train")[0]})
    assert "One number. {braces}" in observation
    assert "score.py" not in act(env, "ls")[0]
    act(env, "cp data/number.txt submission.csv")
    observation, *_, info = act(env, "submit")
    assert info["reward_components"]["final_score"] == pytest.approx(1.0), observation
    env.close()
