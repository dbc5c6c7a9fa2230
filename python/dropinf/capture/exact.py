"""Whole per-sample gradients of the few parameters that no hook covers, by torch.func where that works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import LossFn, replace_tensors, tensors

# Per-sample gradients that exist at once.
CHUNK_BYTES = 1 << 28


class _Loss(nn.Module):
    """The loss as a module, so that functional_call can swap the model's parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


class ExactGradients:
    """Per-sample gradients [n, *shape] of named parameters. Three routes, the first that reproduces the batch's losses:
    torch.func's vmap(grad), one sample at a time, or one backward pass per loss of the whole batch."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.loss_fn, self.parameters = model, loss_fn, dict(parameters)
        self.names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
        self.routes = [self._vmapped, self._one_by_one, self._row_by_row]

    def __call__(self, batch: Any, losses: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield layer name -> gradients [n, *shape] of chunks of consecutive samples, in order."""
        size = sum(p.numel() * p.element_size() for p in self.parameters.values())
        step = max(1, CHUNK_BYTES // max(1, size))
        while True:
            route = self.routes[0]
            try:
                first = next(route(batch, losses, 0, min(step, len(losses))))
                break
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                if len(self.routes) == 1:
                    raise
                self.routes.pop(0)
        yield first
        for start in range(step, len(losses), step):
            yield from route(batch, losses, start, min(start + step, len(losses)))

    def _slices(self, batch: Any, n: int) -> list[bool]:
        batched = [t.ndim > 0 and len(t) == n for t in tensors(batch)]
        if not any(batched):
            raise ValueError("no tensor of the batch has the samples in its leading dimension")
        return batched

    def _vmapped(self, batch: Any, losses: Tensor, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        batched = self._slices(batch, len(losses))
        values = [t[start:stop] if b else t for t, b in zip(tensors(batch), batched, strict=True)]
        names = {f"model.{self.names[id(p)]}": name for name, p in self.parameters.items()}
        weights = {full: self.parameters[name].detach() for full, name in names.items()}
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
        self._check(value, losses[start:stop])
        yield {name: gradients[full].detach() for full, name in names.items()}

    def _one_by_one(self, batch: Any, losses: Tensor, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        batched = self._slices(batch, len(losses))
        rows = []
        for n in range(start, stop):
            single = (t[n : n + 1] if b else t for t, b in zip(tensors(batch), batched, strict=True))
            with self._tracked():
                value = self.loss_fn(self.model, replace_tensors(batch, single))
                self._check(value, losses[n : n + 1])
                rows.append(self._grad(value.sum(), retain=False))
        yield {name: torch.stack([r[name] for r in rows]) for name in self.parameters}

    def _row_by_row(self, batch: Any, losses: Tensor, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        with self._tracked():
            value = self.loss_fn(self.model, batch)
            self._check(value, losses)
            rows = [self._grad(value[n], retain=n + 1 < stop) for n in range(start, stop)]
        yield {name: torch.stack([r[name] for r in rows]) for name in self.parameters}

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        """Have the parameters require gradients inside."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)

    def _grad(self, value: Tensor, *, retain: bool) -> dict[str, Tensor]:
        if not value.requires_grad:
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        leaves = list(self.parameters.values())
        found = torch.autograd.grad(value, leaves, retain_graph=retain, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(self.parameters.items(), found, strict=True)
        }

    def _check(self, value: Tensor, losses: Tensor) -> None:
        """Raise ValueError where single samples have other losses than in the batch: the route cut the batch wrongly.

        In train mode nothing is compared, as random layers give other losses each time.
        """
        if self.model.training:
            return
        tolerance = 1e-3 if losses.dtype.itemsize >= 4 else 5e-2
        if value.numel() != losses.numel() or not torch.allclose(
            value.reshape(-1).to(losses.dtype), losses, rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            raise ValueError("the losses of single samples differ from the batch's")
