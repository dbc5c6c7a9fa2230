"""Predicted times from counted bytes and operations. Nothing here was measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dropinf_kernels.device import ARCHS, Arch

PARTS = {"H100": ARCHS["sm_90"], "MI300X": ARCHS["gfx942"]}
FORMULA = "Predicted time = sum over launches of max(DRAM bytes / bandwidth, matrix operations / matrix rate)"


@dataclass(frozen=True)
class Work:
    """Bytes and matrix operations of one launch, by operand width in bits."""

    bytes: int
    flops: dict[int, int]


def predicted(work: Sequence[Work], arch: Arch) -> float:
    """Return seconds by FORMULA."""
    return sum(max(w.bytes / arch.bandwidth, _matrix_seconds(w, arch)) for w in work)


def _matrix_seconds(work: Work, arch: Arch) -> float:
    return sum(n / (arch.flops16 if width <= 16 else arch.flops32) for width, n in work.flops.items())


@dataclass(frozen=True)
class Side:
    """One side of a layer: `inputs` bytes to read, which a matrix [d, k] reduces to k columns unless k is d."""

    inputs: int
    d: int
    k: int


def gaussian(rows: int, left: Side, right: Side, outputs: int, itemsize: int) -> list[Work]:
    """Return the work of Gaussian factors: a GEMM [rows, d] x [d, k] for each side, then one batched product."""
    width = 8 * itemsize
    work, sketched = [], 0
    for side in (left, right):
        if side.k == side.d:
            sketched += side.inputs
            continue
        kept = rows * side.k * itemsize
        work.append(Work(side.inputs + side.d * side.k * itemsize + kept, {width: 2 * rows * side.d * side.k}))
        sketched += kept
    work.append(Work(sketched + outputs, {width: 2 * rows * left.k * right.k}))
    return work
