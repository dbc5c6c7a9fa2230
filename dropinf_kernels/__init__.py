"""Torch ops that compress per-sample gradients; importing the package registers `torch.ops.dropinf.*`."""

from .op import import_launchers_with
from .ops import (
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
    conv_output_size,
    dequantize_rows,
    gram_update,
    quantize_rows,
    score_topk,
    sketch,
    sketch_patches,
)

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


def _import_launchers() -> None:
    """Import the kernels, and with them triton, which takes long: at the first launch, not before."""
    from . import gpu  # noqa: F401


import_launchers_with(_import_launchers)
