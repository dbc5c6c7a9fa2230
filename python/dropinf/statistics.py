"""Second moments of inputs and output gradients over a calibration pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

import dropinf_kernels as ops

from .axis import Axis
from .layers import Layer, Need
from .uses import ConvUse, EmbeddingUse, NormUse, Samples, Use

_SPAN = 1 << 20  # elements of the largest part of an unfold

Needs = Mapping[str, Mapping[str, Need]]


class Moments:
    """Sums of x_j^2 (``energy``) or x x^T (``covariance``) by layer and side, in float64; additive."""

    def __init__(self, needs: Needs) -> None:
        self.needs = {name: dict(sides) for name, sides in needs.items() if sides}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.samples = 0

    @property
    def needed(self) -> bool:
        return bool(self.needs)

    def of(self, name: str) -> dict[str, Tensor]:
        """Side -> E[x_j^2] [d] or E[x x^T] [d, d]; zero where the layer was never reached."""
        found = {}
        for side, need in self.needs.get(name, {}).items():
            found[side] = self.sums.get((name, side), _zeros(need)) / max(1, self.samples)
        return found

    def all_reduce(self, group: dist.ProcessGroup | None) -> None:
        """Add up the sums of all ranks; a layer that a rank never reached counts as zero there."""
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        samples = torch.tensor(self.samples, device=device)
        dist.all_reduce(samples, group=group)
        for name, sides in sorted(self.needs.items()):
            for side, need in sorted(sides.items()):
                total = self.sums.get((name, side), _zeros(need)).to(device)
                dist.all_reduce(total, group=group)
                self.sums[name, side] = total.cpu()
        self.samples = int(samples)

    def count(self, losses: Tensor) -> None:
        """End a batch. Raises ValueError where its values, and so the sums, are not finite; the sums start anew."""
        for (name, _), total in self.sums.items():
            if bool(total.sum().isfinite()):
                continue
            first, bad = self.samples, (~losses.isfinite()).nonzero().flatten()
            where = f"sample {first + int(bad[0])}" if len(bad) else f"samples {first} to {first + len(losses) - 1}"
            self.sums, self.samples = {}, 0
            raise ValueError(
                f"layer {name}: calibration met a value that is not finite (NaN or inf) in {where}; look at the loss "
                "there, or compute in a wider dtype, and calibrate again from the start"
            )
        self.samples += len(losses)

    def _needs(self, layer: Layer, side: str) -> bool:
        return side in self.needs.get(layer.name, {})

    def _put(self, layer: Layer, side: str, total: Tensor) -> None:
        key = (layer.name, side)
        total = total.cpu()
        self.sums[key] = self.sums[key] + total if key in self.sums else total

    def _rows(self, layer: Layer, side: str, x: Tensor) -> None:
        """Add the second moment of the rows of x [..., d]."""
        if self._needs(layer, side):
            kept = self.needs[layer.name][side].kept
            self._moment(layer, side, x if kept is None else kept.to(x.device).apply(x))

    def _moment(self, layer: Layer, side: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        energy = self.needs[layer.name][side].kind == "energy"
        self._put(layer, side, (rows.square().sum(0) if energy else rows.T @ rows).double())

    def add(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        """One call of one module: its whole input and its output gradient."""
        assert saved is not None
        rows = use.rows(g)
        samples.tie(rows)
        if use.bias is not None:
            self._vector(use.bias, None, rows, samples)
        layer = use.weight
        if layer is None:
            return
        if isinstance(use, NormUse):
            self._vector(layer, saved, rows, samples)
        elif isinstance(use, EmbeddingUse):
            if layer.kind != "tied":  # a tied weight is judged by its output layer
                self._rows(layer, "out", rows)
                self._tokens(layer, saved, use)
        else:
            self._rows(layer, "out", rows)
            if isinstance(use, ConvUse):
                self._patches(layer, saved, use)
            else:
                self._rows(layer, "in", saved)

    def _vector(self, layer: Layer, a: Tensor | None, g: Tensor, samples: Samples) -> None:
        g, cu = samples.tie(g)
        a = a if a is None else samples.tie(a)[0]
        self._rows(layer, "out", ops.compress_norm(a, g, cu_seqlens=cu))

    def _tokens(self, layer: Layer, ids: Tensor, use: EmbeddingUse) -> None:
        if self._needs(layer, "in"):
            counts = torch.bincount(ids.flatten(), minlength=layer.matrix_shape[1]).double()
            if use.padding_idx >= 0:
                counts[use.padding_idx] = 0
            self._put(layer, "in", counts)

    def _patches(self, layer: Layer, x: Tensor, use: ConvUse) -> None:
        """A few samples and one group at a time, so that no full unfold exists."""
        if not self._needs(layer, "in"):
            return
        kept = (self.needs[layer.name]["in"].kept or Axis.identity(layer.matrix_shape[1])).to(x.device)
        assert kept.index is not None
        step = max(1, _SPAN // (kept.dim * math.prod(x.shape[2:])))
        for samples in x.split(step):
            for part in samples.chunk(use.groups, 1):
                window = (use.kernel, use.stride, use.padding, use.dilation)
                self._moment(layer, "in", ops.sketch_patches(part, *window, kept.index, kept.weight))

    def add_exact(self, layer: Layer, gradient: Tensor) -> None:
        """Whole per-sample gradients [n, *shape] of a parameter that no hook covers."""
        matrix = layer.as_matrix(gradient)
        if "in" in self.needs.get(layer.name, {}) or matrix.shape[2] > 1:
            self._rows(layer, "out", matrix.mT)
            self._rows(layer, "in", matrix)
            self._rows(layer, "flat", matrix.reshape(len(matrix), -1))
        else:
            self._rows(layer, "out", matrix.reshape(len(matrix), -1))


def _zeros(need: Need) -> Tensor:
    return torch.zeros((need.size,) if need.kind == "energy" else (need.size, need.size), dtype=torch.float64)
