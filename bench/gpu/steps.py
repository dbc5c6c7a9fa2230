"""A step: one number or a few that are measured together, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .clock import Machine


@dataclass(frozen=True)
class Step:
    """``run`` returns what was measured. ``limit``: seconds after which it hangs. ``warm``: compiles its kernels."""

    name: str
    table: str
    run: Callable[[Machine], dict[str, Any]]
    limit: float = 90.0
    warm: Callable[[Machine], object] | None = None


def all_steps(machine: Machine) -> list[Step]:
    """Return every step, what matters most first."""
    from . import extraction, factors, numerics, products, waits

    return [
        *numerics.steps(machine),
        *extraction.steps(machine),
        *waits.steps(machine),
        *factors.steps(machine),
        *products.steps(machine),
    ]
