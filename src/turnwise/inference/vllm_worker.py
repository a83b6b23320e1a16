"""What `--worker-extension-cls turnwise.inference.vllm_worker.WorkerExtension` adds to vLLM's workers.

Imported by the workers of vLLM 0.26 to 0.32, in vLLM's environment: it and what it imports need nothing that is not there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# vLLM is not in the environment that the types are checked in
from vllm.distributed import get_pp_group, get_tp_group  # pyright: ignore[reportMissingImports]
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager  # pyright: ignore[reportMissingImports]
from vllm.model_executor.utils import get_packed_modules_mapping  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]

from turnwise.inference.vllm_adapters import activate, remember_requests, resident_adapter
from turnwise.inference.vllm_base import resident_weights
from turnwise.inference.vllm_broadcast import ReceivesWeights
from turnwise.inference.vllm_layers import CannotRead, Group
from turnwise.inference.vllm_load import repack_outputs_after_reload
from turnwise.inference.vllm_noise import AddsNoise, make_norms_float32_at_load
from turnwise.transport.digest import Digest


class WorkerExtension(ReceivesWeights, AddsNoise):
    """Methods that `/collective_rpc` calls on every worker.

    vLLM adds this class to the bases of its own, so that `self` is a worker; no name may be that of an attribute of vLLM's.
    """

    model_runner: Any
    device: torch.device

    @torch.inference_mode()
    def weights_digest(self, name: str | None = None) -> str | dict[str, str]:
        """`tensor_digest` of the tensors that requests compute with: of the adapter `name` in its slot, or of the base weights.

        An adapter that is loaded but in no slot is brought into one, as a request for it would. With tensor parallelism every
        worker answers with the digest of whole tensors.

        Returns:
            The digest; or `{"error": why}` where there is none: an exception would reach the client as a fault of the server.
        """
        try:
            digest = Digest()
            for tensor_name, tensor in _base(self.model_runner) if name is None else _adapter(self.model_runner, name):
                digest.add(tensor_name, tensor)
            return digest.hexdigest()
        except CannotRead as error:
            return {"error": str(error)}


def _adapter(runner: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(runner, "lora_manager"):
        raise CannotRead(f"no adapter {name} was loaded into this engine: it serves none (--enable-lora)")
    request = activate(runner.lora_manager, name)
    return resident_adapter(runner.get_model().lora_manager, request.lora_int_id, _group())


def _base(runner: Any) -> Iterator[tuple[str, Tensor]]:
    model = runner.get_model()
    return resident_weights(model, get_packed_modules_mapping(model), _group())


def _group() -> Group:
    if get_pp_group().world_size > 1:
        raise CannotRead("tensors cannot be read back under pipeline parallelism; leave it out of [inference.vllm]")
    return get_tp_group()


remember_requests(LRUCacheWorkerLoRAManager)
make_norms_float32_at_load(Worker)  # of GPUs, from which that of CPUs derives
if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # pyright: ignore[reportMissingImports]

    repack_outputs_after_reload(CPUModelRunner)
