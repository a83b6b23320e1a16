"""The one place where reward components become a reward."""

from collections.abc import Collection, Mapping

from turnwise.config import RewardConfig


def compose(components: Mapping[str, float], config: RewardConfig, *, outcome_components: Collection[str]) -> float:
    """The reward of one step.

    Args:
        components: what the step earned, by name.
        config: factors of the components (1 where none is given), and whether all of them pay (`dense`) or only the
            outcome (`sparse`).
        outcome_components: the names that `sparse` pays.

    Returns:
        The weighted sum; 0.0 where nothing pays.
    """
    paying = (
        components if config.mode == "dense" else {name: components[name] for name in components if name in outcome_components}
    )
    return float(sum(config.weights.get(name, 1.0) * value for name, value in paying.items()))


def totals(
    components: Mapping[str, float], config: RewardConfig, *, outcome_components: Collection[str]
) -> tuple[float, float, float]:
    """The reward of one step as configured, dense, and sparse; arguments as of `compose`."""
    weights = config.weights
    dense = compose(components, RewardConfig(weights=weights), outcome_components=outcome_components)
    sparse = compose(components, RewardConfig(mode="sparse", weights=weights), outcome_components=outcome_components)
    return (dense if config.mode == "dense" else sparse), dense, sparse


def check_weights(config: RewardConfig, component_names: Collection[str], *, env_id: str) -> None:
    """Refuse weights of components that the environment does not have.

    Args:
        config: the reward table of the environment.
        component_names: `TextEnv.component_names`; nothing is checked when empty.
        env_id: for the message.

    Raises:
        ValueError: naming the unknown component and the known ones.
    """
    unknown = sorted(set(config.weights) - set(component_names))
    if component_names and unknown:
        known = ", ".join(sorted(component_names))
        raise ValueError(f"reward.weights of {env_id} names {', '.join(map(repr, unknown))}; its components are {known}")
