"""The body of each op: the Triton launcher on a GPU that it supports, plain PyTorch elsewhere."""

from __future__ import annotations

from . import reference, reference_conv, reference_score, reference_sparse
from .launch import routed

compress_linear = routed(reference.compress_linear, "linear")
compress_linear_int8 = routed(reference_score.compress_linear_int8, "linear")
sketch = routed(reference.sketch, "gather")
compress_norm = routed(reference.compress_norm, "entries")
compress_flat = routed(reference_sparse.compress_flat, "entries")
compress_conv = routed(reference_conv.compress_conv, "conv")
sketch_patches = routed(reference_conv.sketch_patches, "conv")
compress_embedding = routed(reference_sparse.compress_embedding, "embedding")
gram_update = routed(reference_score.gram_update, "gram")
score_topk = routed(reference_score.score_topk, "topk")
quantize_rows = routed(reference_score.quantize_rows, "quantize")
dequantize_rows = routed(reference_score.dequantize_rows, "quantize")
