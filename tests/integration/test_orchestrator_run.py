"""The whole orchestrator against an engine with the real routes and a trainer that publishes real adapters."""

import asyncio
import contextlib
import json
import math
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import faulty_envs
from support.fake_trainer import publish
from support.orchestrated import DEADLINE_S, batches, make_config, metrics, run, samples, trainer_of, until
from support.rollouts import ECHO
from support.scripted_engine import Fault, ScriptedEngine
from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.orchestrator.__main__ import load_progress
from turnwise.orchestrator.scheduler import TooManyErrors
from turnwise.orchestrator.versions import TrainerSilent
from turnwise.orchestrator.weights import WrongWeights
from turnwise.transport import BatchLog, Control, Progress, RunDir, Sample, StopRequest, WeightsStore


async def test_a_run_goes_from_the_first_version_to_the_last_evaluation(tiny_model: Path, tmp_path: Path, capsys: Any):
    config = make_config(tiny_model, tmp_path, orchestrator={"eval": {"num_examples": 2, "interval": 2}})
    trainer = trainer_of(config, step_s=0.4)
    async with ScriptedEngine(latency_s=0.01) as engine:
        assert await run(config, engine, trainer) is None
        assert list(engine.adapters) == ["v4"]
    run_dir = RunDir(tmp_path)
    assert [batch.step for batch in trainer.batches] == [1, 2, 3, 4]
    assert all(batch.step - 1 - s.oldest_version in (0, 1) for batch in trainer.batches for s in batch.samples)
    assert True in trainer.ahead[:3]  # rollouts of the next batch ran while a step trained
    assert sorted(path.name for path in run_dir.evals.iterdir()) == ["step_0.json", "step_2.json", "step_4.json"]
    assert len((tmp_path / "trajectories" / "step_1.jsonl").read_text().splitlines()) == 8
    merged = metrics(config)
    assert sorted(merged) == [0, 1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        assert merged[step]["actor/loss"] == 0.5 / step  # of the trainer
        assert "critic/reward/mean" in merged[step]  # of the orchestrator
    assert "val-core/Echo/reward/mean" in merged[0]
    assert "val-core/Echo/reward/stderr" in merged[4]
    assert json.loads(run_dir.status.read_text())["phase"] == "done"
    shown = capsys.readouterr().out
    assert "batch 1/4 | reward" in shown
    assert "│ reply >" in shown
    assert "step 4/4 | reward" in shown


async def test_wordle_is_played_and_shown(tiny_model: Path, tmp_path: Path, capsys: Any):
    """Byte-level ids spell words, so that the real game is played."""
    from turnwise.orchestrator.chat import TemplateChat, load_chat

    chat = load_chat(str(tiny_model))
    assert isinstance(chat, TemplateChat)
    encode = chat.encoder.encode

    def words(body: dict[str, Any]) -> Sequence[int]:
        word = random.Random(str(body["seed"])).choice(["crane", "slate", "about", "other", "qzxjk"])
        return [*encode(word, "\ufdef"), chat.stop_ids[0]]

    config = make_config(
        tiny_model, tmp_path, max_steps=2, seq_len=4096, orchestrator={"env": [{"id": "wordle"}], "sampling": {"max_tokens": 16}}
    )
    async with ScriptedEngine(script=words) as engine:
        await run(config, engine, trainer_of(config))
    merged = metrics(config)
    assert merged[1]["num_turns/mean"] > 1
    assert {"reward/format/mean", "reward/win/mean", "env/win_rate/mean"} <= merged[1].keys()
    assert {"val-aux/wordle/win_rate/mean", "val-aux/wordle/distinct_replies/share"} <= merged[2].keys()
    assert "│ reply > crane" in capsys.readouterr().out


async def test_without_staleness_generation_and_training_alternate(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, orchestrator={"max_staleness": 0})
    trainer = trainer_of(config, step_s=0.1)
    async with ScriptedEngine() as engine:
        await run(config, engine, trainer)
    assert trainer.ahead == [False] * 4
    assert all(s.oldest_version == batch.step - 1 for batch in trainer.batches for s in batch.samples)
    assert all(set(s.policy_versions) == {-1, batch.step - 1} for batch in trainer.batches for s in batch.samples)


@pytest.mark.parametrize("dynamic", [False, True])
async def test_without_staleness_a_run_is_the_same_to_the_bit_however_requests_are_timed(
    tiny_model: Path, tmp_path: Path, dynamic: bool
):
    settings = {"max_staleness": 0, "filters": {"dynamic_sampling": dynamic}, "buffer": {"kind": "difficulty"}}
    outcomes: list[list[list[Sample]]] = []
    for name, latency in (("a", 0.0), ("b", 0.02)):
        config = make_config(tiny_model, tmp_path / name, max_steps=3, orchestrator=settings)
        async with ScriptedEngine(latency_s=latency) as engine:
            await run(config, engine, trainer_of(config))
        outcomes.append(samples(config))
    assert outcomes[0] == outcomes[1]


async def test_two_steps_a_resume_and_two_more_are_four_steps_to_the_bit(tiny_model: Path, tmp_path: Path):
    settings = {"max_staleness": 0}
    whole = make_config(tiny_model, tmp_path / "whole", orchestrator=settings)
    async with ScriptedEngine() as engine:
        await run(whole, engine, trainer_of(whole))
    cut = make_config(tiny_model, tmp_path / "cut", orchestrator=settings)
    async with ScriptedEngine() as engine:
        with pytest.raises(TimeoutError):
            await run(cut, engine, trainer_of(cut, stop_after=2), cut_after_s=3.0)
    # the checkpoint is of step 2, and batch 3 was written before the end: it is replayed, not made again
    assert BatchLog(RunDir(cut.output_dir).batches).steps() == [1, 2, 3]
    written = BatchLog(RunDir(cut.output_dir).batches).path(3).read_bytes()
    WeightsStore(RunDir(cut.output_dir).weights).forget_after(2)
    trainer = trainer_of(cut, first=2)
    async with ScriptedEngine() as engine:
        await run(cut, engine, trainer, resume_step=2)
    assert [batch.step for batch in trainer.batches] == [3, 4]
    assert BatchLog(RunDir(cut.output_dir).batches).path(3).read_bytes() == written
    assert samples(cut) == samples(whole)


async def test_without_batches_the_checkpoint_says_where_the_orchestrator_stands(tiny_model: Path, tmp_path: Path):
    run_dir = RunDir(tmp_path)
    assert load_progress(run_dir, 0) == (Progress(), 1)
    folder = run_dir.checkpoint(5)
    folder.mkdir(parents=True)
    kept = Progress(11, [7, 9], {"buffer": {"stats": {}, "drawn": {}}})
    (folder / "orchestrator.msgpack").write_bytes(msgspec.msgpack.encode(kept))
    assert load_progress(run_dir, 5) == (kept, 6)
    (folder / "orchestrator.msgpack").write_bytes(b"\xc1torn")
    with pytest.raises(ValueError, match="resume from an older step"):
        load_progress(run_dir, 5)


async def test_a_run_killed_at_random_moments_accounts_for_every_rollout_exactly_once(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, max_steps=12, orchestrator={"max_staleness": 2})
    moments, step = random.Random(5), 0
    for _ in range(4):
        async with ScriptedEngine(latency_s=0.01) as engine:
            trainer = trainer_of(config, first=step, step_s=0.05)
            with contextlib.suppress(TimeoutError):
                await run(config, engine, trainer, resume_step=step, cut_after_s=moments.uniform(0.5, 1.2))
        # a checkpoint of some step that was trained on: later versions belong to a lineage that is given up
        trained = max(WeightsStore(RunDir(tmp_path).weights).versions(), default=0)
        step = moments.randint(step, trained) if trained > step else step
        _checkpoint(config, step)
        WeightsStore(RunDir(tmp_path).weights).forget_after(step)
    async with ScriptedEngine() as engine:
        assert await run(config, engine, trainer_of(config, first=step), resume_step=step) is None
    made = batches(config)
    assert [batch.step for batch in made] == list(range(1, 13))
    accounted = Counter(rollout for batch in made for rollout in batch.rollout_ids)
    assert set(accounted.values()) == {1}  # nothing trained on twice
    groups = {int(rollout[1:].split("-")[0]) for rollout in accounted}
    last = made[-1].progress
    assert groups | set(last.pending) == set(range(last.next_group))  # nothing lost
    assert not groups & set(last.pending)
    assert all(batch.step - 1 - s.oldest_version <= 2 for batch in made for s in batch.samples)


def _checkpoint(config: RLConfig, step: int) -> None:
    """What the trainer writes of the orchestrator into the checkpoint of a step."""
    if step:
        folder = RunDir(config.output_dir).checkpoint(step)
        folder.mkdir(parents=True, exist_ok=True)
        progress = BatchLog(RunDir(config.output_dir).batches).read(step).progress
        (folder / "orchestrator.msgpack").write_bytes(msgspec.msgpack.encode(progress))


async def test_an_engine_that_holds_other_weights_stops_the_run(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path)
    async with ScriptedEngine(digest="0" * 64) as engine:
        with pytest.RaisesGroup(pytest.RaisesExc(WrongWeights, match="version 0")):
            await run(config, engine, trainer_of(config))
    assert not batches(config)


async def test_a_trainer_that_falls_silent_is_reported_with_the_key(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, trainer={"timeout_s": 0.5})
    async with ScriptedEngine() as engine:
        with pytest.RaisesGroup(pytest.RaisesExc(TrainerSilent, match=r"no policy v2 within trainer\.timeout_s = 0\.5 s")):
            await run(config, engine, trainer_of(config, stop_after=1))
        with pytest.RaisesGroup(pytest.RaisesExc(TrainerSilent, match="no policy v9")):
            _checkpoint_file(tmp_path, 9)
            await run(config.model_copy(update={"max_steps": 12}), engine, None, resume_step=9)


def _checkpoint_file(root: Path, step: int) -> None:
    folder = RunDir(root).checkpoint(step)
    folder.mkdir(parents=True)
    (folder / "orchestrator.msgpack").write_bytes(msgspec.msgpack.encode(Progress(40)))


async def test_an_engine_that_dies_ends_the_run_with_the_reason(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, max_steps=50)
    async with ScriptedEngine(latency_s=0.01) as engine:

        async def die() -> None:
            await until(lambda: len(engine.requests) >= 60)
            await engine.close()

        dying = asyncio.create_task(die())
        with pytest.RaisesGroup(pytest.RaisesExc(TooManyErrors, match="EngineUnavailable")):
            await run(config, engine, trainer_of(config))
        await dying


async def test_an_engine_whose_logits_are_not_finite_ends_the_run_with_that_reason(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path)
    async with ScriptedEngine(logprob=math.nan) as engine:
        words = rf"^8 of the last 8 rollouts .* Reasons: EngineError: {engine.url}: the logits of policy version 0 are not finite"
        with pytest.RaisesGroup(pytest.RaisesExc(TooManyErrors, match=words)):
            await run(config, engine, trainer_of(config))


async def test_environments_that_hang_or_raise_cost_their_rollouts_and_nothing_else(tiny_model: Path, tmp_path: Path):
    faulty_envs.Faulty.broken = 0
    faulty_envs.release.clear()
    envs = [
        {"id": ECHO, "weight": 3.0},
        {"id": "support.faulty_envs:Faulty", "args": {"where": "step", "what": "hang"}, "timeout_s": 0.1},
    ]
    config = make_config(tiny_model, tmp_path, orchestrator={"env": envs, "eval_env": [{"id": ECHO}], "max_error_retries": 0})
    async with ScriptedEngine() as engine:
        assert await run(config, engine, trainer_of(config)) is None
    faulty_envs.release.set()
    assert [batch.step for batch in batches(config)] == [1, 2, 3, 4]
    assert sum(record.get("rollouts/errored/count", 0.0) for record in metrics(config).values()) > 0
    lines = [json.loads(line) for path in (tmp_path / "trajectories").glob("*.jsonl") for line in path.read_text().splitlines()]
    errored = [line for line in lines if line["error"]]
    assert errored
    assert all("step of Faulty hung" in line["error"] and line["fate"] == "errored" for line in errored)


async def test_a_request_to_stop_ends_the_run_at_once_without_a_last_evaluation(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, max_steps=500)
    async with ScriptedEngine(latency_s=0.05) as engine:

        async def interrupt() -> None:
            await until(lambda: bool(BatchLog(RunDir(tmp_path).batches).steps()))
            Control(tmp_path).request_stop("interrupted", "by the test")

        asking = asyncio.create_task(interrupt())
        request = await run(config, engine, trainer_of(config))
        await asking
    assert request == StopRequest("interrupted", "by the test")
    assert not RunDir(tmp_path).evals.exists()


async def test_success_evaluates_the_policy_once_more_and_then_asks_everyone_to_stop(tiny_model: Path, tmp_path: Path):
    stop = {"success_when": "running_mean(total_reward) > -100", "stop_on_success": True, "window": 2}
    config = make_config(tiny_model, tmp_path, max_steps=50, stop=stop)
    async with ScriptedEngine() as engine:
        request = await run(config, engine, trainer_of(config))
    assert request is not None
    assert request.kind == "success"
    assert Control(tmp_path).stop_request() == request
    (evaluated,) = RunDir(tmp_path).evals.iterdir()
    assert int(evaluated.stem.removeprefix("step_")) >= 2


async def test_success_at_the_last_step_evaluates_it_once(tiny_model: Path, tmp_path: Path, capsys: Any):
    stop = {"success_when": "running_mean(total_reward) > -100", "stop_on_success": True, "window": 2}
    config = make_config(tiny_model, tmp_path, max_steps=2, stop=stop)
    async with ScriptedEngine() as engine:
        request = await run(config, engine, trainer_of(config))
    assert request is not None
    assert capsys.readouterr().out.count("evaluating policy v2") == 1


async def test_an_abort_condition_ends_the_run(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, max_steps=50, stop={"abort_when": "actor/loss > 0", "window": 1})
    async with ScriptedEngine() as engine:
        request = await run(config, engine, trainer_of(config))
    assert request is not None
    assert request.kind == "abort"


async def test_a_slow_evaluation_does_not_keep_training_waiting(tiny_model: Path, tmp_path: Path):
    """Held-out requests of version 2 hang; training goes on meanwhile, and version 2 stays loaded for them."""
    hold = asyncio.Event()

    class Slow(ScriptedEngine):
        async def _finish(self, body: dict[str, Any], ids: Sequence[int]) -> str:
            if body["model"] == "v2" and body["temperature"] == 0.0:
                await hold.wait()
            return await super()._finish(body, ids)

    config = make_config(
        tiny_model,
        tmp_path,
        max_steps=6,
        orchestrator={"eval": {"num_examples": 2, "interval": 2, "temperature": 0.0, "at_start": False}, "max_staleness": 1},
        inference={"max_loras": 5, "dp": 1, "port": 1, "max_retries": 0},
    )
    trainer = trainer_of(config)
    async with Slow() as engine:
        running = asyncio.create_task(run(config, engine, trainer))
        await until(lambda: any(body["model"] == "v2" and body["temperature"] == 0.0 for body in engine.requests))
        await until(lambda: len(trainer.batches) >= 4)
        assert "v2" in engine.adapters
        hold.set()
        assert await running is None
    evaluated = {path.stem: json.loads(path.read_text()) for path in RunDir(tmp_path).evals.iterdir()}
    assert {name: content["version"] for name, content in evaluated.items()} == {"step_2": 2, "step_4": 4, "step_6": 6}


# --- as a process -----------------------------------------------------------------------------------------------------


async def start_process(config: RLConfig, engine: ScriptedEngine) -> asyncio.subprocess.Process:
    port = int(engine.url.rsplit(":", 1)[1])
    config = config.model_copy(update={"inference": config.inference.model_copy(update={"port": port})})
    path = RunDir(config.output_dir).config
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_toml(config))
    argv = [sys.executable, "-m", "turnwise.orchestrator", "--config", str(path)]
    tests = Path(__file__).parent.parent
    return await asyncio.create_subprocess_exec(
        *argv,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PYTHONPATH": str(tests), "PATH": "/usr/bin:/bin"},
    )


