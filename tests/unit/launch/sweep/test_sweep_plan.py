"""From a sweep file to its runs: what each is given, where it runs, and everything that is refused."""

import json
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from support.sweeps import Fakes
from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import check, read_command
from turnwise.config.sweep import SweepRunConfig
from turnwise.launch.sweep.dry_run import plan_json, plan_lines
from turnwise.launch.sweep.plan import PlannedRun, SweepPlan, plan_sweep, read_sweep
from turnwise.launch.sweep.process import arguments

LR = '[[run]]\nid = "a"\ntitle = "first"\nreference = 73.5\nfiles = ["a.toml"]\n[run.overrides.trainer.optim]\nlr = 3e-4\n'
GPUS = '[[run]]\nid = "a"\n[run.overrides.gpus]\ninference = [0]\ntrainer = [2, 1]\n'


def lr_of(run: PlannedRun) -> float:
    return run.config.trainer.optim.lr


def test_files_lie_under_the_runs_own_and_overrides_over_them(tmp_path: Path):
    made = Fakes(tmp_path, LR, "b", keys="[overrides.trainer.optim]\nlr = 2e-4\nwarmup_steps = 1")
    (tmp_path / "a.toml").write_text("seq_len = 300\nmax_steps = 7\n")
    a, b = made.plan().runs
    assert (lr_of(a), lr_of(b)) == (3e-4, 2e-4)
    assert (a.config.seq_len, a.config.max_steps, b.config.max_steps) == (300, 7, 4)
    assert a.config.trainer.optim.warmup_steps == b.config.trainer.optim.warmup_steps == 1
    flagged = made.plan("--trainer.optim.lr", "1e-3").runs
    assert [lr_of(run) for run in flagged] == [1e-3, 1e-3]


def test_what_a_run_is_given_reads_back_as_its_configuration(tmp_path: Path):
    made = Fakes(
        tmp_path, LR, "b", keys='[overrides.trainer.model]\nlora = "None"\n[overrides.orchestrator.overlong]\nbuffer = 9'
    )
    (tmp_path / "a.toml").write_text('max_steps = "None"\nepochs = 1.5\n')
    for run in made.plan("--orchestrator.batch-size", "16", "--gpus.trainer", "[0]").runs:
        file = tmp_path / f"{run.label}.toml"
        file.write_text(tomli_w.dumps(run.tables))
        assert check(read_command(["@", str(file)])) == run.config
        assert (run.config.orchestrator.batch_size, run.config.trainer.model.lora) == (16, None)


def test_every_run_has_a_folder_a_name_and_a_seed_of_its_own_first_seeds_first(tmp_path: Path):
    runs = Fakes(tmp_path, "a", "b").plan(seeds=2).runs
    assert [run.label for run in runs] == ["a-s0", "b-s0", "a-s1", "b-s1"]
    for run in runs:
        folder = tmp_path / "sweep" / "runs" / run.label
        config = run.config
        assert (config.output_dir, config.trajectories_dir, config.run_name) == (folder, folder / "trajectories", run.label)
        assert config.seed == run.seed
    only = Fakes(tmp_path, "a", "b", keys="seeds = [5, 3]").plan(only=["b"]).runs
    assert [run.label for run in only] == ["b-s5", "b-s3"]


def test_runs_that_are_tracked_are_one_group(tmp_path: Path):
    tracked = '[[run]]\nid = "{}"\n[run.overrides.wandb]\n{}\n'
    a, b, c = Fakes(tmp_path, tracked.format("a", 'project = "p"'), tracked.format("b", 'group = "mine"'), "c").plan().runs
    assert [run.config.wandb and (run.config.wandb.project, run.config.wandb.group) for run in (a, b, c)] == [
        ("p", "planted"),
        ("turnwise", "mine"),
        None,
    ]


def test_several_sweep_files_merge_and_each_names_files_from_its_own_folder(tmp_path: Path):
    made = Fakes(tmp_path, "a")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "small.toml").write_text("max_steps = 1\nseq_len = 300\n")
    (folder / "short.toml").write_text(f'output_dir = "{tmp_path}/other"\noverlays = ["small.toml"]\n')
    sweep, flags = read_sweep(["@", str(made.file), "@", str(folder / "short.toml")])
    plan = plan_sweep(sweep, flags)
    (run,) = plan.runs
    assert (plan.root, run.config.max_steps, run.config.seq_len) == (tmp_path / "other", 1, 300)
    assert plan.shortened == ["max_steps: 4 -> 1", "seq_len: 2048 -> 300"]


