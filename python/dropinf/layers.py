"""What a compressor tracks: a plan per parameter, decided from the modules alone, before any data is seen."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from .axis import Axis
from .sketch import Sketch, Statistics

LayerKind = Literal["linear", "conv", "embedding", "norm", "bias", "tied", "flat"]
LayerFilter = str | type | Iterable["str | type"] | None

# A covariance has size^2 entries; longer axes use their diagonal.
MAX_COVARIANCE = 8192

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# These read the weights of their child modules without calling them.
_READS_CHILD_WEIGHTS = (nn.MultiheadAttention,)
_WRAPPER = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


@dataclass(frozen=True, eq=False)
class Layer:
    """The plan of one parameter: how its per-sample gradient, seen as a matrix [d_out, d_in], is compressed.

    ``out_axis`` and ``in_axis`` sketch its two sides; ``in_axis`` is None for vectors and for ``flat`` layers,
    where ``out_axis`` sketches the flattened matrix. ``route`` is ``"hook"`` where the gradient is compressed
    as it is formed and ``"exact"`` where it is computed by torch.func first.
    """

    name: str
    kind: LayerKind
    parameter: str
    shape: tuple[int, ...]
    transposed: bool
    out_axis: Axis
    in_axis: Axis | None
    route: Literal["hook", "exact"]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of one compressed gradient: (k_out, k_in) or (k,)."""
        return (self.out_axis.dim,) if self.in_axis is None else (self.out_axis.dim, self.in_axis.dim)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[d_out, d_in] of the gradient seen as a matrix; d_in is 1 for vectors."""
        return matrix_shape(self.shape, self.transposed)

    def as_matrix(self, gradient: Tensor) -> Tensor:
        """[N, *shape] -> [N, d_out, d_in]."""
        flat = gradient.reshape(len(gradient), self.shape[0] if self.shape else 1, -1)
        return flat.mT if self.transposed else flat

    @property
    def is_gather(self) -> bool:
        """Plain dropout: each stored value is one entry of the gradient."""
        return all(axis.is_gather for axis in (self.out_axis, self.in_axis) if axis is not None)

    @cached_property
    def entries(self) -> Tensor:
        """Where a gather finds what is stored in the flattened parameter, int64 [k]."""
        rows, columns = self.matrix_shape
        assert self.out_axis.index is not None
        index = self.out_axis.index[0].long()
        if self.in_axis is None:
            return (index % columns) * rows + index // columns if self.transposed else index
        assert self.in_axis.index is not None
        others = self.in_axis.index[0].long()
        found = others * rows + index[:, None] if self.transposed else index[:, None] * columns + others
        return found.flatten()

    def compress_exact(self, gradient: Tensor) -> Tensor:
        """Sketch a whole per-sample gradient [N, *shape] -> [N, *stored_shape]."""
        if self.is_gather:
            flat = gradient.reshape(len(gradient), torch.Size(self.shape).numel())
            return flat.index_select(1, self.entries).view(-1, *self.stored_shape)
        matrix = self.as_matrix(gradient)
        if self.in_axis is None:
            return self.out_axis.apply(matrix.reshape(len(matrix), -1))
        return self.out_axis.apply(self.in_axis.apply(matrix).mT).mT

    def to(self, device: torch.device) -> Layer:
        """The plan with its tables on ``device``."""
        out_axis, in_axis = self.out_axis.to(device), None if self.in_axis is None else self.in_axis.to(device)
        if out_axis is self.out_axis and in_axis is self.in_axis:
            return self
        return replace(self, out_axis=out_axis, in_axis=in_axis)


def matrix_shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """A parameter's gradient as a matrix: its first dimension against the rest."""
    rows = shape[0] if shape else 1
    columns = torch.Size(shape[1:]).numel()
    return (columns, rows) if transposed else (rows, columns)


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
        """The layer's plan, with its axes."""
        return Layer(self.name, self.kind, self.parameter, self.shape, self.transposed, out_axis, in_axis, self.route)


