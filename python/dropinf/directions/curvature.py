"""The curvature of a training set: its products with directions, and its mean diagonal, without forming it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..capture.checks import check_losses, explain_batch
from ..capture.preserved import Start
from ..files import checksum
from ..index.fingerprint import fingerprint
from ..workload import LossFn, check_batches, count_of
from .runs import Runs, Tensors, check_products

LossOfOutputs = Callable[[Tensor, Any], Tensor]  # (outputs, batch) -> losses [N]
_PROBES = 32  # random directions, over all batches, that estimate the mean diagonal


class Again:
    """Batches that are read in each step, and must be the same every time.

    Raises:
        ValueError: they can be read once only, are empty, or were others in an earlier pass.
    """

    def __init__(self, batches: Iterable[Any], what: str) -> None:
        check_batches(batches)
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{what}: it is a {type(batches).__name__}, which can be read once, and every step reads all batches; "
                "pass a list, or a DataLoader with shuffle=False"
            )
        self._batches, self._what = batches, what
        self.count = count_of(batches)
        self.digest = ""  # of a whole pass

    def __iter__(self) -> Iterator[Any]:
        digests: list[str] = []
        for batch in self._batches:
            digests.append(fingerprint(batch, named=True))
            yield batch
        if not digests:
            raise ValueError(f"{self._what}: it is empty; pass at least one batch")
        self.check(checksum("".join(digests).encode()))

    def check(self, digest: str) -> None:
        """Take a pass's digest. Raise ValueError where an earlier pass had another."""
        if self.digest not in ("", digest):
            raise ValueError(
                f"{self._what}: they are not those of an earlier pass, or of the file in out=; pass the same batches "
                "in the same order, without random augmentation and with shuffle=False, or name another file"
            )
        self.digest = digest


