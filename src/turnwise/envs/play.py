"""Play an environment yourself: read what the policy reads, type what it would reply."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from turnwise.envs.base import Task, TextEnv
from turnwise.envs.messages import Tool
from turnwise.envs.typed_calls import HELP, read_typed, signature


def play(
    env: TextEnv,
    *,
    input: TextIO | None = None,
    output: TextIO | None = None,
    seed: int | None = None,
    task: Task | None = None,
) -> float:
    """Play one episode, a line a reply. Where there are tools, a line is a call of one, or plain words.

    Args:
        env: the environment.
        input: where replies come from; standard input when not given. Its end ends the episode.
        output: where everything is shown; standard output when not given.
        seed: of the episode.
        task: the task; drawn from the training tasks when not given.

    Returns:
        The total reward.
    """
    source = input or sys.stdin
    console = Console(file=output or sys.stdout, highlight=False)
    observation, _ = env.reset(seed=seed, options=None if task is None else {"task": task})
    if env.system_prompt:
        console.print(Panel(Text(env.system_prompt), title="system prompt", title_align="left"))
    if env.examples:
        console.print(Panel(_conversation(env.examples), title="worked examples", title_align="left"))
    if env.tools:
        console.print(Panel(_describe(env.tools), title="tools", title_align="left"))
    total, metrics, over = 0.0, {}, False
    while not over:
        console.print(Text(observation))
        console.print("> ", end="")
        action = _read(env, source, console)
        if action is None:
            console.print(Text("end of input", style="dim"))
            total += _show_components(console, env.finish("end of input"))
            break
        observation, _, terminated, truncated, info = env.step(action)
        total += _show_components(console, info["reward_components"])
        metrics, over = info["metrics"], terminated or truncated
    else:
        console.print(Text(observation))
    console.print(Text(f"total reward {total:+.3f}", style="bold"))
    _show_metrics(console, metrics)
    return total


def choose_task(env: TextEnv, wanted: str) -> Task:
    """The training task of this id, or the first whose id begins so. Raises ValueError when there is none."""
    rows = env.tasks("train")
    found = next((row for row in rows if str(row["id"]) == wanted), None)
    found = found or next((row for row in rows if str(row["id"]).startswith(wanted)), None)
    if found is None:
        some = ", ".join(str(row["id"]) for row in rows[:10])
        raise ValueError(f"no training task has an id that begins with {wanted!r}; there are {some}{' …' * (len(rows) > 10)}")
    return found


def _read(env: TextEnv, source: TextIO, console: Console) -> str | None:
    """The next reply, of as many lines as the environment wants; None at the end of input."""
    typed: list[str] = []
    while line := source.readline():
        typed.append(line.rstrip("\n"))
        if not source.isatty():
            console.print(Text(typed[-1]))  # a terminal has echoed it already
        reply = "\n".join(typed)
        action = read_typed(reply, env.tools).to_action() if env.tools else env.typed(reply)
        if action is not None:
            return action
    return None


def _conversation(messages: Sequence[Mapping[str, Any]]) -> Text:
    text = Text()
    for message in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        text.append(f"{message['role']}: ", style="dim").append(" ".join(filter(None, [message["content"], *calls])) + "\n")
    text.rstrip()
    return text


def _describe(tools: Sequence[Tool]) -> Text:
    text = Text()
    for tool in tools:
        text.append(f"{signature(tool)}\n", style="bold").append(f"    {tool.description}\n")
    return text.append(HELP, style="dim")


def _show_components(console: Console, components: Mapping[str, float]) -> float:
    """Print one line of what a step earned; returns its sum."""
    earned = sum(components.values())
    parts = ", ".join(f"{name} {value:+.3f}" for name, value in components.items() if value)
    if components:
        console.print(Text(f"reward {earned:+.3f}" + (f" ({parts})" if parts else ""), style="dim"))
    return earned


def _show_metrics(console: Console, metrics: Mapping[str, Any]) -> None:
    for name, value in metrics.items():
        console.print(Text(f"  {name} {value:g}", style="dim"))
