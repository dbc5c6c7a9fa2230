"""Argument checks that every op shares: each error names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


def check_float(name: str, x: Tensor, *ndims: int) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
    check_ndim(name, x, *ndims)


def check_ids(name: str, x: Tensor, *ndims: int) -> None:
    if x.dtype not in ID_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be int32 or int64")
    check_ndim(name, x, *ndims)


def check_ndim(name: str, x: Tensor, *ndims: int) -> None:
    if ndims and x.dim() not in ndims:
        wanted = " or ".join(str(n) for n in ndims)
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have {wanted} dimensions")


def check_table(side: str, index: Tensor | None, weight: Tensor | None, d: int, group: int) -> None:
    """Check the sketch table `{side}index`, `{side}weight` for an axis of `d` coordinates."""
    if group < 1:
        raise ValueError(f"group is {group}; it must be at least 1")
    if index is None:
        if weight is not None:
            raise ValueError(f"{side}weight is given without {side}index; pass both, or neither")
        return
    if index.dtype != torch.int32:
        raise TypeError(f"{side}index has dtype {index.dtype}; it must be int32: use {side}index.int()")
    if index.dim() != 2 or index.shape[0] < 1:
        raise ValueError(f"{side}index has shape {list(index.shape)}; it must be [fan_in, k] with fan_in >= 1")
    if weight is not None:
        if weight.dtype != torch.float32:
            raise TypeError(f"{side}weight has dtype {weight.dtype}; it must be float32")
        if weight.shape != index.shape:
            raise ValueError(
                f"{side}weight has shape {list(weight.shape)}; it must be that of {side}index, {list(index.shape)}"
            )
    if group > 1 and (d % group or index.shape[1] % group):
        raise ValueError(
            f"group is {group}; it must divide both the axis, {d}, and the columns of {side}index, {index.shape[1]}"
        )


def check_bounds(name: str, index: Tensor, size: int) -> None:
    """Raise if an entry is outside [0, size); reads values, so it waits for the device."""
    if index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{name} has entries from {low} to {high}; they must lie in [0, {size})")


def check_same_rows(a: Tensor, g: Tensor, name: str, a_lead: Sequence[int], g_lead: Sequence[int]) -> None:
    if list(a_lead) != list(g_lead):
        raise ValueError(
            f"{name} has shape {list(a.shape)} and g has shape {list(g.shape)}; "
            f"their leading dimensions {list(a_lead)} and {list(g_lead)} must agree"
        )


def document_bounds(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Return `cu_seqlens` as a list after checking that it cuts `rows` rows into documents."""
    check_ids("cu_seqlens", cu_seqlens, 1)
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts with {bounds[:1]}; it must start with 0")
    if bounds[-1] != rows:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}; it must end at the number of rows, {rows}")
    if any(b < a for a, b in pairwise(bounds)):
        raise ValueError("cu_seqlens decreases; it must be nondecreasing (equal neighbours are an empty document)")
    return bounds


def check_linear(
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None,
    in_weight: Tensor | None,
    out_index: Tensor | None,
    out_weight: Tensor | None,
    group: int,
    cu_seqlens: Tensor | None,
) -> None:
    ndims = (3,) if cu_seqlens is None else (2, 3)
    check_float("a", a, *ndims)
    check_float("g", g, *ndims)
    check_same_rows(a, g, "a", a.shape[:-1], g.shape[:-1])
    check_table("in_", in_index, in_weight, a.shape[-1], group)
    check_table("out_", out_index, out_weight, g.shape[-1], group)


def check_output_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"dtype is {dtype}; it must be float16, bfloat16, float32 or float64 (for int8: compress_linear_int8)"
        )


def check_sketch(x: Tensor, index: Tensor, weight: Tensor | None, group: int) -> None:
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x has no dimension; it must be [..., d]")
    check_table("", index, weight, x.shape[-1], group)


def check_norm(
    a: Tensor | None, g: Tensor, index: Tensor | None, weight: Tensor | None, group: int, cu_seqlens: Tensor | None
) -> None:
    ndims = (3,) if cu_seqlens is None else (2, 3)
    check_float("g", g, *ndims)
    if a is not None:
        check_float("a", a, *ndims)
        check_same_rows(a, g, "a", a.shape, g.shape)
    check_table("", index, weight, g.shape[-1], group)


def check_flat(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None) -> None:
    ndims = (3,) if cu_seqlens is None else (2, 3)
    check_float("g", g, *ndims)
    sparse = a.dtype in ID_DTYPES
    if not sparse:
        check_float("a", a, *ndims)
    check_same_rows(a, g, "a", a.shape if sparse else a.shape[:-1], g.shape[:-1])
    for name, index in (("rows", rows), ("cols", cols)):
        if index.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {index.dtype}; it must be int32: use {name}.int()")
        if index.dim() != 1 or index.shape != rows.shape:
            raise ValueError(f"{name} has shape {list(index.shape)}; rows and cols must both be [k]")
