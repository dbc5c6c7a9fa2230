"""Lightning: a callback that has its Trainer record the training.

    callback = RecordCallback(dropinf.Dropout(24), "run", ids="sample")
    Trainer(callbacks=[callback]).fit(module, loader)
    callback.run

The ids come with the data: a key of the batch, or a function of it. The module whose forward is recorded is the
LightningModule, whose training_step then calls ``self(x)``, or the one that ``module=`` names. Log in training_step:
a forward that calls ``self.log`` reads what changes in a LightningModule from hook to hook, so scores would take the
query's model for another (``other_model=True`` lets them).
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ..recording import Recording, record
from ..recording.optimizers import kind_of
from ..recording.recording import Masked
from ..sketch.sketch import Sketch


class RecordCallback(Callback):
    """Records a Trainer's run on one device; ``run`` is it, once training begins.

    A run that was cut short goes on by ``trainer.fit(ckpt_path=)`` with the same ``out``. Optimization is automatic, or
    manual with one optimizer.

    Args:
        sketch, out: as `dropinf.record` takes them; its other options follow.
        ids: a key of the batch, or (batch) -> the ids of its samples, in their order.
        of: (batch) -> what else is said of its samples: the keywords of `Recording.samples`, such as ``labels``, the
            number of words that each sample's loss is the mean of. None: nothing.
        module: what training_step calls and whose outputs have the samples in front: the name of a module inside the
            LightningModule, or (LightningModule) -> it. None: the LightningModule itself.

    Raises:
        ValueError: as training begins or at its first step, where the Trainer trains in a way that cannot be recorded
            (several optimizers, processes, a compiled module), a batch has no ids, or the module is never called.
    """

    run: Recording

    def __init__(
        self,
        sketch: Sketch | Masked,
        out: str | os.PathLike[str],
        *,
        ids: str | int | Callable[[Any], Iterable[object]] = "sample",
        of: Callable[[Any], dict[str, Any]] | None = None,
        module: str | Callable[[LightningModule], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self._sketch, self._out, self._ids, self._of, self._options = sketch, out, ids, of, options
        self._which = module
        self._exits = contextlib.ExitStack()
        self._batch: tuple[Any, ...] = ()  # the batch that is trained on, where one is
        self._came = False  # whether the module was called since the last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the recording: a checkpoint's weights and optimizer are loaded by now."""
        _check(trainer, pl_module)
        module, optimizer = self._module_of(pl_module), trainer.optimizers[0]
        options: dict[str, Any] = {"scaler": getattr(trainer.precision_plugin, "scaler", None)}
        if kind_of(optimizer)[0] != "adam":  # Adam counts its steps itself
            options["step"] = trainer.global_step
        self.run = record(module, self._sketch, optimizer, out=self._out, **{**options, **self._options})
        self._batch, self._came = (), False
        closures, (mute, unmute) = _Closures(pl_module), _muting(pl_module)
        before: list[Callable[..., Any]] = [closures.run, self._check_came(pl_module), mute]  # the recording's own hook
        behind: list[Callable[..., Any]] = [unmute, closures.give_back]
        with contextlib.ExitStack() as exits:
            exits.callback(unmute)
            for hook in before:
                exits.callback(optimizer.register_step_pre_hook(hook).remove)
            exits.enter_context(self.run)
            for hook in behind:
                exits.callback(optimizer.register_step_pre_hook(hook).remove)
            for hook in (mute, self._name_samples(module)):
                exits.callback(module.register_forward_pre_hook(hook, prepend=True).remove)
            exits.callback(module.register_forward_pre_hook(unmute).remove)
            self._exits = exits.pop_all()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Note whose the forwards to come are."""
        self._batch = (batch,)

    def on_train_batch_end(self, *given: Any) -> None:  # noqa: ARG002
        """Note that forwards to come are of validation."""
        self._batch = ()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """End the recording."""
        self._exits.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """End the recording of a run that an error ends."""
        self._batch = ()
        self._exits.__exit__(type(exception), exception, exception.__traceback__)

    def _module_of(self, pl_module: LightningModule) -> nn.Module:
        found: nn.Module = pl_module
        if isinstance(self._which, str):
            try:
                found = pl_module.get_submodule(self._which)
            except AttributeError:
                raise ValueError(
                    f"module: {type(pl_module).__name__} has no module {self._which!r}; it has {_children(pl_module)}"
                ) from None
        elif self._which is not None:
            found = self._which(pl_module)
        return found

    # Functions, not methods: a copy of the module then has no copy of the recording.

    def _name_samples(self, recorded: nn.Module) -> Callable[..., None]:
        def name_samples(module: nn.Module, _args: Any) -> None:
            if module is recorded and self._batch and torch.is_grad_enabled():
                self._came = True
                (batch,) = self._batch
                self.run.samples(self._ids_of(batch), **({} if self._of is None else self._of(batch)))

        return name_samples

    def _check_came(self, pl_module: LightningModule) -> Callable[..., None]:
        name = type(pl_module).__name__ if self._which is None else self._which

        def check_came(*_given: Any) -> None:
            if not self._came:
                raise ValueError(
                    f"module: training_step did not call {name!r}, which is to be recorded; pass "
                    f"module= the name of what it calls (here are {_children(pl_module)}), or have it call "
                    "self(x), not self.forward(x)"
                )
            self._came = False

        return check_came

    def _ids_of(self, batch: Any) -> Iterable[object]:
        if callable(self._ids):
            return self._ids(batch)
        try:
            found: Iterable[object] = batch[self._ids]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"ids: a batch ({type(batch).__name__}) has no {self._ids!r} that names its samples; have the dataset "
                "give a number beside each sample, and pass its key, or a function of the batch"
            ) from None
        return found


class _Closures:
    """Runs the forward and backward that Lightning gives to optimizer.step before the recording looks at gradients."""

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        self._results: list[Any] = []

    def run(self, _optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Run the closure, as the optimizer would first of all, and take it out of what the recording sees."""
        closure = kwargs.get("closure")
        with torch.enable_grad():
            self._results = [] if closure is None else [closure()]
        if self._results == [None] and self._module.automatic_optimization:
            raise ValueError(
                "module: training_step returned None, and Lightning makes a step of no gradient all the same, which "
                "cannot be recorded; leave such batches out of the data"
            )
        return args, {key: value for key, value in kwargs.items() if key != "closure"}

    def give_back(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give the optimizer what the closure returned."""
        if not self._results:
            return args, kwargs
        results, self._results = self._results, []

        def closure() -> Any:
            if not results:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} asks for several forwards a step, of which one can be "
                    "recorded; take AdamW, Adam or SGD"
                )
            return results.pop()

        return args, {**kwargs, "closure": closure}


def _muting(pl_module: LightningModule) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return what mutes ``self.log`` while a recording runs forwards of its own, and what ends that."""

    def mute(*_given: Any) -> None:
        pl_module.__dict__["log"] = lambda *args, **kwargs: None  # noqa: ARG005

    def unmute(*_given: Any) -> None:
        pl_module.__dict__.pop("log", None)

    return mute, unmute


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise ValueError where training is of a kind that cannot be recorded."""
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"module: configure_optimizers returns {len(trainer.optimizers)} optimizers, and a recording is of one; "
            "give all parameters to one, or record a loop of your own with dropinf.record, once for each"
        )
    if trainer.world_size > 1 or trainer.strategy.model is not pl_module:
        raise ValueError(
            f"trainer: {type(trainer.strategy).__name__} trains a wrapper of the module, in {trainer.world_size} "
            'process(es); train on one device with strategy="auto", or record a loop of your own with dropinf.record'
        )
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            "module: it is compiled as a whole (torch.compile), and what a compiled forward computes inside no hook "
            "sees; fit the plain module"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            "module: its training_step takes dataloader_iter, so the batch is not known before; take batch instead"
        )


def _children(pl_module: LightningModule) -> str:
    """Return the names of the modules with parameters that a module has."""
    names = [name for name, child in pl_module.named_children() if next(child.parameters(), None) is not None]
    return ", ".join(map(repr, names)) or "none with parameters"
