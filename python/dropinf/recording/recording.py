"""Recording a training loop: each sample's part of every step's gradient, taken from the loop's own backward."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..capture import masks
from ..capture.checks import check_surroundings
from ..capture.hooks import Capture
from ..capture.identity import identity
from ..capture.knowledge import uses_of
from ..capture.layer import Layer
from ..capture.preserved import claimed
from ..capture.taps import overrides
from ..capture.targets import LayerFilter, Target, axis_statistics, find_targets, make_layer, no_parameters
from ..files import make_folder, write_whole
from ..gradients import GradientSource, check_same_sketch
from ..sketch.sketch import Sketch
from ..workload import check_model, unwrap
from .checks import check_eager, shown
from .optimizers import kind_of
from .run import ABOUT, END, FORMAT, MASKS, Run
from .taking import Taking
from .writing import Loop, World

_NO_HOOK = "no hook covers its kind of module, and a recording has no slower way"


@runtime_checkable
class Masked(Protocol):
    """What has masks already, as a `Compressor` does."""

    @property
    def layers(self) -> Mapping[str, Layer]: ...


def record(
    model: nn.Module,
    sketch: Sketch | Masked,
    optimizer: torch.optim.Optimizer,
    *,
    out: str | os.PathLike[str],
    layers: LayerFilter = None,
    scaler: torch.amp.GradScaler | None = None,
    mixing: bool = False,
    step: int | None = None,
) -> Recording:
    """Return what records the training inside: ``with dropinf.record(model, sketch, optimizer, out="run") as run:``.

    The loop stays as it is, and so do its weights, bit for bit; before each forward it says whose it is:
    ``run.samples(ids)``. Rows are each sample's part of the step's gradient, whatever the loss: mean, sum, weighted.
    Every step, their sum is compared with the gradient that the optimizer gets.

    Args:
        model: the model that is trained. DistributedDataParallel's wrapper is looked through.
        sketch: a mask (`Dropout`), the same for all samples and steps, or a compressor whose masks are taken, as those
            that are drawn from statistics of the data. About 600 numbers a sample or more. Other sketches give rows,
            and no trajectory of the optimizer.
        optimizer: AdamW, Adam or SGD; of others there are rows alone.
        out: the folder to write. It may hold the same run, cut short: load the model and the optimizer of a checkpoint,
            and recording goes on behind its step.
        layers: name patterns or module types, as in `Compressor`.
        scaler: the GradScaler that scales the loss.
        mixing: let samples meet in the model, as in a BatchNorm in train mode.
        step: how many steps the optimizer has taken; None: as Adam's state says.

    Raises:
        ValueError: a parameter that is not in the optimizer; a model compiled as a whole; a folder that holds another
            run.
    """
    return Recording(model, sketch, optimizer, out, layers=layers, scaler=scaler, mixing=mixing, step=step)


class Recording(Run):
    """A run that is being recorded; afterwards, the run. See `record`."""

    def __init__(
        self,
        model: nn.Module,
        sketch: Sketch | Masked,
        optimizer: torch.optim.Optimizer,
        out: str | os.PathLike[str],
        *,
        layers: LayerFilter,
        scaler: torch.amp.GradScaler | None,
        mixing: bool,
        step: int | None,
    ) -> None:
        check_model(model)
        check_eager(model)
        self.model, self.optimizer = unwrap(model), _plain(optimizer)
        self.scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler  # accelerate's has its own
        self._world = _world(model)
        self._targets, self._layers, self.skipped = _tracked(self.model, sketch, layers)
        shared = _shared_in(Path(out))
        for name in shared & self._layers.keys():
            del self._layers[name], self._targets[name]
        groups = _groups(self._targets, self.optimizer)
        kind, why = kind_of(self.optimizer)
        is_mask = all(layer.is_gather for layer in self._layers.values())
        if kind is not None and not is_mask:
            kind, why = None, f"{sketch!r} mixes coordinates, and the optimizer acts on each alone; record on a Dropout"
        about: dict[str, Any] = {
            "format": FORMAT,
            "ranks": self._world.ranks,
            "kind": kind,
            "rows_alone": why,
            "optimizer": type(self.optimizer).__name__,
            "shapes": {name: list(layer.stored_shape) for name, layer in self._layers.items()},
            "digest": {name: masks.layer_digest(layer) for name, layer in self._layers.items()},
            "sizes": [target.tensor.numel() for target in self._targets.values()],
            "groups": groups,
            "is_mask": is_mask,
            "shared": sorted(shared),
            "begun": _steps_taken(self.optimizer, self._targets, kind, step),
        }
        self._prepare(Path(out), about)
        super().__init__(out)
        self._go_on(about["begun"])
        self._mixing = mixing
        self._taking: Taking | None = None

    def _prepare(self, folder: Path, about: dict[str, Any]) -> None:
        """Make the folder, or see that it holds this very run."""
        outcome: list[str | None] = [None]  # of the first rank, which all hear
        if self._world.rank == 0:
            try:
                self._make(folder, about)
            except ValueError as error:
                outcome = [str(error)]
        if self._world.ranks > 1:
            first = torch.distributed.get_global_rank(self._world.group, 0)
            torch.distributed.broadcast_object_list(outcome, first, self._world.group)
        if outcome[0] is not None:
            raise ValueError(outcome[0])

    def _make(self, folder: Path, about: dict[str, Any]) -> None:
        make_folder(folder)
        if not (folder / ABOUT).exists():
            self._save(folder, about)
            return
        before = Run(folder)._about
        different = [key for key in about if key != "begun" and before.get(key) != about[key]]
        if different:
            raise ValueError(
                f"out: {folder} holds a run with another {different[0]}; name a new folder, or remove that one"
            )

    def _leave_out(self, names: set[str]) -> None:
        """Have a run of no steps yet be without layers whose output all samples share."""
        self.skipped |= dict.fromkeys(names, "its output is one for all samples, as a table of positions is")
        warnings.warn(f"model: {shown(sorted(names))} are not recorded: {self.skipped[min(names)]}", stacklevel=5)
        about = self._about
        kept = [i for i, name in enumerate(about["shapes"]) if name not in names]
        about["shared"] = sorted({*about.get("shared", ()), *names})
        for key in ("shapes", "digest"):
            about[key] = {name: value for name, value in about[key].items() if name not in names}
        for key in ("sizes", "groups"):
            about[key] = [about[key][i] for i in kept]
        for cached in ("columns", "scale"):
            self.__dict__.pop(cached, None)
        if self._world.rank == 0:
            self._save(self.path, about)

    def _save(self, folder: Path, about: dict[str, Any]) -> None:
        masks.save_masks(self._layers, folder / MASKS, {}, 0)
        write_whole(folder / ABOUT, json.dumps(about).encode())

    def _go_on(self, begun: int) -> None:
        """Remove what was recorded behind the optimizer's step."""
        keep = begun - self._about["begun"]
        if not 0 <= keep <= len(self) or (keep == 0 and len(self) > 0):
            raise ValueError(
                f"out: {self.path} holds steps {self._about['begun']} to {self._about['begun'] + len(self)}, and the "
                f"optimizer has taken {begun}; load a checkpoint of the optimizer from between them (of SGD, say step= "
                "too), name a new folder, or remove that one"
            )
        self._files[self._world.rank].cut(keep)
        (self.path / END).unlink(missing_ok=True)

    def __enter__(self) -> Recording:
        check_surroundings()
        with contextlib.ExitStack() as stack:
            stack.enter_context(claimed(self.model))
            stack.enter_context(_locked(self.path / f"rank-{self._world.rank}.lock"))
            self._taking = self._hooked()
            stack.callback(self._taking.end)
            self._exits = stack.pop_all()
        return self

    def _hooked(self) -> Taking:
        """Hook the model and the optimizer."""
        tracked = {id(target.tensor): self._layers[name] for name, target in self._targets.items()}
        capture = Capture(self.model, uses_of(self.model, tracked))
        loop = Loop(self.model, self.optimizer, self.scaler, self._world)
        taking = Taking(self, loop, capture, self._targets, self._layers, self._mixing, self._leave_out)
        taking.writer.check_end()  # of a run that goes on
        taking.begin()
        return taking

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        taking, self._taking = self._taking, None
        assert taking is not None
        with self._exits:
            taking.end()
            if kind is None:
                taking.writer.check_end()
            if self._world.rank == 0:
                self.save_end(identity(self.model), len(self._files[0]))
        for file in self._files:
            file.refresh()

    def samples(
        self,
        ids: Iterable[object],
        *,
        cu_seqlens: Tensor | None = None,
        share: Sequence[float] | Tensor | float | None = None,
        labels: Sequence[float] | Tensor | float = 1.0,
    ) -> None:
        """Say whose the next forward is: the id of each of its samples, in their order.

        ``cu_seqlens``: where the documents of a packed batch start and end, int [n + 1]. ``share``: the weight of each
        sample's loss in the step's loss, which curvature is measured by; None: one over the step's samples, as in a
        mean. ``labels``: how many labels each sample's loss is the mean of, such as its tokens.
        """
        self._open().name(_names(ids), cu_seqlens, share, labels)

    def losses(self, losses: Tensor) -> None:
        """Note the loss of each sample [n] of the last forward, where each has one label: it sharpens the curvature."""
        self._open().note_losses(losses)

    def drawn(self, loss: Tensor) -> None:
        """Take rows of a loss, as the loop's own but with labels drawn from the model, before the loop's backward.

        They make the curvature of all steps: of each, those of the 25 nearest steps that have some.
        """
        self._open().draw(loss)

    def drop(self, target: GradientSource, part: float) -> Tensor:
        """Return the places, in the last forward, of its most harmful samples, and forget what it backpropagated.

        Call it between backward and optimizer.step(); then run the others again: ``optimizer.zero_grad()``,
        ``run.samples(others)``, forward and backward of them alone. ``target``: gradients of queries at about these
        weights, with this run's masks, whose mean counts. ``part``: of the samples, above 0 and below 1, at most; none
        is dropped that lowers the target's loss. Samples are judged by what the optimizer makes of their rows at once.
        """
        check_same_sketch(target, self, "target and run")
        if not 0 < part < 1:
            raise ValueError(f"part is {part}; it must lie between 0 and 1")
        mean = torch.cat([block.flat.double().cpu() for _, block in target.blocks(4096)]).mean(0)
        return self._open().drop(mean * self.scale, part)

    def _open(self) -> Taking:
        if self._taking is None:
            raise RuntimeError("run: it is not recording; call this inside 'with dropinf.record(...) as run:'")
        return self._taking


