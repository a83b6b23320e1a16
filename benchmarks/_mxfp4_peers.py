"""Other implementations of a product with 4-bit weights, as far as they can be imported.

They are not all the same function: int4 and NF4 have other values and scales, and gemlite and humming-kernels lay MXFP4 out anew.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnwise.kernels.mxfp4 import quantize, reference

Product = Callable[[Tensor], Tensor]
Maker = Callable[[Tensor], Product]  # of a bfloat16 weight [N, K]; the product takes tokens [M, K]

BYTES_4BIT = 0.53125


def eager_decode(weight: Tensor) -> Product:
    packed, scales = quantize(weight)
    return lambda x: F.linear(x, reference.dequantize(packed, scales, x.dtype))


def compiled_decode(weight: Tensor) -> Product:
    packed, scales = quantize(weight)
    decode = torch.compile(reference.dequantize, dynamic=False)
    return lambda x: F.linear(x, decode(packed, scales, x.dtype))


def torchao_int4(weight: Tensor) -> Product:
    """int4 with groups of 32 through torch's own kernel for few tokens."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    linear = _linear(weight)
    quantize_(linear, Int4WeightOnlyConfig(group_size=32, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D))
    return linear


def torchao_mx(weight: Tensor) -> Product:
    """torchao's MXFP4 tensor, decoded for each product."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    quantised = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    return lambda x: F.linear(x, quantised.dequantize(torch.bfloat16))


def gemlite(weight: Tensor) -> Product:
    from gemlite.helper import A16W4_MXFP

    layer = A16W4_MXFP(device=str(weight.device), dtype=torch.bfloat16).from_linear(_linear(weight), del_orig=False)
    return layer


def humming(weight: Tensor) -> Product:
    from humming.layer import HummingLayer

    n, k = weight.shape
    packed, scales = quantize(weight)
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config={"quant_method": "mxfp4"}, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_tensors({"weight": packed, "weight_scale": scales})
    layer.transform()
    return layer


def bitsandbytes_nf4(weight: Tensor) -> Product:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


PEERS: dict[str, Maker] = {
    "eager decode": eager_decode,
    "compiled decode": compiled_decode,
    "torchao MX": torchao_mx,
    "torchao int4": torchao_int4,
    "humming": humming,
    "bnb NF4": bitsandbytes_nf4,
    "gemlite": gemlite,  # last: it tries many configurations at each new number of tokens
}
