"""Shared builders: random sketch tables, the dense sketch matrix, and awkward memory layouts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

WRITES = ("gram_update", "compress_linear_into")  # the ops that write to their first argument

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# cu_seqlens of twelve rows, with documents that are empty, one row long, or all there is.
CUTS = [[0, 3, 3, 8, 12], [0, 0, 12], [0, 12, 12], [0, 1, 2, 12]]


def make_table(d: int, k: int, fan_in: int = 1, weighted: bool = False, group: int = 1):
    """Return index int32 [fan_in, k] of aligned runs of `group`, and weight [fan_in, k] or None."""
    starts = torch.randint(0, d // group, (fan_in, k // group)) * group
    index = (starts.unsqueeze(-1) + torch.arange(group)).flatten(1).int()
    return index, torch.randn(fan_in, k) if weighted else None


def dense(index: Tensor | None, weight: Tensor | None, d: int) -> Tensor:
    """Return the sketch as a float64 matrix [k, d], one entry at a time."""
    if index is None:
        return torch.eye(d, dtype=torch.float64)
    matrix = torch.zeros(index.shape[1], d, dtype=torch.float64)
    for f in range(index.shape[0]):
        for j in range(index.shape[1]):
            matrix[j, index[f, j]] += 1.0 if weight is None else weight[f, j].item()
    return matrix


def documents(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Return each document of packed rows as a batch of one."""
    rows = x.reshape(-1, x.shape[-1])
    return [rows[lo:hi].unsqueeze(0) for lo, hi in pairwise(cu_seqlens)]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return tensors equal to `x` with other strides; `x` must have at least two dimensions."""
    padded = torch.full([2 * n + 1 for n in x.shape], float("nan"), dtype=x.dtype)
    sliced = padded[tuple(slice(1, None, 2) for _ in x.shape)]
    sliced.copy_(x)
    turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    outer = x.transpose(0, 1).contiguous().transpose(0, 1)
    return {"sliced": sliced, "turned": turned, "outer": outer}


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Compare with a float64 oracle of the same (already rounded) inputs, by the accumulator's error."""
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(got.dtype).eps
    scale = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=32 * eps * scale)
