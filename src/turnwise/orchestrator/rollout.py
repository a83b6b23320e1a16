"""One rollout: reset, then prompt, reply, step until the episode ends. What to do about failures is the scheduler's."""

import asyncio
import hashlib
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import msgspec

from turnwise.config import RLConfig
from turnwise.envs import Outage, TextEnv
from turnwise.envs.checks import (
    EnvNonsense,
    checked_numbers,
    checked_opening,
    checked_reset,
    checked_step,
    clean_text,
    raised_words,
)
from turnwise.envs.messages import AssistantMessage
from turnwise.inference.client import Completion
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.orchestrator.chat import Chat, ChatError
from turnwise.orchestrator.env_threads import EnvThreads, EnvTimeout
from turnwise.orchestrator.environments import EnvSetup
from turnwise.orchestrator.overlong import COMPONENT, OverlongPenalty
from turnwise.orchestrator.types import Message, Rollout, StopReason, Turn

CLOSE_TIMEOUT_S = 10.0  # what an environment may take to release its resources

Generate = Callable[[Sequence[int], int, int], Awaitable[Completion]]  # (prompt ids, most new tokens, seed) -> reply


class EnvFailure(Exception):
    """An environment raised, hung or answered nonsense; the text says where and what."""


class EnvOutage(EnvFailure):
    """What the environment stands on is down: the episode is void, and says nothing about the policy."""


@dataclass(frozen=True)
class RolloutSpec:
    """What is played."""

    rollout_id: str
    group_id: int
    env: EnvSetup
    task: Mapping[str, Any]
    env_seed: int
    sampling_seed: int
    attempt: int = 0


