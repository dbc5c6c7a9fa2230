"""Which samples an index is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Rows


def positions_of(rows: Rows, count: int) -> Tensor:
    """Return the positions, int64 [n], that `rows` selects of `count` samples."""
    if isinstance(rows, slice):
        return torch.tensor(range(*rows.indices(count)), dtype=torch.int64)
    index = torch.as_tensor(rows)
    if index.dtype == torch.bool:
        if index.shape != (count,):
            raise IndexError(f"a mask of shape {tuple(index.shape)} selects from {count} samples; it must be [{count}]")
        return index.nonzero().flatten()
    if index.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if index.ndim > 1 or index.is_floating_point():
        raise IndexError(f"samples are selected by whole numbers, not by {index.dtype} {tuple(index.shape)}")
    index = index.reshape(-1).long()
    wrong = ((index < -count) | (index >= count)).nonzero()
    if len(wrong):
        raise IndexError(f"sample {int(index[wrong[0]])} is out of range for {count} samples")
    return torch.where(index < 0, index + count, index)
