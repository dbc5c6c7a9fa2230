"""The compressor: from a model, a sketch and a loss to compressed per-sample gradients."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import sharded
from .axis import Axis
from .batches import batch_size_hint
from .capture import Capture, Pass, UseGuard, accumulate
from .checks import check_arguments, check_batchnorm, check_finite, check_losses, explain, untied_message
from .exact import ExactGradients, LossFn
from .fisher import Fisher, Kind
from .gradients import Gradients, GradientsBuilder
from .index import Index
from .layers import (
    Layer,
    LayerFilter,
    Target,
    axis_statistics,
    clean_name,
    find_targets,
    make_layer,
    module_kind,
)
from .masks import load_masks, save_masks
from .sketch import Sketch
from .statistics import Moments
from .uses import USES, Samples, Use

CuSeqlens = Callable[[Any], Tensor]
Ids = Callable[[Any], Sequence[str]]


class Compressor:
    """Compresses the per-sample gradients of any ``nn.Module`` while they are formed.

    ``loss_fn(model, batch) -> Tensor [N]``: one loss per sample, not reduced. ``layers``: name patterns (fnmatch,
    on module or parameter names) or module types to track; by default every trainable parameter, or every
    parameter of a model that is frozen throughout. ``cu_seqlens(batch) -> int Tensor [N + 1]``: where the documents
    of a packed batch start and end; the loss then has one entry per document.

    ``layers`` maps the name of each tracked layer to its plan, ``skipped`` the name of each other parameter to the
    reason. The model keeps its train or eval mode; weights, flags, gradients and random state are untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        sketch: Sketch,
        loss_fn: LossFn,
        *,
        layers: LayerFilter = None,
        cu_seqlens: CuSeqlens | None = None,
    ) -> None:
        check_arguments(model, sketch, loss_fn)
        self.model, self.sketch, self.loss_fn, self.cu_seqlens = unwrap(model), sketch, loss_fn, cu_seqlens
        sharded.reshard(self.model)
        self._targets, skipped = find_targets(self.model, layers)
        if not self._targets:
            raise ValueError(f"model: nothing to track; {skipped or 'it has no parameters'}")
        self.skipped: Mapping[str, str] = MappingProxyType(skipped)
        self._exact_names = {name for name, t in self._targets.items() if t.route == "exact"}
        sharded.check_whole((name, self._targets[name].tensor) for name in sorted(self._exact_names))
        self._moments = Moments({n: axis_statistics(t, sketch) for n, t in self._targets.items()})
        self._layers: dict[str, Layer] = {}
        if not self._moments.needed:
            self._layers = {n: make_layer(t, sketch, {}) for n, t in self._targets.items()}
        self._exact_gradients: ExactGradients | None = None  # kept: it remembers which routes failed
        self._known_shared: set[str] = set()
        self._attribution_checked = False
        self._warned = False

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Layer name -> plan: ``kind``, ``out_axis``, ``in_axis``, each axis with ``dim``, ``index``, ``weight``."""
        if not self._layers:
            raise RuntimeError(
                f"{self.sketch!r} needs statistics of the data: call compressor.calibrate(batches) first, or "
                "compressor.load(path) with a saved calibration"
            )
        return MappingProxyType(self._layers)

    @overload
    def compress(self, batches: Iterable[Any], *, progress: bool = ...) -> Gradients: ...
    @overload
    def compress(
        self,
        batches: Iterable[Any],
        *,
        out: str | os.PathLike[str],
        dtype: torch.dtype | None = ...,
        fisher: Kind | Fisher | None = ...,
        ids: Ids | None = ...,
        append: bool = ...,
        group: dist.ProcessGroup | None = ...,
        progress: bool = ...,
    ) -> Index: ...
    def compress(
        self,
        batches: Iterable[Any],
        *,
        out: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        fisher: Kind | Fisher | None = None,
        ids: Ids | None = None,
        append: bool = False,
        group: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> Gradients | Index:
        """The compressed gradient of every sample, in order.

        ``out``: the folder of an `Index` to write instead of holding them. Whatever ends it, the same call goes on with
        the next batch, and yields the same bytes. The rest is of the index:
        ``dtype``: float64, float32, bfloat16, float16 or int8 (these two with a scale per row); by default as computed.
        ``fisher``: a kind, or an empty `Fisher`, built in the same pass and kept with the index.
        ``ids(batch) -> [str]``: what to call a batch's samples.
        ``append``: add these batches to those of a finished index.
        ``group``: ranks of ``torch.distributed`` that share the work, each calling this with the same batches in the
        same order; they need one file system. None: this process alone.
        ``progress`` shows a bar on standard error.
        """
        if out is not None:
            from .writer import write_index

            made = Fisher(fisher) if isinstance(fisher, str) else fisher
            return write_index(
                self, batches, out, dtype=dtype, fisher=made, ids=ids, append=append, group=group, progress=progress
            )
        if append or any(x is not None for x in (dtype, fisher, ids, group)):
            raise ValueError(
                "out is None; dtype, fisher, ids, append and group are of an index: name its folder in out="
            )
        layers = {n: _on_device(layer, self._targets[n]) for n, layer in self.layers.items()}
        builder: GradientsBuilder | None = None

        def take(store: dict[str, Tensor], n: int) -> None:
            nonlocal builder
            if builder is None:
                shapes = {name: layer.stored_shape for name, layer in layers.items()}
                capacity = n * len(batches) if isinstance(batches, Sized) else n
                first = next(iter(store.values()))
                builder = GradientsBuilder(
                    shapes, self.digest(), capacity=capacity, dtype=first.dtype, device=first.device
                )
            builder.append(store)

        self._sweep(batches, layers, None, take, progress)
        if builder is None:
            raise ValueError("batches: it is empty (or an iterator that is used up); pass at least one batch")
        return builder.finish()

    def stream(
        self,
        batches: Iterable[Any],
        take: Callable[[Tensor], None],
        *,
        progress: bool = False,
        where: Callable[[int], str] | None = None,
    ) -> None:
        """Call ``take`` with the compressed gradients [n, K] of each batch, on the CPU. ``where`` names a sample of the
        current batch in errors."""
        layers = {n: _on_device(layer, self._targets[n]) for n, layer in self.layers.items()}
        shapes, digest = {name: layer.stored_shape for name, layer in layers.items()}, self.digest()

        def lay_out(store: dict[str, Tensor], n: int) -> None:
            builder = GradientsBuilder(shapes, digest, capacity=n, dtype=next(iter(store.values())).dtype)
            builder.append(store)
            take(builder.finish().flat)

        self._sweep(batches, layers, None, lay_out, progress, where)

    def calibrate(self, batches: Iterable[Any], *, progress: bool = False) -> None:
        """Gather the statistics that the sketch needs. A second call adds to the first."""
        if not self._moments.needed:
            return
        plain = {n: _whole(t) for n, t in self._targets.items()}
        counted = 0

        def take(_: dict[str, Tensor], n: int) -> None:
            nonlocal counted
            counted += n

        self._sweep(batches, plain, self._moments, take, progress)
        if not counted:
            raise ValueError("batches: it is empty (or an iterator that is used up); pass at least one batch")
        self._draw()

    def merge_calibration(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up what all ranks of ``torch.distributed`` calibrated on, each on its own samples; the masks are then the
        same on all. Every rank of the group must call it."""
        if self._moments.needed:
            self._moments.all_reduce(group)
            self._draw()

    def _draw(self) -> None:
        self._layers = {n: make_layer(t, self.sketch, self._moments.of(n)) for n, t in self._targets.items()}

    def moments(self, name: str) -> Mapping[str, Tensor]:
        """What calibration found of a layer: "out", "in" or "flat" -> E[x_j^2] [d] or E[x x^T] [d, d], float64."""
        return self._moments.of(name)

    def digest(self) -> dict[str, str]:
        """Layer name -> fingerprint of its sketch: gradients with equal digests can be scored together."""
        return {name: _layer_digest(layer) for name, layer in self.layers.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks, and the second moments that they were drawn from, to a safetensors file."""
        save_masks(self.layers, path, self._moments.sums, self._moments.samples)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the masks that :meth:`save` wrote; a further :meth:`calibrate` adds to their moments.

        Raises ValueError where they belong to another model.
        """
        plain = {name: _whole(target) for name, target in self._targets.items()}
        self._layers, self._moments.sums, self._moments.samples = load_masks(plain, path)

    # The work of one sweep over the batches.

    def _sweep(
        self,
        batches: Iterable[Any],
        layers: Mapping[str, Layer],
        moments: Moments | None,
        take: Callable[[dict[str, Tensor], int], None],
        progress: bool,
        where: Callable[[int], str] | None = None,
    ) -> None:
        check_batchnorm(self.model)
        self._warn_train_mode()
        sharded.reshard(self.model)
        capture = Capture(self.model, self._uses(layers))
        capture.shared = self._known_shared
        done = 0
        with capture.attached(), tqdm(batches, disable=not progress, desc="compress", unit="batch") as bar:
            for batch in bar:
                store, n = self._batch(capture, layers, batch, moments)
                for name, c in store.items():
                    check_finite(name, c, where or (lambda row, done=done: f"sample {done + row}"))  # type: ignore[misc]
                done += n
                take(store, n)

    def _uses(self, layers: Mapping[str, Layer]) -> dict[str, Use]:
        """The hooked modules, with the plans of their weight and bias."""
        by_parameter = {id(t.tensor): layers[n] for n, t in self._targets.items() if n not in self._exact_names}
        uses = {}
        for full_name, module in self.model.named_modules():
            kind = module_kind(module)
            if kind is None:
                continue
            # named_parameters, not attributes: reading a parametrized weight may update its buffers.
            own = {name: by_parameter.get(id(p)) for name, p in module.named_parameters(recurse=False)}
            weight, bias = own.get("weight"), own.get("bias")
            if weight is not None or bias is not None:
                name = clean_name(full_name) or type(module).__name__
                uses[name] = USES[kind](name, module, weight, bias)
        return uses

    def _batch(
        self, capture: Capture, layers: Mapping[str, Layer], batch: Any, moments: Moments | None
    ) -> tuple[dict[str, Tensor], int]:
        """One batch. Runs again where the first run shows that the plan must change: a parameter used outside its
        module, or an output that all samples share."""
        cu = None if self.cu_seqlens is None else self.cu_seqlens(batch)
        n = len(cu) - 1 if cu is not None else batch_size_hint(batch)
        known = cu is not None
        suspects: dict[str, tuple[int, ...]] = {}
        losses = torch.empty(0)
        while True:
            store: dict[str, Tensor] = {}
            sharded.reshard(self.model)
            current = self._pass(store, Samples(n or 1, cu), moments)
            guard = self._guard(capture)
            with capture.running(current):
                before, losses = losses, self._losses(batch, guard, cu, suspects)
                if suspects and not self.model.training and not torch.allclose(losses, before, equal_nan=True):
                    raise self._untied(suspects, len(before))
                changed = self._reroute(capture, guard.found, current)
                if current.shared and not known and len(losses) != n:
                    n, known, changed = len(losses), True, True
                current.samples = Samples(len(losses), cu)
                if changed:
                    continue
                suspects = self._backward(capture, current, losses)
                if not suspects:
                    break
        exact = [layer for name, layer in layers.items() if name in self._exact_names]
        if exact:
            self._exact(exact, batch, losses.detach(), store, moments)
        if moments is not None:
            moments.count(losses)
            return {}, len(losses)
        return self._complete(layers, store, losses), len(losses)

    def _pass(self, store: dict[str, Tensor], samples: Samples, moments: Moments | None) -> Pass:
        anchor = torch.zeros((), device=next(self.model.parameters()).device, requires_grad=True)

        def sink(use: Use, saved: Tensor | None, g: Tensor, samples: Samples) -> None:
            for layer, c in use.emit(saved, g, samples):
                accumulate(store, layer, c)

        if moments is None:
            return Pass(samples, lambda use, x, out: use.save(x, out), sink, anchor)
        return Pass(samples, lambda use, x, out: use.inputs(x, out), moments.add, anchor)

    def _guard(self, capture: Capture) -> UseGuard:
        owners: dict[int, set[nn.Module]] = {id(t.tensor): set() for t in self._targets.values()}
        for use in capture.uses.values():
            for parameter in use.module.parameters(recurse=False):
                if id(parameter) in owners:
                    owners[id(parameter)].add(use.module)
        shards = {}
        if any(sharded.is_sharded(t.tensor) for t in self._targets.values()):
            places = ((m, name, p) for m in self.model.modules() for name, p in m.named_parameters(recurse=False))
            shards = {(m, name): id(p) for m, name, p in places if id(p) in owners}
        return UseGuard(owners, capture.active, shards)

    def _losses(
        self, batch: Any, guard: UseGuard, cu: Tensor | None, suspects: Mapping[str, tuple[int, ...]]
    ) -> Tensor:
        """The losses of a batch, under the guard. ``suspects``: modules whose output was just taken to be shared by
        all samples, which is what a failure here then disproves."""
        try:
            with guard, torch.enable_grad():
                losses = self.loss_fn(self.model, batch)
            check_losses(losses, batch, cu)
        except (RuntimeError, ValueError, IndexError) as error:
            if suspects:
                n = len(cu) - 1 if cu is not None else batch_size_hint(batch) or 0
                raise self._untied(suspects, n) from error
            explained = explain(self.model, batch)
            if explained is None:
                raise
            raise explained from error
        return losses

    def _untied(self, names: Mapping[str, tuple[int, ...]], n: int) -> ValueError:
        """The error for outputs that neither belong to samples nor are shared by all of them."""
        self._known_shared -= set(names)
        name, shape = next(iter(names.items()))
        return ValueError(untied_message(name, shape, n))

    def _reroute(self, capture: Capture, found: set[int], current: Pass) -> bool:
        """Move what the hooks do not cover to the exact route."""
        names = {n for n, t in self._targets.items() if id(t.tensor) in found}
        names |= {u.weight.name for n in current.unfit if (u := capture.uses[n]).weight is not None}
        new = names - self._exact_names
        if not new:
            return False
        sharded.check_whole((name, self._targets[name].tensor) for name in sorted(new))
        self._exact_names |= new
        for use in capture.uses.values():
            use.weight = None if use.weight is not None and use.weight.name in new else use.weight
            use.bias = None if use.bias is not None and use.bias.name in new else use.bias
        return True

    def _backward(self, capture: Capture, current: Pass, losses: Tensor) -> dict[str, tuple[int, ...]]:
        """Backward through the hooks. Returns the modules whose output has no sample dimension, and must be expanded
        to one copy per sample in another run; none where this one is done."""
        hooked = any(u.weight is not None or u.bias is not None for u in capture.uses.values())
        if not hooked or (not current.calls and self._exact_names):
            return {}
        if not losses.requires_grad:
            raise ValueError(
                "loss_fn: its loss does not depend on any tracked layer; was it computed under torch.no_grad, "
                "detached, or by a part of the model that layers= leaves out?"
            )
        if len(losses) > 1 and not self._attribution_checked:
            self._check_attribution(current, losses)
        if not current.untied:
            losses.backward(torch.ones_like(losses))  # not losses.sum(): the caller may have gradients off
        if not current.untied:
            self._attribution_checked |= len(losses) > 1
            return {}
        if set(current.untied) <= capture.shared:
            # Without the copy per sample that the run before led to.
            raise self._untied({name: shape[1:] for name, shape in current.untied.items()}, len(losses))
        capture.shared |= set(current.untied)
        return current.untied

    def _check_attribution(self, current: Pass, losses: Tensor) -> None:
        """Backpropagate every other loss: the rows of the samples between must see no gradient. Then the others'."""
        sink = current.sink
        for chosen in (0, 1):

            def check(use: Use, _: Tensor | None, g: Tensor, samples: Samples, chosen: int = chosen) -> None:
                others = samples.select(use.rows(g), 1 - chosen)
                # A NaN is not proof: 0 * NaN is NaN within its own sample. It gets its own error.
                if bool((others.nan_to_num(0.0, 0.0, 0.0) != 0).any()):
                    current.untied[use.name] = tuple(g.shape)

            current.sink = check
            every_other = torch.zeros_like(losses)
            every_other[chosen::2] = 1
            losses.backward(every_other, retain_graph=True)
        current.sink = sink

    def _exact(
        self,
        layers: list[Layer],
        batch: Any,
        losses: Tensor,
        store: dict[str, Tensor],
        moments: Moments | None,
    ) -> None:
        wanted = {x.name: self._targets[x.name].tensor for x in layers}
        if self._exact_gradients is None or self._exact_gradients.parameters.keys() != wanted.keys():
            self._exact_gradients = ExactGradients(self.model, self.loss_fn, wanted)
        parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        for chunk in self._exact_gradients(batch, losses):
            for layer in layers:
                if moments is not None:
                    moments.add_exact(layer, chunk[layer.name])
                else:
                    wide = torch.promote_types(chunk[layer.name].dtype, torch.float32)
                    parts[layer.name].append(layer.compress_exact(chunk[layer.name].to(wide)))
        if moments is None:
            store.update({name: torch.cat(rows) for name, rows in parts.items()})

    def _complete(self, layers: Mapping[str, Layer], store: dict[str, Tensor], losses: Tensor) -> dict[str, Tensor]:
        """A layer that a batch does not reach has a zero gradient."""
        dtype = torch.promote_types(losses.dtype, torch.float32)
        return {
            name: store[name] if name in store else losses.new_zeros(len(losses), *layer.stored_shape, dtype=dtype)
            for name, layer in layers.items()
        }

    def _warn_train_mode(self) -> None:
        random = [n for n, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
        if random and not self._warned:
            self._warned = True
            warnings.warn(
                f"model: it is in train mode and {random[0] or 'it'} drops activations at random, so its gradients are "
                "noisy; call model.eval() for reproducible influence",
                stacklevel=4,
            )


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    sketch: Sketch,
    *,
    layers: LayerFilter = None,
    progress: bool = False,
) -> Gradients:
    """One call for :class:`Compressor`: calibrates on ``batches`` where the sketch needs it, then compresses them.

    Masks without statistics agree between calls with the same seed.
    """
    compressor = Compressor(model, sketch, loss_fn, layers=layers)
    if compressor._moments.needed:
        if iter(batches) is batches:
            raise ValueError(f"batches: {sketch!r} reads them twice; pass a list or a DataLoader, not an iterator")
        compressor.calibrate(batches)
    return compressor.compress(batches, progress=progress)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _whole(target: Target) -> Layer:
    """A plan that keeps everything: what calibration runs with."""
    return target.plan(Axis(1), Axis(1))


def _on_device(layer: Layer, target: Target) -> Layer:
    return layer if target.tensor.device.type == "cpu" else layer.to(target.tensor.device)


def _layer_digest(layer: Layer) -> str:
    h = hashlib.blake2b(repr((layer.name, layer.shape, layer.transposed)).encode(), digest_size=16)
    for axis in (layer.out_axis, layer.in_axis):
        h.update(b"none" if axis is None else axis.digest())
    return h.hexdigest()
