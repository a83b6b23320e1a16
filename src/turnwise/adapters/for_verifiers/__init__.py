"""Our environments in the framework verifiers: `load_environment("wordle")`, by whichever of its two APIs is installed.

Up to 0.3 that gives a `MultiTurnEnv`, from 0.4 on an `Env` over a `Taskset`. The module `turnwise_verifiers` offers the same
to their command lines, under the id `turnwise-verifiers`.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

from turnwise.adapters.packages import optional_package

__all__ = ["api", "load_environment"]

Mode = Literal["dense", "sparse"]


def api() -> Literal["legacy", "v1"]:
    """Which API the installed verifiers offers; `legacy` where it has both, since its own tools then default to that.

    Raises:
        ValueError: it is not installed.
    """
    optional_package("verifiers", extra="verifiers")
    return "legacy" if find_spec("verifiers.legacy") or not find_spec("verifiers.v1") else "v1"


def load_environment(
    env: str,
    *,
    split: str = "train",
    eval_split: str = "validation",
    reward: Mode = "dense",
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    max_turns: int | None = None,
    timeout_s: float = 60.0,
    containers: Mapping[str, Any] | None = None,
    **args: Any,
) -> Any:
    """One of our environments as theirs.

    Args:
        env: a registered name, `package.module:Class`, or `SCHEME:NAME`.
        split: whose tasks are the data set.
        eval_split: whose tasks are the evaluation data set; only the older API has two in one environment.
        reward: pay all components as they occur, or only the outcome.
        weights: factors of the components, 1 where none is given.
        seed: of all episodes. Those of one task begin alike.
        max_turns: replies of an episode; the environment's own limit when not given.
        timeout_s: time limit of one call of the environment; a longer one makes an errored rollout.
        containers: the table `[containers]` of a configuration, for environments that work in some.
        args: arguments of the environment.

    Raises:
        ValueError: verifiers is missing, or the environment cannot be made of these arguments.
    """
    settings = {"reward": reward, "weights": dict(weights or {}), "seed": seed, "max_turns": max_turns, "timeout_s": timeout_s}
    settings["containers"] = dict(containers or {})
    if api() == "legacy":
        from turnwise.adapters.for_verifiers.legacy import load
    else:
        from turnwise.adapters.for_verifiers.v1 import load
    return load(env, args, split=split, eval_split=eval_split, **settings)
