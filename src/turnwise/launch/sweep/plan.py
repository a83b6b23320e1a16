"""From a sweep file to its runs, each a checked configuration with a seed and a folder of its own."""

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import COMMAND_LINE, Request, check, read_command, split_files
from turnwise.config.differences import Difference, differences, leaves
from turnwise.config.files import Tables, merge, read_toml, to_tables
from turnwise.config.problems import from_pydantic
from turnwise.config.sweep import SweepConfig, SweepRunConfig

SWEEP_FILE = "sweep file"
GPU_PARTS = ("inference", "trainer", "containers")


@dataclass(frozen=True)
class PlannedRun:
    """One experiment with one seed."""

    label: str  # "e6b-s0"
    experiment: SweepRunConfig
    seed: int
    folder: Path  # absolute
    config: RLConfig  # checked; GPUs as the run's own files name them
    shortened: tuple[Difference, ...] = ()  # what overlays and flags change

    @property
    def tables(self) -> Tables:
        """What `rl` is given: every value, defaults too, so that a later version or an edited file changes nothing on the way."""
        return to_tables(self.config)

    @property
    def gpus(self) -> list[int]:
        """The GPUs that the run names, ascending."""
        return sorted({gpu for part in GPU_PARTS for gpu in getattr(self.config.gpus, part)})

    def gpus_on(self, place: Sequence[int] | None) -> dict[str, list[int]]:
        """`gpus.inference`, `gpus.trainer` and `gpus.containers` on a set of GPUs: the first that the run names is its first."""
        on = {gpu: gpu for gpu in self.gpus} if place is None else dict(zip(self.gpus, place, strict=False))
        return {part: [on[gpu] for gpu in getattr(self.config.gpus, part)] for part in GPU_PARTS}


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep in their order, and the places where they may run."""

    sweep: SweepConfig
    root: Path  # absolute
    runs: tuple[PlannedRun, ...]
    flags: bool = False  # whether the command line changes the runs

    @property
    def places(self) -> list[tuple[int, ...] | None]:
        """Sets of GPUs; None is a place without one: the run's own GPUs."""
        return [tuple(gpus) for gpus in self.sweep.gpu_sets] or [None]

    @property
    def shortened(self) -> list[str]:
        """What overlays and flags change, in lines; what they do not change everywhere comes with the experiments' names."""
        experiments = list(dict.fromkeys(run.experiment.id for run in self.runs))
        found: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for difference in run.shortened:
                found.setdefault(str(difference), {})[run.experiment.id] = None
        return [text + ("" if len(own) == len(experiments) else f"  ({', '.join(own)})") for text, own in found.items()]


def read_sweep(args: Sequence[str], *, seeds: int | None = None, output_dir: Path | None = None) -> tuple[SweepConfig, Tables]:
    """The sweep that `@ a.toml @ b.toml --flags` means, and the flags, which are for its runs.

    Raises:
        ConfigError: a file is missing or wrong, or the line cannot be parsed.
    """
    named, flags = split_files(args)
    files = [path for _, path in named]
    if not files:
        raise ConfigError("no sweep file; give one: turnwise sweep @ configs/sweeps/gsm8k_1ep.toml")
    tables: Tables = {}
    for path in files:
        tables = merge(tables, _rooted(read_toml(path), path.parent))
    if seeds is not None:
        tables["seeds"] = list(range(seeds))
    if output_dir is not None:
        tables["output_dir"] = output_dir
    try:
        sweep = SweepConfig.model_validate(tables)
    except ValidationError as error:
        problems = [from_pydantic(detail, SweepConfig).text for detail in error.errors(include_url=False)]
        names = ", ".join(map(str, files))
        raise ConfigError("\n  - ".join([f"{names} is no sweep that can be run:", *dict.fromkeys(problems)])) from error
    return sweep, read_command(flags).flags


def plan_sweep(sweep: SweepConfig, flags: Mapping[str, Any], *, only: Sequence[str] = ()) -> SweepPlan:
    """Compose and check every run; `only` keeps these experiments.

    Raises:
        ConfigError: with everything that is wrong, run by run.
    """
    root = sweep.output_dir.expanduser().resolve()
    problems = [*_names(sweep, only), *_sets(sweep.gpu_sets)]
    runs: list[PlannedRun] = []
    wanted = [run for run in sweep.run if not only or run.id in only]
    composed: dict[str, Request] = {}
    for run in wanted:
        try:
            composed[run.id] = _compose(sweep, run, dict(flags))
            runs += [_planned(sweep, run, seed, composed[run.id], root) for seed in sweep.seeds]
        except ConfigError as error:
            problems.append(f"{run.id}: {error}")
    problems += [problem for run in runs if run.seed == sweep.seeds[0] for problem in _fits(run, sweep)]
    if problems:
        raise ConfigError("\n".join(problems))
    order = {seed: place for place, seed in enumerate(sweep.seeds)}  # a first seed of everything comes before second ones
    return SweepPlan(sweep, root, tuple(sorted(runs, key=lambda run: order[run.seed])), flags=bool(flags))


