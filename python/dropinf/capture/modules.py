"""How each kind of module gives its compressed gradient: what to keep in forward, what to emit in backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf_kernels as ops

from ..sketch.axis import Axis
from . import sharded
from .layer import Layer
from .moments import Moments
from .samples import Samples
from .sums import sketched_outer, sketched_sum, summed
from .taps import is_of_torch

_SLACK = 8  # roundings between an RMSNorm's output and what is made of its input


def rms_epsilon(module: nn.Module) -> float | None:
    """Return the epsilon of a transformers-style RMSNorm (these have no common base class), or None."""
    value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return value if isinstance(value, float) else None


class Use:
    """One module's capture. ``weight`` and ``bias`` are the plans of what is tracked of it."""

    settings: tuple[str, ...] = ()  # attributes that the module's forward reads, and its capture too
    table: Axis | None = None  # of its input, where one gather makes what is kept of it, a rotation aside

    def __init__(self, name: str, module: nn.Module, weight: Layer | None, bias: Layer | None) -> None:
        self.name, self.module, self.weight, self.bias = name, module, weight, bias
        self.together: list[Use] = []  # that read the same tensor behind it
        self.joined: Any = None  # their names, and their tables as one
        self.doubts: list[Tensor] = []  # truth values: whether a call did something else than it was seen to do
        self._forward, self._read = type(module).forward, self._reads()
        parameters = {name: module._parameters.get(name) for name in ("weight", "bias")}
        self._held = {name: p for name, p in parameters.items() if p is not None and not sharded.is_sharded(p)}
        # What the forward gets in their place, so that any gradient that reaches them is of another use.
        hides = {name: p for name, p in self._held.items() if _is_plain(p)}
        self.twins = {name: nn.Parameter(p.detach(), requires_grad=self.is_summed) for name, p in hides.items()}

    def __deepcopy__(self, _memo: Any) -> Use:
        return self  # of a model that is copied while it is hooked: its hooks do nothing for the copy

    def check(self) -> None:
        """Raise ValueError where the module is not what it was when its capture began."""
        kind, instead = type(self.module), self.module.__dict__
        if kind.forward is not self._forward or not instead.keys().isdisjoint(("forward", "_conv_forward")):
            raise ValueError("its forward was replaced")
        if self.is_plain and self._forward.__globals__.get("F", F) is not F:
            raise ValueError("the functions that it calls were replaced")
        own = self.module._parameters
        if any(own.get(name) is not p for name, p in self._held.items()) or self._reads() != self._read:
            raise ValueError("what its forward reads was replaced")

    @cached_property
    def is_plain(self) -> bool:
        """Whether the module's forward is torch's own, on its own parameters, and so uses each of them once."""
        return is_of_torch(self._forward) and not hasattr(self.module, "parametrizations")

    @property
    def is_summed(self) -> bool:
        """Whether rows are compared with the gradient that their parameter gets: a few numbers, and a proof."""
        return False

    @property
    def summed(self) -> dict[str, nn.Parameter]:
        """What the module's forward uses in place of the parameters whose gradient is compared, by layer."""
        return {plan.name: self.twins[name] for name, plan in self.hidden.items() if self.is_summed}

    @property
    def counted(self) -> list[nn.Parameter]:
        """What is tracked of a module that is not plain: each of its calls must use it once."""
        return [] if self.is_plain else [self._held[name] for name in self._plans if name in self._held]

    @property
    def hidden(self) -> dict[str, Layer]:
        """The plans of what a forward gets a twin of."""
        return {name: plan for name, plan in self._plans.items() if name in self.twins}

    @property
    def is_odd(self) -> bool:
        """Whether a tracked parameter is of a class of its own, so that a forward gets no twin of it."""
        held = (self._held[name] for name in self._plans if name in self._held and name not in self.twins)
        return any(p.is_floating_point() for p in held)

    @property
    def originals(self) -> dict[int, nn.Parameter]:
        """The parameters by the ids of what a forward gets in their place."""
        return {id(twin): self._held[name] for name, twin in self.twins.items()}

    def refresh(self) -> None:
        """Have what a forward gets in place of parameters hold what they hold now."""
        for name, twin in self.twins.items():
            twin.data = self._held[name].detach()

    def hide(self) -> None:
        """Have the module's forward use the twins of what is tracked."""
        own = self.module._parameters
        for name in self.hidden:
            if own.get(name) is self._held[name]:
                own[name] = self.twins[name]

    def unhide(self) -> None:
        """Put back what was hidden."""
        own = self.module._parameters
        for name, twin in self.twins.items():
            if own.get(name) is twin:
                own[name] = self._held[name]

    def _reads(self) -> list[Any]:
        values = [getattr(self.module, name, None) for name in self.settings]
        return [tuple(value) if isinstance(value, list) else value for value in values]

    @property
    def plans(self) -> list[Layer]:
        """The plans of what is tracked."""
        return list(self._plans.values())

    @property
    def _plans(self) -> dict[str, Layer]:
        plans = {"weight": self.weight, "bias": self.bias}
        return {name: plan for name, plan in plans.items() if plan is not None}

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:
        """Return what the weight multiplies, uncompressed: [..., d_in]."""
        return x.to(out.dtype) if out.dtype.itemsize < x.dtype.itemsize else x  # autocast: as the layer saw it

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        """Return what backward needs of the input: the compressed input, and no more."""
        raise NotImplementedError

    def emit(self, saved: Tensor | None, g: Tensor, samples: Samples) -> Iterator[tuple[Layer, Tensor]]:
        """Yield (plan, compressed gradients) of this call, from what was saved and the output gradient."""
        yield from self.emit_bias(g, samples)
        if self.weight is not None:
            assert saved is not None
            yield self.weight, self.emit_weight(self.weight, saved, g, samples)

    def emit_bias(self, g: Tensor, samples: Samples) -> Iterator[tuple[Layer, Tensor]]:
        if self.bias is not None:
            yield self.bias, sketched_sum(None, self.rows(g), self.bias.out_axis, samples)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        raise NotImplementedError

    def observe(self, moments: Moments, saved: Tensor, g: Tensor, samples: Samples) -> None:
        """Add the second moments of this call, from its whole input and its output gradient."""
        rows = self.rows(g)
        samples.tie(rows)
        if self.bias is not None:
            moments.add_vectors(self.bias, summed(None, rows, samples))
        if self.weight is not None:
            self.observe_weight(moments, self.weight, saved, rows, samples)

    def observe_weight(self, moments: Moments, layer: Layer, saved: Tensor, rows: Tensor, samples: Samples) -> None:
        """Add the second moments of the weight's two sides; `rows` is the output gradient as [*lead, d_out]."""
        raise NotImplementedError

    def rows(self, g: Tensor) -> Tensor:
        """Return the output gradient as [*lead, d_out]."""
        return g

    def scaled(self, g: Tensor, factor: Tensor) -> Tensor:
        """Return the output gradient with each of its `rows` times its factor [*lead]."""
        return g * factor[..., None]


