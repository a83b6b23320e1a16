"""verifiers 0.4 (`verifiers.v1`): tasksets and their environments, run against a client of ours."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import asyncio
import importlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.utils.loaders import default_harness_id, load_environment, load_taskset, resolve_env_config

from turnwise.adapters.answers import finite_number
from turnwise.adapters.verifiers.backend import JudgeSettings, Settings
from turnwise.adapters.verifiers.exchange import Ask, CutOff, Exchange, Outcome
from turnwise.adapters.verifiers.loop import run_once
from turnwise.adapters.verifiers.rows import Rows, held_out, no_split, place
from turnwise.adapters.verifiers.taskset_serving import CUT, Serving
from turnwise.envs.base import Task
from turnwise.envs.messages import Tool

HARNESS = "turnwise_chat"  # the id of our harness, which verifiers imports as a module of this name
OTHER = "other"  # component of rewards whose names only scoring tells
LIMITS = {"max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens"}
PROBE_S = 120.0  # the longest wait for the first request of an environment whose tools only a running server tells


class TasksetBackend:
    """An environment of verifiers 0.4."""

    def __init__(self, source: str, args: Mapping[str, Any], settings: Settings) -> None:
        self.name = f"verifiers:{source}"
        self.settings = settings
        sys.modules.setdefault(HARNESS, importlib.import_module("turnwise.adapters.verifiers.chat_harness"))
        try:
            self.config = self._ready(resolve_env_config({**settings.env, "taskset": {"id": source, **args}}))
            env = load_environment(self.config)
            self.tables = self._tables(env.taskset, source, args)
        except Exception as error:  # whatever the package raises: it is named, and the run does not start
            raise ValueError(f"{self.name} cannot be loaded with args {dict(args)}: {error}{_older(source)}") from error
        self.seat = _policy_seat(self.config, self.name)
        self._serving: dict[asyncio.AbstractEventLoop, Serving] = {}
        self.max_turns = getattr(self.config, self.seat).max_turns
        first = self.tables["train"][0] if self.tables["train"] else None
        names = [function.__name__ for function in first.hooks("reward")] if first else []
        names += [judge.reward_name for judge in first.plugged_judges()] if first else []
        self.component_names = frozenset({*names, OTHER})
        self.tools = self._tools(env, first)

    def tasks(self, split: str) -> Sequence[Task]:
        """Tasks of the taskset; held out are those of `adapter.validation`."""
        if split in self.tables and split != "train":
            return Rows(split, range(len(self.tables[split])))
        count = None if isinstance(self.settings.validation, dict) else self.settings.validation
        positions = held_out(len(self.tables["train"]), count, name=self.name)
        if split not in positions:
            why = "a taskset has no splits; set args.adapter.validation to a count, or to the arguments of the held-out taskset"
            raise no_split(self.name, split, why)
        return Rows("train", positions[split])

    async def play(self, task: Task, exchange: Exchange) -> Outcome:
        table, position = place(task, name=self.name)
        if position >= len(self.tables.get(table, ())):
            raise ValueError(f"{self.name} has no task {task['id']!r}")
        loop = asyncio.get_running_loop()
        if loop not in self._serving:
            self._serving[loop] = Serving(self.config)
        episode = await self._serving[loop].episode(self.tables[table][position], exchange)
        traces = [trace for trace in episode.traces if self.seat in (trace.agent.name, "")]
        errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
        if errors or len(traces) != 1:
            words = "; ".join(f"{error.type}: {error.message}" for error in errors) or f"{len(traces)} runs of seat {self.seat}"
            raise RuntimeError(f"{self.name}: {words}")
        return self._outcome(traces[0])

    def _outcome(self, trace: Any) -> Outcome:
        components: dict[str, float] = {}
        metrics = {name: self._number(name, value) for name, value in trace.metrics.items() if value is not None}
        for name, reward in trace.rewards.items():
            if reward is None:
                raise RuntimeError(f"{self.name}: reward {name} was not scored ({trace.stop_condition})")
            metrics[name] = self._number(name, reward.score)
            known = name if name in self.component_names else OTHER
            if reward.weight:
                components[known] = components.get(known, 0.0) + self._number(name, reward.value)
        condition = str(trace.stop_condition)
        return Outcome(components, metrics, condition in {*LIMITS, CUT} or trace.is_timeout)

    def _number(self, name: str, value: object) -> float:
        return finite_number(value, what=f"{self.name}: score {name}")

    def _ready(self, config: Any) -> Any:
        """The configuration with a place for every seat: plain chat in this process, where it names no harness."""
        plain = default_harness_id(config.taskset.id) == "bash"
        updates: dict[str, Any] = {}
        for name, seat in agent_config_fields(config).items():
            update: dict[str, Any] = {}
            if (seat.harness is None and plain) or (seat.harness is not None and seat.harness.id == "null"):
                update["harness"] = vf.AgentConfig(harness={"id": HARNESS}).harness
            if "runtime" not in seat.model_fields_set:
                update["runtime"] = vf.SubprocessConfig()
            updates[name] = seat.model_copy(update=update)
        task = _judged(config.taskset.task, self.settings.judge, self.name)
        return config.model_copy(update={**updates, "taskset": config.taskset.model_copy(update={"task": task})})

    def _tables(self, taskset: Any, source: str, args: Mapping[str, Any]) -> dict[str, list[Any]]:
        tables = {"train": self._read(taskset)}
        if isinstance(self.settings.validation, dict):
            raw = {"taskset": {"id": source, **args, **self.settings.validation}}
            tables["validation"] = self._read(load_taskset(self._ready(resolve_env_config(raw)).taskset))
        return tables

    def _read(self, taskset: Any) -> list[Any]:
        return list(taskset if taskset.bounded else itertools.islice(taskset, self.settings.tasks))

    def _tools(self, env: Any, first: Any) -> tuple[Tool, ...]:
        """Tools on offer. Those of servers are told by the servers alone: then the first request of an episode is looked at."""
        if first is None:
            return ()
        seat = getattr(self.config, self.seat)
        own = seat.harness is not None and seat.harness.id == HARNESS
        served = [*env.taskset.toolsets(env.taskset.config), *first.toolsets(first.config)]
        return () if own and not served else run_once(self._first_tools(), f"{self.name}-tools", timeout_s=PROBE_S)

    async def _first_tools(self) -> tuple[Tool, ...]:
        exchange = Exchange(self.name)
        serving = Serving(self.config)
        playing = asyncio.create_task(serving.episode(self.tables["train"][0], exchange))
        asked = asyncio.create_task(asyncio.to_thread(exchange.events.get, True, PROBE_S))
        try:
            done, _ = await asyncio.wait({playing, asked}, return_when=asyncio.FIRST_COMPLETED)
            if asked not in done:
                episode = playing.result()
                raise ValueError(f"{self.name} ended before it asked for a reply: {[*episode.errors, *episode.traces[0].errors]}")
            event = asked.result()
            return event.tools if isinstance(event, Ask) else ()
        finally:
            exchange.events.put(CutOff())  # lets the thread that waits go
            playing.cancel()
            await asyncio.wait({playing})
            await serving.stack.aclose()


def _policy_seat(config: Any, name: str) -> str:
    """The seat that the policy plays: the one that names no endpoint.

    Raises:
        ValueError: for none or several, or one that names a model and no endpoint.
    """
    seats = agent_config_fields(config)
    free = [seat for seat, spec in seats.items() if spec.client is None]
    named = [seat for seat in free if seats[seat].model is not None]
    if len(free) != 1 or named:
        raise ValueError(
            f"{name} has the seats {', '.join(seats)}, of which {', '.join(free) or 'none'} have no endpoint; exactly one is the "
            "policy's: give each other one a model and a client under args.adapter.env, for instance "
            'env = { user = { model = "...", client = { base_url = "..." } } }'
        )
    return free[0]


def _judged(task: Any, judge: JudgeSettings | None, name: str) -> Any:
    """The task configuration with the judge that the user gives.

    Raises:
        ValueError: there are judges, and nobody gave a model.
    """
    if not task.judges:
        return task
    if judge is None:
        raise ValueError(
            f"{name} is scored by a judge, a model behind an endpoint; give it under args.adapter.judge "
            "(base_url, model, api_key_env), or {} for the one that the taskset configures"
        )
    given = {"base_url": judge.base_url, "model": judge.model, "api_key_var": judge.api_key_env}
    update = {key: value for key, value in given.items() if value is not None}
    return task.model_copy(update={"judges": [one.model_copy(update=update) for one in task.judges]})


def _older(source: str) -> str:
    """A hint for packages of the API before."""
    module = sys.modules.get(source.replace("-", "_").lower())
    if module is None or not hasattr(module, "load_environment"):
        return ""
    return ". It has a load_environment: that is the API up to 0.3, for which there is pip install 'turnwise[verifiers-legacy]'"
