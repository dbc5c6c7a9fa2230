"""One forward of a batch and its backwards: what each call of a module or an op keeps, and gives.

Each call hangs its own `Call` on the autograd graph, so modules called twice, activation checkpointing and nested calls
are right by construction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dropinf_kernels.op import no_autograd

from .colours import SEVERAL, Colours, Key
from .modules import Use
from .recorders import Recorder, Unweighted
from .samples import Layout, Rows, Samples, Untied, learn
from .taps import FAILURES, Signature, any_true, inserted, listen, reason, replaced, unforeseen


@dataclass
class Pass:
    """One forward of one batch, and its backwards.

    ``layouts`` are known from earlier batches of the same look, by gradient; ``proven`` says of which gradients the
    layout is known at all, ``blank`` which were zero so far.
    """

    recorder: Recorder
    samples: Samples
    anchor: Tensor
    layouts: dict[Key, Layout] = field(default_factory=dict)
    proven: set[Key] = field(default_factory=set)
    blank: set[Key] = field(default_factory=set)
    calls: set[Signature] = field(default_factory=set)
    several: dict[Key, Signature] = field(default_factory=dict)  # whose rows belong to several samples
    unproven: set[Key] = field(default_factory=set)
    open: set[Key] = field(default_factory=set)  # whose layout holds for this batch alone
    failed: dict[str, str] = field(default_factory=dict)  # modules that are not what their class says, and why
    uses: dict[str, Use] = field(default_factory=dict)  # by name, those that were called
    emitted: Counter[str] = field(default_factory=Counter)
    dtypes: set[torch.dtype] = field(default_factory=set)  # of outputs, and those that the forward casts to
    shapes: dict[Key, torch.Size] = field(default_factory=dict)  # of gradients
    called: Counter[str] = field(default_factory=Counter)
    modes: int = 0  # that a forward begins in
    unforeseen: str | None = None  # why it is to be audited, whatever it looks like
    place: int = 0  # of the batch in its call
    colours: Colours | None = None  # of its rows, where these were looked at
    weights: Tensor | None = None  # of the losses of the last backward
    sums: dict[str, Tensor] = field(default_factory=dict)  # the gradients of some parameters in it, by layer
    replaced: str | None = None  # a function of torch that is not torch's own
    running: bool = False  # a backward of ours runs
    chaining: bool = False  # one through what is computed from parameters alone
    _take: Callable[[Call, Key, Tensor], None] | None = None
    trusting: bool = True  # rows are taken to be of the samples that they have been of in all batches
    mistaken: bool = False  # and were not
    chains: list[Tensor] = field(default_factory=list)  # at each use, what autograd Functions compute from parameters
    _confirmations: list[Tensor] = field(default_factory=list)
    _surprises: list[Tensor] = field(default_factory=list)
    _owners: dict[Any, Tensor] = field(default_factory=dict)  # of rows, by layout and shape
    _waiting: list[tuple[Node, int, Call]] = field(default_factory=list)  # which listen as the first backward begins

    @no_autograd
    def save(self, use: Use, x: Tensor, out: Tensor) -> Tensor | None:
        """Return what one call of a module keeps for backward."""
        try:
            self.replaced = self.replaced or replaced()
            if self.replaced and use.is_plain:
                raise ValueError(f"{self.replaced}, which it calls, is not torch's own")
            use.check()
            saved = self.recorder.save(use, x, out)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            self.failed[use.name] = reason(error)
            return None
        return saved

    @no_autograd
    def emit(self, call: Call, g: Tensor) -> None:
        """Take what one call of a module gives in backward; nothing where the loss itself differentiates."""
        if not self.running:
            return
        name = call.use.name
        if self.chaining:
            self.failed[name] = "what it computes depends on parameters alone"
            return
        key = self._key(call)
        self.emitted[name] += 1
        self.shapes[key] = g.shape
        try:
            (self._take or self._record)(call, key, g)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            self.failed[name] = reason(error)

    def _key(self, call: Call) -> Key:
        return call.use.name, self.emitted[call.use.name]

    def listen_later(self, node: Node, output: int, call: Call) -> None:
        """Have a call take the gradient of a node's output, behind all hooks that the forward puts on the node."""
        self._waiting.append((node, output, call))

    def backward(self, losses: Tensor) -> None:
        """Backpropagate all losses into the recorder, by the layouts that are known."""
        self._run(losses, torch.ones_like(losses), None)

    def coloured_backward(self, losses: Tensor, *, follow: bool) -> None:
        """Backpropagate all losses into the recorder, by layouts that are found on the way.

        ``follow``: layouts follow the data, so rows are taken from the last pass, and scaled back.
        """
        together = follow and torch.float16 not in self.dtypes  # whose powers would cost digits
        colours = self.colours = Colours(self.samples.n, self.dtypes | {losses.dtype}, seed=self.place)
        before = self.layouts, self.proven
        self.layouts, self.proven, self.blank = {}, set(), set()
        self._run(
            losses, torch.ones_like(losses), lambda call, key, g: colours.sign(key, call.use.rows(g)), retain=True
        )
        for digit in range(colours.passes):
            last = digit == colours.passes - 1
            weights = colours.weights(losses, digit)
            into = Unweighted(self.recorder, 1 / weights) if last and together else None
            self._run(losses, weights, partial(self._read, colours, digit, before, into), retain=into is None)
        colours.rows.clear()
        if not together and not self.several and not self.failed:
            self._run(losses, torch.ones_like(losses), None)
        self._surprises.clear()  # of rows that were looked at

    @property
    def questions(self) -> list[Tensor]:
        """Truth values that nobody waited for: whether what was taken for known is otherwise."""
        doubts = (doubt for use in self.uses.values() for doubt in use.doubts)
        return [*doubts, *self._surprises, *(~found for found in self._confirmations)]

    def settle(self) -> None:
        """Find the norms that did something else than they did before, and gradients where none was."""
        wrong = [name for name, use in self.uses.items() if any_true(use.doubts)]
        self.failed |= dict.fromkeys(wrong, "it does not scale what it normalises by its weight")
        if any_true(self._surprises):
            self.unproven |= self.blank
        self.mistaken = any_true(~found for found in self._confirmations)

    def add_sum(self, name: str, g: Tensor) -> None:
        """Take the gradient of a layer's parameter, from all of its uses in a backward."""
        before = self.sums.get(name)  # a reentrant checkpoint finishes a gradient each
        self.sums[name] = g if before is None else before + g

    @property
    def summed(self) -> set[str]:
        """The layers whose rows are compared with the gradients of their parameters."""
        return {name for use in self.uses.values() for name in use.summed}

    def rows_of(self, losses: Tensor, weights: Tensor, name: str) -> list[Tensor]:
        """Return a module's output gradients of the weighted losses, by call, as rows; the graph is kept."""
        found: list[Tensor] = []

        def take(call: Call, _key: Key, g: Tensor) -> None:
            if call.use.name == name:
                found.append(call.use.rows(g))

        self._run(losses, weights, take, retain=True)
        return found

    @property
    def emitted_keys(self) -> list[Key]:
        """The gradients of the last backward."""
        return [(name, i) for name, count in self.emitted.items() for i in range(count)]

    def is_loose(self, key: Key, before: Mapping[Key, Layout], proven: set[Key]) -> bool:
        """Return whether the layout of a gradient follows the data: irregular, or another than proven before."""
        now = self.layouts.get(key)
        if isinstance(now, Rows):
            return True
        return key in self.proven and key in proven and before.get(key) != now

    def _run(
        self, losses: Tensor, weights: Tensor, take: Callable[[Call, Key, Tensor], None] | None, *, retain: bool = False
    ) -> None:
        self._take, self.running, self.weights = take, True, weights
        self.emitted.clear()
        self.sums.clear()
        for waiting in self._waiting:
            listen(*waiting)
        self._waiting.clear()
        try:
            self._differentiate(losses, weights, retain=retain)
        finally:
            self.running = False

    def _differentiate(self, losses: Tensor, weights: Tensor, *, retain: bool) -> None:
        losses.backward(weights, retain_graph=retain)

    def _record(self, call: Call, key: Key, g: Tensor) -> None:
        if key in self.blank:
            self._surprises.append((g != 0).any())
        elif key not in self.proven and self.samples.n > 1 and key not in self.open:
            self.unproven.add(key)
        call.record(self.recorder, g, self.tied(key))

    def _read(
        self,
        colours: Colours,
        digit: int,
        before: tuple[Mapping[Key, Layout], set[Key]],
        into: Recorder | None,
        call: Call,
        key: Key,
        g: Tensor,
    ) -> None:
        """Take one digit of the rows' samples. ``before``: the layouts that were proven; ``into`` takes the rows."""
        rows, some = call.use.rows(g), True
        found = self._known(colours, before, key, rows)
        if found is None:
            colours.read(key, rows, digit)
        if digit < colours.passes - 1:
            return
        if found is None:
            sample = colours.samples(key)
            if bool((sample == SEVERAL).any()):
                self.several[key] = call.signature
                return
            found, some = self._layout(key, sample, *before), bool((sample >= 0).any())
        layout, proven = found
        if layout is not None:
            self.layouts[key] = layout
        (self.proven if proven else self.open if some else self.blank).add(key)
        if into is not None:
            call.record(into, g, self.tied(key))

    def _known(
        self, colours: Colours, before: tuple[Mapping[Key, Layout], set[Key]], key: Key, rows: Tensor
    ) -> tuple[Layout | None, bool] | None:
        """Return the layout that rows have, and whether it is proven, where they have one that is known already: that
        of before, or one that other rows of this backward follow. None: they are to be read."""
        lead, (layouts, proven) = rows.shape[:-1], before
        if key in proven:
            layout = layouts.get(key)
            place = layout, lead, rows.device
            try:
                if place not in self._owners:
                    self._owners[place] = self.tied(key, layouts).owners(lead, rows.device).flatten()
            except Untied:
                return None
            return (layout, True) if self._confirmed(colours, key, rows, self._owners[place]) else None
        followed = (x for x in reversed(self.layouts.values()) if isinstance(x, Rows) and x.sample.shape == lead)
        alike = next(followed, None) if colours.passes == 1 else None
        if alike is not None:  # a guess, which is asked at once
            found = colours.confirm(key, rows, alike.owner, some=True)
            if found is not None and bool(found):
                colours.take(key, alike.owner)
                return alike, False
        return None

    def _confirmed(self, colours: Colours, key: Key, rows: Tensor, owner: Tensor) -> bool:
        """Return whether rows are of the samples that they have been of in all batches; nobody waits for the answer."""
        found = colours.confirm(key, rows, owner) if self.trusting else None
        if found is None:
            return False
        self._confirmations.append(found)
        colours.take(key, owner)
        return True

    def _layout(
        self, key: Key, sample: Tensor, before: Mapping[Key, Layout], proven: set[Key]
    ) -> tuple[Layout | None, bool]:
        """Return the layout of rows [*lead] of known samples, and whether it is proven: mostly what it was before."""
        if key in proven and self.tied(key, before).agree(sample):
            return before.get(key), True
        return learn(sample, self.samples)

    def tied(self, key: Key, layouts: Mapping[Key, Layout] | None = None) -> Samples:
        """Return which rows of a gradient are whose, by its layout."""
        layout = (self.layouts if layouts is None else layouts).get(key)
        return self.samples if layout is None else Samples(self.samples.n, None, layout)


