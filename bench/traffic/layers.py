"""Predicted times of layers of language models, by the sectors that masks touch: nothing here was measured.

A launch takes no less than LAUNCH, however little it moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dropinf_kernels.device import ARCHS, Arch
from dropinf_kernels.gpu.tiling import touched_sectors

from .predict import Side, Work, gaussian, predicted

LAUNCH = 3e-6  # seconds
ITEM, SECTOR = 2, 32  # bytes
LAYERS = ((4096, 4096), (4096, 11008), (4096, 14336), (14336, 4096))
BATCHES = ((8, 1024), (64, 1024), (8, 4096))
KEPT = ((64, 1), (64, 16), (256, 1), (256, 16))  # k, and runs of how many


@dataclass(frozen=True)
class Layer:
    """A linear map [d_out, d_in] of a batch [n, t], of which masks keep k of either side in runs of ``group``."""

    d_in: int
    d_out: int
    n: int
    t: int
    k: int
    group: int

    @property
    def rows(self) -> int:
        return self.n * self.t

    @property
    def flops(self) -> dict[int, int]:
        return {8 * ITEM: 2 * self.rows * self.k * self.k}

    @property
    def outputs(self) -> int:
        return self.n * self.k * self.k * 4

    def read(self, d: int) -> int:
        """Return the bytes of the sectors in which the values lie that a mask keeps of d."""
        return int(self.rows * touched_sectors(d, self.k, self.group, ITEM) * SECTOR)

    def ours(self) -> list[Work]:
        """One launch: both sides are read where they lie, their product is written."""
        return [Work(self.read(self.d_in) + self.read(self.d_out) + self.outputs, self.flops)]

    def two_steps(self) -> list[Work]:
        """index_select of either side, whose result is written and read again by a batched product."""
        kept = self.rows * self.k * ITEM
        sides = [Work(self.read(d) + kept, {}) for d in (self.d_in, self.d_out)]
        return [*sides, Work(2 * kept + self.outputs, self.flops)]

    def gaussian(self) -> list[Work]:
        sides = (Side(self.rows * d * ITEM, d, self.k) for d in (self.d_out, self.d_in))
        return gaussian(self.rows, *sides, self.outputs, ITEM)


def seconds(work: Sequence[Work], arch: Arch) -> float:
    """Return the predicted time of launches, none of which is shorter than LAUNCH."""
    return sum(max(LAUNCH, predicted([w], arch)) for w in work)


def lines(arch: Arch = ARCHS["sm_90"]) -> list[list[str]]:
    """Return the rows of the table."""
    found = []
    for d_in, d_out in LAYERS:
        for n, t in BATCHES:
            for k, group in KEPT:
                layer = Layer(d_in, d_out, n, t, k, group)
                own = seconds(layer.ours(), arch)
                ratios = (f"{seconds(work, arch) / own:.1f}x" for work in (layer.gaussian(), layer.two_steps()))
                kind = "scattered" if group == 1 else f"runs of {group}"
                found.append([f"{d_in} x {d_out}, {n} x {t}, k {k}, {kind}", f"{1e6 * own:.1f}", *ratios])
    return found
