"""The ladder: how each parameter's gradient is found, from the fastest way to the surest."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

Rung = Literal["hook", "op", "vmap", "alone", "backward"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
TAPPED = RUNGS[:2]  # whose gradients come with the batch's own backward
Route = Mapping[str, Rung]  # name patterns -> where to start


class AttributionError(ValueError):
    """No way of finding per-sample gradients agrees with plain autograd, or samples mix."""


class SamplesMix(AttributionError):  # noqa: N818
    """The loss of one sample depends on another."""


class Ladder:
    """The rung of each layer, and why it left the first one."""

    def __init__(self, exact: Mapping[str, str], hooked: Iterable[str], route: Route | None) -> None:
        self.rungs: dict[str, Rung] = {**dict.fromkeys(hooked, RUNGS[0]), **dict.fromkeys(exact, RUNGS[1])}
        self.reasons = dict(exact)
        for pattern, rung in (route or {}).items():
            if rung not in RUNGS:
                raise ValueError(f"route: {pattern!r} is to take {rung!r}; it must be one of {', '.join(RUNGS)}")
            names = [n for n in self.rungs if fnmatch.fnmatchcase(n, pattern)]
            if not names:
                raise ValueError(
                    f"route: {pattern!r} matches no layer; layers are {', '.join(list(self.rungs)[:5])}, ..."
                )
            for name in names:
                if rung != "hook":
                    self.reasons[name] = "route= says so"
                    self.rungs[name] = rung

    @property
    def exact(self) -> set[str]:
        """The layers whose whole gradients are computed beside the batch's backward."""
        return {name for name, rung in self.rungs.items() if rung not in TAPPED}

    @property
    def tapped(self) -> list[str]:
        """The layers whose gradients come with the batch's own backward."""
        return [name for rung in TAPPED for name in self.on(rung)]

    def on(self, rung: Rung) -> list[str]:
        """Return the layers on a rung."""
        return [name for name, at in self.rungs.items() if at == rung]

    def lower(self, name: str, reason: str, to: Rung | None = None) -> bool:
        """Move a layer to the next rung, or to ``to``; return False where it is at the last."""
        at = RUNGS.index(self.rungs[name])
        if at + 1 == len(RUNGS):
            return False
        self.rungs[name] = to or RUNGS[at + 1]
        self.reasons.setdefault(name, reason)
        return True
