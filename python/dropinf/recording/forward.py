"""One forward of a training step: its user's own backward gives the rows, by layouts that were proven before.

The proof runs on what the model puts out, as no loss is known: with weights that are powers of two on the samples'
outputs, each row of a gradient names its sample, and random sums of rows are compared with plain autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.audit import TOLERANCE, Expected, coarsest, sketched
from ..capture.colours import Key
from ..capture.dependence import stay_apart
from ..capture.followed import Shown, settled
from ..capture.hooks import Capture
from ..capture.labels import Labels
from ..capture.ladder import AttributionError
from ..capture.layer import Layer
from ..capture.passes import Call, Pass
from ..capture.preserved import Attributes, Start, renormalised
from ..capture.recorders import Compression
from ..capture.samples import Layout, Samples
from ..capture.shared import constant, outputs_of
from ..capture.taps import any_true, listen
from ..workload import tensors
from .checks import check_failed, check_layouts, mixed, of_samples, wrong_layers


@dataclass
class TrainingPass(Pass):
    """A pass whose backward is its user's own, and may come in parts. ``parameters``: what is recorded."""

    parameters: Sequence[Tensor] = ()

    def _key(self, call: Call) -> Key:
        return call.use.name, call.number  # not by order of emission, which is of each loss

    @property
    def emitted_keys(self) -> list[Key]:
        """The gradients that were emitted."""
        return [key for key in self.shapes if self.emitted[key[0]]]

    def _differentiate(self, losses: Tensor, weights: Tensor, *, retain: bool) -> None:  # noqa: ARG002
        # No gradient is added to a parameter's own, and no hook of DistributedDataParallel's runs.
        try:
            torch.autograd.grad(losses, self.parameters, weights, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise AttributionError(
                "model: it has reentrant checkpoints, through which no gradient of a part can be asked for; pass "
                "use_reentrant=False to torch.utils.checkpoint"
            ) from error

    def open_to_user(self, recorder: Compression) -> None:
        """Have what its user backpropagates from now on go to a recorder."""
        self.recorder, self._take, self.running, self.weights = recorder, None, True, None
        self.emitted.clear()
        for node, output, call in self._waiting:
            listen(node, output, call)
        self._waiting.clear()

    def check_proven(self) -> None:
        """Raise AttributionError where a gradient came that no proof saw."""
        names = [name for name, _ in self.unproven]
        if not names and any_true(self._surprises):
            names = sorted({name for name, _ in self.blank})
        if names:
            raise AttributionError(
                f"layer {names[0]}: a gradient reaches it otherwise than through what the model returns, so that "
                "nothing shows which rows are whose; return what the loss is made of, call the model and not its "
                "parts, or leave the layer out with layers="
            )


@dataclass
class Proven:
    """Of a forward, whose rows are whose: layouts, and for which gradients they are proven or were zero."""

    layouts: dict[Key, Layout]
    proven: set[Key]
    blank: set[Key]

    def lend(self, current: Pass) -> None:
        """Have a pass know it."""
        current.layouts, current.proven, current.blank = self.layouts, self.proven, self.blank


class Prover:
    """Finds and proves whose rows are whose.

    ``mixing``: rows may be of several samples' outputs, as behind a BatchNorm in train mode; they are then taken to
    stand as samples do.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        layers: Mapping[str, Layer],
        parameters: Mapping[str, Tensor],
        mixing: bool,
    ) -> None:
        self.model, self.capture, self.layers, self.mixing = model, capture, layers, mixing
        self.parameters = dict(parameters)
        self._anchor = torch.zeros((), device=next(iter(parameters.values())).device, requires_grad=True)

    def new_pass(self, samples: Samples) -> TrainingPass:
        """Return a pass of some samples."""
        return TrainingPass(Compression(self.layers), samples, self._anchor, parameters=list(self.parameters.values()))

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Start:
        """Return what a forward beside the user's must leave as it was."""
        return Start(Attributes(self.model), (args, kwargs), copied=True, changed=renormalised(self.model))

    def discover(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Samples) -> set[str]:
        """Return the layers whose output all samples share, as a table of positions; found beside the user's forward.

        Raises AttributionError where samples meet in a layer.
        """
        if self.mixing or samples.n == 1:
            return set()
        start = self._start(args, kwargs)
        current = self.new_pass(samples)
        try:
            with torch.enable_grad(), self.capture.running(current):
                losses = of_samples(self.model.forward(*args, **kwargs), samples)
            check_failed(current)
            current.coloured_backward(losses, follow=False)
        finally:
            start.restore()
        return self._shared(current, args, kwargs, samples, start) if current.several else set()

    def look(self, current: TrainingPass, out: Any) -> Proven:
        """Return what is proven of the forward that its user ran.

        Raises AttributionError where rows are no sample's.
        """
        losses = of_samples(out, current.samples)
        if not bool(losses.isfinite().all()):
            raise AttributionError("run: what the model returns is not finite, so nothing can be proven of its rows")
        if self.mixing or current.samples.n == 1:
            current.backward(losses)
            current.proven = set(current.emitted_keys)
            current.unproven.clear()
        else:
            current.coloured_backward(losses, follow=False)
        check_failed(current)
        if current.several:
            raise mixed(current)
        check_layouts(current)
        if not self.mixing:  # else a sample's weight is in others' rows too
            self._audit(current, losses)
        return Proven(dict(current.layouts), set(current.proven), set(current.blank))

    def stays_apart(self, current: TrainingPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether samples stay apart in each forward that runs these ops on these sizes, whatever the data."""
        samples = current.samples
        if self.mixing or samples.n == 1:
            return True
        start = self._start(args, kwargs)
        uses = {name: use for name, use in self.capture.uses.items() if use.plans}

        def shown(labels: Labels) -> Shown:
            return Shown(labels, uses, current.emitted, partial(settled, current), lambda *_: False)

        def losses() -> Tensor:
            return of_samples(self.model.forward(*args, **kwargs), samples)

        try:
            with self.capture.removed(), torch.enable_grad():
                return stay_apart(self.model, losses, (args, kwargs), samples.n, samples.cu_seqlens, shown)
        except (AttributionError, torch.OutOfMemoryError):
            raise
        except Exception:
            return False  # a forward that differentiates, say, for which nothing was kept
        finally:
            start.restore()

    def _shared(
        self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Samples, start: Start
    ) -> set[str]:
        """Return the layers whose output is the same whatever the samples are; raise AttributionError for others."""
        signatures = set(current.several.values())
        modules = {s[0]: self.capture.uses[s[0]].module for s in signatures}

        def forward(batch: Any) -> None:
            with torch.no_grad():
                self.model.forward(*batch[0], **batch[1])
            start.restore()

        def outputs(batch: Any) -> dict[str, list[Tensor]]:
            return outputs_of(forward, modules, signatures, samples.n, batch)

        with self.capture.removed():
            same = constant(outputs, (args, kwargs), samples.n, samples.cu_seqlens, ())
        if same != modules.keys():
            raise mixed(current)
        return {plan.name for name in same for plan in self.capture.uses[name].plans}

    def _audit(self, current: TrainingPass, losses: Tensor) -> None:
        """Raise AttributionError where weighted sums of rows are not what plain autograd gives."""
        store = current.recorder.finish(self.layers, losses.detach())
        generator = torch.Generator().manual_seed(current.place)
        r = (torch.rand(len(losses), generator=generator, device="cpu") + 0.5).to(losses)
        r = r * (1 - 2 * (torch.arange(len(losses), device="cpu") % 2)).to(losses)
        names, dtype = list(self.parameters), coarsest(current.dtypes | {losses.dtype})
        gradients = torch.autograd.grad(losses, current.parameters, r, retain_graph=True, allow_unused=True)
        sketches = {n: sketched(self.layers[n], g) for n, g in zip(names, gradients, strict=True) if g is not None}
        errors = Expected(r, sketches, losses.detach()).errors(store, self.layers, dtype)
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
        if wrong:
            raise wrong_layers(wrong)


def look_of(args: Any, kwargs: Any, n: int) -> Any:
    """Return by what the inputs of forwards are alike before they run: how their sizes go with the samples."""
    sizes = [
        tuple("n" if s == n else "one" if s == 1 else "multiple" if s % n == 0 else "other" for s in t.shape)
        for t in tensors((args, kwargs))
    ]
    return n == 1, tuple(sizes)


def modes_of(model: nn.Module) -> Any:
    """Return what a forward runs with that no op of it shows: modes of modules, and autocast."""
    casts = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return hash(tuple(m.training for m in model.modules())), casts
