"""quanda: an explainer on compressed gradients, for its metrics and benchmarks.

`CompressedInfluence` is constructed as quanda constructs its own explainers: its class is what a metric or benchmark
takes as `explainer_cls`, and what it takes besides as `expl_kwargs`. Scores are positive where a training sample helps,
which is what quanda's metrics expect.

Nothing of quanda is patched: `Explainer` is subclassed, and its dataset handlers unpack the batches. quanda ranks
self-influence after adding 1e-4 times a sample's position: it must be well above that, and dot products may not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..capture.targets import LayerFilter
from ..compressor import Compressor
from ..fisher.fisher import Fisher, FisherKind, build_fisher
from ..score import score, self_influence
from ..sketch.sketch import Dropout, Sketch
from . import require

_base: Any = require("quanda.explainers.base", "quanda", "0.5.0")
_handlers: Any = require("quanda.utils.datasets.dataset_handlers", "quanda", "0.5.0")
_common: Any = require("quanda.utils.common", "quanda", "0.5.0")


class CompressedInfluence(_base.Explainer):
    """Influence `c_q^T (F + lambda I)^{-1} c_n`; the training set is compressed once, in the constructor.

    Args:
        sketch: by default `dropinf.Dropout()`; one that needs calibration is calibrated on the training set.
        kind: of `dropinf.build_fisher`, or None for dot products; `damping` as that takes it.
        loss_fn: `(model, (inputs, labels)) -> losses [n]`; by default the cross entropy of the task, summed over the
            tokens of a causal language model.
        layers: as `dropinf.Compressor` takes them.
        batch_size: of the training set.

    The others are quanda's. The last checkpoint is loaded.
    """

    accepted_tasks: ClassVar[list[str]] = ["image_classification", "text_classification", "causal_lm"]

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: Literal["image_classification", "text_classification", "causal_lm"] = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[[nn.Module, str], float] | None = None,
        *,
        sketch: Sketch | None = None,
        kind: FisherKind | None = "block",
        damping: float | Literal["auto"] = 0.1,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        layers: LayerFilter = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
        self.load_last_checkpoint()
        self.task, self.batch_size = task, batch_size
        self.handler = _handlers.get_dataset_handler(self.train_dataset)
        self.compressor = Compressor(model, sketch or Dropout(), loss_fn or self._losses, layers=layers)
        self.compressor.calibrate(_Batches(self))
        self.train = self.compressor.compress(_Batches(self))
        self.fisher: Fisher | None = None if kind is None else build_fisher(self.train, kind, damping)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        out = model(**self.handler.get_model_inputs(inputs)) if isinstance(inputs, dict) else model(inputs)
        logits = getattr(out, "logits", out)
        if self.task == "causal_lm":
            return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none").sum(1)
        return F.cross_entropy(logits, labels, reduction="none")

    def explain(self, test_data: Any, targets: Any) -> Tensor:
        """Return scores [n_test, n_train] of inputs (a tensor or a mapping) and labels; a positive score helps."""
        inputs = _common.move_ds_item_to_device(test_data, self.device)
        query = self.compressor.compress([(inputs, _common.process_targets(targets, self.device))])
        return score(query, self.train, self.fisher, kind="dot" if self.fisher is None else "influence")

    def self_influence(self, batch_size: int = 32) -> Tensor:  # noqa: ARG002
        """Return the self-influence [n_train] from the gradients that are kept: O(n_train), without the model."""
        return self.train.flat.square().sum(1) if self.fisher is None else self_influence(self.train, self.fisher)


class _Batches:
    """The training set, as (inputs, labels) on the model's device."""

    def __init__(self, explainer: CompressedInfluence) -> None:
        self.handler, self.device = explainer.handler, explainer.device
        self.loader = self.handler.create_dataloader(explainer.train_dataset, explainer.batch_size)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return (self.handler.process_batch(batch, self.device) for batch in self.loader)
