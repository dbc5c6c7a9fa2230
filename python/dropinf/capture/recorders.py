"""What is recorded of a batch: compressed gradients, or second moments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from .layer import Layer
from .modules import LinearUse, Use
from .moments import Moments
from .row_block import RowBlock
from .samples import Samples
from .sums import sketched_outer
from .together import SharedInputs


class Recorder(ABC):
    """What is recorded of one forward and backward of a batch."""

    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        """Return what backward needs of one call's input."""
        return use.save(x, out)

    @abstractmethod
    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        """Take one call's output gradient, with what `save` returned.

        Raises:
            Untied: it cannot be tied to samples.
        """

    @abstractmethod
    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        """Take whole per-sample gradients [n, *shape] of the next samples, of a parameter that no hook covers."""

    def emit_part(self, layer: Layer, c: Tensor) -> None:
        """Take sketched gradients [N, *stored_shape] of one use of a parameter, out of several."""
        raise TypeError(f"{type(self).__name__} does not take gradients use by use ({layer.name}, {tuple(c.shape)})")

    def check(self, losses: Tensor) -> None:  # noqa: B027
        """Raise NotFinite where what was recorded is not finite, if the recorder can tell."""

    @abstractmethod
    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:
        """End the batch. Return layer name -> compressed gradients [N, *stored_shape], if that is what was recorded."""


class Compression(Recorder):
    """Compressed gradients of one batch."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._block = RowBlock(layers)
        self._found: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._inputs = SharedInputs()

    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        if x.is_cuda and isinstance(use, LinearUse) and use.weight is not None and use.table is not None:
            return use.inputs(use.table.rotate(self._inputs.gathered(use, x)), out)
        return use.save(x, out)

    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        room = None
        if g.is_cuda and isinstance(use, LinearUse) and use.weight is not None and not use.is_flat:
            room = self._block.take(use.weight.name, samples.n, g)
        if room is None:
            parts = list(use.emit(saved, g, samples))
        else:
            assert saved is not None
            assert use.weight is not None
            parts = [*use.emit_bias(g, samples)]
            parts.append((use.weight, sketched_outer(saved, g, use.weight.out_axis, samples, room)))
        for layer, c in parts:
            self.emit_part(layer, c)

    def emit_part(self, layer: Layer, c: Tensor) -> None:
        before = self._found.get(layer.name)
        self._found[layer.name] = c if before is None else before + c  # a module called twice sums its calls

    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        wide = torch.promote_types(gradients.dtype, torch.float32)
        self._parts.setdefault(layer.name, []).append(layer.compress_exact(gradients.to(wide)))

    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:
        self._inputs.clear()
        found = self._found | {name: torch.cat(parts) for name, parts in self._parts.items()}
        dtype = torch.promote_types(losses.dtype, torch.float32)
        # A layer that the batch does not reach has a zero gradient.
        rows = {
            name: found[name] if name in found else losses.new_zeros(len(losses), *layer.stored_shape, dtype=dtype)
            for name, layer in layers.items()
        }
        return self._block.filled(rows)


class Unweighted(Recorder):
    """Hands on what a backward of weighted losses gives, each sample's times ``factor`` [N]."""

    def __init__(self, recorder: Recorder, factor: Tensor) -> None:
        self._recorder, self._factor = recorder, factor

    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        for layer, c in use.emit(saved, g, samples):
            self.emit_part(layer, c)

    def emit_part(self, layer: Layer, c: Tensor) -> None:
        factor = self._factor.to(c.device, c.dtype)
        self._recorder.emit_part(layer, c * factor.view(-1, *[1] * (c.ndim - 1)))

    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        raise TypeError(f"{layer.name}: whole gradients {tuple(gradients.shape)} come of no weighted loss")

    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:
        return self._recorder.finish(layers, losses)


class Calibration(Recorder):
    """Second moments of one batch, added to those of the batches before when it ends."""

    def __init__(self, moments: Moments) -> None:
        self._moments, self._batch = moments, Moments(moments.needs)

    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        return use.inputs(x, out)

    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        assert saved is not None
        use.observe(self._batch, saved, g, samples)

    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        self._batch.add_whole(layer, gradients)

    def check(self, losses: Tensor) -> None:
        self._batch.close()
        self._moments.check(self._batch, losses)

    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        self.check(losses)
        self._moments.merge(self._batch, losses)
        return {}
