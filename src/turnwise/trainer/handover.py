"""Publication of full weights by broadcast: a version is announced with its digest, claimed by the orchestrator, and sent.

The weights are gathered twice, once for the digest and once to be sent: all of a version's announcement is there before engines
pause for it, they pause for the transfer alone, and no rank holds more of the whole model than a bucket.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from turnwise.trainer import fsdp
from turnwise.trainer.publish import PublishError, announce, whole_tensors
from turnwise.trainer.step import Learner
from turnwise.transport import (
    BroadcastError,
    Canary,
    Control,
    Digest,
    Manifest,
    Sender,
    WeightsReady,
    WeightsStore,
    plan_buckets,
    spec_of,
)


class Handover:
    """The trainer's end of a broadcast; every rank has one.

    Args:
        learner: trains all parameters; `config.weight_transfer` is "broadcast".
        store: the run's published versions.
        control: of the run; a request to stop makes a transfer give up early.

    Raises:
        PublishError: engines would not know the names of this model's tensors.
    """

    def __init__(self, learner: Learner, store: WeightsStore, control: Control) -> None:
        config = learner.config
        self.learner, self.store, self.control = learner, store, control
        self.manifest: Manifest | None = None  # of the version that was announced last
        self.sender: Sender | None = None
        if fsdp.rank() == 0:
            check_names(learner.policy.model, learner.parameters)
            self.sender = Sender(backend=config.broadcast_backend, workers=config.engine_workers, hurry=self._stopping)

    def announce(self, version: int, metrics: dict[str, float], *, keep: int, canaries: Sequence[Canary] = ()) -> None:
        """Announce the current policy as `version`, and remove versions that no engine needs any more; a collective.

        Args:
            version: optimiser steps taken.
            metrics: of the step that made it.
            keep: versions up to the served one whose announcements stay.
            canaries: of the step that made it.

        Raises:
            PublishError: the file system refused; no part of the version is visible.
        """
        digest = Digest()
        for name, tensor in whole_tensors(self.learner, self.learner.dtype):
            if self.sender is not None:
                digest.add(name, tensor)
                self.learner.published.see(tensor)
        if self.sender is None:
            return
        specs = [spec_of(name, parameter, self.learner.dtype) for name, parameter in self.learner.parameters.items()]
        self.manifest = Manifest(version, self.sender.backend, self.sender.world_size, plan_buckets(specs))
        ready = WeightsReady(
            version=version,
            kind="full",
            path=str(self.store.path(version)),
            digest=digest.hexdigest(),
            metrics=metrics | self.learner.published.metrics(),
            transfer="broadcast",
            rendezvous=self.sender.rendezvous,
            canaries=list(canaries),
        )
        announce(self.store, ready, self.manifest.write)
        self.store.prune(keep)

    def send(self) -> bool:
        """Send the announced version to the engines, which must have claimed it; a collective.

        Returns:
            False when it did not get through and the run was asked to stop, so that nobody needs it.

        Raises:
            PublishError: it did not get through, on every rank.
        """
        tensors = whole_tensors(self.learner, self.learner.dtype)
        failure = ""
        if self.sender is not None and self.manifest is not None:
            try:
                self.sender.send(self.manifest, tensors)
            except BroadcastError as error:
                failure = "stopped" if self._stopping() else str(error)
        for _ in tensors:  # gathering is a collective: all ranks go through to the end, also after a failure on rank 0
            pass
        failure = fsdp.broadcast(failure)
        if failure and failure != "stopped":
            raise PublishError(f"the engines did not get the weights: {failure}. Go on with `rl --resume`")
        return not failure

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()

    def _stopping(self) -> bool:
        return self.control.stop_request() is not None


def check_names(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> None:
    """Engines know the names under which transformers saves a model.

    Raises:
        PublishError: it saves this one under other names than it has in memory.
    """
    from transformers.core_model_loading import revert_weight_conversion

    hollow: dict[str, Tensor] = {name: torch.empty(tensor.shape, device="meta") for name, tensor in parameters.items()}
    saved = set(revert_weight_conversion(model, hollow))
    if saved != set(parameters):
        example = sorted(saved ^ set(parameters))[0]
        raise PublishError(f"this model is saved under other tensor names than it has in memory ({example}); train it with LoRA")
