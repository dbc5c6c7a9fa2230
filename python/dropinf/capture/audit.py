"""The audit: a batch's compressed gradients against one ordinary backward of the untouched model.

For random weights r, sum_n r_n c_n must be the sketch of the gradient of sum_n r_n L_n. That gradient shares no code
with the hooks: it is what plain autograd says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .layer import Layer
from .preserved import Flags, gradients_taken

When = Literal["auto", "every", "never"]
# By the coarsest dtype that gradients are computed in: the relative difference that rounding explains, and the part of
# the largest layer's gradient below which a layer's own is rounding.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
FLOOR = {torch.float64: 1e-7, torch.float32: 3e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
# The same of biases and scales, whose gradients autograd may sum in half precision.
FLOOR_OF_SUMS = FLOOR | {torch.float16: 0.5, torch.bfloat16: 0.5}
# What rounding explains of a layer below its floor, in differences of two backwards that round differently.
ROUNDINGS = {torch.float64: 100.0, torch.float32: 100.0, torch.float16: 10.0, torch.bfloat16: 10.0}
LOST = 100.0  # roundings of the largest layer's gradient, below which a layer's own may be nothing else
OTHERWISE = 0.75  # times this, numbers round in another way
LITTLE = 2.0**-8  # of weights, where a weighted sum of rows is more than a dtype holds


@dataclass(frozen=True)
class Audited:
    """One audit: which batch of its call, why, and the relative error of each layer that has a gradient."""

    batch: int
    why: str
    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)


class Expected:
    """What the layers' gradients of a batch must sum to, each sample times its weight ``r``."""

    def __init__(
        self, r: Tensor, sketches: Mapping[str, Tensor], losses: Tensor, sizes: Mapping[str, Tensor] | None = None
    ) -> None:
        self.r, self.sketches, self.losses = r, sketches, losses
        self._sizes = {} if sizes is None else sizes  # of the gradients before they were sketched

    def errors(self, store: Mapping[str, Tensor], layers: Mapping[str, Layer], dtype: torch.dtype) -> dict[str, float]:
        """Return the relative error of each layer that has a gradient. ``dtype``: the coarsest it is computed in."""
        both = {name: self._compared(name, c) for name, c in store.items()}
        apart = {name: float(difference) for name, (difference, _) in both.items()}
        size = {name: float(found) for name, (_, found) in both.items()}
        largest = max(size.values(), default=0.0)
        floors = {name: (FLOOR if len(layers[name].shape) > 1 else FLOOR_OF_SUMS)[dtype] for name in store}
        return {name: apart[name] / (size[name] + floors[name] * largest) for name in store if size[name]}

    def rounding_alone(self, names: Iterable[str], dtype: torch.dtype) -> list[str]:
        """Return those of some layers whose gradients, not yet scaled by a sketch, may be rounding and nothing else.

        In half precision none can be told so.
        """
        if dtype.itemsize < 4:
            return []
        sizes = {name: float(size) for name, size in self._sizes.items()}
        least = LOST * torch.finfo(dtype).eps * max(sizes.values(), default=0.0)
        return [name for name in names if sizes.get(name, math.inf) <= least]

    def differ(self, store: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return of each layer whether it seems to be wrong: a truth value, for which nobody waited."""
        both = {name: self._compared(name, c) for name, c in store.items()}
        return {name: ~(apart <= TOLERANCE[dtype] * size) for name, (apart, size) in both.items()}

    def beyond_rounding(
        self, names: Iterable[str], store: Mapping[str, Tensor], otherwise: Expected, dtype: torch.dtype
    ) -> dict[str, float]:
        """Return the relative error of each layer that differs by more than rounding explains.

        ``otherwise``: the same sums of samples whose weights are ``OTHERWISE`` times as large.
        """
        found = {}
        for name in names:
            apart, size = self._compared(name, store[name])
            both = [x.sketches.get(name, apart.new_zeros(())).double() for x in (self, otherwise)]
            if bool(apart > ROUNDINGS[dtype] * norm(both[0] - both[1] / OTHERWISE)):
                found[name] = float(apart / size)
        return found

    def _compared(self, name: str, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far a layer's rows sum to something else than they must, and beside what size."""
        rows = c.flatten(1) * self.r.to(c)[:, None]
        want = self.sketches[name].flatten().to(rows) if name in self.sketches else rows.new_zeros(rows.shape[1])
        return norm(rows.sum(0) - want), torch.hypot(norm(rows), norm(want))


def norm(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the norm of a tensor, or along a dimension, float64, of numbers whose squares no dtype may hold."""
    if not x.numel():
        return x.new_zeros(() if dim is None else x.sum(dim).shape, dtype=torch.float64)
    largest = x.detach().abs().amax(() if dim is None else dim, keepdim=True).double()
    found: Tensor = torch.linalg.vector_norm(x.double() / torch.where(largest > 0, largest, 1), dim=dim)
    return found * largest.reshape(found.shape)


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the least precise of dtypes, of float32 matrix products too where they are allowed to be less precise."""
    found = max((d for d in dtypes if d in TOLERANCE), key=lambda d: torch.finfo(d).eps, default=torch.bfloat16)
    reduced = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if reduced and found == torch.float32 else found


def expected(
    model: nn.Module,
    losses_of: Callable[[], Tensor],
    layers: Mapping[str, Layer],
    tensors: Mapping[str, Tensor],
    flags: Flags,
    sizes: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    only: Tensor | None = None,
    place: int = 0,
    r: Tensor | None = None,
) -> Expected:
    """Run the model forward and backward as its user has it. Each weight's gradient is sketched and dropped at once.

    ``sizes`` [N]: the norms of the rows to compare with. A sample's weight is then the larger the smaller its row.
    ``dtype``: the coarsest that gradients are computed in. ``only`` [N]: samples beside which all have weight zero.
    ``place``: of the batch; weights are drawn anew for each. ``r`` [N]: these weights, in their place.
    """
    sketches: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}

    def sketch(layer: Layer, g: Tensor) -> None:
        g = g.to_dense() if g.is_sparse else g
        c, size = sketched(layer, g), torch.linalg.vector_norm(g, dtype=torch.float64)
        if layer.name in sketches:  # a reentrant checkpoint finishes a gradient each
            c, size = sketches[layer.name] + c, whole[layer.name] + size
        sketches[layer.name], whole[layer.name] = c, size

    take = {tensors[name]: lambda g, layer=layer: sketch(layer, g) for name, layer in layers.items()}
    with flags.own(tensors.values()), torch.enable_grad(), gradients_taken(model.parameters(), take):
        losses = losses_of()
        r = random_weights(losses, sizes, dtype, only, place) if r is None else r
        if losses.requires_grad:
            losses.backward(r)
    return Expected(r, sketches, losses.detach(), whole)


def sketched(layer: Layer, g: Tensor) -> Tensor:
    """Return the sketch of one gradient [*shape], axis by axis: not by the look-up that whole gradients take."""
    matrix = layer.as_matrix(g.to(torch.promote_types(g.dtype, torch.float32))[None])[0]
    if layer.in_axis is None:
        return layer.out_axis.apply(matrix.reshape(-1))
    return layer.out_axis.apply(layer.in_axis.apply(matrix).mT).mT


def random_weights(losses: Tensor, sizes: Tensor | None, dtype: torch.dtype, only: Tensor | None, place: int) -> Tensor:
    """Return random weights [N] of either sign; with ``sizes``, such that all rows weigh about the same.

    In half precision they are powers of two: each gradient is then rounded as without weights, whatever is behind it.
    """
    generator = torch.Generator().manual_seed(place)
    half = dtype.itemsize < 4
    if half:
        # 1/2 to 4 of either sign in each eight samples: neighbours differ, others mostly, and not the same each time.
        blocks = [torch.randperm(8, generator=generator, device="cpu") for _ in range(0, len(losses), 8)]
        order = torch.cat(blocks)[: len(losses)]
        r = 2.0 ** (order // 2 - 1) * (1 - 2 * (order % 2))
    else:
        signs = torch.randint(0, 2, (len(losses),), generator=generator, device="cpu") * 2 - 1
        r = (torch.rand(len(losses), generator=generator, device="cpu") + 0.5) * signs
    r = r.to(losses)
    if only is not None:
        r = r * only.to(r)
        sizes = None if sizes is None else sizes * only.to(sizes)
    if sizes is None or not bool(sizes.max() > 0):
        return r
    sizes = (sizes.to(losses) / sizes.max()).clamp(min=torch.finfo(losses.dtype).eps ** 0.5)
    return r / (sizes.log2().round().exp2() if half else sizes)


def is_due(batch: int) -> bool:
    """Return whether a batch of a call, counted from 1, is audited whatever it looks like: 4, 16, 64, 256, ..."""
    return batch > 1 and batch & (batch - 1) == 0 and batch.bit_length() % 2 == 1
