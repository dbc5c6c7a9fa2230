"""FSDP2: parameters are shards between forwards, and other objects, gathered and with flags of their own, inside."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def _modules(model: nn.Module) -> list[Any]:
    """Return the FSDP2 modules, each before those inside it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Put the shards back. A forward without a backward, an evaluation say, leaves the root gathered."""
    for module in _modules(model):
        module.reshard()


def initialise(model: nn.Module) -> None:
    """Have FSDP do the work of its first forward now, before any flag changes.

    It takes the dtype of its gradients, once and for all, from the parameters that require one.
    """
    for module in _modules(model):
        module._get_fsdp_state()._lazy_init()


def reset(model: nn.Module) -> None:
    """Forget a forward or backward that an error cut short."""
    for module in _modules(model):
        if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
            module.reset_iter_state()


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a parameter is a shard."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def check_whole(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a parameter that needs the exact route is a shard."""
    for name, parameter in parameters:
        if is_sharded(parameter):
            raise ValueError(
                f"layer {name}: the parameter is sharded and used other than by the forward of a module that dropinf "
                "hooks, so its gradient needs the whole parameter; name the other layers in layers=, or compress the "
                "model before it is sharded"
            )
