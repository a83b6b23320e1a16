"""MXFP4 weights: quantise, dequantise, multiply; layers for frozen weights and for fake quantisation. See docs/mxfp4.md."""

from turnwise.kernels.mxfp4.errors import ErrorReport, error_report
from turnwise.kernels.mxfp4.fake import fake_quantize, fake_quantize_linear
from turnwise.kernels.mxfp4.format import BLOCK, SCALE_MODES, ScaleMode
from turnwise.kernels.mxfp4.layer import MXFP4Linear, decoded_once
from turnwise.kernels.mxfp4.ops import dequantize, mxfp4_product, mxfp4_product_dx, quantize, quantize_unchecked

__all__ = [
    "BLOCK",
    "SCALE_MODES",
    "ErrorReport",
    "MXFP4Linear",
    "ScaleMode",
    "decoded_once",
    "dequantize",
    "error_report",
    "fake_quantize",
    "fake_quantize_linear",
    "mxfp4_product",
    "mxfp4_product_dx",
    "quantize",
    "quantize_unchecked",
]
