"""Whether the sums of a Fisher matrix are those of given gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..gradients import GradientSource, block_rows, placed_blocks
from .fisher import Fisher


def mean_squares(fisher: Fisher, gradients: GradientSource) -> Iterator[tuple[str, float, float]]:
    """Yield each block's layer with the mean of `|c_n|^2` of the gradients that were added, and of these.

    Reads the gradients once, by row blocks.
    """
    fisher.check(gradients)
    blocks = fisher._blocks
    sums = [0.0] * len(blocks)
    for _, part in placed_blocks(gradients, block_rows(gradients)):
        for i, (columns, _) in enumerate(blocks):
            norm = torch.linalg.vector_norm(part.flat[:, columns], dtype=torch.float64)
            sums[i] += float(norm.square())
    for total, (_, block) in zip(sums, blocks, strict=True):
        yield block.name, block.mean_square(), total / max(1, len(gradients))
