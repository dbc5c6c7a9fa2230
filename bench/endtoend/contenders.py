"""Who is timed, each with the environment that it runs in; a contender makes, from a case, the job that extracts the
gradients of its batch at the case's size, and returns them.

All compress the weights of the same layers to ``dim`` x ``dim`` numbers, a bias aside where a toolkit has no choice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .models import CASES as CASES
from .models import Case

Job = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """``environment``: of `tests/interop/run.py`, or "" for the main one. ``package``: on PyPI, for its version."""

    make: Callable[[Case], Job]
    environment: str = ""
    package: str = "dropinf"


class Unfit(Exception):  # noqa: N818
    """The toolkit does not do this case, and why."""


def forward(case: Case) -> Job:
    def job() -> None:
        with torch.no_grad():
            case.loss_fn(case.model, case.batch)

    return job


def floor(case: Case) -> Job:
    """Forward, and backward to every activation: weights are frozen, the first activation asks for its gradient."""

    def job() -> None:
        case.model.requires_grad_(False)
        embedding = next((m for m in case.model.modules() if isinstance(m, nn.Embedding)), None)
        batch, handle = case.batch, None
        if embedding is not None:
            handle = embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
        else:
            batch = (batch[0].clone().requires_grad_(True), batch[1])
        case.loss_fn(case.model, batch).sum().backward()
        if handle is not None:
            handle.remove()

    return job


def training_step(case: Case) -> Job:
    def job() -> None:
        case.loss_fn(case.model, case.batch).mean().backward()
        case.model.zero_grad(set_to_none=True)

    return job


def make_compressor(case: Case, sketch: str, **options: Any) -> Any:
    import dropinf

    layers = [f"{name}.weight" for name in case.linears]
    return dropinf.Compressor(case.model, getattr(dropinf, sketch)(case.dim, **options), case.loss_fn, layers=layers)


def _dropinf(sketch: str, **options: Any) -> Callable[[Case], Job]:
    def make(case: Case) -> Job:
        compressor = make_compressor(case, sketch, **options)
        return lambda: compressor.compress([case.batch]).flat

    return make


def vmap_grad(case: Case) -> Job:
    """torch.func's per-sample gradients, whole, and a gather."""
    plans = make_compressor(case, "Dropout").layers
    values = {n: p.detach() for n, p in case.model.named_parameters()}
    tracked = {plan.parameter: values.pop(plan.parameter) for plan in plans.values()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(case.model, {**values, **weights}, args, kwargs)

        return case.loss_fn(call, (x[None], y[None])).sum()  # type: ignore[arg-type]

    def job() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(tracked, *case.batch)
        return torch.cat([plan.compress_exact(found[plan.parameter]).flatten(1) for plan in plans.values()], 1)

    return job


def _linears_alone(case: Case, toolkit: str) -> None:
    if not all(isinstance(case.model.get_submodule(name), nn.Linear) for name in case.linears):
        raise Unfit(f"{toolkit} compresses linear layers alone")


def dattri_attributor(case: Case, kind: str, **options: Any) -> Any:
    """dattri's, of block-projected gradients; ``kind`` of its projection."""
    from dattri.algorithm import BlockProjectedIFAttributor
    from dattri.task import AttributionTask

    class Rows(nn.Module):
        """dattri gives a model one sample without its batch dimension, and the outputs of queries to cross_entropy."""

        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, x: Tensor) -> Tensor:
            out = self.model(x if x.ndim > 1 else x[None])
            logits: Tensor = getattr(out, "logits", out)
            return logits.mT if logits.ndim == 3 else logits

    def loss(model: nn.Module, batch: Any, _: Any) -> Tensor:
        def logits(x: Tensor) -> Tensor:
            out: Tensor = model(x)
            return out.mT if out.ndim == 3 else out

        return case.loss_fn(logits, batch).mean()  # type: ignore[arg-type]

    model = Rows()
    whole = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
    return BlockProjectedIFAttributor(
        AttributionTask(loss, model, model.state_dict()),
        [f"model.{name}" for name in case.linears],
        offload="none",
        cache_dir=tempfile.mkdtemp(),
        sparsifier_kwargs={**whole, "proj_type": kind, "proj_dim": case.dim},
        projector_kwargs=whole,
        **options,
    )


def _dattri(kind: str) -> Callable[[Case], Job]:
    def make(case: Case) -> Job:
        _linears_alone(case, "dattri's block projection")
        attributor = dattri_attributor(case, kind, hessian="Identity")
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*case.batch), case.samples)
        return lambda: attributor.cache(loader)

    return make


