"""Sketches of the last axis."""

from __future__ import annotations

from torch import Tensor

from ..op import op
from .checks import check_float, check_table
from .plain import accumulator, cast, sketch_columns


def check_sketch(x: Tensor, index: Tensor, weight: Tensor | None, group: int) -> None:
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x has no dimension; it must be [..., d]")
    check_table("", index, weight, x.shape[-1], group)


@op(lambda c: c.x.new_empty(*c.x.shape[:-1], c.index.shape[1]))
def sketch(x: Tensor, index: Tensor, weight: Tensor | None = None, group: int = 1) -> Tensor:
    """Sketch the last axis: `out[..., j] = sum_f weight[f, j] * x[..., index[f, j]]`.

    x [..., d] float -> [..., k] in x's dtype, accumulated in float32 (float64 for float64).
    Raises TypeError, ValueError for a bad table, RuntimeError or IndexError for an index outside [0, d).
    Source: dropout compression, Zhang & Amiri, arXiv 2509.15651; fan_in > 1 with signs is a
    sparse Johnson-Lindenstrauss transform of the survivors (GraSS, arXiv 2505.18976).
    """
    check_sketch(x, index, weight, group)
    return cast(sketch_columns(x, index, weight, group, accumulator(x)), x.dtype)
