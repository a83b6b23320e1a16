"""What an agent is told."""

from collections.abc import Mapping

from turnwise.containers import CommandResult, Ending
from turnwise.envs.mlgym.editor import HELP

SYSTEM = f"""You work on a machine-learning task in a container with a shell and Python. Your workspace is the current folder.

Each of your replies holds what you think, in a few words, and exactly one block with one command:
```
ls -l data
```
Besides shell commands there are:
validate                      score what lies in your workspace on one half of the hidden data, and go on
submit                        hand in what lies in your workspace; it is scored on the other half, and the task is over
{HELP}

Write files with `create` and `insert`, or by a shell command such as `cat > solve.py <<'END'`. Commands that wait for input do
not work. Improve on the baseline, then submit. What lies in your workspace when your turns run out is scored as if you had
submitted it."""


def opening(description: str, baseline: str, turns: int) -> str:
    """The first observation of an episode."""
    parts = [description, f"The baseline scores {baseline} on the half that validate uses." if baseline else ""]
    return "\n\n".join([*filter(None, parts), f"You have {turns} replies."])


def told(scores: Mapping[str, float]) -> str:
    """Scores in words: `accuracy 0.766`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def footed(observation: str, left: int, turns: int, folder: str, file: str | None = None) -> str:
    """An observation with where the episode stands."""
    parts = [f"{left} of {turns} replies left", f"folder {folder}", *([f"open file {file}"] if file is not None else [])]
    return f"{observation}\n({'; '.join(parts)})"


def describe(done: CommandResult, limit_s: float, most: int) -> str:
    """What the agent is told of a command: its output, cut in the middle, and how it ended unless all was well."""
    output = done.output.rstrip("\n")
    left_out = done.cut + max(0, len(output) - most)
    if len(output) > most:
        output = f"{output[: most // 2]}\n[... {left_out} characters left out ...]\n{output[-(most // 2) :]}"
    words = {
        Ending.OK: "",
        Ending.FAILED: f"[exit status {done.exit_code}]",
        Ending.TIMEOUT: f"[stopped after {limit_s:g} s; whatever it had started was ended too]",
        Ending.OOM: "[killed: the memory of the container was full]",
        Ending.PIDS: "[ended: too many processes]",
        Ending.FLOOD: "[ended: too much output]",
    }[done.ending]
    fresh = "[the shell is new, in the workspace: variables are gone, files are not]" if done.new_session else ""
    return "\n".join(filter(None, [output, words, fresh])) or "[no output]"
