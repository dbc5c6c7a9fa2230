"""Second moments of inputs and output gradients over a calibration pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..sketch.axis import Axis
from ..sketch.draws import Place
from .layer import Layer
from .taps import any_true


class NotFinite(ValueError):  # noqa: N818
    """A gradient that is NaN or infinite."""


@dataclass(frozen=True, eq=False)
class Need:
    """What a calibration pass must gather of one side: its ``size`` energies or their covariance, or ``kept``'s."""

    kind: Literal["energy", "covariance"]
    size: int
    kept: Axis | None = None


Needs = Mapping[str, Mapping[str, Need]]
ON_DEVICE = 2 << 30  # bytes of sums that may stay on the device while batches come


class Moments:
    """Sums of x_j^2 (``energy``) or x x^T (``covariance``) by layer and side, in float64; additive."""

    def __init__(self, needs: Needs) -> None:
        self.needs = {name: dict(sides) for name, sides in needs.items() if sides}
        self.sums: dict[Place, Tensor] = {}
        self.samples = 0
        self._vectors: dict[str, tuple[Layer, Tensor]] = {}  # of the batch that is running, by layer
        sides = [need for sides in self.needs.values() for need in sides.values()]
        self._leave = sum(8 * need.size ** (1 if need.kind == "energy" else 2) for need in sides) > ON_DEVICE

    @property
    def needed(self) -> bool:
        return bool(self.needs)

    def of(self, name: str) -> dict[str, Tensor]:
        """Return side -> E[x_j^2] [d] or E[x x^T] [d, d]; zero where the layer was never reached.

        E is the mean over samples of the sum over a sample's rows.
        """
        found = {place.side: total / max(1, self.samples) for place, total in self.sums.items() if place.layer == name}
        missing = {side: _zeros(need) for side, need in self.needs.get(name, {}).items() if side not in found}
        return found | missing

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Add up the sums of all ranks; a layer that a rank never reached counts as zero there."""
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        samples = torch.tensor(self.samples, device=device)
        dist.all_reduce(samples, group=group)
        for name, sides in sorted(self.needs.items()):
            for side, need in sorted(sides.items()):
                total = self.sums.get(Place(name, side), _zeros(need)).to(device)
                dist.all_reduce(total, group=group)
                self.sums[Place(name, side)] = total.cpu()
        self.samples = int(samples)

    def check(self, batch: Moments, losses: Tensor) -> None:
        """Raise ValueError where the sums of a batch, the next to be merged, are not finite."""
        if not any_true(~total.sum().isfinite() for total in batch.sums.values()):
            return
        for place, total in batch.sums.items():
            if bool(total.sum().isfinite()):
                continue
            first, bad = self.samples, (~losses.isfinite()).nonzero().flatten()
            where = f"sample {first + int(bad[0])}" if len(bad) else f"samples {first} to {first + len(losses) - 1}"
            raise NotFinite(
                f"layer {place.layer}: calibration met a value that is not finite (NaN or inf) in {where}; look at the "
                "loss there, or compute in a wider dtype, and calibrate on these batches again"
            )

    def merge(self, batch: Moments, losses: Tensor) -> None:
        """Add the sums of one batch."""
        for place, total in batch.sums.items():
            self.sums[place] = self.sums[place].to(total.device) + total if place in self.sums else total
        self.samples += len(losses)

    def settle(self) -> None:
        """Move the sums to the CPU, where they are kept between calls."""
        self.sums = {place: total.cpu() for place, total in self.sums.items()}

    def need(self, layer: Layer, side: str) -> Need | None:
        """Return what is gathered of a layer's side, or None."""
        return self.needs.get(layer.name, {}).get(side)

    def add(self, layer: Layer, side: str, total: Tensor) -> None:
        """Add a sum that the caller formed."""
        place = Place(layer.name, side)
        total = total.cpu() if self._leave else total
        self.sums[place] = self.sums[place] + total if place in self.sums else total

    def add_rows(self, layer: Layer, side: str, x: Tensor) -> None:
        """Add the second moment of the rows of x [..., d], or of what the side keeps of them, where it is needed."""
        need = self.need(layer, side)
        if need is not None:
            self.add_moment(layer, side, x if need.kept is None else need.kept.to(x.device).apply(x))

    def add_vectors(self, layer: Layer, x: Tensor) -> None:
        """Add one call's part of each sample's gradient [N, d] of a vector: calls add up before they are squared."""
        need = self.need(layer, "out")
        if need is not None:
            kept = x if need.kept is None else need.kept.to(x.device).apply(x)
            kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
            before = self._vectors.get(layer.name)
            self._vectors[layer.name] = layer, kept if before is None else before[1] + kept

    def close(self) -> None:
        """Add the second moments of vectors, all of whose calls came."""
        for layer, x in self._vectors.values():
            self.add_moment(layer, "out", x)
        self._vectors.clear()

    def add_moment(self, layer: Layer, side: str, x: Tensor) -> None:
        """Add the second moment of the rows of x [..., size], of a side that is needed."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        energy = self.needs[layer.name][side].kind == "energy"
        self.add(layer, side, (rows.square().sum(0) if energy else rows.T @ rows).double())

    def add_whole(self, layer: Layer, gradient: Tensor) -> None:
        """Add whole per-sample gradients [n, *shape] of a parameter that no hook covers."""
        matrix = layer.as_matrix(gradient)
        if self.need(layer, "in") is not None or matrix.shape[2] > 1:
            self.add_rows(layer, "out", matrix.mT)
            self.add_rows(layer, "in", matrix)
            self.add_rows(layer, "flat", matrix.reshape(len(matrix), -1))
        else:
            self.add_rows(layer, "out", matrix.reshape(len(matrix), -1))


def _zeros(need: Need) -> Tensor:
    return torch.zeros(
        (need.size,) if need.kind == "energy" else (need.size, need.size), dtype=torch.float64, device="cpu"
    )
