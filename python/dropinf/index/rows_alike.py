"""Whether two computations of the same rows agree, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .codec import NOISE

# How far apart two computations of the same rows may be, relative to their size, by the dtype that is coarser.
_APART = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
    torch.int8: 1e-1,
}
# And how far the factor between them may be from one, in which rounding cancels.
_FACTOR = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2, torch.int8: 2e-2}
_STEP = 2.0**-7  # from a bfloat16 to the next, at most
_MANY = 64  # numbers of a layer in which it does


def apart(
    shapes: Mapping[str, tuple[int, ...]], now: Tensor, before: Tensor, *dtypes: torch.dtype, codes: bool = False
) -> str | None:
    """Return in what rows [n, K] differ from those of before; None where they are the same but for rounding.

    ``dtypes``: first that in which they were computed, then those they have been stored in. ``codes``: both are of few
    bits: where rounding of relative size e moves a number over an edge, its code is another, of about that share.
    """
    if now.shape != before.shape:
        return f"it has {len(now)} samples, and had {len(before)}"
    if not now.numel():
        return None
    widths, noise = [math.prod(shape) for shape in shapes.values()], NOISE * torch.finfo(dtypes[0]).eps
    now, before = now.double(), before.double()
    layer, error = _worst(shapes, widths, now, before, noise)
    share = max(_APART.get(dtype, 0.0) for dtype in dtypes)
    most = 2 * share**0.5 + _STEP if codes else share
    if error <= most:
        layer, error = _scaled(shapes, widths, now, before, noise)
        most = 2 * share + _STEP if codes else max(_FACTOR.get(dtype, 0.0) for dtype in dtypes)
    return None if error <= most else f"layer {layer!r} differs by {error:.1%}"


def distance(one: Tensor, other: Tensor) -> float:
    """Return how far two computations of rows [n, K] are apart, relative to the larger; inf where n differs."""
    if one.shape != other.shape:
        return math.inf
    peak = max((float(x.abs().max()) for x in (one, other) if x.numel()), default=0.0) or 1.0
    one, other = one.double() / peak, other.double() / peak
    return float((one - other).norm() / max(one.norm(), other.norm(), torch.finfo(torch.float64).tiny))


def _worst(
    shapes: Mapping[str, object], widths: Sequence[int], now: Tensor, kept: Tensor, noise: float
) -> tuple[str, float]:
    """Return the layer whose rows [n, K] differ most, and by how much, relative to their size.

    A row's size is its own norm and the layer's root mean square over rows, so that rounding in a row that all but
    vanishes counts for nothing; nor does ``noise``, relative to a row of all layers, in a layer that has no gradient.
    """
    found = ("", 0.0)
    peak = torch.maximum(now.abs().max(), kept.abs().max()).clamp_min(torch.finfo(torch.float64).tiny)
    now, kept = now / peak, kept / peak  # whose squares neither overflow nor vanish
    least = noise * torch.maximum(now.norm(dim=1), kept.norm(dim=1))
    for name, a, b in zip(shapes, now.split(list(widths), 1), kept.split(list(widths), 1), strict=True):
        apart, size = ((a - b).norm(dim=1) - least).clamp_min(0), torch.maximum(a.norm(dim=1), b.norm(dim=1))
        error = float((apart / (size + size.square().mean().sqrt()).clamp_min(torch.finfo(torch.float64).tiny)).max())
        if error > found[1]:
            found = (name, error)
    return found


def _scaled(
    shapes: Mapping[str, object], widths: Sequence[int], now: Tensor, kept: Tensor, noise: float
) -> tuple[str, float]:
    """Return the layer whose rows [n, K] are most of all a multiple of the others, and by how much that is not one.

    ``noise``: what all rows of a layer may be, beside the largest number of others, and say nothing.
    """
    found, both = ("", 0.0), []
    least = noise * float(kept.abs().max()) if kept.numel() else 0.0
    for name, a, b in zip(shapes, now.split(list(widths), 1), kept.split(list(widths), 1), strict=True):
        peak = b.abs().max() if b.numel() else b.new_zeros(())
        if peak > least:
            a, b = (a / peak).flatten(), (b / peak).flatten()
            both.append((a @ b, b @ b))
            error = float((a @ b / (b @ b) - 1).abs())
            found = (name, error) if error > found[1] and len(b) >= _MANY else found
    if both:
        error = float((sum(ab for ab, _ in both) / sum(bb for _, bb in both) - 1).abs())
        found = (next(iter(shapes)), error) if error > found[1] else found
    return found
