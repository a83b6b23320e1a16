"""Wire types of samples and weights, and the files they travel in."""

from turnwise.transport.batches import BatchLog
from turnwise.transport.control import Control, StopRequest
from turnwise.transport.files import atomic_dir, wait_for, write_atomic
from turnwise.transport.messages import NOT_SAMPLED, Batch, Progress, Sample, Served, WeightsReady
from turnwise.transport.run_dir import RunDir
from turnwise.transport.weights import WeightsStore, adapter_name, tensor_digest

__all__ = [
    "NOT_SAMPLED",
    "Batch",
    "BatchLog",
    "Control",
    "Progress",
    "RunDir",
    "Sample",
    "Served",
    "StopRequest",
    "WeightsReady",
    "WeightsStore",
    "adapter_name",
    "atomic_dir",
    "tensor_digest",
    "wait_for",
    "write_atomic",
]
