"""Tasks that come with the package, in MLGym's format and under its names; their scores are not MLGym's scores.

Every variant of a task divides its data anew, by a seed. Half of what is to be predicted is scored by `validate`, the other half
at the end.
"""

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from turnwise.envs.mlgym.builtin.prisoners_dilemma import judge, seed_of, starter_score
from turnwise.envs.mlgym.task import Files, Half, Scores, Submission, Task, scores_in
from turnwise.envs.tasks import DATA_VARIABLE, data_folder

FOLDER = Path(__file__).parent
BASELINE_S = 120.0
HALVES: tuple[Half, Half] = ("validation", "test")

TIME_LIMIT_S = 1800.0  # of a training, and of an evaluation
NEEDS = {"imageClassificationFMnist": "fashion_mnist/small", "regressionKaggleHousePrice": "ames_housing/ames_modeldata_2930.csv"}
"""What tasks need of the user's data folder."""

TITANIC_TRAIN, HOUSES_TRAIN = 891, 2000  # rows that the agent sees with their labels
TITANIC_COLUMNS = {
    "survived": "Survived",
    "pclass": "Pclass",
    "name": "Name",
    "sex": "Sex",
    "age": "Age",
    "sibsp": "SibSp",
    "parch": "Parch",
    "ticket": "Ticket",
    "fare": "Fare",
    "cabin": "Cabin",
    "embarked": "Embarked",
}  # boat and body, which tell the answer, are left out

Row = dict[str, str]


@lru_cache(maxsize=64)
def build(name: str, variant: int) -> Task:
    """A built-in task.

    Args:
        name: one of `BUILTIN`.
        variant: seed of the division of its data.

    Raises:
        ValueError: there is no such task, or its data is not there.
    """
    if name not in BUILTIN:
        raise ValueError(f"there is no built-in task {name!r}; there are {', '.join(BUILTIN)}")
    task = replace(BUILTIN[name](variant), id=f"{name}/{variant}")
    return task if task.baseline else replace(task, baseline={half: _baseline(task, half) for half in HALVES})


def _titanic(variant: int) -> Task:
    rows = _rows((FOLDER / "titanic" / "passengers.csv").read_text(encoding="utf-8"))
    named = [{theirs: row[ours] for ours, theirs in TITANIC_COLUMNS.items()} for row in rows]
    return _table("titanic", "accuracy", named, variant, key="PassengerId", target="Survived", train=TITANIC_TRAIN)


def _house_prices(variant: int) -> Task:
    path = needed("regressionKaggleHousePrice")
    rows = _rows(path.read_text(encoding="utf-8"))
    named = [{("SalePrice" if key == "Sale_Price" else key): value for key, value in row.items()} for row in rows]
    return _table("house_prices", "r2", named, variant, key="Id", target="SalePrice", train=HOUSES_TRAIN)


def _fashion_mnist(variant: int) -> Task:
    folder = needed("imageClassificationFMnist")
    images, labels = _read_idx(folder / "t10k-images-idx3-ubyte.gz"), _read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    order = np.random.default_rng(variant).permutation(len(labels))
    images, labels = images[order], labels[order]
    secret: dict[Half, Files] = {}
    for at, half in enumerate(HALVES):
        own = [{"index": str(i), "label": str(int(labels[i]))} for i in range(at, len(labels), 2)]
        secret[half] = {"labels.csv": _csv(own), "count.json": json.dumps(len(labels)).encode()}
    data: Files = {
        "train-images.idx3.gz": folder / "train-images-idx3-ubyte.gz",
        "train-labels.idx1.gz": folder / "train-labels-idx1-ubyte.gz",
        "test-images.idx3.gz": _idx(images),
    }
    return _task("fashion_mnist", "accuracy", data, secret)


def _prisoners_dilemma(variant: int) -> Task:
    halves: dict[Half, Files] = {half: {} for half in HALVES}
    task = _task("prisoners_dilemma", "Score", {}, halves, Submission.PYTHON)
    baseline = {half: {"Score": starter_score(seed_of(variant, half))} for half in HALVES}
    return replace(task, judge=lambda box, half: judge(box, seed_of(variant, half)), baseline=baseline)


BUILTIN: dict[str, Callable[[int], Task]] = {
    "titanic": _titanic,
    "prisonersDilemma": _prisoners_dilemma,
    "imageClassificationFMnist": _fashion_mnist,
    "regressionKaggleHousePrice": _house_prices,
}


def _table(folder: str, metric: str, rows: Sequence[Row], variant: int, *, key: str, target: str, train: int) -> Task:
    """A task about a table: shuffled and numbered anew, the first `train` rows with their target, the others without."""
    shuffled = random.Random(variant).sample(rows, len(rows))
    numbered = [{key: str(number), **row} for number, row in enumerate(shuffled, start=1)]
    seen, asked = numbered[:train], numbered[train:]
    hidden = [{name: value for name, value in row.items() if name != target} for row in asked]
    data = {"train.csv": _csv(seen), "test.csv": _csv(hidden)}
    secret: dict[Half, Files] = {
        half: {"labels.csv": _csv([{key: row[key], target: row[target]} for row in asked[at::2]])}
        for at, half in enumerate(HALVES)
    }
    return _task(folder, metric, data, secret)


def _task(folder: str, metric: str, data: Files, secret: dict[Half, Files], submission: Submission = Submission.CSV) -> Task:
    files = FOLDER / folder
    dataset = files / "dataset.md"
    docs = dataset.read_text(encoding="utf-8").strip() if dataset.exists() else ""
    starter = "strategy.py" if submission is Submission.PYTHON else "baseline.py"
    evaluator = {"evaluate.py": (files / "evaluate.py").read_bytes()} if submission is Submission.CSV else {}
    return Task(
        id=folder,
        name=folder,
        description=(files / "description.md").read_text(encoding="utf-8").replace("{dataset_docs}", docs).strip(),
        submission=submission,
        metric=metric,
        evaluator="evaluate.py",
        workspace={starter: (files / starter).read_bytes()},
        data=data,
        secret={half: {**own, **evaluator} for half, own in secret.items()},
        time_limit_s=TIME_LIMIT_S,
    )


def _baseline(task: Task, half: Half) -> Scores:
    """What the starter earns: run here, since both it and the evaluator are ours."""
    with tempfile.TemporaryDirectory(prefix="turnwise-baseline-") as scratch:
        workspace = Path(scratch)
        for files, folder in ((task.workspace, workspace), (task.data, workspace / "data"), (task.secret[half], workspace)):
            folder.mkdir(exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        _python(workspace, "baseline.py")
        scores = scores_in(_python(workspace, task.evaluator, "--submission_file", "submission.csv"))
    if scores is None:
        raise ValueError(f"the baseline of the task {task.name} has no score")
    return scores


def _python(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=BASELINE_S)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments)} of a built-in task failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def needed(task: str) -> Path:
    """The file or folder of the data folder that a task needs, one of `NEEDS`. Raises ValueError when it is not there."""
    folder, name = data_folder(), NEEDS[task]
    if folder is None or not (folder / name).exists():
        where = f"{DATA_VARIABLE} is not set" if folder is None else f"{folder} does not hold it"
        raise ValueError(
            f"the task {task} needs {name} in the folder that {DATA_VARIABLE} names, and {where}; docs/mlgym.md says whence, "
            "or leave it out of args.tasks"
        )
    return folder / name


def _rows(text: str) -> list[Row]:
    return list(csv.DictReader(io.StringIO(text)))


def _csv(rows: Sequence[Row]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    return gzip.compress(header + values.tobytes(), mtime=0)