@dataclass
class Call:
    """One call of a module: what it keeps of its input, until its output's gradient comes."""

    current: Pass
    use: Use
    saved: Tensor | None
    version: int | None
    signature: Signature
    number: int = field(default=0, kw_only=True)  # among the module's calls in this forward

    def __call__(self, g: Tensor) -> None:
        self.current.emit(self, g)

    def record(self, into: Recorder, g: Tensor, samples: Samples) -> None:
        """Hand the gradient to a recorder, with what was saved."""
        if self.saved is not None and self.version is not None and self.saved._version != self.version:
            raise RuntimeError(
                "its input was modified in place after the layer read it; use an out-of-place operation "
                "(inplace=False, x = x + y) after this layer"
            )
        into.emit(self.use, self.saved, g, samples.bound(self.use.rows(g).shape[:-1]))


def tap(current: Pass, call: Call, out: Tensor, *, new: bool = False) -> Tensor:
    """Have ``call`` take the gradient of an output. Return what takes the output's place; ``new``: not the output."""
    current.calls.add(call.signature)
    current.dtypes.add(out.dtype)
    current.uses[call.use.name] = call.use
    current.unforeseen = current.unforeseen or unforeseen(current.modes)
    call.number = current.called[call.use.name]
    current.called[call.use.name] += 1
    # Modified in place, a view loses its node to a new history; any other output keeps it.
    if out.grad_fn is None or new or out._is_view():
        return inserted(out, current.anchor, call)
    if current.running:  # as a checkpoint's forward does
        listen(out.grad_fn, out.output_nr, call)
    else:
        current.listen_later(out.grad_fn, out.output_nr, call)
    return out
