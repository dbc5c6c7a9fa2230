"""Which kinds of module are hooked, and how each is captured."""

from __future__ import annotations

import torch
from torch import nn

from .convolution import ConvUse
from .layer import LayerKind
from .modules import EmbeddingUse, LinearUse, NormUse, Use, rms_epsilon
from .taps import is_of, is_of_torch

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def module_kind(module: nn.Module) -> LayerKind | None:
    """Return how a module's ``weight`` is captured, or None.

    ``forward`` decides, not the class: a subclass that overrides ``forward`` may compute anything, as may one that
    overrides how its attributes are found.
    """
    if isinstance(module, torch.jit.ScriptModule) or _computes_attributes(module):
        return None
    forward = type(module).forward
    if is_of(forward, "transformers", "pytorch_utils.py"):
        return "linear"
    if type(module).__name__.endswith("RMSNorm") and rms_epsilon(module) is not None:
        return "norm"
    if not is_of_torch(forward):  # which may have been replaced for the whole class
        return None
    if forward is nn.Linear.forward:
        return "linear"
    if any(forward is c.forward for c in _CONVS):
        return "conv" if is_of_torch(getattr(type(module), "_conv_forward", None)) else None
    if forward is nn.Embedding.forward:
        return "embedding"
    return "norm" if any(forward is n.forward for n in _NORMS) else None


def _computes_attributes(module: nn.Module) -> bool:
    """Return whether a module's class may give something else than a parameter under a parameter's name."""
    kind = type(module)
    own = kind.__getattribute__ is not object.__getattribute__ or kind.__getattr__ is not nn.Module.__getattr__
    return own or any(hasattr(kind, name) for name in module._parameters)


USES: dict[str, type[Use]] = {
    "linear": LinearUse,
    "conv": ConvUse,
    "embedding": EmbeddingUse,
    "norm": NormUse,
}
