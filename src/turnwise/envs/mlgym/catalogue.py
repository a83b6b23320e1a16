"""Tasks by name: those of a checkout in MLGym's layout, and those that come with the package."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from turnwise.envs.mlgym.builtin import BUILTIN, NEEDS, TIME_LIMIT_S, build, needed
from turnwise.envs.mlgym.task import Content, Half, Submission, Task, rises
from turnwise.envs.suggest import did_you_mean

REQUIRED = ("id", "name", "description")


class Catalogue:
    """Where tasks come from.

    Args:
        root: a checkout (`configs/tasks/*.yaml`, `configs/datasets/*.yaml`, `data/`), or None for the built-in tasks alone.

    Raises:
        ValueError: the folder holds no configs/tasks.
    """

    def __init__(self, root: Path | None) -> None:
        if root is not None and not (root / "configs" / "tasks").is_dir():
            raise ValueError(f"args.mlgym_root = {root} has no folder configs/tasks; give the root of a checkout")
        self.root = root

    @property
    def names(self) -> list[str]:
        """All names, those of the checkout first."""
        own = sorted(path.stem for path in (self.root / "configs" / "tasks").glob("*.yaml")) if self.root else []
        return [*own, *(name for name in BUILTIN if name not in own)]

    def check(self, tasks: Sequence[str]) -> None:
        """Raises ValueError for no task, one that is not known, or one whose files are not there."""
        if not tasks:
            raise ValueError("args.tasks is empty; name at least one task")
        for name in tasks:
            if name not in self.names:
                known = ", ".join(self.names)
                raise ValueError(f"args.tasks names {name!r}.{did_you_mean(name, self.names)} There are {known}.")
            if self.root is not None and self._in_checkout(name):
                read_task(self.root, name)

    def check_data(self, tasks: Sequence[str]) -> None:
        """Raises ValueError where a built-in task needs files that the user has not brought."""
        for name in tasks:
            if name in NEEDS and not self._in_checkout(name):
                needed(name)

    def build(self, name: str, variant: int) -> Task:
        """A task. A checkout's is the same in every variant but for its id. Raises ValueError as `check` and `check_data`."""
        if self.root is not None and self._in_checkout(name):
            return replace(read_task(self.root, name), id=f"{name}/{variant}")
        return build(name, variant)

    def time_limit_s(self, name: str) -> float:
        """Of a training and of an evaluation. Raises ValueError as `check`."""
        return read_task(self.root, name).time_limit_s if self.root and self._in_checkout(name) else TIME_LIMIT_S

    def _in_checkout(self, name: str) -> bool:
        return self.root is not None and (self.root / "configs" / "tasks" / f"{name}.yaml").is_file()


@lru_cache(maxsize=64)
def read_task(root: Path, name: str) -> Task:
    """A task of a checkout.

    Paths have three bases: data set files are relative to `configs/`, starter code and data to the root, baseline and evaluation
    to the workspace. Evaluation scripts and `secret_files` are kept from the agent. The checkout does not divide what is hidden:
    both halves are the same.

    Raises:
        ValueError: a key is missing or has a value that is not understood, or a file that it names is not there.
    """
    path = root / "configs" / "tasks" / f"{name}.yaml"
    table = _read(path)
    if missing := [key for key in REQUIRED if key not in table]:
        raise ValueError(f"{path} lacks the key {missing[0]!r}")
    sets = [_read(root / "configs" / entry) for entry in table.get("dataset_configs") or []]
    docs = "\n\n".join(str(one.get("description", "")).strip() for one in sets)
    starter = _starter(root, path, table.get("starter_code") or [])
    evaluator = _first(table, "evaluation_paths", path)
    hidden = {evaluator, *map(str, table.get("secret_files") or [])}
    secret = {name: content for name, content in starter.items() if name in hidden}
    if evaluator not in secret:
        raise ValueError(f"{path}: the evaluation {evaluator!r} is not among starter_code")
    metric, scores = _baseline(table, path)
    halves: tuple[Half, Half] = ("validation", "test")
    return Task(
        id=str(table["id"]),
        name=str(table["name"]),
        description=str(table["description"]).replace("{dataset_docs}", docs).strip(),
        submission=_submission(table, path),
        metric=metric,
        evaluator=evaluator,
        workspace={name: content for name, content in starter.items() if name not in hidden},
        data=_data(root, sets),
        secret=dict.fromkeys(halves, secret),
        baseline=dict.fromkeys(halves, scores),
        time_limit_s=float(table.get("training_timeout") or 3600),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a table of keys")
    return value


def _starter(root: Path, path: Path, entries: Sequence[str]) -> dict[str, Content]:
    """Files by their place in the workspace, into which files and folders are copied flat."""
    found: dict[str, Content] = {}
    for entry in entries:
        source = root / entry
        if source.is_file():
            found[source.name] = source
        elif source.is_dir():
            inside = (file for file in sorted(source.rglob("*")) if file.is_file() and not file.is_symlink())
            found |= {f"{source.name}/{file.relative_to(source).as_posix()}": file for file in inside}
        else:
            raise ValueError(f"{path}: starter_code names {entry!r}, which is not in {root}")
    return found


def _data(root: Path, sets: Sequence[dict[str, Any]]) -> dict[str, Content]:
    """Files of all data sets, flat in the data folder as a single set's are; several sets have folders of their names."""
    found: dict[str, Content] = {}
    for one in sets:
        source = root / str(one.get("data_path", ""))
        if not one.get("is_local", True) or not source.is_dir():
            raise ValueError(f"data set {one.get('name')!r}: {one.get('data_path')!r} is no folder of {root}; download it there")
        prefix = f"{one.get('name')}/" if len(sets) > 1 else ""
        inside = (file for file in sorted(source.rglob("*")) if file.is_file() and not file.is_symlink())
        found |= {f"{prefix}{file.relative_to(source).as_posix()}": file for file in inside}
    return found


def _first(table: dict[str, Any], key: str, path: Path) -> str:
    values = table.get(key) or []
    if not values:
        raise ValueError(f"{path} has no {key}")
    return str(values[0])


def _submission(table: dict[str, Any], path: Path) -> Submission:
    value = table.get("task_entrypoint", Submission.CSV.value)
    try:
        return Submission(value)
    except ValueError as error:
        known = ", ".join(Submission)
        raise ValueError(f"{path}: task_entrypoint = {value!r} must be one of {known}") from error


def _baseline(table: dict[str, Any], path: Path) -> tuple[str, dict[str, float]]:
    """The metric by which a task is judged, and the scores to improve on: the first of `baseline_scores`."""
    listed = table.get("baseline_scores") or []
    if not listed or not isinstance(listed[0], dict):
        raise ValueError(f"{path} has no baseline_scores, by which improvement is measured; add them ([{{accuracy: 0.5}}])")
    scores = {str(name): float(value) for name, value in listed[0].items()}
    names = sorted(scores, key=lambda name: name.lower() == "rmse")  # r2 ranks where both are there
    metric = names[0]
    rises(metric)
    return metric, scores
