"""A random rotation of K columns at K log K, known by its seed alone: random signs and Hadamard transforms."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..sketch.draws import Place, bits, shuffle

_ROUNDS = 2


class Rotation:
    """An orthogonal map of rows [n, K], the same for a width and a seed on every machine.

    A Hadamard transform has 2^p columns, the largest power of two within K. Each round puts the columns in a random
    order and transforms the first 2^p, behind random signs, and then the last 2^p, behind others; a second round mixes
    what the first left apart. Source: Ailon & Chazelle 2009, SIAM J. Comput. 39(1) (the fast Johnson-Lindenstrauss
    transform).
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.seed = width, seed
        self.covered = 1 << (width.bit_length() - 1)
        left = 1 << (int(math.log2(self.covered)) // 2)
        self._factors = _hadamard(left), _hadamard(self.covered // left)
        self._orders, self._signs = [], []
        for i in range(_ROUNDS):
            place = Place(f"rotation of {width}, round {i}", "flat")
            self._orders.append(torch.from_numpy(shuffle(seed, place, width)))
            for purpose in ("first", "last"):
                words = bits(seed, place, -(-width // 64), purpose)
                signs = np.unpackbits(words.view(np.uint8), count=width).astype(np.float32)
                self._signs.append(1 - 2 * torch.from_numpy(signs))

    def __call__(self, x: Tensor) -> Tensor:
        """Return rotated rows [n, K] in the dtype of x, float32 or float64; x is left as it is."""
        for i, order in enumerate(self._orders):
            x = x.index_select(1, order.to(x.device))
            for signs, first in zip(self._signs[2 * i :], (0, self.width - self.covered), strict=False):
                x.mul_(signs.to(x))
                self._transform(x[:, first : first + self.covered])
        return x

    def _transform(self, part: Tensor) -> None:
        """Write the Hadamard transform of columns over them, as the product of two small ones."""
        left, right = (factor.to(part) for factor in self._factors)
        blocks = part.reshape(part.shape[0], len(left), len(right))
        part.copy_((left @ blocks @ right).reshape(part.shape))


def _hadamard(size: int) -> Tensor:
    """Return the Hadamard matrix of a power of two, orthonormal, float64 [size, size]."""
    found = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)