def _names(ids: Iterable[object]) -> list[str]:
    """Return samples' ids as text. Raises TypeError where they are not strings or numbers, in an order."""
    if isinstance(ids, str | bytes | set | frozenset) or not isinstance(ids, Iterable):
        raise TypeError(f"ids is a {type(ids).__name__}; it must name each sample, in their order, as a list does")
    listed = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
    found = [x.item() if isinstance(x, Tensor | np.generic) and x.ndim == 0 else x for x in listed]
    for x in found:
        if not isinstance(x, str | int | float):
            raise TypeError(f"ids has a {type(x).__name__}; it must have a string or a number for each sample")
    return [str(x) for x in found]


def _shared_in(folder: Path) -> set[str]:
    """Return the layers that a run in a folder, if there is one, left out as all samples share their output."""
    return set(Run(folder)._about.get("shared", ())) if (folder / ABOUT).exists() else set()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Have a lock on a file inside. Raises RuntimeError where another recording has it."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"out: another recording writes to {path.parent}; wait for it, or name another"
            raise RuntimeError(message) from None
        yield


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside a wrapper, as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _world(model: nn.Module) -> World:
    """Return the ranks that train a model together."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return World(0, 1, None)
    group = model.process_group
    return World(torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group)


def _tracked(
    model: nn.Module, sketch: Sketch | Masked, layers: LayerFilter
) -> tuple[dict[str, Target], dict[str, Layer], dict[str, str]]:
    """Return what is recorded and how, and why the rest is not."""
    targets, skipped = find_targets(model, layers)
    for name, target in list(targets.items()):
        if not target.tensor.requires_grad:
            why = "it is not trained"
        elif target.route == "exact" or overrides(type(target.tensor)):
            why = _NO_HOOK
        elif _is_table(model, target, "sparse"):
            why = "its gradient is sparse"
        elif _is_table(model, target, "max_norm"):
            why = "its forward changes it (max_norm)"
        elif isinstance(sketch, Masked) and name not in sketch.layers:
            why = "the compressor does not track it"
        else:
            continue
        skipped[name] = why
        del targets[name]
    left = [name for name, why in skipped.items() if why == _NO_HOOK]
    if left and targets:
        warnings.warn(f"model: {shown(left)} are not recorded: {_NO_HOOK}; run.skipped has all", stacklevel=5)
    if not targets:
        raise ValueError(f"model: nothing to record; {skipped or no_parameters(model)}")
    if isinstance(sketch, Masked):
        plans = {name: sketch.layers[name] for name in targets}
    elif isinstance(sketch, Sketch):
        needing = [name for name, target in targets.items() if axis_statistics(target, sketch)]
        if needing:
            raise ValueError(
                f"sketch: {sketch!r} is drawn from statistics of the data; calibrate a Compressor with it, and pass "
                "that"
            )
        plans = {name: make_layer(target, sketch, {}) for name, target in targets.items()}
    else:
        raise TypeError(f"sketch must be a dropinf sketch such as dropinf.Dropout(24), or a Compressor, got {sketch!r}")
    return targets, {name: plan.to(targets[name].tensor.device) for name, plan in plans.items()}, skipped


def _is_table(model: nn.Module, target: Target, setting: str) -> bool:
    """Return whether a parameter is an embedding's, with a setting."""
    module = model.get_submodule(target.parameter.rpartition(".")[0])
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and bool(getattr(module, setting))


def _groups(targets: Mapping[str, Target], optimizer: torch.optim.Optimizer) -> list[int]:
    """Return the parameter group of each layer. Raises ValueError where the optimizer does not have its parameter."""
    of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, target in targets.items() if id(target.tensor) not in of]
    if missing:
        raise ValueError(
            f"optimizer: it does not have the parameters of {shown(missing)}; give it all that are trained, or name "
            "the layers to record in layers="
        )
    return [of[id(target.tensor)] for target in targets.values()]


def _steps_taken(
    optimizer: torch.optim.Optimizer, targets: Mapping[str, Target], kind: str | None, step: int | None
) -> int:
    """Return how many steps an optimizer has taken."""
    if step is not None:
        return step
    counts = [optimizer.state[t.tensor].get("step", 0) for t in targets.values() if t.tensor in optimizer.state]
    return max((int(x) for x in counts), default=0) if kind == "adam" else 0
