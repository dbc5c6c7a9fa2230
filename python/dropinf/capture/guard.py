"""What a forward does beside calling modules: tracked parameters used elsewhere, and rows that move."""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..workload import tensor_bytes
from . import sharded
from .hooks import Capture
from .inside import OPENED, run_inside
from .ladder import AttributionError
from .movement import Movement
from .op_calls import DERIVED
from .outside import Outside
from .taps import MARK, is_of_torch, of_a_user, overrides


class UseGuard(TorchFunctionMode):
    """Finds tracked parameters that are used by anything but their own module's forward, and movements of rows."""

    def __init__(
        self,
        owners: Mapping[int, set[nn.Module]],
        capture: Capture,
        shards: Mapping[tuple[nn.Module, str], int],
        movement: Movement,
        outside: Outside | None,
        originals: Mapping[int, nn.Parameter],
        trained: Mapping[int, bool],
    ) -> None:
        super().__init__()
        self.trained = trained  # by id of a parameter, what its user says
        self.owners, self.capture, self.shards, self.movement = owners, capture, shards, movement
        self.outside, self.originals = outside, originals
        self.found: set[int] = set()
        self.uses: Counter[int] = Counter()  # of parameters by their own modules
        self.unforeseen: str | None = None  # why the batch is to be audited, whatever it looks like
        self.dtypes: set[torch.dtype] = set()  # that something was cast to
        self.writes = False  # statistics were computed, and perhaps kept in buffers
        self.counted: set[int] = set()  # weights whose gradient is scaled by how often ids stand in the batch
        self._gathered: dict[int, int] = {}
        self._lent: list[tuple[Tensor, Tensor]] = []  # given tensors whose memory was reached for, and what it held

    def __enter__(self) -> UseGuard:
        _SETTING.enter(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _SETTING.leave(self)
        written = [(x, before) for x, before in self._lent if tensor_bytes(x) != tensor_bytes(before)]
        with torch.no_grad():
            for x, before in written:
                x.data.copy_(before)
        if written and error[0] is None:
            raise AttributionError(
                "loss_fn, or the model: it writes to the batch through NumPy or another view of its memory, which no "
                "tensor counts; have it write to a copy (x.numpy().copy(), say)"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKS:
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if func in OPENED and self.outside is not None:
            return run_inside(self, func, args, kwargs)
        tensors = self.movement.pass_by(func, args, kwargs)
        if types:
            self._override(types)
        if torch._C._is_any_autocast_enabled():
            self._autocast(tensors)
        if self.capture.own:
            self._look_inside(tensors)
        if hasattr(func, "__code__") and not _is_of_torch(func):
            self.unforeseen = f"{func.__name__} is not torch's own"  # this mode runs it twice
        dtype = kwargs.get("dtype")
        if dtype is not None and tensors and tensors[0].requires_grad:
            self._cast((tensors[0], dtype), {})
        look = _LOOKED_AT.get(func)
        if look is not None:
            look(self, args, kwargs)
        result = func(*args, **kwargs) if self.outside is None else self.outside(func, args, kwargs, tensors)
        self.movement.made(result)
        for x in tensors:
            # The ids of every call of the model: nothing but a look-up until one is found.
            if id(x) in self.owners or id(x) in self.originals or self.shards:
                self._note(x, result)
        return result

    def _override(self, types: Iterable[type]) -> None:
        """Note tensors whose class has functions of torch of its own: which, is in no path, nor in a layer's kind."""
        own = [t for t in types if overrides(t)]
        if own:
            self.movement.unknowable = True
            self.unforeseen = f"it has a {own[0].__name__}, which overrides functions of torch"

    def _look_inside(self, tensors: Iterable[Tensor]) -> None:
        """Note that a norm of its own computes with what has no gradient, or another: its value is as it was."""
        if torch.is_grad_enabled() and any(not t.requires_grad or of_a_user(t.grad_fn) for t in tensors):
            self.unforeseen = "a norm of its own computes with constants, or with an autograd Function"

    def _hook(self, args: Any, _kwargs: Any) -> None:
        self.movement.unknowable = True  # what a hook does to a gradient is seen by its colours alone
        if self.capture.own or getattr(args[0], MARK, 0) == DERIVED:
            self.unforeseen = "a norm of its own, or a computed weight, has hooks on its gradient"
        if isinstance(args[0], nn.Parameter):
            self.unforeseen = "a parameter has hooks on its gradient"

    def _cast(self, args: Any, kwargs: Any) -> None:
        """Note to which dtype activations are cast: a float64 model may have a norm that computes in float32."""
        if isinstance(args[0], Tensor) and args[0].is_floating_point():
            given = [getattr(value, "dtype", value) for value in (*args[1:], *kwargs.values())]
            self.dtypes |= {dtype for dtype in given if isinstance(dtype, torch.dtype) and dtype.is_floating_point}

    def _autocast(self, tensors: Iterable[Tensor]) -> None:
        """Note to which dtype ops may cast what they are given, whatever comes out of them."""
        for kind in {t.device.type for t in tensors if t.dtype == torch.float32}:
            if torch.is_autocast_enabled(kind):
                self.dtypes.add(torch.get_autocast_dtype(kind))

    def _data(self, _args: Any, _kwargs: Any) -> None:
        self.unforeseen, self.writes = "its forward reaches for .data", True

    def _differentiate(self, _args: Any, _kwargs: Any) -> None:
        self.unforeseen = "its loss differentiates"

    def _node(self, _args: Any, _kwargs: Any) -> None:
        self.unforeseen = "its forward reaches for autograd's nodes"

    def _ask(self, args: Any, _kwargs: Any) -> None:
        """Note who asks whether something is trained: what is hooked runs with other flags than its user's."""
        asks = sys._getframe(2).f_globals.get("__name__", "")
        if torch.is_grad_enabled() and (not asks.startswith("torch.") or asks == "torch.utils._pytree"):
            with torch._C.DisableTorchFunction():
                same = self.trained.get(id(args[0])) == args[0].requires_grad
                if args[0].is_floating_point() and not same:
                    self.unforeseen = "its forward asks what requires a gradient"

    def _reach(self, args: Any, _kwargs: Any) -> None:
        """Note who reaches for the memory of an activation, to write to it, or asks what it says of itself."""
        if isinstance(args[0], Tensor) and args[0].is_floating_point() and not self.movement.is_given(args[0]):
            self.unforeseen, self.writes = "its forward reaches for a tensor's memory", True

    def _lend(self, args: Any, kwargs: Any) -> None:
        """Keep a copy of a tensor of the batch whose memory NumPy gets: to read it, as a rule."""
        if isinstance(args[0], Tensor) and self.movement.is_leaf(args[0]):
            with torch._C.DisableTorchFunction():
                self._lent.append((args[0], args[0].detach().clone()))
        self._reach(args, kwargs)

    def _flag(self, args: Any, _kwargs: Any) -> None:
        if isinstance(args[0], nn.Parameter):
            self.unforeseen = "its forward sets requires_grad"

    def _normalise(self, args: Any, kwargs: Any) -> None:
        """Note a normalisation that may write to its running statistics, which no version counts."""
        given = kwargs.values() if len(args) < 6 else args[5:6]
        self.writes |= any(value is True for value in given)

    def _look_up(self, args: Any, kwargs: Any) -> None:
        """Keep a copy of a weight that is about to be renormalised; note one whose gradient is scaled by frequency."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        weight = self.originals.get(id(weight), weight)
        if kwargs.get("scale_grad_by_freq", args[5] if len(args) > 5 else False):
            self.counted.add(id(weight))
        limit = kwargs.get("max_norm", args[3] if len(args) > 3 else None)
        if limit is not None and isinstance(weight, nn.Parameter) and id(weight) not in self.capture.changed:
            with torch._C.DisableTorchFunction():
                self.capture.changed[id(weight)] = weight, weight.detach().clone()

    def _note(self, parameter: Any, result: Any) -> None:
        """Note a use of a parameter, or of what a module's forward gets in its place."""
        if not isinstance(parameter, nn.Parameter) or not isinstance(result, Tensor | tuple | list):
            return  # its shape was asked for, say
        if not torch.is_grad_enabled():
            return  # a use that no gradient knows of: a module that is moved to the dtype that it has, say
        given = self.originals.get(id(parameter), parameter)
        key = self._shard_of(given) if self.shards else id(given)
        modules = self.owners.get(key)
        if modules is not None and not any(self.capture.active[m] > 0 for m in modules):
            self.found.add(key)
        elif result is not parameter:
            self.uses[key] += 1

    def _shard_of(self, parameter: nn.Parameter) -> int:
        """Return the id of a parameter, or that of its shard where it is gathered.

        A gathered parameter is another object than its shard: its module and attribute lead to the shard.
        """
        if id(parameter) not in self._gathered:
            places = self.shards.items()
            self._gathered |= {id(getattr(module, name)): key for (module, name), key in places}
            self._gathered.setdefault(id(parameter), id(parameter))
        return self._gathered[id(parameter)]


class _Setting:
    """Looks at ``Tensor.set_``, which no mode of torch sees, while there are guards."""

    def __init__(self) -> None:
        self._guards: list[UseGuard] = []
        self._lock = threading.Lock()

    def enter(self, guard: UseGuard) -> None:
        with self._lock:
            self._guards.append(guard)
            Tensor.set_ = self._set  # type: ignore[method-assign]

    def leave(self, guard: UseGuard) -> None:
        with self._lock:
            self._guards.remove(guard)
            if not self._guards:
                del Tensor.set_

    @property
    def _set(self) -> Callable[..., Tensor]:
        def set_(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = args[0] if len(args) == 1 else None
            with torch._C.DisableTorchFunction():
                if isinstance(given, Tensor) and given.dtype == x.dtype and given.is_set_to(x):
                    return x  # as where an adapter of peft's works on a parameter: nothing is written
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("triton."):  # what kernels are given
                for guard in self._guards:
                    guard.unforeseen = "its forward sets a tensor to another's memory"
            return torch._C.TensorBase.set_(x, *args, **kwargs)

        return set_


_SETTING = _Setting()
_is_of_torch = functools.lru_cache(1024)(is_of_torch)
_TENSOR = vars(torch._C.TensorBase)
# What is asked of a tensor and gives none: what is then done with the answer is seen.
_ASKS = {
    *(_TENSOR[name].__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
_REACHES = (
    "__dlpack__", "untyped_storage", "storage", "data_ptr", "retain_grad", "__repr__",
    "__format__", "__deepcopy__",
)  # fmt: skip
_LOOKED_AT: dict[Any, Callable[[UseGuard, Any, Any], None]] = {
    F.embedding: UseGuard._look_up,
    F.embedding_bag: UseGuard._look_up,
    Tensor.register_hook: UseGuard._hook,
    **dict.fromkeys((torch.autograd.grad, torch.autograd.backward, Tensor.backward), UseGuard._differentiate),
    _TENSOR["grad_fn"].__get__: UseGuard._node,  # which may get hooks that change a weight's gradient
    **dict.fromkeys((_TENSOR["data"].__get__, _TENSOR["data"].__set__), UseGuard._data),  # which nobody sees written
    Tensor.requires_grad_: UseGuard._flag,
    **dict.fromkeys((getattr(Tensor, name) for name in _REACHES), UseGuard._reach),
    **dict.fromkeys((Tensor.numpy, Tensor.__array__), UseGuard._lend),
    Tensor.to: UseGuard._cast,
    Tensor.type: UseGuard._cast,
    Tensor.type_as: UseGuard._cast,
    Tensor.float: lambda guard, args, _: guard._cast((*args, torch.float32), {}),
    Tensor.half: lambda guard, args, _: guard._cast((*args, torch.float16), {}),
    Tensor.bfloat16: lambda guard, args, _: guard._cast((*args, torch.bfloat16), {}),
    _TENSOR["requires_grad"].__set__: UseGuard._flag,
    **dict.fromkeys((_TENSOR["requires_grad"].__get__, _TENSOR["is_leaf"].__get__), UseGuard._ask),
    **dict.fromkeys((F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm), UseGuard._normalise),
}


def watch(
    capture: Capture,
    parameters: Iterable[nn.Parameter],
    n: int,
    outside: Outside | None,
    leaves: Sequence[Tensor] = (),
    trained: Mapping[int, bool] | None = None,
) -> UseGuard:
    """Return the guard of one forward of ``n`` samples, with the tensors of their batch as ``leaves``.

    ``outside``: captures parameters at the ops that use them. ``trained``: the user's flags, by parameters' ids.
    """
    parameters = list(parameters)
    raw = {} if outside is None else outside.raw
    owners: dict[int, set[nn.Module]] = {id(p): set() for p in parameters if id(p) not in raw}
    for use in capture.uses.values():
        for parameter in use.module._parameters.values():
            if id(parameter) in owners:
                owners[id(parameter)].add(use.module)
    shards = {}
    if any(sharded.is_sharded(p) for p in parameters):
        places = ((m, name, p) for m in capture.model.modules() for name, p in m.named_parameters(recurse=False))
        shards = {(m, name): id(p) for m, name, p in places if id(p) in owners}
    originals = {key: p for use in capture.uses.values() for key, p in use.originals.items()}
    names = capture.names | {key: capture.names[id(p)] for key, p in originals.items() if id(p) in capture.names}
    return UseGuard(owners, capture, shards, Movement(n, leaves, names), outside, originals, trained or {})
