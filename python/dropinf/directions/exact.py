"""Products of a batch's gradients with directions, proven on that batch, by the way that is right for the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..capture import sharded
from ..capture.audit import TOLERANCE, is_due
from ..capture.checks import check_batchnorm, check_surroundings, explain_batch
from ..capture.identity import identity
from ..capture.ladder import AttributionError
from ..capture.preserved import Attributes, Flags, Start, preserved, renormalised
from ..origin import Origin, check_one_model
from ..workload import LossFn, check_pair, unwrap
from .direction import Direction
from .products import Named, backward_products, forward_product
from .reference import Reference

Way = Literal["auto", "forward", "backward"]
_PROBES = 3  # products with directions that tell a gradient's size
_WAY_OUT = (
    "take the compressed scores of these samples, dropinf.score(query, train, fisher), or have the model compute this "
    "by ops that PyTorch can differentiate twice"
)


class _Along(NamedTuple):
    """A direction as it is multiplied with: of about unit norm, by a power of two that its products are scaled by."""

    whole: Named
    scale: float


class _Forward(NamedTuple):
    """What forward mode gave for a batch; no rows where it has none, for a reason."""

    rows: list[Tensor]  # products with each direction, as it is multiplied with
    losses: list[Tensor]  # of each of these forwards
    probes: list[Tensor]  # products with random directions, which tell how large each gradient is
    reason: str


_NONE = _Forward([], [], [], "")


class Exact:
    """A model in the middle of a call, and the way that products are found."""

    def __init__(
        self,
        model: nn.Module,
        direction: Direction,
        loss_fn: LossFn,
        way: Way,
        what: str,
        state: tuple[Flags, Attributes],
    ) -> None:
        self.model, self.direction, self.loss_fn, self.what = model, direction, loss_fn, what
        self.parameters = direction.check_parameters(model)
        self.forward, self.may_turn = way != "backward", way == "auto"
        self.flags, self.attributes = state
        self.batches = 0
        self.versions = self._versions()

    def __call__(self, batch: Any, check: Callable[[Any, Any], None]) -> Tensor:
        """Return the products of one batch, [Q, *shape of the losses], and leave the model as it was."""
        self.attributes.check_untouched()
        self.attributes.refresh()
        changed = renormalised(self.model)
        start = Start(self.attributes, batch, copied=True, changed=changed)
        self.attributes.pending = start

        def losses_of() -> Tensor:
            losses = self.loss_fn(self.model, batch)
            check(losses, batch)
            start.check_parameters(self.model, changed)
            return losses

        self._check_weights()
        with self.flags.frozen():
            ahead = self._forward(start, losses_of) if self.forward else _NONE
            start.restore()
            try:
                with self.flags.own(self.parameters.values()):
                    reference = Reference(self.model, losses_of, self.parameters, self.batches, _sizes(ahead))
            except Exception as error:
                explained = explain_batch(self.model, batch, error)
                if explained is None:
                    raise
                raise explained from error
            found = self._products(start, losses_of, reference, ahead)
            start.restore()
        self.attributes.pending = None
        self.batches += 1
        return found

    def _check_weights(self) -> None:
        """Raise ValueError where a weight of the direction was written to since the call began."""
        if self._versions() != self.versions:
            raise ValueError(f"model: its weights changed while {self.what} read batches; make the direction again")

    def _versions(self) -> tuple[tuple[int, int], ...]:
        return tuple((p.data_ptr(), p._version) for p in self.parameters.values() if not p.is_inference())

    def _products(self, start: Start, losses_of: Callable[[], Tensor], reference: Reference, ahead: _Forward) -> Tensor:
        """Return what forward mode found, where it agrees with plain autograd, or what a backward finds instead."""
        if not bool(reference.losses.isfinite().all()):
            raise ValueError(
                f"loss_fn: a loss of batch {self.batches} is not finite (NaN or inf); leave that sample out"
            )
        if self.forward:
            reason = ahead.reason or self._difference(ahead, reference)
            if not reason:
                scaled = [row.double() * self._along(q).scale for q, row in enumerate(ahead.rows)]
                return self._finished(scaled, reference)
            if not self.may_turn:
                raise AttributionError(f"{self.what}: forward mode is not right here: {reason}; pass way='auto'")
            self.forward = False
            warnings.warn(
                f"{self.what}: forward mode does not serve this model ({reason}), so a backward is differentiated "
                "instead: the same numbers, from more memory",
                stacklevel=5,
            )
        start.restore()
        return self._backward(losses_of, reference)

    def _forward(self, start: Start, losses_of: Callable[[], Tensor]) -> _Forward:
        """Return the products with each direction, or why there are none."""
        rows, every = list[Tensor](), list[Tensor]()
        for q in range(len(self.direction)):
            along = self._along(q)
            cast = {name: x.to(self.parameters[name].dtype) for name, x in along.whole.items()}
            start.restore()
            try:
                losses, products = forward_product(self.model, losses_of, self.parameters, cast)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of an op, whose kinds are many
                return _Forward([], [], [], _first_line(error))
            every.append(losses)
            rows.append(products)
        probes = [self._probe(start, losses_of, i) for i in range(_PROBES)] if self._is_due() else []
        return _Forward(rows, every, probes, "")

    def _is_due(self) -> bool:
        """Return whether a batch's samples are compared by their own sizes: the first, and 4, 16, 64, ..."""
        return self.batches == 0 or is_due(self.batches + 1)

    def _probe(self, start: Start, losses_of: Callable[[], Tensor], i: int) -> Tensor:
        """Return products with a random direction: what tells how large each gradient is."""
        start.restore()
        generator = torch.Generator().manual_seed(i)
        along = {
            name: torch.randn(p.shape, generator=generator, device="cpu").to(p) for name, p in self.parameters.items()
        }
        return forward_product(self.model, losses_of, self.parameters, along)[1]

    def _difference(self, ahead: _Forward, reference: Reference) -> str:
        """Return in what products differ from plain autograd's, or nothing."""
        for q, (losses, products) in enumerate(zip(ahead.losses, ahead.rows, strict=True)):
            apart = reference.error(self._along(q).whole, losses, products)
            if not reference.agrees(apart):
                return f"its sum differs from plain autograd's by {apart:.1e}"
        return ""

    def _backward(self, losses_of: Callable[[], Tensor], reference: Reference) -> Tensor:
        scales = []

        def directions() -> Iterator[Named]:
            for q in range(len(self.direction)):
                along = self._along(q)
                scales.append(along.scale)
                yield along.whole

        with self.flags.own(self.parameters.values()):
            try:
                losses, products = backward_products(self.model, losses_of, self.parameters, directions())
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise AttributionError(
                    f"{self.what}: an op of the model cannot be differentiated twice: {_first_line(error)}; {_WAY_OUT}"
                ) from error
        found = self._finished([row.double() * s for row, s in zip(products, scales, strict=True)], reference)
        for q, row in enumerate(products):
            apart = reference.error(self._along(q).whole, losses, row)
            if not reference.agrees(apart):
                raise AttributionError(
                    f"{self.what}: the sum of products with query {q} differs from plain autograd's by {apart:.1e}, "
                    f"and rounding explains {TOLERANCE[reference.dtype]:.0e}; {_WAY_OUT}"
                )
        return found

    def _along(self, q: int) -> _Along:
        whole = {}
        for name, p in self.parameters.items():
            x = self.direction.tensor(name, q)
            whole[name] = x.to(p.device, torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32))
        norm = math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in whole.values()))
        if not math.isfinite(norm):
            raise ValueError(f"direction: query {q} is not finite (NaN or inf); look at the query's gradient")
        scale = 2.0 ** math.frexp(norm)[1] if norm else 1.0
        return _Along({name: x / scale for name, x in whole.items()}, scale)

    def _finished(self, rows: list[Tensor], reference: Reference) -> Tensor:
        dtype = torch.promote_types(reference.losses.dtype, self.direction.dtype)
        found = torch.stack(rows).to(dtype).cpu()
        bad = (~found.isfinite()).nonzero()
        if len(bad):
            q, n = bad[0, :2].tolist()
            raise ValueError(
                f"batches: the product of sample {n} of batch {self.batches} with query {q} is not finite; look at "
                "that sample's loss, or compute in a wider dtype"
            )
        return found


