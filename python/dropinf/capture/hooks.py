"""Hooks that compress per-sample gradients as they are formed, and the guards that keep them honest.

The forward hook keeps only the compressed input; a hook on the output's gradient compresses that and multiplies. Each
call of a module hangs its own `Call` on the autograd graph, so modules called twice, activation checkpointing and
nested calls are right by construction. Weights need no gradient, and none is computed.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from dropinf_kernels.op import no_autograd

from . import sharded
from .checks import untied_message
from .modules import NormUse, Samples, Untied, Use
from .recorders import Recorder

_SEQUENCES = (list, tuple)


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


class UseGuard(TorchFunctionMode):
    """Finds tracked parameters that are used by anything but their own module's forward."""

    def __init__(
        self,
        owners: Mapping[int, set[nn.Module]],
        active: Counter[nn.Module],
        shards: Mapping[tuple[nn.Module, str], int],
    ) -> None:
        super().__init__()
        self.owners, self.active, self.shards = owners, active, shards
        self.found: set[int] = set()
        self._gathered: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        for value in (*args, *kwargs.values()) if kwargs else args:
            for item in value if isinstance(value, _SEQUENCES) else (value,):
                # The ids of every call of the model: nothing but a look-up until one is found.
                if id(item) in self.owners or self.shards:
                    self._note(item, result)
        return result

    def _note(self, parameter: Any, result: Any) -> None:
        if not isinstance(parameter, nn.Parameter) or not isinstance(result, Tensor | tuple | list):
            return  # its shape was asked for, say
        key = self._shard_of(parameter) if self.shards else id(parameter)
        modules = self.owners.get(key)
        if modules is not None and not any(self.active[m] > 0 for m in modules):
            self.found.add(key)

    def _shard_of(self, parameter: nn.Parameter) -> int:
        """A gathered parameter is another object than its shard, known by the place that it takes."""
        if id(parameter) not in self._gathered:
            places = self.shards.items()
            self._gathered |= {id(getattr(module, name)): key for (module, name), key in places}
            self._gathered.setdefault(id(parameter), id(parameter))
        return self._gathered[id(parameter)]


class Capture:
    """Hooks on the tracked modules of one model. They do nothing outside :meth:`run`."""

    def __init__(self, model: nn.Module, uses: Mapping[str, Use]) -> None:
        self.model, self.uses = model, dict(uses)
        self.active: Counter[nn.Module] = Counter()
        self.shared: set[str] = set()  # modules whose output has no sample dimension
        self._pass: Pass | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on, weights frozen; afterwards the model is bit for bit and flag for flag what it was."""
        handles = []
        with _preserved(self.model):
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
        """Hooks feed ``current`` inside."""
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
    """``call`` on the gradient of one output of a node, for half of what a node of its own costs."""

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[output]
        if g is not None:
            call(g)

    node.register_prehook(hook)


def _per_sample(x: Tensor, n: int, *, one: bool) -> Tensor:
    """A tensor that all samples share, as one (unmaterialised) copy per sample."""
    return x.expand(n, *x.shape[1:]) if one else x.unsqueeze(0).expand(n, *x.shape)


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter inside; restore flags, buffers and random state afterwards."""
    sharded.initialise(model)
    sharded.reshard(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    # Only train mode updates buffers (spectral norm's vectors, say).
    training = any(m.training for m in model.modules())
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if training else []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=devices), _eager():
        try:
            # The fused inference path of nn.TransformerEncoderLayer would call none of its modules.
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        except BaseException:
            sharded.reset(model)
            raise
        finally:
            sharded.reshard(model)
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled code does not see hooks that are added later: run it eagerly while they are on."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