def test_what_an_overlay_changes_in_some_experiments_only_names_them(tmp_path: Path):
    made = Fakes(tmp_path, "b", LR, keys='overlays = ["small.toml"]')
    (tmp_path / "a.toml").write_text("max_steps = 7\n")
    (tmp_path / "small.toml").write_text("max_steps = 1\nseq_len = 300\n")
    assert made.plan().shortened == ["max_steps: 4 -> 1  (b)", "seq_len: 2048 -> 300", "max_steps: 7 -> 1  (a)"]


def test_an_overlay_may_change_one_experiment_alone_and_name_experiments_of_other_sweeps(tmp_path: Path):
    one = "[overlay_overrides.b]\nmax_steps = 2\n[overlay_overrides.of_another_sweep]\nmax_steps = 3"
    made = Fakes(tmp_path, "a", "b", keys=f'overlays = ["small.toml"]\n{one}')
    (tmp_path / "small.toml").write_text("max_steps = 1\n")
    plan = made.plan()
    assert {run.experiment.id: run.config.max_steps for run in plan.runs} == {"a": 1, "b": 2}
    assert sorted(plan.shortened) == ["max_steps: 4 -> 1  (a)", "max_steps: 4 -> 2  (b)"]


def test_what_the_command_line_changes_is_told_like_an_overlay(tmp_path: Path):
    made = Fakes(tmp_path, "a", keys='overlays = ["small.toml"]\n[overrides.orchestrator]\nmax_staleness = 0')
    (tmp_path / "small.toml").write_text("max_steps = 1\nseq_len = 300\n")
    plan = made.plan("--max-steps", "2", "--trainer.model.lora", "None")
    assert plan.shortened == [
        "max_steps: 4 -> 2",
        "seq_len: 2048 -> 300",
        "trainer.model.lora: {rank = 16, alpha = 32, dropout = 0, target_modules = "
        '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]} -> unset',
    ]
    assert f"changed by {tmp_path}/small.toml, the command line:" in "\n".join(plan_lines(plan, lambda env: 40))


def test_the_gpus_of_a_run_are_counted_along_its_set(tmp_path: Path):
    plan = Fakes(tmp_path, GPUS, keys="gpu_sets = [[4, 5, 6], [1, 3, 7, 0]]").plan()
    (run,) = plan.runs
    assert plan.places == [(4, 5, 6), (1, 3, 7, 0)]
    assert run.gpus_on(plan.places[0]) == {"inference": [4], "trainer": [6, 5], "containers": []}
    assert run.gpus_on(plan.places[1]) == {"inference": [1], "trainer": [7, 3], "containers": []}
    assert run.gpus_on(None) == {"inference": [0], "trainer": [2, 1], "containers": []}
    words = arguments(run, "resume", plan.places[0], Path("x.toml"))
    assert words == ["@", "x.toml", "--plain", "--resume", "--gpus.inference", "[4]", "--gpus.trainer", "[6, 5]"]


@given(st.lists(st.integers(0, 30), min_size=3, max_size=6, unique=True))
def test_a_place_changes_which_gpus_are_used_and_nothing_about_who_shares_them(gpus: list[int]):
    tables = {"max_steps": 1, "gpus": {"inference": [0, 1], "trainer": [1, 2], "share": True}}
    run = PlannedRun("a-s0", SweepRunConfig(id="a"), 0, Path("/x"), RLConfig.model_validate(tables))
    on = run.gpus_on(gpus)
    assert on["inference"][1] == on["trainer"][0]
    assert len({*on["inference"], *on["trainer"]}) == 3
    assert {*on["inference"], *on["trainer"]} <= set(gpus)


REFUSED = [
    ("", ("a", "a"), 'run.id = "a" stands 2 times; name each once.'),
    ("seeds = [1, 1]", ("a",), "seeds = [1, 1] repeats one"),
    ("seeds = []", ("a",), "seeds = [] must have at least 1 entries."),
    ("gpu_sets = [[0, 1], [1, 2]]", ("a",), "GPU 1 is named twice; sets are disjoint."),
    ("gpu_sets = [[0, 1]]", (GPUS,), "a: it names 3 GPUs, [0, 1, 2], and gpu_sets holds [0, 1]; use larger sets"),
    ("gpu_sets = [[], []]\n[overrides.inference]\nport = 8000", ("a",), "inference.port = 8000 cannot serve runs side by side"),
    ('compare = [["a", "z"]]', ("a",), 'compare names "z"; the sweep has a.'),
    ("[overrides]\nseed = 3", ("a",), "seed of a run is given by the sweep; use its own keys"),
    ("[overrides.orchestrator]\nbatch_size = 30", ("a",), "orchestrator.batch_size = 30 is not a multiple"),
    (
        "[overrides.orchestrator]\nbatch_siz = 32",
        ("a",),
        "batch_siz = 32: there is no such key; did you mean batch_size?",
    ),
    ("max_attemps = 2", ("a",), "max_attemps = 2: there is no such key; did you mean max_attempts?"),
    ('files = ["none.toml"]', ("a",), "none.toml: no such file"),
    ("", ('[[run]]\nid = "a b"\n',), 'run[0].id = "a b" must be of the form'),
]


