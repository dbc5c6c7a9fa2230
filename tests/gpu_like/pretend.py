"""Tensors that say they lie on a GPU, and are held to what a GPU asks of them, where there is none.

Their numbers lie on the CPU. `device` is "cuda:0" and `is_cuda` is True, so the code takes its ways for CUDA and launches
kernels, which Triton's interpreter runs. An op on tensors of both devices is refused as CUDA refuses it, and whatever
would make the host wait for the device is noted, with the line that asked for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from dropinf.capture import modules, run

ROOT = Path(__file__).parents[2]
_FOLDERS = ("python", "dropinf_kernels", "tests", "bench")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
# What makes the host wait besides copies: the shape of a result, or what the host does next, depends on values.
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.equal.default: "equal",
    aten.allclose.default: "allclose",
    aten.bincount.default: "bincount",
    aten.linalg_cholesky.default: "cholesky",
    aten.linalg_eigh.default: "eigh",
}
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_COPIES = (aten._to_copy.default, aten.copy_.default)


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        # C++ takes it for a CPU's: a device that torch was not built for has no streams that autograd could ask for.
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = Gpu.current
        if gpu is None:
            raise RuntimeError(f"{func}: its GPU is gone")
        return gpu.run(func, args, kwargs or {}, sys._getframe(1))

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()  # which views share

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to(CPU)

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self.cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()


_plain_to = Tensor.to


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, for which C++ alone would see two CPU tensors."""
    given = (x, *args, *kwargs.values())
    devices = {torch.device(v).type for v in given if isinstance(v, str | torch.device)}
    if "cuda" not in devices and not any(isinstance(v, OnGpu) for v in given):
        return _plain_to(x, *args, **kwargs)
    copy = kwargs.pop("copy", False)
    if "other" in kwargs:
        args = (kwargs.pop("other"), *args)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if not copy and memory_format is None and device in (None, x.device) and dtype in (None, x.dtype):
        return x
    with Gpu.moving(device or x.device):
        options = {"dtype": dtype or x.dtype, "non_blocking": non_blocking, "memory_format": memory_format}
        return aten._to_copy.default(x, **options)


