"""What a compressor tracks: a plan per parameter, decided from the modules alone, before any data is seen."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..sketch.axis import Axis
from ..sketch.draws import Place
from ..sketch.sketch import Sketch, Statistics
from .adapters import adapter_parameters, warn_adapters
from .kinds import module_kind
from .layer import Layer, LayerKind, clean_name, matrix_shape
from .moments import Need
from .names import no_match

LayerFilter = str | type | Iterable["str | type"] | None

# A covariance has size^2 entries; longer axes use their diagonal.
MAX_COVARIANCE = 8192
# These read the weights of their child modules without calling them.
_READS_CHILD_WEIGHTS = (nn.MultiheadAttention,)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter to track, before its axes are made."""

    name: str
    kind: LayerKind
    parameter: str
    tensor: nn.Parameter
    transposed: bool
    route: Literal["hook", "exact"]
    in_statistics: Statistics = "covariance"  # one-hot inputs have a diagonal second moment
    out_statistics: Statistics = "covariance"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def plan(self, out_axis: Axis, in_axis: Axis | None) -> Layer:
        """Return the layer's plan, with these axes."""
        return Layer(self.name, self.kind, self.parameter, self.shape, self.transposed, out_axis, in_axis, self.route)

    def kept_whole(self) -> Layer:
        """Return the plan that calibration runs with: it keeps everything."""
        return self.plan(Axis(1), Axis(1))


