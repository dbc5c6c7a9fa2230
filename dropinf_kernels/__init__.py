"""Torch ops that compress per-sample gradients; importing the package registers `torch.ops.dropinf.*`."""

from .op import import_launchers_with
from .ops.bits import dequantize_bits, quantize_bits, score_topk_bits
from .ops.conv import compress_conv, compress_conv_int8, conv_output_size, sketch_patches
from .ops.embedding import compress_embedding, compress_embedding_int8
from .ops.flat import compress_flat, compress_flat_int8
from .ops.gram import gram_update
from .ops.linear import compress_linear, compress_linear_int8, compress_linear_into
from .ops.norm import compress_norm, compress_norm_int8
from .ops.quantize import dequantize_rows, quantize_rows
from .ops.sketch import sketch
from .ops.topk import score_topk

__all__ = [
    "compress_conv",
    "compress_conv_int8",
    "compress_embedding",
    "compress_embedding_int8",
    "compress_flat",
    "compress_flat_int8",
    "compress_linear",
    "compress_linear_int8",
    "compress_linear_into",
    "compress_norm",
    "compress_norm_int8",
    "conv_output_size",
    "dequantize_bits",
    "dequantize_rows",
    "gram_update",
    "quantize_bits",
    "quantize_rows",
    "score_topk",
    "score_topk_bits",
    "sketch",
    "sketch_patches",
]


def _import_launchers() -> None:
    """Import the kernels, and with them triton, which takes long: at the first launch, not before."""
    from . import gpu  # noqa: F401


import_launchers_with(_import_launchers)