async def finish(process: asyncio.subprocess.Process) -> tuple[int, str]:
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_process_ends_with_0_after_the_last_step(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, max_steps=2)
    trainer = asyncio.create_task(trainer_of(config).run())
    async with ScriptedEngine(require_adapters=True) as engine:
        code, output = await finish(await start_process(config, engine))
    await trainer
    assert code == 0, output
    assert "all steps done" in output
    assert Control(tmp_path).stop_request() is None


@pytest.mark.parametrize(("dynamic", "needed"), [(False, 1), (True, 2)])
async def test_only_equal_rewards_end_the_process_with_an_explanation_and_an_error(
    tiny_model: Path, tmp_path: Path, dynamic: bool, needed: int
):
    config = make_config(tiny_model, tmp_path, orchestrator={"filters": {"max_rounds": 2, "dynamic_sampling": dynamic}})
    publish(WeightsStore(RunDir(tmp_path).weights), 0)
    async with ScriptedEngine(script=[[65, 257]]) as engine:
        code, output = await finish(await start_process(config, engine))
    assert code == 1
    request = Control(tmp_path).stop_request()
    assert request is not None
    assert request.kind == "failed"
    assert f"0 groups of 4 carried signal and {needed} are needed" in request.reason
    assert "orchestrator.filters.max_rounds = 2" in request.reason
    assert "Distinct replies: 1 of 48" in output
    assert "Traceback" not in output
    assert not batches(config)
    rollouts = (tmp_path / "trajectories" / "step_1.jsonl").read_text().splitlines()
    assert len(rollouts) == 16  # to be looked at: four groups of four
    assert all(json.loads(rollout)["fate"] == "equal_reward" for rollout in rollouts)


