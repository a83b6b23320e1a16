"""Instances of an environment between two episodes."""

from collections.abc import Mapping
from typing import Any

from turnwise.envs.base import TextEnv
from turnwise.envs.registry import make


class SpareEnvs(list[TextEnv]):
    """Instances of one environment that nobody plays. Threads may take and keep at the same time."""

    def take(self, env_id: str, args: Mapping[str, Any]) -> TextEnv:
        """One of them, or a new one."""
        try:
            return self.pop()
        except IndexError:
            return make(env_id, args)

    def keep(self, env: TextEnv) -> bool:
        """Keep an instance for later episodes; False when it holds resources (it defines `close`) and must be closed."""
        if type(env).close is not TextEnv.close:
            return False
        self.append(env)
        return True
