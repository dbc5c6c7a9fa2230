"""Whether the samples of a forward stay apart whatever their data are: read off the ops that run, not off their values.

An audit proves one batch. What keeps samples apart in it may be its data: a hinge at rest, a mask that happens to be
zero, a routing that sends nothing elsewhere. So every number of a forward gets the label of the sample that it can
depend on, by rules for ops. Where each loss then has its own sample's label, any batch that runs the same ops is as
proven as this one. Where it has not, nothing is wrong yet: each batch's rows are looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..workload import samples_of, tensors
from . import moves  # noqa: F401  its rules
from .colours import NONE, SEVERAL
from .followed import Shown
from .inside import OPENED, run_inside
from .labels import Labels, combined
from .ladder import AttributionError
from .rules import RULES, Run, flat, pointwise, together
from .taps import of_a_user

# They change a tensor's shape, and none of its numbers.
_VIEWS_IN_PLACE = {
    f"aten::{name}_" for name in ("as_strided", "t", "transpose", "squeeze", "unsqueeze", "detach", "resize")
}
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
# What hands a tensor's numbers to Python or NumPy.
_READ = {torch.tensor_split, Tensor.tensor_split}  # where to cut, by no op
_LEAVE = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage}


class Dependence(TorchDispatchMode):
    """Follows the labels of a forward's tensors. ``given``: tensors that have labels from the start."""

    def __init__(
        self, parameters: Iterable[Tensor], given: Sequence[tuple[Tensor, Tensor]], *, strict: bool = False
    ) -> None:
        super().__init__()
        self.known = Labels(strict=strict)
        self.shown: Shown | None = None
        self.failure: str | None = None
        self.foreign = False  # some backward is its user's
        self.left = False  # Python got numbers of a sample
        self.states: list[Tensor] = []  # of other generators than torch's own, as numbers were drawn
        self.depth = 0  # functions of torch that run
        for parameter in parameters:
            self.known.add(parameter, fixed=False)
        for x, labels in given:
            self.known.put(x, labels, fixed=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.shown is not None and self.shown.busy:
            return func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._draw(_named(func, args, kwargs or {}).get("generator"))
        out = func(*args, **(kwargs or {}))
        if self.failure is None:
            try:
                self._follow(func, args, kwargs or {}, out)
            except Exception as error:
                self.failure = f"{func}: {type(error).__name__}: {error}"
        return out

    def _draw(self, generator: torch.Generator | None) -> None:
        """Keep the state of a generator that is not torch's own, which nothing puts back."""
        own = {_address(g) for g in (torch.default_generator, *torch.cuda.default_generators)}
        if generator is not None and _address(generator) not in own:  # ops get an object of their own for it
            self.states.append(generator.get_state())

    def leave(self, x: Tensor) -> None:
        """Note numbers that Python gets, of which it may make an index; a truth value decides what runs."""
        decides = x.dtype == torch.bool and not self.known.strict  # where samples are taken alone, each decides
        whole = not x.is_floating_point() and x.dtype != torch.bool
        self.left |= whole or (not decides and self.known.of(x) is not None)

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        arguments = _named(func, args, kwargs)
        inputs = [x for value in arguments.values() for x in flat(value)]
        for x in inputs:
            if not self.known.knows(x):
                self._meet(x)
            self.look_at_source(x)
            self.known.carry(x)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.leave(inputs[0])
        results = flat(out)
        storages = {x.untyped_storage()._cdata for x in inputs}
        own = func.namespace in ("aten", "prim", "prims")
        labelled = any(self.known.of(x) is not None for x in inputs)
        self.left |= labelled and not self.depth  # in a script, say, whose other branches no path shows
        changes = func._schema.is_mutable and func._schema.name not in _VIEWS_IN_PLACE
        if own and not changes and all(x.untyped_storage()._cdata in storages for x in results):
            return  # views
        self.foreign |= labelled and not own  # of a library, with a backward of its own
        # Picks of nothing, as by a mask that is empty: another batch may pick, and no label shows whose.
        picked = any(x.numel() for x in results) or not any(x.numel() for x in inputs)
        self.left |= labelled and not picked
        fixed = _counts(func, arguments) or (func in _COPIES and self.known.is_fixed(inputs[0]))
        firm = any(self.known.is_firm(x) for x in inputs)
        written = _written(func, arguments) if changes else []
        unseen = {x.untyped_storage()._cdata for x in written if self.known.keeps(x)}
        for x, found in zip(results, self._labels(func, arguments, inputs, out), strict=True):
            both = unseen and x.untyped_storage()._cdata in unseen
            self._give(x, self._added(x, found) if both else found, fixed, firm)
        given = {x.untyped_storage()._cdata for x in results}
        for x in written:
            if x.untyped_storage()._cdata not in given:  # as of _foreach ops
                self._give(x, together(Run("", func, arguments, out, self.known)), False, firm)

    def look_at_source(self, x: Tensor) -> None:
        """Note a tensor that a user's autograd Function made of samples: nothing here says what its backward does."""
        if self.known.of(x) is not None:
            hook = getattr(type(x.grad_fn), "_forward_cls", None) is BackwardHookFunction
            self.foreign |= hook or of_a_user(x.grad_fn)

    def _meet(self, x: Tensor) -> None:
        """Take a tensor from elsewhere, which may hold any samples; not a number alone, nor a weight of the loss."""
        self.known.add(x, fixed=False)
        if (x.numel() > 1 and not x.requires_grad) or (x.requires_grad and not x.is_leaf):
            self.known.put(x, torch.tensor(SEVERAL), fixed=False)

    def _added(self, x: Tensor, found: Tensor | None) -> Tensor | None:
        """Return the labels of numbers that were replaced where autograd does not see it, with those of before."""
        before = self.known.of(x)
        return found if before is None else combined(before, torch.tensor(NONE) if found is None else found)

    def _give(self, x: Tensor, labels: Tensor | None, fixed: bool, firm: bool) -> None:
        self.known.add(x, fixed=fixed, firm=firm and not torch.is_grad_enabled())
        if labels is not None:
            self.known.put(x, labels, fixed=fixed)

    def _labels(
        self, func: Any, arguments: Mapping[str, Any], inputs: Sequence[Tensor], out: Any
    ) -> list[Tensor | None]:
        """Return the labels of each result."""
        results = flat(out)
        if all(self.known.of(x) is None for x in inputs):
            return [None] * len(results)
        name = func._schema.name.rpartition("::")[2] if func.namespace == "aten" else ""
        name = name if name in RULES else name.rstrip("_")
        run = Run(name, func, arguments, out, self.known)
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else together)
        try:
            found = rule(run)
        except (RuntimeError, IndexError, TypeError, ValueError):  # shapes that the rule does not foresee
            found = together(run)
        labels = [found] * len(results) if isinstance(found, Tensor) else list(found)
        pairs = zip(results, labels, strict=True)
        return [one if _broadcasts(one, x.shape) else together(run) for x, one in pairs]


