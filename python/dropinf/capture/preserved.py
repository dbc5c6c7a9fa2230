"""A model that is compressed, and afterwards is bit for bit what it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import sharded


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
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
    """Return a context in which compiled code runs eagerly, as it does not see hooks that are added later."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