async def test_an_engine_that_holds_another_version_ends_the_process_with_a_reason(tiny_model: Path, tmp_path: Path):
    """From the second version on it serves the first: the run stops there, and says which engine and which version."""

    class Stale(ScriptedEngine):
        def _true_digest(self, name: str) -> str:
            return super()._true_digest(name) if name in ("v0", "v1") else "f" * 64

    config = make_config(tiny_model, tmp_path)
    trainer = asyncio.create_task(trainer_of(config).run())
    async with Stale() as engine:
        code, output = await finish(await start_process(config, engine))
    trainer.cancel()
    assert code == 1
    assert "the run cannot go on: WrongWeights: version 2: engine 0 holds tensors with the digest ffffffffffffffff..." in output
    assert "rollouts would come from another policy" in output
    assert "Traceback" not in output
    assert all(request["model"] in ("v0", "v1") for request in engine.requests)
    request = Control(tmp_path).stop_request()
    assert request is not None
    assert request.kind == "failed"
    assert request.reason.startswith("orchestrator: WrongWeights: version 2")


async def test_a_disk_that_refuses_ends_the_process_with_the_systems_words(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path)
    publish(WeightsStore(RunDir(tmp_path).weights), 0)
    (tmp_path / "batches").write_text("a file where a folder is needed")
    async with ScriptedEngine() as engine:
        code, output = await finish(await start_process(config, engine))
    assert code == 1
    assert "the run cannot go on" in output
    assert "batches" in output


