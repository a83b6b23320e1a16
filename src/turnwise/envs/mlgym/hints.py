"""What is worth knowing before a run: whether turns fit the context, and steps their time limit."""

from collections.abc import Mapping

from turnwise.config import EnvConfig, RLConfig

CHARACTERS_A_TOKEN = 4  # roughly, of English and code


def context_hint(config: RLConfig, turns: int, observation_chars: int) -> str | None:
    """A word where replies and observations of their greatest length exceed the context."""
    reply, observation = config.orchestrator.sampling.max_tokens, observation_chars // CHARACTERS_A_TOKEN
    most = turns * (reply + observation)
    if most <= config.seq_len:
        return None
    return (
        f"mlgym: {turns} turns of up to {reply} tokens, with observations of up to {observation_chars:,} characters (some "
        f"{observation} tokens), come to {most:,}, and seq_len = {config.seq_len:,} leaves {config.seq_len // turns} for each: "
        "episodes of long turns end when it is full, and what lies in the workspace then is scored. Lower args.max_turns, "
        "args.observation_chars or orchestrator.sampling.max_tokens, or raise seq_len"
    )


def time_hint(config: RLConfig, table: EnvConfig, limits_s: Mapping[str, float]) -> str | None:
    """A word where a step may be given up as hung while its command, or an evaluation, still has time.

    Args:
        limits_s: of a training and of an evaluation, by task.
    """
    task, limit = max(limits_s.items(), key=lambda item: item[1])
    if table.timeout_s > limit:
        return None
    wanted = limit + config.containers.wait_s
    return (
        f"mlgym: orchestrator.env.timeout_s = {table.timeout_s:g} is not above the {limit:g} s that {task} gives a training or "
        f"an evaluation, so that a long one becomes an errored rollout; set it to {wanted:g} (containers.wait_s more), or lower "
        "args.time_limit_s"
    )
