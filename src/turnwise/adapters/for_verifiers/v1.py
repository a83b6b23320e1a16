"""Our environments as a `Taskset`, an `Env` and a `Harness` of verifiers from 0.4 on.

The environment plays the user of an interaction, in this process; the harness makes one call of the model a segment, with the
environment's tools on offer, so that calls and their answers are messages like any other.
"""

# verifiers is an optional package, absent where types are checked
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedFunctionDecorator=false

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

from turnwise.adapters.for_verifiers.episode import Called, EnvFailure, EnvOutage, Episode, openai_messages
from turnwise.adapters.for_verifiers.source import Source
from turnwise.config import RewardConfig

PLUGIN = "turnwise-verifiers"
CUT = {"max_turns": "max_turns"}  # by their limits; the others are those of tokens
OVERFLOW = ("context length", "context window", "context size", "maximum model length", "too long", "too many tokens")
WORDS_SHOWN = 500  # of a model server's error


class TurnwiseTasksetConfig(vf.TasksetConfig):
    """Which environment, and how it is played."""

    env: str = ""
    """A name registered with turnwise, `package.module:Class`, or `SCHEME:NAME`."""
    args: dict[str, Any] = {}
    """Arguments of the environment."""
    split: str = "train"
    """Whose tasks are played."""
    reward: Literal["dense", "sparse"] = "dense"
    """Pay all components as they occur, or only the outcome."""
    weights: dict[str, float] = {}
    """Factors of the components, 1 where none is given."""
    seed: int = 0
    """Of all episodes. Those of one task begin alike."""
    max_turns: int | None = None
    """Replies of an episode; the environment's own limit when unset."""
    timeout_s: float = 60.0
    """Time limit of one call of the environment, in seconds; a longer one makes an errored rollout."""
    containers: dict[str, Any] = {}
    """The table `[containers]` of a configuration of turnwise, for environments that work in some."""

    def source(self) -> Source:
        """The environment. Raises ValueError where it cannot be made of these settings."""
        if not self.env:
            raise ValueError("taskset.env is not set; name an environment of turnwise (`turnwise envs` lists them)")
        reward = RewardConfig(mode=self.reward, weights=self.weights)
        return Source(
            self.env,
            self.args,
            reward=reward,
            seed=self.seed,
            max_turns=self.max_turns,
            timeout_s=self.timeout_s,
            containers=self.containers,
        )


class TurnwiseData(vf.TaskData):
    """Which task is played, with which seed. It has no prompt: the environment opens the conversation."""

    split: str
    index: int
    seed: int
    tools: list[dict[str, Any]] = []
    """What the model may call."""
    weights: dict[str, float] = {}
    """What each declared component is multiplied by; none where the environment declares no components."""


class TurnwiseState(vf.State):
    """What an episode came to."""

    played: bool = False
    components: dict[str, float] = {}
    metrics: dict[str, float] = {}
    reward: float = 0.0
    reward_dense: float = 0.0
    reward_sparse: float = 0.0


class TurnwiseTask(vf.Task[TurnwiseData, TurnwiseState]):
    """A task of an environment: a weighted reward a component, so that the total is the reward that we compose."""

    @property
    def key(self) -> str:
        return f"{self.data.split}/{self.data.id}"

    def hooks(self, attr: str) -> list[Callable[..., Any]]:
        found = super().hooks(attr)
        if attr != "reward":
            return found
        weights = self.data.weights
        return [*([_component(*item) for item in weights.items()] or [_total]), *found]

    @vf.metric
    async def episode_metrics(self, trace: Any) -> Mapping[str, float]:
        state = _played(trace)
        return {**state.metrics, "reward_dense": state.reward_dense, "reward_sparse": state.reward_sparse}


class TurnwiseTaskset(vf.Taskset[TurnwiseTask, TurnwiseTasksetConfig]):
    """The tasks of one split of an environment."""

    def __init__(self, config: TurnwiseTasksetConfig) -> None:
        super().__init__(config)
        self.source = config.source()

    def load(self) -> Iterator[TurnwiseTask]:
        source, split = self.source, self.config.split
        tools, weights = [tool.spec() for tool in source.tools], source.weights()
        for index, row in enumerate(source.tasks(split)):
            task_id = str(row.get("id", ""))
            data = TurnwiseData(
                id=task_id,
                system_prompt=source.system_prompt or None,
                split=split,
                index=index,
                seed=source.seed_of(split, task_id),
                tools=tools,
                weights=weights,
            )
            yield TurnwiseTask(data, self.config.task)


