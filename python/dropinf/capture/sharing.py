"""Rows that several samples have in common: expanded where all share them, refused where samples mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..workload import tensors
from .attempt import Again, Attempts
from .checks import mixing_message
from .dependence import stay_apart
from .followed import Followed, Shown, settled
from .guard import watch
from .labels import Labels
from .ladder import AttributionError, SamplesMix
from .op_calls import OpUse, mark_data
from .passes import Pass
from .shared import constant, meeting, mixing_leaves, outputs_of
from .taps import signature_of


class Sharing(Attempts):
    """One batch, some of whose rows may belong to several samples."""

    def _resolve_several(self, current: Pass) -> None:
        """Expand outputs that all samples share to one copy per sample; refuse those that mix samples."""
        if not current.several:
            return
        names = {signature[0] for signature in current.several.values()}
        ops = [current.uses[n] for n in sorted(names) if n not in self.hooked.capture.uses]
        guessed = {use.name for use in ops if isinstance(use, OpUse) and use.guessed}
        if guessed:
            self.known.constant |= guessed  # what they make serves all samples
            raise Again
        if ops:
            layers = {p.name for use in ops for p in use.plans}
            self._refuse_mixed(current, {use.name for use in ops}, self._op_outputs, layers)
            self._lower([p.name for use in ops for p in use.plans], "its op's rows belong to several samples")
        modules = {name: self.hooked.capture.uses[name].module for name in sorted(names)}
        signatures = set(current.several.values())
        outputs = partial(outputs_of, self._forward_only, modules, signatures, self.n)
        self._refuse_mixed(
            current, names, outputs, {plan.name for n in names for plan in self.hooked.capture.uses[n].plans}
        )
        new = signatures - self.hooked.capture.shared
        if not new:
            self._lower_shared(names)
            raise Again
        self.hooked.capture.shared |= new
        self.suspects |= {signature[0] for signature in new}
        raise Again

    def _lower_shared(self, names: set[str]) -> None:
        """Take modules off their hooks whose output cannot be expanded to one copy per sample."""
        for name in sorted(names):
            for plan in self.hooked.capture.uses[name].plans:
                self.known.ladder.lower(plan.name, "all samples share its output, in a way that cannot be expanded")

    def _refuse_mixed(self, current: Pass, names: set[str], outputs: Callable[[Any], Any], layers: set[str]) -> None:
        """Raise SamplesMix where rows of several samples depend on samples, unless the loss may mix them."""
        mixed = names - constant(outputs, self.batch, self.n, self.cu, self.known.others)
        if mixed and not self.known.mixing:
            # The rows may be no samples': their columns are, say. Of an op's, the losses tell, one by one.
            apart = self._stay_apart(current, strict=True)
            if apart or not mixed & self.hooked.capture.uses.keys():
                self.known.open_layers |= set() if apart else layers
                self._lower_to_whole(layers)
            name = min(mixed)
            raise SamplesMix(mixing_message(name.split("@")[0], self._who_met(name), self.n))
        if mixed:
            for layer in layers:
                self.known.ladder.lower(layer, "the loss mixes samples, and mixing=True allows it", "backward")
            raise Again

    def _check_open(self) -> None:
        """Raise SamplesMix where losses that were taken one by one were others than in their batch."""
        met = sorted(name for name in self.known.open_layers if self.known.ladder.rungs[name] == "backward")
        if met and not self.known.mixing:
            raise SamplesMix(mixing_message(met[0], None, self.n))

    def _lower_to_whole(self, layers: set[str]) -> None:
        """Take whole gradients of layers whose rows are of several samples."""
        for layer in sorted(layers):
            self.known.ladder.lower(layer, "its rows belong to several samples, as where these stand last", "vmap")
        raise Again

    def _op_outputs(self, batch: Any) -> Mapping[str, list[Tensor]]:
        """Return the outputs of the ops that use parameters in a forward of the batch."""
        self.start.restore()
        current = self._pass()
        outside = self._outside(current)
        assert outside is not None
        outside.outputs = {}
        guard = watch(self.hooked.capture, self._parameters(), self.n, outside)
        with self._flags(current, outside), guard, torch.enable_grad():
            for leaf in tensors(batch):
                mark_data(leaf)
            self.known.loss_fn(self.model, batch)
        return outside.outputs

    def _who_met(self, name: str) -> tuple[int, int] | None:
        """Return two samples whose losses both depend on one row of a module's output."""
        self.start.restore()
        current = self._pass()
        outside = self._outside(current)
        with self.hooked.capture.running(current), self._flags(current, outside):
            guard = watch(self.hooked.capture, self._parameters(), self.n, outside)
            return meeting(current, self._losses(guard), name)

    def _check_leaves(self) -> None:
        """Raise SamplesMix where a loss mixes samples, by the gradients of the batch's own tensors."""
        if self.n == 1 or self.cu is not None or self.known.mixing:
            return
        self.start.restore()
        try:
            with self.hooked.capture.removed():
                mixes = mixing_leaves(lambda batch: self.known.loss_fn(self.model, batch), self.batch, self.n)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return  # a batch that takes no copies of its tensors
        if mixes:
            raise SamplesMix(mixing_message(min(self.known.exact_names), None, self.n))

    def _stay_apart(self, current: Pass, *, strict: bool = False) -> bool:
        """Return whether samples stay apart in any batch that runs the same ops, by the model as its user has it."""
        if self.hooked.attributes.is_sharded:
            return False
        tracked = [self.known.targets[name].tensor for name in self.proof.layers]
        self.start.restore()
        try:
            with self.hooked.capture.removed(), self.hooked.flags.own(tracked), torch.enable_grad():
                return stay_apart(
                    self.model,
                    self._plain_losses,
                    self.batch,
                    self.n,
                    self.cu,
                    None if strict else partial(self._shown, current),
                    strict=strict,
                )
        except (AttributionError, torch.OutOfMemoryError):
            raise
        except Exception:
            return False  # a loss that differentiates, say, for which nothing was kept
        finally:
            self.start.restore()
            self._unmark()

    def _is_shared(self, name: str, x: Any, out: Tensor) -> bool:
        return isinstance(x, Tensor) and signature_of(name, x, out, self.n) in self.known.shared

    def _shown(self, current: Pass, labels: Labels) -> Shown:
        """Return what looks at the outputs that are captured, in a forward that is followed."""
        uses = {name: use for name, use in self.hooked.capture.uses.items() if use.plans}
        shown = Shown(labels, uses, current.emitted, partial(settled, current), self._is_shared)
        raw = self._raw()
        if raw:
            shown.outside = Followed(current, raw, self.known.constant, shown)
            for leaf in tensors(self.batch):
                mark_data(leaf)
        return shown
