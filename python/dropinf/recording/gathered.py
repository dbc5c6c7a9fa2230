"""The gradients of the tracked parameters on the mask, as a backward leaves them and as the optimizer finds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..capture.audit import sketched
from ..capture.layer import Layer
from ..capture.targets import Target


class Gathered:
    """Takes the gradient of each tracked parameter on the mask whenever a backward has added to it."""

    def __init__(self, targets: Mapping[str, Target], layers: Mapping[str, Layer]) -> None:
        self._parameters = {name: target.tensor for name, target in targets.items()}
        self._layers = layers
        self._entries = {n: x.entries.to(self._parameters[n].device) for n, x in layers.items() if x.is_gather}
        self._found: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor] = {}  # the very tensors that the gradients were
        self._settled = False  # whether another forward began since the last backward
        self.was_reset = False  # whether what earlier backwards left was thrown away
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._take, name)) for name, p in self._parameters.items()
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _take(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.was_reset |= self._settled and self._grads.get(name, parameter.grad) is not parameter.grad
        self._grads[name] = parameter.grad
        self._found[name] = self.on_mask(name, parameter.grad)

    @torch.no_grad()
    def on_mask(self, name: str, x: Tensor) -> Tensor:
        """Return what the mask keeps of a tensor of a parameter's shape, [k]."""
        x = x.detach().to_dense() if x.is_sparse else x.detach()
        if name in self._entries:
            found = x.reshape(-1).index_select(0, self._entries[name])
            return found.to(torch.promote_types(x.dtype, torch.float32))
        return sketched(self._layers[name], x).flatten()

    def joined(self, of: Callable[[str], Tensor | None]) -> Tensor:
        """Return what ``of`` gives for each layer side by side [K]; zeros where it gives None."""
        parts = []
        for name, layer in self._layers.items():
            found, device = of(name), self._parameters[name].device
            parts.append(torch.zeros(math.prod(layer.stored_shape), device=device) if found is None else found)
        return torch.cat(parts)

    def clear(self) -> None:
        """Forget what was taken: the optimizer has made its step."""
        self._found.clear()
        self._grads.clear()
        self._settled = self.was_reset = False

    def settle(self) -> None:
        """Note that another forward begins: a backward that finds no gradient behind it finds none of those before."""
        self._settled = bool(self._found)

    def before(self, name: str) -> Tensor | None:
        """Return a layer's gradient as the last backward left it [k], None where it got none."""
        return self._found.get(name)

    def after(self, name: str) -> Tensor | None:
        """Return a layer's gradient as it is now [k]; not every write to it counts its version up."""
        grad = self._parameters[name].grad
        return None if grad is None else self.on_mask(name, grad)
