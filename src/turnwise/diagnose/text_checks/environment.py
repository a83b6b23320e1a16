"""Do the environments keep their contract: reset, step with any reply, finish, the same episode for the same seed?"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Finding
from turnwise.diagnose.notes import Notes
from turnwise.diagnose.text_checks.calls import CallFailed, limited
from turnwise.envs import TextEnv
from turnwise.envs.checks import EnvNonsense, StepResult, checked_numbers, checked_reset, checked_step
from turnwise.envs.messages import AssistantMessage, ToolCall
from turnwise.orchestrator.environments import EnvSetup, load_setups

SEED = 20
TASKS_READ = 1000  # whose ids are compared
LONG_REPLY = "and on it goes, " * 4000  # 64,000 characters, more than most token limits allow
GARBAGE = "\x00\x1b[31m \ufffd }{ <|im_end|> ‮ 0/0 \\u0000 </think>"
SLOW_SHARE = 0.2  # of the time limit that a call may take before it is worth a word
ROUNDING = 1e-6

Answer = TypeVar("Answer")


@dataclass
class Trial:
    """Episodes of one environment, and the seconds that its calls take."""

    setup: EnvSetup
    reset_s: list[float] = field(default_factory=list[float])
    step_s: list[float] = field(default_factory=list[float])

    def begin(self, task: Mapping[str, Any]) -> tuple[TextEnv, str]:
        """A fresh instance in a new episode, and the first observation."""
        env = self._call("making it", self.setup.take, self.reset_s)
        wait_s = self.setup.wait_s  # for a container
        answer = self._call("reset", lambda: env.reset(seed=SEED, options={"task": task}), self.reset_s, more_s=wait_s)
        return env, checked_reset(answer)

    def step(self, env: TextEnv, reply: AssistantMessage) -> tuple[StepResult, float]:
        """The checked answer, and the reward as `step` returned it."""
        action = reply.to_action() if self.setup.tools else reply.content
        answer: Any = self._call(f"step on {shown(reply)}", lambda: env.step(action), self.step_s)
        calls = reply.tool_calls if self.setup.tools else None
        return checked_step(answer, self.setup.component_names, calls), float(answer[1])

    def finish(self, env: TextEnv) -> dict[str, float]:
        owed = self._call("finish", lambda: env.finish("max_turns"), self.step_s)
        return checked_numbers(owed, "finish()", self.setup.component_names)

    def close(self, env: TextEnv) -> None:
        self._call("close", env.close, [])

    def _call(self, what: str, call: Callable[[], Answer], seconds: list[float], *, more_s: float = 0.0) -> Answer:
        began = time.perf_counter()
        try:
            return limited(f"{what} of {self.setup.name}", call, timeout_s=self.setup.config.timeout_s + more_s)
        finally:
            seconds.append(time.perf_counter() - began)


def look(context: Context) -> Finding:
    """Play short episodes with replies that nobody hopes for."""
    notes, told, data = Notes(), list[str](), dict[str, object]()
    for setup in context.setups:
        trial = Trial(setup)
        try:
            _tasks(setup, notes)
            _episodes(trial, notes)
        except (CallFailed, EnvNonsense) as error:
            notes.fail(f"{setup.name}: {error}", "correct the environment; docs/environments.md has the contract")
        slowest = max([0.0, *trial.step_s, *(trial.reset_s if setup.wait_s == 0 else ())])
        if slowest > SLOW_SHARE * setup.config.timeout_s:
            notes.warn(
                f"a call of {setup.name} took {slowest:.1f} s, and orchestrator.env.timeout_s = {setup.config.timeout_s:g}",
                "raise orchestrator.env.timeout_s: calls are slower when many run at once",
            )
        steps = sorted(trial.step_s) or [0.0]
        told.append(f"{setup.name}: {len(setup.tasks)} tasks, {1000 * steps[len(steps) // 2]:.2g} ms a step")
        data[setup.name] = {"tasks": len(setup.tasks), "reset_s": trial.reset_s, "step_s": trial.step_s}
    _held_out(context, notes)
    kept = "the same first observation for the same seed; empty, garbled and endless replies are answered"
    return notes.finding(f"{'; '.join(told)}; {kept}", data)


def _tasks(setup: EnvSetup, notes: Notes) -> None:
    ids = [str(task.get("id", "")) for task in islice(setup.tasks, TASKS_READ)]
    twins = len(ids) - len(set(ids))
    if twins:
        notes.warn(
            f"{twins} of the first {len(ids)} tasks of {setup.name} have an id that others have, too",
            'give each task row an "id" of its own: statistics of tasks are kept under it',
        )


def _episodes(trial: Trial, notes: Notes) -> None:
    """Three episodes: an empty reply, a garbled one with the same seed, an endless one with another task."""
    tasks = trial.setup.tasks
    one, seen = trial.begin(tasks[0])
    if not seen.strip():
        notes.warn(f"the first observation of {trial.setup.name} is empty")
    _play(trial, one, [AssistantMessage(content="")], notes)
    two, again = trial.begin(tasks[0])
    if again != seen:
        notes.fail(
            f"{trial.setup.name} begins the same task with the same seed in two ways ({_cut(seen)!r}, then {_cut(again)!r}): the "
            "rollouts of a group would play different games",
            "draw everything from self.np_random, which reset seeds",
        )
    _play(trial, two, hostile_replies(trial.setup), notes)
    three, _ = trial.begin(tasks[len(tasks) // 2])
    _play(trial, three, [AssistantMessage(content=LONG_REPLY)], notes)


def hostile_replies(setup: EnvSetup) -> list[AssistantMessage]:
    """Replies out of order, as an untrained policy makes them."""
    if not setup.tools:
        return [AssistantMessage(content=GARBAGE)]
    name = setup.tools[0].name
    calls = (
        ToolCall(id="a", raw=GARBAGE, error="not valid JSON"),
        ToolCall(id="b", name="no_such_tool", arguments={}),
        ToolCall(id="c", name=name, arguments={"no such argument": [None]}),
    )
    return [AssistantMessage(content=GARBAGE, tool_calls=calls), AssistantMessage(content=GARBAGE)]


def _play(trial: Trial, env: TextEnv, replies: Sequence[AssistantMessage], notes: Notes) -> None:
    """Say the replies in turn until one ends the episode; finish it otherwise, as a full context would."""
    over = False
    for reply in replies:
        result, reward = trial.step(env, reply)
        paid = sum(result.components.values())
        if abs(paid - reward) > ROUNDING * max(1.0, abs(reward)):
            notes.fail(
                f"step of {trial.setup.name} on {shown(reply)} returns the reward {reward:g}, and its reward_components come to "
                f"{paid:g}: training sees the components alone",
                "put everything that is paid into info['reward_components']",
            )
        if over := result.terminated or result.truncated:
            break
    owed = {} if over else trial.finish(env)
    if owed and trial.finish(env):
        notes.fail(f"finish() of {trial.setup.name} pays twice for one episode", "return nothing once the episode is over")
    trial.close(env)


def _held_out(context: Context, notes: Notes) -> None:
    """The evaluation's tasks are there: a run would end for want of them before its first step."""
    settings = context.given.orchestrator
    try:
        held_out = load_setups(settings.eval_env or settings.env, settings.eval.split)
    except Exception as error:  # a user's environment may raise anything
        notes.fail(
            f"the evaluation on split {settings.eval.split!r} cannot begin: {type(error).__name__}: {error}",
            "correct orchestrator.eval.split or orchestrator.eval_env",
        )
        return
    for setup in held_out:
        seen = {str(task.get("id", "")) for trained in _same(context.setups, setup) for task in islice(trained.tasks, TASKS_READ)}
        shared = seen & {str(task.get("id", "")) for task in islice(setup.tasks, TASKS_READ)}
        if shared:
            notes.warn(f"{len(shared)} held-out tasks of {setup.name} are training tasks too, {sorted(shared)[0]!r} for one")


def _same(setups: Sequence[EnvSetup], other: EnvSetup) -> list[EnvSetup]:
    return [setup for setup in setups if setup.config.id == other.config.id]


def shown(reply: AssistantMessage) -> str:
    """A reply in a few words."""
    if reply.tool_calls:
        return f"a reply with {len(reply.tool_calls)} calls that cannot be run"
    if not reply.content:
        return "an empty reply"
    return f"a reply of {len(reply.content):,} characters" if len(reply.content) > len(GARBAGE) else "a garbled reply"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


ENVIRONMENT = Check("environment", "Do the environments keep their contract, whatever the policy says?", (), look)
