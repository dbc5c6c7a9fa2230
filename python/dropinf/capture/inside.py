"""Functions of torch's, written in Python, that call others on parameters: run so that a mode sees each of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

OPENED = frozenset({F.multi_head_attention_forward})


def run_inside(mode: TorchFunctionMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the body of one of `OPENED`, which a mode was called for, in that mode."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}  # it would hand itself to the mode again
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    TorchFunctionMode.__enter__(mode)
    try:
        return body(*args, **kwargs)
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)