@pytest.mark.parametrize(("keys", "runs", "words"), REFUSED, ids=[words[:40] for _, _, words in REFUSED])
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path, keys: str, runs: tuple[str, ...], words: str):
    made = Fakes(tmp_path, *runs, keys=keys)
    if keys.startswith("files"):
        made.file.write_text(made.file.read_text().replace('files = ["base.toml"]\n', "", 1))
    with pytest.raises(ConfigError) as caught:
        made.plan()
    assert words in str(caught.value)
    assert not made.sweep_root.exists()


def test_the_problems_of_all_runs_are_told_at_once(tmp_path: Path):
    wrong = '[[run]]\nid = "{}"\n[run.overrides]\nseq_len = {}\n'
    with pytest.raises(ConfigError) as caught:
        Fakes(tmp_path, wrong.format("a", 1), wrong.format("b", 2)).plan(only=["a", "b", "c"])
    text = str(caught.value)
    assert 'only names "c"; the sweep has a, b.' in text
    assert "a: One problem in the configuration:\n  - seq_len = 1 must be at least 8.  [sweep file]" in text
    assert "b: One problem in the configuration:\n  - seq_len = 2 must be at least 8.  [sweep file]" in text


def test_without_a_file_there_is_no_sweep():
    with pytest.raises(ConfigError, match="no sweep file; give one"):
        read_sweep(["--max-steps", "3"])


def planned(tmp_path: Path) -> SweepPlan:
    (tmp_path / "a.toml").write_text("")
    made = Fakes(tmp_path, LR, "b", keys='overlays = ["small.toml"]\nwhen_ended_early = "rerun"')
    (tmp_path / "small.toml").write_text('max_steps = "None"\nepochs = 2\n[orchestrator]\nbatch_size = 16\n')
    return made.plan(seeds=2)


def test_a_dry_run_prints_the_arithmetic_of_each_run_and_counts_the_tasks_once(tmp_path: Path):
    asked: list[str] = []
    lines = plan_lines(planned(tmp_path), lambda env: asked.append(env.id) or 40)
    text = "\n".join(lines)
    assert asked == ["wordle"]
    assert "planted: 4 runs, one after the other; seeds 0, 1" in text
    assert "a run that ended early: rerun, at most 3 starts that fail" in text
    assert f"Not the full experiments; changed by {tmp_path}/small.toml:\n  max_steps: 4 -> unset\n" in text
    assert "\na-s0  first\n  files: " in text
    assert "a.toml; reference 73.5" in text
    assert text.count("steps an epoch = floor(40 x 8 / 16) = 20; 40 steps = 2 epochs = 640 rollouts") == 2  # once an experiment
    assert f"rl @ {tmp_path}/sweep/configs/b-s1.toml --plain" in text
    assert lines[-1] == "4 runs, 160 optimiser steps in all"
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_without_the_data_says_so_once_for_all(tmp_path: Path):
    asked: list[str] = []

    def missing(env: object) -> int:
        asked.append("")
        raise ConfigError("not there")

    text = "\n".join(plan_lines(planned(tmp_path), missing))
    assert "steps are not known: not there" in text
    assert len(asked) == 1


def test_a_dry_run_as_json_has_the_same_numbers(tmp_path: Path):
    told = json.loads(plan_json(planned(tmp_path), lambda env: 40))
    assert told["places"] == [None]
    assert [(run["label"], run["max_steps"], run["steps_per_epoch"], run["epochs"]) for run in told["runs"]] == [
        (label, 40, 20, 2.0) for label in ("a-s0", "b-s0", "a-s1", "b-s1")
    ]


def test_a_dry_run_of_a_sweep_that_has_begun_says_what_would_be_done(tmp_path: Path):
    made = Fakes(tmp_path, "a", "b", "c", acts={"a-s0": [{"do": "die", "at": 1, "code": 1}], "c-s0": [{"do": "abort", "at": 1}]})
    made.run()
    text = "\n".join(plan_lines(made.plan(), lambda env: 40))
    assert "\na-s0\n" in text
    assert "  failed: step 3 of 4, exit code 1; 3 of max_attempts = 3 starts failed" in text
    assert "  complete" in text
    assert "  ended early: step 1 of 4: planted: length explosion" in text
