"""Steps of a recording as they are written: rows, what the optimizer does with them, and what is known of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..capture.targets import Target
from .forward import TrainingPass
from .gathered import Gathered
from .optimizers import UPDATES, kind_of, settings_of
from .run import SEGMENT, Run
from .steps import Step
from .trajectory import Trajectory

_ROUNDED = 1e-2  # of the optimizer's state: gradients in half precision keep so much of it
_ROUNDED_HALF = 0.2  # of one that is in half precision itself, which loses small changes, in so many steps


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
    settled: bool = False  # its backward was over when another forward began

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


class StepWriter:
    """Writes a recording's steps, and sees that they are the optimizer's."""

    def __init__(self, run: Run, loop: Loop, targets: Mapping[str, Target], gathered: Gathered) -> None:
        self.run, self.loop, self.targets, self.gathered = run, loop, targets, gathered
        self.optimizer = loop.optimizer
        self._counts = self._counts_so_far()
        self._groups = [[*map(id, group["params"])] for group in self.optimizer.param_groups]
        self._momenta = self._momenta_now()
        self._drawn_at = run.drawn_at(len(run))
        self._trajectory: Trajectory | None = None

    def _momenta_now(self) -> list[bool]:
        return [bool(group.get("momentum")) for group in self.optimizer.param_groups]

    def _counts_so_far(self) -> list[int]:
        """Return by how many steps each layer was changed before."""
        found = []
        for target in self.targets.values():
            state = self.optimizer.state.get(target.tensor, {})
            momentum = state.get("momentum_buffer") is not None
            found.append(int(state.get("step", 1 if momentum else 0)))
        return found

    def check_optimizer(self) -> None:
        """Raise ValueError where the optimizer is not what it was when the recording began."""
        kind, why = kind_of(self.optimizer)
        if self.run.kind is not None and kind != self.run.kind:
            raise ValueError(f"optimizer: it was {self.run.kind} when the recording began, and now {why}")
        if [[*map(id, group["params"])] for group in self.optimizer.param_groups] != self._groups:
            raise ValueError(
                "optimizer: its parameter groups are others than when the recording began; end it, and begin another "
                "with a new folder"
            )
        if self._momenta_now() != self._momenta:
            raise ValueError("optimizer: it has momentum now, or no more; a recording takes either throughout")

    def append(self, given: list[Named], rows: list[Tensor], gradient: Tensor, clipped: float, norm: float) -> None:
        """Write the step. ``norm``: of all gradients before they were clipped; 0 where they were not."""
        changed = [target.tensor.grad is not None for target in self.targets.values()]
        self._counts = [count + here for count, here in zip(self._counts, changed, strict=True)]
        groups = [settings_of(self.run.kind, self.optimizer, group) for group in self.optimizer.param_groups]
        file = self.run._files[self.loop.world.rank]
        n = sum(named.n for named in given) * self.loop.world.ranks
        losses = [named.losses for named in given]
        shares = [_each(named.share, named, 1 / n) / _each(named.labels, named, 1.0) for named in given]
        drawn = [(named.drawn, share) for named, share in zip(given, shares, strict=True) if named.drawn is not None]
        part = float(sum(share.sum() for _, share in drawn) / sum(share.sum() for share in shares))
        self._drawn_at = len(file) if drawn else self._drawn_at
        state = self._state() if self.run.kind is not None and len(file) % SEGMENT == 0 else []
        self._check_state(state)
        weights = None if self.run.kind is None else self._weights()
        step = Step(
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
            state=state,
            weights=weights,
            norm=norm,
        )
        if weights is not None:
            self._follow(step, weights)
        file.append(step)

    def _follow(self, step: Step, weights: Tensor) -> None:
        """Compare the weights [K] with where the steps before should have led, and take this one."""
        if self._trajectory is None:
            exact = [torch.finfo(target.tensor.dtype).eps for target in self.targets.values()]
            self._trajectory = Trajectory(list(self.targets), self.run.columns.widths, exact, self._state())
            if len(self.run):
                last = self.run.step(len(self.run) - 1)
                assert last.weights is not None
                self._trajectory.resume(self.run.update(last), last, self.run.state(len(self.run) - 1))
        self._trajectory.check(weights)
        self._trajectory.follow(self.run.update(step), step, weights)

    def check_end(self) -> None:
        """Raise ValueError where the gradients that were recorded do not make the state that the optimizer has."""
        if self.run.kind is not None:
            self._check_state(self._state())
            if self._trajectory is not None:
                self._trajectory.check(self._weights())

    def _check_state(self, state: Sequence[Tensor]) -> None:
        has_none = self.run.kind == "sgd" and not any(self._momenta)
        if not state or has_none or not len(self.run) or self.loop.world.ranks > 1:
            return
        assert self.run.kind is not None
        exact = all(target.tensor.dtype.itemsize >= 4 for target in self.targets.values())
        for name, held, made in zip(UPDATES[self.run.kind].names, state, self.run.state(len(self.run)), strict=True):
            held = held.double().cpu()
            if self.run.kind == "sgd":  # which holds none where there is no momentum
                columns = self.run.columns
                made = made * torch.as_tensor(columns.spread([float(self._momenta[i]) for i in columns.groups]))
            apart, size = float((made - held).norm()), float(held.norm())
            rounded = _ROUNDED if exact else _ROUNDED_HALF
            if not apart <= rounded * size + torch.finfo(torch.float32).tiny:
                raise ValueError(
                    f"optimizer: its {name} is not what the recorded gradients make (off by {apart:.2g} of "
                    f"{size:.2g}); were gradients, its state or the weights changed beside the loop's own steps, or "
                    "by a hook that was put on the optimizer later? Record again without that"
                )

    def _state(self) -> list[Tensor]:
        assert self.run.kind is not None
        found = []
        for state in UPDATES[self.run.kind].names:

            def of(name: str, state: str = state) -> Tensor | None:
                held = self.optimizer.state.get(self.targets[name].tensor, {}).get(state)
                return None if held is None else self.gathered.on_mask(name, held)

            found.append(self.gathered.joined(of))
        return found

    def direct(self) -> Tensor | float:
        """Return how far the optimizer goes by a gradient at once, for each column: Adam divides by a root."""
        if self.run.kind != "adam":
            return 1.0
        groups = self.optimizer.param_groups
        beta2 = torch.as_tensor(self.run.columns.spread([groups[i]["betas"][1] for i in self.run.columns.groups]))
        eps = torch.as_tensor(self.run.columns.spread([groups[i]["eps"] for i in self.run.columns.groups]))
        count = torch.as_tensor(self.run.columns.spread([float(max(c, 1)) for c in self._counts]))
        second = self._state()[1].double().cpu() / (1 - beta2**count)
        return torch.where(second > 0, 1 / (second.sqrt() + eps), 0)

    def _weights(self) -> Tensor:
        return self.gathered.joined(lambda name: self.gathered.on_mask(name, self.targets[name].tensor))


def _each(value: Any, named: Named, usual: float) -> Tensor:
    """Return one number for each sample [n]."""
    value = usual if value is None else value
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").expand(named.n)
