"""One batch through the hooked model: again and again, until what it gives is proven, or refused.

A run starts with the fastest way that is known for each layer. Whatever speaks against it (an error, a parameter that
is used elsewhere, rows of several samples, an audit) changes what is known, and the batch runs again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..workload import tensors
from . import sharded
from .attempt import Again
from .audit import TOLERANCE
from .checks import (
    cached_message,
    check_finite,
    grown_message,
    late_message,
    not_finite,
    refused_message,
    restless_message,
    unrepeatable_message,
)
from .exact import ExactGradients
from .guard import UseGuard, watch
from .knowledge import Plan
from .ladder import RUNGS, TAPPED, AttributionError
from .moments import NotFinite
from .passes import Pass
from .preserved import RandomState
from .recorders import Recorder
from .sharing import Sharing
from .taps import any_true, modes, own_modes, replaced

_MOST_ATTEMPTS = 32  # of a batch, beside those that take a layer down the ladder


class Run(Sharing):
    """One batch, until its rows are right."""

    def result(self) -> tuple[dict[str, Tensor], int]:
        """Return what the recorder made of the batch, and the number of its samples."""
        while True:
            self.attempts += 1
            if self.attempts > _MOST_ATTEMPTS + 8 * len(self.known.targets):
                raise AttributionError(restless_message(self.attempts))
            try:
                found = self._attempt()
            except Again:
                continue
            except (AttributionError, NotFinite, torch.OutOfMemoryError):
                raise
            except Exception as error:
                failure = error
            else:
                return found
            self._retreat(failure)

    def _attempt(self) -> tuple[dict[str, Tensor], int]:
        known, capture = self.known, self.hooked.capture
        self._refresh_uses()
        self._check_open()
        if self.begun:
            self.start.restore()
        self.begun = True
        sharded.reshard(self.model)
        current = self._pass()
        outside = self._outside(current)
        guard = watch(capture, self._parameters(), self.n, outside, tensors(self.batch), self.hooked.flags.given)
        began = time.perf_counter()
        hides = not known.own_flags and bool(known.ladder.tapped) and not self.hooked.attributes.is_sharded
        current.modes = modes() + 1  # the guard
        if any(target.tensor._backward_hooks for target in known.targets.values()):
            self.unforeseen = "a parameter has hooks on its gradient"
        if own_modes():
            self.unforeseen = "it runs in a mode of its own"
        known.replaced = known.replaced or replaced()
        if known.replaced:
            self.unforeseen = f"{known.replaced} is not torch's own"
        with capture.running(current, hides=hides), self._flags(current, outside):
            losses = self._losses(guard)
            guard.movement.end(losses)
            self._check_forward(current, guard, losses)
            self.unforeseen = self.unforeseen or guard.unforeseen
            current.dtypes |= guard.dtypes
            if guard.movement.foreign and self._leaves_out():
                self.unforeseen = self.unforeseen or "an autograd Function may ask what is trained"
            if any(use.is_odd for use in current.uses.values()):
                self.unforeseen = self.unforeseen or "a parameter is of a class of its own"
            if guard.writes:
                self.start.distrust()
            self.movement, self.sizes = guard.movement.fingerprint(), guard.movement.sizes
            self.coloured = False
            plan, look = self._backward(current, losses, guard.movement.functions)
            if current.chains and (self.coloured or len({id(x) for x in current.chains}) < len(current.chains)):
                self.unforeseen = self.unforeseen or "a weight is computed by an autograd Function"
            self._lower_unfit(outside)
            self._lower_leaked()
        after = RandomState(self.hooked.attributes.devices)
        self.random = bool(known.exact_names or self.hooked.probe) and self.start.random.moved()
        if self.n > 1 and (known.ladder.on("vmap") or known.ladder.on("alone")):
            self.unforeseen = self.unforeseen or "samples are taken one by one"  # and may be others in a batch
        hooks_took = time.perf_counter() - began
        self._exact(current.recorder, losses.detach())
        if known.exact_names:
            known.warn_slow(hooks_took, time.perf_counter() - began - hooks_took)
        store = self._proven(current, losses.detach(), plan, look)
        self.start.restore()  # each batch finds the model as the first did
        capture.changed.clear()  # what their user writes to weights from now on, stays
        known.writes_batches |= self.start.was_written
        after.restore()
        return store, len(losses)

    def _refresh_uses(self) -> None:
        """Take the hooks off modules of which nothing is hooked any more."""
        hooked = set(self.known.ladder.on("hook"))
        for use in self.hooked.capture.uses.values():
            use.weight = use.weight if use.weight is not None and use.weight.name in hooked else None
            use.bias = use.bias if use.bias is not None and use.bias.name in hooked else None
        self.hooked.capture.refresh()

    def _check_forward(self, current: Pass, guard: UseGuard, losses: Tensor) -> None:
        """Run again where the forward shows that the plan must change."""
        found = [n for n, t in self.known.targets.items() if id(t.tensor) in guard.found]
        self._lower(found, "the parameter is used outside its module's own forward", sharded_too=True)
        self._lower_counted(guard.counted)
        self._lower_unfit(guard.outside)
        self.known.replaced = self.known.replaced or current.replaced
        self._check_uses(current, guard)
        self._lower_failed(current)
        if len(losses) != self.n:
            self.known.learn_size(self.batch, len(losses))
            self.n = len(losses)
            raise Again
        if self.n > 1 and self.cu is None:
            self.known.learn_leaves(self.batch, self.n)
        if self.first_losses is None:
            self.first_losses, self.first_flags = losses.detach(), self.known.own_flags
        elif self.suspects and not torch.allclose(losses, self.first_losses, equal_nan=True):
            raise RuntimeError("the losses change where a shared output is expanded")
        elif not self.suspects and self.first_flags == self.known.own_flags:
            self._check_repeated(current, losses.detach())

    def _check_repeated(self, current: Pass, losses: Tensor) -> None:
        """Raise AttributionError where another run of the batch, from the same state, gives other losses."""
        assert self.first_losses is not None
        slack = TOLERANCE[self.proof.coarsest(current.dtypes | {losses.dtype})]
        apart = (losses - self.first_losses).nan_to_num().abs().max()
        if apart > slack * self.first_losses.nan_to_num().abs().max():
            raise AttributionError(unrepeatable_message(float(apart)))

    def _check_uses(self, current: Pass, guard: UseGuard) -> None:
        """Find modules whose own forward does more with a parameter than once scale by it, or writes to it."""
        for name, use in self.hooked.capture.uses.items():
            for parameter in use.counted:
                if guard.uses[id(parameter)] != current.called[name]:
                    current.failed[name] = "its forward uses a parameter more or less than once"
        self.start.check_parameters(self.model, self.hooked.capture.changed)

    def _backward(self, current: Pass, losses: Tensor, functions: Any) -> tuple[Plan, Any]:
        known = self.known
        calls = frozenset(s for s in current.calls if s[0] not in known.follows)
        rungs = frozenset(known.ladder.rungs.items())
        look = calls, functions, losses.dtype, rungs, known.own_flags, self.model.training
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
        moved = plan is not None and self.movement not in plan.movements
        if self.n > 1 and (self.colour or plan is None or plan.follow or moved):
            usual = plan is not None and plan.follow and not self.colour
            together = (usual or self.together) and self.hooked.probe is None
            if plan is not None:
                current.layouts, current.proven = plan.layouts, plan.proven
            self.coloured = True
            current.coloured_backward(losses, follow=together)
            self._lower_failed(current)
            self._resolve_several(current)
            loose = any(current.is_loose(key, {}, set()) for key in current.emitted_keys)
            if loose and not together and not self.together and self.hooked.probe is None:
                self.together = True  # in the way that later batches run, so that it is audited
                raise Again
        else:
            if plan is not None:
                current.layouts, current.proven, current.blank = plan.layouts, plan.proven, plan.blank
            current.backward(losses)
            self._lower_failed(current)
            self._colour_unproven(current)
        return self._learn(current, plan or Plan()), look

    def _colour_unproven(self, current: Pass) -> None:
        if current.unproven:
            self.colour, self.unforeseen = True, "gradient where none was"
            raise Again

    def _settle(self, current: Pass) -> None:
        """Run again where something was not as it was taken to be."""
        current.settle()
        self._lower_failed(current)
        self._colour_unproven(current)
        if current.mistaken:
            self.trusting = False
            raise Again

    def _learn(self, current: Pass, plan: Plan) -> Plan:
        """Return the plan with what this batch shows of its look."""
        known = self.known
        if current.proven is not plan.proven:
            # What the data decides once is looked at in every batch, also where a batch happens to be regular.
            plan.loose |= {k for k in current.emitted_keys if current.is_loose(k, plan.layouts, plan.proven)}
            known.follows |= {name for name, _ in plan.loose}
            plan.proven = (plan.proven | current.proven) - plan.loose
            plan.layouts |= {k: v for k, v in current.layouts.items() if k in plan.proven}
            plan.blank = (plan.blank | current.blank) - plan.proven - current.open - plan.loose
            plan.follow = plan.unclear or bool(plan.loose or current.open)
        plan.follow |= not known.follows.isdisjoint(current.emitted)
        return plan

    def _exact(self, recorder: Recorder, losses: Tensor) -> None:
        """Hand the recorder whole gradients of what no hook covers."""
        known = self.known
        wanted = known.ladder.rungs if self.hooked.probe is not None else known.exact_names
        if not wanted:
            return
        parameters = {name: known.targets[name].tensor for name in wanted}
        exact = ExactGradients(self.model, known.loss_fn, parameters, self.hooked.flags, random=self.random)
        known._exact_gradients = exact
        for rung in RUNGS[len(TAPPED) :]:
            names = known.ladder.on(rung)
            if rung == "vmap" and self.hooked.probe is not None:
                names = known.ladder.on("op") + names
            if not names:
                continue
            sharded.check_whole((name, parameters[name]) for name in names)
            try:
                with self.hooked.capture.removed():
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
                raise Again from error

    def _proven(self, current: Pass, losses: Tensor, plan: Plan, look: Any) -> dict[str, Tensor]:
        """Return the batch's rows, audited where it is due."""
        hooked, known = self.hooked, self.known
        self._keep_apart(current, plan, look)
        reached = frozenset(name for name in current.emitted if name not in known.follows)
        new = "new path of functions" if self.movement is not None and self.movement not in plan.paths else None
        self.why = self.why or self.proof.why(plan, reached, self.unforeseen or current.unforeseen or new)
        why = self.why
        if hooked.probe is not None and any_true(current.questions):
            self._settle(current)
        if why and hooked.probe is not None:
            current.recorder.check(losses)
            if self.proving > 0 and hooked.prove(self.batch):
                self.colour, self.proving = self.n > 1, self.proving - 1
                raise Again
            plan = known.plans.get(look, plan)
        if (why or plan.unclear) and not current.proven and known.exact_names:
            self._check_leaves()
        store = current.recorder.finish(hooked.layers, losses)
        dtype = self.proof.coarsest(current.dtypes | {losses.dtype})
        if hooked.probe is None:
            why, faint = self._ask(current, plan, store, dtype)
            if why:
                self._audit(store, losses, dtype, (plan, look), why)
            if faint is not None:
                self._audit(store, losses, dtype, (plan, look), "a sample's gradient is far below others'", faint)
        plan.trusted = 0 if why else plan.trusted + 1
        if not self.proof.says_nothing:
            plan.gradients.add(reached)
            if why and self.movement is not None:
                plan.paths.add(self.movement)
        known.plans[look] = plan
        return store

    def _ask(
        self, current: Pass, plan: Plan, store: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[str | None, Tensor | None]:
        """Find out all that nobody waited for, and wait once.

        Return why the batch is to be audited, and which samples [N] are to be compared by themselves; None for neither.
        """
        sums = None if self.why else self.proof.sums(current)
        first = [] if self.why else self.proof.first_gradients(plan, store)
        differ = [] if sums is None else [*sums.differ({name: store[name] for name in sums.sketches}, dtype).values()]
        faint = self.proof.doubted(store, current, dtype) if plan.follow else None
        some = [] if faint is None else [faint.any()]
        if not any_true([*not_finite(store), *current.questions, *first, *differ, *some]):
            return self.why, None
        self._settle(current)
        check_finite(store, self.hooked.where)
        self.why = self.why or ("first gradient of a layer" if any_true(first) else None)
        if sums is not None and any_true(differ):
            self.why = self.why or self.proof.unequal(sums, store, dtype)
        return self.why, faint if any_true(some) else None

    def _keep_apart(self, current: Pass, plan: Plan, look: Any) -> None:
        """Look whether samples stay apart in batches like this one. Where they may meet, each batch is looked at."""
        if self.n == 1 or plan.follow:
            return
        alike = self._alike(current)
        if alike in plan.apart:
            return
        if self.movement is not None and self._stay_apart(current):
            plan.movements.add(self.movement)
            plan.apart.add(alike)
            return
        plan.follow = plan.unclear = True
        if not self.coloured:
            self.known.plans[look] = plan
            raise Again

    def _audit(
        self,
        store: Mapping[str, Tensor],
        losses: Tensor,
        dtype: torch.dtype,
        known: tuple[Plan, Any],
        why: str,
        only: Tensor | None = None,
    ) -> None:
        """Compare the batch's rows, or ``only`` some [N], with plain autograd; where they differ, run again."""
        with self.hooked.capture.removed():
            want = self.proof.expect(self._plain_losses, store, dtype, only)
            plan, look = known
            wrong = self.proof.wrong(store, losses, dtype, plan, why, want, self._plain_losses)
        if wrong:
            self._fall(wrong, look)
            if plan.trusted:
                raise AttributionError(late_message(wrong, plan.trusted))
            raise Again

    def _fall(self, wrong: Mapping[str, float], look: Any) -> None:
        """Take the next way for layers that an audit found wrong."""
        known = self.known
        known.plans.pop(look, None)
        tapped = [n for n in wrong if n not in known.ladder.exact]
        if tapped and self.n > 1 and not self.colour:
            self.colour = True
            return
        if tapped and not known.own_flags and not self.tried_flags:
            known.own_flags = self.tried_flags = True
            self.tried = len(wrong)
            return
        if self.tried and len(wrong) >= self.tried:  # its user's flags did not help
            known.own_flags, self.tried = False, 0
        for name, error in wrong.items():
            reason = f"its rows differed from plain autograd's sum by {error:.2g}"
            if not known.ladder.lower(name, reason):
                raise AttributionError(refused_message(name, error, self.n, known.targets[name].tensor.dtype))

    def _retreat(self, failure: Exception) -> None:
        """Take a slower way where the hooked model raised an error; raise what the plain model raises."""
        known = self.known
        try:
            with self.hooked.capture.removed():
                reached = self.proof.expect(self._plain_losses).sketches
        except Exception as plain:
            if any(x.grad_fn is not None for x in tensors(self.batch)):
                raise RuntimeError(grown_message()) from plain
            if "backward through the graph a second time" in str(plain):
                raise RuntimeError(
                    cached_message([n for n in known.ladder.rungs if n not in known.ladder.on("hook")])
                ) from plain
            raise plain from None
        if not reached:
            raise failure
        if self.suspects:
            names, self.suspects = self.suspects, set()
            self.hooked.capture.shared -= {s for s in self.hooked.capture.shared if s[0] in names}
            self._lower_shared(names)
            return
        if not known.own_flags and not self.tried_flags:
            known.own_flags = self.tried_flags = True
            return
        if not known.ladder.tapped:
            raise failure
        known.own_flags = False
        for name in known.ladder.tapped:
            known.ladder.lower(name, f"the model does not run with hooks ({type(failure).__name__})")