@contextmanager
def exact(model: nn.Module, direction: Direction, loss_fn: LossFn, way: Way, what: str) -> Iterator[Exact]:
    """Yield what takes the products of a batch, once the arguments are seen to belong together."""
    check_pair(model, loss_fn)
    if not isinstance(direction, Direction):
        raise TypeError(
            f"direction must be a dropinf.Direction, as dropinf.direction(...) returns it, got {direction!r}"
        )
    if not len(direction):
        raise ValueError("direction has no queries; select at least one")
    if way not in get_args(Way):
        raise ValueError(f"way is {way!r}; it must be one of {', '.join(map(repr, get_args(Way)))}")
    check_surroundings(what)
    inner = unwrap(model)
    if any(sharded.is_sharded(p) for p in inner.parameters()):
        raise ValueError(f"model: its parameters are shards; call {what} before it is sharded")
    check_batchnorm(inner)
    now = _Origin(Origin(identity(inner), ""))
    check_one_model([direction, now], ["direction", "model"], "Make the direction with the model of now")
    with preserved(inner) as state:
        yield Exact(inner, direction, loss_fn, way, what, state)


class _Origin(NamedTuple):
    origin: Origin


def _sizes(ahead: _Forward) -> Tensor | None:
    """Return how large each loss's gradient seems to be, relative to the others'; None where that is not known."""
    found = [row.double() for row in (*ahead.rows, *ahead.probes)]
    if len(found) < _PROBES or any(row.shape != found[0].shape for row in found):
        return None
    scaled = [row / row.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny) for row in found]
    return torch.stack(scaled).square().mean(0).sqrt()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
