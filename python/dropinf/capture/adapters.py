"""Which parameters of a model are of its PEFT adapters, without importing PEFT."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

from torch import nn


def adapter_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the parameters of the active adapters, with their names; none where the model has no adapter.

    PEFT's layers list what is theirs: `adapter_layer_names`, and the copies in `modules_to_save`; a prompt is in
    `prompt_encoder`. Each holds one entry by the name of the adapter.
    """
    if "peft" not in sys.modules:
        return {}
    found = {p for module in model.modules() for p in _of_module(module)}
    return {p: name for name, p in model.named_parameters() if p in found}


def _of_module(module: nn.Module) -> Iterator[nn.Parameter]:
    held = [*getattr(module, "adapter_layer_names", ()), "modules_to_save", "prompt_encoder"]
    wanted = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
    if wanted is None or callable(wanted):  # transformers' models ask their layers, which are seen too
        return
    for adapter in [wanted] if isinstance(wanted, str) else wanted:
        for attribute in held:
            holder = getattr(module, attribute, None)
            if not isinstance(holder, nn.ModuleDict | nn.ParameterDict) or adapter not in holder:
                continue
            if isinstance(holder, nn.ParameterDict):
                yield holder[adapter]
            else:
                yield from holder[adapter].parameters()


def warn_adapters(adapter: dict[nn.Parameter, str]) -> None:
    """Say that the adapters of a frozen model are tracked, and nothing else."""
    names = list(adapter.values())
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f"model: PEFT loaded it with every parameter frozen, so its adapter alone is tracked ({named}), as it would be "
        "with PeftModel.from_pretrained(..., is_trainable=True); pass layers='*' to track the base model too",
        stacklevel=5,
    )
