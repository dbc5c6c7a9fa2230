"""transformers: a callback that has its Trainer record the training.

    callback = RecordCallback(dropinf.Dropout(24), "run", ids="sample")
    Trainer(model, args, train_dataset=..., callbacks=[callback]).train()
    callback.run

The ids come with the data: a column of numbers, one a sample, which the collator makes a tensor of, and which the
callback takes out of what the model is called with. `TrainingArguments(remove_unused_columns=False)` keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..recording import Recording, record
from ..recording.recording import Masked
from ..sketch.sketch import Sketch
from ..workload import unwrap


class RecordCallback(TrainerCallback):
    """Records a Trainer's run; ``run`` is it, once training begins.

    Args:
        sketch, out: as `dropinf.record` takes them; its other options follow.
        ids: the name of the column that holds the samples' ids.
        of: (inputs of a forward) -> what else is said of its samples: the keywords of `Recording.samples`, such as
            ``labels``, the number of words that each sample's loss is the mean of. None: nothing.
    """

    run: Recording

    def __init__(
        self,
        sketch: Sketch | Masked,
        out: str | os.PathLike[str],
        *,
        ids: str = "sample",
        of: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self._sketch, self._out, self._ids, self._of, self._options = sketch, out, ids, of, options
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Open the recording: the model has its optimizer now."""
        if self._hook is not None:  # of a training that an error ended
            self._close(RuntimeError("interrupted"))
        model: nn.Module = given["model"]
        self.run = record(model, self._sketch, given["optimizer"], out=self._out, **self._options)
        self.run.__enter__()
        self._hook = unwrap(model).register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """End the recording."""
        self._close(None)

    def _close(self, error: Exception | None) -> None:
        self._hook.remove()
        self._hook = None
        self.run.__exit__(None if error is None else type(error), error, None)

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.pop(self._ids, None)
        if model.training:
            if not isinstance(ids, Tensor):
                raise ValueError(
                    f"ids: the model is called without a column {self._ids!r} that names the samples; add one of "
                    "numbers to the dataset, and pass TrainingArguments(remove_unused_columns=False)"
                )
            self.run.samples(ids.tolist(), **({} if self._of is None else self._of(kwargs)))
        return args, kwargs
