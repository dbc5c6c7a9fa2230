"""Scores taken apart: a part for each layer or group of layers, or a sum for each source of training samples."""

from __future__ import annotations

import fnmatch
import hashlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from .gradients import At, GradientSource
from .ranks import Ranks

Label = str | int
By = Literal["layer", "source"] | Mapping[str, str | Sequence[str]]
Sources = Sequence[Label] | Tensor | Callable[[str], Label]
Ids = Callable[[], list[str]]
_REST = "*"  # the pattern of the layers that no other group has
_SHOWN = 4  # names that a message shows


@dataclass(frozen=True, eq=False, repr=False)
class ScoreParts:
    """Scores that were taken apart: what `score(..., by=...)` returns. Iterating yields the names of the parts.

    A score is a dot product `v . c_n`: of "influence", `v = (F + lambda I)^{-1} c_q`. The part of a layer is the dot
    product of that layer's coordinates alone, and a group's is the sum of its layers' parts, so parts sum to the score
    (of "cosine" and "relative" too: each is divided by the divisor of the whole). With a Fisher matrix of kind "joint",
    the solve mixes the layers before v is cut: a layer's part then holds what reaches it from the query's other layers.

    names: of the layers, groups or sources, in the order of the gradients, of the mapping, or of first appearance.
    values: `[P, Q, N]` of P layers or groups. Of S sources `[Q, S]`: the sum of the scores of each source's samples.
    `parts[name]`: one part, `[Q, N]` of a layer or group, `[Q]` of a source. KeyError: no part has this name.
    """

    names: tuple[Label, ...]
    values: Tensor

    @cached_property
    def _place(self) -> dict[Label, int]:
        return {name: i for i, name in enumerate(self.names)}

    def __getitem__(self, name: Label) -> Tensor:
        if name not in self._place:
            raise KeyError(f"no part {name!r}; the parts are {_some(self.names)}")
        i = self._place[name]
        return self.values[:, i] if self.values.ndim == 2 else self.values[i]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Label]:
        return iter(self.names)

    def items(self) -> Iterator[tuple[Label, Tensor]]:
        """Yield (name, values) of each part."""
        return ((name, self[name]) for name in self.names)

    def __repr__(self) -> str:
        return f"ScoreParts({_some(self.names)}: {list(self.values.shape)}, {self.values.dtype})"


@dataclass(frozen=True)
class LayerParts:
    """Which layers each part has, by position; of how many training samples."""

    names: tuple[Label, ...]
    layers: Sequence[Sequence[int]]
    samples: int

    def collect(self, columns: Iterable[tuple[At, Tensor]], like: Tensor, ranks: Ranks) -> ScoreParts:
        """Return the parts of (positions, scores [P, Q, n]) of this rank's blocks, with all other ranks'."""
        _check_ranks(ranks, self.names, repr(self.layers).encode())
        values = like.new_zeros(len(self.names), len(like), self.samples)
        for at, block in columns:
            values[..., at] = block.to(values)
        return ScoreParts(self.names, ranks.sum(values))


@dataclass(frozen=True)
class SourceSums:
    """Which source each training sample is of, by position: int64 [N], on the CPU."""

    names: tuple[Label, ...]
    of_sample: Tensor
    layers: None = None

    def collect(self, columns: Iterable[tuple[At, Tensor]], like: Tensor, ranks: Ranks) -> ScoreParts:
        """Return the sums of (positions, scores [Q, n]) of this rank's blocks, with all other ranks'.

        They are added up in float64 and on the CPU, where the same scores give the same bits.
        """
        _check_ranks(ranks, self.names, self.of_sample.numpy().data)
        sums = torch.zeros(len(like), len(self.names), dtype=torch.float64, device="cpu")
        for at, block in columns:
            sums.index_add_(1, self.of_sample[at], block.to("cpu", torch.float64))
        return ScoreParts(self.names, ranks.sum(sums).to(like))


def taken_apart(
    by: By | None, sources: Sources | None, train: GradientSource, ids: Ids | None, **others: object
) -> LayerParts | SourceSums | None:
    """Return how `by` takes scores apart, or None where it is None; see `score`.

    Args:
        ids: of the training samples; None where they have none.
        others: arguments of `score` that have no meaning beside `by`, by name; they must be None.
    """
    if by is None:
        if sources is not None:
            raise ValueError('sources are given and by is None; pass by="source" for the sum of each source')
        return None
    _check_alone(by, others)
    if by == "source":
        if sources is None:
            raise ValueError(
                'sources is None and by is "source"; pass a list of one label per training sample, or a function from '
                "an id to one"
            )
        return _by_source(_labels(sources, len(train), ids))
    if sources is not None:
        raise ValueError(f'sources are given and by is {by!r}; sources need by="source", which is a call of its own')
    if isinstance(by, Mapping):
        groups = _groups(by, list(train.shapes))
        return LayerParts(tuple(groups), list(groups.values()), len(train))
    if by != "layer":
        raise ValueError(
            f'by is {by!r}; it must be "layer", "source", or a mapping from the name of a group to name patterns of '
            "its layers"
        )
    return LayerParts(tuple(train.shapes), [[i] for i in range(len(train.shapes))], len(train))


