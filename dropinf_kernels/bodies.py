"""The body of each op: the Triton launcher on a GPU that it supports, plain PyTorch elsewhere."""

from __future__ import annotations

import functools

from torch import Tensor

from . import reference, reference_conv, reference_score, reference_sparse
from .launch import routed
from .reference_score import quantizing
from .tiling import MAX_TOP

compress_linear = routed(reference.compress_linear, "linear")
sketch = routed(reference.sketch, "gather")
compress_norm = routed(reference.compress_norm, "entries")
compress_flat = routed(reference_sparse.compress_flat, "entries")
compress_conv = routed(reference_conv.compress_conv, "conv")
sketch_patches = routed(reference_conv.sketch_patches, "conv")
compress_embedding = routed(reference_sparse.compress_embedding, "embedding")
gram_update = routed(reference_score.gram_update, "gram")

compress_linear_int8 = routed(quantizing(reference.compress_linear), "linear")
compress_norm_int8 = routed(quantizing(reference.compress_norm), "entries")
compress_flat_int8 = routed(quantizing(reference_sparse.compress_flat), "entries")
compress_conv_int8 = routed(quantizing(reference_conv.compress_conv), "conv")
compress_embedding_int8 = routed(quantizing(reference_sparse.compress_embedding), "embedding")

_streaming_topk = routed(reference_score.score_topk, "topk")
quantize_rows = routed(reference_score.quantize_rows, "quantize")
dequantize_rows = routed(reference_score.dequantize_rows, "quantize")


@functools.wraps(reference_score.score_topk)
def score_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Longer lists than the kernel keeps on chip go to the reference, which streams too."""
    body = reference_score.score_topk if k > MAX_TOP else _streaming_topk
    return body(q, c, k, c_scale, offset)
