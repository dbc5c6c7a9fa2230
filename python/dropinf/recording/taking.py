"""What a recording does at each forward, backward and step of its user's loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..capture.audit import coarsest, is_due
from ..capture.hooks import Capture
from ..capture.ladder import AttributionError
from ..capture.layer import Layer
from ..capture.recorders import Compression
from ..capture.samples import Samples
from ..capture.taps import any_true
from ..capture.targets import Target
from .balance import Balance
from .checks import check_failed, in_scaler
from .forward import Proven, Prover, TrainingPass, look_of
from .gathered import Gathered
from .optimizers import UPDATES, settings_of
from .run import SEGMENT, Run
from .steps import Step


@dataclass
class Named:
    """The samples of one forward, and what is known of them."""

    ids: list[str]
    cu_seqlens: Tensor | None
    share: Sequence[float] | Tensor | float | None
    labels: Sequence[float] | Tensor | float
    current: TrainingPass | None = None
    losses: Tensor | None = None
    drawn: Tensor | None = None

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.ids)


class World(NamedTuple):
    """This process among those that train a model together."""

    rank: int
    ranks: int
    group: Any


@dataclass(frozen=True)
class Loop:
    """What trains: the model, its optimizer and scaler, on one of several ranks."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    world: World

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of a tensor over the ranks."""
        if self.world.ranks == 1:
            return x
        x = x.clone()
        torch.distributed.all_reduce(x, group=self.world.group)
        return x / self.world.ranks


class Taking:
    """Hooks on a model and its optimizer, for the time of a recording."""

    def __init__(
        self,
        run: Run,
        loop: Loop,
        capture: Capture,
        targets: Mapping[str, Target],
        layers: Mapping[str, Layer],
        mixing: bool,
    ) -> None:
        self.run, self.loop, self.capture, self.targets, self.layers = run, loop, capture, targets, layers
        self.model, self.optimizer = loop.model, loop.optimizer
        self.prover = Prover(self.model, capture, layers, {n: t.tensor for n, t in targets.items()}, mixing)
        self.gathered = Gathered(targets, layers)
        self.widths = run.columns.widths
        self.balance = Balance(layers, self.widths)
        self._named: Named | None = None  # whose forward is to come
        self._pending: list[Named] = []  # forwards since the last step
        self._proven: dict[Any, Proven] = {}
        self._owed: str | None = None  # why the next forward must be proven: rows were taken to stand as usual
        self._forwards = 0
        self._look: Any = None
        self._handles: list[Any] = []
        self._counts = self._counts_so_far()
        self._drawn_at = run.drawn_at(len(run))

    def __deepcopy__(self, _memo: Any) -> Taking:
        return self  # of a model that is copied while it is recorded: the hooks do nothing for the copy

    def _counts_so_far(self) -> list[int]:
        """Return by how many steps each layer was changed before."""
        found = []
        for target in self.targets.values():
            state = self.optimizer.state.get(target.tensor, {})
            momentum = state.get("momentum_buffer") is not None
            found.append(int(state.get("step", 1 if momentum else 0)))
        return found

    def begin(self) -> None:
        """Hook the model and the optimizer."""
        self._exits = contextlib.ExitStack()
        self._exits.enter_context(self.capture.attached())
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after_forward),
            self.optimizer.register_step_pre_hook(self._before_step),
        ]

    def end(self) -> None:
        """Take the hooks off, if they are on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.gathered.remove()
        self._exits.close()

    def check_settled(self) -> None:
        """Raise AttributionError where the last step's rows were not proven."""
        if self._owed is not None:
            raise AttributionError(
                f"run: the rows of its last step are not proven ({self._owed}); record one step more"
            )

    # What the user says of samples.

    def name(
        self,
        ids: list[str],
        cu_seqlens: Tensor | None,
        share: Sequence[float] | Tensor | float | None,
        labels: Sequence[float] | Tensor | float,
    ) -> None:
        if not ids:
            raise ValueError("ids: it is empty; name each sample of the next forward")
        if cu_seqlens is not None and len(cu_seqlens) != len(ids) + 1:
            raise ValueError(
                f"cu_seqlens has {len(cu_seqlens)} bounds; of {len(ids)} samples it must have {len(ids) + 1}"
            )
        for what, value in (("share", share), ("labels", labels)):
            if isinstance(value, Tensor | Sequence) and len(value) != len(ids):
                raise ValueError(
                    f"{what} has {len(value)} numbers; it must have one for each of the {len(ids)} samples"
                )
        self._named = Named(ids, cu_seqlens, share, labels)

    def note_losses(self, losses: Tensor) -> None:
        last = self._last("losses")
        if losses.shape != (last.n,):
            raise ValueError(f"losses has shape {list(losses.shape)}; it must be [{last.n}], one for each sample")
        last.losses = losses.detach().float().cpu()

    def draw(self, loss: Tensor) -> None:
        last = self._last("drawn")
        assert last.current is not None
        current = last.current
        kept, current.recorder = current.recorder, Compression(self.layers)
        current.emitted.clear()
        try:
            torch.autograd.grad(loss, list(current.parameters), retain_graph=True, allow_unused=True)
            last.drawn = self._rows(last)
        finally:
            current.recorder = kept
            current.emitted.clear()

    def _last(self, what: str) -> Named:
        if not self._pending:
            raise RuntimeError(f"run.{what}: no forward was recorded since the last step; call it behind the forward")
        return self._pending[-1]

    # The forward.

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self.model:
            return
        self.capture._pass = None
        named, self._named = (
            self._named if torch.is_grad_enabled() else None,
            None if torch.is_grad_enabled() else self._named,
        )
        if named is None:
            return
        samples = Samples(named.n, named.cu_seqlens)
        self._forwards += 1
        self._look = look_of(model, args, kwargs, named.n)
        known = self._proven.get(self._look)
        if known is None or self._owed is not None or known.blank or is_due(self._forwards):
            found = self.prover.prove(args, kwargs, samples, self._forwards)
            self._settle(known, found)
            if known is None:
                self._proven[self._look] = found
            else:
                known.merge(found)
        current = self.prover.new_pass(samples)
        self._proven[self._look].lend(current)
        named.current = current
        self.capture.begin(current)
        current.running = True
        self._pending.append(named)

    def _settle(self, known: Proven | None, found: Proven) -> None:
        """Take rows as proven that were taken to stand as samples do, where a proof finds them there."""
        if self._owed is None:
            return
        wrong = sorted(name for (name, _), layout in found.layouts.items() if layout is not None)
        if wrong and known is not None and any(key not in known.layouts for key in found.layouts):
            raise AttributionError(
                f"layer {wrong[0]}: the samples of its rows do not stand as they were taken to ({self._owed}); leave "
                "it out with layers="
            )
        self._owed = None

    def _after_forward(self, model: nn.Module, _args: Any, out: Any) -> None:
        if model is not self.model or not self._pending or self.capture._pass is not self._pending[-1].current:
            return
        current = self._pending[-1].current
        assert current is not None
        check_failed(current)
        known = self._proven[self._look]
        if not current.calls <= known.calls:
            current.running = False
            known.merge(self.prover.look(current, out))
            known.lend(current)
            current.open_to_user(Compression(self.layers))

    # The step.

    def _rows(self, named: Named) -> Tensor:
        """Return the rows [n, K] of a forward, as its backward gave them."""
        assert named.current is not None
        current = named.current
        check_failed(current)
        zeros = torch.zeros(named.n, device=next(iter(self.targets.values())).tensor.device)
        found = current.recorder.finish(self.layers, zeros)
        return torch.cat([found[name].flatten(1) for name in self.layers], 1)

    def _before_step(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.capture._pass = None
        given = [named for named in self._pending if named.current is not None and named.current.emitted]
        if not given:
            why = "no forward was named by run.samples(ids)" if not self._pending else "nothing was backpropagated"
            raise RuntimeError(
                f"run: the optimizer makes a step, and since the last one {why}; call run.samples(ids) before each "
                "forward, loss.backward() behind it, and optimizer.step() once"
            )
        scale = self._scale()
        rows, before = [self._rows(named) for named in given], self._joined(self.gathered.before)
        dtypes = {d for named in given if named.current is not None for d in named.current.dtypes}
        begin = self.balance.begin(rows, before, coarsest(dtypes | {before.dtype}))
        rows, given = rows[begin:], given[begin:]
        after, fused = self._joined(self.gathered.after), getattr(self.optimizer, "grad_scale", None)
        clipped = self.balance.clipped(self.loop.mean(before), after, scale if fused is None else 1.0)
        if scale != 1:
            rows = [x / scale for x in rows]
            for named in given:
                named.drawn = None if named.drawn is None else named.drawn / scale
        gradient = after if fused is None else after / float(fused)  # which the optimizer divides by itself
        self._owe(given)
        self._append(given, [x / self.loop.world.ranks for x in rows], gradient, clipped)
        self._pending.clear()
        self.gathered.clear()

    def _joined(self, of: Any) -> Tensor:
        parts = []
        for (name, target), width in zip(self.targets.items(), self.widths, strict=True):
            found = of(name)
            parts.append(torch.zeros(width, device=target.tensor.device) if found is None else found)
        return torch.cat(parts)

    def _scale(self) -> float:
        if self.loop.scaler is not None:
            return float(self.loop.scaler.get_scale())
        if in_scaler():
            raise ValueError("scaler: a GradScaler makes the step; pass it: dropinf.record(..., scaler=scaler)")
        return 1.0

    def _owe(self, given: list[Named]) -> None:
        """Note where rows were taken to stand as samples do, and no proof has seen them."""
        for named in given:
            assert named.current is not None
            if named.current.unproven:
                self._owed = f"layer {next(iter(named.current.unproven))[0]} got a gradient that no proof saw"
            elif named.current._surprises and any_true(named.current._surprises):
                self._owed = "a layer got its first gradient"

    def _append(self, given: list[Named], rows: list[Tensor], gradient: Tensor, clipped: float) -> None:
        """Write the step."""
        changed = [target.tensor.grad is not None for target in self.targets.values()]
        self._counts = [count + here for count, here in zip(self._counts, changed, strict=True)]
        groups = [settings_of(self.run.kind, self.optimizer, group) for group in self.optimizer.param_groups]
        file = self.run._files[self.loop.world.rank]
        n = sum(named.n for named in given) * self.loop.world.ranks
        decays = any(g.get("weight_decay", 0.0) and not g.get("decoupled", 0.0) for g in groups)
        losses = [named.losses for named in given]
        shares = [_each(named.share, named, 1 / n) / _each(named.labels, named, 1.0) for named in given]
        drawn = [(named.drawn, share) for named, share in zip(given, shares, strict=True) if named.drawn is not None]
        part = float(sum(share.sum() for _, share in drawn) / sum(share.sum() for share in shares))
        self._drawn_at = len(file) if drawn else self._drawn_at
        file.append(
            Step(
                torch.cat(rows),
                [x for named in given for x in named.ids],
                gradient,
                clipped,
                groups,
                [count if here else 0 for count, here in zip(self._counts, changed, strict=True)],
                share=torch.cat(shares),
                losses=None if any(x is None for x in losses) else torch.cat(losses),  # type: ignore[arg-type]
                drawn=torch.cat([x for x, _ in drawn]) / self.loop.world.ranks if drawn else None,
                drawn_share=torch.cat([share for _, share in drawn]) * part if drawn else None,
                drawn_at=self._drawn_at,
                state=self._state() if self.run.kind is not None and len(file) % SEGMENT == 0 else (),
                weights=self._weights() if decays and self.run.kind is not None else None,
            )
        )

    def _state(self) -> list[Tensor]:
        assert self.run.kind is not None
        found = []
        for state in UPDATES[self.run.kind].names:

            def of(name: str, state: str = state) -> Tensor | None:
                held = self.optimizer.state.get(self.targets[name].tensor, {}).get(state)
                return None if held is None else self.gathered.on_mask(name, held)

            found.append(self._joined(of))
        return found

    def _weights(self) -> Tensor:
        return self._joined(lambda name: self.gathered.on_mask(name, self.targets[name].tensor))


def _each(value: Any, named: Named, usual: float) -> Tensor:
    """Return one number for each sample [n]."""
    value = usual if value is None else value
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").expand(named.n)
