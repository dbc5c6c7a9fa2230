"""The body of each op: the Triton launcher on a GPU that it supports, plain PyTorch elsewhere."""

from __future__ import annotations

from . import reference, reference_conv, reference_score, reference_sparse
from .launch import routed

compress_linear = routed(reference.compress_linear, "linear")
compress_linear_int8 = routed(reference_score.compress_linear_int8, "linear")
sketch = reference.sketch
compress_norm = reference.compress_norm
compress_conv = reference_conv.compress_conv
sketch_patches = reference_conv.sketch_patches
compress_embedding = reference_sparse.compress_embedding
compress_flat = reference_sparse.compress_flat
gram_update = reference_score.gram_update
score_topk = reference_score.score_topk
quantize_rows = reference_score.quantize_rows
dequantize_rows = reference_score.dequantize_rows
