"""Torch ops that compress per-sample gradients; importing the package registers `torch.ops.dropinf.*`."""

from .functional import (
    compress_conv,
    compress_embedding,
    compress_flat,
    compress_linear,
    compress_linear_int8,
    compress_norm,
    dequantize_rows,
    gram_update,
    quantize_rows,
    score_topk,
    sketch,
    sketch_patches,
)
from .reference_conv import conv_output_size

__all__ = [
    "compress_conv",
    "compress_embedding",
    "compress_flat",
    "compress_linear",
    "compress_linear_int8",
    "compress_norm",
    "conv_output_size",
    "dequantize_rows",
    "gram_update",
    "quantize_rows",
    "score_topk",
    "sketch",
    "sketch_patches",
]
