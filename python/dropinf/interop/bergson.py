"""bergson 2.5.1 with dropinf's sketches in place of its random projections.

    from dropinf.interop.bergson import collect_gradients, make_compressor
    collect_gradients(model, data, processor, cfg, compressor=make_compressor(model, dropinf.Dropout(16), cfg))

``GradientCollector``, ``InMemoryCollector``, ``TraceCollector`` and ``Attributor`` are bergson's own with one more
argument, ``compressor``; its normalizers, preconditioners, scorers, per-token gradients and readers work as before.
`sketched` does the same inside its ``build`` and ``score_dataset``. What this reaches into: the collectors'
``forward_hook``, ``_module_gradient`` and ``shapes``, ``module._inputs``; and, where bergson names a collector itself,
``GradientCollector``, ``TraceCollector``, ``collect_gradients`` and ``launch_distributed_run`` in its modules, while a
call lasts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..capture.layer import Layer
from ..capture.modules import LinearUse
from ..capture.samples import Samples
from ..compressor import Compressor
from ..sketch.sketch import Sketch
from . import require
from ._bergson_index import LAYOUT, export_index, import_index

_bergson: Any = require("bergson", "bergson", "2.5.1")
_collector: Any = import_module("bergson.collector.collector")
_collectors: Any = import_module("bergson.collector.gradient_collectors")
_data: Any = import_module("bergson.data")

__all__ = [
    "Attributor", "GradientCollector", "InMemoryCollector", "TraceCollector", "collect_gradients", "export_index",
    "import_index", "make_compressor", "sketched",
]  # fmt: skip


def make_compressor(
    model: Any, sketch: Sketch, cfg: Any, *, target_modules: set[str] | None = None, masks: str | None = None
) -> Compressor:
    """Return a compressor of the weights that bergson collects, under bergson's loss.

    Its batches are rows of the data set, ``data[indices]``. ``masks``: a file that `Compressor.save` wrote, for a
    sketch that is calibrated.
    """

    def loss_fn(model: Any, batch: Mapping[str, Any]) -> Tensor:
        if cfg.loss_fn == "kl":
            raise ValueError("cfg.loss_fn is 'kl', which needs two models; calibrate under 'ce' or 'log_odds'")
        labels = batch.get("labels")
        x, y, *_ = _data.pad_and_tensor(batch["input_ids"], labels=labels, device=model.device, sync_max_len=False)
        losses: Tensor = _collector.token_losses(cfg.loss_fn, model(x).logits[:, :-1], y[:, 1:], cfg.label_smoothing)
        losses = losses.sum(1) / ((y[:, 1:] != -100).sum(1) if cfg.loss_reduction == "mean" else 1)
        return losses * torch.tensor(batch["advantage"]).to(losses) if "advantage" in batch else losses

    base = model.base_model
    found = _collector.HookCollectorBase.discover_targets(base, target_modules, False, cfg.filter_modules)
    modules = {base.get_submodule(name) for name in found}
    names = [f"{name}.weight" for name, module in model.named_modules() if module in modules]
    compressor = Compressor(model, sketch, loss_fn, layers=names)
    if masks is not None:
        compressor.load(masks)
    return compressor


class _Sketched:
    """What the collectors share: a layer's input is sketched in forward, its output gradient in backward."""

    compressor: Compressor

    def setup(self) -> None:
        this: Any = self
        if this.processor.projection_dim or this.processor.include_bias or this.attention_cfgs:
            raise ValueError(
                "compressor takes whole weights: no projection_dim, include_bias or attention_cfgs with it"
            )
        parameters = dict(self.compressor.model.named_parameters())
        plans = {id(parameters.get(plan.parameter)): plan for plan in self.compressor.layers.values()}
        self.plans: dict[str, Layer] = {}
        self.uses: dict[str, LinearUse] = {}
        for name, (device, *_) in this.target_info.items():
            module = this.model.get_submodule(name)
            plan = plans.get(id(module.weight))
            if plan is None or plan.kind != "linear":
                raise ValueError(
                    f"compressor: module {name} ({type(module).__name__}) is not a linear layer that it tracks; name "
                    "it in filter_modules, or use make_compressor with the same cfg"
                )
            self.plans[name] = plan.to(device)
            self.uses[name] = LinearUse(name, module, self.plans[name], None)
        super().setup()  # type: ignore[misc]
        if this.attribute_tokens and any(plan.in_axis is None for plan in self.plans.values()):
            raise ValueError("compressor: attribute_tokens needs the factors of a gradient; use mode='factorized'")

    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: torch.Size(plan.stored_shape) for name, plan in self.plans.items()}

    def forward_hook(self, module: Any, a: Tensor) -> None:
        super().forward_hook(module, a)  # type: ignore[misc]
        module._inputs = self.uses[module._name].save(module._inputs, module._inputs)

    def _module_gradient(self, module: Any, g: Tensor) -> Any:
        plan = self.plans[module._name]
        grads = super()._module_gradient(module, g)  # type: ignore[misc]
        divisor = grads.divisor
        if divisor is not None:  # Adam's, one for each entry: a gather commutes with it, other sketches do not
            if not plan.is_gather:
                raise ValueError("compressor: an Adam normalizer goes with plain Dropout alone; use Adafactor's")
            divisor = plan.compress_exact((divisor.mT if plan.transposed else divisor)[None])[0]
        if grads.per_example:
            c = self.uses[module._name].emit_weight(plan, grads.a, grads.g, Samples(len(grads.g)))
            return c if divisor is None else c.div_(divisor)
        return replace(grads, g=plan.out_axis.apply(grads.g), divisor=divisor)


