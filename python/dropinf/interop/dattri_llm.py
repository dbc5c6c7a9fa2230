"""dattri-llm 0.1.0 with dropinf's sketches as its capture-time projection.

    from dropinf.interop.dattri_llm import sketched
    config = sketched(HookManagerConfig(linear_io=[r"attn|mlp"], capture_style="auto"), model, dropinf.Dropout(64))

The result is a `HookManagerConfig`, for all that takes one: ``HookManager``, and ``attribute`` and ``cache`` of every
attributor. Its linear layers have style "logra": inputs are sketched in forward, output gradients in backward, and the
two are kept as factors, or multiplied, as ``capture_style`` says. Nothing of dattri-llm is patched: the sketch comes as
the config's ``projector``. Of that, dattri-llm keeps the matrix; ours is a matrix that knows which entries it picks, so
that the products that `ProjectionMatrix` forms, ``x @ matrix`` and ``addmm(row, x, matrix)``, are gathers.

A row of a layer is [k_out, k_in] of dropinf's gradient of the weight; where there is a bias, [k_out, k_in + 1]: its
gradient, at the outputs that the weight's mask keeps, is the last column. As in dattri-llm, the gradient is that of the
loss itself: of a mean over B samples, divided by B.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..capture.layer import Layer, clean_name
from ..compressor import Compressor
from ..sketch.axis import Axis
from ..sketch.sketch import Sketch
from . import require

_config: Any = require("dattri_llm.gradient.hooks.config", "dattri-llm", "0.1.0")
_projection: Any = import_module("dattri_llm.gradient.ops.projection")

_ROWS = 256  # of a matrix made at a time


def sketched(config: Any, model: nn.Module, sketch: Sketch | Compressor) -> Any:
    """Return a copy of the config in which the linear layers that it hooks are sketched.

    ``sketch``: a sketch, or a `Compressor` of the same model that was calibrated or loaded. The config's own entries of
    ``projection_kwargs`` for other layers stay; its "__default__" is dropped.

    Raises:
        ValueError: a hooked layer that is not linear and has no entry of its own, or that the compressor cannot sketch.
    """
    root: nn.Module = getattr(model, "module", model)  # as HookManager names them
    modules = dict(root.named_modules())
    hooks = _config.resolve_hook_assignments(root, config)
    hooked = [name for name, kind in hooks.items() if kind != _config.PARAM_GRAD]
    own = {n: entry for n, entry in (config.projection_kwargs or {}).items() if n in hooked and not _linear(modules[n])}
    names = [name for name in hooked if name not in own]
    for name in names:
        if not _linear(modules[name]):
            raise ValueError(
                f"config: layer {name} ({type(modules[name]).__name__}) is not linear; leave it out, or give it an "
                'entry of its own in projection_kwargs, such as {"style": "mask", "proj_dim": 64}'
            )
    if not names:
        raise ValueError("config: it hooks no linear layer; name some in linear_io, or pass REGISTER_ALL")
    weights = {name: f"{clean_name(name)}.weight" for name in names}
    if not isinstance(sketch, Compressor):
        sketch = Compressor(root, sketch, _no_loss, layers=list(weights.values()))
    found = {plan.parameter: plan for plan in sketch.layers.values()}
    plans: dict[str, Layer] = {}
    for name, weight in weights.items():
        plan = found.get(weight)
        if plan is None or plan.kind != "linear" or plan.in_axis is None or plan.route != "hook":
            raise ValueError(
                f"config: layer {name} is not a linear layer, called as a module, with a weight of its own whose two "
                "sides the compressor sketches; leave it out, or use mode='factorized'"
            )
        plans[name] = plan
    made = copy.copy(config)
    made.projector = _Projector(plans, config.projector)
    made.projection_kwargs = own | {
        name: {"style": "logra", "proj_dim": plan.out_axis.dim, "layer": name} for name, plan in plans.items()
    }
    return made


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _no_loss(*_: Any) -> Tensor:
    raise RuntimeError("this compressor has no loss: dattri-llm has it; make another with dropinf.Compressor")


class _Projector:
    """dattri's ``random_project`` protocol: what projects rows of the identity is asked for, and gives the matrix."""

    def __init__(self, plans: Mapping[str, Layer], other: Callable[..., Any] | None) -> None:
        self.plans, self.other = plans, other

    def __call__(
        self, feature: Tensor, batch_size: int, *, proj_seed: int = 0, layer: str | None = None, **options: Any
    ) -> Callable[[Tensor], Tensor]:
        if layer is None:  # an entry of the config's own
            factory = _projection.DattriProjector(self.other).factory
            made: Callable[[Tensor], Tensor] = factory(feature, batch_size, proj_seed=proj_seed, **options)
            return made
        plan = self.plans[layer]
        axis = (plan.in_axis if proj_seed else plan.out_axis).to(feature.device)  # type: ignore[union-attr]

        def rows(block: Tensor) -> Tensor:
            found = torch.cat([axis.apply(part[:, : axis.size]) for part in block.split(_ROWS)])
            return _Matrix.of(torch.cat([found, block[:, axis.size :]], 1), axis)

        return rows


class _Matrix(Tensor):
    """The matrix of a sketch, whose products are the sketch; to all else, a matrix like any other."""

    axis: Axis

    @classmethod
    def of(cls, values: Tensor, axis: Axis) -> Tensor:
        made = values.as_subclass(cls)
        made.axis = axis
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        x, matrix = args[-2:] if len(args) > 1 else (args[0], None)
        product = func in (Tensor.matmul, torch.matmul, torch.addmm) and not kwargs
        if product and isinstance(matrix, cls) and x.ndim == 2 and x.shape[1] == matrix.axis.size == len(matrix):
            found = matrix.axis.apply(x).to(x.dtype)
            ones = matrix.shape[1] - found.shape[1]  # a column for the bias, which the row of addmm sets
            found = F.pad(found, (0, ones)) if ones else found
            return found + args[0] if func is torch.addmm else found
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func is torch.cat and kwargs == {"dim": 0} and all(isinstance(part, cls) for part in args[0]):
            return cls.of(out, args[0][0].axis)
        if func is Tensor.to or (func is Tensor.__getitem__ and args[1] == slice(None, -1)):
            return cls.of(out, args[0].axis)
        return out
