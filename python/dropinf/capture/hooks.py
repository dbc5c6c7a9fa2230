"""Hooks that take per-sample gradients as they are formed, and the recorders of what they take.

The forward hook keeps only the compressed input; a hook on the output's gradient compresses that and multiplies. Each
call of a module hangs its own `Call` on the autograd graph, so modules called twice, activation checkpointing and
nested calls are right by construction. Weights need no gradient, and none is computed.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from dropinf_kernels.op import no_autograd

from .checks import untied_message
from .layer import Layer
from .modules import NormUse, Samples, Untied, Use
from .moments import Moments
from .preserved import preserved


class _Tap(torch.autograd.Function):
    """An output, with ``call`` on its gradient. ``source`` is the output itself, or the anchor where the output needs
    no gradient: backward then reaches the layer and goes no further.

    A tensor hook would be lost where a view is modified in place afterwards (a ReLU behind a Linear on [N, T, d]).
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, box: list[Tensor], call: Callable[[Tensor], None]) -> Tensor:
        ctx.call, ctx.is_anchor = call, source is not box[0]
        # .data: no view of the source, or modifying it in place would fail.
        return box[0].data

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.call(g)
        return g.new_zeros(()) if ctx.is_anchor else g, None, None


class Recorder(ABC):
    """What is recorded of one forward and backward of a batch."""

    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        """Return what backward needs of one call's input."""
        return use.save(x, out)

    @abstractmethod
    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        """Take one call's output gradient, with what `save` returned.

        Raises:
            Untied: it cannot be tied to samples.
        """

    @abstractmethod
    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        """Take whole per-sample gradients [n, *shape] of the next samples, of a parameter that no hook covers."""

    @abstractmethod
    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:
        """End the batch. Return layer name -> compressed gradients [N, *stored_shape], if that is what was recorded."""


class Compression(Recorder):
    """Compressed gradients of one batch."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = {}

    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        for layer, c in use.emit(saved, g, samples):
            before = self._found.get(layer.name)
            self._found[layer.name] = c if before is None else before + c  # a module called twice sums its calls

    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        wide = torch.promote_types(gradients.dtype, torch.float32)
        self._parts.setdefault(layer.name, []).append(layer.compress_exact(gradients.to(wide)))

    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:
        found = self._found | {name: torch.cat(parts) for name, parts in self._parts.items()}
        dtype = torch.promote_types(losses.dtype, torch.float32)
        # A layer that the batch does not reach has a zero gradient.
        return {
            name: found[name] if name in found else losses.new_zeros(len(losses), *layer.stored_shape, dtype=dtype)
            for name, layer in layers.items()
        }


class Calibration(Recorder):
    """Second moments of one batch, added to those of the batches before."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        return use.inputs(x, out)

    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
        assert saved is not None
        use.observe(self._moments, saved, g, samples)

    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        self._moments.add_whole(layer, gradients)

    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        self._moments.count(losses)
        return {}