@dataclass(kw_only=True)
class GradientCollector(_Sketched, _collectors.GradientCollector):
    """bergson's, writing an index of compressed gradients that `import_index` reads too."""

    compressor: Compressor

    def teardown(self) -> None:
        super().teardown()
        if self.rank == 0 and self.save_index:
            digest = self.compressor.digest()
            layers = [[name, plan.name, plan.stored_shape, digest[plan.name]] for name, plan in self.plans.items()]
            (self.cfg.partial_run_path / LAYOUT).write_text(json.dumps(layers))


@dataclass(kw_only=True)
class InMemoryCollector(_Sketched, _bergson.InMemoryCollector):
    """bergson's, of compressed gradients."""

    compressor: Compressor


@dataclass(kw_only=True)
class TraceCollector(_Sketched, _collectors.TraceCollector):
    """bergson's, of compressed gradients."""

    compressor: Compressor


class Attributor(_bergson.Attributor):
    """bergson's, whose ``trace`` compresses a query as the index was."""

    def __init__(self, *args: Any, compressor: Compressor, **options: Any) -> None:
        super().__init__(*args, **options)
        self.compressor = compressor

    @contextmanager
    def trace(self, *args: Any, **options: Any) -> Iterator[Any]:
        collector = partial(TraceCollector, compressor=self.compressor)
        swapped = _swapped("bergson.query.attributor", "TraceCollector", collector)
        with swapped, super().trace(*args, **options) as result:
            yield result


def collect_gradients(*args: Any, compressor: Compressor, **options: Any) -> None:
    """Run bergson's ``collect_gradients`` with a compressor."""
    collector = partial(GradientCollector, compressor=compressor)
    with _swapped("bergson.collection", "GradientCollector", collector):
        _bergson.collect_gradients(*args, **options)


@contextmanager
def sketched(sketch: Sketch, masks: str | None = None) -> Iterator[None]:
    """Have bergson's ``build`` and ``score_dataset`` compress inside, in all of their processes."""
    original = import_module("bergson.distributed").launch_distributed_run

    def launch(name: str, worker: Callable[..., None], *rest: Any) -> None:
        original(name, partial(_work, sketch, masks, worker), *rest)

    build, score = (_swapped(m, "launch_distributed_run", launch) for m in ("bergson.build", "bergson.score.score"))
    with build, score:
        yield


def _work(sketch: Sketch, masks: str | None, worker: Callable[..., None], *args: Any) -> None:
    def collect(model: Any, cfg: Any, target_modules: set[str] | None = None, **options: Any) -> None:
        compressor = make_compressor(model, sketch, cfg, target_modules=target_modules, masks=masks)
        collect_gradients(model=model, cfg=cfg, target_modules=target_modules, compressor=compressor, **options)

    with _swapped(worker.__module__, "collect_gradients", collect):
        worker(*args)


@contextmanager
def _swapped(module: str, name: str, value: object) -> Iterator[None]:
    """Bind the module's name to another value inside."""
    found = import_module(module)
    before = getattr(found, name)
    setattr(found, name, value)
    try:
        yield
    finally:
        setattr(found, name, before)
