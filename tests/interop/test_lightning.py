"""Lightning's Trainer records its run: rows, ids and weights, a run that goes on, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

import dropinf
from dropinf.interop.lightning import RecordCallback

pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}") for what in (".*does not have many workers", ".*LeafSpec")]
SAMPLES, BATCH, EPOCHS = 12, 4, 3


def data(first: int = 100) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(SAMPLES, 12, generator=generator)
    y = torch.randint(0, 5, (SAMPLES,), generator=generator)
    return [{"x": x[i], "y": y[i], "sample": first + i} for i in range(SAMPLES)]


def layers(dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Dropout(dropout), nn.Linear(40, 5))


class Classifier(pl.LightningModule):
    """A forward of its own, which training_step and validation_step call."""

    def __init__(self, optimizer: str = "adamw", dropout: float = 0.0, schedule: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.kind, self.schedule = layers(dropout), optimizer, schedule

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        with torch.inference_mode(False), torch.enable_grad():  # as of a measure that differentiates
            self(batch["x"])

    def configure_optimizers(self):
        if self.kind == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        elif self.kind == "lbfgs":
            optimizer = torch.optim.LBFGS(self.parameters())
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-1, momentum=0.9)
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Logging(Classifier):
    """Logs in its forward, of which a recording runs some of its own."""

    def forward(self, x):
        out = self.model(x)
        self.log("mean", out.mean(), on_epoch=True, on_step=False, batch_size=len(x))
        return out

    def validation_step(self, batch, batch_idx):
        pass


class Inside(Classifier):
    """training_step calls a module inside, and never the LightningModule."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.model(batch["x"])


class Manual(Classifier):
    """Optimizes by hand."""

    def __init__(self, *args: Any, closure: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization, self.closure = False, closure

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = F.cross_entropy(self(batch["x"]), batch["y"])
            optimizer.zero_grad()
            self.manual_backward(loss)

        if not self.closure:
            closure()
        optimizer.step(**({"closure": closure} if self.closure else {}))


class Watch(pl.Callback):
    """Keeps the weights before each step, what is logged, and checkpoints; raises an error at a step."""

    def __init__(self, stop: int | None = None, save: Any = None) -> None:
        self.before: dict[int, nn.Module] = {}
        self.logged: list[float] = []
        self.stop, self.save = stop, save

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.stop:
            raise InterruptedError
        if trainer.global_step not in self.before:
            model = layers(0.0)
            model.load_state_dict(pl_module.model.state_dict())
            self.before[trainer.global_step] = model

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.logged += [float(x) for name, x in trainer.callback_metrics.items() if name == "mean"]
        if self.save is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.save)


def fit(module, out=None, *, callback: dict[str, Any] | None = None, watch: Watch | None = None, **options: Any):
    """Train; return the run where ``out`` names its folder, and what was watched."""
    watch, checkpoint = watch or Watch(), options.pop("ckpt_path", None)
    loaders = options.pop("loaders", None) or [DataLoader(data(), BATCH), DataLoader(data(500), 6)]
    recorder = None if out is None else RecordCallback(dropinf.Dropout(5), out, **(callback or {}))
    quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    trainer = pl.Trainer(
        **{"max_epochs": EPOCHS, "accelerator": "cpu", **dict.fromkeys(quiet, False), **options},
        callbacks=[watch, *([] if recorder is None else [recorder])],
    )
    torch.manual_seed(1)
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    return (None if recorder is None else recorder.run), watch


def plain_losses(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def half_losses(model, batch):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return plain_losses(model, batch)


@dataclass(frozen=True)
class Case:
    """A way to train, and what a step's loss is the sum of."""

    kind: type[Classifier] = Classifier
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    losses: Any = plain_losses
    tolerance: float = 1e-5


def scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    return {"plugins": [plugin]}


CASES = {
    "adamw": Case(),
    "sgd": Case(module={"optimizer": "sgd"}),
    "accumulated": Case(trainer={"accumulate_grad_batches": 2}),
    "clipped": Case(trainer={"gradient_clip_val": 0.05}),
    "schedule": Case(module={"schedule": True}),
    "bf16": Case(trainer={"precision": "bf16-mixed"}, losses=half_losses, tolerance=1e-2),
    "scaler": Case(trainer={"scaled": True}, losses=half_losses, tolerance=1e-2),
    "logs": Case(Logging),
    "name": Case(Inside, callback={"module": "model"}),
    "function": Case(Inside, callback={"module": lambda m: m.model, "ids": lambda batch: batch["sample"].tolist()}),
    "manual": Case(Manual),
    "manual, closure": Case(Manual, module={"closure": True}),
    "all": Case(
        module={"optimizer": "sgd", "schedule": True},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "precision": "bf16-mixed"},
        callback={"of": lambda batch: {"share": 0.25}},
        losses=half_losses,
        tolerance=1e-2,
    ),
}


