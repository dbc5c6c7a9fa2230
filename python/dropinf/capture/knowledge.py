"""What is known of a model from batch to batch: how each gradient is found, and what was proven of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from ..workload import CuSeqlens, LossFn, samples_of, tensors
from . import sharded
from .audit import Audited, When
from .colours import Key
from .exact import ExactGradients
from .hooks import Capture
from .kinds import USES, module_kind
from .ladder import RUNGS, Ladder, Route
from .layer import Layer, clean_name
from .modules import Use
from .samples import Layout
from .taps import Signature, overrides
from .targets import Target


@dataclass
class Plan:
    """What is known of batches that look alike: where gradients have their samples, and what was audited.

    ``follow``: each batch's layouts are found anew, as some follow the data or (``unclear``) samples may meet.
    ``movements``: of forwards whose layouts these are. ``paths``: movements that were audited. ``apart``: movements,
    sizes and shapes of batches whose samples stay apart whatever the data.
    """

    layouts: dict[Key, Layout] = field(default_factory=dict)
    proven: set[Key] = field(default_factory=set)
    blank: set[Key] = field(default_factory=set)
    loose: set[Key] = field(default_factory=set)  # whose layout follows the data
    movements: set[int] = field(default_factory=set)
    paths: set[int] = field(default_factory=set)
    apart: set[Any] = field(default_factory=set)
    gradients: set[frozenset[str]] = field(default_factory=set)
    compared: set[str] = field(default_factory=set)  # layers that had a gradient in an audit
    follow: bool = False
    unclear: bool = False
    trusted: int = 0  # batches whose rows were given out since the last audit


class Knowledge:
    """What is known of a model from batch to batch.

    ``targets``: the tracked parameters by layer name. ``mixing``: a loss may depend on other samples of its batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        cu_seqlens: CuSeqlens | None,
        targets: Mapping[str, Target],
        *,
        audit: When = "auto",
        route: Route | None = None,
        mixing: bool = False,
    ) -> None:
        self.model, self.loss_fn, self.cu_seqlens, self.targets = model, loss_fn, cu_seqlens, targets
        if audit not in get_args(When):
            raise ValueError(f"audit must be one of {', '.join(get_args(When))}, got {audit!r}")
        self.audit, self.mixing = audit, mixing
        self.shapes = {name: target.shape for name, target in targets.items()}
        exact = {n: "no hook covers their kind of module" for n, t in targets.items() if t.route == "exact"}
        self.ladder = Ladder(exact, [n for n in targets if n not in exact], route)
        for name, target in targets.items():
            if overrides(type(target.tensor)):
                self.ladder.lower(name, "its class overrides functions of torch", RUNGS[-1])
        sharded.check_whole((name, targets[name].tensor) for name in sorted(self.exact_names))
        self.audits: list[Audited] = []
        self.plans: dict[Any, Plan] = {}
        self.shared: set[Signature] = set()  # calls whose output all samples share
        self.replaced: str | None = None  # a function of torch that was found not to be torch's own
        self.constant: set[str] = set()  # ops of parameters alone whose rows look like samples', and are not
        self.open_layers: set[str] = set()  # whose samples are not known to stay apart
        self.follows: set[str] = set()  # modules whose layout follows the data
        self.writes_batches = False  # the loss changes its batch in place
        self.own_flags = False  # the model runs with its user's requires_grad: frozen, it does something else
        self._exact_gradients: ExactGradients | None = None  # of the last batch that had some
        self.others: set[int] = set()  # places of tensors in a batch that have no sample dimension
        self._leaf: tuple[int, int] | Literal["list"] | None = None  # the tensor and dimension that has the samples
        self._warned: set[str] = set()
        self._state: Any = None  # of the model in the call before

    @property
    def exact_names(self) -> set[str]:
        """The layers that no hook covers."""
        return self.ladder.exact

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget how gradients were found inside where something is raised: it may be what made a layer slow."""
        rungs, reasons = dict(self.ladder.rungs), dict(self.ladder.reasons)
        shared, follows, flags = set(self.shared), set(self.follows), self.own_flags
        try:
            yield
        except BaseException:
            self.ladder.rungs, self.ladder.reasons = rungs, reasons
            self.shared, self.follows, self.own_flags = shared, follows, flags
            raise

    @contextmanager
    def capturing(self, layers: Mapping[str, Layer]) -> Iterator[Capture]:
        """Have hooks on the modules inside."""
        tracked = {id(self.targets[n].tensor): layers[n] for n in self.ladder.on("hook")}
        capture = Capture(self.model, uses_of(self.model, tracked))
        capture.shared = self.shared
        with capture.attached():
            yield capture

    def size_hint(self, batch: Any) -> int | None:
        """Return the number of a batch's samples by the size of its tensors, or None."""
        leaves = tensors(batch)
        if self._leaf == "list":
            return len(batch) if isinstance(batch, list) else None  # of one sample too, which alone looks like another
        if self._leaf is not None:
            i, axis = self._leaf
            if i < len(leaves) and leaves[i].ndim > axis:
                return leaves[i].shape[axis]
        return next((len(t) for t in leaves if t.ndim), None)

    def learn_leaves(self, batch: Any, n: int) -> None:
        """Remember which tensors of a batch of ``n`` samples do not have them in their leading dimension."""
        self.others |= {i for i, t in enumerate(tensors(batch)) if not t.ndim or len(t) != n}

    def learn_size(self, batch: Any, n: int) -> None:
        """Remember where a batch of ``n`` samples shows their number."""
        self._leaf = "list" if samples_of(batch) == n else None
        for axis in (1, 0):
            for i, t in reversed(list(enumerate(tensors(batch)))):
                if self._leaf != "list" and t.ndim > axis and t.shape[axis] == n:
                    self._leaf = i, axis

    def warn_slow(self, fast: float, slow: float) -> None:
        """Say once of each layer that it is slow, with what a batch took in seconds on both routes."""
        new = [n for n in self.ladder.rungs if n in self.exact_names and n not in self._warned]
        self._warned |= set(new)
        if not new or slow < 0.2 * fast:
            return
        reasons = {self.ladder.reasons[n] for n in new}
        named = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        warnings.warn(
            f"layers {named}: {'; '.join(sorted(reasons)[:3])}; their gradients take {slow:.2g} s a batch beside "
            f"{fast:.2g} s for all else. To avoid it, use each parameter in its own module's forward alone, or leave "
            "these layers out with layers=",
            stacklevel=8,
        )

    def warn_train_mode(self) -> None:
        random = [n for n, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
        if random and "" not in self._warned:
            self._warned.add("")
            warnings.warn(
                f"model: it is in train mode and {random[0] or 'it'} drops activations at random, so its gradients are "
                "noisy; call model.eval() for reproducible influence",
                stacklevel=5,
            )


def uses_of(model: nn.Module, tracked: Mapping[int, Layer]) -> dict[str, Use]:
    """Return the modules that hooks can capture, by name, with the plans of their weight and bias.

    ``tracked``: the plans by the ids of their parameters.
    """
    uses = {}
    for full_name, module in model.named_modules():
        kind = module_kind(module)
        if kind is None:
            continue
        # named_parameters, not attributes: reading a parametrized weight may update its buffers.
        own = {name: tracked.get(id(p)) for name, p in module.named_parameters(recurse=False)}
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None or bias is not None:
            name = clean_name(full_name) or type(module).__name__
            uses[name] = USES[kind](name, module, weight, bias)
    return uses
