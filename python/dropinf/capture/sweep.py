"""Sweeps over batches: every batch forward and backward through the hooks, and again where it shows that the plan must
change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..workload import CuSeqlens, LossFn, batch_size_hint
from . import sharded
from .checks import check_batchnorm, check_finite, check_losses, explain, untied_message
from .exact import ExactGradients
from .guard import UseGuard
from .hooks import Attribution, Capture, Pass, Recorder
from .kinds import USES, module_kind
from .layer import Layer, clean_name
from .modules import Samples, Use
from .targets import Target


class Sweep:
    """What is known of a model from batch to batch: which parameters take the exact route, which outputs samples share.

    ``targets``: the tracked parameters by layer name.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, cu_seqlens: CuSeqlens | None, targets: Mapping[str, Target]
    ) -> None:
        self.model, self.loss_fn, self.cu_seqlens, self.targets = model, loss_fn, cu_seqlens, targets
        self.exact_names = {name for name, t in targets.items() if t.route == "exact"}
        sharded.check_whole((name, targets[name].tensor) for name in sorted(self.exact_names))
        self._exact_gradients: ExactGradients | None = None  # kept: it remembers which routes failed
        self._known_shared: set[str] = set()
        self._attribution_checked = False
        self._warned = False

    @contextmanager
    def hooked(
        self,
        layers: Mapping[str, Layer],
        recorder: Callable[[], Recorder],
        where: Callable[[int], str] | None = None,
    ) -> Iterator[HookedModel]:
        """Hook the model inside, and restore it afterwards. ``where`` names a sample of the current batch in errors."""
        check_batchnorm(self.model)
        self._warn_train_mode()
        sharded.reshard(self.model)
        capture = Capture(self.model, self._uses(layers))
        capture.shared = self._known_shared
        with capture.attached():
            yield HookedModel(self, capture, layers, recorder, where)

    def _uses(self, layers: Mapping[str, Layer]) -> dict[str, Use]:
        """Return the hooked modules, with the plans of their weight and bias."""
        by_parameter = {id(t.tensor): layers[n] for n, t in self.targets.items() if n not in self.exact_names}
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

    def batch(
        self, capture: Capture, layers: Mapping[str, Layer], batch: Any, recorder: Callable[[], Recorder]
    ) -> tuple[dict[str, Tensor], int]:
        """Return what the recorder makes of one batch, and the number of its samples.

        The batch runs again where the first run shows that the plan must change: a parameter is used outside its
        module, or all samples share an output.
        """
        cu = None if self.cu_seqlens is None else self.cu_seqlens(batch)
        n = len(cu) - 1 if cu is not None else batch_size_hint(batch)
        known = cu is not None
        suspects: dict[str, tuple[int, ...]] = {}
        losses = torch.empty(0)
        while True:
            sharded.reshard(self.model)
            anchor = torch.zeros((), device=next(self.model.parameters()).device, requires_grad=True)
            current = Pass(recorder(), Samples(n or 1, cu), anchor)
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
        exact = [layer for name, layer in layers.items() if name in self.exact_names]
        if exact:
            self._exact(exact, batch, losses.detach(), current.recorder)
        return current.recorder.finish(layers, losses), len(losses)

    def _guard(self, capture: Capture) -> UseGuard:
        owners: dict[int, set[nn.Module]] = {id(t.tensor): set() for t in self.targets.values()}
        for use in capture.uses.values():
            for parameter in use.module.parameters(recurse=False):
                if id(parameter) in owners:
                    owners[id(parameter)].add(use.module)
        shards = {}
        if any(sharded.is_sharded(t.tensor) for t in self.targets.values()):
            places = ((m, name, p) for m in self.model.modules() for name, p in m.named_parameters(recurse=False))
            shards = {(m, name): id(p) for m, name, p in places if id(p) in owners}
        return UseGuard(owners, capture.active, shards)

    def _losses(
        self, batch: Any, guard: UseGuard, cu: Tensor | None, suspects: Mapping[str, tuple[int, ...]]
    ) -> Tensor:
        """Return the losses of a batch, computed under the guard.

        ``suspects``: modules whose output was just taken to be shared by all samples; a failure here disproves that.
        """
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
        """Return the error for outputs that neither belong to samples nor are shared by all of them."""
        self._known_shared -= set(names)
        name, shape = next(iter(names.items()))
        return ValueError(untied_message(name, shape, n))

    def _reroute(self, capture: Capture, found: set[int], current: Pass) -> bool:
        """Move what the hooks do not cover to the exact route; return whether anything moved."""
        names = {n for n, t in self.targets.items() if id(t.tensor) in found}
        names |= {u.weight.name for n in current.unfit if (u := capture.uses[n]).weight is not None}
        new = names - self.exact_names
        if not new:
            return False
        sharded.check_whole((name, self.targets[name].tensor) for name in sorted(new))
        self.exact_names |= new
        for use in capture.uses.values():
            use.weight = None if use.weight is not None and use.weight.name in new else use.weight
            use.bias = None if use.bias is not None and use.bias.name in new else use.bias
        return True

    def _backward(self, capture: Capture, current: Pass, losses: Tensor) -> dict[str, tuple[int, ...]]:
        """Backpropagate through the hooks, and return the modules whose output has no sample dimension.

        In another run, their outputs must be expanded to one copy per sample; without such modules this run is done.
        """
        hooked = any(u.weight is not None or u.bias is not None for u in capture.uses.values())
        if not hooked or (not current.calls and self.exact_names):
            return {}
        if not losses.requires_grad:
            raise ValueError(
                "loss_fn: its loss does not depend on any tracked layer; was it computed under torch.no_grad, "
                "detached, or by a part of the model that layers= leaves out?"
            )
        if len(losses) > 1 and not self._attribution_checked:
            self._check_attribution(current, losses)
        if not current.untied:
            # Not losses.sum(): the caller may have gradients off.
            current.backward(losses, torch.ones_like(losses), current.recorder)
        if not current.untied:
            self._attribution_checked |= len(losses) > 1
            return {}
        if set(current.untied) <= capture.shared:
            # Without the copy per sample that the run before led to.
            raise self._untied({name: shape[1:] for name, shape in current.untied.items()}, len(losses))
        capture.shared |= set(current.untied)
        return current.untied

    def _check_attribution(self, current: Pass, losses: Tensor) -> None:
        """Backpropagate every second loss, then the rest: the rows of the other samples must see no gradient."""
        for chosen in (0, 1):
            every_other = torch.zeros_like(losses)
            every_other[chosen::2] = 1
            current.backward(losses, every_other, Attribution(1 - chosen), retain_graph=True)

    def _exact(self, layers: list[Layer], batch: Any, losses: Tensor, recorder: Recorder) -> None:
        wanted = {x.name: self.targets[x.name].tensor for x in layers}
        if self._exact_gradients is None or self._exact_gradients.parameters.keys() != wanted.keys():
            self._exact_gradients = ExactGradients(self.model, self.loss_fn, wanted)
        for chunk in self._exact_gradients(batch, losses):
            for layer in layers:
                recorder.emit_whole(layer, chunk[layer.name])

    def _warn_train_mode(self) -> None:
        random = [n for n, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
        if random and not self._warned:
            self._warned = True
            warnings.warn(
                f"model: it is in train mode and {random[0] or 'it'} drops activations at random, so its gradients are "
                "noisy; call model.eval() for reproducible influence",
                stacklevel=5,
            )


class HookedModel:
    """A model with hooks on it: called with one batch after another."""

    def __init__(
        self,
        sweep: Sweep,
        capture: Capture,
        layers: Mapping[str, Layer],
        recorder: Callable[[], Recorder],
        where: Callable[[int], str] | None,
    ) -> None:
        self.sweep, self.capture, self.layers, self.recorder = sweep, capture, layers, recorder
        self.where = where or self._sample
        self.done = 0

    def __call__(self, batch: Any) -> tuple[dict[str, Tensor], int]:
        """Return what a new recorder makes of the batch, and its number of samples."""
        store, n = self.sweep.batch(self.capture, self.layers, batch, self.recorder)
        check_finite(store, self.where)
        self.done += n
        return store, n

    def _sample(self, row: int) -> str:
        return f"sample {self.done + row}"


def progress_bar(batches: Iterable[Any], shown: bool) -> tqdm[Any]:
    """Return the batches, with a bar on standard error if it is to be shown."""
    return tqdm(batches, disable=not shown, desc="compress", unit="batch")