_WAYS_OUT = {
    "top": "find the best first, best = score(..., top=k), and take those apart: score(query, "
    "train[best.indices.unique()], ..., by=...); of sources, take values.topk(k)",
    "reduce": "take values.mean(-2) of what is returned, or values.amax(-2)",
    "out": "save values of what is returned; where they do not fit in memory, take some samples at a time: train[a:b]",
}


def _check_alone(by: object, others: Mapping[str, object]) -> None:
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r} and by is {by!r}; by takes no {name}: {_WAYS_OUT[name]}")


def _groups(by: Mapping[str, str | Sequence[str]], layers: list[str]) -> dict[str, list[int]]:
    """Return the layers of each group, by position: each layer is in one group."""
    owner: dict[str, str] = {}
    rest: str | None = None
    for group, pattern in [(name, pattern) for name, value in by.items() for pattern in _patterns(name, value)]:
        if pattern == _REST:
            if rest not in (None, group):
                raise ValueError(f'by: groups {rest!r} and {group!r} both have "*", the layers of no other; keep one')
            rest = group
            continue
        matched = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"by[{group!r}]: {pattern!r} matches no layer; the layers are {_some(layers)}")
        for name in matched:
            if owner.setdefault(name, group) != group:
                raise ValueError(
                    f"by: layer {name!r} is in groups {owner[name]!r} and {group!r}, so it would count twice; "
                    "make their patterns narrower"
                )
    left = [name for name in layers if name not in owner]
    if left and rest is None:
        raise ValueError(
            f"by: no group has {_some(left)}, so the parts would not sum to the score; "
            'add a group "rest": "*", the layers that no other group has'
        )
    return {group: [i for i, name in enumerate(layers) if owner.get(name, rest) == group] for group in by}


def _patterns(group: object, value: object) -> list[str]:
    """Return the patterns of a group."""
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not isinstance(group, str) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"by[{group!r}] is {value!r}; by maps the name of a group, a str, to a layer's name pattern or several, "
            'such as {"attention": "*.attn.*", "rest": "*"}'
        )
    return patterns


def _by_source(labels: list[Label]) -> SourceSums:
    place: dict[Label, int] = {}
    codes = [place.setdefault(label, len(place)) for label in labels]
    return SourceSums(tuple(place), torch.tensor(codes, dtype=torch.int64, device="cpu"))


def _labels(sources: Any, samples: int, ids: Ids | None) -> list[Label]:
    """Return the label of each training sample."""
    found: object = None
    if callable(sources):
        if ids is None:
            raise ValueError(
                "sources is a function of ids, and train has none; pass a list of one label per training sample, or "
                "train as an Index that was made with ids="
            )
        found = [sources(name) for name in ids()]
    elif hasattr(sources, "tolist"):  # a tensor, an array
        found = sources.tolist()
    elif isinstance(sources, Sequence) and not isinstance(sources, str | bytes):
        found = list(sources)
    if not isinstance(found, list):
        raise TypeError(
            f"sources is {type(sources).__name__}; it must be a list of one label per training sample, or a function "
            "from an id to one"
        )
    if len(found) != samples:
        raise ValueError(f"sources has {len(found)} labels and train {samples} samples; pass one label per sample")
    return [_label(label, i) for i, label in enumerate(found)]


def _label(label: object, i: int) -> Label:
    if isinstance(label, str):
        return str(label)
    if isinstance(label, numbers.Integral) and not isinstance(label, bool):
        return int(label)
    raise TypeError(f"sources: the label of sample {i} is {label!r}; it must be a str or an int")


def _check_ranks(ranks: Ranks, names: tuple[Label, ...], parts: bytes | memoryview) -> None:
    """Raise ValueError where ranks would add up parts of different layers or sources."""
    if ranks.world == 1:
        return
    mine = hashlib.sha256(repr(names).encode())
    mine.update(parts)
    if len(set(ranks.everyone(mine.hexdigest()))) > 1:
        raise ValueError("by, sources: they differ between ranks; pass the same to all, sources of all of train")


def _some(names: Sequence[Label]) -> str:
    """Return the names, or the first few and the last."""
    shown = list(map(repr, names))
    return ", ".join(shown if len(shown) <= _SHOWN else [*shown[: _SHOWN - 1], "...", shown[-1]])
