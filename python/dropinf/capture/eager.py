"""Compiled code runs eagerly while gradients are captured, as it does not see hooks that are added later."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_cond: Any = importlib.import_module("torch._higher_order_ops.cond")
_DYNAMO = "torch._dynamo"


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run what is compiled, and the branches of ``torch.cond``, as plain Python inside.

    Raises RuntimeError where something is compiled inside for the first time in the process, and cannot be.
    """
    before = _cond.cond_op
    known = _DYNAMO in sys.modules  # importing it takes seconds, and most models compile nothing
    try:
        with torch.compiler.set_stance("force_eager") if known else contextlib.nullcontext():
            _cond.cond_op = _branch
            yield
    except Exception as error:
        if known or not type(error).__module__.startswith(_DYNAMO):
            raise
        raise RuntimeError(
            "model: it, or the loss, is compiled while its gradients are captured, and cannot be there; "
            "import torch._dynamo before, so that it runs eagerly"
        ) from error
    finally:
        _cond.cond_op = before


def _branch(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any]) -> Any:
    return (true_fn if bool(pred) else false_fn)(*operands)
