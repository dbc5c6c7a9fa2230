"""One batch through the hooked model: again and again, until what it gives is proven, or refused.

A run starts with the fastest way that is known for each layer. Whatever speaks against it (an error, a parameter that
is used elsewhere, rows of several samples, an audit) changes what is known, and the batch runs again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..workload import tensors
from . import sharded
from .checks import check_finite, check_losses, explain, mixing_message, refused_message
from .exact import ExactGradients
from .guard import UseGuard, watch
from .hooks import Capture, Pass
from .knowledge import Knowledge, Plan
from .ladder import RUNGS, AttributionError, Rung
from .layer import Layer
from .moments import NotFinite
from .outside import OpUse, Outside, mark_data, unmark
from .preserved import Attributes, Flags, RandomState, Start, gradients_taken
from .proof import Proof
from .recorders import Recorder
from .samples import Samples
from .shared import constant, meeting


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
    recorder: Callable[[], Recorder]
    where: Callable[[int], str]
    probe: Mapping[str, Layer] | None = None
    prove: Callable[[Any], None] = print
    batches: int = 0


class _Again(Exception):  # noqa: N818
    """The batch must run again: what is known has changed."""


class Run:
    """One batch, until its rows are right."""

    def __init__(self, hooked: Hooked, batch: Any) -> None:
        self.hooked, self.known, self.batch = hooked, hooked.known, batch
        self.model = self.known.model
        self.cu = None if self.known.cu_seqlens is None else self.known.cu_seqlens(batch)
        self.n = len(self.cu) - 1 if self.cu is not None else self.known.size_hint(batch) or 1
        self.start = Start(self.model, hooked.attributes)
        self.begun = False
        self.colour = False  # whether layouts must be found anew
        self.suspects: set[str] = set()  # modules whose output is taken to be shared since this batch
        self.first_losses: Tensor | None = None
        self.proof = Proof(self.known, hooked.probe or hooked.layers, hooked.flags, self.start, hooked.batches)
        self.tried_flags, self.tried = False, 0  # its user's flags, and how many layers were wrong before

    def result(self) -> tuple[dict[str, Tensor], int]:
        """Return what the recorder made of the batch, and the number of its samples."""
        while True:
            try:
                found = self._attempt()
            except _Again:
                continue
            except (AttributionError, NotFinite, torch.OutOfMemoryError):
                raise
            except Exception as error:
                failure = error
            else:
                self.hooked.attributes.restore()
                return found
            self._retreat(failure)

    def _attempt(self) -> tuple[dict[str, Tensor], int]:
        known, capture = self.known, self.hooked.capture
        self._refresh_uses()
        if self.begun:
            self.start.restore()
        self.begun = True
        sharded.reshard(self.model)
        anchor = torch.zeros((), device=next(self.model.parameters()).device, requires_grad=True)
        current = Pass(self.hooked.recorder(), Samples(self.n, self.cu), anchor, known.scales)
        outside = self._outside(current)
        guard = watch(capture, [t.tensor for t in known.targets.values()], self.n, outside)
        began = time.perf_counter()
        with capture.running(current), self._flags(outside):
            losses = self._losses(guard)
            self._check_forward(current, guard, losses)
            plan, look = self._backward(current, losses, guard.movement.fingerprint())
            self._lower_unfit(outside)
        after = RandomState(self.model)
        hooks_took = time.perf_counter() - began
        self._exact(current.recorder, losses.detach())
        if known.exact_names:
            known.warn_slow(hooks_took, time.perf_counter() - began - hooks_took)
        store = self._proven(current, losses.detach(), plan, look)
        after.restore()
        return store, len(losses)

    def _outside(self, current: Pass) -> Outside | None:
        """Return what captures parameters at the ops that use them, if there are such parameters."""
        names = [] if self.hooked.probe is not None else self.known.ladder.on("op")
        raw = {id(self.known.targets[n].tensor): self.hooked.layers[n] for n in names}
        return Outside(current, raw, self.known.constant) if raw else None

    @contextlib.contextmanager
    def _flags(self, outside: Outside | None = None) -> Iterator[None]:
        """Have the flags inside that the model runs with, and no gradient reach a weight; mark the batch's tensors."""
        targets = self.known.targets.values()
        own: list[Tensor] = [t.tensor for t in targets] if self.known.own_flags else []
        raw = [] if outside is None else [t for t in targets if id(t.tensor) in outside.raw]
        if not own and not raw:
            yield
            return

        def leaked(name: str, _: Tensor) -> None:
            assert outside is not None
            outside.unfit.add(name)  # a use that no op here covers: its gradient reached the parameter itself

        flags = self.hooked.flags.own(own) if own else self.hooked.flags.only([t.tensor for t in raw])
        taken: dict[Tensor, Callable[[Tensor], None]] = {t.tensor: partial(leaked, t.name) for t in raw}
        leaves = tensors(self.batch)
        try:
            for leaf in leaves:
                mark_data(leaf)
            with flags, gradients_taken(self.model, taken):
                yield
        finally:
            for leaf in (*leaves, *self.model.buffers()):
                unmark(leaf)

    def _refresh_uses(self) -> None:
        hooked = set(self.known.ladder.on("hook"))
        for use in self.hooked.capture.uses.values():
            use.weight = use.weight if use.weight is not None and use.weight.name in hooked else None
            use.bias = use.bias if use.bias is not None and use.bias.name in hooked else None

    def _losses(self, guard: UseGuard | None = None) -> Tensor:
        with guard or contextlib.nullcontext(), torch.enable_grad():
            losses = self.known.loss_fn(self.model, self.batch)
        check_losses(losses, self.batch, self.cu)
        return losses

    def _check_forward(self, current: Pass, guard: UseGuard, losses: Tensor) -> None:
        """Run again where the forward shows that the plan must change."""
        found = [n for n, t in self.known.targets.items() if id(t.tensor) in guard.found]
        self._lower(found, "the parameter is used outside its module's own forward", sharded_too=True)
        self._lower_unfit(guard.outside)
        self._lower_failed(current)
        if len(losses) != self.n:
            self.known.learn_size(self.batch, len(losses))
            self.n = len(losses)
            raise _Again
        if self.first_losses is None:
            self.first_losses = losses.detach()
        elif self.suspects and not torch.allclose(losses, self.first_losses, equal_nan=True):
            raise RuntimeError("the losses change where a shared output is expanded")

    def _backward(self, current: Pass, losses: Tensor, movement: Any) -> tuple[Plan, Any]:
        known = self.known
        calls = frozenset(s for s in current.calls if s[0] not in known.follows)
        look = calls, losses.dtype, frozenset(known.ladder.rungs.items()), known.own_flags, self.model.training
        plan = known.plans.get(look)
        uses = self.hooked.capture.uses.values()
        tapped = any(use.plans for use in uses) or known.ladder.on("op")
        if not tapped or (not current.calls and known.exact_names):
            return plan or Plan(), look
        if not losses.requires_grad:
            raise ValueError(
                "loss_fn: its loss does not depend on any tracked layer; was it computed under torch.no_grad, "
                "detached, or by a part of the model that layers= leaves out?"
            )
        moved = movement is None or (plan is not None and movement not in plan.movements)
        if self.n > 1 and (self.colour or plan is None or plan.follow or moved):
            current.coloured_backward(losses, follow=plan is not None and plan.follow)
            self._lower_failed(current)
            self._resolve_several(current)
        else:
            if plan is not None:
                current.layouts, current.proven, current.blank = plan.layouts, plan.proven, plan.blank
            current.backward(losses)
            self._lower_failed(current)
            if current.unproven:
                self.colour = True
                raise _Again
        return self._learn(current, plan or Plan(), movement), look

    def _learn(self, current: Pass, plan: Plan, movement: Any) -> Plan:
        """Return the plan with what this batch shows of its look."""
        if current.proven is not plan.proven:
            plan.proven = (plan.proven | current.proven) - current.open
            plan.layouts |= {k: v for k, v in current.layouts.items() if k in current.proven}
            plan.blank = (plan.blank | current.blank) - plan.proven - current.open
            plan.follow = bool(current.open)
            self.known.follows |= {name for name, _ in current.open if current.scattered(name)}
        if movement is not None:
            plan.movements.add(movement)
        return plan

    def _lower(self, names: list[str], reason: str, *, sharded_too: bool = False) -> None:
        """Take layers off their hooks and run again, if there are any."""
        names = [n for n in names if self.known.ladder.rungs[n] in ("hook", "op")]
        if not names:
            return
        if sharded_too:
            sharded.check_whole((name, self.known.targets[name].tensor) for name in names)
        for name in names:
            self.known.ladder.lower(name, reason)
        raise _Again

    def _lower_failed(self, current: Pass) -> None:
        for name, why in current.failed.items():
            use = self.hooked.capture.uses.get(name) or current.uses[name]
            self._lower([plan.name for plan in use.plans], why)

    def _lower_unfit(self, outside: Outside | None) -> None:
        if outside is not None:
            self._lower(
                sorted(outside.unfit), "the parameter is used by an op whose gradient cannot be mapped over samples"
            )

    def _resolve_several(self, current: Pass) -> None:
        """Expand outputs that all samples share to one copy per sample; refuse those that mix samples."""
        if not current.several:
            return
        names = {signature[0] for signature in current.several.values()}
        ops = [current.uses[n] for n in sorted(names) if n not in self.hooked.capture.uses]
        guessed = {use.name for use in ops if isinstance(use, OpUse) and use.guessed}
        if guessed:
            self.known.constant |= guessed  # what they make serves all samples
            raise _Again
        if ops:
            self._lower([p.name for use in ops for p in use.plans], "its op's rows belong to several samples")
        modules = {name: self.hooked.capture.uses[name].module for name in sorted(names)}
        signatures = set(current.several.values())
        same = constant(self._forward_only, modules, signatures, self.batch, self.n, self.cu)
        if mixed := names - same:
            if not self.known.mixing:
                name = min(mixed)
                raise AttributionError(mixing_message(name, self._who_met(name), self.n))
            self._lower_uses(mixed, "the loss mixes samples, and mixing=True allows it", to="backward")
        new = signatures - self.hooked.capture.shared
        if not new:
            self._lower_uses(names, "all samples share its output, in a way that cannot be expanded")
        self.hooked.capture.shared |= new
        self.suspects |= {signature[0] for signature in new}
        raise _Again

    def _lower_uses(self, names: set[str], reason: str, to: Rung = "op") -> None:
        for name in sorted(names):
            for plan in self.hooked.capture.uses[name].plans:
                self.known.ladder.lower(plan.name, reason, to)
        raise _Again

    def _forward_only(self, batch: Any) -> None:
        self.start.restore()
        with torch.no_grad():
            self.known.loss_fn(self.model, batch)

    def _who_met(self, name: str) -> tuple[int, int] | None:
        """Return two samples whose losses both depend on one row of a module's output."""
        self.start.restore()
        anchor = torch.zeros((), device=next(self.model.parameters()).device, requires_grad=True)
        current = Pass(self.hooked.recorder(), Samples(self.n, self.cu), anchor, self.known.scales)
        with self.hooked.capture.running(current), self._flags():
            return meeting(current, self._losses(), name)

    def _exact(self, recorder: Recorder, losses: Tensor) -> None:
        """Hand the recorder whole gradients of what no hook covers."""
        known = self.known
        wanted = known.ladder.rungs if self.hooked.probe is not None else known.exact_names
        if not wanted:
            return
        parameters = {name: known.targets[name].tensor for name in wanted}
        exact = ExactGradients(self.model, known.loss_fn, parameters, self.hooked.flags)
        known._exact_gradients = exact
        for rung in RUNGS[2:]:
            names = known.ladder.on(rung)
            if rung == "vmap" and self.hooked.probe is not None:
                names = known.ladder.on("op") + names
            if not names:
                continue
            try:
                for chunk in exact(rung, names, self.batch, losses, self.start):
                    for name in names:
                        recorder.emit_whole(self.hooked.layers[name], chunk[name])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if rung == RUNGS[-1]:
                    raise
                for name in names:
                    known.ladder.lower(name, f"torch.func cannot run this model ({type(error).__name__})")
                raise _Again from error

    def _proven(self, current: Pass, losses: Tensor, plan: Plan, look: Any) -> dict[str, Tensor]:
        """Return the batch's rows, audited where it is due."""
        hooked, known = self.hooked, self.known
        reached = frozenset(name for name in current.emitted if name not in known.follows)
        why = self.proof.why(plan, reached)
        if why and hooked.probe is not None:
            current.recorder.check(losses)
            before = known.state()
            hooked.prove(self.batch)
            if known.state() != before:
                raise _Again
        store = current.recorder.finish(hooked.layers, losses)
        check_finite(store, hooked.where)
        if why and hooked.probe is None:
            self._audit(store, losses, current, look, why)
        plan.gradients.add(reached)
        known.plans[look] = plan
        return store

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

    def _audit(self, store: Mapping[str, Tensor], losses: Tensor, current: Pass, look: Any, why: str) -> None:
        """Compare the batch's rows with plain autograd. Where they differ, change what is known and run again."""
        want = self.proof.expect(self._plain_losses, store)
        wrong = self.proof.wrong(store, losses, current.dtypes, why, want)
        if wrong:
            self._fall(wrong, look)
            raise _Again

    def _fall(self, wrong: Mapping[str, float], look: Any) -> None:
        """Take the next way for layers that an audit found wrong."""
        known = self.known
        known.plans.pop(look, None)
        hooked = [n for n in wrong if known.ladder.rungs[n] in ("hook", "op")]
        if hooked and self.n > 1 and not self.colour:
            self.colour = True
            return
        if hooked and not known.own_flags and not self.tried_flags:
            known.own_flags = self.tried_flags = True
            self.tried = len(wrong)
            return
        if self.tried and len(wrong) >= self.tried:  # its user's flags did not help
            known.own_flags, self.tried = False, 0
        for name, error in wrong.items():
            reason = f"its rows differed from plain autograd's sum by {error:.2g}"
            if not known.ladder.lower(name, reason):
                raise AttributionError(refused_message(name, error, self.n))

    def _retreat(self, failure: Exception) -> None:
        """Take a slower way where the hooked model raised an error; raise what the plain model raises."""
        known = self.known
        try:
            reached = self.proof.expect(self._plain_losses).sketches
        except Exception as plain:
            raise plain from None
        if not reached:
            raise failure
        if self.suspects:
            names, self.suspects = self.suspects, set()
            self.hooked.capture.shared -= {s for s in self.hooked.capture.shared if s[0] in names}
            for name in names:
                for plan in self.hooked.capture.uses[name].plans:
                    known.ladder.lower(plan.name, "all samples share its output, in a way that cannot be expanded")
            return
        if not known.own_flags and not self.tried_flags:
            known.own_flags = self.tried_flags = True
            return
        hooked = known.ladder.on("hook") + known.ladder.on("op")
        if not hooked:
            raise failure
        known.own_flags = False
        for name in hooked:
            known.ladder.lower(name, f"the model does not run with hooks ({type(failure).__name__})")