class Attribution(Recorder):
    """The check that rows belong to samples: where every second loss alone is backpropagated, the rows of the samples
    between, `untouched` being the first, must have no gradient.
    """

    def __init__(self, untouched: int) -> None:
        self._untouched = untouched

    def emit(self, use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:  # noqa: ARG002
        others = samples.select(use.rows(g), self._untouched)
        # A NaN is not proof: 0 * NaN is NaN within its own sample. It gets its own error.
        if bool((others.nan_to_num(0.0, 0.0, 0.0) != 0).any()):
            raise Untied

    def emit_whole(self, layer: Layer, gradients: Tensor) -> None:
        """Check nothing: such gradients are computed sample by sample."""

    def finish(self, layers: Mapping[str, Layer], losses: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return {}


@dataclass
class Pass:
    """One forward of one batch, and its backwards."""

    recorder: Recorder  # of the forward
    samples: Samples
    anchor: Tensor
    untied: dict[str, tuple[int, ...]] = field(default_factory=dict)  # modules whose gradient has no sample dimension
    unfit: set[str] = field(default_factory=set)  # modules that are not what their class says
    shared: bool = False  # some output was expanded to one copy per sample
    calls: int = 0

    def __post_init__(self) -> None:
        self.into = self.recorder  # of the backward that runs

    @no_autograd
    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        """Return what one call of a module keeps for backward."""
        try:
            saved = self.recorder.save(use, x, out)
        except Untied:
            raise ValueError(untied_message(use.name, tuple(x.shape), self.samples.n)) from None
        if isinstance(use, NormUse) and use.name not in self.unfit and not use.is_scale_of(x, out):
            self.unfit.add(use.name)
        return saved

    @no_autograd
    def emit(self, use: Use, saved: Tensor | None, g: Tensor) -> None:
        """Take what one call of a module gives in backward."""
        try:
            self.into.emit(use, saved, g, self.samples)
        except Untied:
            self.untied[use.name] = tuple(g.shape)

    def backward(self, losses: Tensor, weights: Tensor, into: Recorder, *, retain_graph: bool = False) -> None:
        """Backpropagate the losses, each times its weight [N], into a recorder."""
        self.into = into
        losses.backward(weights, retain_graph=retain_graph)


@dataclass
class Call:
    """One call of a module: what it keeps of its input, until its output's gradient comes."""

    current: Pass
    use: Use
    saved: Tensor | None
    version: int | None

    def __call__(self, g: Tensor) -> None:
        if self.saved is not None and self.version is not None and self.saved._version != self.version:
            raise RuntimeError(
                f"layer {self.use.name}: its input was modified in place after the layer read it, so its gradient "
                "would be wrong; use an out-of-place operation (inplace=False, x = x + y) after this layer"
            )
        self.current.emit(self.use, self.saved, g)


class Capture:
    """Hooks on the tracked modules of one model. They do nothing outside :meth:`running`."""

    def __init__(self, model: nn.Module, uses: Mapping[str, Use]) -> None:
        self.model, self.uses = model, dict(uses)
        self.active: Counter[nn.Module] = Counter()
        self.shared: set[str] = set()  # modules whose output has no sample dimension
        self._pass: Pass | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the modules and freeze the weights inside; restore the model afterwards, bit for bit, flag for flag."""
        handles = []
        with preserved(self.model):
            try:
                for use in self.uses.values():
                    handles.append(use.module.register_forward_pre_hook(self._enter))
                    leave = partial(self._leave, use)
                    handles.append(use.module.register_forward_hook(leave, with_kwargs=True, always_call=True))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                self._pass = None

    @contextlib.contextmanager
    def running(self, current: Pass) -> Iterator[None]:
        """Have the hooks feed ``current`` inside."""
        self.active.clear()
        self._pass = current
        try:
            yield
        finally:
            self._pass = None

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.active[module] += 1

    def _leave(
        self, use: Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None
    ) -> Tensor | None:
        self.active[module] -= 1
        current = self._pass
        if out is None or current is None or not torch.is_grad_enabled():
            return None  # no output where the module raised an error
        x = args[0] if args else next(iter(kwargs.values()))
        with torch._C.DisableTorchFunction():  # the guard watches the model, not us
            return self._tap(use, current, x, out)

    def _tap(self, use: Use, current: Pass, x: Tensor, out: Tensor) -> Tensor | None:
        """Have the output's gradient compressed in backward. Return what takes the output's place, if anything."""
        current.calls += 1
        saved = current.save(use, x.detach(), out.detach())
        version = None if saved is None or saved.is_inference() else saved._version
        n = current.samples.n
        shared = use.name in self.shared and n > 1
        if shared:
            current.shared = True
            saved = saved if saved is None else _per_sample(saved, n, one=out.shape[0] == 1)
            out = _per_sample(out, n, one=out.shape[0] == 1)
        call = Call(current, use, saved, version)
        # Modified in place, a view loses its node to a new history; any other output keeps it.
        if out.grad_fn is not None and not shared and out is not x and not out._is_view():
            _listen(out.grad_fn, out.output_nr, call)
            return None
        tapped: Tensor = _Tap.apply(out if out.requires_grad else current.anchor, [out], call)
        return tapped


def _listen(node: Node, output: int, call: Callable[[Tensor], None]) -> None:
    """Have ``call`` take the gradient of one output of a node. A node of its own for that would cost twice as much."""

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[output]
        if g is not None:
            call(g)

    node.register_prehook(hook)


def _per_sample(x: Tensor, n: int, *, one: bool) -> Tensor:
    """Return a tensor that all samples share as one (unmaterialised) copy per sample."""
    return x.expand(n, *x.shape[1:]) if one else x.unsqueeze(0).expand(n, *x.shape)