class _Leaving(TorchFunctionMode):
    """Sees what leaves torch as lists and arrays, which no op does, and which ops are of functions that a path has."""

    def __init__(self, dependence: Dependence) -> None:
        super().__init__()
        self.dependence = dependence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = self.dependence.shown
        if shown is not None and shown.busy:
            return func(*args, **(kwargs or {}))
        if func in OPENED and shown is not None and shown.outside is not None:
            return run_inside(self, func, args, kwargs or {})
        if func in _LEAVE and self.dependence.failure is None:
            self.dependence.leave(args[0])
            self.dependence.known.add(args[0], fixed=False)
        if func in _READ and self.dependence.failure is None:
            for x in flat((*args[1:], *(kwargs or {}).values())):
                self.dependence.leave(x)
        self.dependence.left |= not _is_of_torch(func)  # what it calls is in no path
        self.dependence.depth += 1
        try:
            kwargs = kwargs or {}
            if shown is not None and shown.outside is not None:
                return shown.outside(func, args, kwargs, flat((args, tuple(kwargs.values()))))
            return func(*args, **kwargs)
        finally:
            self.dependence.depth -= 1


def _address(generator: Any) -> int:
    return int(generator._cdata)


def _is_of_torch(function: Any) -> bool:
    module = getattr(function, "__module__", None) or "torch"  # methods of tensors name none
    return bool(module.split(".")[0] in ("torch", "builtins"))


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _written(func: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an op writes to."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in flat(arguments.get(name))]


def _counts(func: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether an op makes the numbers 0, 1, 2, ..."""
    if func._schema.name != "aten::arange":
        return False
    given = [arguments.get("start", 0), arguments.get("step", 1), arguments.get("end", 0)]
    return given[:2] == [0, 1] and not any(isinstance(number, float) for number in given)  # which are in no path


def _broadcasts(labels: Tensor, shape: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(labels.shape, shape) == shape)
    except RuntimeError:
        return False


def stay_apart(
    model: nn.Module,
    losses_of: Callable[[], Tensor],
    batch: Any,
    n: int,
    cu_seqlens: Tensor | None,
    show: Callable[[Labels], Shown] | None = None,
    *,
    strict: bool = False,
) -> bool:
    """Return whether samples stay apart in any batch that runs the same ops. The model runs once or twice for it.

    ``show``: makes what looks at the outputs that are captured, whose rows must be of the samples that were found.
    ``strict``: no loss may depend on another sample's data either, through what no gradient flows.
    """
    if _has_backward_hooks(model):
        return False
    variants = [_of_leaves(batch, n, cu_seqlens, cyclic=False)]
    if cu_seqlens is None and any(x.ndim and len(x) > n and len(x) % n == 0 for x, _ in variants[0]):
        variants.append(_of_leaves(batch, n, cu_seqlens, cyclic=True))
    for given in variants:
        dependence = Dependence(_held(model), given, strict=strict)
        shown = dependence.shown = None if show is None else show(dependence.known)
        with contextlib.nullcontext() if shown is None else shown.attached():
            losses = _followed(dependence, losses_of)
        if dependence.states:
            again = Dependence(_held(model), given)
            _followed(again, losses_of)
            if not all(map(torch.equal, dependence.states, again.states)):
                raise AttributionError(
                    "model: it draws random numbers from a generator of its own, so that each run of a batch gives "
                    "other gradients; draw from torch's (without generator=), which every run finds in the same state"
                )
        labels = dependence.known.of(losses)
        dependence.look_at_source(losses)
        if labels is not None and not (dependence.failure or dependence.foreign or dependence.left):
            own = torch.arange(n, dtype=torch.int32, device=labels.device)
            if bool((labels.reshape(-1) == own).all()):
                return shown is None or shown.fits
    return False


def _followed(dependence: Dependence, losses_of: Callable[[], Tensor]) -> Tensor:
    # Nothing is kept for a backward: there is none.
    with dependence, _Leaving(dependence), torch.autograd.graph.saved_tensors_hooks(_dropped, _dropped):
        return losses_of()


def _dropped(_: Any) -> Any:
    return None


def _held(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a model holds, as parameters, buffers and attributes."""
    values = [value for module in model.modules() for value in module.__dict__.values()]
    return [*model.parameters(), *model.buffers(), *[value for value in values if isinstance(value, Tensor)]]


def _of_leaves(batch: Any, n: int, cu_seqlens: Tensor | None, *, cyclic: bool) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of a batch with labels that broadcast to them.

    ``cyclic``: where a multiple of n stands in the leading dimension, it is n by n, as in cat([a, b]).
    """
    if samples_of(batch) == n:
        return [(x, torch.tensor(i)) for i, sample in enumerate(batch) for x in tensors(sample)]
    own = torch.arange(n)
    found = []
    for x in tensors(batch):
        places = [dim for dim, size in enumerate(x.shape) if size == n]
        labels = torch.tensor(SEVERAL if x.numel() > 1 else NONE)
        if cu_seqlens is not None and int(cu_seqlens[-1]) in x.shape:
            rows = torch.repeat_interleave(own, cu_seqlens.diff().long().cpu())
            labels = _along(rows, x.shape.index(len(rows)), x.ndim)
        elif places:
            labels = _along(own, places[0], x.ndim)
        elif x.ndim and len(x) and len(x) % n == 0:
            parts = len(x) // n
            labels = _along(own.repeat(parts) if cyclic else own.repeat_interleave(parts), 0, x.ndim)
        found.append((x, labels))
    return found


def _along(labels: Tensor, dim: int, ndim: int) -> Tensor:
    return labels.reshape([-1 if i == dim else 1 for i in range(ndim)])


def _has_backward_hooks(model: nn.Module) -> bool:
    """Return whether a module has a hook of its user's on gradients, which may mix samples."""
    everywhere = nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks
    return bool(everywhere) or any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
