"""One forward of a training step: its user's own backward gives the rows, by layouts that were proven before.

The proof runs on what the model puts out, as no loss is known: with weights that are powers of two on the samples'
outputs, each row of a gradient names its sample, and random sums of rows are compared with plain autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.audit import TOLERANCE, Expected, coarsest, sketched
from ..capture.colours import Key
from ..capture.hooks import Capture
from ..capture.layer import Layer
from ..capture.passes import Pass
from ..capture.preserved import Attributes, Start
from ..capture.recorders import Compression
from ..capture.samples import Layout, Samples
from ..capture.shared import constant, outputs_of
from ..capture.taps import listen
from ..workload import tensors
from .checks import check_failed, check_layouts, mixed, of_samples, wrong_layers

_ATTEMPTS = 8  # of a proof: each finds at least one more call whose output all samples share


@dataclass
class TrainingPass(Pass):
    """A pass whose backward is its user's own. ``parameters``: what is trained of what is tracked."""

    parameters: Sequence[Tensor] = ()

    def _differentiate(self, losses: Tensor, weights: Tensor, *, retain: bool) -> None:  # noqa: ARG002
        # No gradient is added to a parameter's own, and no hook of DistributedDataParallel's runs.
        torch.autograd.grad(losses, self.parameters, weights, retain_graph=True, allow_unused=True)

    def open_to_user(self, recorder: Compression) -> None:
        """Have what its user backpropagates from now on go to a recorder."""
        self.recorder, self._take, self.running, self.weights = recorder, None, True, None
        self.emitted.clear()
        for node, output, call in self._waiting:
            listen(node, output, call)
        self._waiting.clear()


@dataclass
class Proven:
    """What was proven of forwards that look alike: whose rows are whose, and the calls that were seen."""

    layouts: dict[Key, Layout] = field(default_factory=dict)
    proven: set[Key] = field(default_factory=set)
    blank: set[Key] = field(default_factory=set)
    calls: set[Any] = field(default_factory=set)

    def lend(self, current: Pass) -> None:
        """Have a pass know it."""
        current.layouts, current.proven, current.blank = self.layouts, self.proven, self.blank

    def merge(self, other: Proven) -> None:
        """Add what another proof found."""
        self.layouts |= other.layouts
        self.proven |= other.proven
        self.blank = (self.blank | other.blank) - self.proven
        self.calls |= other.calls


class Prover:
    """Finds and proves whose rows are whose, in a forward of its own beside the user's.

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

    def prove(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Samples, place: int) -> Proven:
        """Return what is proven of a forward with these inputs.

        Raises:
            AttributionError: samples meet in a layer, or its rows are not what plain autograd gives.
        """
        attributes = Attributes(self.model)
        start = Start(attributes, (args, kwargs), copied=True)
        try:
            for _ in range(_ATTEMPTS):
                current = self.new_pass(samples)
                current.place = place
                with torch.enable_grad(), self.capture.running(current):
                    out = self.model.forward(*args, **kwargs)
                found = self._look(current, out)
                start.restore()
                if found is not None:
                    return found
                self._share(current, args, kwargs, samples, start)
        finally:
            start.restore()
        raise mixed(current)

    def look(self, current: TrainingPass, out: Any) -> Proven:
        """Return what is proven of the forward that its user ran.

        Raises AttributionError as `prove`, and where a layer's output is all samples': it was not expanded.
        """
        found = self._look(current, out)
        if found is None:
            raise mixed(current)
        return found

    def _look(self, current: TrainingPass, out: Any) -> Proven | None:
        """Return what is proven of a forward, None where rows belong to several samples."""
        check_failed(current)
        losses = of_samples(out, current.samples)
        if self.mixing or current.samples.n == 1:
            current.backward(losses)
            current.proven = set(current.emitted_keys)
        else:
            current.coloured_backward(losses, follow=False)
        check_failed(current)
        if current.several:
            return None
        check_layouts(current)
        if not self.mixing:  # else a sample's weight is in others' rows too
            self._audit(current, losses)
        return Proven(dict(current.layouts), set(current.proven), set(current.blank), set(current.calls))

    def _share(
        self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], samples: Samples, start: Start
    ) -> None:
        """Have the outputs that all samples share be one for each from now on; raise AttributionError for others."""
        signatures = set(current.several.values()) - self.capture.shared
        modules = {s[0]: self.capture.uses[s[0]].module for s in signatures}

        def forward(batch: Any) -> None:
            with torch.no_grad():
                self.model.forward(*batch[0], **batch[1])
            start.restore()

        if samples.cu_seqlens is not None:
            raise mixed(current)
        with self.capture.removed():
            same = constant(
                lambda batch: outputs_of(forward, modules, signatures, samples.n, batch),
                (args, kwargs),
                samples.n,
                None,
                (),
            )
        if not same:
            raise mixed(current)
        self.capture.shared |= {s for s in signatures if s[0] in same}

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


def look_of(model: nn.Module, args: Any, kwargs: Any, n: int) -> Any:
    """Return by what forwards are alike before they run: how their inputs' sizes go with the samples."""
    sizes = [
        tuple("n" if s == n else "one" if s == 1 else "multiple" if s % n == 0 else "other" for s in t.shape)
        for t in tensors((args, kwargs))
    ]
    return n == 1, model.training, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), tuple(sizes)
