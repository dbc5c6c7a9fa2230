"""captum's influence functions and TracIn on compressed gradients.

`CompressedInfluenceFunction` takes what captum's `NaiveInfluenceFunction` and `ArnoldiInfluenceFunction` take but for
their ranks and tolerances, `CompressedTracInCP` what its `TracInCP` takes; both take a `sketch` besides. A batch is a
tuple whose last entry goes to the loss and the others to the model. Nothing of captum is patched: its classes are
subclassed, and their constructors do the rest: they load the checkpoint, check the losses and set `train_dataloader`,
`hessian_dataloader` and `layer_modules`.

Training gradients are compressed once, in the constructor; captum computes them again in every call of `influence`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..compressor import Compressor
from ..fisher.fisher import Fisher, FisherKind, build_fisher
from ..gradients import Gradients
from ..score import score, self_influence
from ..sketch.sketch import Dropout, Sketch
from . import require

_functions: Any = require("captum.influence._core.influence_function", "captum", "0.9.0")
_tracin: Any = require("captum.influence._core.tracincp", "captum", "0.9.0")


class _Compressed:
    """captum's interface, on `train`, `fisher` and `_compress`."""

    model: nn.Module
    train: Gradients  # compressed once
    fisher: Fisher | None = None  # None: scores are dot products
    compressor: Compressor

    def _compress(self, batches: Any, loss_fn: Any, progress: bool = False) -> Gradients:
        self._loss_in_use = loss_fn
        return self.compressor.compress(batches, progress=progress)

    def _make_compressor(self, sketch: Sketch | None) -> Compressor:
        chosen = getattr(self, "layer_modules", None)
        names = None if chosen is None else [f"{n}.*" for n, m in self.model.named_modules() if m in chosen]
        return Compressor(self.model, sketch or Dropout(), self._losses, layers=names)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        loss_fn, out = self._loss_in_use, model(*batch[:-1])
        if getattr(loss_fn, "reduction", "none") != "none":
            raise ValueError(
                f"loss_fn has reduction={loss_fn.reduction!r}; it must be 'none', and sample_wise_grads_per_batch False"
            )
        losses: Tensor = out if loss_fn is None else loss_fn(out, batch[-1])
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

    def _scale(self) -> float:
        """Return what scores are multiplied by: captum's Hessian is a sum over samples, F a mean."""
        return 1.0 if self.fisher is None else 1.0 / self.fisher.count

    def _query(self, inputs: Any, loss_fn: Any, aggregate: bool, progress: bool) -> Gradients:
        found = self._compress(inputs if isinstance(inputs, DataLoader) else [inputs], loss_fn, progress)
        return (
            Gradients(found.flat.sum(0, keepdim=True), found.shapes, found.digest, found.origin) if aggregate else found
        )

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Any:
        """Return scores [Q, N]; with `k`, `KMostInfluentialResults(indices [Q, k], influence_scores [Q, k])`.

        The queries' loss is `test_loss_fn` in both; captum's influence functions take `loss_fn` where k is given.
        """
        query = self._query(inputs, self.test_loss_fn, aggregate, show_progress)  # type: ignore[attr-defined]
        kind: Literal["dot", "influence"] = "dot" if self.fisher is None else "influence"
        if k is None:
            return score(query, self.train, self.fisher, kind=kind) * self._scale()
        values, indices = score(query, self.train, self.fisher, kind=kind, top=k, largest=proponents)
        return _tracin.KMostInfluentialResults(indices, values * self._scale())

    def _influence(self, inputs: Any, **options: Any) -> Any:
        return self.influence(inputs, **options)

    def _get_k_most_influential(self, inputs: Any, k: int = 5, proponents: bool = True, **options: Any) -> Any:
        return self.influence(inputs, k, proponents, **options)

    def self_influence(
        self, inputs_dataset: Any = None, show_progress: bool = False, *_: Any, inputs: Any = None, **__: Any
    ) -> Tensor:
        """Return the self-influence [n] of ``inputs_dataset`` or ``inputs`` (captum has both), or the training set."""
        given, loss_fn = inputs if inputs_dataset is None else inputs_dataset, self.loss_fn  # type: ignore[attr-defined]
        train = self.train if given is None else self._query(given, loss_fn, False, show_progress)
        return train.flat.square().sum(1) if self.fisher is None else self_influence(train, self.fisher) * self._scale()


class CompressedInfluenceFunction(_Compressed, _functions.IntermediateQuantitiesInfluenceFunction):
    """Influence with the empirical Fisher matrix F of `hessian_dataset`, or else of the N training samples.

    `kind`, `damping`, `absolute` are `build_fisher`'s. Scores are `c_q^T (N F + N lambda I)^{-1} c_n`, since captum's
    Hessian is a sum over samples; its `hessian_reg` is N lambda.
    """

    def __init__(
        self,
        *args: Any,
        sketch: Sketch | None = None,
        kind: FisherKind = "block",
        damping: float | Literal["auto"] = 0.1,
        absolute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.compressor = self._make_compressor(sketch)
        self._loss_in_use, loader = self.loss_fn, self.train_dataloader
        self.compressor.calibrate(loader)
        self.train = self._compress(loader, self.loss_fn)
        other = self.hessian_dataloader
        rows = self.train if other is loader else self._compress(other, self.loss_fn)
        self.fisher = build_fisher(rows, kind, damping, absolute=absolute)

    def compute_intermediate_quantities(
        self,
        inputs_dataset: Any,
        aggregate: bool = False,
        show_progress: bool = False,
        return_on_cpu: bool = True,
        test: bool = False,
    ) -> Tensor:
        """Return whitened gradients [n, K], or their sum [1, K]; their inner products are scores."""
        assert self.fisher is not None
        loss_fn = self.test_loss_fn if test else self.loss_fn
        found = self.fisher.whiten(self._query(inputs_dataset, loss_fn, aggregate, show_progress)).flat
        return (found.cpu() if return_on_cpu else found) * math.sqrt(self._scale())


class CompressedTracInCP(_Compressed, _tracin.TracInCP):
    """TracIn: dot products, summed over checkpoints by their learning rates.

    All checkpoints share one mask; a sketch that needs calibration sees all of them.
    """

    def __init__(self, *args: Any, sketch: Sketch | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compressor = self._make_compressor(sketch)
        self._loss_in_use = self.loss_fn
        for checkpoint in self.checkpoints:
            self.checkpoints_load_func(self.model, checkpoint)
            self.compressor.calibrate(self.train_dataloader)
        self.train = self._compress(self.train_dataloader, self.loss_fn)

    def _compress(self, batches: Any, loss_fn: Any, progress: bool = False) -> Gradients:
        parts = []
        for checkpoint in self.checkpoints:
            rate = self.checkpoints_load_func(self.model, checkpoint)
            found = super()._compress(batches, loss_fn, progress)
            parts.append(found.flat * math.sqrt(rate))
        shapes = {f"{i}/{name}": shape for i in range(len(parts)) for name, shape in found.shapes.items()}
        digest = {f"{i}/{name}": value for i in range(len(parts)) for name, value in found.digest.items()}
        return Gradients(torch.cat(parts, 1), shapes, digest)

    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """Return gradients [n, C * K] of C checkpoints side by side, times sqrt(learning rate).

        Their inner products are scores. captum multiplies by the learning rate itself, so that inner products of its
        quantities are not its scores.
        """
        return self._query(inputs, self.loss_fn, aggregate, False).flat
