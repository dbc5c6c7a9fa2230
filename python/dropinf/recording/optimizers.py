"""What an optimizer does to each coordinate in one step, and the adjoint of that.

All of it acts on each coordinate alone, so it holds on a mask as on the whole weights. A projection that mixes
coordinates (a Gaussian, a rotation) has no such update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["adam", "sgd"]
Number = float | Tensor  # one for all columns, or one for each [K]
_ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay")
_SGD = ("lr", "momentum", "dampening", "weight_decay")
# Settings that make an update another than the one below.
_OTHERS = {"amsgrad": False, "differentiable": False}


def kind_of(optimizer: torch.optim.Optimizer) -> tuple[Kind | None, str]:
    """Return which update an optimizer makes, and where it is none that is known, why."""
    name = type(optimizer).__name__
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: {name} has maximize=True, and samples' parts would count the other way round; minimize the "
            "negative loss"
        )
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        return None, f"{name} is none of AdamW, Adam and SGD"
    for group in optimizer.param_groups:
        for setting, usual in _OTHERS.items():
            if group.get(setting, usual) != usual:
                return None, f"{name} has {setting}={group[setting]}"
    return "sgd" if type(optimizer) is torch.optim.SGD else "adam", ""


def settings_of(kind: Kind | None, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one of an optimizer's parameter groups that its update takes."""
    if kind == "adam":
        beta1, beta2 = group["betas"]
        values = {**group, "beta1": beta1, "beta2": beta2}
        found = {name: float(values[name]) for name in _ADAM}
        is_w = type(optimizer) is torch.optim.AdamW  # of which older releases of torch have no such entry
        return found | {"decoupled": float(group.get("decoupled_weight_decay", is_w))}
    if kind == "sgd":
        return {name: float(group[name]) for name in _SGD} | {"nesterov": float(group["nesterov"])}
    return {"lr": float(group.get("lr", 1.0))}


@dataclass(frozen=True)
class Columns:
    """How the columns [K] of rows are split: a layer each, in order; ``groups``: the parameter group of each layer."""

    widths: Sequence[int]
    groups: Sequence[int]

    def spread(self, by_layer: Sequence[float]) -> Number:
        """Return a number of each layer for its columns: one number where all are equal."""
        if len(set(by_layer)) == 1:
            return by_layer[0]
        values = torch.tensor(by_layer, dtype=torch.float64, device="cpu")
        return values.repeat_interleave(torch.tensor(self.widths, device="cpu"))


@dataclass
class Adjoint:
    """How much the queries' losses depend on the optimizer's state before a step: on the weights, and on its moments.

    Each is [Q, K], float64.
    """

    weights: Tensor
    state: list[Tensor]


@dataclass(frozen=True)
class Back:
    """What a step gives back: the adjoint of the gradient that the optimizer got [Q, K], of what stood before it, and
    how much of the gradient goes into the weights at once [K] or one number."""

    gradient: Tensor
    before: Adjoint
    direct: Number


