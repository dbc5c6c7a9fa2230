"""Whether the sums of a Fisher matrix are those of given gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..gradients import GradientSource, block_rows, placed_blocks
from .fisher import Fisher
from .kronecker import KroneckerBlock


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
        its = total / max(1, len(gradients))
        yield block.name, block.mean_square(), its
        if isinstance(block, KroneckerBlock) and block.corrected:
            count, mean = block.correction()
            yield f"{block.name}, corrected,", mean if count == len(gradients) else math.nan, its