def _made_on_cpu(make: Any) -> Any:
    """A constructor from Python's numbers, which C++ does not hand to a dispatch mode: made on the CPU, then copied."""

    def made(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        found: Tensor = make(data, **options) if device is None else make(data, **options).to(device)
        return found.requires_grad_() if requires_grad else found

    return made


class Gpu(TorchDispatchMode):
    """The GPU: it runs every op on its tensors. `waits` are the waits of the host, (what, file:line) each.

    `kernels` are the names of the kernels launched.
    """

    current: Gpu | None = None
    target: torch.device | None = None  # of the copy that `to` asks for

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.kernels: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def moving(cls, device: torch.device) -> Iterator[None]:
        before, cls.target = cls.target, device
        try:
            yield
        finally:
            cls.target = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {}, sys._getframe(1))

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], frame: FrameType) -> Any:
        """Run one op; its results lie where its arguments do."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_gpu = any(isinstance(t, OnGpu) for t in tensors)
        asked = kwargs.get("device")
        if func is aten._to_copy.default:
            to_gpu = (self.target or (CUDA if on_gpu else torch.device(asked or CPU))).type == "cuda"
        elif on_gpu or asked is None:
            to_gpu = on_gpu
        else:  # autograd's own zeros lie where the gradient does, which C++ takes for the CPU
            to_gpu = torch.device(asked).type == "cuda" or frame.f_code.co_name == "_engine_run_backward"
        if asked is not None:
            kwargs = kwargs | {"device": CPU}
        kwargs.pop("pin_memory", None)  # all memory is
        if on_gpu or to_gpu:
            self._check(func, args, kwargs, tensors, to_gpu, frame)
        held = {id(t.held): t for t in tensors if isinstance(t, OnGpu)}
        args, kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
        if func is aten.histc.default and on_gpu:  # of integers too, on CUDA
            args = (args[0].double(), *args[1:])
        out = func(*args, **kwargs)
        if not to_gpu:
            return out
        if func is aten.histc.default:
            out = out.to(tensors[0].dtype)
        # In place, an op returns what it was given.
        return tree_map_only(Tensor, lambda t: held[id(t)] if id(t) in held else OnGpu(t), out)

    def _check(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], to_gpu: bool, frame: FrameType
    ) -> None:
        """Refuse what CUDA refuses, and note what waits."""
        if func in _COPIES:
            ends = {isinstance(t, OnGpu) for t in tensors} | ({to_gpu} if func is aten._to_copy.default else set())
            blocking = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if len(ends) == 2 and blocking:
                up = to_gpu if func is aten._to_copy.default else isinstance(args[0], OnGpu)
                self._note("copy to the GPU" if up else "copy to the CPU", frame)
            return
        host = [t for t in tensors if not isinstance(t, OnGpu) and t.ndim]
        if func in _INDEXED:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self._note("index by truth values", frame)
            if any(not isinstance(i, OnGpu) for i in indices):
                self._note("copy to the GPU", frame)
            host = [t for t in host if all(t is not i for i in indices)]
        if host:
            raise RuntimeError(f"{func}: expected all tensors on one device, and found cuda:0 and cpu")
        sized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if func in WAITS or sized:
            self._note("repeat_interleave" if sized else WAITS[func], frame)

    def _note(self, what: str, frame: FrameType | None) -> None:
        """Note a wait by the line of the packages that asked for it, or of whoever did where none of them did."""
        found = None
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            # What runs a model's op for it did not ask for it.
            passes_on = frame.f_code.co_name in ("__torch_function__", "__torch_dispatch__") or (
                path.name == "outside.py" and frame.f_code.co_name == "__call__"
            )
            ours = (
                path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in _FOLDERS
            )  # an environment lies there too
            if ours and path.name != "pretend.py" and not passes_on:
                found = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
                break
            found = found or f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back
        self.waits.append((what, str(found)))


_run_kernel = interpreter.GridExecutor.__call__


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Run a kernel on the numbers that its arguments hold."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    gpu = Gpu.current
    if gpu is not None:
        gpu.kernels.append(self.fn.__name__)
        if not all(isinstance(t, OnGpu) for t in tensors):
            raise RuntimeError(f"{self.fn.__name__}: an illegal memory access, of a tensor on the CPU")
    args, kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    with _disable_current_modes():
        _run_kernel(self, *args, **kwargs)


class Stream:
    """A stream on which all is done at once."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """Wait for what was done already."""

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: None)


PROPERTIES = SimpleNamespace(
    name="pretended",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=227 << 10,
    total_memory=80 << 30,
)


@contextlib.contextmanager
def gpu() -> Iterator[Gpu]:
    """Have a GPU inside: what is moved to `CUDA`, or made there, is on it."""
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(device),
        "stream": lambda stream: contextlib.nullcontext(stream),
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    mode = Gpu()
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(Tensor, "to", _to),
        mock.patch.multiple(torch, tensor=_made_on_cpu(torch.tensor), as_tensor=_made_on_cpu(torch.as_tensor)),
        mock.patch.object(Tensor, "record_stream", return_value=None),
        mock.patch.object(Tensor, "cuda", lambda x, *_, **__: x.to(CUDA)),
        mock.patch.object(interpreter.GridExecutor, "__call__", _launch),
        mock.patch.object(Gpu, "current", mode),
        mock.patch.object(modules, "_is_plain", lambda p: isinstance(p, nn.Parameter) and p.is_floating_point()),
        mock.patch.object(run, "own_modes", return_value=False),  # this one is no user's
        mode,
    ):
        yield mode


def move(model: nn.Module) -> nn.Module:
    """Move a model to the GPU, tied weights too: Module.to sets `data`, which C++ takes for two CPU tensors."""
    moved: dict[int, Tensor] = {}

    def of(t: Tensor) -> Tensor:
        if id(t) not in moved:
            there = t.detach().to(CUDA)
            moved[id(t)] = nn.Parameter(there, t.requires_grad) if isinstance(t, nn.Parameter) else there
        return moved[id(t)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: of(t) for name, t in tensors.items() if t is not None})
    return model
