"""The compressor: from a model, a sketch and a loss to compressed per-sample gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .builder import collect, rows_of
from .capture import masks, sharded
from .capture.audit import Audited, When
from .capture.identity import check_weights, code_of, fingerprint, identity
from .capture.ladder import Route
from .capture.layer import Layer
from .capture.moments import Moments
from .capture.preconditioner import Rows, directed, direction_name
from .capture.recorders import Calibration, Compression
from .capture.sweep import Sweep, progress_bar
from .capture.targets import LayerFilter, axis_statistics, find_targets, make_layer, no_parameters
from .files import file_checksum
from .fisher.fisher import Fisher, FisherKind
from .gradients import Gradients
from .index.arguments import StoredDtype
from .index.folder import SKETCH
from .index.manifest import Manifest, check_code
from .index.probe import compared
from .index.reader import Index
from .index.writer import write_index
from .loss_name import name_of_loss
from .origin import Origin
from .readonly import ReadOnly
from .sketch.sketch import Dropout, Sketch
from .workload import (
    CuSeqlens,
    Ids,
    LossFn,
    check_loss,
    check_model,
    check_order,
    check_order_before,
    check_pair,
    count_of,
    order_of,
    unwrap,
    warn_shuffled,
)

PROBE = 8  # entries of each side of a layer that calibration has audited


class Compressor:
    """Compresses the per-sample gradients of any ``nn.Module`` while they are formed.

    ``loss_fn(model, batch) -> Tensor [N]``: one loss per sample, not reduced. ``layers``: name patterns (fnmatch,
    on module or parameter names) or module types to track; by default every trainable parameter, or of a model
    that is frozen throughout its active PEFT adapter, else every parameter. ``cu_seqlens(batch) -> int Tensor [N + 1]``
    says where the documents of a packed batch start and end; the loss then has one entry per document.

    ``audit``: when a batch's rows are compared with one ordinary backward of the model, which costs a training step:
    "auto" (the first batch, batches that look new, and the 4th, 16th, 64th, ... of every call), "every" or "never".
    What differs is found in a slower way, and `AttributionError` says where none is right; ``audits`` holds what was
    compared. ``route``: name pattern of layers -> the way to start with, one of "hook", "op", "vmap", "alone",
    "backward".
    ``mixing``: let losses depend on other samples of their batch; a row is then the derivative of its loss as it
    stands in its batch. Without it, such a loss is an `AttributionError`.
    ``preconditioner``: an Adam; rows are its updates by each sample's gradient (LESS), and queries have none.

    ``layers`` maps the name of each tracked layer to its plan, ``skipped`` the name of each other parameter to the
    reason. The model keeps its train or eval mode; weights, flags, gradients and random state are untouched.
    """

    _layers: dict[str, Layer]  # empty until the masks are drawn
    _optimizer: torch.optim.Optimizer | None = None  # whose update by each sample is taken

    def __init__(
        self,
        model: nn.Module,
        sketch: Sketch,
        loss_fn: LossFn,
        *,
        layers: LayerFilter = None,
        cu_seqlens: CuSeqlens | None = None,
        audit: When = "auto",
        route: Route | None = None,
        mixing: bool = False,
        preconditioner: torch.optim.Optimizer | None = None,
    ) -> None:
        check_model(model)
        if not isinstance(sketch, Sketch):
            raise TypeError(f"sketch must be a dropinf sketch such as dropinf.Dropout(64), got {sketch!r}")
        check_loss(loss_fn)
        self.sketch: Sketch | None = sketch
        self._track(model, loss_fn, layers, cu_seqlens, audit=audit, route=route, mixing=mixing)
        self._optimizer = preconditioner
        self._moments = Moments({n: axis_statistics(t, sketch) for n, t in self._targets.items()})
        if not self.needs_calibration:
            self._layers = {n: make_layer(t, sketch, {}) for n, t in self._targets.items()}

    @classmethod
    def from_index(
        cls,
        index: Index | str | os.PathLike[str],
        model: nn.Module,
        loss_fn: LossFn,
        *,
        cu_seqlens: CuSeqlens | None = None,
        audit: When = "auto",
        route: Route | None = None,
        mixing: bool = False,
        compare: bool = True,
    ) -> Compressor:
        """Return a compressor for the queries of an index, with the masks that the index keeps; see `from_masks`.

        ``index``: an open index, or its folder. ``model``: the model the index was made with. The rest as in the
        class: an index of a loss that mixes samples has queries with ``mixing=True`` too. ``compare``: before the first
        queries, the model must give the rows of the index's first batch again, where the loss is that of the index.
        Raises FileNotFoundError where there is no index, ValueError where its masks are damaged, belong to another
        model, or to other weights of this one.
        """
        check_pair(model, loss_fn)
        folder = index.path if isinstance(index, Index) else Path(index)
        manifest = Manifest.load(folder)
        if file_checksum(folder / SKETCH) != manifest.files.get(SKETCH):
            what = "damaged, its bytes do not match their checksum"
            raise ValueError(f"{folder / SKETCH}: {what}; restore it from a copy")
        compressor = cls.from_masks(
            folder / SKETCH, model, loss_fn, cu_seqlens=cu_seqlens, audit=audit, route=route, mixing=mixing
        )
        check_weights(compressor.model, manifest.model, folder)
        check_code(compressor.code(), manifest.code, folder)
        compressor._index = folder if compare else None
        return compressor

    @classmethod
    def from_masks(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        loss_fn: LossFn,
        *,
        cu_seqlens: CuSeqlens | None = None,
        audit: When = "auto",
        route: Route | None = None,
        mixing: bool = False,
    ) -> Compressor:
        """Return a compressor of the layers that a file of masks is of, with these masks.

        ``path``: what :meth:`save` wrote. The compressor's ``sketch`` is None: it draws nothing, and is not calibrated.
        Raises FileNotFoundError where there is no such file, ValueError where the masks belong to another model.
        """
        check_pair(model, loss_fn)
        compressor = cls.__new__(cls)
        compressor.sketch, compressor._moments = None, Moments({})
        only = masks.masked_layers(path)
        compressor._track(model, loss_fn, "*", cu_seqlens, only, audit=audit, route=route, mixing=mixing)
        compressor.load(path)
        return compressor

    def _track(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        layers: LayerFilter,
        cu_seqlens: CuSeqlens | None,
        only: Collection[str] | None = None,
        **options: Any,
    ) -> None:
        self.model, self.loss_fn, self.cu_seqlens = unwrap(model), loss_fn, cu_seqlens
        sharded.reshard(self.model)
        self._targets, skipped = find_targets(self.model, layers)
        if only is not None:
            skipped |= {name: "the masks lack it" for name in self._targets if name not in only}
            self._targets = {name: target for name, target in self._targets.items() if name in only}
        if not self._targets:
            raise ValueError(f"model: nothing to track; {skipped or no_parameters(self.model)}")
        self.skipped: Mapping[str, str] = ReadOnly(skipped)
        self._sweep = Sweep(self.model, loss_fn, cu_seqlens, self._targets, **options)
        self.losses, self._layers = self._sweep.losses, {}
        self._index: Path | None = None  # of which the next batches are queries, not compared with its first batch yet

    @property
    def audits(self) -> Sequence[Audited]:
        """What was compared with plain autograd, in order: the batch, why, and each layer's relative error."""
        return tuple(self._sweep.audits)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Layer name -> plan: ``kind``, ``out_axis``, ``in_axis``, each axis with ``dim``, ``index``, ``weight``."""
        if not self._layers:
            raise RuntimeError(
                f"{self.sketch!r} needs statistics of the data: call compressor.calibrate(batches) first, or "
                "compressor.load(path) with a saved calibration"
            )
        return ReadOnly(self._layers)

    @overload
    def compress(
        self,
        batches: Iterable[Any],
        *,
        device: torch.device | str = ...,
        order: Sequence[int] | Tensor | None = ...,
        progress: bool = ...,
    ) -> Gradients: ...
    @overload
    def compress(
        self,
        batches: Iterable[Any],
        *,
        out: str | os.PathLike[str],
        dtype: StoredDtype | None = ...,
        fisher: FisherKind | Fisher | None = ...,
        ids: Ids | None = ...,
        order: Sequence[int] | Tensor | None = ...,
        append: bool = ...,
        group: dist.ProcessGroup | None = ...,
        progress: bool = ...,
    ) -> Index: ...
    def compress(
        self,
        batches: Iterable[Any],
        *,
        device: torch.device | str | None = None,
        out: str | os.PathLike[str] | None = None,
        dtype: StoredDtype | None = None,
        fisher: FisherKind | Fisher | None = None,
        ids: Ids | None = None,
        order: Sequence[int] | Tensor | None = None,
        append: bool = False,
        group: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> Gradients | Index:
        """Return the compressed gradient of every sample, in order.

        ``device``: where they are held, by default in the host's memory: of many samples a GPU's is soon full.
        ``order``: of batches that take samples from here and there, as by length, a number for each sample as it comes:
        rows and ids stand as these numbers rise. An index takes ``batches.order`` by default, if there is one: those of
        a `TextModel` say where each passage stands in the data.
        ``out``: the folder of an `Index` to write instead of holding the gradients. An interrupted call resumes when
        you repeat it, to the same bytes; batches or rows that differ from those stored are errors. These go with it:
        ``dtype``: float64, float32, bfloat16, float16, int8 or a `BitCode`; by default as computed.
        ``fisher``: a kind, or an empty `Fisher`, built in the same pass and kept with the index.
        ``ids(batch) -> [str]``: what to call a batch's samples.
        ``append``: add these batches to those of a finished index, unless a run in it has the same ones throughout.
        ``group``: ranks of ``torch.distributed`` that share the work, each calling this with the same batches in the
        same order; they need one file system. None: this process alone. See `Parts` for a sampler of parts.
        ``progress`` shows a bar on standard error.
        """
        of_index: dict[str, Any] = {"dtype": dtype, "fisher": fisher, "ids": ids, "group": group}
        if out is not None:
            if device is not None:
                raise ValueError(f"device is {device} and out {str(out)!r}: an index is on disk; pass one of the two")
            return write_index(self, batches, out, order=order, append=append, progress=progress, **of_index)
        if append or any(x is not None for x in of_index.values()):
            raise ValueError("out is None; dtype, fisher, ids, append and group are of an index: name its folder, out=")
        warn_shuffled(batches)
        places = None if order is None else order_of(batches, order)
        check_order_before(places, batches, self.cu_seqlens)
        if self._index is not None:
            folder, self._index = self._index, None  # as the comparison compresses too
            try:
                batches = compared(self, folder, batches)
            except BaseException:
                self._index = folder
                raise
        with self._hooked() as model, progress_bar(batches, progress) as bar:
            origin, number = self.origin(), count_of(batches) or 1
            found = collect(model, bar, self.shapes, self.digest(), number, device or "cpu", origin)
        if places is not None:
            check_order(places, len(found))
        return found if places is None or bool((places.diff() == 1).all()) else found[places.argsort()]

    def stream(
        self,
        batches: Iterable[Any],
        take: Callable[[Tensor], None],
        *,
        progress: bool = False,
        where: Callable[[int], str] | None = None,
    ) -> None:
        """Call ``take`` with each batch's rows [n, K], where they were computed; ``where`` names a sample in errors."""
        shapes, digest = self.shapes, self.digest()
        with self._hooked(where) as model, progress_bar(batches, progress) as bar:
            for batch in bar:
                take(rows_of(shapes, digest, model(batch)[0]))

    def _hooked(self, where: Callable[[int], str] | None = None) -> AbstractContextManager[Rows]:
        placed = self._placed()
        return directed(self._sweep.hooked(placed, Compression, where), self._optimizer, self._targets, placed)

    def _placed(self) -> dict[str, Layer]:
        """Return the plans with their tables where their parameters are."""
        return {name: layer.to(self._targets[name].tensor.device) for name, layer in self.layers.items()}

    def calibrate(self, batches: Iterable[Any], *, progress: bool = False) -> None:
        """Gather the statistics that the sketch needs. A second call adds to the first; one that fails adds nothing."""
        self._check_draws()
        if not self.needs_calibration:
            return
        plain = {n: t.kept_whole() for n, t in self._targets.items()}
        probe = {n: make_layer(t, Dropout(PROBE), {}).to(t.tensor.device) for n, t in self._targets.items()}
        sums, samples = dict(self._moments.sums), self._moments.samples
        try:
            hooked = self._sweep.hooked(plain, lambda _: Calibration(self._moments), probe=probe)
            with self._sweep.forgetting(), hooked as model, progress_bar(batches, progress) as bar:
                for batch in bar:
                    model(batch)
            if self._moments.samples == samples:
                raise ValueError("batches: it is empty (or an iterator that is used up); pass at least one batch")
            self._moments.settle()
        except BaseException:
            self._moments.sums, self._moments.samples = sums, samples
            raise
        self._draw()

    def merge_calibration(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the calibrations of all ranks of ``torch.distributed``, each on its own samples.

        The masks are then the same on all ranks. Every rank of the group must call it.
        """
        self._check_draws()
        if self.needs_calibration:
            self._moments.all_reduce(group)
            self._draw()

    def _check_draws(self) -> None:
        if self.sketch is None:
            raise RuntimeError(
                "this compressor has the masks of a file and draws none; to calibrate, make one with "
                "dropinf.Compressor(model, sketch, loss_fn)"
            )

    def _draw(self) -> None:
        assert self.sketch is not None
        self._layers = {n: make_layer(t, self.sketch, self._moments.of(n)) for n, t in self._targets.items()}

    def moments(self, name: str) -> Mapping[str, Tensor]:
        """Return what calibration found of a layer: "out", "in" or "flat" -> E[x_j^2] [d] or E[x x^T] [d, d], float64.

        E is the mean over samples of the sum over a sample's rows (tokens, say).
        """
        return self._moments.of(name)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Layer name -> the shape of one compressed gradient."""
        return {name: layer.stored_shape for name, layer in self.layers.items()}

    @property
    def needs_calibration(self) -> bool:
        """Whether the sketch is drawn from statistics of the data."""
        return bool(self._moments.needed)

    @property
    def is_sharded(self) -> bool:
        """Whether parameters of the model are shards (FSDP2): every rank must then run every batch."""
        return any(sharded.is_sharded(p) for p in self.model.parameters())

    def fingerprint(self) -> str:
        """Return a checksum of the model's weights: rows made with equal weights belong together."""
        return fingerprint(self.model)

    def version(self) -> int:
        """Return a number that changes where parameters are written to, or get other memory."""
        return hash(tuple((p._version, p.data_ptr()) for p in self.model.parameters() if not p.is_inference()))

    def code(self) -> dict[str, str]:
        """Return checksums of what else the model computes with: its classes and constants, and its settings."""
        return {} if self.is_sharded else code_of(self.model)

    def origin(self) -> Origin:
        """Return what makes the gradients: checksums of the model, and the loss's name."""
        return Origin("" if self.is_sharded else identity(self.model), self.loss_name())

    def loss_name(self) -> str:
        """Return by what losses are told apart: the name of the function, its code, and what it holds."""
        return name_of_loss(self.loss_fn) + direction_name(self._optimizer, self._targets)

    def digest(self) -> dict[str, str]:
        """Return layer name -> fingerprint of its sketch: gradients with equal digests can be scored together."""
        return {name: masks.layer_digest(layer) for name, layer in self.layers.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks, and the second moments that they were drawn from, to a safetensors file."""
        masks.save_masks(self.layers, path, self._moments.sums, self._moments.samples)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the masks that :meth:`save` wrote; a further :meth:`calibrate` adds to their moments.

        Raises ValueError where they belong to another model.
        """
        plain = {name: target.kept_whole() for name, target in self._targets.items()}
        self._layers, self._moments.sums, self._moments.samples = masks.load_masks(plain, path)
