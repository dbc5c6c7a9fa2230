"""The ops as Python functions: plain PyTorch, or Triton kernels on a GPU that they support.

No function is differentiable; none depends on autocast; all take non-contiguous and empty inputs. An `index` is
int32 [fan_in, k] and a `weight` float32 [fan_in, k] throughout: (S x)[j] = sum_f weight[f, j] * x[index[f, j]],
without a weight 1. `group` > 1 promises that each row of an index consists of runs start, ..., start + group - 1
with `start` a multiple of `group`; `group` must divide the axis and k. A wrong dtype raises TypeError, a wrong
shape ValueError, an index or id outside its axis IndexError or torch's RuntimeError. Plain bodies gather before
they multiply, and accumulate in float32 (float64 for float64 inputs).
"""

from .conv import compress_conv, compress_conv_int8, conv_output_size, sketch_patches
from .embedding import compress_embedding, compress_embedding_int8
from .flat import compress_flat, compress_flat_int8
from .gram import gram_update
from .linear import compress_linear, compress_linear_int8
from .norm import compress_norm, compress_norm_int8
from .quantize import dequantize_rows, quantize_rows
from .sketch import sketch
from .topk import score_topk

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