class Update:
    """One step of an optimizer on the columns of a mask.

    ``names``: of its state. ``live``: which columns it changed [K]; None: all.
    """

    names: tuple[str, ...] = ()

    def __init__(self, columns: Columns, groups: Sequence[Mapping[str, float]], counts: Sequence[int]) -> None:
        self.columns, self.groups = columns, groups
        self.count = columns.spread([float(max(c, 1)) for c in counts])  # of steps that changed it, this one included
        live = columns.spread([float(c > 0) for c in counts])
        self.live = live > 0 if isinstance(live, Tensor) else None if live else torch.zeros((), dtype=torch.bool)

    def of(self, name: str) -> Number:
        """Return a setting of the parameter groups, for the columns."""
        return self.columns.spread([self.groups[i][name] for i in self.columns.groups])

    def advance(self, state: list[Tensor], gradient: Tensor, weights: Tensor | None) -> list[Tensor]:
        """Return the state [K] each after the step. ``weights`` [K]: before it, where they decay by their gradient."""
        after = self._advance(state, self.decayed(gradient, weights))
        return [self._only(new, old) for new, old in zip(after, state, strict=True)]

    def back(
        self,
        adjoint: Adjoint,
        after: list[Tensor],
        gradient: Tensor,
        weights: Tensor | None,
        part: Tensor | None = None,
    ) -> Back:
        """Return what the step gives back. ``after``: the state behind it; ``gradient`` [K]: what the optimizer got.

        ``part`` [K]: the largest part of the gradient that is one sample's. Where the derivative would have it change
        an update by more than an update can be, as where parts cancel by chance in Adam's first step, it is cut down.
        None: it is the derivative everywhere.
        """
        found = self._back(adjoint, after, self.decayed(gradient, weights), part)
        before = Adjoint(
            self._only(found.before.weights, adjoint.weights),
            [self._only(new, old) for new, old in zip(found.before.state, adjoint.state, strict=True)],
        )
        zero = torch.zeros((), dtype=torch.float64)
        direct = self._only(torch.as_tensor(found.direct, dtype=torch.float64), zero)
        return Back(self._only(found.gradient, zero), before, direct)

    def _only(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.live is None else torch.where(self.live, new, old)

    def move(self, after: list[Tensor], gradient: Tensor, weights: Tensor) -> Tensor:
        """Return the weights [K] behind the step. ``after``: the state behind it; ``weights``: before it."""
        return self._only(self._move(after, self.decayed(gradient, weights), weights), weights)

    def decayed(self, gradient: Tensor, weights: Tensor | None) -> Tensor:
        """Return the gradient with the part of weight decay that goes through it."""
        return gradient if weights is None else gradient + self._coupled * weights

    @property
    def _coupled(self) -> Number:
        found = [g.get("weight_decay", 0.0) * (not g.get("decoupled", 0.0)) for g in self.groups]
        return self.columns.spread([found[i] for i in self.columns.groups])

    def _advance(self, state: list[Tensor], g: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _move(self, after: list[Tensor], g: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, adjoint: Adjoint, after: list[Tensor], g: Tensor, part: Tensor | None) -> Back:
        raise NotImplementedError


class AdamUpdate(Update):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and Adam, as torch.optim has them."""

    names = ("exp_avg", "exp_avg_sq")

    def _advance(self, state: list[Tensor], g: Tensor) -> list[Tensor]:
        (m, v), b1, b2 = state, self.of("beta1"), self.of("beta2")
        return [b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g]

    def _back(self, adjoint: Adjoint, after: list[Tensor], g: Tensor, part: Tensor | None) -> Back:
        (m, v), (of_m, of_v), b1, b2 = after, adjoint.state, self.of("beta1"), self.of("beta2")
        c1, c2 = 1 - b1**self.count, 1 - b2**self.count
        root = (v / c2).sqrt()
        moved = root > 0  # no gradient so far: the update has no derivative, and rows are zero
        gain = self.of("lr") / c1 / (root + self.of("eps"))  # of a moment, into the weights
        slope = torch.where(moved, gain * m / (root + self.of("eps")) / (2 * c2 * root.clamp(min=1e-300)), 0)
        own = (2 * (1 - b2) * g * slope - (1 - b1) * gain) * moved
        if part is not None:
            most = 2 * self.of("lr") * (1 - b1) / c1 * (c2 / (1 - b2)) ** 0.5
            own = torch.where(own.abs() * part > most, own.sign() * most / part, own)
        gradient = adjoint.weights * own + ((1 - b1) * of_m + 2 * (1 - b2) * g * of_v) * moved
        of_m = of_m - adjoint.weights * gain
        of_v = of_v + adjoint.weights * slope
        weights = adjoint.weights * self._kept + self._coupled * gradient
        return Back(gradient, Adjoint(weights, [b1 * of_m, b2 * of_v]), (1 - b1) * gain * moved)

    @property
    def _kept(self) -> Number:
        """What decay leaves of the weights."""
        decoupled = [g["weight_decay"] * g["lr"] * g["decoupled"] for g in self.groups]
        return 1 - self.columns.spread([decoupled[i] for i in self.columns.groups])

    def _move(self, after: list[Tensor], g: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        m, v = after
        c1, c2 = 1 - self.of("beta1") ** self.count, 1 - self.of("beta2") ** self.count
        return weights * self._kept - self.of("lr") / c1 * m / ((v / c2).sqrt() + self.of("eps"))


class SGDUpdate(Update):
    """SGD with momentum, as torch.optim has it: its first step takes the gradient whole."""

    names = ("momentum_buffer",)

    @property
    def _taken(self) -> Number:
        """How much of a gradient goes into the momentum."""
        first = torch.as_tensor(self.count, dtype=torch.float64) == 1
        plain = self._wide("momentum") == 0  # then it is no momentum, and nothing is dampened
        return torch.where(first | plain, 1.0, 1 - self._wide("dampening"))

    @property
    def _carried(self) -> Number:
        first = torch.as_tensor(self.count, dtype=torch.float64) == 1
        return torch.where(first, 0.0, self._wide("momentum"))

    def _wide(self, name: str) -> Tensor:
        return torch.as_tensor(self.of(name), dtype=torch.float64)

    def _advance(self, state: list[Tensor], g: Tensor) -> list[Tensor]:
        return [self._carried * state[0] + self._taken * g]

    def _move(self, after: list[Tensor], g: Tensor, weights: Tensor) -> Tensor:
        ahead = self._wide("nesterov") > 0
        return weights - self.of("lr") * torch.where(ahead, g + self._wide("momentum") * after[0], after[0])

    def _back(self, adjoint: Adjoint, after: list[Tensor], g: Tensor, part: Tensor | None) -> Back:  # noqa: ARG002
        nesterov, lr = self._wide("nesterov"), self.of("lr")
        through = torch.where(nesterov > 0, self._wide("momentum"), 1.0)
        of_buffer = adjoint.state[0] - lr * through * adjoint.weights
        gradient = self._taken * of_buffer - lr * nesterov * adjoint.weights
        weights = adjoint.weights + self._coupled * gradient
        return Back(gradient, Adjoint(weights, [self._carried * of_buffer]), lr * (through * self._taken + nesterov))


UPDATES: dict[Kind, type[Update]] = {"adam": AdamUpdate, "sgd": SGDUpdate}