def _selected(layers: LayerFilter, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
    if layers is None:
        return None
    wanted = [layers] if isinstance(layers, str | type) else list(layers) if isinstance(layers, Iterable) else [layers]
    for pattern in wanted:
        if not isinstance(pattern, str | type):
            what = type(pattern).__name__ if isinstance(pattern, nn.Module) else repr(pattern)
            raise TypeError(f"layers: it must be name patterns or module types, such as 'encoder.*', got {what}")
    if not wanted:
        raise ValueError("layers: it is empty; name at least one module, or pass None for every trainable parameter")
    modules = [(clean_name(n), m) for n, m in model.named_modules(remove_duplicate=False)]

    def hit(pattern: str | type, name: str, module: nn.Module) -> bool:
        if isinstance(pattern, str):
            return fnmatch.fnmatchcase(name, pattern)
        return isinstance(module, pattern)

    for pattern in wanted:
        names = [n for n, m in modules if hit(pattern, n, m)]
        parameters = [clean_name(n) for n, _ in model.named_parameters(remove_duplicate=False)]
        if not names and not any(isinstance(pattern, str) and fnmatch.fnmatchcase(n, pattern) for n in parameters):
            raise ValueError(no_match(pattern, modules, parameters))
    return lambda name, module: any(hit(p, name, module) for p in wanted)


def find_targets(model: nn.Module, layers: LayerFilter) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the parameters to track, by layer name, and for every other parameter why it is not tracked."""
    selected = _selected(layers, model)
    frozen = layers is None and not any(p.requires_grad for p in model.parameters())
    adapter = adapter_parameters(model) if frozen else {}
    if adapter:
        warn_adapters(adapter)
    uses: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=True):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses.setdefault(parameter, []).append((clean_name(module_name), attribute, module))
    silent = {c for m in model.modules() if isinstance(m, _READS_CHILD_WEIGHTS) for c in m.modules()}
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    for parameter, sites in uses.items():
        target = _target(parameter, sites, silent)
        chosen = selected is None or any(
            selected(module_name, module) or selected(f"{module_name}.{attribute}".lstrip("."), parameter)  # type: ignore[arg-type]
            for module_name, attribute, module in sites
        )
        if not chosen:
            skipped[target.name] = "not picked by layers="
        elif selected is None and not (parameter.requires_grad or frozen):
            skipped[target.name] = "frozen (requires_grad is False); name it in layers= to track it"
        elif adapter and parameter not in adapter:
            skipped[target.name] = "frozen, beside a PEFT adapter; layers='*' tracks it"
        elif parameter.numel() == 0:
            skipped[target.name] = "has no entries"
        else:
            check_real(target)
            targets[target.name] = target
    return targets, skipped


def no_parameters(model: nn.Module) -> str:
    """Return why a model without parameters has none."""
    if isinstance(model, torch.jit.ScriptModule):
        return "it is a script without parameters (torch.jit.freeze makes them constants); pass it as it was before"
    return "it has no parameters"


def check_real(target: Target) -> None:
    """Raise ValueError for a complex parameter."""
    if target.tensor.is_complex():
        raise ValueError(
            f"model: its parameter {target.parameter} is complex ({target.tensor.dtype}), and only real ones are "
            "tracked; name the others in layers=, or make it of two real parameters (torch.complex(re, im) in forward)"
        )


def _target(parameter: nn.Parameter, sites: Sequence[tuple[str, str, nn.Module]], silent: set[nn.Module]) -> Target:
    module_name, attribute, module = sites[0]
    full_name = f"{module_name}.{attribute}".lstrip(".")
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"model: {full_name} is not initialised; run one forward pass before compressing")
    kinds = [module_kind(m) if a in ("weight", "bias") else None for _, a, m in sites]
    route: Literal["hook", "exact"] = "exact" if any(m in silent for *_, m in sites) else "hook"
    if None in kinds or (len(sites) > 1 and not set(kinds) <= {"linear", "embedding"}):
        return Target(full_name, "flat", full_name, parameter, False, "exact")
    if attribute == "bias":
        return Target(full_name, "bias", full_name, parameter, False, route)
    name = module_name or attribute
    is_conv1d = type(module).__name__ == "Conv1D"
    if len(sites) > 1:
        # Seen as the matrix [rows of the embedding, hidden], which is the output layer's own orientation.
        transposed = any(type(m).__name__ == "Conv1D" for *_, m in sites)
        if transposed and not all(type(m).__name__ == "Conv1D" for *_, m in sites):
            return Target(full_name, "flat", full_name, parameter, False, "exact")
        return Target(name, "tied", full_name, parameter, transposed, route, out_statistics="energy")
    kind = kinds[0]
    assert kind is not None
    if kind == "embedding":
        return Target(name, kind, full_name, parameter, True, route, in_statistics="energy")
    return Target(name, kind, full_name, parameter, is_conv1d, route)


@dataclass(frozen=True)
class AxisPlan:
    """One axis of a target before it is drawn: its length, what is stored of it, and the place that its mask is of."""

    size: int
    dim: int
    place: Place


def axis_statistics(target: Target, sketch: Sketch) -> dict[str, Need]:
    """Return what a calibration pass must gather for a target, by side."""
    needs = {}
    for name, plan in _axes(target, sketch).items():
        wanted = sketch.statistics_of(plan.size, plan.dim, plan.place)
        if wanted is None:
            continue
        finest = {"out": target.out_statistics, "in": target.in_statistics}.get(name, "energy")
        kept = sketch.survivors(plan.size, plan.dim, plan.place) if wanted == "survivors" else None
        if wanted == "energy" or finest == "energy":
            needs[name] = Need("energy", plan.size)
        elif kept is not None:
            needs[name] = Need("covariance", kept.dim, kept)
        else:
            needs[name] = Need("energy" if plan.size > MAX_COVARIANCE else "covariance", plan.size)
    return needs


def _axes(target: Target, sketch: Sketch) -> dict[str, AxisPlan]:
    """Return the axes of a target, by side."""
    rows, columns = matrix_shape(target.shape, target.transposed)
    if target.kind in ("bias", "norm") or len(target.shape) < 2:
        return {"out": AxisPlan(rows * columns, sketch.dims(target.name)[0], Place(target.name, "out"))}
    if sketch.mode == "flat" or (target.kind == "flat" and not sketch.dense):
        if rows * columns > 2**31 - 1:
            raise ValueError(f"layer {target.name}: {rows * columns} entries are too many for a flat mask's int32")
        return {"flat": AxisPlan(rows * columns, sketch.dim_flat(target.name), Place(target.name, "flat"))}
    return {
        "out": AxisPlan(rows, sketch.dims(target.name)[0], Place(target.name, "out")),
        "in": AxisPlan(columns, sketch.dims(target.name)[1], Place(target.name, "in")),
    }


def make_layer(target: Target, sketch: Sketch, statistics: Mapping[str, Tensor]) -> Layer:
    """Draw a target's sketches, and return its plan."""
    with torch.device("cpu"):  # whatever the default is: masks are the same everywhere
        axes = {
            name: sketch.make(plan.size, plan.dim, plan.place, statistics.get(name))
            for name, plan in _axes(target, sketch).items()
        }
    return target.plan(axes.get("flat") or axes["out"], axes.get("in"))