def module_kind(module: nn.Module) -> LayerKind | None:
    """How a module's ``weight`` is captured, or None. By ``forward``, not by class: a subclass that overrides
    ``forward`` may compute anything."""
    forward = type(module).forward
    if forward is nn.Linear.forward or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return "linear"
    if any(forward is c.forward for c in _CONVS):
        return "conv"
    if forward is nn.Embedding.forward:
        return "embedding"
    is_rms = type(module).__name__.endswith("RMSNorm")
    if any(forward is n.forward for n in _NORMS) or (is_rms and rms_epsilon(module) is not None):
        return "norm"
    return None


def rms_epsilon(module: nn.Module) -> float | None:
    """The epsilon of a transformers-style RMSNorm, which has no common base class."""
    value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return value if isinstance(value, float) else None


def clean_name(name: str) -> str:
    """A module's name without what compile, checkpoint and FSDP wrappers insert, so that masks agree."""
    return _WRAPPER.sub("", name).lstrip(".")


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
            known = ", ".join(n for n, _ in modules[1:6])
            raise ValueError(
                f"layers: {pattern!r} matches no module or parameter of this model; its modules are {known}, ..."
            )
    return lambda name, module: any(hit(p, name, module) for p in wanted)


def find_targets(model: nn.Module, layers: LayerFilter) -> tuple[dict[str, Target], dict[str, str]]:
    """Every parameter to track, by layer name, and the reason for every one that is not."""
    selected = _selected(layers, model)
    frozen = layers is None and not any(p.requires_grad for p in model.parameters())
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
            selected(module_name, module) or selected(f"{module_name}.{attribute}", parameter)  # type: ignore[arg-type]
            for module_name, attribute, module in sites
        )
        if not chosen:
            skipped[target.name] = "not picked by layers="
        elif selected is None and not (parameter.requires_grad or frozen):
            skipped[target.name] = "frozen (requires_grad is False); name it in layers= to track it"
        elif parameter.numel() == 0:
            skipped[target.name] = "has no entries"
        else:
            targets[target.name] = target
    return targets, skipped


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


@dataclass(frozen=True, eq=False)
class Need:
    """What a calibration pass must gather of one side: its ``size`` energies or their covariance, or ``kept``'s."""

    kind: Literal["energy", "covariance"]
    size: int
    kept: Axis | None = None


@dataclass(frozen=True)
class Side:
    """One axis of a target: its length, what is stored of it, and the name that its mask is drawn from."""

    size: int
    dim: int
    key: str


def axis_statistics(target: Target, sketch: Sketch) -> dict[str, Need]:
    """What a calibration pass must gather for a target, by side."""
    needs = {}
    for name, side in _sides(target, sketch).items():
        wanted = sketch.statistics_of(side.size, side.dim, side.key)
        if wanted is None:
            continue
        finest = {"out": target.out_statistics, "in": target.in_statistics}.get(name, "energy")
        kept = sketch.survivors(side.size, side.dim, side.key) if wanted == "survivors" else None
        if wanted == "energy" or finest == "energy":
            needs[name] = Need("energy", side.size)
        elif kept is not None:
            needs[name] = Need("covariance", kept.dim, kept)
        else:
            needs[name] = Need("energy" if side.size > MAX_COVARIANCE else "covariance", side.size)
    return needs


def _sides(target: Target, sketch: Sketch) -> dict[str, Side]:
    """The axes of a target."""
    rows, columns = matrix_shape(target.shape, target.transposed)
    if target.kind in ("bias", "norm") or len(target.shape) < 2:
        return {"out": Side(rows * columns, sketch.dims(target.name)[0], f"{target.name}/out")}
    if sketch.mode == "flat" or (target.kind == "flat" and not sketch.dense):
        if rows * columns > 2**31 - 1:
            raise ValueError(f"layer {target.name}: {rows * columns} entries are too many for a flat mask's int32")
        return {"flat": Side(rows * columns, sketch.dim_flat(target.name), f"{target.name}/flat")}
    return {
        "out": Side(rows, sketch.dims(target.name)[0], f"{target.name}/out"),
        "in": Side(columns, sketch.dims(target.name)[1], f"{target.name}/in"),
    }


def make_layer(target: Target, sketch: Sketch, statistics: Mapping[str, Tensor]) -> Layer:
    """Draw a target's sketches."""
    axes = {
        name: sketch.make(side.size, side.dim, side.key, statistics.get(name))
        for name, side in _sides(target, sketch).items()
    }
    return target.plan(axes.get("flat") or axes["out"], axes.get("in"))
