"""What checks look at: made when first asked for, once, by the code that a run uses."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from turnwise.config import ConfigError, RLConfig
from turnwise.diagnose.core import CheckFailed
from turnwise.launch.models import Progress

if TYPE_CHECKING:
    from turnwise.containers import Pools
    from turnwise.diagnose.footprint import Footprint
    from turnwise.diagnose.probe_report import ProbeReport
    from turnwise.diagnose.served import Swapped
    from turnwise.diagnose.session import OpenEngines, Session
    from turnwise.launch.dry_run import Foreseen
    from turnwise.launch.gpus import Machine
    from turnwise.orchestrator.chat import Chat
    from turnwise.orchestrator.environments import EnvSetup
    from turnwise.orchestrator.filters import JudgedGroup
    from turnwise.orchestrator.tokenizer import ModelText
    from turnwise.transport import Batch

Made = TypeVar("Made")


class artefact(Generic[Made]):
    """A property that is made when first asked for. A failure to make it is remembered too: the same CheckFailed each time,
    whatever was raised.

    An assignment replaces it, which is how tests plant one.
    """

    def __init__(self, make: "Callable[[Any], Made]") -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Made: ...
    def __get__(self, instance: object | None, owner: type) -> "Self | Made":
        if instance is None:
            return self
        failures: dict[str, CheckFailed] = instance.__dict__.setdefault("_failures", {})
        if self._name in failures:
            raise failures[self._name]
        try:
            made = self._make(instance)
        except CheckFailed as failure:
            failures[self._name] = failure
            raise
        except Exception as error:  # users' environments, templates and libraries may raise anything
            told = isinstance(error, ConfigError)  # its message is complete
            failures[self._name] = CheckFailed(str(error)) if told else CheckFailed.because(error)
            raise failures[self._name] from error
        instance.__dict__[self._name] = made  # found before this descriptor from now on
        return made


class Context:
    """The user's configuration and everything derived from it. Close it, or use it as a context manager.

    Args:
        config: as the user wrote it, checked, not resolved.
        scratch: a folder for whatever is written; nothing of the user's run is touched.
        say: told what takes long.
        rollouts: how many to play; chosen from the batch size when None.
    """

    def __init__(self, config: RLConfig, scratch: Path, say: Progress, *, rollouts: int | None = None) -> None:
        self.given = config
        self.scratch = scratch
        self.say = say
        self.rollouts = rollouts
        self.run_id = uuid.uuid4().hex
        """Every process that is started for the checks carries it in its environment (`launch.plan.shared_environment`)."""
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @artefact
    def machine(self) -> "Machine":
        """This machine's GPUs."""
        from turnwise.launch.gpus import look

        return look()

    @artefact
    def foreseen(self) -> "Foreseen":
        """What a dry run tells. Raises CheckFailed where it would refuse."""
        from turnwise.launch.dry_run import foresee

        return foresee(self.given, machine=self.machine)

    @artefact
    def config(self) -> RLConfig:
        """Resolved, with `output_dir` in the scratch folder and written there as config.toml. Raises CheckFailed."""
        from turnwise.launch.models import resolve_model
        from turnwise.launch.quantized import quantized_model
        from turnwise.launch.resolve import changed, with_defaults, write_resolved

        given, foreseen = self.given, self.foreseen
        model = resolve_model(given.model.name, self.say, weights=given.model.load_format != "dummy")
        quantized = quantized_model(given, model, self.say)
        # the port of the configuration may be that of the user's run, which may be going on
        here = changed(given, {"output_dir": self.scratch, "trajectories_dir": None, "inference": {"port": None}})
        filled = with_defaults(here, max_steps=foreseen.config.max_steps or 1, model=model, quantized=quantized)
        if given.gpus.share:
            filled = changed(filled, {"gpus": {"inference_memory": foreseen.config.gpus.inference_memory}})
        write_resolved(filled, filled.output_dir / "config.toml")
        return filled

    @artefact
    def containers(self) -> "Pools | None":
        """Pools for environments that work in containers; None where none does. Raises CheckFailed where nothing runs any."""
        from turnwise.diagnose.container_hosts import check_hosts, wants_containers
        from turnwise.envs.containers import containers_of

        if not wants_containers(self.given):
            return None
        check_hosts(self.given)
        return self._opened.enter_context(containers_of(self.given, self.say))

    @artefact
    def setups(self) -> "list[EnvSetup]":
        """The training environments; made from the configuration as given, so that they can be judged without a model.

        Raises CheckFailed.
        """
        from turnwise.orchestrator.buffer import only_tasks
        from turnwise.orchestrator.environments import load_setups

        given, containers = self.given.orchestrator, self.containers
        try:
            found = load_setups(given.env, "train", containers=containers, wait_s=self.given.containers.wait_s)
            return only_tasks(found, given.buffer.tasks)
        except Exception as error:  # a user's environment may raise anything
            raise CheckFailed(
                f"{type(error).__name__}: {error}", "correct the [[orchestrator.env]] table, or its class"
            ) from error

    def setups_if_any(self) -> "list[EnvSetup]":
        """Those, or none where they cannot be made: for checks before the one that says so."""
        try:
            return self.setups
        except CheckFailed:
            return []

    @artefact
    def text(self) -> "ModelText":
        """The model's tokenizer and template, read beside `chat`, to judge it by. Raises CheckFailed."""
        from turnwise.orchestrator.tokenizer import load_model_text

        model = self.config.model
        return self._of_model(partial(load_model_text, model.name, chat_template=model.chat_template))

    @artefact
    def chat(self) -> "Chat":
        """The model's chat. Raises CheckFailed."""
        from turnwise.orchestrator.chat import load_chat

        model = self.config.model
        return self._of_model(partial(load_chat, model.name, chat_template=model.chat_template, tool_format=model.tool_format))

    @artefact
    def session(self) -> "Session":
        """Running engines, with a client and an event loop. Raises CheckFailed."""
        from turnwise.diagnose.session import Session

        self.say("starting the engine")
        return Session(self.config, self.open_engines(), stop_ids=self.chat.stop_ids)

    def open_engines(self) -> "OpenEngines":
        """What `session` samples from; tests put an engine without processes here."""
        from turnwise.diagnose.session import real_engines

        return real_engines(self.config, self.machine, self.run_id)

    @artefact
    def groups(self) -> "Sequence[JudgedGroup]":
        """Rollouts of the untrained policy, judged as in a run. Raises CheckFailed."""
        from turnwise.diagnose.collect import play_groups

        return play_groups(self.config, self.setups, self.chat, self.session, self.rollouts, self.say)

    @artefact
    def batch(self) -> "Batch":
        """What the trainer gets of those groups. Raises CheckFailed when none carries signal."""
        from turnwise.diagnose.collect import build_batch

        return build_batch(self.config, self.groups)

    @artefact
    def probe(self) -> "ProbeReport":
        """What the trainer's processes measured on that batch. Raises CheckFailed."""
        from turnwise.diagnose.probe_run import run_probe

        return run_probe(self.config, self.batch, machine=self.machine, run_id=self.run_id, say=self.say)

    @artefact
    def swapped(self) -> "Swapped":
        """What was seen while the engines took over the probe's version 1. Raises CheckFailed."""
        from turnwise.diagnose.served import swap_in

        probe, sample = self.probe, self.batch.samples[0]
        if probe.published is None:
            raise CheckFailed(probe.failure or "the trainer's processes published nothing", f"read the log, {probe.log}")
        self.say("the engine takes over the update")
        return swap_in(self.session, probe.published, sample.token_ids[: sample.loss_mask.index(True)])

    @artefact
    def footprint(self) -> "Footprint":
        """What the engines take while they run. Raises CheckFailed."""
        from turnwise.diagnose.footprint import footprint
        from turnwise.launch.gpus import look

        urls = [replica.url for replica in self.session.client.replicas.all]
        measured = asyncio.to_thread(footprint, self.run_id, urls, look(), self.config.gpus.inference)
        return self.session.run(measured)  # on its loop: an engine without a process of its own answers there alone

    def end_session(self) -> None:
        """End the engines, for a check that needs their place; who asks for `session` afterwards starts others."""
        if session := self.__dict__.pop("session", None):
            session.close()

    def close(self) -> None:
        """End what was started, whoever started it."""
        from turnwise.launch.engines import GRACE_S
        from turnwise.launch.survivors import end_all

        try:
            with self._opened:
                self.end_session()
        finally:
            end_all(self.run_id, GRACE_S)

    def _of_model(self, read: "Callable[[], Made]") -> Made:
        name = self.given.model.name
        try:
            return read()
        except (OSError, ValueError) as error:  # of the hub as well: it is offline, or has no such model
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            remedy = "fetch it where there is a network (`hf download`), set model.name to its folder, or correct the name"
            raise CheckFailed(f"tokenizer or chat template of {name} cannot be used: {first}", remedy) from error
