"""One batch on a hooked model: its passes, with the flags that the model runs with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import tensors
from . import sharded
from .checks import check_losses, explain
from .guard import UseGuard
from .hooks import Capture
from .knowledge import Knowledge
from .ladder import RUNGS, Rung
from .layer import Layer
from .op_calls import mark_data, unmark
from .outside import Outside
from .passes import Pass
from .preserved import Attributes, Flags, Start, gradients_taken
from .proof import Proof
from .recorders import Recorder
from .samples import Samples
from .targets import Target


@dataclass
class Hooked:
    """A model with hooks on it, for one call: what its layers give a new recorder for each batch.

    ``where`` names a sample of the current batch in errors. ``probe``: the layers that are audited, by ``prove``, where
    the recorder does not record rows. ``batches``: how many were begun.
    """

    known: Knowledge
    capture: Capture
    flags: Flags
    attributes: Attributes
    layers: Mapping[str, Layer]
    recorder: Callable[[Mapping[str, Layer]], Recorder]
    where: Callable[[int], str]
    probe: Mapping[str, Layer] | None = None
    prove: Callable[[Any], bool] = bool
    batches: int = 0


class Again(Exception):  # noqa: N818
    """The batch must run again: what is known has changed."""


class Attempts:
    """The passes of one batch."""

    def __init__(self, hooked: Hooked, batch: Any) -> None:
        self.hooked, self.known, self.batch = hooked, hooked.known, batch
        self.model = self.known.model
        self.cu = None if self.known.cu_seqlens is None else self.known.cu_seqlens(batch)
        self.n = len(self.cu) - 1 if self.cu is not None else self.known.size_hint(batch) or 1
        if not hooked.attributes.is_sharded:
            hooked.attributes.check_untouched()
        hooked.attributes.refresh()
        copied = hooked.batches == 1 or self.known.writes_batches
        self.start = Start(hooked.attributes, batch, copied=copied, changed=hooked.capture.changed)
        hooked.attributes.pending = self.start
        self.begun = False
        self.together = False  # whether rows are taken from the pass that finds layouts
        self.colour = False  # whether layouts must be found anew
        self.why: str | None = None  # it is audited
        self.unforeseen: str | None = None  # why it is to be audited, whatever it looks like
        self.random = False  # the model draws random numbers
        self.movement: int | None = None  # of its forward, by which it looks like earlier ones
        self.sizes = 0  # of the tensors in it
        self.trusting = True  # samples are taken to stand where they did in all batches, and looked at afterwards
        self.coloured = False  # the samples of its rows were found anew
        self.attempts, self.proving = 0, 3
        self.suspects: set[str] = set()  # modules whose output is taken to be shared since this batch
        self.first_losses: Tensor | None = None
        self.first_flags = False  # whether they came with its user's flags
        self.proof = Proof(self.known, hooked.probe or hooked.layers, hooked.flags, self.start, hooked.batches)
        self.leaked: set[str] = set()  # tapped parameters whose gradient reached the parameter itself
        self.tried_flags, self.tried = False, 0  # its user's flags, and how many layers were wrong before

    def _pass(self) -> Pass:
        anchor = torch.zeros((), device=self.hooked.attributes.parameters[0].device, requires_grad=True)
        recorder = self.hooked.recorder(self.hooked.layers)
        return Pass(recorder, Samples(self.n, self.cu), anchor, place=self.proof.place, trusting=self.trusting)

    def _alike(self, current: Pass) -> Any:
        """Return by what a batch is like others, as to whose rows are whose.

        What a number, an array or a text of the batch decides is in no shape of its tensors, and in no path.
        """
        shapes = tuple(leaf.shape for leaf in tensors(self.batch)), frozenset(current.shapes.items())
        cu = None if self.cu is None else tuple(self.cu.tolist())
        return self.movement, self.sizes, self.n, shapes, cu

    def _parameters(self) -> list[nn.Parameter]:
        return [target.tensor for target in self.known.targets.values()]

    def _outside(self, current: Pass) -> Outside | None:
        """Return what captures parameters at the ops that use them, if there are such parameters."""
        raw = self._raw()
        return Outside(current, raw, self.known.constant) if raw else None

    def _raw(self) -> dict[int, Layer]:
        """Return the parameters, by id, that are captured at the ops that use them, with their layers."""
        names = [] if self.hooked.probe is not None else self.known.ladder.on("op")
        return {id(self.known.targets[n].tensor): self.hooked.layers[n] for n in names}

    def _leaves_out(self) -> bool:
        """Return whether something is trained that is not tracked, and frozen while its model is hooked."""
        tracked = {id(target.tensor) for target in self.known.targets.values()}
        trained = {key for key, flag in self.hooked.flags.given.items() if flag}
        return not self.known.own_flags and not trained <= tracked

    def _unmark(self) -> None:
        """Take the marks off what outlives a forward."""
        for leaf in (*tensors(self.batch), *self.hooked.attributes.held):
            unmark(leaf)

    @contextlib.contextmanager
    def _flags(self, current: Pass, outside: Outside | None = None) -> Iterator[None]:
        """Have the flags inside that the model runs with, and no gradient reach a weight; mark the batch's tensors."""
        targets = self.known.targets.values()
        as_user = self.known.own_flags or not self.known.ladder.tapped
        own: list[Tensor] = [t.tensor for t in targets] if as_user else []
        raw = [] if outside is None else [t for t in targets if id(t.tensor) in outside.raw]
        hidden = [] if own else self._hidden()
        if not own and not raw and not hidden:
            yield
            return

        def leaked(name: str, _: Tensor) -> None:
            self.leaked.add(name)

        watched = [*raw, *hidden]
        flags = self.hooked.flags.own(own) if own else self.hooked.flags.only([t.tensor for t in watched])
        taken: dict[Tensor, Callable[[Tensor], None]] = {t.tensor: partial(leaked, t.name) for t in watched}
        summed = [pair for use in self.hooked.capture.uses.values() for pair in use.summed.items()]
        if own:
            summed = [(name, self.known.targets[name].tensor) for name, _ in summed]
        taken |= {tensor: partial(current.add_sum, name) for name, tensor in summed}
        watched_too = [] if own else [twin for _, twin in summed]
        try:
            for leaf in tensors(self.batch):
                mark_data(leaf)
            with flags, gradients_taken([*self.hooked.attributes.parameters, *watched_too], taken):
                yield
        finally:
            self._unmark()

    def _hidden(self) -> list[Target]:
        """Return the hooked parameters that get a gradient only where something else than their module uses them."""
        if self.hooked.attributes.is_sharded:
            return []
        names = {plan.name for use in self.hooked.capture.uses.values() for plan in use.hidden.values()}
        return [target for name, target in self.known.targets.items() if name in names]

    def _losses(self, guard: UseGuard | None = None) -> Tensor:
        with guard or contextlib.nullcontext(), torch.enable_grad():
            losses = self.known.loss_fn(self.model, self.batch)
        check_losses(losses, self.batch, self.cu, self.known.size_hint(self.batch))
        return losses

    def _plain_losses(self) -> Tensor:
        """Return the losses without hooks; explain what their failure is likely due to."""
        try:
            losses = self._losses()
        except (RuntimeError, ValueError, IndexError) as error:
            explained = explain(self.model, self.batch)
            if explained is None:
                raise
            raise explained from error
        return losses

    def _forward_only(self, batch: Any) -> None:
        self.start.restore()
        with torch.no_grad():
            self.known.loss_fn(self.model, batch)

    def _lower(self, names: list[str], reason: str, to: Rung | None = None, *, sharded_too: bool = False) -> None:
        """Take layers off their hooks and run again, if there are any."""
        names = [n for n in names if n not in self.known.ladder.exact]
        if not names:
            return
        if sharded_too:
            sharded.check_whole((name, self.known.targets[name].tensor) for name in names)
        for name in names:
            self.known.ladder.lower(name, reason, to)
        raise Again

    def _lower_failed(self, current: Pass) -> None:
        for name, why in current.failed.items():
            use = self.hooked.capture.uses.get(name) or current.uses[name]
            self._lower([plan.name for plan in use.plans], why)

    def _lower_counted(self, counted: set[int]) -> None:
        """Take one backward a sample for weights whose gradient is scaled by how often ids stand in the whole batch."""
        ladder = self.known.ladder
        found = [n for n, t in self.known.targets.items() if id(t.tensor) in counted and ladder.rungs[n] != RUNGS[-1]]
        for name in found:
            ladder.lower(name, "scale_grad_by_freq counts the ids of the whole batch", RUNGS[-1])
        if found:
            raise Again

    def _lower_leaked(self) -> None:
        """Take a surer way for parameters that got a gradient in another way than by their module."""
        why = "the parameter is used where nothing sees it, as in an autograd Function"
        self._lower(sorted(self.leaked), why, "alone")  # vmap puts other parameters in their modules, and nowhere else

    def _lower_unfit(self, outside: Outside | None) -> None:
        if outside is not None:
            self._lower(
                sorted(outside.unfit), "the parameter is used by an op whose gradient cannot be mapped over samples"
            )
