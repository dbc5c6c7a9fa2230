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


def check_rows(c: Tensor, c_scale: Tensor | None, name: str = "c") -> None:
    """Check rows of compressed gradients: float [N, K], or int8 with the scale of each row."""
    if c.dtype == torch.int8:
        if c_scale is None:
            raise ValueError(f"{name} is int8 and c_scale is missing; pass the scale of each row, float32 [N]")
        if c.dim() != 2:
            raise ValueError(f"{name} has shape {list(c.shape)}; it must have 2 dimensions")
    else:
        check_float(name, c, 2)
    if c_scale is not None and (c_scale.dtype != torch.float32 or c_scale.shape != c.shape[:1]):
        raise ValueError(
            f"c_scale is {c_scale.dtype} {list(c_scale.shape)}; it must be float32 [N] with {name}'s N = {c.shape[0]}"
        )
