"""Faults to plant in capture: what a fault is, and how it is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dropinf
from dropinf.capture.run import Run

SKETCH = dropinf.Dropout(dim=(5, 12))
DENSE = dropinf.Gaussian(dim=3)  # of whole gradients: no entry is looked up


@dataclass(frozen=True)
class Fault:
    """One change of the capture code. ``acts``: the batch, from 0, whose rows are the first that it makes wrong.

    ``heals``: the batch is right when it runs again, by colours, so no layer has to leave its rung.
    ``refused``: it breaks the last rung, so that nothing is left but an AttributionError.
    """

    name: str
    model: str
    plant: Callable[[Any], None]
    audit: str = "auto"
    acts: int = 0
    route: str | None = None
    sketch: dropinf.Sketch = SKETCH
    heals: bool = False
    refused: bool = False

    @property
    def setting(self) -> tuple[str, str | None, dropinf.Sketch]:
        """What the rows depend on where no fault is planted."""
        return self.model, self.route, self.sketch


FAULTS: list[Fault] = []


def fault(model: str, **options: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Add a function that plants a fault with pytest's monkeypatch to `FAULTS`, under the function's name."""

    def add(plant: Callable[[Any], None]) -> Callable[[Any], None]:
        FAULTS.append(Fault(plant.__name__, model, plant, **options))
        return plant

    return add


def around(patch: Any, owner: Any, name: str, new: Callable[..., Any]) -> None:
    """Replace a function by ``new``, which is given the function and its arguments."""
    old = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: new(old, *args, **kwargs))


class Batches:
    """Counts the batches that begin; ``kept`` holds what a fault keeps of this batch and of the one before."""

    def __init__(self, patch: Any) -> None:
        self.begun = 0
        self.now: dict[Any, Any] = {}
        self.before: dict[Any, Any] = {}
        around(patch, Run, "__init__", self._begin)

    def _begin(self, init: Callable[..., None], *args: Any) -> None:
        self.begun += 1
        self.before, self.now = self.now, {}
        init(*args)

    def stale(self, key: Any, value: Any) -> Any:
        """Keep a value, and return the one of the batch before; the value itself if there is none."""
        self.now[key] = value
        return self.before.get(key, value)
