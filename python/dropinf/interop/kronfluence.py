"""kronfluence's factors and scores on compressed gradients.

`prepare_model` takes the place of kronfluence's: what its hooks find is sketched first. So covariances, eigenvectors,
eigenvalues, query gradients and scores are of the compressed space, in every strategy. It reaches into kronfluence's
`TrackedLinear` and `TrackedConv2d`: subclasses of them sketch what their methods are given.

A bias is kronfluence's last input column, which no sketch drops: gradients are [k_out, k_in + 1] where `Compressor` has
[k_out, k_in] and another layer. kronfluence averages a convolution's channel groups: it is exact for `groups=1` only.

`CompressGradients` does the same by kronfluence's documented hook, on gradients that were formed whole. Covariances are
whole there, so it is for the strategies that have none: "identity" and "diagonal".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.layer import Layer, matrix_shape
from ..sketch.axis import Axis
from ..sketch.draws import Place
from ..sketch.sketch import Sketch
from . import require

_kronfluence: Any = require("kronfluence", "kronfluence", "1.0.1")
_module: Any = require("kronfluence.module", "kronfluence", "1.0.1")
_linear: Any = require("kronfluence.module.linear", "kronfluence", "1.0.1")
_conv: Any = require("kronfluence.module.conv2d", "kronfluence", "1.0.1")

Plan = Sketch | Mapping[str, Layer]


class _Compressed:
    """A tracked module that sketches output gradients; the two below sketch inputs, each at its own place."""

    out_axis: Axis
    in_axis: Axis

    def _apply_axis(self, side: str, x: Tensor) -> Tensor:
        axis: Axis = getattr(self, side)
        if any(table.device != x.device for table in axis.tensors().values()):
            axis = axis.to(x.device)
            setattr(self, side, axis)
        return axis.apply(x)

    def _outputs(self, g: Tensor) -> Tensor:
        return self._apply_axis("out_axis", g)

    def get_flattened_gradient(self, output_gradient: Tensor) -> Any:
        return super().get_flattened_gradient(self._outputs(output_gradient))  # type: ignore[misc]

    def _sketched(self, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "output_gradient": self._outputs(found["output_gradient"])}

    def compute_summed_gradient(self, **found: Any) -> Any:
        return super().compute_summed_gradient(**self._sketched(found))  # type: ignore[misc]

    def compute_per_sample_gradient(self, **found: Any) -> Any:
        return super().compute_per_sample_gradient(**self._sketched(found))  # type: ignore[misc]

    def compute_pairwise_score(self, **found: Any) -> Any:
        return super().compute_pairwise_score(**self._sketched(found))  # type: ignore[misc]

    def compute_self_measurement_score(self, **found: Any) -> Any:
        return super().compute_self_measurement_score(**self._sketched(found))  # type: ignore[misc]


class _Linear(_Compressed, _linear.TrackedLinear):
    def get_flattened_activation(self, input_activation: Tensor) -> Any:
        return super().get_flattened_activation(self._apply_axis("in_axis", input_activation))

    def _flatten_input_activation(self, input_activation: Tensor) -> Any:
        return super()._flatten_input_activation(self._apply_axis("in_axis", input_activation))


class _Conv2d(_Compressed, _conv.TrackedConv2d):
    def _outputs(self, g: Tensor) -> Tensor:
        return super()._outputs(g.movedim(1, -1)).movedim(-1, 1)

    def _patches(self, flat: Tensor) -> Tensor:
        kept = self._apply_axis("in_axis", flat[:, : self.in_axis.size])
        return torch.cat([kept, flat[:, self.in_axis.size :]], 1)

    def get_flattened_activation(self, input_activation: Tensor) -> Any:
        flat, count = super().get_flattened_activation(input_activation)
        return self._patches(flat), count

    def _flatten_input_activation(self, input_activation: Tensor) -> Any:
        return self._patches(super()._flatten_input_activation(input_activation))


_COMPRESSED = {_linear.TrackedLinear: _Linear, _conv.TrackedConv2d: _Conv2d}


def prepare_model(model: nn.Module, task: Any, sketch: Plan) -> nn.Module:
    """Prepare the model in place as kronfluence's `prepare_model` does, with compressed gradients.

    `sketch`: a sketch that needs no calibration, or the `layers` of a `dropinf.Compressor` that is calibrated.

    Raises:
        ValueError: a model that is one layer; a sketch that needs calibration, or masks flattened gradients; a tracked
            module that is missing from `layers`, or of a kind that kronfluence does not ship.
    """
    if not list(model.children()):
        raise ValueError(
            f"model is one {type(model).__name__}; kronfluence wraps layers within a model: nn.Sequential(model)"
        )
    model = _kronfluence.prepare_model(model, task)
    for module in list(model.modules()):
        if isinstance(module, _module.TrackedModule):
            if type(module) not in _COMPRESSED:
                raise ValueError(f"layer {module.name}: no sketch for a {type(module).__name__}; leave it untracked")
            module.out_axis, module.in_axis = _axes(sketch, module.name, module.original_module.weight)
            module.__class__ = _COMPRESSED[type(module)]
    return model


class CompressGradients:
    """A mixin before kronfluence's `Task`. `layers`: of a `dropinf.Compressor`, made before the model is prepared."""

    enable_post_process_per_sample_gradient = True
    layers: Mapping[str, Layer]

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        """Compress gradients [B, d_out, d_in (+ 1)] to [B, k_out, k_in (+ 1)]."""
        layer = _layer(self.layers, module_name).to(gradient.device)
        assert layer.in_axis is not None
        parts = gradient.split([layer.in_axis.size, gradient.shape[2] - layer.in_axis.size], 2)
        columns = torch.cat([layer.in_axis.apply(parts[0]), parts[1]], 2)
        return layer.out_axis.apply(columns.mT).mT


def _axes(sketch: Plan, name: str, weight: Tensor) -> tuple[Axis, Axis]:
    """Return what sketches a layer's outputs and inputs: the masks that a `Compressor` would draw."""
    if not isinstance(sketch, Sketch):
        layer = _layer(sketch, name)
        assert layer.in_axis is not None
        return layer.out_axis, layer.in_axis
    axes = []
    for side, size, dim in zip(("out", "in"), matrix_shape(tuple(weight.shape), False), sketch.dims(name), strict=True):
        place = Place(name, side)
        if sketch.mode == "flat" or sketch.statistics_of(size, dim, place):
            way_out = "calibrate a dropinf.Compressor on the model, and pass its layers"
            what = "masks flattened gradients" if sketch.mode == "flat" else f"needs statistics of the data: {way_out}"
            raise ValueError(f"{sketch!r} {what}")
        axes.append(sketch.make(size, dim, place))
    return axes[0], axes[1]


def _layer(layers: Mapping[str, Layer], name: str) -> Layer:
    if name not in layers or layers[name].in_axis is None:
        known = ", ".join(layers) or "none"
        raise ValueError(f"layer {name} is tracked by kronfluence, and not one of the layers with two axes: {known}")
    return layers[name]
