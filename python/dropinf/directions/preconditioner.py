"""A Fisher matrix of kept entries as a preconditioner of conjugate gradients on whole parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ..compressor import Compressor
from ..files import checksum
from ..fisher.fisher import Fisher
from ..gradients import Gradients
from .runs import Tensors


class Preconditioner:
    """M^{-1} = S^T (a F + lambda I)^{-1} S + (I - S^T S) / lambda, where S picks entries of the gradient
    and a is how large the curvature is relative to F.

    With an `Identity` sketch and a "kronecker" Fisher matrix, M is EK-FAC of all parameters.

    Raises:
        ValueError: the compressor is of another model, tracks a parameter that is not refined, or has a sketch that
            mixes entries; or the Fisher matrix is of other gradients.
    """

    def __init__(self, fisher: Fisher, compressor: Compressor, model: nn.Module, names: Collection[str]) -> None:
        if compressor.model is not model:
            raise ValueError("precondition: its Compressor is of another model; make it with the model that is refined")
        for layer in compressor.layers.values():
            if layer.parameter not in names:
                raise ValueError(
                    f"precondition: its Compressor tracks {layer.parameter}, which is not refined; name it in layers="
                )
            if not layer.is_gather:
                raise ValueError(
                    f"precondition: the sketch of layer {layer.name} mixes or weighs entries, so there is no set of "
                    "them that the Fisher matrix is of; take a plain Dropout, or Identity"
                )
        self._fisher, self._compressor, self._origin = fisher, compressor, compressor.origin()

    def apply(self, r: Tensors, damping: float, scale: float) -> Tensors:
        """Return M^{-1} r of residuals, name -> [Q, *shape]; `scale` is a, `damping` lambda."""
        layers = self._compressor.layers.values()
        found = {name: v / damping for name, v in r.items()}
        kept = [layer.to(r[layer.parameter].device).compress_exact(r[layer.parameter]) for layer in layers]
        flat = torch.cat([c.flatten(1).cpu() for c in kept], 1)
        gradients = Gradients(flat, dict(self._compressor.shapes), self._compressor.digest(), self._origin)
        solved = self._fisher.with_damping(damping / scale, absolute=True).solve(gradients)
        for layer in layers:
            to = found[layer.parameter]
            values = solved[layer.name].flatten(1).to(to.device, to.dtype) / scale
            to.view(len(to), -1)[:, layer.entries.to(to.device)] = values
        return found

    def digest(self) -> str:
        """Return a checksum of the Fisher matrix and the masks."""
        return checksum(self._fisher.to_bytes() + repr(sorted(self._compressor.digest().items())).encode())
