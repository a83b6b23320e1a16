"""`ToolEnv`: an environment whose replies call tools, which are methods marked with `@tool`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from turnwise.envs.base import Step, TextEnv
from turnwise.envs.messages import AssistantMessage, Tool, ToolCall, tool_message
from turnwise.envs.suggest import did_you_mean
from turnwise.envs.tools import Done, ToolError, ToolMethod, tool_methods

MAX_ARGUMENT_CHARACTERS = 100_000  # of one call; no tool is meant for more, and one that copies its input stays cheap
MAX_ANSWER_CHARACTERS = 50_000  # of one tool message; far beyond what a context has room for
SHOWN_CHARACTERS = 100  # of a name that is no tool's


class ToolEnv(TextEnv):
    """An environment with tools. A subclass says which tasks there are, how an episode begins, and has methods under `@tool`.

    A method returns the answer to its call; `Done(text)` ends the episode. `self.earn(name=value)` adds reward components to
    the step. `ToolError("words")` says what the policy did wrong; any other exception is a failure of the environment and
    ends the rollout as errored. A call that is malformed, unknown or has wrong arguments is answered, not raised.

    `step` takes the JSON of an `AssistantMessage`; other text is a reply without calls. `info["messages"]` holds what
    answers it: a tool message for each call, in order, or one user message.
    """

    tools: tuple[Tool, ...] = ()
    """Those of the class in the order of definition; an instance may offer fewer."""

    max_calls: int = 16
    """Calls of one reply that are run; the rest are answered by saying so."""

    ends_without_call: bool = False
    """Whether a reply that calls nothing ends the episode, instead of being reminded of the tools."""

    tool_methods: ClassVar[Mapping[str, ToolMethod]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.tool_methods = tool_methods(cls)
        for method in cls.tool_methods.values():
            if hasattr(TextEnv, method.attribute) or method.attribute in vars(ToolEnv):
                raise TypeError(
                    f"{cls.__name__}.{method.attribute} would hide ToolEnv.{method.attribute}; give the method another name "
                    f'and write @tool(name="{method.tool.name}") above it'
                )
        cls.tools = tuple(method.tool for method in cls.tool_methods.values())

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0  # attempted in this episode
        self.invalid_calls = 0  # of those, not run: malformed, unknown, wrong arguments
        self.malformed_calls = 0  # of those, not even read
        self.earned: dict[str, float] = {}  # reward components of this step so far
        self._invalid_before = 0

    @property
    def invalid_calls_now(self) -> int:
        """Calls of this reply that could not be run, so far."""
        return self.invalid_calls - self._invalid_before

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.calls = self.invalid_calls = self.malformed_calls = 0
        self.earned = {}
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> Step:
        """Decode the reply and `act` on it. Reply number `max_turns` is truncated, unless the rules ended the episode there."""
        if self.over:
            raise RuntimeError(f"{type(self).__name__}.step() after the end of an episode (or before the first); call reset()")
        self.turn += 1
        self.earned, self._invalid_before = {}, self.invalid_calls
        step = self.act(_decode(action))
        if "messages" not in step[4]:
            raise RuntimeError(f"{type(self).__name__}.act() must return self.respond(message, answers)")
        return step

    def act(self, message: AssistantMessage) -> Step:
        """Run the calls of a reply in order, each after the answer of the one before; overridden, it ends with `respond`."""
        if not message.tool_calls:
            return self.respond(message, [self.no_call(message.content)])
        answers: list[str] = []
        for number, call in enumerate(message.tool_calls):
            if answers and isinstance(answers[-1], Done):
                answers += ["Not run: the episode is over."] * (len(message.tool_calls) - number)
                return self.respond(message, answers, ended=True)
            answers.append(self._too_many() if number >= self.max_calls else self.call(call))
        return self.respond(message, answers)

    def respond(self, message: AssistantMessage, answers: Sequence[str], *, ended: bool = False) -> Step:
        """The step that answers a reply.

        Args:
            message: the reply.
            answers: a text for each of its calls, in order, or a single one when it has none. A `Done` ends the episode.
            ended: whether the episode ends here.

        Raises:
            ValueError: when there are more or fewer answers.
        """
        if len(answers) != max(1, len(message.tool_calls)):
            raise ValueError(f"{type(self).__name__}: {len(answers)} answers to {len(message.tool_calls)} calls")
        texts = [_bounded(answer) for answer in answers]
        observation = "\n\n".join(texts)
        if ended or any(isinstance(answer, Done) for answer in answers):
            step = self.end(observation, components=self.earned)
        else:
            step = self.answer(observation, components=self.earned)
        calls = message.tool_calls
        step[4]["messages"] = (
            [dict(tool_message(call, text)) for call, text in zip(calls, texts, strict=True)]
            if calls
            else [{"role": "user", "content": observation}]
        )
        return step

    def no_call(self, content: str) -> str:
        """What a reply without calls is answered: a reminder of the tools, unless overridden or `ends_without_call`."""
        if self.ends_without_call:
            return Done("The reply calls no tool; the episode is over.")
        names = ", ".join(tool.name for tool in self.tools)
        return f"The reply calls no tool. Call one of: {names}."

    def earn(self, **components: float) -> None:
        """Add to the reward components of this step."""
        for name, value in components.items():
            self.earned[name] = self.earned.get(name, 0.0) + value

    def call(self, call: ToolCall) -> str:
        """Run one call, or say why it cannot be run."""
        self.calls += 1
        try:
            method, arguments = self._resolve(call)
        except (ToolError, RecursionError) as error:
            self.invalid_calls += 1
            self.invalid_call(call)
            return f"Error: {error if isinstance(error, ToolError) else 'the arguments are nested too deeply.'}"
        try:
            answer = cast(object, getattr(self, method.attribute)(**arguments))
        except ToolError as error:
            return f"Error: {error}"
        if not isinstance(answer, str):
            raise TypeError(
                f"tool {type(self).__name__}.{method.attribute} returned {type(answer).__name__}; it must return text"
            )
        return answer

    def invalid_call(self, call: ToolCall) -> None:
        """Called for each call that could not be run, to price it with `earn`. Nothing, unless overridden."""

    def episode_metrics(self) -> dict[str, float]:
        return {
            "calls": float(self.calls),
            "invalid_calls": float(self.invalid_calls),
            "malformed_calls": float(self.malformed_calls),
        }

    def _resolve(self, call: ToolCall) -> tuple[ToolMethod, dict[str, Any]]:
        offered = [tool.name for tool in self.tools]
        if call.arguments is None or call.name is None:
            self.malformed_calls += 1
            raise ToolError(f"{call.error or 'a call needs a name and arguments'}. The form is {self._example(call.name)}")
        if call.error is not None:
            raise ToolError(f"{call.error}.")
        if call.name not in offered:
            hint = did_you_mean(call.name[:SHOWN_CHARACTERS], offered)
            raise ToolError(f"there is no tool {call.name[:SHOWN_CHARACTERS]!r}.{hint} Tools: {', '.join(offered)}.")
        method = self.tool_methods[call.name]
        if len(repr(call.arguments)) > MAX_ARGUMENT_CHARACTERS:
            raise ToolError(f"the arguments are longer than {MAX_ARGUMENT_CHARACTERS:,} characters.")
        try:
            return method, method.arguments(call.arguments)
        except ToolError as error:
            raise ToolError(f"{error} The form is {method.example()}") from error

    def _example(self, name: str | None) -> str:
        """A call in the right form, of that tool where it is offered, else of the first one."""
        offered = [tool.name for tool in self.tools]
        chosen = name if name in offered else next(iter(offered), None)
        return '{"name": "...", "arguments": {}}' if chosen is None else self.tool_methods[chosen].example()

    def _too_many(self) -> str:
        return f"Not run: a reply may make {self.max_calls} calls."


def _decode(action: str) -> AssistantMessage:
    try:
        return AssistantMessage.from_action(action)
    except RecursionError:  # arguments nested a thousand deep are nobody's call
        return AssistantMessage(content=action)


def _bounded(text: str) -> str:
    rest = len(text) - MAX_ANSWER_CHARACTERS
    return str(text) if rest <= 0 else f"{text[:MAX_ANSWER_CHARACTERS]}\n[{rest:,} characters more]"
