"""Sweeps over batches: a model that is hooked, called batch after batch, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..workload import check_batches, is_one_batch
from . import sharded
from .attempt import Hooked
from .checks import check_batchnorm, check_current, check_shapes, check_surroundings, explain_batch
from .knowledge import Knowledge
from .layer import Layer
from .preserved import Start, preserved, renormalised
from .recorders import Compression, Recorder
from .run import Run


class Sweep(Knowledge):
    """A model over all batches of all calls."""

    def losses(self, batch: Any) -> list[float]:
        """Return the losses of a batch, and leave the model as it was; none where it draws random numbers."""
        with preserved(self.model) as (_, attributes), torch.no_grad():
            start = Start(attributes, changed=renormalised(self.model))
            try:
                found: list[float] = self.loss_fn(self.model, batch).double().tolist()
                return [] if start.random.moved() else found
            finally:
                start.restore()

    @contextmanager
    def hooked(
        self,
        layers: Mapping[str, Layer],
        recorder: Callable[[Mapping[str, Layer]], Recorder],
        where: Callable[[int], str] | None = None,
        probe: Mapping[str, Layer] | None = None,
    ) -> Iterator[HookedModel]:
        """Hook the model inside, and restore it afterwards. ``where`` names a sample of the current batch in errors.

        ``probe``: the layers that are audited, where the recorder does not record rows.
        """
        check_surroundings()
        check_batchnorm(self.model)
        self.warn_train_mode()
        sharded.reshard(self.model)
        self._forget_what_changed()
        with preserved(self.model) as (flags, attributes), self.capturing(layers) as capture:
            check_current(self.model, self.targets)
            yield HookedModel(Hooked(self, capture, flags, attributes, layers, recorder, where or str, probe), where)

    def _forget_what_changed(self) -> None:
        """Look at a model anew whose flags, modes or forwards are not those of the call before."""
        modules = [(id(m), type(m), m.training, id(m.__dict__.get("forward"))) for m in self.model.modules()]
        state = modules, [(p.requires_grad, [*(p._backward_hooks or ())]) for p in self.model.parameters()]
        if state != self._state:
            self.plans.clear()
        self._state = state


class HookedModel:
    """A model with hooks on it: called with one batch after another."""

    def __init__(self, hooked: Hooked, where: Callable[[int], str] | None) -> None:
        self.hooked, self.done = hooked, 0
        hooked.where, hooked.prove = where or self._sample, self._prove

    def __call__(self, batch: Any) -> tuple[dict[str, Tensor], int]:
        """Return what a new recorder makes of the batch, and its number of samples."""
        self.hooked.batches += 1
        check_shapes(self.hooked.known.targets, self.hooked.known.shapes)
        try:
            with (
                self.hooked.flags.frozen()
            ):  # not while its user's code makes the next batch, which may train the model
                store, n = Run(self.hooked, batch).result()
            self.hooked.attributes.pending = None
        except Exception as error:
            explained = explain_batch(self.hooked.known.model, batch, error)
            if explained is None:
                raise
            raise explained from error
        self.done += n
        return store, n

    def _prove(self, batch: Any) -> bool:
        """Have the ways that rows are found audited on the masks of the probe. Return whether they had to change."""
        hooked = self.hooked
        assert hooked.probe is not None
        with hooked.known.capturing(hooked.probe) as capture:
            rows = replace(hooked, capture=capture, layers=hooked.probe, recorder=Compression, probe=None)
            run = Run(rows, batch)
            run.result()
            return run.attempts > 1

    def _sample(self, row: int) -> str:
        return f"sample {self.done + row}"


@contextmanager
def progress_bar(batches: Iterable[Any], shown: bool) -> Iterator[Iterable[Any]]:
    """Yield the batches, with a bar on standard error if it is to be shown."""
    check_batches(batches)
    try:
        if shown:
            with tqdm(batches, desc="compress", unit="batch") as bar:
                yield bar
        else:  # tqdm would take a lock that processes share, and one that is killed keeps it
            yield batches
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if type(error) in (TypeError, ValueError, IndexError, RuntimeError) and is_one_batch(batches):
            raise ValueError(
                f"batches: it is a {type(batches).__name__} of tensors, each of which was taken for a batch, and "
                f"{type(error).__name__} was raised: {error}; if they are one batch, pass [batch]"
            ) from error
        raise