def _is_plain(parameter: Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


def _pairs(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of the coordinates that a flat mask keeps."""
    index = layer.out_axis.index
    assert index is not None
    columns = layer.matrix_shape[1]
    return index.flatten() // columns, index.flatten() % columns


class LinearUse(Use):
    """Linear, transformers' Conv1D, LoRA's A and B, quantized linears."""

    def __init__(self, name: str, module: nn.Module, weight: Layer | None, bias: Layer | None) -> None:
        super().__init__(name, module, weight, bias)
        self.is_flat = weight is not None and weight.in_axis is None
        if self.is_flat:
            assert weight is not None
            self.pair_rows, columns = _pairs(weight)
            self.used, inverse = torch.unique(columns, return_inverse=True)
            self.pair_columns = inverse.to(torch.int32)
        if weight is not None and weight.in_axis is not None and weight.in_axis.gathers_first:
            self.table = weight.in_axis

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        if self.weight.in_axis is not None:
            return self.inputs(self.weight.in_axis.apply(x), out)
        return self.inputs(x if len(self.used) == x.shape[-1] else x.index_select(-1, self.used), out)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        if not self.is_flat:
            return sketched_outer(saved, g, layer.out_axis, samples)
        (a, cu), (g, _) = samples.tie(saved), samples.tie(g)
        return layer.out_axis.fold(ops.compress_flat(a, g, self.pair_rows, self.pair_columns, cu))

    def observe_weight(self, moments: Moments, layer: Layer, saved: Tensor, rows: Tensor, samples: Samples) -> None:  # noqa: ARG002
        moments.add_rows(layer, "out", rows)
        moments.add_rows(layer, "in", saved)


class EmbeddingUse(Use):
    """Embedding: the input is the one-hot of the ids, by lookup."""

    settings = ("padding_idx",)

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002
        return x

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:  # noqa: ARG002
        return x

    @property
    def padding_idx(self) -> int:
        value = getattr(self.module, "padding_idx", None)
        if value is None:
            return -1
        return int(value) if value >= 0 else int(value) + self.module.get_parameter("weight").shape[0]

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        (ids, cu), (g, _) = samples.tie(saved, 0), samples.tie(g)
        if layer.in_axis is None:
            rows, columns = _pairs(layer)
            if layer.kind == "tied":  # the matrix is [rows of the embedding, hidden]
                rows, columns = columns, rows
            g = g.masked_fill((ids == self.padding_idx)[..., None], 0)
            return layer.out_axis.fold(ops.compress_flat(ids, g, rows, columns, cu))
        tied = layer.kind == "tied"
        vocabulary, hidden = (layer.out_axis, layer.in_axis) if tied else (layer.in_axis, layer.out_axis)
        c = self._factorized(ids, g, cu, vocabulary, hidden)
        return c.mT if tied else c

    def observe_weight(self, moments: Moments, layer: Layer, saved: Tensor, rows: Tensor, samples: Samples) -> None:  # noqa: ARG002
        if layer.kind == "tied":  # judged by its output layer
            return
        moments.add_rows(layer, "out", rows)
        if moments.need(layer, "in") is not None:
            counts = torch.bincount(saved.flatten(), minlength=layer.matrix_shape[1]).double()
            if self.padding_idx >= 0:
                counts[self.padding_idx] = 0
            moments.add(layer, "in", counts)

    def _factorized(self, ids: Tensor, g: Tensor, cu: Tensor | None, vocabulary: Axis, hidden: Axis) -> Tensor:
        if hidden.matrix is not None:
            g = hidden.apply(g)
        index, weight = (None, None) if hidden.matrix is not None else hidden.table
        group = hidden.group if index is not None else 1
        if vocabulary.matrix is not None:
            g = g.masked_fill((ids == self.padding_idx)[..., None], 0)
            a = F.embedding(ids, vocabulary.matrix.T.to(torch.promote_types(g.dtype, torch.float32)))
            return ops.compress_linear(a, g, None, None, index, weight, group, cu)
        return ops.compress_embedding(
            ids, g, vocabulary.size, *vocabulary.table, index, weight, self.padding_idx, 1, cu
        )


class NormUse(Use):
    """LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode: the gradient of the scale is a diagonal."""

    def __init__(self, name: str, module: nn.Module, weight: Layer | None, bias: Layer | None) -> None:
        super().__init__(name, module, weight, bias)
        self.added: int | None = None  # to the weight, by which an RMSNorm of no common class scales: 0 or 1

    @property
    def is_summed(self) -> bool:
        return not self.is_plain  # only the value of an RMSNorm of one's own is compared with what it is taken for

    @property
    def channels_first(self) -> bool:
        return isinstance(self.module, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)

    def rows(self, g: Tensor) -> Tensor:
        if not self.channels_first:
            return g.flatten(g.ndim - self._normalized_dims)
        return g.flatten(2).mT if g.ndim > 2 else g

    def scaled(self, g: Tensor, factor: Tensor) -> Tensor:
        if self.channels_first and g.ndim > 2:
            return g * factor.view(len(g), 1, *g.shape[2:])
        return g * factor.view(*factor.shape, *[1] * (g.ndim - factor.ndim))

    @property
    def _normalized_dims(self) -> int:
        return len(getattr(self.module, "normalized_shape", (0,)))

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:
        return self._inputs(x, out, None)

    def _inputs(self, x: Tensor, out: Tensor, axis: Axis | None) -> Tensor:
        """Return what the weight multiplies, [..., d], or what ``axis`` keeps of it."""
        m = self.module
        if isinstance(m, nn.GroupNorm):
            x = F.group_norm(x, m.num_groups, None, None, m.eps)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.training or m.running_mean is None:
                x = F.batch_norm(x, None, None, None, None, True, 0.0, m.eps)
            else:
                x = F.batch_norm(x, m.running_mean, m.running_var, None, None, False, 0.0, m.eps)
        elif isinstance(m, nn.LayerNorm):
            x = F.layer_norm(x, m.normalized_shape, None, None, m.eps)
        elif isinstance(m, nn.RMSNorm):
            x = F.rms_norm(x, tuple(m.normalized_shape), None, m.eps)
        else:
            return super().inputs(self._scaled(x, out, axis), out)
        x = super().inputs(self.rows(x), out)
        return x if axis is None else axis.apply(x)

    def _scaled(self, x: Tensor, out: Tensor, axis: Axis | None) -> Tensor:
        """Return the normalised input of an RMSNorm of no common class, compared with its output in what is kept."""
        epsilon = rms_epsilon(self.module)
        assert epsilon is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        factor = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(epsilon))
        scale = self.module.get_parameter("weight").detach()
        if axis is not None:
            x, out, scale = axis.apply(x), axis.apply(out), axis.apply(scale)
        normalized = (x.to(wide) * factor).to(x.dtype)
        if self.added is not None:
            self.doubts.append(self._differs(normalized, out, scale, self.added))
            return normalized
        fits = (added for added in (0, 1) if not bool(self._differs(normalized, out, scale, added)))
        self.added = next(fits, None)
        if self.added is None:
            raise ValueError("it does not scale what it normalises by its weight")
        return normalized

    @staticmethod
    def _differs(normalized: Tensor, out: Tensor, scale: Tensor, added: int) -> Tensor:
        """Return whether an RMSNorm's output is not its normalised input times weight, or 1 + weight: a truth value."""
        limits = torch.finfo(out.dtype)
        wanted = (normalized * (added + scale if added else scale)).to(out.dtype)
        bound = normalized.abs() * ((added + scale.abs()) * (_SLACK * limits.eps)) + limits.smallest_normal
        return ((out - wanted).abs_() > bound).any()

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        return self._inputs(x, out, self.weight.out_axis if self.weight.out_axis.is_gather else None)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        return sketched_sum(saved, self.rows(g), layer.out_axis, samples)

    def observe_weight(self, moments: Moments, layer: Layer, saved: Tensor, rows: Tensor, samples: Samples) -> None:
        moments.add_vectors(layer, summed(saved, rows, samples))
