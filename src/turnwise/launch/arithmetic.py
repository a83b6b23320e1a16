"""The training arithmetic: tasks, rollouts, steps and epochs, and how one follows from the other."""

from collections.abc import Callable
from dataclasses import dataclass
from math import floor

from turnwise.config import ConfigError, EnvConfig, RLConfig

CountTasks = Callable[[EnvConfig], int]


@dataclass(frozen=True)
class Arithmetic:
    """What a configuration makes of its training set."""

    examples: int  # training tasks over all environments
    batch_size: int  # rollouts per optimiser step
    group: int  # rollouts of one task
    max_steps: int

    @property
    def examples_per_step(self) -> int:
        return self.batch_size // self.group

    @property
    def steps_per_epoch(self) -> int:
        return floor(self.examples * self.group / self.batch_size)

    @property
    def epochs(self) -> float:
        """Passes over the training set, counted in rollouts: also defined where one step is more than an epoch."""
        return self.max_steps * self.batch_size / (self.examples * self.group)


def count_tasks(env: EnvConfig) -> int:
    """Training tasks of an environment.

    Raises:
        ConfigError: the environment cannot be made with these arguments, has no tasks, or lacks a component that is weighed.
    """
    from turnwise.envs import make
    from turnwise.envs.rewards import check_weights

    try:
        made = make(env.id, env.args)
        check_weights(env.reward, made.component_names, env_id=env.id)
        count = len(made.tasks("train"))
    except Exception as error:  # a user's environment may raise anything: it is named, and the run does not start
        raise ConfigError(f'orchestrator.env id = "{env.id}" cannot be used: {type(error).__name__}: {error}') from error
    if count == 0:
        raise ConfigError(f'orchestrator.env id = "{env.id}" has no training tasks with args = {env.args}; correct its args.')
    return count


def training_arithmetic(config: RLConfig, count: CountTasks = count_tasks) -> Arithmetic:
    """Count the training set and fix `max_steps`, from `epochs` where those are given.

    Raises:
        ConfigError: an environment cannot be made, `orchestrator.buffer.tasks` names a task that none has, or the epochs come to
            less than one step.
    """
    named = config.orchestrator.buffer.tasks
    examples = _count_named(config) if named else sum(count(env) for env in config.orchestrator.env)
    batch, group = config.orchestrator.batch_size, config.orchestrator.rollouts_per_example
    if config.max_steps is not None:
        return Arithmetic(examples, batch, group, config.max_steps)
    if config.epochs is None:
        raise ConfigError("max_steps is not set; set max_steps, or epochs instead.")
    whole = floor(config.epochs * floor(examples * group / batch))
    if whole < 1:
        raise ConfigError(
            f"epochs = {config.epochs:g} come to no whole step: {examples} training tasks x {group} rollouts = "
            f"{examples * group} rollouts an epoch, and orchestrator.batch_size = {batch}; use a smaller batch, or set max_steps."
        )
    return Arithmetic(examples, batch, group, whole)


def _count_named(config: RLConfig) -> int:
    """Training tasks when `orchestrator.buffer.tasks` names those that there are to be."""
    from turnwise.orchestrator.buffer import only_tasks
    from turnwise.orchestrator.environments import load_setups

    try:
        setups = only_tasks(load_setups(config.orchestrator.env, "train"), config.orchestrator.buffer.tasks)
    except Exception as error:  # a user's environment may raise anything
        raise ConfigError(str(error)) from error
    return sum(len(env.tasks) for env in setups)