def options_of(case: Case) -> dict[str, Any]:
    options = dict(case.trainer)
    return options | scaled() if options.pop("scaled", False) else options


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_records_its_run(name: str, tmp_path) -> None:
    case = CASES[name]
    run, watch = fit(
        case.kind(**case.module), tmp_path, callback=case.callback, val_check_interval=2, **options_of(case)
    )
    assert set(watch.before) == set(range(len(run)))
    accumulated = case.trainer.get("accumulate_grad_batches", 1)
    each = -(-3 // accumulated)
    assert len(run) == each * EPOCHS
    by_id = {str(row["sample"]): row for row in data()}
    for epoch in range(EPOCHS):
        assert [x for i in range(epoch * each, (epoch + 1) * each) for x in run.ids(i)] == list(by_id)
    for i in (0, len(run) - 2):
        model = watch.before[i] if case.kind is Inside else nn.ModuleDict({"model": watch.before[i]})
        model.forward = watch.before[i].forward
        compressor = dropinf.Compressor.from_masks(run.masks, model, case.losses)
        batch = {k: torch.stack([by_id[x][k] for x in run.ids(i)]) for k in ("x", "y")}
        rows = compressor.compress([batch]).flat / (BATCH * accumulated)
        error = float((run.rows(i) - rows).norm() / rows.norm())
        assert error < case.tolerance
        if accumulated == 1:
            apart = [float((run.rows(i) - rows.roll(n, 0)).norm() / rows.norm()) for n in range(1, BATCH)]
            assert min(apart) > 10 * case.tolerance, "rows of other samples would pass, too"
    if "gradient_clip_val" in case.trainer:
        assert max(run.step(i).clipped for i in range(len(run))) < 0.9
    else:
        assert {run.step(i).clipped for i in range(len(run))} == {1.0}
    rates = [run.step(i).groups[0]["lr"] for i in range(len(run))]
    assert (len(set(rates)) == 1) != bool(case.module.get("schedule"))
    if "of" in case.callback:
        assert set(run.step(0).share.tolist()) == {0.25}


@pytest.mark.parametrize("name", CASES)
def test_training_is_as_it_was_bit_for_bit(name: str, tmp_path) -> None:
    case, finals = CASES[name], []
    for out in (None, tmp_path):
        module = case.kind(**case.module, dropout=0.2)
        _, watch = fit(module, out, callback=case.callback, **options_of(case))
        finals.append((list(module.parameters()), watch.logged))
        assert not module._forward_pre_hooks
        assert not module.model._forward_pre_hooks
        assert not module.trainer.optimizers[0]._optimizer_step_pre_hooks
        assert "log" not in vars(module)
    (weights, logged), (recorded, their_logged) = finals
    assert all(map(torch.equal, weights, recorded))
    assert logged == their_logged
    assert len(logged) == (EPOCHS if case.kind is Logging else 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_from_a_checkpoint(optimizer: str, tmp_path) -> None:
    whole_module, module = Classifier(optimizer), Classifier(optimizer)
    whole, _ = fit(whole_module, tmp_path / "whole")
    with pytest.raises(InterruptedError):  # two steps behind the checkpoint
        fit(module, tmp_path / "cut", watch=Watch(stop=8, save=tmp_path / "checkpoint"))
    assert len(dropinf.Run(tmp_path / "cut")) == 8
    assert not module._forward_hooks
    assert not module.model[0]._forward_hooks
    assert not module.trainer.optimizers[0]._optimizer_step_pre_hooks
    module = Classifier(optimizer)
    run, _ = fit(module, tmp_path / "cut", ckpt_path=tmp_path / "checkpoint")
    assert len(run) == len(whole) == 9
    for i in range(9):
        assert run.ids(i) == whole.ids(i)
        assert torch.equal(run.rows(i), whole.rows(i))
    assert all(map(torch.equal, module.parameters(), whole_module.parameters()))


def test_a_run_is_scored(tmp_path) -> None:
    module = Classifier()
    run, _ = fit(module, tmp_path)
    batch = {k: torch.stack([row[k] for row in data(500)]) for k in ("x", "y")}
    for model in (module, Classifier()):
        model.load_state_dict(module.state_dict())
        query = dropinf.Compressor.from_masks(run.masks, model, plain_losses)
        scores, ids = dropinf.score(query.compress([batch]), run, kind="adamw").by_id()
        assert scores.isfinite().all()
        assert sorted(ids) == [str(100 + i) for i in range(SAMPLES)]


def test_options_are_those_of_record(tmp_path) -> None:
    run, _ = fit(Classifier(), tmp_path, callback={"layers": ["model.3"]})
    assert {name.removesuffix(".bias") for name in run.shapes} == {"model.3"}


def test_a_copy_of_the_module_has_no_copy_of_the_recording(tmp_path) -> None:
    class Copying(Inside):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            copy.deepcopy(self.model)(torch.randn(3, 12))
            return loss

    run, _ = fit(Copying(), tmp_path, callback={"module": "model"})
    assert len(run) == 9


class Gan(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.model[0], self.model[3])]


class Skipping(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Iterating(Classifier):
    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return F.cross_entropy(self(batch["x"]), batch["y"])


class InPairs(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class CopyCalled(Inside):
    def training_step(self, batch, batch_idx):
        copy.deepcopy(self.model)(batch["x"])
        return F.cross_entropy(self.model.forward(batch["x"]), batch["y"])


class CalledWithoutGradients(Inside):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.model(batch["x"])
        return F.cross_entropy(self.model.forward(batch["x"]), batch["y"])


class CalledOnce(Classifier):
    def training_step(self, batch, batch_idx):
        call = self.forward if batch_idx else self
        return F.cross_entropy(call(batch["x"]), batch["y"])


class NotCalled(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.forward(batch["x"]), batch["y"])


def pairs() -> list[DataLoader]:
    return [DataLoader([(row["x"], row["y"]) for row in data()], BATCH)]


REFUSED = {
    "several optimizers": (Gan, {}, {}, "module: configure_optimizers returns 2 optimizers"),
    "the forward never came": (Inside, {}, {}, r"module: training_step did not call 'Inside'.*\(here are 'model'\)"),
    "accumulated": (Inside, {}, {"accumulate_grad_batches": 2}, "module: training_step did not call 'Inside'"),
    "forward without hooks": (NotCalled, {}, {}, r"self\(x\), not self.forward\(x\)"),
    "a copy is called": (CopyCalled, {"module": "model"}, {}, "module: training_step did not call 'model'"),
    "no gradients": (CalledWithoutGradients, {"module": "model"}, {}, "module: training_step did not call 'model'"),
    "the forward came once": (CalledOnce, {}, {}, "module: training_step did not call 'CalledOnce'"),
    "no such module": (Inside, {"module": "net"}, {}, "module: Inside has no module 'net'; it has 'model'"),
    "no such key": (Classifier, {"ids": "id"}, {}, r"ids: a batch \(dict\) has no 'id'"),
    "a batch without keys": (InPairs, {}, {"loaders": pairs}, r"ids: a batch \(list\) has no 'sample'"),
    "a wrapper": (Classifier, {}, {"strategy": "ddp"}, "trainer: DDPStrategy trains a wrapper of the module"),
    "closure": (lambda: Classifier("lbfgs"), {}, {}, "optimizer: LBFGS asks for several forwards a step"),
    "skipped": (Skipping, {}, {}, "module: training_step returned None"),
    "iterator": (Iterating, {}, {}, "module: its training_step takes dataloader_iter"),
    "compiled": (lambda: torch.compile(Classifier()), {}, {}, "module: it is compiled as a whole"),
    "clipped by value": (
        Classifier,
        {},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        "clip all by clip_grad_norm_",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path) -> None:
    make, callback, options, message = REFUSED[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    module = make()
    with pytest.raises((ValueError, dropinf.AttributionError), match=message):
        fit(module, tmp_path, callback=callback, **options)
    module = getattr(module, "_orig_mod", module)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert "log" not in vars(module)
    if torch.distributed.is_initialized():  # by the wrapper's strategy
        torch.distributed.destroy_process_group()


def test_the_callback_of_an_error_is_free_again(tmp_path) -> None:
    """An error in training closes the recording: its folder can be written again in the same process."""
    with pytest.raises(InterruptedError):
        fit(Classifier(), tmp_path, watch=Watch(stop=0))
    run, _ = fit(Classifier(), tmp_path)
    assert len(run) == 9
