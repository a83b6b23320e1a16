"""Our environments as a `MultiTurnEnv` of verifiers up to 0.3: every reply is played where their loop records it."""

# verifiers is an optional package, absent where types are checked
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedFunctionDecorator=false

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import verifiers as vf
from datasets import Dataset
from verifiers.types import AssistantMessage, Tool
from verifiers.utils.message_utils import normalize_messages

from turnwise.adapters.for_verifiers.episode import Called, EnvFailure, EnvOutage, Episode, openai_messages
from turnwise.adapters.for_verifiers.source import Source
from turnwise.config import RewardConfig
from turnwise.envs.checks import Message

CUT = {"prompt_too_long": "context_full", "max_total_completion_tokens_reached": "context_full", "max_turns_reached": "max_turns"}
REWARD, METRIC = "reward_", "metric_"  # their results put metrics beside `answer`, `error` and `prompt`: keep ours apart


class EnvFailed(vf.Error):
    """One of our environments raised, hung or answered nonsense."""


class TurnwiseEnv(vf.MultiTurnEnv):
    """One of our environments, an instance a rollout.

    The rows of its data sets say which task is played; the prompt is made when a rollout begins, since the first
    observation is the environment's to give. `state["turnwise"]` holds what the episode earned.
    """

    def __init__(self, source: Source, *, split: str, eval_split: str, **kwargs: Any) -> None:
        self.source = source
        self._episodes: dict[str, Episode] = {}
        super().__init__(
            dataset=partial(rows, source, split),
            eval_dataset=partial(rows, source, eval_split),
            tool_defs=[_tool(tool.name, tool.description, tool.parameters) for tool in source.tools] or None,
            rubric=Components(source),
            max_turns=source.max_turns,
            **kwargs,
        )
        self.system_prompt = source.system_prompt or None

    async def setup_state(self, state: Any) -> Any:
        row = state["info"]
        with _their_errors():
            task = self.source.task(row["split"], row["index"], row["task_id"])
            episode = Episode(self.source, task, seed=row["seed"])
            self._episodes[state["trajectory_id"]] = episode
            opening = await episode.begin()
        system: list[Message] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        state["prompt"] = normalize_messages(openai_messages([*system, *opening]))
        self._tell(state, episode)
        return state

    async def add_trajectory_step(self, state: Any, trajectory_step: Any) -> None:
        """Record the reply and play it, so that the one that a limit of theirs cuts off is played too."""
        await super().add_trajectory_step(state, trajectory_step)
        episode = self._episodes[state["trajectory_id"]]
        said = trajectory_step["completion"][-1]
        calls = [Called(call.id, call.name, call.arguments) for call in said.tool_calls or ()]
        with _their_errors():
            messages, trajectory_step["reward"] = await episode.reply(_text(said), calls)
        answer = normalize_messages(openai_messages(messages))
        state["turnwise_answer"] = answer
        if episode.stop is not None:
            state["final_env_response"] = answer
            state["is_truncated"] = episode.stop == "truncated"
        self._tell(state, episode)

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        return state.pop("turnwise_answer")

    @vf.stop(priority=10)
    async def terminated(self, state: Any) -> bool:
        return state.get("turnwise", {}).get("stop") == "terminated"

    @vf.stop(priority=10)
    async def truncated(self, state: Any) -> bool:
        return state.get("turnwise", {}).get("stop") == "truncated"

    @vf.cleanup
    async def end_episode(self, state: Any) -> None:
        """Let the environment say what it owes an episode that their limits cut off, and part from it."""
        episode = self._episodes.pop(state["trajectory_id"], None)
        if episode is None:
            return
        reason = CUT.get(state.get("stop_condition") or "")
        try:
            if reason is not None and state.get("error") is None and episode.stop is None:
                with _their_errors():
                    owed = await episode.finish(reason)
                state["trajectory"][-1]["reward"] += owed
                state["is_truncated"] = True
                self._tell(state, episode)
        except vf.Error as error:
            state["error"] = error
        finally:
            await episode.close()

    @vf.teardown
    async def release(self) -> None:
        self.source.close()

    def _tell(self, state: Any, episode: Episode) -> None:
        state["turnwise"] = {
            "stop": episode.stop,
            "components": dict(episode.components),
            "metrics": dict(episode.metrics),
            "reward": episode.reward,
            "reward_dense": episode.reward_dense,
            "reward_sparse": episode.reward_sparse,
        }


def load(env: str, args: Mapping[str, Any], *, split: str, eval_split: str, **settings: Any) -> TurnwiseEnv:
    """The environment with the tasks of `split`, and those of `eval_split` for evaluation."""
    reward = RewardConfig(mode=settings.pop("reward"), weights=settings.pop("weights"))
    return TurnwiseEnv(Source(env, args, reward=reward, **settings), split=split, eval_split=eval_split)


class Components(vf.Rubric):
    """A weighted reward function a component, so that the total is the reward that we compose; metrics beside them."""

    def __init__(self, source: Source) -> None:
        weights = source.weights()
        functions = [_component(name) for name in weights] or [_total]
        super().__init__(funcs=functions, weights=list(weights.values()) or [1.0])

    async def score_rollout(self, state: Any) -> None:
        await super().score_rollout(state)
        self._add_metrics(state)

    async def score_group(self, states: Sequence[Any]) -> None:
        await super().score_group(states)
        for state in states:
            self._add_metrics(state)

    def _add_metrics(self, state: Any) -> None:
        told = state.get("turnwise", {})
        ours = {f"{METRIC}{name}": value for name, value in told.get("metrics", {}).items()}
        both = {name: told[name] for name in ("reward_dense", "reward_sparse") if name in told}
        state["metrics"] = {**state["metrics"], **ours, **both}


def rows(source: Source, split: str) -> Dataset:
    """A data set of the tasks of `split`: which task, with which seed; what is asked is said when it is played."""
    ids = [str(task.get("id", "")) for task in source.tasks(split)]
    infos = [
        {"split": split, "index": index, "task_id": name, "seed": source.seed_of(split, name)} for index, name in enumerate(ids)
    ]
    return Dataset.from_dict({"prompt": [[] for _ in ids], "info": infos})


def _tool(name: str, description: str, parameters: dict[str, Any]) -> Any:
    return Tool(name=name, description=description, parameters=parameters)


def _component(name: str) -> Any:
    async def component(state: Any) -> float:
        return state.get("turnwise", {}).get("components", {}).get(name, 0.0)

    component.__name__ = f"{REWARD}{name}"
    return component


async def _total(state: Any) -> float:
    return state.get("turnwise", {}).get("reward", 0.0)


_total.__name__ = "reward_total"


def _text(said: AssistantMessage) -> str:
    """The text of a reply, which may come in parts."""
    if isinstance(said.content, list):
        return "".join(str(part.get("text", "")) for part in (dict(part) for part in said.content))
    return said.content or ""


@contextmanager
def _their_errors() -> Generator[None]:
    try:
        yield
    except EnvOutage as error:
        raise vf.InfraError(str(error)) from error  # which they try again
    except (EnvFailure, ValueError) as error:
        raise EnvFailed(str(error)) from error
