"""All checks in their order, cheapest first."""

from collections.abc import Collection, Sequence

from turnwise.config import ConfigError
from turnwise.diagnose.core import Check
from turnwise.diagnose.engine_checks import MEMORY, SPEED
from turnwise.diagnose.overfit import OVERFIT
from turnwise.diagnose.served import SERVED
from turnwise.diagnose.text_checks.advantages import ADVANTAGES
from turnwise.diagnose.text_checks.environment import ENVIRONMENT
from turnwise.diagnose.text_checks.mask import MASK
from turnwise.diagnose.text_checks.plan import PLAN
from turnwise.diagnose.text_checks.reward import REWARD
from turnwise.diagnose.text_checks.rollouts import ROLLOUTS
from turnwise.diagnose.text_checks.template import TEMPLATE
from turnwise.diagnose.trainer_checks import TRAINER_CHECKS
from turnwise.envs.suggest import did_you_mean

ENGINE_CHECKS = (SERVED, OVERFIT, MEMORY, SPEED)
TEXT_CHECKS = (PLAN, TEMPLATE, ENVIRONMENT, ROLLOUTS, REWARD, ADVANTAGES, MASK)
CHECKS: tuple[Check, ...] = (*TEXT_CHECKS, *TRAINER_CHECKS, *ENGINE_CHECKS)


def chosen(names: Collection[str], checks: Sequence[Check] = CHECKS) -> list[Check]:
    """These checks and all that they need, in order; every check for no names.

    Raises:
        ConfigError: there is no check of that name.
    """
    known = {check.name: check for check in checks}
    for name in names:
        if name not in known:
            raise ConfigError(f"--only: there is no check {name!r}.{did_you_mean(name, known)} Checks: {', '.join(known)}.")
    wanted = set(names or known)
    for check in reversed(checks):
        if check.name in wanted:
            wanted.update(check.needs)
    return [check for check in checks if check.name in wanted]
