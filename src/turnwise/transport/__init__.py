"""Wire types of samples and weights, and the files they travel in."""

from turnwise.transport.batches import BatchLog
from turnwise.transport.broadcast import Receiver, Sender, spec_of
from turnwise.transport.control import Control, StopRequest
from turnwise.transport.digest import Digest, served_adapter, tensor_digest
from turnwise.transport.files import atomic_dir, wait_for, write_atomic
from turnwise.transport.manifest import Manifest, plan_buckets
from turnwise.transport.messages import NOT_SAMPLED, Batch, Canary, Progress, Sample, Served, WeightsReady
from turnwise.transport.peer_group import BroadcastError
from turnwise.transport.run_dir import RunDir
from turnwise.transport.weights import WeightsStore, adapter_name

__all__ = [
    "NOT_SAMPLED",
    "Batch",
    "BatchLog",
    "BroadcastError",
    "Canary",
    "Control",
    "Digest",
    "Manifest",
    "Progress",
    "Receiver",
    "RunDir",
    "Sample",
    "Sender",
    "Served",
    "StopRequest",
    "WeightsReady",
    "WeightsStore",
    "adapter_name",
    "atomic_dir",
    "plan_buckets",
    "served_adapter",
    "spec_of",
    "tensor_digest",
    "wait_for",
    "write_atomic",
]
