"""A random rotation of K columns at K log K, known by its seed alone: random signs and Hadamard transforms."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..sketch.draws import Place
from ..sketch.draws import bits as random_bits

_ROUNDS = 4  # of signs and transforms, where one transform does not cover all columns; else half as many


class Rotation:
    """An orthogonal map of rows [n, K], the same for a width and a seed on every machine.

    A Hadamard transform has 2^p columns, the largest power of two within K. Rounds of it take the first 2^p and the
    last in turns, each behind random signs of all columns. Source: Ailon & Chazelle 2009, SIAM J. Comput. 39(1) (the
    fast Johnson-Lindenstrauss transform).
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.seed = width, seed
        self.covered = 1 << (width.bit_length() - 1)
        self.rounds = _ROUNDS if self.covered < width else _ROUNDS // 2
        words = random_bits(seed, Place(f"rotation of {width}", "flat"), self.rounds * -(-width // 64))
        each = np.unpackbits(words.view(np.uint8).reshape(self.rounds, -1), axis=1, count=width)
        self._signs = 1 - 2 * torch.from_numpy(each.astype(np.float32))
        left = 1 << (int(math.log2(self.covered)) // 2)
        self._factors = _hadamard(left), _hadamard(self.covered // left)

    def __call__(self, x: Tensor) -> Tensor:
        """Return rotated rows [n, K] in the dtype of x, float32 or float64; x is left as it is."""
        left, right = (factor.to(x) for factor in self._factors)
        for i in range(self.rounds):
            x = x * self._signs[i].to(x)
            first = 0 if i % 2 == 0 else self.width - self.covered
            part = x[:, first : first + self.covered]
            part.copy_((left @ part.reshape(len(x), len(left), len(right)) @ right).reshape(len(x), -1))
        return x


def _hadamard(size: int) -> Tensor:
    """Return the Hadamard matrix of a power of two, orthonormal, float64 [size, size]."""
    found = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)