class TurnwiseEnvConfig(vf.EnvConfig):
    """The one seat; its program is ours, and runs in this process."""

    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())


class TurnwiseEnv(vf.Env[TurnwiseEnvConfig]):
    """One episode: the environment is the user, an instance an episode."""

    async def run(self, task: Any, agents: Any) -> None:
        source: Source = self.taskset.source
        data = task.data
        row = source.task(data.split, data.index, data.id)
        episode = Episode(source, row, seed=data.seed)
        try:
            async with agents.agent.interaction(task) as interaction:
                with _their_errors():
                    await _play(episode, interaction)
        finally:
            await episode.close()

    async def stop(self) -> None:
        self.taskset.source.close()


class TurnwiseHarnessConfig(vf.HarnessConfig):
    id: str = PLUGIN


class TurnwiseHarness(vf.Harness[TurnwiseHarnessConfig]):
    """One call of the model a segment; tools are offered and not run, since the environment answers calls."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or ())
        if system is not None:
            messages.insert(0, vf.SystemMessage(content=system))
        body: dict[str, Any] = {"model": ctx.model, "messages": [message_to_wire(message) for message in messages]}
        if getattr(data, "tools", None):
            body["tools"] = data.tools
        headers = {"Authorization": f"Bearer {secret}"}
        timeout = aiohttp.ClientTimeout(total=None)  # the agent's own time limits hold
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{endpoint}/chat/completions", json=body, headers=headers) as response,
        ):
            words = await response.text()
        if response.status >= 400 and not _is_overflow(response.status, words):
            raise RuntimeError(f"the model's server answered {response.status}: {words[:WORDS_SHOWN]}")
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


def load(env: str, args: Mapping[str, Any], *, split: str, eval_split: str, **settings: Any) -> TurnwiseEnv:
    """The environment over the tasks of `split`."""
    taskset = TurnwiseTasksetConfig(id=PLUGIN, env=env, args=dict(args), split=split, **settings)
    return TurnwiseEnv(TurnwiseEnvConfig(taskset=taskset))


async def _play(episode: Episode, interaction: Any) -> None:
    trace = interaction.trace
    messages = await episode.begin()
    while episode.stop is None:
        segment = await interaction.turn(openai_messages(messages))
        if segment.terminated:
            if trace.errors or trace.is_timeout:
                return  # what their trace says is the outcome; nothing is scored
            await episode.finish(CUT.get(trace.stop_condition or "", "context_full"))
            trace.stop("context_full")  # unless a limit of theirs has said so before
            break
        said = segment.messages[-1]
        calls = [Called(call.id, call.name, call.arguments) for call in said.tool_calls or ()]
        messages, _ = await episode.reply(said.content or "", calls)
        if episode.stop is None and episode.turns >= episode.source.max_turns:
            await episode.finish("max_turns")
            trace.stop("max_turns")
            break
    if episode.stop is not None:
        # under "max_turns" their traces count as truncated
        own_limit = episode.stop == "truncated" and episode.turns >= episode.source.max_turns
        trace.stop("max_turns" if own_limit else episode.stop)
    state = trace.state
    state.played, state.components, state.metrics = True, dict(episode.components), dict(episode.metrics)
    state.reward, state.reward_dense, state.reward_sparse = episode.reward, episode.reward_dense, episode.reward_sparse


@contextmanager
def _their_errors() -> Generator[None]:
    try:
        yield
    except EnvOutage as error:
        raise vf.SandboxError(str(error)) from error
    except EnvFailure as error:
        raise vf.EnvError(str(error)) from error


def _played(trace: Any) -> TurnwiseState:
    """The state of an episode. Raises ValueError where the environment was not asked, so that nothing is scored 0 for it."""
    if not trace.state.played:
        raise ValueError(f"the environment was not played to its end; tasks of {PLUGIN} are played by the environment {PLUGIN}")
    return trace.state


def _component(name: str, weight: float) -> Callable[..., Any]:
    async def component(trace: Any) -> float:
        return _played(trace).components.get(name, 0.0)

    component.__name__ = name
    return vf.reward(component, weight=weight)


async def _total(trace: Any) -> float:
    return _played(trace).reward


_total.__name__ = "reward"
_total = vf.reward(_total)


def _is_overflow(status: int, words: str) -> bool:
    """Whether the prompt was longer than the model's context: that ends an episode, and is no error."""
    return status in (400, 413) and any(phrase in words.lower() for phrase in OVERFLOW)