def _compose(sweep: SweepConfig, run: SweepRunConfig, flags: Tables) -> Request:
    """All of a run but its seed and its folder."""
    request = _read(sweep.files, run.files, sweep.overlays)
    values = merge(merge(sweep.overrides, run.overrides), sweep.overlay_overrides.get(run.id, {}))
    over = merge(values, flags)
    taken = [key for key in ("seed", "output_dir", "run_name", "trajectories_dir") if key in over]
    if taken:
        raise ConfigError(f"{', '.join(taken)} of a run is given by the sweep; use its own keys `seeds`, `output_dir` and `id`.")
    origin = {**request.origin, **dict.fromkeys(leaves(over), SWEEP_FILE), **dict.fromkeys(leaves(flags), COMMAND_LINE)}
    return Request(merge(request.tables, over), flags, origin)


def _read(*files: Iterable[Path]) -> Request:
    return read_command([token for group in files for path in group for token in ("@", str(path))])


def _planned(sweep: SweepConfig, run: SweepRunConfig, seed: int, request: Request, root: Path) -> PlannedRun:
    label = f"{run.id}-s{seed}"
    folder = root / "runs" / label
    own: Tables = {"seed": seed, "output_dir": str(folder), "run_name": label, "trajectories_dir": str(folder / "trajectories")}
    tracked = request.tables.get("wandb")
    if isinstance(tracked, dict):
        own["wandb"] = {"group": sweep.name, **tracked}
    tables = merge(request.tables, own)
    config = check(Request(tables, {}, request.origin))
    own_values = merge(sweep.overrides, run.overrides)
    full = _plain(merge(_read(sweep.files, run.files).tables, own_values))
    return PlannedRun(label, run, seed, folder, config, tuple(differences(full, _plain(request.tables))))


def _plain(tables: Tables) -> Tables:
    """Values with the types that they have in a configuration, text of flags among them, and all defaults."""
    try:
        return to_tables(RLConfig.model_validate(deepcopy(tables)))
    except ValidationError:
        return tables  # a part that only the overlays make whole


def _names(sweep: SweepConfig, only: Sequence[str]) -> list[str]:
    """What is wrong with the names of experiments."""
    ids = [run.id for run in sweep.run]
    known = ", ".join(dict.fromkeys(ids))
    problems = [
        f'run.id = "{name}" stands {ids.count(name)} times; name each once.' for name in dict.fromkeys(ids) if ids.count(name) > 1
    ]
    problems += [f'--only names "{name}"; the sweep has {known}.' for name in only if name not in ids]
    strange = dict.fromkeys(name for pair in sweep.compare for name in pair if name not in ids)
    problems += [f'compare names "{name}"; the sweep has {known}.' for name in strange]
    if len(set(sweep.seeds)) < len(sweep.seeds):
        problems.append(f"seeds = {sweep.seeds} repeats one; name each once.")
    return problems


def _sets(gpu_sets: Sequence[Sequence[int]]) -> list[str]:
    every = [gpu for gpus in gpu_sets for gpu in gpus]
    return [
        f"gpu_sets = {gpu_sets}: GPU {gpu} is named twice; sets are disjoint."
        for gpu in sorted({g for g in every if every.count(g) > 1})
    ]


def _fits(run: PlannedRun, sweep: SweepConfig) -> list[str]:
    """Whether a run can be placed on each set, and beside others."""
    problems: list[str] = []
    for gpus in sweep.gpu_sets:
        if len(run.gpus) > len(gpus):
            problems.append(
                f"{run.experiment.id}: it names {len(run.gpus)} GPUs, {run.gpus}, and gpu_sets holds {list(gpus)}; use larger "
                "sets, or fewer GPUs in overrides.gpus."
            )
    if len(sweep.gpu_sets) > 1 and run.config.inference.port is not None:
        problems.append(
            f"{run.experiment.id}: inference.port = {run.config.inference.port} cannot serve runs side by side; leave it out."
        )
    return problems


def _rooted(tables: Tables, folder: Path) -> Tables:
    """Paths of files as seen from where we are."""

    def rooted(value: Any) -> Any:
        listed = cast(list[Any], value) if isinstance(value, list) else None
        return (
            value if listed is None else [os.path.normpath(folder / path) if isinstance(path, str) else path for path in listed]
        )

    found = {key: rooted(value) if key in ("files", "overlays") else value for key, value in tables.items()}
    if isinstance(tables.get("run"), list):
        found["run"] = [
            {**run, "files": rooted(run["files"])} if isinstance(run, dict) and "files" in run else run for run in tables["run"]
        ]
    return found
