"""Full weights by broadcast into the workers of vLLM: a part of the worker extension. Imports nothing of vLLM."""

from functools import partial
from typing import Any, cast

import torch

from turnwise.inference.inbox import WeightsInbox
from turnwise.inference.vllm_load import load_into_model
from turnwise.transport import BroadcastError

INBOX = "_turnwise_inbox"  # attribute of the worker, made at the first broadcast: vLLM forbids clashes with names of its own


class ReceivesWeights:
    """A worker that takes part in broadcasts."""

    rank: int  # of the worker in its engine

    @torch.no_grad()
    def receive_weights(self, rendezvous: str, folder: str, first_rank: int) -> dict[str, str] | None:
        """Replace the base weights by those that the trainer sends. Nothing may be running.

        Args:
            rendezvous: host:port of the trainer's store.
            folder: of the version, with its manifest.
            first_rank: of this engine's workers among the trainer and the workers of all engines.

        Returns:
            `{"error": why}` where it did not work: an exception would reach the client as a fault of the server.
        """
        inbox = cast(WeightsInbox | None, getattr(self, INBOX, None)) or WeightsInbox()
        setattr(self, INBOX, inbox)
        load: Any = partial(load_into_model, self)
        try:
            inbox.take(rendezvous, folder, first_rank + self.rank, load)
        except (BroadcastError, OSError, ValueError, AssertionError, RuntimeError) as error:  # vLLM's loaders assert shapes
            return {"error": str(error)}
        return None
