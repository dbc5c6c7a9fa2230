"""A solved query as a direction in weight space: what a gradient's product with is the sample's influence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..capture.identity import identity
from ..capture.layer import clean_name
from ..compressor import Compressor
from ..fisher.fisher import Fisher
from ..gradients import Gradients, Rows, Shapes, check_same_sketch, positions_of
from ..origin import Origin, check_one_model
from ..readonly import ReadOnly
from ..workload import check_model, unwrap
from .parts import Part, load_parts, save_parts


class Direction:
    """Q directions in weight space, one a query: ``<gradient of a sample's loss, direction>`` is the sample's score.

    :func:`direction` makes them of compressed queries. They are held as they were solved, [Q, *stored_shape] a layer,
    and one parameter of one query is spread out when :meth:`tensor` asks for it. Where directions are given on whole
    parameters, :meth:`dense` makes one of them.

    ``len(d)`` is Q; ``d[i]`` is the Direction of some queries (an int, a slice, a list or a mask); ``a - b``,
    ``a + b``, ``2 * a`` and ``-a`` are directions too: ``d[0] - d[1]`` is the contrast of two queries.
    """

    def __init__(self, parts: Mapping[str, Part], model: str) -> None:
        self._parts, self._model = dict(parts), model

    @classmethod
    def dense(cls, tensors: Mapping[str, Tensor], model: nn.Module) -> Direction:
        """Return directions that are given on whole parameters.

        Args:
            tensors: parameter name -> [Q, *shape], floating point and finite. Held, not copied. On a parameter that is
                not named, the direction is zero.
            model: the model that they belong to, with its weights of now.

        Raises:
            TypeError: ``model`` is no module, or ``tensors`` no mapping of tensors.
            ValueError: a parameter that the model lacks, or has in another shape; another Q; values that are not
                finite, or not floating point.
        """
        check_model(model)
        if not isinstance(tensors, Mapping) or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise TypeError(
                f"tensors must map names of parameters to tensors [Q, *shape], got {type(tensors).__name__}"
            )
        if not tensors:
            raise ValueError("tensors is empty; name at least one parameter")
        inner = unwrap(model)
        count = next(iter(tensors.values())).shape[:1]
        for name, x in tensors.items():
            if not x.is_floating_point() or not bool(x.isfinite().all()):
                raise ValueError(f"tensors[{name!r}] must hold finite floating-point numbers, it is {x.dtype}")
            if x.shape[:1] != count:
                raise ValueError(
                    f"tensors[{name!r}] is {list(x.shape)}; the first has {list(count)} queries: [Q, *shape]"
                )
        found = cls({clean_name(name): Part(x.detach(), None) for name, x in tensors.items()}, identity(inner))
        known = found.check_parameters(inner)
        if len({id(p) for p in known.values()}) < len(known):
            raise ValueError("tensors: two names are of one parameter, which the model ties; name it once")
        return found

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters on which the direction may differ from zero."""
        return tuple(self._parts)

    @property
    def shapes(self) -> Shapes:
        """Parameter name -> its shape."""
        return ReadOnly({name: part.shape for name, part in self._parts.items()})

    @property
    def model(self) -> str:
        """The fingerprint of the model and weights that the direction belongs to, as `Origin.model`."""
        return self._model

    @property
    def origin(self) -> Origin:
        """The model, as gradients have it; of no loss."""
        return Origin(self._model, "")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all values are exact in."""
        found = torch.float32
        for part in self._parts.values():
            found = torch.promote_types(found, part.values.dtype)
        return found

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())).values)

    def __getitem__(self, key: Rows) -> Direction:
        at = positions_of(key, len(self))
        return self._map(lambda _, part: part.values[at.to(part.values.device)])

    def tensor(self, name: str, q: int) -> Tensor:
        """Return the direction of query ``q`` on one parameter, [*shape of the parameter], zero where a mask drops.

        Raises:
            KeyError: no such parameter in the direction.
            IndexError: no such query.
        """
        if name not in self._parts:
            known = ", ".join(list(self._parts)[:8]) + ", ..." * (len(self._parts) > 8)
            raise KeyError(f"no parameter {name!r} in this direction; it has {known}")
        return self._parts[name].whole(int(positions_of(q, len(self))[0]))

    def check_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the model's parameters that the direction is on, by name, as the model has them now.

        Raises:
            ValueError: the model lacks one, has it in another shape, or as a shard.
        """
        known = {clean_name(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}
        for name, shape in self.shapes.items():
            way_out = "make the direction with this model"
            if name not in known:
                raise ValueError(f"direction: its parameter {name!r} is not one of the model's; {way_out}")
            if tuple(known[name].shape) != shape:
                what = f"{list(shape)} in it and {list(known[name].shape)} in the model"
                raise ValueError(f"direction: its parameter {name!r} is {what}; {way_out}")
        return {name: known[name] for name in self._parts}

    def __add__(self, other: object) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        check_one_model([self, other], ["the first direction", "the second"], "Make both with one model")
        if len(self) != len(other):
            raise ValueError(
                f"directions of {len(self)} and {len(other)} queries do not add up; select as many of each: a[0] - b[0]"
            )
        for name in {**self._parts, **other._parts}:
            one, two = self._parts.get(name), other._parts.get(name)
            if one is None or two is None or one.digest() != two.digest():
                raise ValueError(
                    f"directions differ on parameter {name!r}: of one sketch it must be, or whole in both (see "
                    "Direction.dense); make both with one Compressor"
                )
        return self._map(lambda name, part: part.values + other._parts[name].values.to(part.values.device))

    def __mul__(self, factor: object) -> Direction:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        return self._map(lambda _, part: part.values * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1.0

    def __sub__(self, other: object) -> Direction:
        return self + -other if isinstance(other, Direction) else NotImplemented

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that :meth:`load` reads back bit for bit, complete once it has its name."""
        save_parts(self._parts, self._model, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Direction:
        """Read a file that :meth:`save` wrote, into the host's memory.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, or a damaged one.
        """
        return cls(*load_parts(path))

    def _map(self, values: Callable[[str, Part], Tensor]) -> Direction:
        wide = {name: part.of(part.values.to(self.dtype)) for name, part in self._parts.items()}  # no half precision
        return Direction({name: part.of(values(name, part)) for name, part in wide.items()}, self._model)

    def __repr__(self) -> str:
        return f"Direction({len(self)} queries, {self.dtype}, {len(self._parts)} parameters)"


class _Made(NamedTuple):
    """What a compressor makes, as gradients say it of themselves."""

    shapes: Shapes
    digest: Mapping[str, str]
    origin: Origin


def direction(query: Gradients, fisher: Fisher | None, compressor: Compressor) -> Direction:
    """Return queries as directions in weight space, ``v_q = S^T (F + lambda I)^{-1} c_q``.

    S is the sketch of `compressor`, so that ``c_n = S grad l_n`` and the score of a sample is one product with its
    whole gradient: ``c_q^T (F + lambda I)^{-1} c_n = <grad l_n, v_q>``. :func:`rerank` takes it in forward mode.

    Args:
        query: gradients of Q samples that `compressor` made.
        fisher: of gradients that the same masks made; None for ``v_q = S^T c_q``, whose scores are dot products.
        compressor: with the model that `query` was made with, at the same weights.

    Raises:
        TypeError: not gradients in memory, not a Fisher, or not a Compressor.
        ValueError: another sketch, another model or other weights; rows that are an optimizer's updates; shards; a
            Fisher matrix without samples, or one that is singular with its damping.
    """
    if not isinstance(query, Gradients):
        raise TypeError(f"query must be Gradients, as compressor.compress(batches) returns them, got {query!r}")
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be the dropinf.Compressor that made query, got {compressor!r}")
    if fisher is not None and not isinstance(fisher, Fisher):
        raise TypeError(f"fisher must be a dropinf.Fisher, or None for dot products, got {fisher!r}")
    if compressor.is_sharded:
        raise ValueError("compressor: parameters of its model are shards; make the direction before it is sharded")
    if compressor._optimizer is not None:
        raise ValueError(
            "compressor has a preconditioner, so its rows are the optimizer's updates and no gradients; make the query "
            "with a Compressor without it"
        )
    made = _Made(compressor.shapes, compressor.digest(), compressor.origin())
    check_same_sketch(query, made, "query and compressor")
    parts = {"query": query, "compressor": made} | ({} if fisher is None else {"fisher": fisher})
    check_one_model(list(parts.values()), list(parts), "Compress all with one model, at the same weights")
    if fisher is None:
        solved = query.to(torch.promote_types(query.dtype, torch.float32))
    else:
        fisher.check(query, "fisher and query")
        solved = fisher.solve(query)
    plans = {name: layer.to(solved.device) for name, layer in compressor.layers.items()}
    return Direction({x.parameter: Part(solved[name], x) for name, x in plans.items()}, made.origin.model)
