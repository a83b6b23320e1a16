"""verifiers 0.3: environments made by `load_environment`, their own loop run against a client of ours."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
import contextlib
import functools
import inspect
import math
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import verifiers.legacy as vf
from verifiers.legacy.clients import Client
from verifiers.legacy.rubrics.judge_rubric import JudgeRubric
from verifiers.legacy.types import Response, ResponseMessage
from verifiers.legacy.types import ToolCall as TheirCall

from turnwise.adapters.answers import finite_number
from turnwise.adapters.verifiers.backend import JudgeSettings, Settings
from turnwise.adapters.verifiers.exchange import CutOff, Exchange, Outcome, plain_reply
from turnwise.adapters.verifiers.rows import Rows, held_out, no_split, place
from turnwise.envs.base import Task
from turnwise.envs.messages import AssistantMessage, Tool

WHOLE = "reward"  # the one component of an environment whose rubric composes its reward in a way of its own
CUT_BY = {"max_turns_reached", "max_total_completion_tokens_reached", "prompt_too_long", "timeout_reached"}
ROUNDING = 1e-6
KEY = "OPENAI_API_KEY"  # what a judge rubric wants to see before anybody can hand it another client

_FAILURES: ContextVar[list[Exception] | None] = ContextVar("failures", default=None)


class PolicyClient(Client):
    """A client of verifiers whose model is our policy."""

    def setup_client(self, config: Any) -> Any:
        raise TypeError("the client of a rollout is its exchange")

    async def to_native_tool(self, tool: Any) -> Tool:
        return plain_tool(tool)

    async def to_native_prompt(self, messages: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [plain_message(message) for message in messages], {}

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
    ) -> AssistantMessage:
        exchange: Exchange = self.client
        try:
            return await exchange.reply(prompt, tools or ())
        except CutOff as error:
            raise vf.OverlongPromptError(str(error)) from error  # how loops of verifiers stop and still score what is there

    async def raise_from_native_response(self, response: Any) -> None:
        """Replies of the policy are replies, whatever they say."""

    async def from_native_response(self, response: AssistantMessage) -> Any:
        said = plain_reply(response)
        calls = [TheirCall(**call) for call in said["tool_calls"]]
        message = ResponseMessage(
            content=said["content"],
            tool_calls=calls or None,
            finish_reason="tool_calls" if calls else "stop",
            is_truncated=False,
        )
        return Response(id="", created=0, model="policy", message=message)

    async def close(self) -> None:
        """There is nothing to close."""


class ClassicBackend:
    """An environment of verifiers 0.3."""

    def __init__(self, source: str, args: Mapping[str, Any], settings: Settings) -> None:
        self.name = f"verifiers:{source}"
        self.settings = settings
        if settings.env or isinstance(settings.validation, dict):
            raise ValueError(
                f"args.adapter.env and a table under args.adapter.validation need verifiers 0.4; {self.name} runs on 0.3"
            )
        self.env = _load(self.name, source, args, settings.judge)
        self.rubrics = [leaf for env in _family(self.env) for leaf in _leaves(env.rubric)]
        self._check()
        for rubric in self.rubrics:
            rubric.funcs = [_reporting(function) for function in rubric.funcs]
        self.weights = None if hasattr(self.env, "env_map") else _weights(_leaves(self.env.rubric))
        paying = [WHOLE] if self.weights is None else [name for name, weight in self.weights.items() if weight]
        self.component_names = frozenset(paying)
        self.tools = tuple(plain_tool(tool) for tool in self.env.tool_defs or ())
        limit = getattr(self.env, "max_turns", -1)
        self.max_turns = limit if limit > 0 else None

    def tasks(self, split: str) -> Sequence[Task]:
        """Rows of the training and of the evaluation data set; without the latter, those that `adapter.validation` holds out."""
        train, evaluation = self.env.build_dataset(), self.env.build_eval_dataset()
        if split == "validation" and evaluation is not None:
            return Rows(split, range(len(evaluation)))
        count = None if evaluation is not None else self.settings.validation
        positions = {} if train is None else held_out(len(train), count, name=self.name)
        if split in positions:
            return Rows("train", positions[split])
        why = "it has no eval_dataset; hold some out with args.adapter.validation = COUNT"
        raise no_split(self.name, split, why if split == "validation" else "it has an eval_dataset alone")

    async def play(self, task: Task, exchange: Exchange) -> Outcome:
        table, position = place(task, name=self.name)
        rows = self.env.build_dataset() if table == "train" else self.env.build_eval_dataset()
        if rows is None or position >= len(rows):
            raise ValueError(f"{self.name} has no task {task['id']!r}")
        row = rows[position]
        failures: list[Exception] = []
        _FAILURES.set(failures)
        output = await self.env.run_rollout(row, PolicyClient(exchange), model="policy", sampling_args={})
        if output.get("error"):
            raise RuntimeError(f"{self.name}: {_chain(output['error'])}")
        if failures:
            raise failures[0]
        metrics = {name: finite_number(value, what=f"{self.name}: metric {name}") for name, value in output["metrics"].items()}
        return Outcome(self._components(output["reward"], metrics), metrics, self._truncated(output, exchange))

    def _components(self, reward: Any, metrics: Mapping[str, float]) -> dict[str, float]:
        total = finite_number(reward, what=f"the reward of {self.name}")
        if self.weights is None:
            return {WHOLE: total}
        components = {name: weight * metrics[name] for name, weight in self.weights.items() if weight}
        if not math.isclose(sum(components.values()), total, rel_tol=ROUNDING, abs_tol=ROUNDING):
            raise RuntimeError(f"{self.name} says reward {total}, but its weighted functions add up to {components}")
        return components

    def _truncated(self, output: Mapping[str, Any], exchange: Exchange) -> bool:
        if exchange.cut or output.get("is_truncated"):
            return True
        return output.get("stop_condition") in CUT_BY and self.max_turns != 1

    def _check(self) -> None:
        if any(env.requires_group_rollouts for env in _family(self.env)):
            raise ValueError(
                f"{self.name} scores the rollouts of a group together; here every rollout is scored alone, and the group is "
                "compared by orchestrator.advantage"
            )
        if not self.env.score_rollouts:
            raise ValueError(f"{self.name} was loaded with score_rollouts = False: there is nothing to train on")
        judged = [rubric for rubric in self.rubrics if isinstance(rubric, JudgeRubric)]
        if judged and self.settings.judge is None:
            raise ValueError(no_judge(self.name))
        for rubric in judged:
            _give_judge(rubric, self.settings.judge)


def no_judge(name: str) -> str:
    """The error for a judge that nobody gave."""
    return (
        f"{name} is scored by a judge, a model behind an endpoint; give it under args.adapter.judge "
        "(base_url, model, api_key_env), or {} for the one that the environment configures"
    )


def plain_tool(tool: Any) -> Tool:
    """One of their tools as one of ours."""
    return Tool(name=tool.name, description=tool.description or "", parameters=dict(tool.parameters))


def plain_message(message: Any) -> dict[str, Any]:
    """One of their messages as plain values.

    Raises:
        ValueError: for content that is not text.
    """
    plain: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    if message.role == "tool":
        plain["tool_call_id"] = message.tool_call_id
    elif message.role == "assistant" and message.tool_calls:
        plain["tool_calls"] = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return plain


def _text(content: Any) -> str:
    parts: list[Any] = [content] if isinstance(content, str) else list(content or ())
    texts: list[Any] = [part if isinstance(part, str) else part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a message holds something other than text (an image, sound); only text can be trained on here")
    return "\n".join(texts)


def _load(name: str, source: str, args: Mapping[str, Any], judge: JudgeSettings | None) -> Any:
    with _signals_kept(), _judge_key(judge):
        try:
            return vf.load_environment(source, **args)
        except Exception as error:  # whatever the package raises: it is named, and the run does not start
            hint = f" {no_judge(name)}." if KEY in str(error) or "api_key" in str(error) else ""
            raise ValueError(f"{name} cannot be loaded with args {dict(args)}: {error}.{hint}") from error


@contextlib.contextmanager
def _signals_kept() -> Generator[None]:
    """Environments of verifiers take SIGINT and SIGTERM for themselves when they are made; the run keeps its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextlib.contextmanager