def _dattri_llm(style: str) -> Callable[[Case], Job]:
    def make(case: Case) -> Job:
        from dattri_llm import HookManager, HookManagerConfig

        _linears_alone(case, "dattri-llm's capture-time projection")
        dim = case.dim if style == "logra" else case.dim * (case.dim + 1)

        def gaussian(feature: Tensor, *_: Any, proj_dim: int, proj_seed: int = 0, **__: Any) -> Any:
            made = torch.randn(feature.shape[-1], proj_dim, generator=torch.Generator().manual_seed(proj_seed))
            return lambda x: x @ made

        config = HookManagerConfig(
            hook_types=dict.fromkeys(case.linears, "linear_io"),
            capture_style="materialized",
            projector=gaussian,
            projection_kwargs={"__default__": {"style": style, "proj_dim": dim}},
        )
        manager = HookManager(case.model, config=config)

        def job() -> Any:
            case.model.zero_grad(set_to_none=True)
            with manager.collect():
                case.loss_fn(case.model, case.batch).sum().backward()
                return manager.get_gradient().data

        return job

    return make


def logix_lora(case: Case) -> Job:
    import logix
    from logix.config import LoRAConfig

    run = logix.LogIX(tempfile.mkdtemp())
    run.watch(case.model, name_filter=list(case.linears))
    run.add_lora(lora_config=LoRAConfig(rank=case.dim))
    ids = [str(i) for i in range(case.samples)]

    def job() -> Any:
        run.setup({"grad": ["log"]})
        with run(data_id=ids):
            case.loss_fn(case.model, case.batch).sum().backward()
        return run.get_log()

    return job


def bergson_collector(case: Case, **options: Any) -> Callable[[tuple[Tensor, Tensor]], Any]:
    """What collects the gradients of a batch and returns bergson's collector, which holds them."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    class Causal(nn.Module):
        """As bergson calls a model."""

        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.base_model = case.model

        def forward(self, ids: Tensor, **_: Any) -> Any:
            logits = self.base_model(ids)
            return SimpleNamespace(logits=getattr(logits, "logits", logits))

    model = Causal()
    if not hasattr(case.model, "device"):
        case.model.device = model.device
    model.requires_grad_(False)
    next(m for m in model.modules() if isinstance(m, nn.Embedding)).requires_grad_(True)  # as bergson leaves a model
    cfg = IndexConfig(run_path=tempfile.mkdtemp())
    cfg.partial_run_path.mkdir(exist_ok=True, parents=True)

    def run(batch: tuple[Tensor, Tensor]) -> Any:
        ids = [row.tolist() for row in batch[0]]
        data = Dataset.from_dict({"input_ids": ids, "length": [len(row) for row in ids]})
        collector = InMemoryCollector(
            model=case.model,
            data=data,
            cfg=cfg,
            processor=GradientProcessor(projection_dim=case.dim),
            target_modules=set(case.linears),
            **options,
        )
        computer = CollectorComputer(model, data, collector=collector, batches=[list(range(len(ids)))], cfg=cfg)
        computer.run_with_collector_hooks()
        return collector

    return run


def bergson_projection(case: Case) -> Job:
    if case.batch[0].dtype.is_floating_point:
        raise Unfit("bergson reads token ids alone")
    run = bergson_collector(case)
    return lambda: run(case.batch).gradients


def trak_projector(case: Case) -> Job:
    from trak import TRAKer

    if not case.batch[0].dtype.is_floating_point:
        size, rows = case.dim**2 * len(case.linears), sum(p.numel() for p in case.model.parameters())
        raise Unfit(f"TRAK's projector for CPUs would draw {size * rows:.1g} random numbers for every batch")
    options = {"save_dir": tempfile.mkdtemp(), "device": "cpu", "logging_level": 50, "use_half_precision": False}
    size = case.dim**2 * len(case.linears)
    made = TRAKer(case.model, "image_classification", case.samples, proj_dim=size, lambda_reg=1e-3, **options)
    made.load_checkpoint(case.model.state_dict(), model_id=0)

    def job() -> None:
        made.saver.current_store["is_featurized"][:] = 0
        made.featurize(case.batch, inds=torch.arange(case.samples).numpy())

    return job


CONTENDERS = {
    "forward": Contender(forward, package="torch"),
    "training step": Contender(training_step, package="torch"),
    "floor: forward, backward to the activations": Contender(floor, package="torch"),  # right before ours
    "dropinf, mask": Contender(_dropinf("Dropout")),
    "dropinf, mask in runs of 16": Contender(_dropinf("Dropout", group=16)),
    "dropinf, Gaussian factors": Contender(_dropinf("Gaussian")),
    "dattri, mask": Contender(_dattri("random_mask"), "dattri", "dattri"),
    "dattri, Gaussian factors": Contender(_dattri("normal"), "dattri", "dattri"),
    "dattri-llm, mask": Contender(_dattri_llm("mask"), "dattri_llm", "dattri-llm"),
    "dattri-llm, LoGra": Contender(_dattri_llm("logra"), "dattri_llm", "dattri-llm"),
    "LogIX, LoGra": Contender(logix_lora, "logix", "logix-ai"),
    "bergson, Rademacher factors": Contender(bergson_projection, "bergson", "bergson"),
    "TRAK, Rademacher": Contender(trak_projector, "trak", "traker"),
    "vmap(grad), then a gather": Contender(vmap_grad, package="torch"),
}
FLOOR = "floor: forward, backward to the activations"