class Curvature:
    """C = (1/N) sum_n J_n^T H_n J_n over the training samples, symmetric and positive semidefinite.

    "fisher": J_n is the gradient of the sample's loss and H_n = 1, so C is the empirical Fisher matrix. "gauss-newton":
    J_n is the Jacobian of the outputs, and H_n the Hessian of the loss with respect to them.
    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent" (2002).

    ``outputs_fn`` and ``loss_of_outputs``: both None for "fisher".
    """

    def __init__(
        self,
        runs: Runs,
        batches: Again,
        loss_fn: LossFn,
        outputs_fn: LossFn | None = None,
        loss_of_outputs: LossOfOutputs | None = None,
    ) -> None:
        self._runs, self.batches, self._loss_fn = runs, batches, loss_fn
        self._function, self._loss_of_outputs = outputs_fn or loss_fn, loss_of_outputs
        self._is_compared = loss_of_outputs is None  # the loss of the outputs with loss_fn

    @property
    def kind(self) -> str:
        """ "fisher" or "gauss-newton"."""
        return "fisher" if self._loss_of_outputs is None else "gauss-newton"

    def product(self, directions: Tensors, each: Callable[[], None] = lambda: None) -> Tensors:
        """Return C v of directions, name -> [Q, *shape], in at least float32; ``each`` is called after each batch.

        Raises:
            ValueError: what a batch gives is not what it must be.
            RuntimeError: derivatives that must agree do not.
        """
        sums = {name: torch.zeros_like(v) for name, v in directions.items()}
        samples = 0
        for batch in self.batches:
            with self._runs.on(batch) as start:
                samples += self._add(sums, directions, batch, start)
            each()
        return {name: total / samples for name, total in sums.items()}

    def _add(self, sums: Tensors, v: Tensors, batch: Any, start: Start) -> int:
        n, outputs, pushed, weights = self._curved(v, batch, start)
        for q, pulled in enumerate(self._runs.pulled(outputs, weights)):
            check_products(weights[q], pushed[q], pulled, v, q)
            for name, g in pulled.items():
                sums[name][q] += g
        self._check_silent(v, batch, pushed, start)
        return n

    def _check_silent(self, v: Tensors, batch: Any, pushed: list[Tensor], start: Start) -> None:
        """Raise RuntimeError where J v is zero, so that nothing was compared, and along another cotangent it is not."""
        silent = [q for q, t in enumerate(pushed) if not t.any() and any(bool(x[q].any()) for x in v.values())]
        if silent:
            outputs = self._runs.outputs(self._function, batch, start)
            w = torch.ones_like(outputs)
            (pulled,) = self._runs.pulled(outputs, [w])
            for q in silent:
                check_products(w, pushed[q], pulled, v, q)

    def _curved(self, v: Tensors, batch: Any, start: Start) -> tuple[int, Tensor, list[Tensor], list[Tensor]]:
        """Return the number of samples, the outputs with their graph, J v of each direction, and H J v."""
        try:
            pushed = self._runs.pushed(self._function, batch, v, start)
        except Exception as error:
            explained = explain_batch(self._runs.model, batch, error)
            if explained is None:
                raise
            raise explained from error
        outputs = self._runs.outputs(self._function, batch, start)
        n, weights = self._weighed(outputs, batch, pushed, start)
        return n, outputs, pushed, weights

    def _weighed(self, outputs: Tensor, batch: Any, pushed: list[Tensor], start: Start) -> tuple[int, list[Tensor]]:
        """Return the number of samples, and H J v for each J v."""
        if self._loss_of_outputs is None:
            check_losses(outputs, batch, None)
            return len(outputs), pushed
        held = outputs.detach().requires_grad_()
        losses = self._loss_of_outputs(held, batch)
        check_losses(losses, batch, None)
        self._compare(losses, batch, start)
        (slope,) = torch.autograd.grad(losses.sum(), held, create_graph=True)
        if not slope.requires_grad:  # a linear loss has no curvature
            return len(losses), [torch.zeros_like(t) for t in pushed]
        return len(losses), [
            torch.autograd.grad(slope, held, t, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for t in pushed
        ]

    def _compare(self, losses: Tensor, batch: Any, start: Start) -> None:
        """Raise ValueError where the loss of the outputs is not the loss of a batch."""
        if self._is_compared:
            return
        start.restore()
        with torch.no_grad():
            expected = self._loss_fn(self._runs.model, batch)
        close = expected.shape == losses.shape and torch.allclose(
            expected, losses.detach().to(expected.dtype), rtol=1e-2 if losses.dtype.itemsize < 4 else 1e-4, atol=1e-6
        )
        if not close:
            raise ValueError(
                "loss_of_outputs: of the first batch it gives other losses than loss_fn (first sample: "
                f"{float(losses.detach().flatten()[0]):.6g} and {float(expected.flatten()[0]):.6g}); "
                "loss_of_outputs(outputs_fn(model, batch), batch) must be loss_fn(model, batch)"
            )
        self._is_compared = True

    def mean_diagonal(self, seed: int = 0) -> float:
        """Return an estimate of tr(C) / P, with P the number of entries of the parameters.

        The mean of z^T C z over random signs z (Hutchinson, 1990), other ones for each batch, 32 in all or one a batch.
        Its relative standard error is about sqrt(2 tr(C^2) / 32) / tr(C).
        """
        generator = torch.Generator().manual_seed(seed)
        each = max(1, math.ceil(_PROBES / (self.batches.count or _PROBES)))
        parameters = self._runs.parameters
        total, samples = 0.0, 0
        for batch in self.batches:
            with self._runs.on(batch) as start:
                for _ in range(each):
                    signs = {n: torch.randint(0, 2, (1, *p.shape), generator=generator) for n, p in parameters.items()}
                    z = {n: (2 * s - 1).to(parameters[n].device, parameters[n].dtype) for n, s in signs.items()}
                    n, _, (pushed,), (weights,) = self._curved(z, batch, start)
                    self._check_silent(z, batch, [pushed], start)
                    total += float((weights.double() * pushed.double()).sum()) / each
                samples += n
        found = total / samples / sum(p.numel() for p in parameters.values())
        if not (math.isfinite(found) and found > 0):
            raise ValueError(
                f"batches: the mean diagonal of the curvature is {found:g}; it must be above zero. Losses without "
                "gradient, or not convex in the outputs (gauss-newton), give this; pass absolute=True with a damping "
                "of your own, or look at the losses"
            )
        return found
