"""What made gradients, and whether what is scored together is of one model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

CODE = "+"  # between the fingerprints that make a model's
# What each of them is of, as a message says it of two models that differ in it first.
_PARTS = (
    "the weights were others when they were compressed (or of another dtype)",
    "the weights are the same, and the classes or constants of modules are others",
    "the weights are the same, and what modules do in forward is not, or a constant that they read",
    "the weights are the same, and buffers are others (the running statistics of a BatchNorm, say)",
    "the weights are the same, and settings of modules are others (numbers and text in their attributes)",
)
_FUNCTIONS = 2


def is_same_code(before: str | None, now: str | None) -> bool:
    """Return whether two checksums of code are equal, as far as they tell: behind the version of Python, if any."""
    if before is None or now is None or before.partition(":")[0] != now.partition(":")[0]:
        return True
    return before == now


class Origin(NamedTuple):
    """What made gradients."""

    # Fingerprints of its parameters, classes, functions, buffers and settings: files of earlier versions have fewer.
    # Empty where shards, of which no rank has all.
    model: str
    loss: str  # name of the loss function, and a fingerprint of its source; empty where it is not known


def difference(one: str, other: str) -> str | None:
    """Return how two models, by `Origin.model`, are known to differ; None where they are not."""
    if not one or not other:
        return None
    for place, (a, b) in enumerate(zip(one.split(CODE), other.split(CODE), strict=False)):
        if not (is_same_code(a, b) if place == _FUNCTIONS else a == b):
            return _PARTS[min(place, len(_PARTS) - 1)]
    return None


def check_one_model(parts: Sequence[Any], names: Sequence[str], way_out: str) -> None:
    """Raise ValueError where it is known that gradients, or the sums of a Fisher, are of different models.

    ``names`` of the parts, as the message has them.
    """
    known = [(name, model) for name, part in zip(names, parts, strict=True) for model in _models(part)]
    for (one, a), (other, b) in combinations(known, 2):
        found = difference(a, b)
        if found is not None:
            who = f"{one} and {other} are" if one != other else f"{one} is"
            raise ValueError(f"{who} of different models: {found}. {way_out}")


def _models(source: Any) -> list[str]:
    origin = getattr(source, "origin", None)
    origins = getattr(source, "origins", ()) if origin is None else (origin,)
    return [model for model, _ in origins]


def joined(origins: Sequence[Origin | None]) -> Origin | None:
    """Return the origin of gradients of several, of one model; None where it is not known of one."""
    known = [origin for origin in origins if origin is not None]
    if not known or len(known) < len(origins):
        return None
    if "" in {origin.model for origin in known}:
        return Origin("", known[0].loss) if len(set(known)) == 1 else None
    losses = sorted({origin.loss for origin in known})
    return Origin(max((origin.model for origin in known), key=len), " and ".join(losses) if all(losses) else "")