def _judge_key(judge: JudgeSettings | None) -> Generator[None]:
    """A judge rubric makes a client of its own, which needs some key, before it can be given another."""
    if judge is None or KEY in os.environ:
        yield
        return
    os.environ[KEY] = "unused"
    try:
        yield
    finally:
        del os.environ[KEY]


def _give_judge(rubric: Any, judge: JudgeSettings | None) -> None:
    if judge is None or judge.base_url is None:
        client = rubric.judge_client
    else:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=judge.base_url, api_key=os.environ.get(judge.api_key_env or "", "unused"))
    model = (judge.model if judge else None) or rubric.judge_model
    rubric.judge_client, rubric.judge_model = client, model
    rubric.class_objects.update(judge_client=client, judge_model=model)


def _family(env: Any) -> list[Any]:
    """An environment and those that it groups."""
    return [env, *(child for one in getattr(env, "env_map", {}).values() for child in _family(one))]


def _leaves(rubric: Any) -> list[Any]:
    """The rubrics that hold functions."""
    if isinstance(rubric, vf.RubricGroup):
        return [leaf for one in rubric.rubrics for leaf in _leaves(one)]
    return [rubric]


def _weights(rubrics: Sequence[Any]) -> dict[str, float] | None:
    """Weight of every function by its name; None where the reward is no sum of those, or names do not tell weights apart."""
    weights: dict[str, float] = {}
    for rubric in rubrics:
        if type(rubric).score_rollout is not vf.Rubric.score_rollout:
            return None
        names = [function.__name__ for function in rubric.funcs]
        for name, weight in zip(names, rubric.weights, strict=True):
            if weights.get(name, weight) != weight or (weight and names.count(name) > 1):
                return None
            weights[name] = float(weight)
    return weights


def _reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function whose failure ends the rollout as errored: verifiers itself logs it and takes 0 for the score."""

    def failed(error: Exception) -> Exception:
        failures = _FAILURES.get()
        if failures is not None:
            failures.append(RuntimeError(f"reward function {function.__name__}: {type(error).__name__}: {error}"))
        return error

    async def awaited(result: Awaitable[Any]) -> Any:
        try:
            return _score(await result)
        except Exception as error:
            raise failed(error) from error

    @functools.wraps(function)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            return awaited(result) if inspect.isawaitable(result) else _score(result)
        except Exception as error:
            raise failed(error) from error

    return reporting


def _score(value: Any) -> float:
    return finite_number(float(value) if isinstance(value, bool) else value, what="its value")


def _chain(error: Mapping[str, Any]) -> str:
    """An error of a rollout in words, with those that caused it."""
    return str(error.get("error_chain_repr") or f"{error.get('error')}: {error.get('message')}")