@dataclass(frozen=True)
class Player:
    """Plays rollouts with one chat and one pool of threads.

    Args:
        seq_len: most tokens of prompt, replies and observations together.
        max_tokens: most tokens of one reply.
        time_limit_s: age at which a rollout is cut as a straggler.
        overlong: what long replies pay; None for nothing.
    """

    chat: Chat
    threads: EnvThreads
    seq_len: int
    max_tokens: int
    time_limit_s: float | None = None
    overlong: OverlongPenalty | None = None

    @classmethod
    def of(cls, config: RLConfig, chat: Chat, threads: EnvThreads) -> "Player":
        """The player of a run, the same in training and in evaluation."""
        settings = config.orchestrator
        overlong = OverlongPenalty.of(settings)
        return cls(chat, threads, config.seq_len, settings.sampling.max_tokens, settings.straggler_timeout_s, overlong)

    def offer_tools(self, setups: Sequence[EnvSetup]) -> None:
        """Find out now, and not in the first rollout, whether the model can be offered the tools of these environments.

        Raises:
            ValueError: it cannot; the text names the environment and the remedy.
        """
        for setup in setups:
            try:
                self.chat.with_tools(setup.tools)
            except ChatError as error:
                raise ValueError(f"environment {setup.name} offers tools, but {error}") from error

    async def play(self, spec: RolloutSpec, generate: Generate) -> Rollout:
        """Play one episode. Failures of the environment or the engine, and answers that make no sense, are errored rollouts."""
        episode = Episode(self, spec)
        limit = asyncio.timeout(self.time_limit_s)
        try:
            async with limit:
                return await episode.play(generate)
        except (EnvFailure, EngineError, EngineUnavailable, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            if limit.expired():
                key = f"orchestrator.straggler_timeout_s = {self.time_limit_s}"
                return episode.record(StopReason.STRAGGLER, error=f"not done after {key}, turn {len(episode.turns)}")
            reason = StopReason.OUTAGE if isinstance(error, EnvOutage) else StopReason.ERROR
            return episode.record(reason, error=f"{type(error).__name__}: {error}")
        finally:
            episode.release()


class Episode:
    """The state of one rollout while it is played."""

    def __init__(self, player: Player, spec: RolloutSpec) -> None:
        self.player, self.spec = player, spec
        self.chat, self.setup = player.chat, spec.env
        self.turns: list[Turn] = []
        self.messages: list[Message] = []
        self.call_ids: set[str] = set()
        self.metrics: dict[str, float] = {}
        self.totals = [0.0, 0.0]  # dense, sparse
        self.started, self.clock = time.time(), time.perf_counter()
        self.engine_s = self.env_s = 0.0
        self.env: TextEnv | None = None
        self.served_well = False
        self._entered = threading.Lock()  # a cancelled rollout closes its environment after the call that is still inside

    async def play(self, generate: Generate) -> Rollout:
        self.chat = self.player.chat.with_tools(self.setup.tools)
        begun = await self._call("reset", self._reset)
        whole = self._check(partial(checked_opening, begun))
        self.messages += self.setup.opening(self._check(partial(checked_reset, begun))) if whole is None else whole
        prompt = self.chat.first_prompt(self.messages)
        while True:
            room = self.player.seq_len - len(prompt)
            if room < 1:
                return await self._cut(StopReason.CONTEXT_FULL)
            seed = derive_seed(self.spec.sampling_seed, len(self.turns))
            before = time.perf_counter()
            reply = await generate(prompt, min(self.player.max_tokens, room), seed)
            self.engine_s += time.perf_counter() - before
            said = self._read(prompt, reply)
            self._add_turn(prompt, reply)
            self.messages.append(said.to_message())
            action = said.to_action() if self.setup.tools else said.content
            answer = await self._call("step", lambda env=self._open, action=action: env.step(action))
            calls = said.tool_calls if self.setup.tools else None
            result = self._check(partial(checked_step, answer, self.setup.component_names, calls))
            self._pay(result.components)
            self.metrics = result.metrics
            if result.terminated or result.truncated:
                self.messages += result.messages
                return self.record(StopReason.TERMINATED if result.terminated else StopReason.TRUNCATED)
            if len(self.turns) >= self.setup.max_turns:
                return await self._cut(StopReason.MAX_TURNS)
            prompt = self.chat.next_prompt(prompt, reply.token_ids, self.messages, result.messages)
            self.messages += result.messages

    def record(self, reason: StopReason, *, error: str | None = None) -> Rollout:
        """What has been played so far."""
        self.served_well = error is None
        dense, sparse = self.totals
        return Rollout(
            rollout_id=self.spec.rollout_id,
            group_id=self.spec.group_id,
            env=self.setup.name,
            task_id=str(self.spec.task.get("id", "")),
            turns=tuple(self.turns),
            messages=tuple(self.messages),
            stop_reason=reason,
            reward=sum(turn.reward for turn in self.turns),
            reward_dense=dense,
            reward_sparse=sparse,
            metrics=self.metrics,
            error=None if error is None else clean_text(error),
            timing={
                "started": self.started,
                "total_s": time.perf_counter() - self.clock,
                "engine_s": self.engine_s,
                "env_s": self.env_s,
            },
            attempt=self.spec.attempt,
        )

    def release(self) -> None:
        """Part from the environment: one that served well is used again, others are closed on their own time."""
        env, self.env = self.env, None
        if env is None or (self.served_well and self.setup.give_back(env)):
            return
        if type(env).close is not TextEnv.close:
            self.player.threads.submit(partial(self._alone, env.close), timeout_s=CLOSE_TIMEOUT_S)

    async def _cut(self, reason: StopReason) -> Rollout:
        """End an episode from outside: the environment still says what is owed for what is there."""
        ended = await self._call("finish", lambda env=self._open: (env.finish(str(reason)), env.episode_metrics()))
        owed, metrics = cast(tuple[object, object], ended)  # what the end was worth may be among the metrics
        components = self._check(partial(checked_numbers, owed, "finish()", self.setup.component_names))
        self.metrics = self._check(partial(checked_numbers, metrics, "metrics"))
        if not self.turns:
            raise EnvFailure(f"the first prompt alone fills seq_len = {self.player.seq_len}; raise seq_len or shorten the task")
        self._pay(components)
        return self.record(reason)

    def _read(self, prompt: Sequence[int], reply: Completion) -> AssistantMessage:
        """What the reply says and calls, its calls under ids that no other call of the episode has."""
        said = self.chat.reply(reply.token_ids, prompt).numbered(self.call_ids)
        self.call_ids.update(call.id for call in said.tool_calls)
        return said

    def _add_turn(self, prompt: Sequence[int], reply: Completion) -> None:
        self.turns.append(Turn(prompt, reply.token_ids, reply.logprobs, reply.spans, reply.finish_reason, {}, 0.0))
        if self.player.overlong is not None:
            penalty = self.player.overlong.of_reply(len(reply.token_ids))
            self._credit({COMPONENT: penalty}, penalty, penalty, penalty)

    def _pay(self, components: Mapping[str, float]) -> None:
        """Credit components of the environment to the last turn."""
        if not components:
            return
        reward, dense, sparse = totals = self.setup.totals(components)
        if not all(math.isfinite(total) for total in totals):
            raise EnvFailure(f"{self.setup.name}, turn {len(self.turns)}: the reward of {dict(components)} is not finite")
        self._credit(components, reward, dense, sparse)

    def _credit(self, components: Mapping[str, float], reward: float, dense: float, sparse: float) -> None:
        turn = self.turns[-1]
        summed = {**turn.components}
        for name, value in components.items():
            summed[name] = summed.get(name, 0.0) + value
        self.turns[-1] = replace(turn, components=summed, reward=turn.reward + reward)
        self.totals = [self.totals[0] + dense, self.totals[1] + sparse]

    def _alone(self, function: Callable[[], object]) -> object:
        with self._entered:
            return function()

    def _reset(self) -> object:
        self.env = self.setup.take()
        return self.env.reset(seed=self.spec.env_seed, options={"task": self.spec.task})

    @property
    def _open(self) -> TextEnv:
        assert self.env is not None, "step before reset"
        return self.env

    async def _call(self, what: str, function: Callable[[], object]) -> object:
        """One environment call on a thread. Raises EnvFailure, and EnvOutage."""
        before = time.perf_counter()
        timeout_s = self.setup.config.timeout_s + (self.setup.wait_s if what == "reset" else 0.0)
        try:
            return await self.player.threads.call(partial(self._alone, function), timeout_s=timeout_s)
        except EnvTimeout as error:
            self.env = None  # its thread may still be inside
            limit = f"orchestrator.env.timeout_s = {self.setup.config.timeout_s:g}"
            raise EnvFailure(f"{what} of {self.setup.name} hung, turn {len(self.turns)}: {error} ({limit})") from error
        except Outage as error:
            raise EnvOutage(f"{what} of {self.setup.name}, turn {len(self.turns)}: {error}") from error
        except Exception as error:
            raise EnvFailure(f"{what} of {self.setup.name} raised, turn {len(self.turns)}: {raised_words(error)}") from error
        finally:
            self.env_s += time.perf_counter() - before

    def _check(self, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except EnvNonsense as error:
            raise EnvFailure(f"{self.setup.name}, turn {len(self.turns)}: {error}") from error


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on every part, and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
