"""dattri's attributors that project flattened per-sample gradients, on those that a sketch compresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.layer import clean_name
from ..compressor import Compressor
from ..sketch.sketch import Sketch
from . import require

require("dattri", "dattri", "0.3.0")


_trak: Any = import_module("dattri.algorithm.trak")
_tracin: Any = import_module("dattri.algorithm.tracin")


def make_compressor(model: nn.Module, sketch: Sketch | Compressor, layers: Sequence[str] | None) -> Compressor:
    if isinstance(sketch, Compressor):
        return sketch
    return Compressor(model, sketch, _no_loss, layers=layers)


def _no_loss(*_: Any) -> Tensor:
    raise RuntimeError("this compressor has no loss: dattri's task has it; make another with dropinf.Compressor")


def check_options(options: dict[str, Any]) -> None:
    for name in ("sparsifier_kwargs", "projector_kwargs"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is {options[name]!r}; the sketch takes its place: leave it out")


class _Task:
    """dattri's task, whose flattened gradients [N, P] come out compressed, [N, K]."""

    def __init__(self, task: Any, compressor: Compressor, layer_name: Sequence[str] | None, device: Any) -> None:
        sizes = {name: p.numel() for name, p in task.get_model().named_parameters() if p.requires_grad}
        names = list(sizes) if layer_name is None else layer_name
        plans = {plan.parameter: plan.to(torch.device(device)) for plan in compressor.layers.values()}
        missing = next((name for name in names if clean_name(name) not in plans), None)
        if missing is not None:
            raise ValueError(f"layer_name: {missing} is not a parameter that the compressor tracks; leave it out")
        self._task, self._plans = task, [plans[clean_name(name)] for name in names]
        self._sizes = [sizes[name] for name in names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def get_grad_loss_func(self, *args: Any, **options: Any) -> Callable[..., Tensor]:
        """Return the function of dattri's task, with its gradients compressed."""
        return self._compressed(self._task.get_grad_loss_func(*args, **options))

    def get_grad_target_func(self, *args: Any, **options: Any) -> Callable[..., Tensor]:
        """Return the function of dattri's task, with its gradients compressed."""
        return self._compressed(self._task.get_grad_target_func(*args, **options))

    def _compressed(self, gradients: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: self._compress(gradients(*args))

    def _compress(self, g: Tensor) -> Tensor:
        parts = zip(self._plans, g.split(self._sizes, 1), strict=True)
        return torch.cat([plan.compress_exact(part.view(-1, *plan.shape)).flatten(1) for plan, part in parts], 1)


class _Projected:
    """An attributor of projected gradients, on those that `_Task` compresses."""

    def __init__(self, task: Any, *args: Any, sketch: Sketch | Compressor, **options: Any) -> None:
        check_options(options)
        names, device = options.get("layer_name"), options.get("device", "cpu")
        names = [names] if isinstance(names, str) else names
        self.compressor = make_compressor(task.get_model(), sketch, names)
        made = _Task(task, self.compressor, names, device)
        super().__init__(made, *args, **{**options, "layer_name": names})  # type: ignore[call-arg]
        # Not by its argument, with which dattri changes the default of every later attributor.
        self.projector_kwargs = {"proj_dim": 1, "proj_max_batch_size": 8, "proj_type": "identity", "device": device}


class TRAKAttributor(_Projected, _trak.TRAKAttributor):
    """dattri's, of compressed gradients. A mask may keep entries that are always zero: ``regularization`` is needed."""


class TracInAttributor(_Projected, _tracin.TracInAttributor):
    """dattri's, of compressed gradients: TracIn, Grad-Dot and, with ``normalized_grad``, Grad-Cos."""
