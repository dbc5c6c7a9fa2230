"""dattri 0.3.0's attributors on dropinf's compressed gradients.

    from dropinf.interop.dattri import BlockProjectedIFAttributor
    attributor = BlockProjectedIFAttributor(task, sketch=dropinf.Dropout(64), damping=0.1)

`BlockProjectedIFAttributor`, `TRAKAttributor` and `TracInAttributor` are dattri's own with ``sketch`` in the place of
``sparsifier_kwargs`` and ``projector_kwargs``: a sketch, or a `Compressor` of the same model that was calibrated or
loaded. All checkpoints share its masks. Nothing of dattri is patched. What this reaches into: ``HookManager`` and its
``_custom_linear_forward``, ``compressed_grads`` and ``get_compressed_grads``; the attributors' ``hook_manager``,
``compressors``, ``_compute_test_gradients`` and ``projector_kwargs``; the task's ``get_grad_loss_func`` and
``get_grad_target_func``.

Rows hold, layer by layer, dropinf's gradient of the weight and then, under a mask of its own, of the bias; dattri's
projections see a bias as one more input. As in dattri, block-projected gradients are multiplied by the batch size, so
that a loss must be a mean over the batch, and TRAK's divided by the square root of the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf_kernels as ops

from ..capture.layer import Layer, clean_name
from ..capture.modules import LinearUse
from ..capture.samples import Samples
from ..compressor import Compressor
from ..sketch.sketch import Sketch
from . import require
from ._dattri_flat import TracInAttributor, TRAKAttributor, check_options, make_compressor

_block: Any = require("dattri.algorithm.block_projected_if.block_projected_if", "dattri", "0.3.0")
_hook: Any = import_module("dattri.algorithm.block_projected_if.core.hook")

__all__ = ["BlockProjectedIFAttributor", "TRAKAttributor", "TracInAttributor"]


class _Use(LinearUse):
    """A linear layer of dattri's: weight and bias in one row."""

    def __init__(self, name: str, module: nn.Module, weight: Layer, bias: Layer | None) -> None:
        super().__init__(name, module, weight, bias)
        axes = [plan.out_axis for plan in (weight, bias) if plan is not None]
        self.both: Tensor | None = None
        if len(axes) == 2 and not self.is_flat and all(axis.is_gather and not axis.is_whole for axis in axes):
            self.both = torch.cat([axis.index for axis in axes if axis.index is not None], 1)
            self.group = math.gcd(*(axis.group for axis in axes))

    def compress(self, saved: Tensor, g: Tensor) -> Tensor:
        """Return the gradients [B, k] of weight and bias, side by side, times the batch size."""
        assert self.weight is not None
        n, g = len(g), g.reshape(len(g), -1, g.shape[-1])
        if self.both is not None and not g.is_cuda:  # both masks in one pass over g
            kept = ops.sketch(g, self.both, None, self.group)
            of_weight, of_bias = kept.tensor_split([self.weight.out_axis.dim], -1)
            parts = [ops.compress_linear(saved.reshape(n, -1, saved.shape[-1]), of_weight)]
            parts.append(ops.compress_norm(None, of_bias))
        else:
            parts = [c for _, c in self.emit(saved, g, Samples(n))][::-1]
        return torch.cat([c.flatten(1) for c in parts], 1).mul_(n)


class _LinearFunction(torch.autograd.Function):
    """A linear map that keeps the sketch of its input for backward, and there hands on the compressed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, use: _Use, take: Any) -> Tensor:
        out = F.linear(x.to(weight.dtype), weight, bias)
        ctx.save_for_backward(weight, use.save(x, out))
        ctx.use, ctx.take = use, take
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        weight, saved = ctx.saved_tensors
        ctx.take(ctx.use.compress(saved, g))
        return (g @ weight.to(g.dtype) if ctx.needs_input_grad[0] else None), None, None, None, None


class _HookManager(_hook.HookManager):
    """dattri's, which keeps compressed inputs where that keeps whole ones, and adds up the calls of one module."""

    def __init__(self, uses: Sequence[_Use], *args: Any) -> None:
        self.uses = uses
        self.compressed_grads: list[Tensor | None]
        super().__init__(*args)

    def _custom_linear_forward(self, module: nn.Linear, idx: int, module_input: Tensor) -> Any:
        if not self.hooks_enabled:
            return super()._custom_linear_forward(module, idx, module_input)

        def take(rows: Tensor) -> None:
            before = self.compressed_grads[idx]
            self.compressed_grads[idx] = rows if before is None else before + rows

        return _LinearFunction.apply(module_input, module.weight, module.bias, self.uses[idx], take)

    def get_compressed_grads(self) -> list[Tensor]:
        """Return the gradients of one batch: [B, k] of each layer, empty where it was not used."""
        found = [torch.empty(0) if rows is None else rows for rows in self.compressed_grads]
        self.compressed_grads = [None] * len(found)
        return found


class BlockProjectedIFAttributor(_block.BlockProjectedIFAttributor):
    """dattri's, of gradients that are compressed as they are formed."""

    def __init__(self, *args: Any, sketch: Sketch | Compressor, **options: Any) -> None:
        check_options(options)
        super().__init__(*args, **options)
        self.compressor = make_compressor(self.model, sketch, self.layer_names)
        plans = {plan.parameter: plan for plan in self.compressor.layers.values()}
        self.compressors = [self._use(name, plans) for name in self.layer_names]

    def _use(self, name: str, plans: Mapping[str, Layer]) -> _Use:
        weight, bias = (plans.get(clean_name(f"{name}.{attribute}")) for attribute in ("weight", "bias"))
        module, device = self.model.get_submodule(name), torch.device(self.device)
        if weight is None or weight.kind != "linear" or weight.route != "hook" or not isinstance(module, nn.Linear):
            raise ValueError(
                f"layer_names: {name} ({type(module).__name__}) is not a linear layer, called as a module, with a "
                "weight of its own that the compressor tracks; leave it out"
            )
        return _Use(name, module, weight.to(device), None if bias is None else bias.to(device))

    def cache(self, full_train_dataloader: Any) -> None:
        """Cache what dattri caches, with dropinf's hooks."""
        self._hooked(super().cache, full_train_dataloader)

    def _compute_test_gradients(self, test_dataloader: Any) -> Any:
        return self._hooked(super()._compute_test_gradients, test_dataloader)

    def _hooked(self, run: Callable[[Any], Any], loader: Any) -> Any:
        self.hook_manager = manager = _HookManager(self.compressors, self.model, self.layer_names, self.device)
        try:
            return run(loader)
        finally:
            manager.remove_hooks()
