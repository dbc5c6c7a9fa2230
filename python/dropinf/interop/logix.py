"""LogIX (logix-ai 0.1.1) with dropinf's sketches in place of its LoRA modules.

    from dropinf.interop.logix import compress
    compress(run, dropinf.Dropout(64))  # after run.watch(model); leave the scheduler's lora at "none"

Contexts, scheduler, log files and influence scores work as before, and the Hessians "raw", "kfac" and "ekfac" are those
of the compressed space, as with LoRA; but no module is added. What this reaches into: ``run.logger`` becomes a subclass
with an ``add_module``, ``_forward_hook_fn``, ``_backward_hook_fn`` and ``_grad_hook_fn`` of its own. The last keeps the
sketched input alone and forms [n, k_out, k_in] at once; LogIX's keeps all of the input and forms one for each position.

Of LogIX itself: its hooks stay on the model after a context, until the next one; its ``initialize_from_log`` needs
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 since torch 2.6; the first damping is kept for all later calls (`gradients` and
`dropinf.score` take others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..builder import GradientsBuilder
from ..capture.convolution import ConvUse
from ..capture.kinds import USES
from ..capture.layer import Layer
from ..capture.modules import Use
from ..capture.samples import Samples
from ..capture.taps import inserted
from ..compressor import Compressor
from ..gradients import Gradients
from ..sketch.sketch import Sketch
from . import require

require("logix", "logix-ai", "0.1.1")


_logger: Any = import_module("logix.logging.logger")

_ROWS = nn.Linear(1, 1)  # LogIX asks a module's type how data become rows: [n, t, d] as a linear layer's


def compress(run: Any, sketch: Sketch | Compressor) -> Compressor:
    """Make a ``LogIX`` that watches a model log compressed gradients, and freeze what it watches, as its LoRA does.

    A sketch that is calibrated comes as a `Compressor` of the same model.

    Raises:
        ValueError: no watched model; a watched module that is neither a linear layer nor a convolution, or is not
            tracked by the compressor.
    """
    watched = run.logger.modules_to_name
    if not watched:
        raise ValueError("run: it watches no module; call run.watch(model) first")
    if isinstance(sketch, Sketch):
        sketch = Compressor(run.model, sketch, _no_loss, layers=[f"{name}.weight" for name in watched.values()])
    logger = run.logger
    logger.__class__, logger.compressor, logger.uses = _SketchedLogger, sketch, {}
    for module, name in watched.items():
        logger.prepare(name, module)
    return sketch


def gradients(run: Any) -> Gradients:
    """Return what a run logged, for dropinf's own Fisher and scores.

    Its rows are those of ``run.build_log_dataset()``.
    """
    logs, digest = run.build_log_dataset(), run.logger.compressor.digest()
    plans: dict[str, Layer] = {name: use.weight for name, use in run.logger.uses.items()}
    shapes = {plan.name: plan.stored_shape for plan in plans.values()}
    rows = [{p.name: log[name]["grad"].view(1, *p.stored_shape) for name, p in plans.items()} for _, log in logs]
    dtype = next(iter(rows[0].values())).dtype
    builder = GradientsBuilder(shapes, {name: digest[name] for name in shapes}, capacity=len(rows), dtype=dtype)
    for row in rows:
        builder.append(row)
    return builder.finish()


class _SketchedLogger(_logger.HookLogger):
    compressor: Compressor
    uses: dict[str, Use]

    def add_module(self, module_name: str, module: nn.Module) -> None:
        self.prepare(module_name, module)
        super().add_module(module_name, module)

    def prepare(self, name: str, module: Any) -> None:
        """Find the plan of a watched module, and freeze the module: the whole gradient of its weight is not needed."""
        parameters = dict(self.compressor.model.named_parameters())
        plans = [p for p in self.compressor.layers.values() if parameters.get(p.parameter) is module.weight]
        if not plans or plans[0].kind not in ("linear", "conv"):
            raise ValueError(
                f"compress: module {name} ({type(module).__name__}) is not a linear layer or convolution that the "
                'compressor tracks; leave it out with name_filter=, and leave lora at "none"'
            )
        self.uses[name] = USES[plans[0].kind](name, module, plans[0].to(module.weight.device), None)
        module.requires_grad_(False)

    def _forward_hook_fn(self, module: nn.Module, inputs: tuple[Tensor], module_name: str) -> None:
        with self._sketching("forward", partial(_sketched_input, self.uses[module_name])):
            super()._forward_hook_fn(module, inputs, module_name)

    def _backward_hook_fn(
        self, module: nn.Module, grad_inputs: Any, grad_outputs: tuple[Tensor], module_name: str
    ) -> None:
        with self._sketching("backward", partial(_sketched_output, self.uses[module_name])):
            super()._backward_hook_fn(module, grad_inputs, grad_outputs, module_name)

    @contextmanager
    def _sketching(self, side: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let the statistics of a side see what ``change`` makes of their data."""
        before = getattr(self.opt, side)
        setattr(self.opt, side, [_Sketched(plugin, change) for plugin in before])
        try:
            yield
        finally:
            setattr(self.opt, side, before)

    def _grad_hook_fn(self, module: nn.Module, inputs: tuple[Tensor], outputs: Tensor, module_name: str) -> Tensor:
        if not torch.is_grad_enabled():
            return outputs
        use = self.uses[module_name]
        saved = use.save(inputs[0].detach(), outputs.detach()) if self.opt.grad else None

        def backward(g: Tensor) -> None:
            if saved is None or use.weight is None:
                return
            c = use.emit_weight(use.weight, saved, g, Samples(len(g)))
            c = c.to(self.dtype or c.dtype).reshape(len(c), -1, c.shape[-1])  # a matrix each, if of one row
            names = {"state": self.state, "binfo": self.binfo, "module": module, "module_name": module_name}
            self.opt.grad[0].update(**names, log_type="grad", data=c, cpu_offload=self.cpu_offload)

        return inserted(outputs, outputs.new_zeros((), requires_grad=True), backward)


class _Sketched(NamedTuple):
    """A statistic of LogIX's, of sketched data."""

    plugin: Any
    change: Callable[[Tensor], Tensor]

    def update(self, *, module: Any, data: Tensor, **options: Any) -> None:  # noqa: ARG002
        self.plugin.update(module=_ROWS, data=self.change(data.detach()), **options)


def _sketched_input(use: Use, x: Tensor) -> Tensor:
    axis = None if use.weight is None else use.weight.in_axis
    if axis is None or (isinstance(use, ConvUse) and use.groups > 1):
        raise ValueError(
            f'compress: module {use.name} has no single input factor (mode="flat", or a grouped convolution), which '
            'statistics of activations need; use the Hessian "raw"'
        )
    return use._patches(use.inputs(x, x)) if isinstance(use, ConvUse) else axis.apply(x)


def _sketched_output(use: Use, g: Tensor) -> Tensor:
    assert use.weight is not None
    return use.weight.out_axis.apply(use.rows(g))


def _no_loss(*_: object) -> Tensor:
    raise ValueError("compress: its compressor has no loss; pass a dropinf.Compressor(run.model, sketch, loss_fn)")
