"""The engines of a configuration alone, for commands that sample without training. Nothing of them outlives their block."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from turnwise.config import ConfigError, RLConfig
from turnwise.launch.child import Child
from turnwise.launch.gpus import Machine
from turnwise.launch.plan import engines, shared_environment
from turnwise.launch.survivors import end_all
from turnwise.launch.warden import Warden
from turnwise.transport import RunDir

if TYPE_CHECKING:
    from turnwise.inference.client import InferenceClient

GRACE_S = 10.0
POLL_S = 0.25


class Engines:
    """A context manager: starts the engines of a resolved configuration, and ends everything that carries its run id.

    What ends this process, `kill -9` included, ends the engines too.
    """

    def __init__(self, config: RLConfig, machine: Machine, *, run_id: str) -> None:
        self.config, self._machine, self._run_id = config, machine, run_id
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        specs = engines(self.config, shared_environment(self._run_id), self._machine)
        self._warden = Warden(self._run_id, RunDir(self.config.output_dir).logs / "warden.stdout", grace_s=GRACE_S)
        try:
            for spec in specs:
                self.children.append(Child(spec))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def urls(self) -> Sequence[str]:
        """Base URLs of the replicas."""
        return [str(child.spec.health_url).removesuffix("/health") for child in self.children]

    def client(self) -> "InferenceClient":
        """A client of all replicas, not yet open."""
        return client_of(self.config, self.urls)

    async def serving(self) -> None:
        """Wait until every engine serves.

        Raises:
            ConfigError: one ended, or took too long; with the last lines of its log.
        """
        timeout_s = self.config.inference.startup_timeout_s
        for _ in range(max(1, int(timeout_s / POLL_S))):
            for child in self.children:
                if child.exit_code() is not None:
                    cause = child.likely_cause()
                    told = [f"Likely cause: {cause}"] if cause else []
                    raise ConfigError(
                        "\n".join([f"{child.name} {child.ending()}. Its last lines:", *child.last_lines(20), *told])
                    )
            if all([await asyncio.to_thread(child.check_health) for child in self.children]):
                return
            await asyncio.sleep(POLL_S)
        raise ConfigError(f"the engine did not serve within {timeout_s:.0f} s; raise inference.startup_timeout_s")

    def _end(self) -> None:
        try:
            end_all(self._run_id, GRACE_S)
            for child in self.children:
                child.reap()
        finally:
            self._warden.dismiss()


def client_of(config: RLConfig, urls: Sequence[str]) -> "InferenceClient":
    """A client of engines that serve the model of a resolved configuration, not yet open."""
    from turnwise.inference.client import InferenceClient

    inference = config.inference
    return InferenceClient(
        urls, model=config.model.name, request_timeout_s=inference.request_timeout_s, max_retries=inference.max_retries
    )
