"""Whole per-sample gradients of parameters that no hook covers, on three rungs of the ladder, each slower and surer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import LossFn, replace_tensors, tensors
from .audit import TOLERANCE
from .preserved import Flags, Start, gradients_taken

# Per-sample gradients that exist at once.
CHUNK_BYTES = 1 << 28
Gradients = dict[str, Tensor]


class _Loss(nn.Module):
    """The loss as a module, so that functional_call can swap the model's parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


class ExactGradients:
    """Per-sample gradients [n, *shape] of named parameters: by torch.func's vmap(grad), one sample at a time, or by one
    backward a sample through one forward of the batch, which is what a per-sample gradient is."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, parameters: Mapping[str, Tensor], flags: Flags, *, random: bool
    ) -> None:
        self.model, self.loss_fn, self.parameters, self.flags = model, loss_fn, dict(parameters), flags
        self.random = random
        self.routes: list[Callable[..., Any]] = []  # that were taken
        self.full_names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}

    def __call__(
        self, rung: str, names: Sequence[str], batch: Any, losses: Tensor, start: Start
    ) -> Iterator[Gradients]:
        """Yield layer name -> gradients [n, *shape] of chunks of consecutive samples, in order."""
        wanted = {name: self.parameters[name] for name in names}
        size = sum(p.numel() * p.element_size() for p in wanted.values())
        step = max(1, CHUNK_BYTES // max(1, size))
        chunks = [(n, min(n + step, len(losses))) for n in range(0, len(losses), step)]
        routes: dict[str, Callable[..., Any]] = {
            "vmap": self._vmapped,
            "alone": self._alone,
            "backward": self._backward,
        }
        self.routes.append(routes[rung])
        if rung == "backward":
            yield from self._backward(wanted, batch, losses, chunks, start)
            return
        route = self._vmapped if rung == "vmap" else self._alone
        for first, last in chunks:
            start.restore()
            yield route(wanted, batch, losses, first, last)

    def _slices(self, batch: Any, n: int) -> list[bool]:
        batched = [t.ndim > 0 and len(t) == n for t in tensors(batch)]
        if not any(batched):
            raise ValueError("no tensor of the batch has the samples in its leading dimension")
        return batched

    def _vmapped(self, wanted: Mapping[str, Tensor], batch: Any, losses: Tensor, first: int, last: int) -> Gradients:
        batched = self._slices(batch, len(losses))
        values = [t[first:last] if b else t for t, b in zip(tensors(batch), batched, strict=True)]
        names = {f"model.{self.full_names[id(p)]}": name for name, p in wanted.items()}
        weights = {full: wanted[name].detach() for full, name in names.items()}
        loss = _Loss(self.model, self.loss_fn)
        loss.training = self.model.training

        def one(weights: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
            single = (t[None] if b else t for t, b in zip(sample, batched, strict=True))
            out: Tensor = torch.func.functional_call(loss, weights, (replace_tensors(batch, single),))
            return out.sum()

        mapped = torch.func.vmap(
            torch.func.grad_and_value(one),
            in_dims=(None, [0 if b else None for b in batched]),
            randomness="different",
        )
        gradients, value = mapped(weights, values)
        self._check(value, losses[first:last])
        return {name: gradients[full].detach() for full, name in names.items()}

    def _alone(self, wanted: Mapping[str, Tensor], batch: Any, losses: Tensor, first: int, last: int) -> Gradients:
        batched = self._slices(batch, len(losses))
        rows = []
        for n in range(first, last):
            single = (t[n : n + 1] if b else t for t, b in zip(tensors(batch), batched, strict=True))
            with self.flags.own(wanted.values()), gradients_taken(self.model.parameters(), {}), torch.enable_grad():
                value = self.loss_fn(self.model, replace_tensors(batch, single))
                self._check(value, losses[n : n + 1])
                rows.append(self._gradients(value.sum(), wanted, retain=False))
        return {name: torch.stack([r[name] for r in rows]) for name in wanted}

    def _backward(
        self,
        wanted: Mapping[str, Tensor],
        batch: Any,
        losses: Tensor,
        chunks: Sequence[tuple[int, int]],
        start: Start,
    ) -> Iterator[Gradients]:
        start.restore()
        with self.flags.own(wanted.values()), gradients_taken(self.model.parameters(), {}), torch.enable_grad():
            value = self.loss_fn(self.model, batch)
            for first, last in chunks:
                rows = [self._gradients(value[n], wanted, retain=n + 1 < len(losses)) for n in range(first, last)]
                yield {name: torch.stack([r[name] for r in rows]) for name in wanted}

    def _gradients(self, value: Tensor, wanted: Mapping[str, Tensor], *, retain: bool) -> Gradients:
        """Return the gradients of an ordinary backward; autograd.grad would refuse reentrant checkpoints."""
        found: Gradients = {}

        def add(name: str, g: Tensor) -> None:
            g = g.to_dense() if g.is_sparse else g
            found[name] = found[name] + g if name in found else g  # a reentrant checkpoint finishes a gradient each

        take = {p: partial(add, name) for name, p in wanted.items()}
        if value.requires_grad:
            with gradients_taken(self.model.parameters(), take):
                value.backward(retain_graph=retain)
        return {name: found[name] if name in found else torch.zeros_like(p) for name, p in wanted.items()}

    def _check(self, value: Tensor, losses: Tensor) -> None:
        """Raise ValueError where single samples have other losses than in the batch: the route cut the batch wrongly.

        Nothing is compared where the model draws random numbers: it gives other losses each time.
        """
        if self.random:
            return
        value, largest = value.reshape(-1).to(losses.dtype), float(losses.detach().abs().nan_to_num().max())
        rounding = 64 * torch.finfo(losses.dtype).eps * min(largest, 1)  # of what a small loss is the difference of
        close = value.numel() == losses.numel() and torch.allclose(
            value, losses, rtol=TOLERANCE[losses.dtype], atol=rounding, equal_nan=True
        )
        if not close:
            raise ValueError("the losses of single samples differ from the batch's")
