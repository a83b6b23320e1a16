"""Which code computes what: Triton on CUDA devices, look-up and oneDNN on CPUs, plain torch elsewhere.

Triton is imported at the first use on a CUDA device and nowhere else: a CPU needs none.
"""

import functools
import importlib.util

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from turnwise.kernels import onednn
from turnwise.kernels.mxfp4 import decode_cpu, plan, reference
from turnwise.kernels.mxfp4.format import ScaleMode

OLDEST_CAPABILITY = (8, 0)  # bfloat16 arithmetic on pairs


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor."""
    return tensor.is_cuda and _triton_runs_on(tensor.device)


def quantize(weight: Float[Tensor, "n k"], scale_mode: ScaleMode) -> tuple[UInt8[Tensor, "n half_k"], UInt8[Tensor, "n blocks"]]:
    """`reference.quantize`, bit by bit."""
    if uses_triton(weight):
        from turnwise.kernels.mxfp4 import triton_quantize

        wide = weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        with torch.cuda.device(weight.device):
            return triton_quantize.quantize((weight if wide else weight.float()).contiguous(), scale_mode)
    return reference.quantize(weight, scale_mode=scale_mode)


def dequantize(packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"], dtype: torch.dtype) -> Float[Tensor, "n k"]:
    """`reference.dequantize`, bit by bit, in memory of its own."""
    if uses_triton(packed):
        from turnwise.kernels.mxfp4 import triton_dequantize

        with torch.cuda.device(packed.device):
            return triton_dequantize.dequantize(aligned(packed), scales.contiguous()).to(dtype)
    if packed.device.type == "cpu" and decode_cpu.supported(dtype):
        out = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=dtype)
        return decode_cpu.dequantize_into(out, packed, scales)
    return reference.dequantize(packed, scales, dtype)


def product(
    x: Float[Tensor, "m k"],
    packed: UInt8[Tensor, "n half_k"],
    scales: UInt8[Tensor, "n blocks"],
    *,
    out: Float[Tensor, "m n"] | None = None,
    add: bool = False,
    small_scales: bool = False,
) -> Float[Tensor, "m n"]:
    """x W^T, new or in `out`: written there, or added."""
    if uses_triton(x) and 0 < len(x) <= plan.crossover(packed.shape[0], x.shape[1]):
        from turnwise.kernels.mxfp4 import triton_product

        x, packed, scales = x.contiguous(), packed.contiguous(), scales.contiguous()
        if triton_product.fits(x, packed, scales):
            out = x.new_empty(len(x), len(packed)) if out is None else out
            cut = plan.launch(len(x), len(packed), x.shape[1], multiprocessors=_multiprocessors(x.device))
            with torch.cuda.device(x.device):
                triton_product.product(x, packed, scales, out, cut, add=add, small_scales=small_scales)
            return out
    return _multiply(x, _decoded(packed, scales, x.dtype).T, out, add)


def product_dx(
    grad: Float[Tensor, "m n"],
    packed: UInt8[Tensor, "n half_k"],
    scales: UInt8[Tensor, "n blocks"],
    *,
    out: Float[Tensor, "m k"] | None = None,
    add: bool = False,
) -> Float[Tensor, "m k"]:
    """grad W, new or in `out`: written there, or added."""
    return _multiply(grad, _decoded(packed, scales, grad.dtype), out, add)


def _multiply(
    a: Float[Tensor, "m inner"], b: Float[Tensor, "inner n"], out: Float[Tensor, "m n"] | None, add: bool
) -> Float[Tensor, "m n"]:
    if out is None:
        return onednn.product(a, b.T)
    if a.device.type == "cpu" and a.dtype == torch.float32:
        result = onednn.product(a, b.T)
        return out.add_(result) if add else out.copy_(result)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def aligned(packed: UInt8[Tensor, "n half_k"]) -> UInt8[Tensor, "n half_k"]:
    """The same codes, contiguous and where 16-byte loads may read them: a slice of a file need not begin at such an address."""
    packed = packed.contiguous()
    return packed if packed.data_ptr() % 16 == 0 else packed.clone()


def _decoded(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A decoded weight for one product.

    On a CUDA device its memory comes from torch's allocator and goes back to it after the product: the next layer gets the same
    block, in the order of the stream, in CUDA graphs too, and other threads get other blocks. A workspace of our own could not
    promise that.

    """
    if packed.device.type == "cpu" and decode_cpu.supported(dtype):
        room = decode_cpu.workspace(packed.shape[0], packed.shape[1] * 2, dtype)
        return decode_cpu.dequantize_into(room, packed, scales)
    return dequantize(packed, scales, dtype)
