"""The environment: an OpenEnv server, reached by its URL, or started from a command or an image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from turnwise.adapters.answers import finite_number
from turnwise.adapters.openenv.local import end_of, local_url
from turnwise.adapters.openenv.mcp import MAX_CALLS, answer_of, call_action, listed_tools
from turnwise.adapters.openenv.places import reached_by, schema_of, server_tasks
from turnwise.adapters.openenv.text import ActionText, Misfit, ObservationText
from turnwise.adapters.openenv.wire import Lost, OpenEnvError, Refused, Session
from turnwise.adapters.seeds import rows_of, seeded_splits
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.messages import AssistantMessage, tool_message

Result = TypeVar("Result")

SEEDS = 1 << 31  # every generator takes a seed below it


@dataclass
class Episode:
    """What an episode has had so far."""

    rewarded: bool = False  # whether any step had a reward
    invalid_actions: int = 0
    metrics: dict[str, float] = field(default_factory=dict[str, float])


class OpenEnv(TextEnv):
    """An environment server of OpenEnv 0.10: `openenv:URL`, `openenv:IMAGE`, or `openenv:NAME` with args.command."""

    def __init__(
        self,
        source: str,
        *,
        command: Sequence[str] | None = None,
        log: str | None = None,
        start_timeout_s: float = 60.0,
        timeout_s: float = 50.0,
        tasks: int | Literal["server"] = 256,
        seed: int = 0,
        reset: Mapping[str, Any] | None = None,
        max_turns: int = 16,
        system_prompt: str = "",
        opening: str | None = None,
        observation: str | None = None,
        max_observation_chars: int = 50_000,
        action: Mapping[str, Any] | None = None,
        action_field: str | None = None,
        offer_tools: bool = False,
        invalid_action_cost: float = 0.0,
        null_rewards: bool = True,
        components: str | None = None,
        outcome: Sequence[str] = ("reward",),
        metrics: str | None = None,
    ) -> None:
        """Set up; the server is asked, or started, when it is first needed.

        Args:
            source: URL of a running server; a name for the server of `command`; or an image, served by `docker run`.
            command: words of a command that serves on 127.0.0.1 at `{port}`, started once by each process of a run and ended
                with it.
            log: file for what the command prints; one in the folder for temporary files when not given.
            start_timeout_s: what the command may take until the server is healthy, seconds.
            timeout_s: what the server may take for one answer, seconds; keep it below `orchestrator.env.timeout_s`.
            tasks: seeds a split, or "server" for the tasks of the server's task routes.
            seed: the first seed; validation seeds begin 2 ** 30 later.
            reset: further parameters of every reset.
            max_turns: replies of one episode; one that is no action counts.
            system_prompt: instructions; when empty, those that the server sends in `metadata.system_prompt` of a reset stand at
                the head of the first observation.
            opening: template of the first observation; `observation` when not given.
            observation: template of observations, such as "{board}\\nScore: {score}"; when not given, the only field of text,
                or all fields with their names where there is not exactly one.
            max_observation_chars: a longer observation is an error.
            action: fields that are the same in every action.
            action_field: the field that the reply is; the only one that is required when not given.
            offer_tools: offer the tools of an MCP environment in the model's own format; the server is then asked for them at
                once, and every action is a call.
            invalid_action_cost: what a reply that is no action costs, as the component `invalid_action`.
            null_rewards: whether a step may have no reward. A server writes NaN as null too: where every step has a reward,
                False turns that into an error. An episode that ends by itself without any reward always is one.
            components: key in an observation's metadata of reward components, which then stand for `reward`.
            outcome: the components that sparse reward pays.
            metrics: key in an observation's metadata of the metrics of an episode.

        Raises:
            ValueError: for arguments that do not fit, naming them.
        """
        super().__init__()
        self.url, self.launch = reached_by(source, command, log, start_timeout_s)
        for key, value in (("timeout_s", timeout_s), ("max_turns", max_turns), ("max_observation_chars", max_observation_chars)):
            if value <= 0:
                raise ValueError(f"args.{key} = {value} must be above 0")
        self.counted_by_server = tasks == "server"
        self.splits = {} if tasks == "server" else seeded_splits("seed", num_train=tasks, num_validation=tasks, seed=seed)
        self.source, self.timeout_s, self.reset_data = source, timeout_s, dict(reset or {})
        self.max_turns, self.system_prompt = max_turns, system_prompt
        self.templates = (opening if opening is not None else observation, observation)
        self.max_observation_chars = max_observation_chars
        self.fixed, self.action_field = dict(action or {}), action_field
        self.invalid_action_cost, self.null_rewards = invalid_action_cost, null_rewards
        self.components_key, self.metrics_key = components, metrics
        self.outcome_components = frozenset(outcome)
        self.component_names = frozenset({"reward", "invalid_action"} if components is None else ())
        self.session: Session | None = None
        self.episode = Episode()
        self._given_seed: int | None = None
        if offer_tools:
            self.tools = self._now(lambda: listed_tools(self._base_url(), timeout_s))

    def tasks(self, split: str) -> Sequence[Task]:
        if self.counted_by_server:
            return self._now(lambda: server_tasks(self._base_url(), split, self.timeout_s))
        return rows_of(self.splits, split, source=f"openenv:{self.source}")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._given_seed = seed
        return super().reset(seed=seed, options=options)

    def begin(self, task: Task) -> str:
        url = self._base_url()
        schema = schema_of(url, self.timeout_s)
        observed = schema.get("observation", {})
        self.first_text = ObservationText(schema.get("reset_observation") or observed, self.templates[0], "opening")
        self.later_text = ObservationText(observed, self.templates[1])
        self.actions = ActionText(schema.get("action", {}), self.fixed, self.action_field)
        self.actions.field()  # a schema that no reply can fill is found before the first reply
        if self.session is None or self.session.url != url:
            self.session = Session(url, self.timeout_s)
        self.episode = Episode()
        try:
            result = self.session.reset({**self.reset_data, **self._seeding(task)})
        except Lost as error:
            raise self._explained(error) from error
        if result.get("done"):
            raise OpenEnvError(f"{url} says that the episode ended before the first action (done in the answer to reset)")
        told = _metadata(result).get("system_prompt")
        text = self._bounded(self.first_text.read(result))
        return f"{told}\n\n{text}" if isinstance(told, str) and told and not self.system_prompt else text

    def step(self, action: str) -> Step:
        if self.over or self.session is None:
            raise RuntimeError("OpenEnv.step() after the end of an episode (or before the first); call reset()")
        self.turn += 1
        if self.tools:
            return self._call(AssistantMessage.from_action(action))
        try:
            result = self._played(self.session, self.actions.read(action))
        except Misfit as misfit:
            return self.answer(str(misfit), components=self._invalid())
        except Refused as error:
            fault = self.actions.fault(error.errors) if error.code == "VALIDATION_ERROR" else None
            if fault is None:
                raise
            return self.answer(fault, components=self._invalid())
        paid = self._paid(result)
        return self._answered(self._bounded(self.later_text.read(result)), paid, result)

    def episode_metrics(self) -> dict[str, float]:
        return {"invalid_actions": float(self.episode.invalid_actions), **self.episode.metrics}

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def _call(self, message: AssistantMessage) -> Step:
        """Make the calls of a reply in order."""
        result: Mapping[str, Any] = {}
        answers, paid = list[str](), dict[str, float]()
        for number, call in enumerate(message.tool_calls):
            action = call_action(call) if number < MAX_CALLS and not result.get("done") else None
            if action is None:
                answers.append(f"Not run: {call.error or 'the episode is over, or there are too many calls'}.")
                earned = self._invalid()
            else:
                result = self._played(self.session, action)
                text, ran = answer_of(result.get("observation"))
                answers.append(self._bounded(text))
                earned = _summed(self._paid(result), {} if ran else self._invalid())
            paid = _summed(paid, earned)
        if not answers:
            answers, paid = (
                [f"The reply calls no tool. Call one of: {', '.join(tool.name for tool in self.tools)}."],
                self._invalid(),
            )
        step = self._answered("\n\n".join(answers), paid, result)
        told = [dict(tool_message(call, text)) for call, text in zip(message.tool_calls, answers, strict=False)]
        step[4]["messages"] = told or [{"role": "user", "content": answers[0]}]
        return step

    def _played(self, session: Session | None, action: Mapping[str, Any]) -> Mapping[str, Any]:
        assert session is not None, "step before reset"
        try:
            return session.step(action)
        except Lost as error:
            raise self._explained(error) from error

    def _paid(self, result: Mapping[str, Any]) -> dict[str, float]:
        """What a step earned; its metrics are kept. Raises OpenEnvError."""
        done, metadata = result.get("done"), _metadata(result)
        if not isinstance(done, bool):
            raise OpenEnvError(f"{self._where()} has done = {done!r}; the protocol has true or false there")
        self.episode.metrics = self._numbers(metadata, self.metrics_key) if self.metrics_key else {}
        return self._components(result.get("reward"), metadata, done=done)

    def _answered(self, text: str, components: Mapping[str, float], result: Mapping[str, Any]) -> Step:
        if not result.get("done"):
            return self.answer(text, components=components)
        metadata = _metadata(result)
        truncated = metadata.get("truncated") is True and metadata.get("terminated") is not True
        return self._step(text, components, terminated=not truncated, truncated=truncated)

    def _components(self, reward: object, metadata: Mapping[str, Any], *, done: bool) -> dict[str, float]:
        """What a step earned. Raises OpenEnvError for what is no finite number, and for an end without any reward."""
        if self.components_key is not None:
            return self._numbers(metadata, self.components_key)
        if reward is None and self.null_rewards and (self.episode.rewarded or not done):
            return {}
        if reward is None:
            rule = (
                "the episode ended without any reward"
                if self.null_rewards
                else "every step must have one (args.null_rewards = false)"
            )
            raise OpenEnvError(f"{self._where()} has reward = null, which NaN becomes too; {rule}")
        number = float(reward) if isinstance(reward, bool) else reward
        try:
            paid = finite_number(number, what=f"the reward of {self._where()}")
        except ValueError as error:
            raise OpenEnvError(str(error)) from error
        self.episode.rewarded = True
        return {"reward": paid}

    def _numbers(self, metadata: Mapping[str, Any], key: str) -> dict[str, float]:
        found = metadata.get(key)
        if not isinstance(found, dict):
            known = ", ".join(metadata) or "nothing"
            raise OpenEnvError(f"{self._where()} has no mapping metadata.{key} (args.components, args.metrics); it has {known}")
        try:
            return {
                str(name): finite_number(value, what=f"metadata.{key}.{name} of {self._where()}")
                for name, value in cast(dict[str, Any], found).items()
            }
        except ValueError as error:
            raise OpenEnvError(str(error)) from error

    def _invalid(self) -> dict[str, float]:
        """Count a reply or call that is no action, and price it."""
        self.episode.invalid_actions += 1
        return {"invalid_action": -self.invalid_action_cost} if self.invalid_action_cost else {}

    def _now(self, ask: Callable[[], Result]) -> Result:
        """Ask the server before any episode, where its absence is a wrong configuration. Raises ValueError."""
        try:
            return ask()
        except OpenEnvError as error:
            raise ValueError(f"openenv:{self.source}: {error}") from error

    def _bounded(self, text: str) -> str:
        if len(text) > self.max_observation_chars:
            raise OpenEnvError(
                f"{self._where()} has an observation of {len(text)} characters, more than args.max_observation_chars = "
                f"{self.max_observation_chars}; choose fields by a template (args.observation), or raise the limit"
            )
        return text

    def _seeding(self, task: Task) -> dict[str, Any]:
        given = task.get("seed")
        if given is None:
            given = self._given_seed if self._given_seed is not None else int(self.np_random.integers(SEEDS))
        return {"seed": int(given) % SEEDS, **{key: task[key] for key in ("split", "index") if key in task}}

    def _explained(self, error: Lost) -> OpenEnvError:
        """With how a server of our own ended, where that is why."""
        end = end_of(self.launch) if self.launch is not None else None
        return OpenEnvError(f"{error}: {end}" if end else str(error))

    def _base_url(self) -> str:
        return self.url if self.launch is None else local_url(self.launch)

    def _where(self) -> str:
        place = self.session.url if self.session is not None else self.source
        return f"the answer of {place} to step {self.turn}"


def _metadata(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of an observation, wherever the server puts it."""
    inner = result.get("observation")
    inside = cast(dict[str, Any], inner).get("metadata") if isinstance(inner, dict) else None
    found = result.get("metadata") or inside
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _summed(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in (*one, *other)}
