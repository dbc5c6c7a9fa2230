"""Torch ops that compress per-sample gradients; importing the package registers `torch.ops.dropinf.*`."""

from .functional import (
    compress_conv,
    compress_conv_int8,
    compress_embedding,
    compress_embedding_int8,
    compress_flat,
    compress_flat_int8,
    compress_linear,
    compress_linear_int8,
    compress_norm,
    compress_norm_int8,
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
    "compress_conv_int8",
    "compress_embedding",
    "compress_embedding_int8",
    "compress_flat",
    "compress_flat_int8",
    "compress_linear",
    "compress_linear_int8",
    "compress_norm",
    "compress_norm_int8",
    "conv_output_size",
    "dequantize_rows",
    "gram_update",
    "quantize_rows",
    "score_topk",
    "sketch",
    "sketch_patches",
]