async def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path):
    argv = [sys.executable, "-m", "turnwise.orchestrator", "--config", str(tmp_path / "none.toml")]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    code, output = await finish(process)
    assert code == 1
    assert "none.toml: no such file" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("fault", ["model", "environment", "weights"])
async def test_a_config_that_cannot_work_ends_the_process_with_words(tiny_model: Path, tmp_path: Path, fault: str):
    config = make_config(tiny_model, tmp_path)
    changes: dict[str, Any] = {
        "model": {"model": config.model.model_copy(update={"name": str(tmp_path / "missing" / "model")})},
        "environment": {
            "orchestrator": config.orchestrator.model_copy(
                update={"env": [config.orchestrator.env[0].model_copy(update={"id": "wordel"})]}
            )
        },
        "weights": {},
    }
    publish(WeightsStore(RunDir(tmp_path).weights), 0)
    words = {"model": "missing/model", "environment": "wordel", "weights": "planted"}[fault]
    faults = [Fault(400, "planted", "/v1/load_lora_adapter")] if fault == "weights" else []
    async with ScriptedEngine(faults=faults) as engine:
        code, output = await finish(await start_process(config.model_copy(update=changes[fault]), engine))
    assert code == 1
    assert words in output
    assert "Traceback" not in output


async def test_sigterm_ends_the_process(tiny_model: Path, tmp_path: Path):
    config = make_config(tiny_model, tmp_path, max_steps=500)
    publish(WeightsStore(RunDir(tmp_path).weights), 0)
    async with ScriptedEngine(latency_s=0.1) as engine:
        process = await start_process(config, engine)
        await until(lambda: bool(engine.requests))
        process.send_signal(signal.SIGTERM)
        code, output = await finish(process)
    assert code == 143
    assert "terminated" in output
