"""TRAK (traker 0.3.2) with dropinf's sketches as its projector.

    from dropinf.interop.trak import Projector
    traker = TRAKer(model, "image_classification", n, projector=Projector(model, dropinf.Dropout(64)), lambda_reg=1e-3)

A plain mask is a gather of the per-sample gradients that TRAK has computed. With
``gradient_computer=projector.computer()`` besides, they are compressed as they are formed: TRAK's two extension points,
`AbstractProjector` and `AbstractGradientComputer`, and nothing of it is patched.

TRAK divides rows by the square root of its number of parameters P and stores them in float16, in which entries of a
gradient, unlike dense projections, would underflow. So rows are multiplied by sqrt(P) before, which gives them the mean
square of TRAK's own projections: what it stores are dropinf's gradients themselves, layer by layer, and a
``lambda_reg`` found for its projections fits. It must not be 0: a mask may keep an entry that is always zero, and TRAK
inverts the matrix of all. All checkpoints share one mask. Frozen parameters are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.layer import Layer, clean_name
from ..compressor import Compressor
from ..gradients import Gradients
from ..sketch.sketch import Sketch
from ..workload import unwrap
from . import require

_projectors: Any = require("trak.projectors", "traker", "0.3.2")
_computers: Any = import_module("trak.gradient_computers")
_outputs: Any = import_module("trak.modelout_functions")

Outputs = Callable[[nn.Module, Any], Tensor]


class Projector(_projectors.AbstractProjector):
    """Compresses TRAK's gradients.

    ``sketch``: a sketch, or a `Compressor` of the same model that was calibrated or loaded; its loss is then the model
    output. ``grad_wrt``: TRAKer's, if it has one. ``scale``: what rows are multiplied by, by default sqrt(P).
    """

    def __init__(
        self,
        model: nn.Module,
        sketch: Sketch | Compressor,
        *,
        grad_wrt: Iterable[str] | None = None,
        scale: float | None = None,
    ) -> None:
        self.outputs: Outputs | None = None
        chosen = None if grad_wrt is None else list(grad_wrt)
        if isinstance(sketch, Compressor):
            self.compressor, self.outputs = sketch, sketch.loss_fn
        else:
            self.compressor = Compressor(model, sketch, self._losses, layers=chosen)
        self.plans = list(self.compressor.layers.values())
        self._sizes = {clean_name(name): p.numel() for name, p in unwrap(model).named_parameters()}
        total = sum(size for name, size in self._sizes.items() if chosen is None or name in chosen)
        self.scale = math.sqrt(total) if scale is None else scale
        found = hashlib.blake2b(f"{sorted(self.compressor.digest().items())} {self.scale}".encode(), digest_size=8)
        dim = sum(math.prod(plan.stored_shape) for plan in self.plans)
        device = next(model.parameters()).device
        drawn = self.compressor.sketch  # None where the masks are an index's
        # TRAK refuses to go on in a folder whose projections were of another type.
        super().__init__(total, dim, 0 if drawn is None else drawn.seed, f"dropinf {found.hexdigest()}", device)

    def project(self, grads: Tensor | Mapping[str, Tensor] | Gradients, model_id: int) -> Tensor:  # noqa: ARG002
        """Compress gradients by parameter, flattened [B, P], or compressed already: [B, proj_dim].

        Raises:
            ValueError: a parameter that the projector compresses is missing.
        """
        if isinstance(grads, Gradients):
            rows = grads.flat
        else:
            if isinstance(grads, Tensor):
                parts = grads.split(list(self._sizes.values()), 1)
                grads = dict(zip(self._sizes, parts, strict=True))
            by_name = {clean_name(name): g for name, g in grads.items()}
            device = next(iter(grads.values())).device
            self.plans = [plan.to(device) for plan in self.plans]
            rows = torch.cat([self._compress(plan, by_name) for plan in self.plans], 1)
        return rows.to(torch.promote_types(rows.dtype, torch.float32)) * self.scale

    def _compress(self, plan: Layer, grads: Mapping[str, Tensor]) -> Tensor:
        if plan.parameter not in grads:
            raise ValueError(f"grads have no {plan.parameter}; give the projector TRAKer's grad_wrt")
        g = grads[plan.parameter].detach()
        return plan.compress_exact(g.reshape(len(g), *plan.shape)).flatten(1)

    def computer(self, outputs: Outputs | None = None) -> Callable[..., GradientComputer]:
        """Return TRAKer's ``gradient_computer``, which compresses rows as they are formed.

        ``outputs(model, batch) -> [B]``: the model output of each sample; for image classification TRAK's own.
        """
        self.outputs = outputs or self.outputs
        return lambda **options: GradientComputer(self, **options)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        assert self.outputs is not None
        return self.outputs(model, batch)


class GradientComputer(_computers.FunctionalGradientComputer):
    """TRAK's, on compressed gradients; see `Projector.computer`."""

    def __init__(self, projector: Projector, *, model: nn.Module, task: Any, **options: Any) -> None:
        super().__init__(model=model, task=task, **options)
        self.projector = projector
        if unwrap(model) is not projector.compressor.model:
            raise ValueError("model: it is not the one that the projector was made with; give both the same")
        tracked, wanted = {plan.parameter for plan in projector.plans}, options.get("grad_wrt")
        if wanted is not None and {clean_name(name) for name in wanted} != tracked:
            raise ValueError("grad_wrt: it is not the projector's; give both the same")
        images = (_outputs.ImageClassificationModelOutput, _outputs.IterativeImageClassificationModelOutput)
        if projector.outputs is None and isinstance(task, images):
            projector.outputs = _margins
        if projector.outputs is None:
            raise ValueError(
                f"task: {type(task).__name__} has no output of a whole batch; pass it: computer(outputs), with "
                "outputs(model, batch) -> [B]"
            )

    def compute_per_sample_grad(self, batch: Iterable[Tensor]) -> Gradients:
        """Return the compressed gradients of a batch."""
        return self.projector.compressor.compress([batch])


def _margins(model: nn.Module, batch: Any) -> Tensor:
    margins: Tensor = _outputs.IterativeImageClassificationModelOutput.get_output(model, None, None, *batch)
    return margins
